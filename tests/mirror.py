"""Whole suites with OUT in an object store: `WSI_GRADCAM_TEST_OUT=s3`, see `make test-s3`.

Tests name folders on the disk, and look there. Here `explain` and `validate` send what lies in that folder to the
store, work on the store alone, and bring back what lies there afterwards; errors are told of the folder again.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from tests.servers import BUCKET
from wsi_gradcam import api
from wsi_gradcam.errors import WsiGradcamError
from wsi_gradcam.io.paths import storage_path

VARIABLE = "WSI_GRADCAM_TEST_OUT"


def url_of(out: Path) -> str:
    """Where a folder's twin is."""
    return f"s3://{BUCKET}/twins{out.absolute().as_posix()}"


def send(out: Path) -> None:
    """Make the twin equal to the folder."""
    place = storage_path(url_of(out))
    place.remove_tree()
    files = [path for path in out.rglob("*") if path.is_file()]
    place.write_many({path.relative_to(out).as_posix(): path.read_bytes() for path in files})


def bring(out: Path) -> None:
    """Make the folder equal to its twin."""
    if out.exists():
        shutil.rmtree(out)
    base, todo = storage_path(url_of(out)), [""]
    while todo:
        inside = todo.pop()
        folder = base / inside if inside else base
        names = folder.file_names()
        for name, data in zip(names, folder.read_many(names), strict=True):
            path = out / inside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        todo += [f"{inside}/{name}" if inside else name for name in folder.folder_names()]


def mirrored(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its argument `out` in the store instead."""
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        given = bound.arguments["out"]
        if "://" in str(given):
            return function(*args, **options)
        out = Path(given)
        send(out)
        bound.arguments["out"] = url_of(out)
        try:
            result = function(*bound.args, **bound.kwargs)
        except WsiGradcamError as error:
            error.args = tuple(str(part).replace(url_of(out), str(given)) for part in error.args)
            raise
        finally:
            bring(out)
        return replace(result, out=out) if isinstance(result, api.Outcome) else result

    return called


def install() -> None:
    """Put the mirrored functions in place of the plain ones, before tests import them."""
    api.explain = mirrored(api.explain)
    api.validate = mirrored(api.validate)
