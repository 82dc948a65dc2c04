"""Two audits side by side: of two models, or of two runs with other methods, on the patches that both have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import Keys, Measure, comparison_row
from wsi_gradcam.audit.folder import AUDIT, AuditFolder
from wsi_gradcam.audit.gathered import Gathered, gather
from wsi_gradcam.audit.judging_faithfulness import (
    PLAUSIBLE,
    SCORE,
    SCORE_PROBABILITY,
    probability_score_of,
    score_of,
)
from wsi_gradcam.audit.judging_maps import CHANGED_ANSWERS, STAYING_MAPS
from wsi_gradcam.audit.judging_model import LEAKY, SATURATED, WORTH
from wsi_gradcam.audit.measured import CHANGES, MAIN
from wsi_gradcam.audit.plan import SlideSample
from wsi_gradcam.audit.schema import AgainstFacts
from wsi_gradcam.errors import ConfigError, ResultError, StoreError
from wsi_gradcam.io.paths import StoragePathLike, storage_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.sample import Candidate

    Floats = NDArray[np.float64]

FAR_PX = 1.0  # level-0 px by which patches may differ in size and still be the same


@dataclass(frozen=True, eq=False)
class Other:
    """An audit that stands in its folder.

    Attributes:
        out: of its run, as shown to users.
        digest: of the audit.
        model: its name.
        methods: of its run.
    """

    out: str
    folder: AuditFolder
    digest: str
    model: str
    methods: tuple[str, ...]
    samples: Mapping[str, SlideSample]
    footprints: Mapping[str, tuple[float, float]]

    def gathered(self, seed: int) -> Gathered:
        """Its numbers."""
        return gather(self.folder, self.digest, self.samples, seed, self.samples)


def open_audit(out: StoragePathLike) -> Other:
    """The finished audit in OUT/audit of a run.

    Raises:
        ResultError: there is none, or it is not finished.
        StoreError: it is damaged.
    """
    from wsi_gradcam.results.run import open_result

    result = open_result(storage_path(out).absolute())
    folder = AuditFolder(result.folder.place / AUDIT)
    plan, metrics = folder.read_plan(), folder.read_metrics()
    if plan is None or metrics is None:
        raise ResultError(f"{folder.place}: holds no finished audit; run `wsi-gradcam audit {result.out}` first")
    try:
        samples = {name: SlideSample.from_json(values) for name, values in plan["samples"].items()}
        digest, methods = str(plan["digest"]), tuple(metrics["run"]["methods"])
        left_out = {row["what"] for row in metrics["not_audited"]}
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder.place}: damaged, or of another version; audit again with --overwrite") from error
    samples = {name: sample for name, sample in samples.items() if name not in left_out}
    footprints = {name: result[name].plan.footprint for name in samples}
    return Other(result.out, folder, digest, str(metrics["run"]["model"]), methods, samples, footprints)


def shared_sample(candidates: Sequence[Candidate], other: Other) -> dict[str, SlideSample]:
    """The other audit's patches that this run has too, with their weights.

    Raises:
        ConfigError: there are none.
    """
    found = {}
    for candidate in candidates:
        name = candidate.slide.id
        if name in other.samples and _alike(candidate.slide.plan.footprint, other.footprints[name]):
            sample = _matched(candidate, other.samples[name])
            if sample.patches:
                found[name] = sample
    if not found:
        raise ConfigError(
            f"{other.out}: none of its audited patches is one of this run; compare runs on the same slides, with "
            "patches of the same size, mpp and stride"
        )
    return dict(sorted(found.items()))


def compared(here: Gathered, yx: Mapping[str, SlideSample], methods: Sequence[str], other: Other) -> AgainstFacts:
    """What the two audits differ in, patch by patch."""
    there = other.gathered(here.seed)
    rows_here, rows_there = _pairs(_places(yx, here), _places(other.samples, there))
    if not len(rows_here):
        raise ResultError(f"{other.out}: no patch was audited here and there")
    mine, theirs = _taken(here, rows_here), _taken(there, rows_there)
    comparisons = [
        comparison_row(question, _between(measure), mine.compare(first, second), **keys)
        for question, measure, keys, first, second in _numbers(mine, theirs, methods, other.methods)
    ]
    return AgainstFacts(
        out=other.out,
        model=other.model,
        audit_digest=other.digest,
        patches=len(rows_here),
        only_there=len(there.slides) - len(rows_there),
        comparisons=comparisons,
    )


def _alike(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return all(abs(a - b) < FAR_PX for a, b in zip(first, second, strict=True))


def _matched(candidate: Candidate, sample: SlideSample) -> SlideSample:
    """The sample with this run's numbers of the patches."""
    table = candidate.slide.table(["y", "x", "status"])
    places = zip(table.column("y").to_pylist(), table.column("x").to_pylist(), strict=True)
    readable = table.column("status").to_pylist()
    numbers = {yx: i for i, yx in enumerate(places) if readable[i] == "ok"}
    kept = [i for i, yx in enumerate(sample.yx) if yx in numbers]
    return SlideSample(
        tuple(numbers[sample.yx[i]] for i in kept),
        tuple(sample.yx[i] for i in kept),
        tuple(sample.weights[i] for i in kept),
        tuple(sample.strata[i] for i in kept),
        sample.deep,
    )


def _places(samples: Mapping[str, SlideSample], gathered: Gathered) -> dict[tuple[str, int, int], int]:
    """The row of each patch by slide and place."""
    known = {(name, n): yx for name, one in samples.items() for n, yx in zip(one.patches, one.yx, strict=True)}
    numbers = zip(gathered.slides.tolist(), gathered["base/number"].tolist(), strict=True)
    return {(slide, *known[slide, int(number)]): row for row, (slide, number) in enumerate(numbers)}


def _pairs(
    here: Mapping[tuple[str, int, int], int], there: Mapping[tuple[str, int, int], int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    both = [key for key in here if key in there]
    return np.array([here[key] for key in both], np.int64), np.array([there[key] for key in both], np.int64)


def _taken(gathered: Gathered, rows: NDArray[np.int64]) -> Gathered:
    numbers = {name: values[rows] for name, values in gathered.numbers.items()}
    return Gathered(numbers, gathered.slides[rows], gathered.of_slides, gathered.seed)


Pair = tuple[str, Measure, Keys, "Floats", "Floats"]
BY_METHOD = (
    ("locality", replace(WORTH, what="worth"), "worth"),
    ("plausibility", PLAUSIBLE["auroc"], "auroc"),
    ("plausibility", PLAUSIBLE["iou"], "iou"),
    ("saturation", replace(LEAKY, what="like_leaky"), "like_leaky"),
)
CHANGED = replace(CHANGED_ANSWERS, what="changed answers with {change}", of="the answer")
OF_MODEL = replace(SATURATED, what="saturated probability", of="the model")


def _between(measure: Measure) -> Measure:
    """A measure of both audits."""
    there = "{other_method}" if "{map}" in measure.of else measure.of
    return replace(measure, of=f"{measure.of}, here", against=f"{there}, there")


def _numbers(mine: Gathered, theirs: Gathered, here: Sequence[str], there: Sequence[str]) -> list[Pair]:
    """(question, measure, keys, first, second) of all that both have; methods by name, else the first two."""
    found: list[Pair] = []
    common = [name for name in here if name in there]
    for method, against in [(name, name) for name in common] or [(here[0], there[0])]:
        keys = Keys(method=method, other_method=against)
        found += _scores(mine, theirs, keys)
        for question, measure, name in BY_METHOD:
            names = f"{question}/{method}/{name}", f"{question}/{against}/{name}"
            if names[0] in mine and names[1] in theirs:
                found.append((question, measure, keys, mine[names[0]], theirs[names[1]]))
        names = f"sanity/{method}/draws", f"sanity/{against}/draws"
        if names[0] in mine and names[1] in theirs:
            found.append(("sanity", STAYING_MAPS, keys, _share(mine[names[0]]), _share(theirs[names[1]])))
    of_both = [("stability", CHANGED, Keys(change=change), f"stability/{change}/flips") for change in CHANGES]
    of_both.append(("saturation", OF_MODEL, Keys(), "saturation/saturated"))
    for question, measure, keys, name in of_both:
        if name in mine and name in theirs:
            found.append((question, measure, keys, mine[name], theirs[name]))
    return found


def _scores(mine: Gathered, theirs: Gathered, keys: Keys) -> list[Pair]:
    method, against = keys["method"], keys["other_method"]
    names = f"faithfulness/{MAIN}/{method}/deletion", f"faithfulness/{MAIN}/{against}/deletion"
    if names[0] not in mine or names[1] not in theirs:
        return []
    keys = Keys(**keys, baseline=MAIN)
    logits = score_of(mine, MAIN, method), score_of(theirs, MAIN, against)
    found: list[Pair] = [("faithfulness", SCORE, keys, *logits)]
    first, second = probability_score_of(mine, method), probability_score_of(theirs, against)
    if first is not None and second is not None:
        found.append(("faithfulness", SCORE_PROBABILITY, keys, first, second))
    return found


def _share(stays: Floats) -> Floats:
    """The mean [N] over draws; NaN where no draw tells."""
    known = np.isfinite(stays)
    total: Floats = np.where(known, stays, 0).sum(axis=1)
    mean: Floats = np.divide(total, known.sum(axis=1), out=np.full(len(stays), np.nan), where=known.any(axis=1))
    return mean
