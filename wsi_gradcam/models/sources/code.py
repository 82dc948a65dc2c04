"""A digest of the source code that a network is built by: its module and what that imports of the same project."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def code_digest(module: str, file: str | None) -> str:
    """sha256 of a module's file and of those it imports from its own package, or from its folder if it is in none.

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
    """Whether a module is of the same project: the same package, or beside a module that is in none."""
    if len(parts) > 1:
        return name.split(".")[0] == parts[0]
    return root.name not in ("site-packages", "dist-packages")


def _file_of(root: Path, name: str) -> Path | None:
    stem = root.joinpath(*name.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _imported(path: Path, module: str) -> Iterator[str]:
    """Names of modules that a file may import: of `from a import b` both `a` and `a.b`."""
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
