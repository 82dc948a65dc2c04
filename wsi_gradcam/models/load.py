"""Load the network of a specification, or take one from the caller, and fill in everything that was left open."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from wsi_gradcam.errors import LayerError, ModelError, one_line, quoted
from wsi_gradcam.models.outputs import Passed, one_row, separate, unwrap_parts, unwrapped, with_logits
from wsi_gradcam.models.sources import Built, load_weights
from wsi_gradcam.models.sources.hf import build_hf, weights_file
from wsi_gradcam.models.sources.programs import PROGRAM, build_export, build_torchscript, build_wsinfer, failure
from wsi_gradcam.models.sources.python import (
    build_function,
    build_timm,
    build_torchvision,
    source_digest,
    without_head,
)
from wsi_gradcam.models.spec import FILES, RANDOM, ModelSpec, Resizing, explain_validation, read_spec, regular
from wsi_gradcam.models.staining import stain_target
from wsi_gradcam.models.transform import Transform, make_transform
from wsi_gradcam.system.processes import spare_triton, tensors_only

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wsi_gradcam.models.spec import Activation
    from wsi_gradcam.tissue.stain import Stain


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NO_MEAN, NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SOURCES: dict[str, Callable[[ModelSpec], Built]] = {
    "timm": build_timm,
    "torchvision": build_torchvision,
    "torchscript": build_torchscript,
    "export": build_export,
    "wsinfer": build_wsinfer,
    "hf": build_hf,
}
_SEEDED = threading.Lock()  # torch's seed belongs to the process: networks built at the same time would share it
BATCH_TOLERANCE = 1e-3  # share of the largest logit; kernels for one image differ from those for two by far less


@dataclass(frozen=True)
class Model:
    """A network ready to explain patches.

    Attributes:
        spec: the specification that it was made from.
        name: its name in results.
        source: where it comes from; `runs_code` says whether loading it runs code that it contains.
        module: the network, from float32 [B, 3, *input_px] as made by `prepare` to logits [B, K]; in evaluation mode,
            with frozen parameters.
        classes: K names.
        mpp: micrometres per pixel of the patch; None when not known.
        transform: what `prepare` does.
        activation: softmax, sigmoid or none.
        layer: the layer to explain, if the specification names one.
        digest: sha256 of the weights and of all other attributes that change results.
        stain: the stain to which slides are normalised before `prepare`; None for no normalisation.
        notes: what was done to explain it, and which parts of its files were used, one line each.
    """

    spec: ModelSpec
    name: str
    source: str
    module: nn.Module
    classes: tuple[str, ...]
    mpp: float | None
    transform: Transform
    activation: Activation
    layer: str | None
    license: str | None
    runs_code: bool
    digest: str
    stain: Stain | None = None
    notes: tuple[str, ...] = ()

    @property
    def patch_px(self) -> tuple[int, int]:
        """(height, width) of the patch that is read from the slide."""
        return self.transform.patch_px

    @property
    def input_px(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        return self.transform.input_px

    @property
    def view(self) -> tuple[float, float, float, float]:
        """(y, x, height, width) of the part of a patch that the network sees, in pixels of the patch."""
        return self.transform.view

    @property
    def mean(self) -> tuple[float, float, float]:
        """Subtracted from RGB in 0..scale."""
        return self.transform.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Divides RGB after the mean has been subtracted."""
        return self.transform.std

    def prepare(self, rgb: Tensor) -> Tensor:
        """Turn uint8 [B, *patch_px, 3] into float32 [B, 3, *input_px] as the network expects it, on the same device."""
        return self.transform(rgb)


def load_model(spec: ModelSpec | str | PathLike[str], device: str = "cpu", *, trust_code: bool = False) -> Model:
    """Load the model of a specification, or of anything that `--model` accepts, on `device`.

    Its files are first compared with a given `sha256`, then permission is checked; only then is anything imported,
    unpickled or run.

    Args:
        trust_code: allow code in the model to run, see `ModelSpec.runs_code`.

    Raises:
        ModelError: no such source, weights that do not fit, a wrong checksum, an output of the wrong shape, or code
            that is not allowed to run.
    """
    spec = (spec if isinstance(spec, ModelSpec) else read_spec(fspath(spec))).trusting(trust_code)
    check_files(spec)
    spec.check_trusted()
    spare_triton()
    built = _build(spec)
    built = replace(built, module=unwrap_parts(built.module))
    if (path := spec.weights_path) is not None:
        notes = load_weights(built.module, path, spec)
        built = replace(built, notes=(*built.notes, *notes))
    if spec.is_encoder:
        built = without_head(built, spec)
    return finish(spec, built, device)


def check_files(spec: ModelSpec, always: bool = False) -> str:
    """Return the sha256 of the file that `spec.sha256` refers to, after comparing them; the file is not interpreted.

    Without `spec.sha256`, the file must exist, and is read only with `always`; otherwise "" is returned.

    Raises:
        ModelError: it is missing, not a regular file, or not the right one.
    """
    path = _source_file(spec) if spec.kind in FILES else spec.weights_path
    if path is not None and path == spec.weights_path and (path.is_dir() or not path.exists()):
        raise ModelError(f"{spec.name}: no weights file {path}; paths are relative to the model file, or {RANDOM!r}")
    if path is not None:
        regular(path, spec.name)
    if spec.sha256 is None and not always:
        return ""
    if path is None and spec.kind != "function":
        raise ModelError(
            f"{spec.name}: sha256 is that of a weights file, but there is no 'weights:'; give both or neither"
        )
    found = source_digest(spec) if path is None else _sha256(path)
    if spec.sha256 is not None and found != spec.sha256.lower():
        what = spec.source if path is None else path
        raise ModelError(f"{spec.name}: {what} has sha256 {found}, expected {spec.sha256}; download the right file")
    return found


def _source_file(spec: ModelSpec) -> Path | None:
    """Return the file of a source that is a single file, or the file with the weights in its folder."""
    path = spec.source_path
    if path is None:
        return None
    if spec.kind == "wsinfer":
        return path / PROGRAM
    if spec.kind == "hf":
        return weights_file(path, spec) if spec.sha256 is not None else None
    return path


def finish(spec: ModelSpec, built: Built, device: str = "cpu") -> Model:
    """Return the model of a built network, with everything that was left open filled in and checked.

    Raises:
        ModelError: it does not do what its specification says.
    """
    check_numbers(spec.name, built.module)
    transform = _transform(spec, built)
    checked, outputs, end = _checked(spec, _frozen(built.module), transform.input_px)
    module = _frozen(checked)
    classes = spec.classes or built.classes or tuple(str(i) for i in range(outputs))
    if len(classes) != outputs:
        raise ModelError(f"{spec.name}: {len(classes)} classes are named, but the model has {outputs} outputs")
    activation, notes = _activation(spec, built, end)
    if outputs == 1 and activation == "softmax":
        raise ModelError(
            f"{spec.name}: the softmax of a single output is always 1; add 'activation: sigmoid' (or none) and one "
            "class name to the model file"
        )
    resolved = Model(
        spec=spec,
        name=spec.name,
        source=spec.source,
        module=module.to(_device(device)),
        classes=classes,
        mpp=spec.mpp or built.mpp,
        transform=transform,
        activation=activation,
        layer=spec.layer,
        license=spec.license or built.license,
        runs_code=spec.runs_code,
        digest="",
        stain=stain_target(spec.stain, spec.folder),
        notes=(*built.notes, *notes),
    )
    return replace(resolved, digest=_digest(spec, resolved, built.code_digest, end))


def _frozen(module: nn.Module) -> nn.Module:
    """Return the module in evaluation mode, in float32, without gradients of its weights; scripted ones too."""
    for parameter in module.eval().float().parameters():
        _ = parameter.requires_grad_(False) if parameter.is_leaf else parameter.detach_()
    return module


def _activation(spec: ModelSpec, built: Built, end: Passed | None) -> tuple[Activation, tuple[str, ...]]:
    """Return how logits become probabilities, from the network's own end or else as declared, and a note on it.

    Raises:
        ModelError: the two contradict each other.
    """
    declared = spec.activation if "activation" in spec.model_fields_set else None
    if end is None:
        return declared or built.activation or spec.activation, ()
    if declared not in (None, end.activation):
        raise ModelError(
            f"{spec.name}: ends in {end.name}, but 'activation: {declared}' is declared; remove it, or use 'none' to "
            "explain the outputs as they are"
        )
    note = f"ends in {end.name}: its inputs are explained and stored as logits, its outputs are the probabilities"
    return end.activation, (note,)


def _transform(spec: ModelSpec, built: Built) -> Transform:
    patch_px = spec.patch_px or built.patch_px
    if patch_px is None:
        raise ModelError(f"{spec.name}: the input size is not known; add 'patch_px: 224' to the model file")
    plain = spec.scale is not None  # what is known about other values of white says nothing about these
    mean, std = (NO_MEAN, NO_STD) if plain else (built.mean or IMAGENET_MEAN, built.std or IMAGENET_STD)
    scale = spec.scale or built.scale or 1.0
    return make_transform(patch_px, spec.mean or mean, spec.std or std, scale, spec.transform or built.resizing)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ModelError(f"device {name!r} cannot be used here: {cause}; try --device cpu") from error
    return device


def _build(spec: ModelSpec) -> Built:
    if spec.kind == "live":
        raise ModelError(f"{spec.source}: a live module exists only in its own process; pass it to model_of")
    with _SEEDED, torch.random.fork_rng(devices=[]):  # an untrained network is the same in every process
        torch.manual_seed(0)
        if spec.kind == "function":
            return build_function(spec)
        with tensors_only():
            return SOURCES[spec.kind](spec)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_numbers(name: str, module: nn.Module) -> None:
    """Refuse weights that are NaN, with which every explanation would be NaN.

    Raises:
        ModelError: names the first such weights.
    """
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            count = int(torch.isnan(tensor).sum())
            raise ModelError(
                f"{name}: {count} of {tensor.numel()} values of {key} are NaN; its training has diverged or "
                "the file is damaged: use an earlier checkpoint"
            )


def _checked(spec: ModelSpec, module: nn.Module, input_px: tuple[int, int]) -> tuple[nn.Module, int, Passed | None]:
    """Return the network with one row of logits per image, their number, and the activation for probabilities."""
    images = torch.empty(0)
    try:
        images = torch.randn(2, 3, *input_px, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            module, output = with_logits(module, images, spec.output)
            module, alone = one_row(module, images[:1])
    except ModelError as error:
        raise ModelError(f"{spec.name}: {error}") from error
    except Exception as error:  # the model's own code may raise anything
        raise ModelError(failure(spec.name, images, error)) from error
    if output.ndim != 2 or len(output) != 2 or output.shape[1] == 0:
        raise ModelError(
            f"{spec.name}: returns shape {tuple(output.shape)} for a batch of 2, expected (2, classes); "
            "wrap the model so that it returns one logit per class"
        )
    if alone.shape != output[:1].shape or _differ(alone, output[:1]):
        raise ModelError(
            f"{spec.name}: answers differently for an image alone and in a batch; was it saved in training mode (batch "
            "normalisation, dropout)? Save it after model.eval()"
        )
    end = None
    if not (spec.activation == "none" and "activation" in spec.model_fields_set):
        try:
            with torch.no_grad():
                module, end = separate(module, images, output)
        except ModelError as error:
            raise ModelError(f"{spec.name}: {error}") from error
    return module, int(output.shape[1]), end


def _differ(found: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max()) or 1.0
    return float((found - expected).abs().max()) > BATCH_TOLERANCE * scale


def _digest(spec: ModelSpec, model: Model, code: str, end: Passed | None) -> str:
    about: list[object] = [
        spec.kind if spec.kind in FILES else model.source,  # where a file lies changes nothing
        model.classes,
        model.patch_px,
        model.mpp,
        model.mean,
        model.std,
        model.activation,
        code,
    ]
    transform = model.transform
    if transform != Transform(model.patch_px, model.mean, model.std):
        about.append([transform.scale, transform.resize_px, transform.interpolation, transform.crop])
    if spec.output is not None:
        about.append(str(spec.output))
    if model.stain is not None:
        about.append(model.stain.to_json())
    if end is not None:
        about.append(["ends in", end.name])
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(model.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def layer_name(network: nn.Module, layer: str | nn.Module | None) -> str | None:
    """Return the name of a layer in a network; a name, or several joined by "+", is returned as it is.

    Raises:
        LayerError: it is not in the network, or is neither a name nor a module.
    """
    if layer is None or isinstance(layer, str):
        return layer
    if isinstance(layer, nn.Module):
        names: list[str] = [name for name, module in network.named_modules() if module is layer and name]
        if names:
            return names[0]
    given = f"a {type(layer).__name__} that is not part of it" if isinstance(layer, nn.Module) else quoted(layer)
    raise LayerError(
        f"layer of {type(network).__name__}: is {given}; expected a name of its named_modules(), several joined by "
        "'+', or one of its own modules"
    )


def model_of(
    module: nn.Module,
    *,
    name: str | None = None,
    patch_px: int | tuple[int, int],
    mpp: float | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float | None = None,
    stain: str | Mapping[str, Any] | None = None,
    transform: Resizing | None = None,
    activation: Activation | None = None,
    layer: str | nn.Module | None = None,
    output: str | int | None = None,
    device: str = "cpu",
) -> Model:
    """Return a model of a copy of `module` as it is now: in evaluation mode, frozen, in float32.

    `module` itself is not changed. The other arguments are the keys of a model file. Without mean and std, colours are
    normalised as for ImageNet.

    Raises:
        ModelError: it does not accept RGB of this size, returns something other than logits, or cannot be copied.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(4, 2, 1))
    >>> model = model_of(net, patch_px=32, classes=["stroma", "tumour"])
    >>> model.module(model.prepare(torch.zeros(5, 32, 32, 3, dtype=torch.uint8))).shape
    torch.Size([5, 2])
    """
    module = unwrapped(module)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    values = {
        "patch_px": patch_px,
        "mpp": mpp,
        "classes": classes,
        "mean": mean,
        "std": std,
        "scale": scale,
        "stain": stain,
        "transform": transform,
        "layer": layer_name(module, layer),
        "output": output,
        **({"activation": activation} if activation is not None else {}),
    }
    try:
        spec = ModelSpec.model_validate({"name": name or type(module).__name__, "source": f"live:{kind}", **values})
    except ValidationError as error:
        raise ModelError(f"{kind}: {explain_validation(error)}") from error
    try:
        built = Built(unwrap_parts(copy.deepcopy(module)))
    except Exception as error:  # modules may hold anything
        raise ModelError(
            f"{kind}: cannot be copied ({one_line(error)}); load its state dict into a new module and pass that"
        ) from error
    return finish(spec, built, device)
