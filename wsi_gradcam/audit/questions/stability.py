"""Are answer and map stable under what differs between slides: noise, stain, JPEG, the patch grid?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import ALPHA, ENOUGH, HALF, Findings, Verdict, capitalised, interval_p, percent
from wsi_gradcam.audit.measurements import Comparison, Estimate, estimate, stored
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.schema import EXPENSIVE, Figure, IntervalsFigure, Measure, Words, change_title, method_title

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.batch import Batch
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.schema import Metrics

    Floats = NDArray[np.float64]

CHANGES = ("noise", "stain", "jpeg")
SHIFT = "shift"
REPEATS = 2
OFTEN = 0.05  # share of the slides: if more answers change, that is too many
CHANGE_WORDS = {
    "noise": "noise",
    "stain": "stain variation",
    "jpeg": "JPEG compression",
    SHIFT: "a shift of the patch grid",
}

CHANGED_ANSWERS = Measure("changed_answers", "changed answers", "share", "{change}", "equally strong noise")
LOGIT_CHANGE = Measure("logit_change", "change of the logit", "logits", "{change}")
MAP_CHANGE = Measure("map_change", "change of the map with {change}", "relative")
MAP_CHANGE_RELATIVE = Measure(
    "map_change_relative", "change of the map with {change}, relative to another patch's map", "ratio"
)
DISAGREEMENT = Measure(
    "disagreement", "disagreement of overlapping patches, relative to the map", "ratio", of="{label}"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerChange:
    """Changes of answers: [N] mean absolute change of the logit, and share of the repeats with another class."""

    logit_change: Floats
    flips: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Stability:
    """Changes of answers and maps, by change of the patch and method; see `measures.changes.Moves`.

    Attributes:
        answers: changes of answers, by change.
        noise_as_strong: the same for noise that changes pixels equally strongly.
        map_change: [N] relative change of the map, including that for a shift of the grid.
        other_patch: [N] relative change to the map of another patch.
    """

    answers: Mapping[str, AnswerChange] = stored("stability/{}", AnswerChange, (CHANGES,))
    noise_as_strong: Mapping[str, AnswerChange] = stored("stability/noise as strong as {}", AnswerChange, (CHANGES,))
    map_change: Mapping[str, Mapping[str, Floats]] = stored(
        "stability/{}/{}/map_change", keys=((*CHANGES, SHIFT), None)
    )
    other_patch: Mapping[str, Mapping[str, Floats]] = stored("stability/{}/{}/other_patch", keys=(CHANGES, None))


def measure(batch: Batch) -> Stability:
    """Measure changes of answers and maps with noise, stain, JPEG, and the patch grid."""
    from wsi_gradcam.audit.measures.changes import CHANGE_FUNCTIONS, as_strong_noise, moves

    cheap = [method for method in batch.methods if method not in EXPENSIVE]
    data = batch.data
    moving = partial(moves, batch.subject, data.rgb, batch.aim, repeats=REPEATS, seeds=data.seeds)
    answers: dict[str, AnswerChange] = {}
    control: dict[str, AnswerChange] = {}
    map_change: dict[str, dict[str, Floats]] = {}
    other_patch: dict[str, dict[str, Floats]] = {}
    for name in CHANGES:
        change = CHANGE_FUNCTIONS[name]
        moved = {method: moving(change, method) for method in cheap or ["gradcam"]}  # answers: for every method alike
        first = next(iter(moved))
        answers[name] = AnswerChange(logit_change=moved[first].logit_change, flips=moved[first].flips)
        map_change[name] = {method: moved[method].map_change for method in cheap}
        other_patch[name] = {method: _of_others(moved[method].other_patch, data.count) for method in cheap}
        if name != "noise":
            as_strong = moving(as_strong_noise(change), first)
            control[name] = AnswerChange(logit_change=as_strong.logit_change, flips=as_strong.flips)
    map_change[SHIFT] = _shift_changes(batch, cheap)
    return Stability(answers=answers, noise_as_strong=control, map_change=map_change, other_patch=other_patch)


def _of_others(changes: Floats, count: int) -> Floats:
    """Return changes to the map of another patch; NaN if there is only one patch and the others are its copies."""
    return changes if count > 1 else np.full_like(changes, np.nan)


def _shift_changes(batch: Batch, methods: list[str]) -> dict[str, Floats]:
    """Return the change of the map if the patch grid begins elsewhere; none if there is nothing around a patch."""
    from wsi_gradcam.audit.measures.changes import shift_change

    wide = batch.data.wide
    if wide is None:
        return {}
    offset = (wide.shape[1] - batch.data.rgb.shape[1], wide.shape[2] - batch.data.rgb.shape[2])
    target_of = partial(batch.subject.aim, target=batch.aim.target)
    return {method: shift_change(batch.subject, wide, target_of, offset, method) for method in methods}


def assess(findings: Findings, scope: Scope) -> None:
    """Add changes of maps and answers; a verdict on maps for each method and change, on answers for each change."""
    found = findings.measurements.of(Stability)
    if found is not None:
        for change in CHANGES:
            if change in found.answers:
                _add_answers(findings, change, found)
        for method in scope.methods:
            for change in (*CHANGES, SHIFT):
                if method in found.map_change.get(change, {}):
                    _add_maps(findings, method, change, found)
    for label, by_slide in scope.disagreement.items():
        slides = np.array(list(by_slide), object).astype(np.str_)
        mean = estimate(np.array(list(by_slide.values())), slides, None, findings.measurements.seed)
        findings.add(DISAGREEMENT, mean, label=label)


def _add_answers(findings: Findings, change: str, found: Stability) -> None:
    moved, control = found.answers[change], found.noise_as_strong.get(change)
    findings.estimate(CHANGED_ANSWERS, moved.flips, change=change)
    findings.estimate(LOGIT_CHANGE, moved.logit_change, change=change)
    if control is not None:
        flips = findings.compare(CHANGED_ANSWERS, moved.flips, control.flips, change=change, control="equal_noise")
        verdict = robust_to(CHANGE_WORDS[change], flips, "equally strong noise")
        is_finding = verdict.outcome == "fails"
        findings.conclude(change, verdict, flips.p, CHANGED_ANSWERS, is_finding=is_finding, change=change)


def _add_maps(findings: Findings, method: str, change: str, found: Stability) -> None:
    moved = found.map_change[change][method]
    findings.estimate(MAP_CHANGE, moved, method=method, change=change)
    if change == SHIFT:  # another part of the tissue is seen, so there is no limit to compare with
        return
    other = found.other_patch[change][method]
    share = np.divide(moved, other, out=np.full(len(moved), np.nan), where=np.isfinite(other) & (other > 0))
    relative = findings.estimate(MAP_CHANGE_RELATIVE, share, method=method, change=change)
    verdict, p = steady(CHANGE_WORDS[change], relative), interval_p(relative, HALF)
    findings.conclude(f"{method}, {change}", verdict, p, MAP_CHANGE_RELATIVE, method=method, change=change)


def robust_to(change: str, flips: Comparison, control: str) -> Verdict:
    """Return whether answers are stable under a change that occurs between slides, against a harmless one.

    Args:
        change, control: their words.
        flips: whether the predicted class changes (0 or 1 per patch), against the same with the control.
    """
    question = f"Is the answer stable under {change}?"
    evidence = {"changed answers": flips}
    if flips.p < ALPHA and flips.difference.value > 0:
        share = percent(flips.difference.value)
        words = f"{capitalised(change)} changes the answer for {share} more of the patches than {control} does."
        return Verdict(question, "fails", words, evidence)
    if flips.difference.patches < ENOUGH:
        return Verdict(question, "unclear", f"Too few patches ({flips.difference.patches}) to tell.", evidence)
    words = f"{capitalised(change)} changes the answer no more often than {control} does."
    return Verdict(question, "holds", words, evidence)


def steady(change: str, share: Estimate) -> Verdict:
    """Return whether a map is stable when the patch changes: its change, relative to the map of another patch.

    The limit is half of the difference from another patch: a map that changes more says little about this patch.
    """
    question = f"Is the map stable under {change}?"
    evidence = {"change, relative to another patch": share}
    moved = (
        f"{capitalised(change)} changes the map by {percent(share.value)} of its difference from another patch's map"
    )
    if share.high < HALF:
        return Verdict(question, "holds", f"{moved}.", evidence)
    if share.low > HALF:
        return Verdict(question, "fails", f"{moved}: it says little about this patch.", evidence)
    words = f"{capitalised(change)} changes the map by about half of its difference from another patch's map."
    return Verdict(question, "unclear", words, evidence)


def lasting(change: str, flips: Estimate) -> Verdict:
    """Return whether the answers for slides are stable under a change: the share that changes, against 1 in 20."""
    question = f"Is the slide's answer stable under {change}?"
    evidence, share = {"changed answers": flips}, percent(flips.value)
    if flips.low > OFTEN:
        return Verdict(
            question, "fails", f"{capitalised(change)} changes the answer of {share} of the slides.", evidence
        )
    if flips.high <= OFTEN and flips.patches >= ENOUGH:
        words = f"{capitalised(change)} changes the answer of {share} of the slides, within the limit of 1 in 20."
        return Verdict(question, "holds", words, evidence)
    words = f"{capitalised(change)} changes the answer of {share} of these slides; more slides are needed to tell."
    return Verdict(question, "unclear", words, evidence)


def keeps_order(ranks: Estimate) -> Verdict:
    """Return whether a map is stable when features change: its worst rank correlation to the original against 0.5."""
    question = "Is the map stable under noise, rounding and the loss of half of the patches?"
    evidence = {"rank correlation": ranks}
    told = f"At worst, its ranks correlate with those of the original map by {ranks.value:.2f}"
    if ranks.patches > 1 and ranks.low > HALF:
        return Verdict(question, "holds", f"{told}.", evidence)
    if ranks.patches > 1 and ranks.high < HALF:
        return Verdict(question, "fails", f"{told}: the map is not reproducible.", evidence)
    return Verdict(question, "unclear", f"{told}.", evidence)


def figures(metrics: Metrics) -> list[Figure]:
    """Return a figure of the changes of maps."""
    rows = [
        (f"{method_title(row.method or '')}: {change_title(row.change or '')}", row)
        for row in metrics.estimates
        if row.measure == MAP_CHANGE_RELATIVE.name
    ]
    axis = "change of the map; 1: as much as to another patch's map"
    return [IntervalsFigure(rows, axis, "How much maps change", reference=HALF, left=0.0)] if rows else []


def untested(data: Measurements, scope: Scope) -> list[tuple[str, str]]:
    """Return overlapping patches, if a run has none."""
    if scope.overlaps is not False:
        return []
    return [("where overlapping patches disagree", "the run's patches do not overlap; run explain with --overlap 0.5")]


QUESTION = Question(
    Words(
        title="Are answer and map stable under what differs between slides?",
        how="Each patch is changed slightly: camera noise, stronger or weaker stains, JPEG compression, and a shift of "
        "the patch grid. The change of the map is compared with the difference from another patch's map, which is as "
        "much as a map can reasonably change; the change of the answer is compared with that under noise that alters "
        "the pixels equally strongly.",
        not_proven="Other changes, such as another laboratory's staining, may have a larger effect.",
        source="Yeh 2019 (arXiv 1901.09392); Tellez 2018 (doi 10.1109/TMI.2018.2820199)",
    ),
    measure,
    assess,
    measures=(CHANGED_ANSWERS, LOGIT_CHANGE, MAP_CHANGE, MAP_CHANGE_RELATIVE, DISAGREEMENT),
    figures=figures,
    untested=untested,
)
