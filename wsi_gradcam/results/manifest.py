"""What is done of a slide. A finished piece of work is a small file that is written after its data.

While a slide is worked on there is a file a span and a block; when it is finished they are folded into one
`done.json`, so that an archive does not end with millions of files. The existence of a chunk proves nothing: a
chunk of zeros is never written, and a killed process may have left one of another attempt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_gradcam.errors import StoreError
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.results.slide_plan import SlidePlan

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath

PLAN, DONE = "plan.json", "done.json"
ENDING = ".json"
READ_BYTES = 16 << 20


class SlideStatus(StrEnum):
    """The state of a slide in a run; all but UNFINISHED are in the column `status` of slides.csv."""

    OK = "ok"
    FAILED = "failed"
    NO_TISSUE = "no_tissue"
    UNFINISHED = "unfinished"


@dataclass(frozen=True)
class SlideOutcome:
    """The outcome of a finished slide: the part of its final record that travels between processes.

    Attributes:
        status: OK or NO_TISSUE.
        patches, unreadable: number of patches, and of those that could not be read.
        cause: why patches could not be read, most often; "" if all could.
    """

    status: SlideStatus
    patches: int
    unreadable: int
    cause: str


@dataclass(frozen=True)
class SlideDone:
    """The final record of a slide, `done.json`.

    Attributes:
        outcome: how the slide came out.
        spans: `SpanData.digest` of each span, by the span's name.
        blocks: digests of each block of the heatmap, one a channel and one of the coverage, by the block's name.
        files: sha256 of the other files, by file name.
    """

    outcome: SlideOutcome
    spans: dict[str, str]
    blocks: dict[str, list[str]]
    files: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {**asdict(self.outcome), "spans": self.spans, "blocks": self.blocks, "files": self.files}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SlideDone:
        """Return the record that `to_json` gave.

        Raises:
            StoreError: keys are missing, or the status is unknown.
        """
        try:
            status = SlideStatus(values["status"])
            outcome = SlideOutcome(status, values["patches"], values["unreadable"], values["cause"])
            return cls(outcome, values["spans"], values["blocks"], values["files"])
        except KeyError as error:
            raise StoreError(f"done.json has no {error.args[0]}") from error
        except ValueError as error:
            raise StoreError(f"done.json: {error}") from error


class Manifest:
    """The manifest folder of one slide."""

    def __init__(self, place: StoragePathLike) -> None:
        self._place = storage_path(place)

    def plan(self) -> SlidePlan | None:
        """Return the plan that results follow; None before planning.

        Raises:
            StoreError: it is damaged, or another version wrote it.
        """
        stored = self._read(PLAN)
        return None if stored is None else SlidePlan.from_json(stored)

    def write_plan(self, plan: SlidePlan) -> None:
        """Record the plan: the templates of all stores exist now."""
        self._write(PLAN, plan.to_json())

    @property
    def is_finished(self) -> bool:
        """Whether the final record is there.

        Raises:
            StoreError: it is damaged.
        """
        return self._read(DONE) is not None

    def done(self) -> SlideDone | None:
        """Return the final record; None while work is left.

        Raises:
            StoreError: it is damaged.
        """
        stored = self._read(DONE)
        return None if stored is None else SlideDone.from_json(stored)

    def write_done(self, record: SlideDone) -> None:
        """Record the slide as finished and fold the pieces away."""
        self._write(DONE, record.to_json())
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


def sha256_of(place: StoragePath) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    for start in range(0, place.size(), READ_BYTES):
        digest.update(place.read_range(start, READ_BYTES))
    return digest.hexdigest()
