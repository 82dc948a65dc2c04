"""Patches across the archive: the highest, and those in the clusters of its evidence, which are described here too.

Everything is read from OUT/evidence and checked as if a stranger had written it. The patches of the sample are
collected slide by slide in the background, like the highest patches.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from wsi_gradcam.errors import (
    ConfigError,
    DocumentError,
    MarkError,
    NotShownError,
    OutsideError,
    StoreError,
    WsiGradcamError,
    one_line,
)
from wsi_gradcam.evidence import EvidenceFolder
from wsi_gradcam.evidence.clusters import NO_TISSUE
from wsi_gradcam.evidence.findings import Evidence, KindRow, in_words, uneven
from wsi_gradcam.evidence.labels import PLACES, by_patch, give_name, read_names, read_rows
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.run.claims import EVIDENCE
from wsi_gradcam.viewer.archive import check_inside, status_of, valid_text
from wsi_gradcam.viewer.queries import COORDINATES, MAX_TOP, TEXTS, PatchTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.viewer.archive import Archive, ServedSlide

REPORT = f"{EVIDENCE}/report.html"
REFRESH_S = 5.0
MAX_BYTES = 64 << 20  # of evidence.json
EXAMPLES = 4
PART = 0.1  # of what clusters contribute to a patch; from this share on it is shown as belonging to a cluster
AGAIN = "run `wsi-gradcam evidence` again"


@dataclass(frozen=True, eq=False)
class Read:
    """The evidence of the run as last read.

    Attributes:
        state: distinguishes it from other evidence; "" if there is none.
        evidence: what was found; None if there is none, or if there is a `problem`.
        problem: why it cannot be shown.
    """

    state: str = ""
    evidence: Evidence | None = None
    problem: str = ""

    @property
    def clusters(self) -> list[KindRow]:
        """Return the clusters; none if there is no evidence worth sorting."""
        return [] if self.evidence is None else self.evidence.kinds


@dataclass(frozen=True, eq=False)
class Sampled:
    """The patches of a slide that are in the sample of the evidence.

    Attributes:
        numbers: in the slide's table, int64 [n].
        sums: the signed contribution of each cluster in each patch, float64 [n, k].
        patches: their rows.
        state: of the evidence.
    """

    numbers: NDArray[np.int64]
    sums: NDArray[np.float64]
    patches: PatchTable
    state: str

    def shares(self) -> NDArray[np.float64]:
        """Return the share of each cluster in the absolute contributions of all clusters to each patch, [n, k]."""
        sizes = np.abs(self.sums)
        whole = sizes.sum(axis=1, keepdims=True)
        shares: NDArray[np.float64] = np.divide(sizes, whole, out=np.zeros_like(sizes), where=whole > 0)
        return shares


class EvidenceIndex:
    """The evidence of a run, and the patches of its sample by cluster. Safe to share between threads."""

    def __init__(self, archive: Archive, read_only: bool = False) -> None:
        self._archive, self._read_only = archive, read_only
        self._lock = threading.Lock()
        self._read, self._read_at = Read(), -REFRESH_S
        self._sampled: dict[tuple[str, str], Sampled] = {}

    def read(self) -> Read:
        """Return the evidence as it is on disk, checked again every few seconds."""
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

    def _named(self, found: Evidence) -> Evidence:
        """Return evidence with the names now in names.yaml, also in the words of its findings."""
        names = self.names()
        kinds = [kind.model_copy(update={"name": names.get(kind.number, "")}) for kind in found.kinds]
        if kinds == found.kinds:
            return found
        return found.model_copy(update={"kinds": kinds, "findings": in_words(kinds, found.target, found.level)})

    def names(self) -> dict[int, str]:
        """Return the names of clusters, by number; those of evidence.json if names.yaml cannot be read."""
        try:
            check_inside(self._archive.out, self._folder.names)
            return self._unnamed() | read_names(self._folder.names)
        except (ConfigError, StoreError, OutsideError):
            return {kind.number: kind.name for kind in self.read().clusters if kind.name}

    def _unnamed(self) -> dict[int, str]:
        """Return the names of clusters that nobody has named: those of bare glass and ink."""
        return {kind.number: kind.name for kind in self.read().clusters if kind.name in NO_TISSUE}

    @property
    def can_name(self) -> bool:
        """Whether names can be written, as far as can be known in advance."""
        folder = self._folder.place
        return not self._read_only and (not isinstance(folder, LocalPath) or os.access(folder.path, os.W_OK))

    def rename(self, given: dict[str, Any]) -> dict[str, Any]:
        """Give a cluster a name in names.yaml, "" for none; return its name afterwards.

        `given` has the `cluster`, the `name`, the name it had before (`was`), and the `state` of the evidence, so that
        a name given by somebody else in the meantime is not lost, and an old number does not name another cluster.

        Raises:
            MarkError: these are not valid, or no longer.
            ConfigError, StoreError, OutsideError: names.yaml cannot be read or written.
        """
        number, name, was = given.get("cluster"), given.get("name"), given.get("was")
        if type(number) is not int or not isinstance(name, str) or not isinstance(was, str):
            raise MarkError("a name is given to a cluster by `cluster`, `name` and the name that it `was` called")
        if given.get("state") != self.read().state or not 0 < number <= len(self.read().clusters):
            raise MarkError("the clusters have been found anew; load the page again")
        check_inside(self._archive.out, self._folder.names)
        if was == self._unnamed().get(number) and number not in read_names(self._folder.names):
            was = ""
        now = give_name(self._folder.names, number, name.strip(), was)
        return {"cluster": number, "name": valid_text(now), "kept": now == name.strip()}

    @property
    def _folder(self) -> EvidenceFolder:
        return EvidenceFolder(self._archive.out / EVIDENCE)

    def collect(self, slide: ServedSlide) -> None:
        """Store the patches of a slide that are in the sample, unless they are already known."""
        read, key = self.read(), (slide.key, slide.version)
        known = self._sampled.get(key)
        if not read.clusters or (known is not None and known.state == read.state) or status_of(slide) != "ok":
            return
        try:
            numbers, sums = self._contributions(slide, len(read.clusters))
        except (FileNotFoundError, StoreError, OutsideError):  # none were drawn; damage is reported by `validate`
            numbers, sums = np.zeros(0, np.int64), np.zeros((0, len(read.clusters)))
        self._sampled[key] = Sampled(numbers, sums, _rows_of(slide, numbers), read.state)

    def _contributions(self, slide: ServedSlide, clusters: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return a slide's patches in the sample [n], and the contribution of each cluster in them [n, k].

        From all cells of each patch, or from the drawn ones if the tables of patches were left out.

        Raises:
            FileNotFoundError: neither table exists.
            StoreError, OutsideError: it cannot be read.
        """
        slide_id, patches = slide.result.id, slide.result.plan.patches
        for place, names in (
            (self._folder.patches(slide_id), ("patch", *(f"evidence_{number + 1}" for number in range(clusters)))),
            (self._folder.places(slide_id), PLACES),
        ):
            if place.is_file():
                check_inside(self._archive.out, place)
                rows = read_rows(place, names, patches)
                return (rows[:, 0].astype(np.int64), rows[:, 1:]) if names != PLACES else by_patch(rows, clusters)
        raise FileNotFoundError(f"{slide_id}: no table of its patches or places")

    def facts(self) -> dict[str, Any]:
        """Describe the evidence for the page, as JSON values."""
        read, slides = self.read(), self._archive.slides()
        found = None if read.evidence is None else self._named(read.evidence)
        about: dict[str, Any] = {
            "problem": valid_text(read.problem) or None,
            "clusters": [],
            "there": found is not None,
        }
        if found is None:
            return about | {"clusters": []}
        return about | {
            "level": found.level,
            "state": read.state,
            "can_name": self.can_name,
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
        """Yield the slides collected so far."""
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
        """Return the patches to which a cluster contributes most, with a limit per slide, and how many there are."""
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
        """Return a few patches of a cluster, from different slides if there are enough."""
        apart, _ = self._ranked(number, "", EXAMPLES, a_slide=1)
        return apart if len(apart) == EXAMPLES else self._ranked(number, "", EXAMPLES)[0]

    def highest(self, slide: ServedSlide, number: int, column: str) -> list[tuple[float, int, frozenset[str]]]:
        """Return value, number and flags of the patches in a slide's sample that have a `PART` of a cluster."""
        sampled = self._sampled.get((slide.key, slide.version))
        if sampled is None or sampled.state != self.read().state or not 0 < number <= sampled.sums.shape[1]:
            return []
        rows = np.flatnonzero(sampled.shares()[:, number - 1] >= PART)
        values = sampled.patches.values[column]
        return [
            (float(values[row]), int(sampled.numbers[row]), flags_of(sampled.patches, row))
            for row in rows.tolist()
            if np.isfinite(values[row])
        ]

    def of_patch(self, slide: ServedSlide, number: int) -> list[dict[str, Any]] | None:
        """Return what clusters contribute in a patch, the largest first; None if it is not in the sample."""
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
    """Return the site of a slide as given in the list of slides; "" if it is not given."""
    return valid_text(slide.result.row.get("site", ""))


def cluster_facts(kind: KindRow) -> dict[str, Any]:
    """Return a cluster as JSON values."""
    change = kind.covering.difference.value if kind.covering is not None else None
    return {
        "number": kind.number,
        "name": valid_text(kind.name),
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


def _rows_of(slide: ServedSlide, numbers: NDArray[np.int64]) -> PatchTable:
    """Return some patches of a slide's table: their places, probabilities and quality."""
    result = slide.result
    columns = [f"probability_{label}" for label in result.classes]
    table = result.table([*COORDINATES, *TEXTS, *columns, *FLAGS]).take(pa.array(numbers))
    return PatchTable(table, result.plan.footprint)


BEST = 12  # patches per slide and class, from which those of the archive are chosen
FLAGS = {"pen": 0.05, "glass": 0.05, "blur": 0.4}  # notable qualities, as in a patch's panel


class ArchiveTop:
    """The highest patches of all slides by the probability of a class, collected slide by slide in the background."""

    def __init__(self, archive: Archive, evidence: EvidenceIndex) -> None:
        self._archive, self._evidence = archive, evidence
        self._best: dict[tuple[str, str], dict[str, list[tuple[float, int, frozenset[str]]]]] = {}

    def collect(self, slide: ServedSlide) -> None:
        """Store the highest patches of a slide for each class; of overlapping ones only the highest."""
        result = slide.result
        columns = self._columns
        table = result.table([*COORDINATES, *TEXTS, *columns, *FLAGS])  # results of older versions have no flags
        patches = PatchTable(table, result.plan.footprint)
        self._best[slide.key, slide.version] = {
            name: [(patches.values[name][n], n, flags_of(patches, n)) for n in patches.top(name, BEST)]
            for name in columns
        }

    def top(self, label: str, site: str, flag: str, count: int, cluster: int = 0) -> dict[str, Any]:
        """Return the highest patches of class `label` from all slides collected so far, as JSON values.

        At most `BEST` from each slide. `site` is one from the list of slides, "" for all; `flag` is one of `FLAGS`,
        "none" for patches without any, "" for all. With a `cluster` of the evidence, they are those in its sample where
        that cluster has at least `PART` of the evidence.
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
    """Return the quality flags of a patch, from its row."""
    return frozenset(
        name for name, most in FLAGS.items() if name in patches.values and patches.values[name][number] > most
    )
