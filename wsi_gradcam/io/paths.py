"""The paths of results that users name: folders on a disk, or in an object store."""

from __future__ import annotations

import os
import re
from pathlib import Path

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.io.base import StoragePath
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.io.object_stores import S3
from wsi_gradcam.io.s3 import S3Path
from wsi_gradcam.io.urls import is_url, redact_url, split_url

__all__ = ["StoragePath", "StoragePathLike", "storage_path"]

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
