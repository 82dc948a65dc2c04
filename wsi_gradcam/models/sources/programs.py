"""What TorchScript files and exported programs have in common: a file that is a program, followed into a graph."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.graph import any_batch, with_points
from wsi_gradcam.models.outputs import with_logits
from wsi_gradcam.models.transform import make_transform

if TYPE_CHECKING:
    from wsi_gradcam.models.spec import ModelSpec, Resizing


def read_source(path: Path, spec: ModelSpec) -> tuple[bytes, str]:
    """The bytes of a file of the source and their sha256, which is what the specification says if it says one.

    Raises:
        ModelError: no such file, another checksum, or weights from elsewhere are wanted.
    """
    if spec.weights is not None:
        raise ModelError(f"{spec.source}: the weights are in the file; leave out 'weights: {spec.weights}'")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{spec.source}: {path} cannot be read: {error.strerror}; check the path") from error
    found = hashlib.sha256(content).hexdigest()
    if spec.sha256 and found != spec.sha256.lower():
        raise ModelError(f"{spec.name}: {path} has sha256 {found}, expected {spec.sha256}; fetch the right file")
    return content, found


def sample_images(spec: ModelSpec, patch_px: tuple[int, int] | None, resizing: Resizing | None = None) -> Tensor:
    """Two pictures of noise of the size that the network sees, float32 [2, 3, h, w].

    Raises:
        ModelError: the size is not known.
    """
    if patch_px is None:
        raise ModelError(f"{spec.name}: the input size is not known; add 'patch_px: 224' to the model file")
    plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    height, width = make_transform(patch_px, *plain, resizing=spec.transform or resizing).input_px
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def as_network(program: nn.Module, images: Tensor, spec: ModelSpec, mend: str) -> fx.GraphModule:
    """The program as an ordinary network that gives logits [B, K], with a layer for each operator.

    Raises:
        ModelError: it fails on `images`, or cannot be followed; `mend` says how to make a file that can.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what programs say of themselves, such as that they return tuples
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
    """Make parameters of the constants that are parameters of the program; of all, where it is frozen and has none."""
    weights = {parameter.data_ptr() for parameter in program.parameters()}
    for name, value in list(graph.named_buffers(recurse=False)):
        if value.is_floating_point() and (not weights or value.data_ptr() in weights):
            delattr(graph, name)
            graph.register_parameter(name, nn.Parameter(value, requires_grad=False))


def failure(name: str, images: Tensor, error: Exception) -> str:
    """What to say of a network that failed on `images`."""
    shape, cause = tuple(images.shape), cause_of(error)
    if (wanted := channels_wanted(error)) is not None:
        return (
            f"{name}: takes images of {wanted} channel{'s' * (wanted != 1)}, but patches are RGB, of 3; use a model "
            "that takes RGB, or wrap it in one that makes of RGB what it takes"
        )
    return f"{name}: fails on a batch of shape {shape}: {cause}; is 'patch_px' the size the network takes?"


def cause_of(error: BaseException) -> str:
    """The heart of a message: TorchScript's come with a traceback of their own, the cause last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if len(lines) > 1 and "TorchScript" in str(error) else " ".join(lines)
    name = type(error).__name__
    return text[:400] if text.startswith(name) else f"{name}: {text[:400]}".rstrip(": ")


def channels_wanted(error: Exception) -> int | None:
    """How many channels the first convolution takes, if that is what it complains of."""
    text = str(error)
    if " channels, but got 3 channels" not in text:
        return None
    number = text.split(" channels, but got 3 channels")[0].split()[-1]
    return int(number) if number.isdecimal() else None
