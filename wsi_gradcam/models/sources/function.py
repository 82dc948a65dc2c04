"""`module:function`: a Python function without arguments that returns a `torch.nn.Module`. Runs that code.

Models are told apart by a digest of that source code: of its module and of what it imports of the same project.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from wsi_gradcam.errors import ModelError, one_line
from wsi_gradcam.models.sources import Built
from wsi_gradcam.models.spec import FORMS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from wsi_gradcam.models.spec import ModelSpec


def code_digest(module: str, file: str | None) -> str:
    """Return the sha256 of a module's file and of those it imports from its own package or folder.

    Read from the files, not from what happens to be loaded: every process must find the same.
    """
    if file is None:
        return ""
    parts = module.split(".")
    start = Path(file)
    depth = len(parts) - (start.name != "__init__.py")
    root = start.parents[depth] if depth < len(start.parents) else start.parent
    files = {start: module}
    waiting = [start]
    while waiting:
        path = waiting.pop()
        for name in _imported(path, files[path]):
            found = _file_of(root, name)
            if found is not None and found not in files and _belongs(name, parts, root):
                files[found] = name
                waiting.append(found)
    if len(files) == 1:
        return hashlib.sha256(start.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for path, name in sorted(files.items(), key=lambda item: item[1]):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _belongs(name: str, parts: list[str], root: Path) -> bool:
    """Return whether a module is of the same project: the same package, or beside a module that is in none."""
    if len(parts) > 1:
        return name.split(".")[0] == parts[0]
    return root.name not in ("site-packages", "dist-packages")


def _file_of(root: Path, name: str) -> Path | None:
    stem = root.joinpath(*name.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _imported(path: Path, module: str) -> Iterator[str]:
    """Yield the modules that a file may import: of `from a import b` both `a` and `a.b`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # compiled, or for another Python
        return
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def build_function(spec: ModelSpec) -> Built:
    """Call `module:function`; the module is also looked for beside the model file and in the current folder."""
    source = spec.source
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
    """Refuse another module of the same name: Python imports a name once, and would silently give the first."""
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
