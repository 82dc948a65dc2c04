"""What lies below OUT, and nothing else: links that lead out of it are refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_gradcam.errors import NotShownError, OutsideError
from wsi_gradcam.io.local import LocalPath

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath

# A part of a path below OUT that a request may name. Nothing that is hidden, relative or odd is ever served.
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", re.ASCII)
MOST_PARTS = 12


def below(folder: StoragePath, path: str) -> StoragePath:
    """The place of a request's path below a folder.

    Raises:
        NotShownError: the path has parts that no file of ours has.
    """
    parts = path.split("/")
    if len(parts) > MOST_PARTS or not all(PART.fullmatch(part) for part in parts):
        raise NotShownError("no such file")
    return folder / path


def check_inside(out: StoragePath, place: StoragePath) -> None:
    """Check that a file or folder is below OUT also when all links are followed; object stores have none.

    Raises:
        OutsideError: it is not.
    """
    if isinstance(out, LocalPath) and isinstance(place, LocalPath):
        _check(out.path.resolve(), place.path)


def check_tree(out: StoragePath, folder: StoragePath) -> None:
    """Check everything below a folder, so that readers that open files by themselves can be let loose on it.

    Raises:
        OutsideError: something is a link that leads out of OUT.
    """
    if not (isinstance(out, LocalPath) and isinstance(folder, LocalPath)):
        return
    root = out.path.resolve()
    _check(root, folder.path)
    waiting = [folder.path]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            if entry.is_symlink():
                _check(root, Path(entry.path))
            elif entry.is_dir():
                waiting.append(Path(entry.path))


def _check(root: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(root):
        raise OutsideError(f"{path.name}: a link that leads out of the results; copy the file there instead")
