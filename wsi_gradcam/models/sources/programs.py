"""`torchscript:FILE` and `export:FILE.pt2`: programs, which are followed into a graph of operators. Loading runs them.

`torch.export.load` unpickles with `weights_only=False` in places (torch 2.14: weights and constants that are not plain,
and sample inputs if the safe way fails), and evaluates symbolic sizes. The former is forbidden here: only tensors may
come out of a pickle, and archives with other objects or compiled libraries are refused unread.
"""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from torch import Tensor, fx, nn

from wsi_gradcam.errors import DocumentError, ModelError, one_line, quoted
from wsi_gradcam.io.documents import MAX_BYTES, read_json
from wsi_gradcam.io.local import read_file
from wsi_gradcam.models.graph import any_batch, free_batch, with_points
from wsi_gradcam.models.outputs import with_logits
from wsi_gradcam.models.sources import Built
from wsi_gradcam.models.spec import Interpolation, ModelSpec, Resizing, explain_validation, is_torchscript
from wsi_gradcam.models.transform import make_transform
from wsi_gradcam.system.processes import tensors_only

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn
    from torch.export import ExportedProgram

    from wsi_gradcam.models.spec import ModelSpec, Resizing


def read_source(path: Path, spec: ModelSpec) -> tuple[bytes, str]:
    """Return the bytes of a source's file and their sha256, checked against the specification's.

    Raises:
        ModelError: there is no such file, it has another checksum, or separate weights are requested.
    """
    if spec.weights is not None:
        raise ModelError(f"{spec.source}: the weights are in the file; leave out 'weights: {spec.weights}'")
    try:
        content = read_file(path)
    except OSError as error:
        raise ModelError(f"{spec.source}: {path} cannot be read: {error.strerror}; check the path") from error
    found = hashlib.sha256(content).hexdigest()
    if spec.sha256 and found != spec.sha256.lower():
        raise ModelError(f"{spec.name}: {path} has sha256 {found}, expected {spec.sha256}; download the right file")
    return content, found


def sample_images(spec: ModelSpec, patch_px: tuple[int, int] | None, resizing: Resizing | None = None) -> Tensor:
    """Return two noise images of the size that the network sees, float32 [2, 3, h, w].

    Raises:
        ModelError: the size is not known.
    """
    if patch_px is None:
        raise ModelError(f"{spec.name}: the input size is not known; add 'patch_px: 224' to the model file")
    plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    height, width = make_transform(patch_px, *plain, resizing=spec.transform or resizing).input_px
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def as_network(program: nn.Module, images: Tensor, spec: ModelSpec, mend: str) -> fx.GraphModule:
    """Return the program as an ordinary network that returns logits [B, K], with a layer for each operator.

    Raises:
        ModelError: it fails on `images`, or cannot be followed; `mend` says how to make a file that can.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what programs report about themselves, such as that they return tuples
            network, _ = with_logits(program, images, spec.output)
            graph = any_batch(network, images)
        _keep_parameters(graph, program)
        return with_points(graph)
    except ModelError as error:
        cause = error.__cause__
        short = cause_of(cause) if cause is not None and "TorchScript" in str(cause) else str(error)
        raise ModelError(f"{spec.source}: {short}; {mend}") from error
    except Exception as error:  # the program may raise anything
        raise ModelError(failure(spec.source, images, error)) from error


def _keep_parameters(graph: fx.GraphModule, program: nn.Module) -> None:
    """Turn constants that are the program's parameters into parameters; all of them if it is frozen and has none."""
    weights = {parameter.data_ptr() for parameter in program.parameters()}
    for name, value in list(graph.named_buffers(recurse=False)):
        if value.is_floating_point() and (not weights or value.data_ptr() in weights):
            delattr(graph, name)
            graph.register_parameter(name, nn.Parameter(value, requires_grad=False))


def failure(name: str, images: Tensor, error: Exception) -> str:
    """Return the message for a network that failed on `images`."""
    shape, cause = tuple(images.shape), cause_of(error)
    if (wanted := channels_wanted(error)) is not None:
        return (
            f"{name}: takes images of {wanted} channel{'s' * (wanted != 1)}, but patches are RGB, with 3; use a model "
            "that takes RGB, or wrap it in one that converts RGB"
        )
    return f"{name}: fails on a batch of shape {shape}: {cause}; is 'patch_px' the input size of the network?"


def cause_of(error: BaseException) -> str:
    """Return the relevant line of a message: TorchScript's come with a traceback of their own, the cause last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if len(lines) > 1 and "TorchScript" in str(error) else " ".join(lines)
    name = type(error).__name__
    return text[:400] if text.startswith(name) else f"{name}: {text[:400]}".rstrip(": ")


def channels_wanted(error: Exception) -> int | None:
    """Return the number of channels that the first convolution takes, if it complains about that."""
    text = str(error)
    if " channels, but got 3 channels" not in text:
        return None
    number = text.split(" channels, but got 3 channels")[0].split()[-1]
    return int(number) if number.isdecimal() else None


SAVE_AGAIN = (
    "save it with torch.jit.script or torch.export.save of model.eval(): a trace fixes the sizes that the network "
    "computes with"
)


def build_torchscript(spec: ModelSpec) -> Built:
    """Build the program in a file; the specification must give input size and colours."""
    assert spec.source_path is not None
    module, digest = load_torchscript(spec.source_path, spec, spec.patch_px)
    return Built(module, patch_px=spec.patch_px, code_digest=digest)


def load_torchscript(
    path: Path, spec: ModelSpec, patch_px: tuple[int, int] | None, resizing: Resizing | None = None
) -> tuple[nn.Module, str]:
    """Return a TorchScript file as a network that can be hooked and differentiated, and the file's sha256.

    Raises:
        ModelError: it cannot be read, or fails on patches of this size.
    """
    content, digest = read_source(path, spec)
    images = sample_images(spec, patch_px, resizing)
    return as_network(load_script(path, content), images, spec, SAVE_AGAIN), digest


def load_script(path: Path, content: bytes) -> nn.Module:
    """Return the TorchScript program in a file's bytes, in evaluation mode and float32; loading it runs code in it.

    Raises:
        ModelError: it is not a TorchScript program, or damaged.
    """
    if not is_torchscript(path):
        raise ModelError(
            f"{path}: not a TorchScript program, or damaged; a state dict belongs under 'weights:' in a model file, "
            "next to the 'source:' of its network"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.jit is deprecated is nothing that the user can fix
            module: nn.Module = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
            return module.eval().float()
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(f"{path}: cannot be loaded as TorchScript: {one_line(error)[:400]}; is it damaged?") from error


EXPORT_AGAIN = "export it from model.eval() with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
TOLERANCE = 1e-3  # share of the largest value; kernels differ with the batch, and a wrong guess differs far more
FORBIDDEN = ("custom_obj", "opaque_obj", "aotinductor")


def build_export(spec: ModelSpec) -> Built:
    """Build the program in a file, with the input size for which it was exported."""
    assert spec.source_path is not None
    content, digest = read_source(spec.source_path, spec)
    program = _load_exported(spec.source_path, content)
    count, size = _input(spec, program)
    patch_px = spec.patch_px or size
    images = sample_images(spec, patch_px)
    seen = (images.shape[2], images.shape[3])
    if size is not None and seen != size:
        raise ModelError(f"{spec.source}: was exported for images of {size} px, but would see {seen}; set 'patch_px'")
    module = program.module() if count is None else _unbound(spec, program, images, count)
    return Built(as_network(module, images, spec, EXPORT_AGAIN), patch_px=patch_px, code_digest=digest)


def _load_exported(path: Path, content: bytes) -> ExportedProgram:
    try:
        records = torch._C.PyTorchFileReader(io.BytesIO(content)).get_all_records()
        if found := [name for name in records if any(part in name for part in FORBIDDEN)]:
            raise ModelError(
                f"{path}: contains {found[0]}; objects and compiled libraries are never loaded: save it with "
                "torch.export.save from a model of plain tensors"
            )
        with tensors_only(), _quiet():
            return torch.export.load(io.BytesIO(content))
    except ModelError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(
            f"{path}: cannot be loaded as an exported program: {one_line(error)[:400]}; it is damaged, contains "
            "pickled objects (never loaded), or was made by another version of PyTorch; export it again"
        ) from error


def _input(spec: ModelSpec, program: ExportedProgram) -> tuple[int | None, tuple[int, int] | None]:
    """Return number and (height, width) of the images that the program takes, each None if it takes any."""
    names = program.graph_signature.user_inputs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shape: Any = nodes[0].meta["val"].shape if len(nodes) == 1 else ()
    if len(shape) != 4:
        what = f"an input of shape {tuple(shape)}" if len(nodes) == 1 else f"{len(nodes)} inputs"
        raise ModelError(f"{spec.source}: takes {what}, expected one batch of images (batch, 3, height, width)")
    if isinstance(shape[1], int) and shape[1] != 3:
        raise ModelError(failure(spec.source, torch.empty(0), RuntimeError(f"{shape[1]} channels, but got 3 channels")))
    size = (int(shape[2]), int(shape[3])) if isinstance(shape[2], int) and isinstance(shape[3], int) else None
    return (shape[0] if isinstance(shape[0], int) else None), size


def _unbound(spec: ModelSpec, program: ExportedProgram, images: Tensor, count: int) -> nn.Module:
    """Return the program for batches of any size, tested against the original.

    Most networks are the same program for any number of images, apart from that number. If that is not so, the program
    is refused: a layer that runs several times for a batch could not be explained.
    """
    free: Any = program.module(check_guards=False)
    free._forward_pre_hooks.clear()
    bound = program.module()
    try:
        free_batch(free, torch.cat([images] * count)[:count])
        three = torch.cat([images, images[:1].flip(3)])
        with torch.no_grad():
            same = _same(free(three.clone()), [bound(image.repeat(count, 1, 1, 1)) for image in three])
    except Exception as error:  # the guess may fail in any way
        raise ModelError(_fixed(spec, count)) from error
    if not same:
        raise ModelError(_fixed(spec, count))
    return free  # type: ignore[no-any-return]


def _fixed(spec: ModelSpec, count: int) -> str:
    return f"{spec.source}: answers for batches of {count} image{'s' * (count != 1)} only; {EXPORT_AGAIN}"


def _same(found: Any, expected: list[Any]) -> bool:
    """Return whether row i of a batch's result is the result of image i alone."""
    flat, _ = torch.utils._pytree.tree_flatten(found)
    singles = [torch.utils._pytree.tree_flatten(each)[0] for each in expected]
    for k, value in enumerate(flat):
        for row, single in zip(value, singles, strict=True):
            scale = float(single[k][0].abs().max()) or 1.0
            if row.shape != single[k][0].shape or float((row - single[k][0]).abs().max()) > TOLERANCE * scale:
                return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PyTorch, which logs tracebacks of its failed attempts."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


CONFIG, PROGRAM = "config.json", "torchscript_model.pt"
# torchvision also takes the integers of Pillow.
INTERPOLATIONS: dict[object, Interpolation] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
    **{name: name for name in ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")},
}
KNOWN = {
    "Resize": {"size", "interpolation", "antialias", "max_size"},
    "ToTensor": set[str](),
    "Normalize": {"mean", "std", "inplace"},
}
Triple = tuple[float, float, float]


class Step(BaseModel):
    """A transform by the name of its class in torchvision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["Resize", "ToTensor", "Normalize"]
    arguments: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _arguments(self) -> Step:
        if unknown := sorted(set(self.arguments or {}) - KNOWN[self.name]):
            raise ValueError(f"{self.name} has no argument {unknown[0]!r}; known: {sorted(KNOWN[self.name])}")
        return self


class Config(BaseModel):
    """A model's configuration. Unknown keys are tolerated: the zoo adds some.

    Attributes:
        patch_size_pixels: what is read from the slide, at `spacing_um_px` micrometres per pixel.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    num_classes: PositiveInt
    class_names: tuple[str, ...]
    patch_size_pixels: PositiveInt
    spacing_um_px: PositiveFloat
    transform: tuple[Step, ...]
    license: Annotated[str | None, Field(strict=True)] = None

    @model_validator(mode="after")
    def _agree(self) -> Config:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but there are {len(self.class_names)} class_names")
        if len(set(self.class_names)) != self.num_classes:
            raise ValueError("class_names should all differ")
        order = [step.name for step in self.transform]
        if order not in [[*resize, "ToTensor", *norm] for resize in ([], ["Resize"]) for norm in ([], ["Normalize"])]:
            raise ValueError(
                f"the transform steps {', '.join(order) or '(none)'} are not supported; expected Resize (optional), "
                "ToTensor, Normalize (optional), in this order"
            )
        return self

    def arguments(self, name: str) -> dict[str, Any]:
        """Return the arguments of the step of that name; empty if there is none."""
        return next((step.arguments or {} for step in self.transform if step.name == name), {})


def build_wsinfer(spec: ModelSpec) -> Built:
    """Build the model in a folder, with everything that its configuration states.

    Raises:
        ModelError: a file is missing or cannot be used.
    """
    folder = spec.source_path
    assert folder is not None
    config = read_config(folder / CONFIG, spec.source)
    resizing = _resizing(config, spec)
    normalise = config.arguments("Normalize")
    side = config.patch_size_pixels
    module, digest = load_torchscript(folder / PROGRAM, spec, spec.patch_px or (side, side), resizing)
    return Built(
        module,
        classes=config.class_names,
        patch_px=(side, side),
        mpp=config.spacing_um_px,
        mean=_triple(spec, normalise.get("mean", (0.0, 0.0, 0.0)), "mean"),
        std=_triple(spec, normalise.get("std", (1.0, 1.0, 1.0)), "std"),
        scale=1.0,
        resizing=resizing,
        activation="softmax" if config.num_classes > 1 else "sigmoid",
        license=config.license,
        code_digest=digest,
    )


def read_config(path: Path, source: str) -> Config:
    """Read the configuration in a file.

    Raises:
        ModelError: it is missing, or does not conform to WSInfer's schema.
    """
    try:
        return Config.model_validate(read_json(read_file(path, MAX_BYTES)))
    except OSError as error:
        raise ModelError(f"{source}: {path} cannot be read: {error.strerror}; a WSInfer model needs it") from error
    except ValidationError as error:
        raise ModelError(f"{path}: not a WSInfer configuration: {explain_validation(error)}") from error
    except DocumentError as error:
        raise ModelError(f"{path}: not a JSON file that can be read: {one_line(error)}") from error


def _resizing(config: Config, spec: ModelSpec) -> Resizing | None:
    arguments = config.arguments("Resize")
    if not arguments:
        return None
    given = arguments.get("interpolation", "bilinear")
    if not isinstance(given, str | int) or given not in INTERPOLATIONS or arguments.get("max_size") is not None:
        raise ModelError(f"{spec.source}: the arguments of Resize are not supported: {quoted(arguments)}")
    size = arguments.get("size")
    if isinstance(size, list) and len(size) == 1:
        size = size[0]
    try:
        return Resizing(resize=size, interpolation=INTERPOLATIONS[given])
    except ValidationError as error:
        raise ModelError(f"{spec.source}: the size of Resize: {explain_validation(error)}") from error


def _triple(spec: ModelSpec, values: Any, name: str) -> Triple:
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
    if not numbers or len(values) not in (1, 3) or (name == "std" and min(values) <= 0):
        given = quoted(values)
        raise ModelError(f"{spec.source}: {name} of Normalize should be three numbers for RGB (given: {given})")
    red, green, blue = (values * 3)[:3]
    return (float(red), float(green), float(blue))
