"""`export:FILE.pt2`: programs of `torch.export.save`. Loading them can run code that is in the file.

`torch.export.load` unpickles with `weights_only=False` in places (torch 2.14: weights and constants that are not
plain, and sample inputs where the safe way fails), and evaluates symbolic sizes. The first is forbidden here: tensors
are all that may come out of a pickle, and archives with other objects or compiled libraries are refused unread.
"""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wsi_gradcam.errors import ModelError, one_line
from wsi_gradcam.models.graph import free_batch
from wsi_gradcam.models.pickles import tensors_only
from wsi_gradcam.models.sources import Built
from wsi_gradcam.models.sources.programs import as_network, failure, read_source, sample_images

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch.export import ExportedProgram

    from wsi_gradcam.models.spec import ModelSpec

MEND = "export it from model.eval() with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
ALIKE = 1e-3  # of the largest value; kernels differ with the batch, and a wrong guess gives something else altogether
FORBIDDEN = ("custom_obj", "opaque_obj", "aotinductor")


def build(argument: str, spec: ModelSpec) -> Built:
    """The program in a file, with the input size it was exported for."""
    assert spec.source_path is not None
    content, digest = read_source(spec.source_path, spec)
    program = _load(spec.source_path, content)
    count, size = _input(spec, program)
    patch_px = spec.patch_px or size
    images = sample_images(spec, patch_px)
    seen = (images.shape[2], images.shape[3])
    if size is not None and seen != size:
        raise ModelError(f"{spec.source}: was exported for images of {size} px, but would see {seen}; set 'patch_px'")
    module = program.module() if count is None else _unbound(spec, program, images, count)
    return Built(as_network(module, images, spec, MEND), patch_px=patch_px, code_digest=digest)


def _load(path: Path, content: bytes) -> ExportedProgram:
    try:
        records = torch._C.PyTorchFileReader(io.BytesIO(content)).get_all_records()
        if found := [name for name in records if any(part in name for part in FORBIDDEN)]:
            raise ModelError(
                f"{path}: holds {found[0]}; objects and compiled libraries are never loaded: save it with "
                "torch.export.save from a model of plain tensors"
            )
        with tensors_only(), _quiet():
            return torch.export.load(io.BytesIO(content))
    except ModelError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(
            f"{path}: cannot be loaded as an exported program: {one_line(error)[:400]}; it is damaged, holds pickled "
            "objects, which are never loaded, or was made by another version of PyTorch: export it anew"
        ) from error


def _input(spec: ModelSpec, program: ExportedProgram) -> tuple[int | None, tuple[int, int] | None]:
    """Number and (height, width) of the images that the program takes, each None where it takes any."""
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
    """The program without the size of its batches, tested against itself.

    Most networks are the same program for any number of images but for that number. Where it is not so, the program
    is refused: a layer that runs several times for a batch could not be explained.
    """
    free: Any = program.module(check_guards=False)
    free._forward_pre_hooks.clear()
    bound = program.module()
    try:
        free_batch(free, torch.cat([images] * count)[:count])
        three = torch.cat([images, images[:1].flip(3)])
        with torch.no_grad():
            same = _same(free(three), [bound(image.expand(count, -1, -1, -1)) for image in three])
    except Exception as error:  # the guess may fail in any way
        raise ModelError(_fixed(spec, count)) from error
    if not same:
        raise ModelError(_fixed(spec, count))
    return free  # type: ignore[no-any-return]


def _fixed(spec: ModelSpec, count: int) -> str:
    return f"{spec.source}: answers for batches of {count} image{'s' * (count != 1)} only; {MEND}"


def _same(found: Any, expected: list[Any]) -> bool:
    """Whether row i of what a batch gave is what image i gave alone."""
    flat, _ = torch.utils._pytree.tree_flatten(found)
    singles = [torch.utils._pytree.tree_flatten(each)[0] for each in expected]
    for k, value in enumerate(flat):
        for row, single in zip(value, singles, strict=True):
            scale = float(single[k][0].abs().max()) or 1.0
            if row.shape != single[k][0].shape or float((row - single[k][0]).abs().max()) > ALIKE * scale:
                return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch logs tracebacks of what is tried on the way."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
