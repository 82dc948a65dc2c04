"""`module:function`: a Python function without arguments that returns a `torch.nn.Module`. Runs that code."""

from __future__ import annotations

import hashlib
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.sources import Built

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wsi_gradcam.models.spec import ModelSpec


def build(source: str, spec: ModelSpec) -> Built:
    """What `module:function` returns; the module is also looked for beside the model file and in the folder."""
    module_name, _, function_name = source.partition(":")
    with _searching(spec.folder, Path()):
        try:
            python = importlib.import_module(module_name)
        except ImportError as error:
            raise ModelError(
                f"{source}: cannot import {module_name!r} ({error}); expected timm:NAME, torchvision:NAME or an "
                "importable module:function (install it, or put it beside the model file)"
            ) from error
        function = getattr(python, function_name, None)
        if not callable(function):
            raise ModelError(f"{source}: {module_name!r} has no function {function_name!r}")
        network = function()
    if not isinstance(network, nn.Module):
        raise ModelError(f"{source}: returned a {type(network).__name__}, expected a torch.nn.Module")
    return Built(network, code_digest=_digest_of(python.__file__))


@contextmanager
def _searching(*folders: Path) -> Iterator[None]:
    added = [str(folder.resolve()) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _digest_of(file: str | None) -> str:
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
