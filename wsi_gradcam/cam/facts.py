"""Methods, engines, layers and models as plain data, so that clients can plan without loading torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from wsi_gradcam.models.spec import Activation
    from wsi_gradcam.tissue.stain import Stain


@dataclass(frozen=True)
class MethodInfo:
    """Properties of a method that are known before it runs.

    Attributes:
        asks: `gradient`: a function of activation and gradient alone; `model`: runs the model again, many times,
            see `wsi_gradcam.cam.methods`.
        grid: `layer`: a map of the layer's cells; `pixels`: a map of the input's pixels.
        scale: factor from the raw map to the heatmap. `cells`: the number of the map's values, if the raw map sums to
            (a part of) the logit, so that the heatmap's mean is in logits; `one`: shown as it is.
        unit: `logit`, if the heatmap's mean is (a part of) the logit; `drop`, the logits that are lost if the place is
            covered; or `arbitrary`, if the values of two images cannot be compared in logits.
        title: its name in the literature.
    """

    asks: Literal["gradient", "model"]
    grid: Literal["layer", "pixels"]
    scale: Literal["cells", "one"]
    unit: Literal["logit", "drop", "arbitrary"]
    title: str


NO_METHOD = "none"  # in place of a method: no pixel is explained

METHOD_INFO: dict[str, MethodInfo] = {
    "cam": MethodInfo("gradient", "layer", "one", "logit", "CAM"),
    "gradcam": MethodInfo("gradient", "layer", "cells", "logit", "Grad-CAM"),
    "gradcam++": MethodInfo("gradient", "layer", "one", "arbitrary", "Grad-CAM++"),
    "hirescam": MethodInfo("gradient", "layer", "cells", "logit", "HiResCAM"),
    "layercam": MethodInfo("gradient", "layer", "cells", "logit", "LayerCAM"),
    "xgradcam": MethodInfo("gradient", "layer", "cells", "logit", "XGrad-CAM"),
    "eigencam": MethodInfo("gradient", "layer", "one", "arbitrary", "Eigen-CAM"),
    "finercam": MethodInfo("gradient", "layer", "cells", "logit", "Finer-CAM"),
    "scorecam": MethodInfo("model", "layer", "one", "arbitrary", "Score-CAM"),
    "ablationcam": MethodInfo("model", "layer", "one", "arbitrary", "Ablation-CAM"),
    "occlusion": MethodInfo("model", "layer", "one", "drop", "Occlusion"),
    "gradient": MethodInfo("model", "pixels", "one", "arbitrary", "Gradient"),
    "smoothgrad": MethodInfo("model", "pixels", "one", "arbitrary", "SmoothGrad"),
    "integrated_gradients": MethodInfo("model", "pixels", "cells", "logit", "Integrated Gradients"),
    "guided_backprop": MethodInfo("model", "pixels", "one", "arbitrary", "Guided backpropagation"),
}


MAX_PREFIX_TOKENS = 16  # class, distillation and register tokens; published models have up to 9


@dataclass(frozen=True)
class Layout:
    """Axes of a layer's output for a batch of B images.

    Attributes:
        axes: `bkhw`; `bhwk` (Swin); or `bnk`, one token per cell in rows, after `prefix` tokens without a position in
            the image (ViT).
        channels, height, width: of the map.
    """

    axes: Literal["bkhw", "bhwk", "bnk"]
    channels: int
    height: int
    width: int
    prefix: int = 0

    def to_map(self, value: Tensor) -> Tensor:
        """Return the map [B, K, h, w] in an output, as a view that gradients pass through."""
        if self.axes == "bkhw":
            return value
        if self.axes == "bhwk":
            return value.permute(0, 3, 1, 2)
        cells = value[:, self.prefix :].transpose(1, 2)
        return cells.reshape(len(value), self.channels, self.height, self.width)

    def put(self, value: Tensor, new: Tensor) -> Tensor:
        """Return the output `value` with the map `new` [B, K, h, w] in it; tokens without a place stay."""
        if self.axes == "bkhw":
            return new
        if self.axes == "bhwk":
            return new.permute(0, 2, 3, 1)
        import torch  # clients, which only pass layouts on, never load it

        return torch.cat([value[:, : self.prefix], new.flatten(2).transpose(1, 2)], dim=1)


@dataclass(frozen=True)
class Layer:
    """A layer to explain: its name in the model, and the layout of the map in its output."""

    name: str
    layout: Layout


def find_layout(output: Tensor, images: Tensor) -> Layout | None:
    """Return the layout of a layer's `output` for `images` [B, 3, H, W]; None if it contains no map of that shape.

    A map has more than one cell, and its cells are square up to rounding. If channels could be first or last, first is
    assumed; of several possible numbers of prefix tokens, the smallest.
    """
    if output.ndim < 3 or len(output) != len(images) or not output.is_floating_point():
        return None
    proportion = images.shape[2] / images.shape[3]
    if output.ndim == 4:
        if _is_grid(output.shape[2], output.shape[3], proportion):
            return Layout("bkhw", output.shape[1], output.shape[2], output.shape[3])
        if _is_grid(output.shape[1], output.shape[2], proportion):
            return Layout("bhwk", output.shape[3], output.shape[1], output.shape[2])
    if output.ndim == 3:
        for prefix in range(min(MAX_PREFIX_TOKENS, output.shape[1] - 2) + 1):
            tokens = output.shape[1] - prefix
            height = max(1, round(math.sqrt(tokens * proportion)))
            width = tokens // height
            # Exact, unlike with rounded strides of convolutions: many numbers are products.
            if height * width == tokens > 1 and abs(height - width * proportion) < 0.5:
                return Layout("bnk", output.shape[2], height, width, prefix)
    return None


def _is_grid(height: int, width: int, proportion: float) -> bool:
    return height * width > 1 and abs(height - width * proportion) <= max(1.0, proportion)


@dataclass(frozen=True)
class BagFacts:
    """The slide-level part of a model, which turns the features of a slide's patches into its answer.

    Attributes:
        encoder: digest of the encoder alone; `ModelFacts.digest` is that of both.
        feature_dim: length of a feature vector.
        attention: labels of its attention heads; empty if it has none.
        whole: for one that sees all patches at once, the bytes needed to explain a bag, as the coefficients of a
            polynomial of the number of patches, highest power first; () for one that works in chunks.
    """

    encoder: str
    feature_dim: int
    attention: tuple[str, ...]
    whole: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """A model's description without its weights.

    Attributes:
        patch_px: (height, width) of the patch that is read from the slide for one input.
        view: (y, x, height, width) of the part of a patch that the network sees, in patch px.
        layers: the layers that are explained; `traced`: whether their names are those of operators of the model's
            graph.
        cam_shape: (h, w) of the maps; with several layers, of the finest.
        parameters: the number of the model's parameters.
        activation_bytes: the largest input plus output of any layer for one patch.
        batch_size: patches per forward pass.
        choice: engine and precision.
        stain: the stain to which slides are normalised; None for no normalisation.
        notes: what was done to explain it, and which parts of its files were used, one line each.
        bag: for a slide-level model, whose classes and activation are the slide's, and everything else its encoder's.
    """

    name: str
    source: str
    digest: str
    license: str | None
    classes: tuple[str, ...]
    activation: Activation | Literal["hazard"]
    patch_px: tuple[int, int]
    view: tuple[float, float, float, float]
    mpp: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layers: tuple[Layer, ...]
    traced: bool
    cam_shape: tuple[int, int]
    parameters: int
    activation_bytes: int
    batch_size: int
    choice: Choice
    stain: Stain | None = None
    notes: tuple[str, ...] = ()
    bag: BagFacts | None = None

    @property
    def layer(self) -> str:
        """The layers' names joined by "+"."""
        return "+".join(layer.name for layer in self.layers)


AUTO = "auto"
ENGINES = ("eager", "compile", "cudagraphs", "openvino")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


EXACT, SCALED = "exact", "scaled"  # ways to decode tiles


@dataclass(frozen=True)
class Trial:
    """An engine's trial in a precision, on patches of the run.

    Attributes:
        patches_per_s: explained patches per second; None if it could not run or was ruled out before it was timed.
        pearson: the lowest correlation of a map with that of eager float32; None if not checked.
        same_peak: share of maps whose highest cell is the same as in float32.
        peak_risk: expected share of maps, among many, whose highest cell would be another.
        remark: why it was not chosen.
    """

    engine: str
    precision: str
    patches_per_s: float | None = None
    pearson: float | None = None
    same_peak: float | None = None
    peak_risk: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Choice:
    """The engine and precision of a run, and how tiles are decoded: the same on every worker and after every resume.

    Attributes:
        trials: of engines and precisions.
        decode: "exact", or "scaled" if tiles are reduced while they are decoded.
        decode_trial: the likeness of maps from scaled decoding to those from exact decoding; None if not tried.
    """

    engine: str
    precision: str
    trials: tuple[Trial, ...] = ()
    decode: str = EXACT
    decode_trial: Trial | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the choice as plain values."""
        values = {**asdict(self), "trials": [asdict(trial) for trial in self.trials]}
        if self == Choice(self.engine, self.precision, self.trials):  # as in runs of older versions
            del values["decode"], values["decode_trial"]
        return values

    @classmethod
    def from_json(cls, values: Any) -> Choice:
        """Return the choice that `to_json` gave; raises KeyError or TypeError for other values."""
        trial = values.get("decode_trial")
        return cls(
            values["engine"],
            values["precision"],
            tuple(Trial(**trial) for trial in values["trials"]),
            values.get("decode", EXACT),
            None if trial is None else Trial(**trial),
        )
