"""What planning must know of a model: sent around instead of the model. Needs no torch, so clients stay thin.

Which engine and precision explain a run: asked for, or the fastest that keeps the maps. Needs no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_gradcam.cam.layout import Layer
    from wsi_gradcam.models.activation import Activation
    from wsi_gradcam.tissue.stain import Stain


@dataclass(frozen=True)
class ModelFacts:
    """A model's description without its weights.

    Attributes:
        patch_px: (height, width) of what is read from the slide for one input.
        view: (y, x, height, width) of the part of a patch that the network sees, in patch px.
        layers: what is explained; `traced`: their names are those of operators of the model's graph.
        cam_shape: (h, w) of the maps; of several layers, of the finest.
        parameters: how many numbers the model has.
        activation_bytes: the largest input plus output of any layer for one patch.
        batch_size: patches per forward pass.
        choice: engine and precision.
        stain: what slides are normalised to; None: they stay as they are.
    """

    name: str
    source: str
    digest: str
    license: str | None
    classes: tuple[str, ...]
    activation: Activation
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

    @property
    def layer(self) -> str:
        """The layers' names in one word."""
        return "+".join(layer.name for layer in self.layers)


AUTO = "auto"
ENGINES = ("eager", "compile", "openvino")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Trial:
    """How an engine did in a precision, on patches of the run.

    Attributes:
        patches_per_s: explained patches; None where it could not run or was ruled out before it was timed.
        pearson: the lowest correlation of a map with eager float32's; None where not checked.
        same_peak: share of maps whose highest cell is float32's too.
        peak_risk: expected share of maps, among many, whose highest cell would be another.
        remark: why it was not taken.
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
    """The engine and precision of a run, the same on every worker and after every resume."""

    engine: str
    precision: str
    trials: tuple[Trial, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The choice as plain values."""
        return {**asdict(self), "trials": [asdict(trial) for trial in self.trials]}

    @classmethod
    def from_json(cls, values: Any) -> Choice:
        """The choice that `to_json` gave; raises KeyError or TypeError for other values."""
        return cls(values["engine"], values["precision"], tuple(Trial(**trial) for trial in values["trials"]))
