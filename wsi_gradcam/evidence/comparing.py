"""Evidence beside other evidence: that of another model at the same places, and the names that kinds had before.

What one model looks at is compared with what the other looks at in the same places: the share of its evidence on each
kind, and the share of the other's evidence there, slide by slide. Kinds do not have to match for that.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pyarrow import parquet

from wsi_gradcam.audit.comparing import alike
from wsi_gradcam.audit.findings import ALPHA, percent
from wsi_gradcam.audit.measurements import compare, estimate, holm
from wsi_gradcam.audit.plan import Arrays, read_arrays, write_arrays
from wsi_gradcam.errors import ConfigError, ResultError, StoreError
from wsi_gradcam.evidence import FORMAT, NOTHING, Against, AgainstRow, EvidenceFolder, SlideShare
from wsi_gradcam.evidence.clusters import SIDES, Side
from wsi_gradcam.evidence.findings import Evidence, as_share
from wsi_gradcam.evidence.labels import read_clusters, read_names
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.io.zarr_stores import METADATA
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.run import Result, open_result
from wsi_gradcam.results.run_files import RunFolder
from wsi_gradcam.run.claims import EVIDENCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.archive import Candidate
    from wsi_gradcam.evidence import EvidencePlan
    from wsi_gradcam.evidence.clusters import Kinds
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.run.context import Context

    Floats = NDArray[np.float64]

MUCH = 0.05  # of all evidence; smaller differences of shares are not reported
SAME = 0.5  # of each of two kinds on the other; from this share on they count as the same
SURE, LIKELY = 0.9, 0.7  # cosines of directions from which a kind certainly, or possibly, is one that had a name
UNSURE = " (unsure)"  # behind a name
MOST_ROWS = 1 << 16  # of a table of places at once


@dataclass(frozen=True, eq=False)
class OtherEvidence:
    """Finished evidence of another run.

    Attributes:
        footprints: (height, width) of patches in level-0 px, by the id of each slide that it has patches of.
        plan: digest of its plan.
        digest: of everything that was found.
    """

    result: Result
    evidence: Evidence
    footprints: Mapping[str, tuple[float, float]]
    plan: str
    digest: str

    @property
    def out(self) -> str:
        """The run's folder, as text."""
        return self.result.out

    def shares(self, candidates: Sequence[Candidate]) -> dict[str, SlideShare]:
        """Return what to draw from slides that another run has too; raises ConfigError if there are none."""
        there = {
            one.entry.id: SlideShare(one.patches, like=self.plan)
            for one in candidates
            if one.entry.id in self.footprints and alike(one.slide.plan.footprint, self.footprints[one.entry.id])
        }
        if not there:
            raise self.nothing_shared()
        return dict(sorted(there.items()))

    def nothing_shared(self) -> ConfigError:
        """Return the error for a run that has none of its patches."""
        return ConfigError(
            f"{self.out}: this run has none of the patches whose evidence was sorted there; compare runs on the same "
            "slides, with the same patch size, mpp and stride"
        )


def open_evidence(out: StoragePathLike) -> OtherEvidence:
    """Open the finished evidence in OUT/evidence of a run.

    Raises:
        ResultError: there is none, there was nothing to sort, or it has no label images.
        StoreError: it is damaged.
    """
    result = open_result(storage_path(out).absolute())
    folder = EvidenceFolder(result.folder.place / EVIDENCE)
    plan, found = folder.read_plan(), folder.read_metrics()
    if plan is None or found is None:
        raise ResultError(f"{folder.place}: has no finished evidence; run `wsi-gradcam evidence {result.out}` first")
    try:
        evidence = Evidence.model_validate(found)
        slides, before = list(plan["samples"]), str(plan["digest"])
        digest = hashlib.sha256(folder.metrics.read()).hexdigest()
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder.place}: damaged, or of another version; run it again with --overwrite") from error
    if not evidence.kinds:
        raise ResultError(f"{result.out}: its model has no evidence worth sorting, so there is nothing to compare with")
    kept = [name for name in slides if folder.places(name).is_file() and name not in evidence.not_read]
    if not any((folder.labels(name) / METADATA).is_file() for name in kept[:1]):
        raise ResultError(f"{folder.place}: has no label images; run evidence there again, without --skip-labels")
    if evidence_format(plan) != FORMAT:
        raise StoreError(f"{folder.place}: of another version; run evidence there again with --overwrite")
    return OtherEvidence(result, evidence, {name: result[name].plan.footprint for name in kept}, before, digest)


def evidence_format(plan: Mapping[str, Any]) -> object:
    """Return the format of the numbers stated in a plan; None if it states none."""
    return (plan.get("identity") or {}).get("format")


def compare_slide(context: Context[Any], entry: SlideEntry) -> None:
    """Store what each model's evidence on a slide lies on of its own kinds and of the other's, unless that was done.

    `here` [2, k + 1, m + 2] is what this model's places contribute for and against the target, by their kind (0 for
    none) and by the label in the other's image (0 not looked at, m + 1 of no kind); `there` [2, m + 1, k + 2] is the
    same for the other's places.
    """
    plan: EvidencePlan = context.workload.plan
    assert plan.kinds is not None
    folder, run = EvidenceFolder(plan.run.out / EVIDENCE), RunFolder(storage_path(plan.against[0]))
    theirs = EvidenceFolder(run.place / EVIDENCE)
    place = folder.batch(entry.id, plan.compared_digest, 0)
    own, other = (Manifest(one.manifest).plan() for one in (context.folder(entry), run.slide(entry.id)))
    if place.is_file() or own is None or other is None:
        return
    if own.slide_digest != other.slide_digest:
        raise ResultError(f"{entry.id}: another file than the slide that {run.place} is of; compare the same slides")
    k, m = len(plan.kinds), plan.others
    arrays = {
        "here": on_labels(folder.places(entry.id), theirs.labels(entry.id), other, k, m),
        "there": on_labels(theirs.places(entry.id), folder.labels(entry.id), own, m, k),
    }
    write_arrays(place, arrays)


def on_labels(places: StoragePath, labels: StoragePath, plan: SlidePlan, kinds: int, others: int) -> Floats:
    """Return sums of the places of a table by side, kind, and label in a label image of another model's kinds."""
    image = read_clusters(labels, plan)
    if image is None:
        raise ResultError(f"{labels}: there is no label image; run that evidence again, without --skip-labels")
    found = np.zeros((len(SIDES), kinds + 1, others + 2))
    table = parquet.read_table(io.BytesIO(places.read()), columns=["y", "x", "cluster", "contribution", "weight"])
    for batch in table.to_batches(MOST_ROWS):
        y, x, cluster, value, weight = (batch.column(i).to_numpy(zero_copy_only=False) for i in range(5))
        label = image.at(np.stack([y, x], axis=1) // plan.stride)
        label = np.where(label == NOTHING, others + 1, np.minimum(label, others + 1)).astype(np.int64)
        np.add.at(found, ((value < 0).astype(np.int64), cluster.astype(np.int64), label), np.abs(value) * weight)
    return found


def compare_evidence(compared: Mapping[str, Arrays], evidence: Evidence, other: OtherEvidence) -> Against:
    """Return how two models differ, from what was found on each slide."""
    here, there = (np.stack([arrays[name] for arrays in compared.values()]) for name in ("here", "there"))
    slides, seed = np.array(list(compared)), evidence.seed
    same = same_kinds(here.sum(axis=0), there.sum(axis=0), evidence, other.evidence)
    rows = []
    for kind in evidence.kinds:
        side, i = SIDES.index(kind.side), kind.number
        own, theirs = _part(here, side, np.s_[i, 1:]), _part(there, side, np.s_[:, i])
        rows.append(_row(kind.number, same.get(i), kind.name, kind.side, own, theirs, slides, seed))
    for kind in other.evidence.kinds:
        side, j = SIDES.index(kind.side), kind.number
        own, theirs = _part(here, side, np.s_[:, j]), _part(there, side, np.s_[j, 1:])
        rows.append(_row(None, kind.number, kind.name, kind.side, own, theirs, slides, seed))
    tested = [i for i, row in enumerate(rows) if row.p is not None]
    for i, p in zip(tested, holm([rows[i].p or 0.0 for i in tested]), strict=True):
        rows[i] = _told(rows[i].model_copy(update={"p_adjusted": p}))
    return Against(
        out=other.out,
        model=other.evidence.model,
        model_digest=other.evidence.model_digest,
        target=other.evidence.target,
        slides=len(slides),
        rows=rows,
        words=_in_words(rows, evidence, other),
    )


def _part(sums: Floats, side: int, part: Any) -> tuple[Floats, Floats]:
    """Return the amount on a part of [k, m] and the total where both have looked, each [S] by slide."""
    of_side = sums[:, side]
    own = np.array([one[part].sum() for one in of_side])
    return own, of_side[:, :, 1:].sum(axis=(1, 2))


def same_kinds(here: Floats, there: Floats, evidence: Evidence, other: Evidence) -> dict[int, int]:
    """Return, for kinds here, the same kind there: most of each lies on the other."""
    found = {}
    for kind in evidence.kinds:
        side, i = SIDES.index(kind.side), kind.number
        for theirs in other.kinds:
            j = theirs.number
            if theirs.side == kind.side:
                own, back = here[side, i, 1:].sum(), there[side, j, 1:].sum()
                if own and back and here[side, i, j] / own >= SAME and there[side, j, i] / back >= SAME:
                    found[i] = j
    return found


def _row(
    cluster: int | None,
    same: int | None,
    name: str,
    side: Side,
    own: tuple[Floats, Floats],
    theirs: tuple[Floats, Floats],
    slides: NDArray[np.str_],
    seed: int,
) -> AgainstRow:
    known = (own[1] > 0) & (theirs[1] > 0)
    here, there = (part[known] / whole[known] for part, whole in (own, theirs))
    found = compare(here, there, slides[known], seed=seed)
    enough = found.difference.unit == "slide"
    difference = as_share(found.difference)
    return AgainstRow(
        cluster=cluster,
        there=same,
        name=name,
        side=side,
        share=as_share(estimate(here, slides[known], seed=seed)),
        share_there=as_share(estimate(there, slides[known], seed=seed)),
        difference=difference,
        p=float(found.p) if enough and not np.isnan(found.p) else None,
        p_adjusted=None,
        change="",
    )


def _told(row: AgainstRow) -> AgainstRow:
    """Return a row with what has changed, if that is both large and beyond chance."""
    here, there, gap = row.share.value, row.share_there.value, row.difference.value
    if here is None or there is None or gap is None or (row.p_adjusted or 0.0) > ALPHA or abs(gap) < MUCH:
        return row
    if gap > 0:
        return row.model_copy(update={"change": "begun" if here >= 2 * there else "more"})
    return row.model_copy(update={"change": "dropped" if there >= 2 * here else "less"})


def _in_words(rows: Sequence[AgainstRow], evidence: Evidence, other: OtherEvidence) -> list[str]:
    """Return what this model newly looks at, by its own kinds, and what it no longer looks at, by the other's."""
    found, theirs = [], other.evidence.model
    if theirs == evidence.model:
        theirs = f"the model of {other.out}"
    for row in rows:
        if (row.cluster is None) == (row.change in ("begun", "more")) or not row.change:
            continue
        what = _called(row, theirs)
        shares = f"{percent(row.share.value or 0.0)} of its evidence {row.side} {evidence.target}"
        before = f"{percent(row.share_there.value or 0.0)} of that of {theirs}"
        verb = {
            "begun": "has begun to look at",
            "more": "looks more at",
            "less": "looks less at",
            "dropped": "has dropped",
        }[row.change]
        found.append(f"{evidence.model} {verb} {what}: {shares} lies there, and {before}.")
    few = all(row.p is None for row in rows)
    why = (
        "there are fewer than six slides that both have looked at"
        if few
        else f"no share of a cluster differs by {percent(MUCH)} of the evidence or more, beyond chance"
    )
    return found or [f"Nothing is said to have changed since {theirs}: {why}."]


def _called(row: AgainstRow, model: str) -> str:
    number, whose = (row.there, f" of {model}") if row.cluster is None else (row.cluster, "")
    return f"“{row.name}” (cluster {number}{whose})" if row.name else f"cluster {number}{whose}"


# --- names that kinds had before -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """A name that a kind had, and the kind it belongs to now, with the cosine; `is_sure` if that is high."""

    before: int
    now: int | None
    likeness: float
    name: str

    @property
    def is_sure(self) -> bool:
        """True if the two kinds are certainly the same."""
        return self.now is not None and self.likeness >= SURE


def directions(kinds: Kinds) -> Arrays:
    """Return what kinds consist of, as unit vectors [k, C] over channels, and their sides [k], 0 for "for"."""
    found = (kinds.centres @ kinds.axes.T).astype(np.float32)
    length = np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return {"directions": found / length, "sides": np.array([SIDES.index(side) for side in kinds.sides], np.int64)}


def kept_names(before: Arrays, now: Arrays, names: Mapping[int, str]) -> list[Kept]:
    """Return, for each name that a kind had, the kind it belongs to now; each kind has at most one name."""
    pairs = []
    if before["directions"].shape[1] == now["directions"].shape[1]:
        likeness = before["directions"] @ now["directions"].T
        likeness[before["sides"][:, None] != now["sides"][None]] = -1
        pairs = [
            (float(likeness[old - 1, new]), old, new + 1)
            for old in names
            if 0 < old <= len(likeness)
            for new in range(likeness.shape[1])
        ]
    found: dict[int, tuple[int | None, float]] = {}
    for cosine, old, new in sorted(pairs, reverse=True):
        if cosine >= LIKELY and old not in found and new not in {number for number, _ in found.values()}:
            found[old] = new, cosine
    return [Kept(old, *found.get(old, (None, 0.0)), name) for old, name in names.items()]


def carry_names(folder: EvidenceFolder, kinds: Kinds) -> dict[int, str]:
    """Return the names of kinds, by number; if kinds were found again, names.yaml is rewritten too.

    It is written after kinds.npz, which contains its future content, so a process killed between the two is no problem.
    """
    names, now = read_names(folder.names), directions(kinds)
    digest = np.frombuffer(bytes.fromhex(kinds.digest()), np.uint8)
    text = folder.names.read() if names else b""
    before: Arrays = read_arrays(folder.kinds) if folder.kinds.is_file() else {}
    if before and np.array_equal(before["digest"], digest):
        if text and bytes(before["names"]) and hashlib.sha256(text).digest() == bytes(before["of"]):
            folder.names.write(bytes(before["names"]))
            return read_names(folder.names)
        return names
    new = _as_yaml(kept_names(before, now, names)) if before and names else b""
    of = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    write_arrays(folder.kinds, {**now, "digest": digest, "names": np.frombuffer(new, np.uint8), "of": of})
    if new:
        folder.names.write(new)
    return read_names(folder.names)


def _as_yaml(kept: Sequence[Kept]) -> bytes:
    """Return names.yaml: one line per name, with the current numbers of kinds; names without a kind are comments."""
    lines = ["# Clusters were found anew. Their names follow what they consist of; an unsure one is to be looked at."]
    for one in sorted(kept, key=lambda one: (one.now is None, one.now or one.before)):
        name = one.name.removesuffix(UNSURE)
        if one.now is None:
            lines.append(f"# was {one.before}, and no cluster is like it now: {json.dumps(name, ensure_ascii=False)}")
        else:
            text = json.dumps(name if one.is_sure else name + UNSURE, ensure_ascii=False)
            lines.append(f"{one.now}: {text}  # was {one.before}, likeness {one.likeness:.2f}")
    return ("\n".join(lines) + "\n").encode()
