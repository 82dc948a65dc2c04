"""Where results lie: a folder on a disk, or an object store."""

from __future__ import annotations

import os
import re
from pathlib import Path

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.io.base import Place
from wsi_gradcam.io.local import LocalPlace
from wsi_gradcam.io.object_stores import S3
from wsi_gradcam.io.s3 import RemotePlace
from wsi_gradcam.io.urls import is_url, shown_url, split_url

__all__ = ["AnyPlace", "LocalPlace", "Place", "RemotePlace", "place_of"]

AnyPlace = str | os.PathLike[str] | Place


def place_of(out: AnyPlace) -> Place:
    """The place that a user names: a path, or s3://BUCKET/KEY.

    Raises:
        ConfigError: a URL of another kind.

    >>> str(place_of("s3://bucket/a/") / "run.yaml")
    's3://bucket/a/run.yaml'
    """
    if isinstance(out, Place):
        return out
    text = os.fspath(out)
    if is_url(text) and split_url(text)[0] == S3:
        return RemotePlace.at(text)
    if is_url(text):
        raise ConfigError(f"{shown_url(text)}: expected a folder, or s3://BUCKET/KEY")
    if re.match(f"{S3}:/", text):  # what pathlib makes of s3://
        raise ConfigError(f"{text}: expected a folder, or s3://BUCKET/KEY; give a URL as text, not as a path")
    return LocalPlace(Path(text))
