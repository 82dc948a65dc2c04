"""What is done of a slide. A finished piece of work is a small file that is written after its data.

While a slide is worked on there is a file a span and a block; when it is finished they are folded into one
`done.json`, so that an archive does not end with millions of files. The existence of a chunk proves nothing: a
chunk of zeros is never written, and a killed process may have left one of another attempt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_gradcam.errors import StoreError
from wsi_gradcam.io.paths import StoragePathLike, storage_path

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath

PLAN, DONE = "plan.json", "done.json"
ENDING = ".json"


class Manifest:
    """The manifest folder of one slide."""

    def __init__(self, place: StoragePathLike) -> None:
        self._place = storage_path(place)

    def plan(self) -> dict[str, Any] | None:
        """The plan that results follow; None before planning."""
        return self._read(PLAN)

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Record the plan: the templates of all stores exist now."""
        self._write(PLAN, plan)

    def done(self) -> dict[str, Any] | None:
        """The final record; None while work is left."""
        return self._read(DONE)

    def write_done(self, record: dict[str, Any]) -> None:
        """Record the slide as finished and fold the pieces away."""
        self._write(DONE, record)
        self.fold()

    def fold(self) -> None:
        """Delete the pieces' files of a finished slide (a process may have been killed while doing so)."""
        for kind in self._place.folder_names():
            (self._place / kind).remove_tree()

    def complete(self, kind: str, name: str, record: dict[str, Any]) -> None:
        """Record a piece of work, whose data is on disk already."""
        self._write(f"{kind}/{name}{ENDING}", record)

    def completed(self, kind: str) -> set[str]:
        """Names of the finished pieces of a kind."""
        return {name.removesuffix(ENDING) for name in (self._place / kind).file_names() if name.endswith(ENDING)}

    def has(self, kind: str, name: str, run: str) -> bool:
        """Whether a piece of work is finished, by the run of that digest."""
        return (self._read(f"{kind}/{name}.json") or {}).get("run") == run

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """The finished pieces' records by name, sorted."""
        names = sorted(self.completed(kind))
        files = [f"{name}{ENDING}" for name in names]
        contents = (self._place / kind).read_many(files)
        parsed = [_parsed(self._place / kind / file, data) for file, data in zip(files, contents, strict=True)]
        return dict(zip(names, parsed, strict=True))

    def forget(self, kind: str, names: Iterable[str]) -> None:
        """Take back that pieces are finished: they will be made again."""
        for name in names:
            (self._place / kind / f"{name}{ENDING}").remove()

    def clear(self) -> None:
        """Forget everything: called before a slide's stores are made anew."""
        (self._place / PLAN).remove()  # first, so that no half-cleared manifest looks valid
        self._place.remove_tree()

    def _write(self, name: str, value: dict[str, Any]) -> None:
        (self._place / name).write(json.dumps(value, indent=1, sort_keys=True).encode())

    def _read(self, name: str) -> dict[str, Any] | None:
        place = self._place / name
        try:
            return _parsed(place, place.read())
        except FileNotFoundError:
            return None


def _parsed(place: StoragePath, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise _damaged(place) from error
    if not isinstance(value, dict):
        raise _damaged(place)
    return value


def _damaged(place: StoragePath) -> StoreError:
    return StoreError(f"{place}: damaged; delete the slide's folder and run again, or use --overwrite")


def span_name(span: int) -> str:
    """Name of a span in the manifest."""
    return f"{span:06d}"


def block_name(level: int, number: int) -> str:
    """Name of a block in the manifest."""
    return f"{level}-{number:06d}"


def digest_of(arrays: Iterable[NDArray[np.generic]]) -> str:
    """sha256 of arrays' values, shapes and types: what is in a store, whatever its compression."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
