"""Files and folders of an export: there when they are whole, and never in place of others unless told."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsi_gradcam.errors import StoreError
from wsi_gradcam.stores.files import PARTIAL, storing


@contextmanager
def new(path: Path, overwrite: bool) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to, which takes the name `path` when the block ends well.

    Raises:
        StoreError: something stands at `path` and `overwrite` is not set, or the disk refuses.
    """
    if not overwrite and path.exists():
        raise StoreError(f"{path}: exists already; use --overwrite, or another --dest")
    partial = _beside(path)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _replace(partial, path)
        finally:
            _remove(partial)


def _replace(partial: Path, path: Path) -> None:
    """Put a file or folder in the place of whatever is there."""
    if not path.is_dir():
        partial.replace(path)
        return
    old = _beside(path)  # a folder cannot be replaced in one step
    path.rename(old)
    partial.rename(path)
    _remove(old)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
