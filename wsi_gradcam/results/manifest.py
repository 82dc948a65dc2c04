"""The manifest of a slide: its plan, the finished pieces of work, and its final record.

A finished piece of work is recorded in a small file that is written after its data. While a slide is being processed,
there is a file for each span and block; when it is finished, they are folded into one `done.json`, so that an archive
does not end up with millions of files. The existence of a chunk proves nothing: a chunk of zeros is never written, and
a killed process may have left one from another attempt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_gradcam.errors import StoreError, one_line
from wsi_gradcam.geometry import Region, ceil_div, pyramid_shapes, tiles
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.results.heatmap import LABEL, SHARD
from wsi_gradcam.results.seals import sealed_json
from wsi_gradcam.tissue.stain import StainFit

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath


# Limits on what a plan on disk may say, far above what any scanner produces.
LARGEST_PX, MOST_PATCHES = 1 << 26, 1 << 25
MOST_PIECES = 1 << 20  # spans, or blocks of the heatmap's finest level


@dataclass(frozen=True)
class SlidePlan:
    """The geometry of a slide's results, and the digests that identify what they belong to.

    Attributes:
        slide_digest, run_digest: the slide file and the run that the results belong to.
        slide_px, slide_mpp: (height, width) of level 0 and its mpp (y, x).
        footprint: (height, width) of a patch in level-0 px.
        view: (y, x, height, width) in level-0 px from a patch's top left: the part of it that the network sees.
        patches: number of patches; `span` of them are a unit of work.
        stride: level-0 px per pixel of the heatmap's level 0.
        mask_digest: digest of the file that says which part is explained; "" if there is none.
        stain: normalises the stain of the patches, if the model needs this and there are patches.
        tissue_rule: the version of the rule that found the tissue; 1 if an older version of the program did. A slide
            that was planned keeps its patches.
        bounds: (y, x, height, width) of the part of level 0 that was scanned, if the file records a part; () if it does
            not. None in results of older versions.
        mask_frame: what the mask was drawn on, "slide" or "bounds", on a slide with such bounds; else "".
        notes: what a user should know about the slide.
        features: digest of the features that were made elsewhere and of the places of their patches; "" for others.
    """

    slide_digest: str
    run_digest: str
    slide_px: tuple[int, int]
    slide_mpp: tuple[float, float]
    footprint: tuple[float, float]
    view: tuple[float, float, float, float]
    patches: int
    span: int
    stride: int
    mask_digest: str = ""
    stain: StainFit | None = None
    tissue_rule: int = 1
    bounds: tuple[int, ...] | None = None
    mask_frame: str = ""
    notes: tuple[str, ...] = ()
    features: str = ""

    def patch_mpp(self, patch_px: tuple[int, int], mpp: float) -> float:
        """Return the micrometres per pixel at which patches for a model that sees `mpp` are read.

        Patches of features made elsewhere are read as they were then.
        """
        return self.footprint[0] * self.slide_mpp[0] / patch_px[0] if self.features else mpp

    @property
    def scanned(self) -> Region | None:
        """The part of level 0 that was scanned, which QuPath shows; None: the whole slide, or not recorded."""
        return Region(*self.bounds) if self.bounds else None

    @property
    def heatmap_px(self) -> tuple[int, int]:
        """(height, width) of the heatmap's level 0."""
        return ceil_div(self.slide_px[0], self.stride), ceil_div(self.slide_px[1], self.stride)

    @property
    def level_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of each level of the heatmap."""
        return pyramid_shapes(*self.heatmap_px)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, end) patch of each span."""
        return [(i, min(i + self.span, self.patches)) for i in range(0, self.patches, self.span)]

    def blocks(self, level: int) -> list[Region]:
        """Return the blocks of a level, each exactly one shard."""
        return tiles(*self.level_shapes[level], SHARD)

    def check(self) -> None:
        """Raise a ValueError for numbers that no slide has: readers of results allocate memory by them."""
        height, width = self.slide_px
        whole = {"height": height, "width": width, "span": self.span, "stride": self.stride, "patches": self.patches}
        for name, value in whole.items():
            least, most = (0, MOST_PATCHES) if name == "patches" else (1, LARGEST_PX)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} is {str(value)[:40]}, expected a whole number from {least} to {most:,}")
        if self.bounds and (
            len(self.bounds) != 4 or not all(type(v) is int and 0 <= v <= LARGEST_PX for v in self.bounds)
        ):
            raise ValueError(f"bounds {str(self.bounds)[:80]}, expected y, x, height, width in px")
        lengths = [*self.slide_mpp, *self.footprint, *self.view[2:]]
        if (len(self.slide_mpp), len(self.footprint), len(self.view)) != (2, 2, 4) or not all(
            isinstance(value, int | float) and 0 < value <= LARGEST_PX for value in lengths
        ):
            raise ValueError(f"mpp, footprint or view {lengths}, expected positive lengths")
        blocks = ceil_div(self.heatmap_px[0], SHARD) * ceil_div(self.heatmap_px[1], SHARD)
        if max(blocks, ceil_div(self.patches, self.span)) > MOST_PIECES:
            raise ValueError(
                f"{self.patches} patches in spans of {self.span}, {blocks} blocks are more than any slide has"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        values = {**asdict(self), "stain": None if self.stain is None else self.stain.to_json()}
        return {key: value for key, value in values.items() if key != "features" or value}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SlidePlan:
        """Return the plan that `to_json` wrote.

        Raises:
            StoreError: another version wrote it, or it is damaged.
        """
        try:
            values = {
                "view": (0.0, 0.0, *values["footprint"]),
                **values,
            }  # the first format's maps filled their patches
            pairs = {key: tuple(values[key]) for key in ("slide_px", "slide_mpp", "footprint", "view")}
            stain = values.get("stain")
            values = {
                **values,
                **{key: tuple(values[key]) for key in ("bounds", "notes") if values.get(key) is not None},
            }
            plan = cls(**{**values, **pairs, "stain": None if stain is None else StainFit.from_json(stain)})
            plan.check()
            return plan
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"manifest/plan.json: not a plan of this version ({one_line(error)}); choose another --out, or "
                "recompute with --overwrite"
            ) from error


PLAN, DONE = "plan.json", "done.json"
ENDING = ".json"
BAG, WHOLE = "bag", "whole"  # the piece of work that covers a whole slide, for slide-level models
PIECES = re.compile(rf"(features|{BAG}|spans|blocks)/([0-9-]+|{WHOLE})\.json(\.[0-9a-f]{{32}}\.partial)?")
CONTENTS = re.compile(rf"(plan|done)\.json(\.[0-9a-f]{{32}}\.partial)?|{PIECES.pattern}")


class SlideStatus(StrEnum):
    """The state of a slide in a run; all but UNFINISHED occur in the column `status` of slides.csv."""

    OK = "ok"
    FAILED = "failed"
    NO_TISSUE = "no_tissue"
    UNFINISHED = "unfinished"

    __repr__ = str.__repr__  # users print lists of statuses


@dataclass(frozen=True)
class SlideOutcome:
    """The outcome of a finished slide: the part of its final record that travels between processes.

    Attributes:
        status: OK or NO_TISSUE.
        patches, unreadable: number of patches, and of those that could not be read.
        cause: the most frequent reason why patches could not be read; "" if all could.
        notes: what else a user should know, see `SlidePlan.notes`.
    """

    status: SlideStatus
    patches: int
    unreadable: int
    cause: str
    notes: str = ""


@dataclass(frozen=True)
class SlideDone:
    """The final record of a slide, `done.json`.

    Attributes:
        outcome: how the slide ended.
        spans: `SpanData.digest` of each span, by the span's name.
        blocks: digests of each block of the heatmap, one per channel and one for the coverage, by the block's name.
        files: sha256 of the other files, by file name: the plan, all metadata of the stores, the table, the pictures.
        arrays: digests of the patch store's arrays that no span writes, by name.
        slide: the slide's id.
        made_with: digest of the model and the settings, see `run_files.made_with`.
        answer: the slide's logit by class, for slide-level models.

    Older versions wrote fewer files, and none of the attributes after `files`.
    """

    outcome: SlideOutcome
    spans: dict[str, str]
    blocks: dict[str, list[str]]
    files: dict[str, str]
    arrays: dict[str, str] = field(default_factory=dict)
    slide: str = ""
    made_with: str = ""
    answer: dict[str, float] = field(default_factory=dict)

    @property
    def is_covered(self) -> bool:
        """Whether everything in the slide's results has a digest; older versions left out much."""
        return bool(self.made_with)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        outcome = {key: value for key, value in asdict(self.outcome).items() if key != "notes" or value}
        others = {each.name: getattr(self, each.name) for each in fields(self)[1:]}
        return {**outcome, **{key: value for key, value in others.items() if key != "answer" or value}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SlideDone:
        """Return the record that `to_json` gave.

        Raises:
            StoreError: keys are missing, or the status is unknown.
        """
        try:
            status = SlideStatus(values["status"])
            outcome = SlideOutcome(
                status, values["patches"], values["unreadable"], values["cause"], values.get("notes", "")
            )
            since = {key: values[key] for key in ("arrays", "slide", "made_with", "answer") if key in values}
            return cls(outcome, values["spans"], values["blocks"], values["files"], **since)
        except KeyError as error:
            raise StoreError(f"done.json has no {error.args[0]}") from error
        except (ValueError, TypeError) as error:
            raise StoreError(f"done.json: {one_line(error)}") from error


class Manifest:
    """The manifest folder of one slide."""

    def __init__(self, place: StoragePathLike) -> None:
        self._place = storage_path(place)

    def plan(self) -> SlidePlan | None:
        """Return the plan of the results; None before planning.

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
        """Whether the final record exists.

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
        """Record the slide as finished, and fold its pieces away."""
        (self._place / DONE).write(sealed_json(record.to_json(), indent=1, sort_keys=True))
        self.fold()

    def fold(self) -> None:
        """Delete the piece files of a finished slide (a process may have been killed while doing so)."""
        if self._place.folder_names():
            self._place.remove_files(PIECES)

    def complete(self, kind: str, name: str, record: dict[str, Any]) -> None:
        """Record a piece of work, whose data is on disk already."""
        self._write(f"{kind}/{name}{ENDING}", record)

    def completed(self, kind: str) -> set[str]:
        """Return the names of the finished pieces of a kind."""
        return {name.removesuffix(ENDING) for name in (self._place / kind).file_names() if name.endswith(ENDING)}

    def has(self, kind: str, name: str, run: str) -> bool:
        """Return whether a piece of work was finished by the run with this digest."""
        return (self._read(f"{kind}/{name}.json") or {}).get("run") == run

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the finished pieces' records by name, sorted."""
        names = sorted(self.completed(kind))
        files = [f"{name}{ENDING}" for name in names]
        contents = (self._place / kind).read_many(files)
        parsed = [_parsed(self._place / kind / file, data) for file, data in zip(files, contents, strict=True)]
        return dict(zip(names, parsed, strict=True))

    def answer(self) -> dict[str, float]:
        """Return the slide's logit by class; empty before a slide-level model has answered, and for other models."""
        found: dict[str, float] = (self._read(f"{BAG}/{WHOLE}{ENDING}") or {}).get("answer", {})
        return found

    def forget(self, kind: str, names: Iterable[str]) -> None:
        """Mark pieces as not finished: they will be computed again."""
        for name in names:
            (self._place / kind / f"{name}{ENDING}").remove()

    def clear(self) -> None:
        """Forget everything: called before a slide's stores are created again."""
        (self._place / PLAN).remove()  # first, so that no half-cleared manifest looks valid
        self._place.remove_files(CONTENTS)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        (self._place / name).write(json.dumps(value, indent=1, sort_keys=True).encode())

    def _read(self, name: str) -> dict[str, Any] | None:
        place = self._place / name
        try:
            return _parsed(place, place.read(SMALL_BYTES))
        except FileNotFoundError:
            return None


def _parsed(place: StoragePath, data: bytes) -> dict[str, Any]:
    try:
        value = read_json(data)
    except ValueError as error:
        raise _damaged(place) from error
    if not isinstance(value, dict):
        raise _damaged(place)
    return value


def _damaged(place: StoragePath) -> StoreError:
    return StoreError(f"{place}: damaged; delete the slide's folder and run again, or use --overwrite")


def span_name(span: int) -> str:
    """Return the name of a span in the manifest."""
    return f"{span:06d}"


def block_name(level: int, number: int) -> str:
    """Return the name of a block in the manifest."""
    return f"{level}-{number:06d}"


def digest_of(arrays: Iterable[NDArray[np.generic]]) -> str:
    """Return the sha256 of arrays' values, shapes and types, whatever their compression in a store."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# The names of files in the folder of a slide's results.
LEFT_OVER = (
    "manifest/features/",
    "manifest/bag/",
    "manifest/spans/",
    "manifest/blocks/",
)  # left behind if a run was killed while it folded them away
GROUPS = {
    f"{group}/zarr.json"
    for group in (
        "cams.zarr",
        "features.zarr",
        *(f"heatmap.ome.zarr{name}" for name in ("", "/labels", f"/labels/{LABEL}")),
    )
}
METADATA_BYTES = 1 << 20  # the most that is read of it
METADATA, CHUNKS = "zarr.json", "c"  # in the folder of an array


def is_of_array(name: str) -> bool:
    """Return whether a name is that of an array's metadata, not a group's."""
    return name.endswith(f"/{METADATA}") and name not in GROUPS


def unknown_files(place: StoragePath) -> list[str]:
    """Return the names of a slide's files, except the manifest's and the chunks that its arrays may have."""
    names = place.all_files()
    grids = {}
    for name in names:
        if is_of_array(name):
            grids[name.removesuffix(METADATA)] = _grid((place / name).read_range(0, METADATA_BYTES))
    return [n for n in names if not (n == f"manifest/{DONE}" or n.startswith(LEFT_OVER) or _is_chunk(n, grids))]


def _grid(metadata: bytes) -> tuple[int, ...]:
    """Return the number of chunk files along each axis of an array; () if its metadata is damaged."""
    try:
        values = read_json(metadata)
        chunks = values["chunk_grid"]["configuration"]["chunk_shape"]
        return tuple(-(-size // chunk) for size, chunk in zip(values["shape"], chunks, strict=True))
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return ()


def _is_chunk(name: str, grids: dict[str, tuple[int, ...]]) -> bool:
    array, found, key = name.rpartition(f"/{CHUNKS}/")
    grid, numbers = grids.get(f"{array}/", ()), key.split("/")
    return (
        bool(found)
        and len(grid) == len(numbers)
        and all(n.isdecimal() and str(int(n)) == n and int(n) < count for n, count in zip(numbers, grid, strict=True))
    )
