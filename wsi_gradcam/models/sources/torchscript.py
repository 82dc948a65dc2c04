"""`torchscript:FILE`: scripted, traced or frozen programs of `torch.jit`. They run code that is in the file."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import torch

from wsi_gradcam.errors import ModelError, one_line
from wsi_gradcam.models.sources import Built
from wsi_gradcam.models.sources.programs import as_network, read_source, sample_images
from wsi_gradcam.models.spec import is_torchscript

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from wsi_gradcam.models.spec import ModelSpec, Resizing

MEND = (
    "save it with torch.jit.script or torch.export.save of model.eval(): a trace of a network that computes with sizes "
    "holds them as numbers"
)


def build(argument: str, spec: ModelSpec) -> Built:
    """The program in a file; input size and colours are the specification's to say."""
    assert spec.source_path is not None
    module, digest = network(spec.source_path, spec, spec.patch_px)
    return Built(module, patch_px=spec.patch_px, code_digest=digest)


def network(
    path: Path, spec: ModelSpec, patch_px: tuple[int, int] | None, resizing: Resizing | None = None
) -> tuple[nn.Module, str]:
    """A TorchScript file as a network that can be hooked and differentiated, and the file's sha256.

    Raises:
        ModelError: it cannot be read, or fails on patches of this size.
    """
    content, digest = read_source(path, spec)
    images = sample_images(spec, patch_px, resizing)
    return as_network(_load(path, content), images, spec, MEND), digest


def _load(path: Path, content: bytes) -> nn.Module:
    if not is_torchscript(path):
        raise ModelError(
            f"{path}: no TorchScript program (or a damaged one); a state dict is named with 'weights:' in a model "
            "file, beside the 'source:' of its network"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.jit is deprecated is not the user's to mend
            module: nn.Module = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
            return module.eval().float()
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(f"{path}: cannot be loaded as TorchScript: {one_line(error)[:400]}; is it damaged?") from error
