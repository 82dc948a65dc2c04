"""`module:function`: a Python function without arguments that returns a `torch.nn.Module`. Runs that code."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from wsi_gradcam.errors import ModelError, one_line
from wsi_gradcam.models.sources import Built
from wsi_gradcam.models.sources.code import code_digest
from wsi_gradcam.models.spec import FORMS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from wsi_gradcam.models.spec import ModelSpec


def build(source: str, spec: ModelSpec) -> Built:
    """What `module:function` returns; the module is also looked for beside the model file and in the folder."""
    module_name, _, function_name = source.partition(":")
    with _searching(spec.folder, Path()):
        try:
            python = importlib.import_module(module_name)
        except Exception as error:  # the module's own code may raise anything
            raise ModelError(
                f"{source}: cannot import {module_name!r} ({one_line(error)}); expected an importable "
                f"module:function (install it, or put it beside the model file), or another of {FORMS}"
            ) from error
        _check_origin(source, python, spec.folder / f"{module_name}.py")
        function = getattr(python, function_name, None)
        if not callable(function):
            raise ModelError(f"{source}: {module_name!r} has no function {function_name!r}")
        try:
            network = function()
        except Exception as error:  # as above
            raise ModelError(f"{source}: {function_name}() fails: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{source}: returned a {type(network).__name__}, expected a torch.nn.Module")
    return Built(network, code_digest=code_digest(module_name, python.__file__))


def _check_origin(source: str, python: ModuleType, beside: Path) -> None:
    """Python imports a name once: a second model file's module of the same name would silently be the first's."""
    if beside.is_file() and (python.__file__ is None or not beside.samefile(python.__file__)):
        raise ModelError(
            f"{source}: {beside} is meant, but Python has imported {python.__file__} under the same name; "
            "rename one of them, or use a process for each model"
        )


@contextmanager
def _searching(*folders: Path) -> Iterator[None]:
    added = [str(folder.resolve()) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)
