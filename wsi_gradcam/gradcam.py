"""`GradCAM`: explain plain images with any network, without slides."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_gradcam.cam.auto import choose, make_program
from wsi_gradcam.cam.engine import Explained, device_of, explain_batch
from wsi_gradcam.cam.explainer import check_methods, locate_layers
from wsi_gradcam.cam.facts import AUTO, ENGINES, METHOD_INFO, PRECISIONS, Choice
from wsi_gradcam.cam.layers import evaluating
from wsi_gradcam.cam.program import EagerProgram
from wsi_gradcam.cam.targets import PREDICTED, Target, parse_targets
from wsi_gradcam.cam.trunks import exact
from wsi_gradcam.errors import ConfigError, ModelError, TargetError, WsiGradcamError, is_out_of_memory, one_line
from wsi_gradcam.models.load import Model, layer_name, load_model
from wsi_gradcam.models.outputs import Passed, one_row, separate, unwrapped, with_logits

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import Layer
    from wsi_gradcam.cam.program import Program
    from wsi_gradcam.models.spec import ModelSpec

LOG = logging.getLogger("wsi_gradcam")
OneTarget = int | str | Callable[[Tensor], Tensor]
MIN_IMAGES_FOR_CHOICE = 16  # images in a call: for fewer, trying engines costs more than it can gain
PROGRAMS_KEPT = 8


@dataclass(frozen=True)
class Explanation:
    """A network's answers for images, and their explanations.

    Attributes:
        cams: raw signed maps, float32 [B, T, h, w], of the first method, on the layer's grid, or on that of the images
            for methods that explain pixels.
        logits: float32 [B, K].
        by_method: the maps of every method.
        targets: what is explained, T labels.
    """

    cams: Tensor
    logits: Tensor
    by_method: dict[str, Tensor]
    targets: tuple[str, ...]

    def enlarged(self, height: int, width: int) -> Tensor:
        """Return `cams` enlarged by bilinear interpolation to an image's size, [B, T, height, width], for overlays."""
        return F.interpolate(self.cams, (height, width), mode="bilinear", align_corners=False)


class GradCAM:
    """Explain images with Grad-CAM and related methods for any CNN, with prediction and explanation in one pass.

    >>> import torch
    >>> from wsi_gradcam import GradCAM
    >>> _ = torch.manual_seed(0)
    >>> network = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    ...     torch.nn.Linear(8, 2),
    ... )
    >>> explain = GradCAM(network, layer="1")
    >>> found = explain(torch.rand(4, 3, 16, 16), targets=[0, 1])
    >>> found.cams.shape, found.logits.shape
    (torch.Size([4, 2, 16, 16]), torch.Size([4, 2]))

    With global average pooling and a linear layer, a map's sum plus the bias is the logit:

    >>> torch.allclose(found.cams.sum(dim=(2, 3)) + network[-1].bias, found.logits, atol=1e-5)
    True

    Args:
        model: a network from normalised images to logits, anything that `--model` accepts, or a loaded `Model`.
        layer: the module to explain, its name, or several names joined by "+"; detected by default.
        method: a name from `wsi_gradcam.cam.facts`, or several joined by commas, which share one forward pass.
        precision: that of the network up to the layer: float32, tf32 (GPUs), bfloat16, float16; auto: the fastest that
            preserves the maps. float32 means IEEE float32, whatever torch's flags say.
        engine: what runs the network up to the layer: eager, compile, cudagraphs, openvino; auto: the fastest, chosen
            in the first call with 16 images or more; until then eager float32 is used.
        batch_size: images per forward pass.
        classes: names of the outputs, so that targets can be named.
        trust_code: allow code in a model given by name to run, see `load_model`.

    The weights may change between calls, as in training: whatever was derived from them is then derived again.

    Raises:
        ConfigError: a method, engine or precision that does not exist.
    """

    def __init__(
        self,
        model: nn.Module | Model | ModelSpec | str | PathLike[str],
        layer: str | nn.Module | None = None,
        method: str | Sequence[str] = "gradcam",
        precision: str = AUTO,
        engine: str = AUTO,
        *,
        batch_size: int = 32,
        classes: Sequence[str] | None = None,
        trust_code: bool = False,
    ) -> None:
        names = method.split(",") if isinstance(method, str) else method
        self.methods = tuple(name.strip() for name in names)
        for name in self.methods:
            _check("method", name, METHOD_INFO)
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ConfigError(
                f"method {method!r} is empty or contains duplicates; expected some of {', '.join(METHOD_INFO)}"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size} is too small; expected 1 or more")
        _check("engine", engine, (AUTO, *ENGINES))
        _check("precision", precision, (AUTO, *PRECISIONS))
        if not isinstance(model, nn.Module | Model):
            model = load_model(fspath(model) if isinstance(model, PathLike) else model, trust_code=trust_code)
        self._module = model.module if isinstance(model, Model) else unwrapped(model)
        self._raw = not isinstance(model, Model)
        self._classes = tuple(classes or (model.classes if isinstance(model, Model) else ()))
        self._wanted = layer_name(self._module, layer) or (model.layer if isinstance(model, Model) else None)
        self._requested = engine, precision
        self._batch_size = batch_size
        self._located: dict[tuple[int, ...], tuple[nn.Module, tuple[Layer, ...]]] = {}
        self._programs: dict[tuple[object, ...], Program] = {}
        self._weights: list[tuple[int, int]] = []
        self._outputs = 0
        self._lock = threading.Lock()  # a tap is a hook on the module: one pass at a time
        self.choice: Choice | None = None

    @torch.inference_mode(False)  # also for a caller in inference mode, where there are no gradients
    def __call__(self, images: Tensor, targets: OneTarget | Sequence[OneTarget] | None = None) -> Explanation:
        """Explain `images`, normalised float [B, 3, H, W], for each of `targets`.

        A target is a class by index or name, "predicted", "all", a contrast such as "tumor-stroma", or a function of
        logits [B, K] that returns a number per image [B]. By default, each image's predicted class is explained.

        Raises:
            ModelError: images that the network does not accept, or a network that cannot be explained.
            LayerError: no such layer, or one that a method cannot explain.
            TargetError: a target that the network does not have.
        """
        parts, parsed = [], None
        with self._lock, exact(device_of(self._module)):
            images = self._checked(images)
            for batch in torch.split(images, self._batch_size):
                program = self._program(batch, enough=len(images) >= MIN_IMAGES_FOR_CHOICE)
                if parsed is None:
                    parsed = self._parsed(targets)
                parts.append(_explain(program, batch, parsed, self.methods))
        assert parsed is not None  # an empty batch is refused
        by_method = {name: torch.cat([part.cams[name] for part in parts]) for name in self.methods}
        labels = tuple(t.label if isinstance(t, Target) else getattr(t, "__name__", "function") for t in parsed)
        return Explanation(by_method[self.methods[0]], torch.cat([part.logits for part in parts]), by_method, labels)

    @torch.inference_mode(False)
    def layers(self, images: Tensor) -> tuple[str, ...]:
        """Names of the layers that are explained for images of this size."""
        with self._lock:
            return tuple(layer.name for layer in self._locate(self._checked(images))[1])

    def _checked(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images) or not images.is_floating_point():
            given = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise ModelError(f"images are {given}, expected normalised float images [B, 3, H, W]")
        self._forget_if_changed()
        device = next(iter(self._module.parameters()), images).device
        images = images.detach().to(device, torch.float32)
        return images.clone() if images.is_inference() else images

    def _forget_if_changed(self) -> None:
        """Drop engines whose copies of the weights are out of date."""
        tensors = list(_tensors(self._module))
        try:
            weights = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        except RuntimeError as error:  # inference tensors have no version counters
            raise ModelError(
                "the model was created under torch.inference_mode, which rules out gradients; create it outside"
            ) from error
        if weights != self._weights:
            self._located, self._programs, self.choice, self._weights = {}, {}, None, weights

    def _locate(self, images: Tensor) -> tuple[nn.Module, tuple[Layer, ...]]:
        size = tuple(images.shape[1:])
        if size not in self._located:
            noise = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(images.device)
            try:
                network, self._outputs, end = _logits_of(self._module, noise, self._raw)
                module, layers, _ = locate_layers(network, self._wanted, noise)
            except WsiGradcamError:
                raise
            except Exception as error:  # the network's own code may raise anything
                raise ModelError(f"the model fails on images of shape {size}: {one_line(error)}") from error
            if end is not None:
                LOG.warning("the model ends in %s: its inputs are explained as logits", end.name)
            check_methods("the model", EagerProgram(module, layers), self.methods, noise)
            self._located[size] = module, layers
        return self._located[size]

    def _program(self, batch: Tensor, enough: bool) -> Program:
        module, layers = self._locate(batch)
        if self.choice is None and (enough or AUTO not in self._requested):
            self.choice, program = choose(module, layers, *self._requested, batch, len(batch))
            self._programs[self.choice.engine, self.choice.precision, *batch.shape[1:]] = program
        if self.choice is None:
            engine, precision = self._requested
            engine, precision = engine.replace(AUTO, "eager"), precision.replace(AUTO, "float32")
        else:
            engine, precision = self.choice.engine, self.choice.precision
        key = engine, precision, *batch.shape[1:]
        if key not in self._programs:
            while len(self._programs) >= PROGRAMS_KEPT:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = make_program(module, layers, engine, precision, batch)
        return self._programs[key]

    def _parsed(self, targets: Any) -> list[Target | Callable[[Tensor], Tensor]]:
        if targets is None:
            return [Target(PREDICTED)]
        several = list(targets) if isinstance(targets, Sequence) and not isinstance(targets, str) else [targets]
        if not several:
            raise TargetError("targets is empty; leave it out for the predicted class, or give a list")
        classes = self._classes or tuple(str(i) for i in range(self._outputs))
        if len(classes) != self._outputs:
            raise TargetError(f"{len(classes)} classes are named, but the model has {self._outputs} outputs")
        parsed: list[Target | Callable[[Tensor], Tensor]] = []
        for target in several:
            parsed += [target] if callable(target) else parse_targets([str(target)], classes)
        return parsed


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Return parameters and buffers, some perhaps twice; three times as fast as a lookup by name in every call."""
    modules: list[nn.Module | None] = [module]
    for part in modules:
        if part is not None:
            modules += part._modules.values()
            yield from (tensor for tensor in part._parameters.values() if tensor is not None)
            yield from (tensor for tensor in part._buffers.values() if tensor is not None)


def _logits_of(module: nn.Module, images: Tensor, raw: bool) -> tuple[nn.Module, int, Passed | None]:
    """Return the network with logits [B, K] as output, tried on `images`; K; and, for a plain module, how it ended."""
    with evaluating(module), torch.no_grad():
        network, logits = with_logits(module, images, None)
    if logits.ndim != 2 or len(logits) != len(images) or not logits.shape[1]:
        raise ModelError(
            f"the model returns shape {tuple(logits.shape)} for a batch of {len(images)}, expected ({len(images)}, "
            "classes); wrap it so that it returns one logit per class"
        )
    if not torch.isfinite(logits).all():
        raise ModelError("the model gives NaN or infinite values on noise images; check its weights")
    end = None
    if raw:
        with evaluating(module), torch.no_grad():
            network, _ = one_row(network, images[:1])
            network, end = separate(network, images, logits)
    return network, logits.shape[1], end


def _explain(program: Program, images: Tensor, targets: Sequence[Any], methods: Sequence[str]) -> Explained:
    try:
        return explain_batch(program, images, targets, methods)
    except WsiGradcamError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelError(
                f"out of memory with {len(images)} images at once; give GradCAM a smaller batch_size"
            ) from error
        raise


def _check(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise ConfigError(f"{what} {name!r} is not known; expected one of {', '.join(known)}")
