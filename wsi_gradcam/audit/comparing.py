"""Two audits side by side: of two models, or of two runs with different methods, on the patches that both have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import comparison_row
from wsi_gradcam.audit.measurements import Measurements, read_measurements
from wsi_gradcam.audit.plan import AUDIT, AuditFolder, SlideSample
from wsi_gradcam.audit.questions.bag_orders import SRG, BagFaithfulness
from wsi_gradcam.audit.questions.bag_trust import BagPlausibility
from wsi_gradcam.audit.questions.faithfulness import (
    CURVE_FRACTIONS,
    MAIN,
    PROBABILITY_SCORE,
    SCORE,
    Faithfulness,
    score,
)
from wsi_gradcam.audit.questions.gradients import LIKE_LEAKY, SATURATED, WORTH, Locality, Saturation
from wsi_gradcam.audit.questions.plausibility import AUROC, IOU, Plausibility
from wsi_gradcam.audit.questions.sanity import STAYING_MAPS, Sanity, share_staying
from wsi_gradcam.audit.questions.stability import CHANGED_ANSWERS, CHANGES, Stability
from wsi_gradcam.audit.schema import AgainstFacts, Keys, Measure, Unit
from wsi_gradcam.errors import ConfigError, ResultError, StoreError
from wsi_gradcam.io.paths import StoragePathLike, storage_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.archive import Candidate

    Floats = NDArray[np.float64]

FAR_PX = 1.0  # level-0 px by which patches may differ in size and still count as the same


@dataclass(frozen=True, eq=False)
class OtherAudit:
    """A finished audit in its folder.

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
    unit: Unit = "patch"

    def measurements(self, seed: int) -> Measurements:
        """Return its measurements."""
        return read_measurements(self.folder, self.digest, self.samples, seed, self.samples)


def open_audit(out: StoragePathLike) -> OtherAudit:
    """Open the finished audit in OUT/audit of a run.

    Raises:
        ResultError: there is none, or it is not finished.
        StoreError: it is damaged.
    """
    from wsi_gradcam.results.run import open_result

    result = open_result(storage_path(out).absolute())
    folder = AuditFolder(result.folder.place / AUDIT)
    plan, metrics = folder.read_plan(), folder.read_metrics()
    if plan is None or metrics is None:
        raise ResultError(f"{folder.place}: has no finished audit; run `wsi-gradcam audit {result.out}` first")
    try:
        samples = {name: SlideSample.from_json(values) for name, values in plan["samples"].items()}
        digest, methods = str(plan["digest"]), tuple(metrics["run"]["methods"])
        unit: Unit = metrics["run"].get("unit", "patch")
        left_out = {row["what"] for row in metrics["not_audited"]}
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder.place}: damaged, or of another version; audit again with --overwrite") from error
    samples = {name: sample for name, sample in samples.items() if name not in left_out}
    footprints = {name: result[name].plan.footprint for name in samples}
    return OtherAudit(result.out, folder, digest, str(metrics["run"]["model"]), methods, samples, footprints, unit)


def shared_sample(candidates: Sequence[Candidate], other: OtherAudit, unit: Unit = "patch") -> dict[str, SlideSample]:
    """Return the other audit's patches, or slides of slide-level models, that this run has too, with their weights.

    Raises:
        ConfigError: there are none.
    """
    units = {"patch": "patches", "slide": "the slides of a slide-level model"}
    if unit != other.unit:
        raise ConfigError(
            f"{other.out}: its audit is of {units[other.unit]} and this one of {units[unit]}; compare like with like"
        )
    found = {}
    for candidate in candidates:
        name = candidate.slide.id
        if unit == "slide" and name in other.samples:
            found[name] = other.samples[name]
        elif name in other.samples and alike(candidate.slide.plan.footprint, other.footprints[name]):
            sample = _matched(candidate, other.samples[name])
            if sample.patches:
                found[name] = sample
    if not found:
        raise ConfigError(
            f"{other.out}: this run has none of the patches audited there; compare runs on the same slides, with the "
            "same patch size, mpp and stride"
        )
    return dict(sorted(found.items()))


def compare_audits(
    here: Measurements, samples: Mapping[str, SlideSample], methods: Sequence[str], other: OtherAudit
) -> AgainstFacts:
    """Return how the two audits differ, patch by patch."""
    there = other.measurements(here.seed)
    rows_here, rows_there = _pairs(_places(samples, here), _places(other.samples, there))
    if not len(rows_here):
        raise ResultError(f"{other.out}: the two audits have no patches in common")
    mine, theirs = here.only(rows_here), there.only(rows_there)
    return AgainstFacts(
        out=other.out,
        model=other.model,
        audit_digest=other.digest,
        patches=len(rows_here),
        only_there=len(there) - len(rows_there),
        comparisons=[
            comparison_row(one.question, _between(one.measure), mine.compare(one.values, same.values), **one.keys)
            for one, same in _numbers(mine, theirs, methods, other.methods)
        ],
    )


def alike(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Return whether two footprints of patches, (height, width) in level-0 px, are the same except for rounding."""
    return all(abs(a - b) < FAR_PX for a, b in zip(first, second, strict=True))


def _matched(candidate: Candidate, sample: SlideSample) -> SlideSample:
    """Return the sample with this run's patch numbers."""
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


def _places(samples: Mapping[str, SlideSample], data: Measurements) -> dict[tuple[str, int, int], int]:
    """Return the row of each patch by slide and place."""
    known = {(name, n): yx for name, one in samples.items() for n, yx in zip(one.patches, one.yx, strict=True)}
    numbers = zip(data.slides.tolist(), data.patches.number.tolist(), strict=True)
    return {(slide, *known[slide, int(number)]): row for row, (slide, number) in enumerate(numbers)}


def _pairs(
    here: Mapping[tuple[str, int, int], int], there: Mapping[tuple[str, int, int], int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    both = [key for key in here if key in there]
    return np.array([here[key] for key in both], np.int64), np.array([there[key] for key in both], np.int64)


@dataclass(frozen=True)
class _Number:
    """A number [N] of the patches in an audit."""

    question: str
    measure: Measure
    values: Floats
    keys: Keys


def _between(measure: Measure) -> Measure:
    """Return a measure from both audits."""
    there = "{other_method}" if "{map}" in measure.of else measure.of
    return replace(measure, of=f"{measure.of}, here", against=f"{there}, there")


def _numbers(
    mine: Measurements, theirs: Measurements, here: Sequence[str], there: Sequence[str]
) -> list[tuple[_Number, _Number]]:
    """Return everything that both have; methods are matched by name, otherwise the first two."""
    common = [(name, name) for name in here if name in there] or [(here[0], there[0])]
    pairs = [(_of_map(mine, method, other), _of_map(theirs, other, other)) for method, other in common]
    pairs.append((_of_model(mine), _of_model(theirs)))
    return [(one, same) for first, second in pairs for one in first for same in second if _is_same(one, same)]


def _is_same(one: _Number, same: _Number) -> bool:
    return (one.question, one.measure, one.keys.get("change")) == (
        same.question,
        same.measure,
        same.keys.get("change"),
    )


def _of_map(data: Measurements, method: str, other: str) -> list[_Number]:
    """Return what is compared about the map of a method."""
    keys = Keys(method=method, other_method=other)
    found: list[_Number] = []
    curves = data.of(Faithfulness)
    if curves is not None and method in curves.main:
        main = Keys(method=method, other_method=other, baseline=MAIN)
        found.append(_Number("faithfulness", SCORE, score(curves.main[method]), main))
        probability = curves.main[method].probability_score(CURVE_FRACTIONS)
        if probability is not None:
            found.append(_Number("faithfulness", PROBABILITY_SCORE, probability, main))
    steps = data.of(Locality)
    if steps is not None and method in steps.worth:
        found.append(
            _Number(
                "locality", replace(WORTH, what="agreement with the gradient's prediction"), steps.worth[method], keys
            )
        )
    annotated = data.of(Plausibility)
    if annotated is not None and method in annotated.maps:
        found.append(_Number("plausibility", AUROC, annotated.maps[method].auroc, keys))
        found.append(_Number("plausibility", IOU, annotated.maps[method].iou, keys))
    gradients = data.of(Saturation)
    if gradients is not None and method in gradients.like_leaky:
        likeness = gradients.like_leaky[method]
        found.append(
            _Number(
                "saturation", replace(LIKE_LEAKY, what="similarity to the map with leaky gradients"), likeness, keys
            )
        )
    if (flips := data.of(BagFaithfulness)) is not None and method in flips.most:
        found.append(_Number("faithfulness", SRG, flips.srg(method), keys))
    bags = data.of(BagPlausibility)
    if bags is not None and method in bags.auroc:
        found.append(_Number("plausibility", AUROC, bags.auroc[method], keys))
    random = data.of(Sanity)
    if random is not None and method in random.draws:
        found.append(_Number("sanity", STAYING_MAPS, share_staying(random.draws[method]), keys))
    return found


def _of_model(data: Measurements) -> list[_Number]:
    """Return what is compared about the model, whatever the method."""
    found: list[_Number] = []
    changed = replace(CHANGED_ANSWERS, what="changed answers with {change}", of="the answer")
    if (stability := data.of(Stability)) is not None:
        changes = [change for change in CHANGES if change in stability.answers]
        found += [_Number("stability", changed, stability.answers[one].flips, Keys(change=one)) for one in changes]
    gradients = data.of(Saturation)
    if gradients is not None:
        saturated = replace(SATURATED, what="saturated probability", of="the model")
        found.append(_Number("saturation", saturated, gradients.saturated, Keys()))
    return found
