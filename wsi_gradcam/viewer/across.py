"""Patches across the archive: the highest, and those in the clusters of its evidence, which this describes too.

`PatchTable` finds the patch at a point, its neighbours, and the patches with the highest values of a slide.

Everything is read from OUT/evidence and checked as if a stranger had written it. The patches of the sample are
collected slide by slide in the background, as the highest patches are.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from wsi_gradcam.errors import DocumentError, NotShownError, OutsideError, StoreError, WsiGradcamError, one_line
from wsi_gradcam.evidence import EvidenceFolder
from wsi_gradcam.evidence.findings import Evidence, KindRow, uneven
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.run.claims import EVIDENCE
from wsi_gradcam.viewer.archive import check_inside, status_of, valid_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.viewer.archive import Archive, ServedSlide

REPORT = f"{EVIDENCE}/report.html"
REFRESH_S = 5.0
MAX_BYTES = 64 << 20  # of evidence.json
MAX_PLACES, PLACE_BYTES = 1 << 22, 128  # of a slide, and of each
COLUMNS = ("patch", "cluster", "contribution")
EXAMPLES = 4
MAX_TOP = 100
AGAIN = "run `wsi-gradcam evidence` again"


COORDINATES = ("y", "x")
TEXTS = ("status", "cause")
DIRECTIONS = ("E", "NE", "N", "NW", "W", "SW", "S", "SE")
MAX_CANDIDATES = 50_000  # of a top-k, of which neighbours are left out


class PatchTable:
    """The rows of patches.parquet as arrays; `footprint` is a patch's (height, width) in level-0 px."""

    def __init__(self, table: pa.Table, footprint: tuple[float, float]) -> None:
        names = [name for name in table.column_names if name not in (*COORDINATES, *TEXTS)]
        self.values = {name: _floats(table, name) for name in names}
        self.y, self.x = (table.column(name).to_numpy().astype(np.int64) for name in COORDINATES)
        self._texts = {name: table.column(name) for name in TEXTS}
        self.footprint = footprint
        self.nbytes = int(table.nbytes) + sum(array.nbytes for array in (*self.values.values(), self.y, self.x))

    def __len__(self) -> int:
        return len(self.y)

    def at(self, y: float, x: float) -> int | None:
        """Return the patch that covers level-0 (y, x); of several, the one whose centre is nearest."""
        height, width = self.footprint
        inside = (self.y <= y) & (y < self.y + height) & (self.x <= x) & (x < self.x + width)
        (found,) = np.nonzero(inside)
        if not len(found):
            return None
        return int(found[np.argmin(self._distances(found, y - height / 2, x - width / 2))])

    def neighbours(self, number: int) -> list[tuple[int, str]]:
        """Return the numbers and directions of up to 8 patches around one, the nearest in each direction."""
        y, x, reach = float(self.y[number]), float(self.x[number]), 1.5 * max(self.footprint)
        near = (np.abs(self.y - y) <= reach) & (np.abs(self.x - x) <= reach)
        near[number] = False
        (found,) = np.nonzero(near)
        order = found[np.argsort(self._distances(found, y, x), kind="stable")]
        nearest: dict[str, int] = {}
        for other in order.tolist():
            nearest.setdefault(_direction(self.y[other] - y, self.x[other] - x), other)
        return [(nearest[name], name) for name in DIRECTIONS if name in nearest]

    def top(self, column: str, count: int, lowest: bool = False) -> list[int]:
        """Return the patches with the highest values of a column; of overlapping ones only the highest.

        Raises:
            NotShownError: there is no such column.
        """
        values = self._column(column)
        ranked = np.argsort(values if lowest else -values, kind="stable")  # NaN comes last
        chosen: list[int] = []
        for number in ranked[:MAX_CANDIDATES].tolist():
            if len(chosen) == count or math.isnan(values[number]):
                break
            if not self._overlaps(number, chosen):
                chosen.append(number)
        return chosen

    def row(self, number: int) -> dict[str, Any]:
        """Return all columns of a patch; None for values that are not known.

        Raises:
            NotShownError: there is no such patch.
        """
        if not 0 <= number < len(self):
            raise NotShownError(f"no patch {number}; there are {len(self)}, counted from 0")
        row: dict[str, Any] = {"number": number, "y": int(self.y[number]), "x": int(self.x[number])}
        row |= {name: column[number].as_py() for name, column in self._texts.items()}
        return row | {name: _known(array[number]) for name, array in self.values.items()}

    def value(self, column: str, number: int) -> float | None:
        """Return one value of a patch; None if it is not known."""
        return _known(self._column(column)[number])

    def _column(self, name: str) -> NDArray[np.float64]:
        if name not in self.values:
            raise NotShownError(f"no column {name[:100]!r}; expected one of {', '.join(self.values)}")
        return self.values[name]

    def _distances(self, numbers: NDArray[np.intp], y: float, x: float) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.hypot(self.y[numbers] - y, self.x[numbers] - x)
        return found

    def _overlaps(self, number: int, chosen: list[int]) -> bool:
        """Return whether a patch shares more than half its length with one of others, along both axes."""
        height, width = self.footprint
        return any(
            abs(self.y[number] - self.y[o]) < height / 2 and abs(self.x[number] - self.x[o]) < width / 2 for o in chosen
        )


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column as float64, so that JSON shows the numbers that are stored; null becomes NaN."""
    return np.asarray(table.column(name).to_numpy(), np.float64)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _direction(dy: float, dx: float) -> str:
    """Return a compass direction, as on a map; y runs down."""
    return DIRECTIONS[round(math.atan2(-dy, dx) / (math.pi / 4)) % 8]


@dataclass(frozen=True, eq=False)
class Read:
    """The evidence of the run as it was last read.

    Attributes:
        state: tells it from other evidence; "" where there is none.
        evidence: what was found; None where there is none, or with a `problem`.
        problem: why it cannot be shown.
    """

    state: str = ""
    evidence: Evidence | None = None
    problem: str = ""

    @property
    def clusters(self) -> list[KindRow]:
        """Return the clusters; none where there is no evidence worth sorting."""
        return [] if self.evidence is None else self.evidence.kinds


@dataclass(frozen=True, eq=False)
class Sampled:
    """The patches of a slide from which places were drawn.

    Attributes:
        numbers: in the slide's table, int64 [n].
        sums: what each cluster contributes in each patch, with its sign, float64 [n, k].
        patches: their rows.
        state: of the evidence.
    """

    numbers: NDArray[np.int64]
    sums: NDArray[np.float64]
    patches: PatchTable
    state: str

    def main(self) -> NDArray[np.int64]:
        """Return which cluster contributes most to each patch, from 1 on; 0 where none does."""
        if not self.sums.size:
            return np.zeros(len(self.numbers), np.int64)
        sizes = np.abs(self.sums)
        return np.where(sizes.max(axis=1) > 0, sizes.argmax(axis=1) + 1, 0)


class EvidenceIndex:
    """The evidence of a run, and the patches of its sample by cluster. Safe to share between threads."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._lock = threading.Lock()
        self._read, self._read_at = Read(), -REFRESH_S
        self._sampled: dict[tuple[str, str], Sampled] = {}

    def read(self) -> Read:
        """Return the evidence as it is on the disk, looked for again every few seconds."""
        with self._lock:
            if time.monotonic() - self._read_at >= REFRESH_S:
                self._read_at = time.monotonic()
                self._read = self._look()
            return self._read

    def _look(self) -> Read:
        place = self._folder.metrics
        try:
            check_inside(self._archive.out, place)
            data = place.read(MAX_BYTES)
        except FileNotFoundError:
            return Read()
        except WsiGradcamError as error:
            return Read(problem=one_line(error))
        state = hashlib.sha256(data).hexdigest()[:12]
        if state == self._read.state:
            return self._read
        try:
            found = Evidence.model_validate(read_json(data))
        except (DocumentError, ValidationError, ValueError, RecursionError) as error:
            return Read(problem=f"evidence.json cannot be read ({one_line(error)[:200]}); {AGAIN}")
        if found.run != self._archive.result.record.run_digest:
            return Read(problem=f"the slides were explained again since their evidence was sorted; {AGAIN}")
        return Read(state, found)

    @property
    def _folder(self) -> EvidenceFolder:
        return EvidenceFolder(self._archive.out / EVIDENCE)

    def collect(self, slide: ServedSlide) -> None:
        """Keep the patches of a slide from which places were drawn, unless they are known."""
        read, key = self.read(), (slide.key, slide.version)
        known = self._sampled.get(key)
        if not read.clusters or (known is not None and known.state == read.state) or status_of(slide) != "ok":
            return
        try:
            place = self._folder.places(slide.result.id)
            check_inside(self._archive.out, place)
            places = read_places(place, slide.result.plan.patches)
        except (FileNotFoundError, StoreError, OutsideError):  # none was drawn; of damage `validate` speaks
            places = np.zeros((0, 3))
        self._sampled[key] = _sampled(slide, places, len(read.clusters), read.state)

    def facts(self) -> dict[str, Any]:
        """Describe the evidence for the page, as JSON values."""
        read, slides = self.read(), self._archive.slides()
        found = read.evidence
        about: dict[str, Any] = {
            "problem": valid_text(read.problem) or None,
            "clusters": [],
            "there": found is not None,
        }
        if found is None:
            return about | {"clusters": []}
        return about | {
            "level": found.level,
            "target": valid_text(found.target),
            "worth_sorting": found.worth_sorting,
            "learned": valid_text(found.learned),
            "places": found.places,
            "slides": found.slides,
            "findings": [
                {"kind": one.kind, "cluster": one.cluster, "words": valid_text(one.words)} for one in found.findings
            ],
            "clusters": [cluster_facts(kind) | {"examples": self._examples(kind.number)} for kind in found.kinds],
            "report": f"/files/{REPORT}",
            "sites": sorted({site_of(slide) for slide in slides} - {""}),
            "collected": len(list(self._collected())),
            "finished": sum(status_of(slide) == "ok" for slide in slides),
        }

    def _collected(self) -> Iterator[tuple[ServedSlide, Sampled]]:
        """Yield the slides that are collected by now."""
        state = self.read().state
        for slide in self._archive.slides():
            known = self._sampled.get((slide.key, slide.version))
            if known is not None and known.state == state:
                yield slide, known

    def patches(self, number: int, site: str, count: int) -> dict[str, Any]:
        """Return the patches of the sample in which a cluster contributes most, the largest first, as JSON values.

        Raises:
            NotShownError: there is no such cluster.
        """
        read = self.read()
        if not 0 < number <= len(read.clusters):
            raise NotShownError(f"no cluster {number}; there are {len(read.clusters)}, counted from 1")
        ranked, found = self._ranked(number, site, min(count, MAX_TOP))
        return {"patches": ranked, "found": found}

    def _ranked(self, number: int, site: str, count: int, a_slide: int = MAX_TOP) -> tuple[list[dict[str, Any]], int]:
        """Return the patches to which a cluster contributes most, at most so many of each slide; and of how many."""
        ranked: list[tuple[float, int, Sampled, ServedSlide]] = []
        found = 0
        for slide, sampled in self._collected():
            if site and site_of(slide) != site:
                continue
            own = sampled.sums[:, number - 1]
            found += int(np.count_nonzero(own))
            rows = np.argsort(-np.abs(own), kind="stable")[: min(count, a_slide)]
            ranked += [(float(own[row]), row, sampled, slide) for row in rows.tolist() if own[row]]
        ranked.sort(key=lambda one: -abs(one[0]))
        patches = [
            patch_facts(slide, int(sampled.numbers[row]), value, flags_of(sampled.patches, row))
            for value, row, sampled, slide in ranked[:count]
        ]
        return patches, found

    def _examples(self, number: int) -> list[dict[str, Any]]:
        """Return a few patches of a cluster, of different slides where there are so many."""
        apart, _ = self._ranked(number, "", EXAMPLES, a_slide=1)
        return apart if len(apart) == EXAMPLES else self._ranked(number, "", EXAMPLES)[0]

    def highest(self, slide: ServedSlide, number: int, column: str) -> list[tuple[float, int, frozenset[str]]]:
        """Return value, number and flags of the patches of a slide's sample that are mostly of a cluster."""
        sampled = self._sampled.get((slide.key, slide.version))
        if sampled is None or sampled.state != self.read().state:
            return []
        rows = np.flatnonzero(sampled.main() == number)
        values = sampled.patches.values[column]
        return [
            (float(values[row]), int(sampled.numbers[row]), flags_of(sampled.patches, row))
            for row in rows.tolist()
            if np.isfinite(values[row])
        ]

    def of_patch(self, slide: ServedSlide, number: int) -> list[dict[str, Any]] | None:
        """Return what clusters contribute in a patch, the largest first; None where no place of it was drawn."""
        if not self.read().clusters:
            return None
        self.collect(slide)
        sampled = self._sampled.get((slide.key, slide.version))
        rows = [] if sampled is None else np.flatnonzero(sampled.numbers == number).tolist()
        if sampled is None or not rows:
            return None
        sums = sampled.sums[rows[0]]
        whole = float(np.abs(sums).sum())
        order = np.argsort(-np.abs(sums), kind="stable")
        return [
            {"cluster": int(i) + 1, "contribution": float(sums[i]), "share": float(abs(sums[i])) / whole}
            for i in order.tolist()
            if sums[i]
        ]


def site_of(slide: ServedSlide) -> str:
    """Return the site of a slide, as the list of slides names it; "" where it does not."""
    return valid_text(slide.result.row.get("site", ""))


def cluster_facts(kind: KindRow) -> dict[str, Any]:
    """Return a cluster as JSON values."""
    change = kind.covering.difference.value if kind.covering is not None else None
    return {
        "number": kind.number,
        "label": valid_text(kind.name) or f"cluster {kind.number}",
        "colour": f"#{valid_text(kind.colour)}",
        "side": kind.side,
        "share": kind.share.model_dump(),
        "area": kind.area.value,
        "lift": kind.lift,
        "slides": kind.slides,
        "of_slides": kind.of_slides,
        "probability": kind.probability,
        "suspects": {valid_text(name): share for name, share in kind.suspects.items()},
        "uneven": [valid_text(one.by) for one in uneven(kind)],
        "change": change,
        "shortcut": kind.shortcut,
    }


def read_places(place: StoragePath, patches: int) -> NDArray[np.float64]:
    """Return the places of a slide: patch, cluster (0 for none) and contribution, float64 [n, 3].

    Raises:
        FileNotFoundError: there is no such table.
        StoreError: it is damaged, or of more patches than the slide has.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(place.read(MAX_PLACES * PLACE_BYTES)))
        about = file.metadata
        size = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
        if about.num_rows > MAX_PLACES or size > (about.num_rows + 1000) * PLACE_BYTES:
            raise StoreError(f"{place}: {about.num_rows:,} places of {size:,} bytes; {AGAIN}")
        table = file.read(list(COLUMNS), use_threads=False)
        found = np.stack([np.asarray(table.column(name).to_numpy(), np.float64) for name in COLUMNS], axis=1)
    except StoreError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise StoreError(f"{place}: damaged ({one_line(error)}); {AGAIN}") from error
    if not np.isfinite(found).all() or (len(found) and not 0 <= found[:, 0].min() <= found[:, 0].max() < patches):
        raise StoreError(f"{place}: places of patches that the slide does not have; {AGAIN}")
    return found


def _sampled(slide: ServedSlide, places: NDArray[np.float64], clusters: int, state: str) -> Sampled:
    """Return the patches of a slide's places [n, 3], see `read_places`, with their rows in the slide's table."""
    numbers, rows = np.unique(places[:, 0].astype(np.int64), return_inverse=True)
    sums = np.zeros((len(numbers), clusters))
    own = places[:, 1].astype(np.int64)
    inside = (own > 0) & (own <= clusters)
    np.add.at(sums, (rows[inside], own[inside] - 1), places[inside, 2])
    result = slide.result
    columns = [f"probability_{label}" for label in result.classes]
    table = result.table([*COORDINATES, *TEXTS, *columns, *FLAGS]).take(pa.array(numbers))
    return Sampled(numbers, sums, PatchTable(table, result.plan.footprint), state)


BEST = 12  # patches of a slide, of each class, among which those of the archive are chosen
FLAGS = {"pen": 0.05, "glass": 0.05, "blur": 0.4}  # measures of quality and what is notable, as the panel of a patch


class ArchiveTop:
    """The highest patches of all slides by the probability of a class, collected slide by slide in the background."""

    def __init__(self, archive: Archive, evidence: EvidenceIndex) -> None:
        self._archive, self._evidence = archive, evidence
        self._best: dict[tuple[str, str], dict[str, list[tuple[float, int, frozenset[str]]]]] = {}

    def collect(self, slide: ServedSlide) -> None:
        """Keep the highest patches of a slide, for each class; of overlapping ones only the highest."""
        result = slide.result
        columns = self._columns
        table = result.table([*COORDINATES, *TEXTS, *columns, *FLAGS])  # results of older versions have no flags
        patches = PatchTable(table, result.plan.footprint)
        self._best[slide.key, slide.version] = {
            name: [(patches.values[name][n], n, flags_of(patches, n)) for n in patches.top(name, BEST)]
            for name in columns
        }

    def top(self, label: str, site: str, flag: str, count: int, cluster: int = 0) -> dict[str, Any]:
        """Return the highest patches of class `label` of all slides that are collected by now, as JSON values.

        At most `BEST` of each slide. `site` is one of the list of slides, "" for all; `flag` is one of `FLAGS`, "none"
        for patches without any, "" for all. With a `cluster` of the evidence they are those of its sample which that
        cluster contributes most to.
        """
        slides, column, found = self._archive.slides(), f"probability_{label}", []
        for slide in slides:
            if site and site_of(slide) != site:
                continue
            for value, number, flags in self._candidates(slide, column, cluster):
                if not flag or (flag == "none" and not flags) or flag in flags:
                    found.append((value, number, flags, slide))
        ranked = sorted(found, key=lambda one: -one[0])[: min(count, MAX_TOP)]
        return {
            "sites": sorted({site_of(slide) for slide in slides} - {""}),
            "flags": list(FLAGS),
            "collected": sum((slide.key, slide.version) in self._best for slide in slides),
            "finished": sum(status_of(slide) == "ok" for slide in slides),
            "patches": [patch_facts(slide, number, value, flags) for value, number, flags, slide in ranked],
        }

    def _candidates(self, slide: ServedSlide, column: str, cluster: int) -> list[tuple[float, int, frozenset[str]]]:
        if not cluster:
            return self._best.get((slide.key, slide.version), {}).get(column, [])
        known = self._evidence.highest(slide, cluster, column) if column in self._columns else []
        return sorted(known, key=lambda one: -one[0])[:BEST]

    @property
    def _columns(self) -> list[str]:
        return [f"probability_{label}" for label in self._archive.result.classes]


def patch_facts(slide: ServedSlide, number: int, value: float, flags: frozenset[str]) -> dict[str, Any]:
    """Describe a patch in a list of patches of many slides, as JSON values."""
    return {
        "slide": valid_text(slide.result.id),
        "key": slide.key,
        "version": slide.version,
        "site": site_of(slide),
        "number": number,
        "value": value,
        "flags": sorted(flags),
    }


def flags_of(patches: PatchTable, number: int) -> frozenset[str]:
    """Return the flags of quality of a patch, by its row."""
    return frozenset(
        name for name, most in FLAGS.items() if name in patches.values and patches.values[name][number] > most
    )
