"""The paths of results that users name: folders on a disk, or in an object store."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from wsi_gradcam.errors import ConfigError, canonical
from wsi_gradcam.io.base import StoragePath
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.io.object_stores import S3
from wsi_gradcam.io.s3 import S3Path
from wsi_gradcam.io.urls import is_url, redact_url, split_url

__all__ = ["StoragePath", "StoragePathLike", "alike", "storage_path"]

StoragePathLike = str | os.PathLike[str] | StoragePath


def storage_path(out: StoragePathLike) -> StoragePath:
    """Return the path that a user names: a path on a disk, or s3://BUCKET/KEY.

    Raises:
        ConfigError: a URL of another kind.

    >>> str(storage_path("s3://bucket/a/") / "run.yaml")
    's3://bucket/a/run.yaml'
    """
    if isinstance(out, StoragePath):
        return out
    text = os.fspath(out)
    if is_url(text) and split_url(text)[0] == S3:
        return S3Path.from_url(text)
    if is_url(text):
        raise ConfigError(f"{redact_url(text)}: expected a folder, or s3://BUCKET/KEY")
    if re.match(f"{S3}:/", text):  # what pathlib makes of s3://
        raise ConfigError(f"{text}: expected a folder, or s3://BUCKET/KEY; give a URL as text, not as a path")
    return LocalPath(Path(text))


def alike(folder: Path, name: str) -> list[Path]:
    """Return the files or folders in `folder`, or below it, of which the path is `name`.

    Where there is none, those of which it differs in Unicode's normal form alone: macOS and archives change it.
    """
    if os.path.lexists(folder / name):
        return [folder / name]
    if name.isascii():
        return []
    places = [folder]
    for part in Path(name).parts:
        places = [inner for place in places for inner in _named(place, part)]
    return places


def _named(folder: Path, name: str) -> list[Path]:
    try:
        return [folder / each for each in _by_form(folder, folder.stat().st_mtime_ns).get(canonical(name), ())]
    except OSError:  # no folder, or one that cannot be read
        return []


@lru_cache(maxsize=64)
def _by_form(folder: Path, changed: int) -> dict[str, list[str]]:
    """Return the names in a folder, changed at that time, by their normal forms."""
    found: dict[str, list[str]] = {}
    for name in sorted(place.name for place in folder.iterdir()):
        found.setdefault(canonical(name), []).append(name)
    return found
