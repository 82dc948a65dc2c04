"""Does the model's answer depend on what the map shows?

Deletion removes the most relevant pixels first, insertion restores them first (Petsiuk 2018, arXiv 1806.07421).
With linear imputation in place of the removed pixels, at fractions other than 0 and 1, it is ROAD (Rong 2022,
arXiv 2202.00449): inserting the top share q is removing the least relevant 1 - q first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from wsi_gradcam.audit.findings import ALPHA, ENOUGH, Findings, Verdict, capitalised
from wsi_gradcam.audit.measurements import Comparison, compare, holm, stored
from wsi_gradcam.audit.measures.removal import Curves, mean_height, slide_removal
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.schema import (
    CENTRE,
    CONSTANT,
    CONTROLS,
    EDGES,
    PROBABILITY,
    RANDOM,
    CurvesFigure,
    Figure,
    IntervalsFigure,
    Keys,
    Measure,
    Words,
    map_keys,
    row_title,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from wsi_gradcam.audit.batch import Batch
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.measures.removal import Replace
    from wsi_gradcam.audit.schema import CurveRow, Metrics

    Floats = NDArray[np.float64]

# Shares of a patch's pixels that are removed: 7 answers for each direction besides the two that all maps share. The
# area under a curve of 29 points differs little, and costs four times as much.
CURVE_FRACTIONS = tuple(i / 8 for i in range(9))
ROAD_FRACTIONS = (0.2, 0.5, 0.8)  # each costs an exact solution for up to 40,000 pixels
BLUR, BACKGROUND, MEAN, ROAD = "blur", "background", "mean", "road"
MAIN = MEAN  # replaces pixels on all patches and for all maps: a blurred patch may still show all of a small one
BASELINES = (MAIN, BLUR, BACKGROUND, ROAD)  # the others, additionally, on patches measured in depth
BASELINE_WORDS = {MEAN: "the patch's mean colour", BLUR: "a blurred copy of the patch", BACKGROUND: "the slide's glass"}
CONTROL_WORDS = {
    RANDOM: "noise",
    EDGES: "edges",
    CONSTANT: "random pixels",
    CENTRE: "centre first",
    PROBABILITY: "neighbouring probabilities",
}
REMOVED_FRACTIONS = tuple(i / 20 for i in range(19))  # shares of a slide's patches
REMOVAL_ORDERS = ("most", "least", "random")
LARGE = 0.8  # standard deviations: a large effect (Cohen)

Way = Literal["deletion", "insertion"]
WAYS: tuple[Way, ...] = ("deletion", "insertion")
CANNOT_FALL = (
    "The main baseline, the patch's mean colour, does not lower the answer: these deletion curves need not fall, and "
    "only their distance from the controls' curves speaks for the map."
)
CURVES = {way: Measure(way, f"{way}, {{baseline}}") for way in WAYS}
PROBABILITY_CURVES = {way: Measure(f"{way}_probability", f"{way}, {{baseline}}, probability") for way in WAYS}
AREAS = {way: Measure(f"{way}_area", f"{way} area, {{baseline}}", "logits") for way in WAYS}
PROBABILITY_AREAS = {
    way: Measure(f"{way}_area_probability", f"{way} area, {{baseline}}, probability", "probability") for way in WAYS
}
SCORE = Measure("score", "score, {baseline}", "logits")
PROBABILITY_SCORE = Measure("score_probability", "score, {baseline}, probability", "probability")
ZEROS = Measure("zero_values", "zero values", "share")
TIES = Measure("tied_values", "tied values", "share")
BROKEN_MAPS = Measure("broken_maps", "maps with NaN or infinity", "share")
RUN_DIFFERENCE = Measure("run_difference", "difference from the run's map", "relative")
EMPTY_LOGIT = Measure("empty_logit", "logit with every pixel replaced, {baseline}", "logits", of="model")
EMPTY_PROBABILITY = Measure(
    "empty_probability", "probability with every pixel replaced, {baseline}", "probability", of="model"
)
EMPTY_CHANGE = Measure(
    "empty_change", "logit with every pixel replaced, {baseline}", "logits", "model", "the patch as it is"
)
SLIDE_SCORE = Measure("slide_score", "slide, {order}", of="{label}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Faithfulness:
    """Removal curves by baseline and map, for the maps of methods and of controls."""

    curves: Mapping[str, Mapping[str, Curves]] = stored("faithfulness/{}/{}", Curves, (BASELINES, None))

    @property
    def main(self) -> Mapping[str, Curves]:
        """The curves of all maps on all patches."""
        return self.curves[MAIN]


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideRemoval:
    """A slide's score [Q] as its patches are removed, by class and order: see `slide_removal`."""

    scores: Mapping[str, Mapping[str, Floats]] = stored("slide/removal/{}/{}", keys=(None, REMOVAL_ORDERS))


def measure(batch: Batch) -> Faithfulness:
    """Measure curves of every map with the first baseline; in depth, also of methods and noise with the others."""
    from wsi_gradcam.audit.measures.removal import blurred, mean_colour, replace_by, replace_by_neighbours

    images, subject = batch.images, batch.subject
    every = batch.maps | batch.controls
    curves = {MAIN: _curves(batch, every, replace_by(images, mean_colour(images)), CURVE_FRACTIONS)}
    if batch.in_depth:
        some = batch.maps | {RANDOM: batch.controls[RANDOM]}
        glass = subject.colour(batch.data.background)
        grain = images.new_tensor(subject.model.std)[:, None, None].reciprocal()
        grain = grain * (0.01 * subject.model.transform.scale)
        curves[BLUR] = _curves(batch, some, replace_by(images, blurred(images)), CURVE_FRACTIONS)
        curves[BACKGROUND] = _curves(batch, some, replace_by(images, glass), CURVE_FRACTIONS)
        curves[ROAD] = _curves(batch, some, replace_by_neighbours(images, grain, batch.seed), ROAD_FRACTIONS)
    return Faithfulness(curves=curves)


def _curves(
    batch: Batch, maps: Mapping[str, Tensor], replace: Replace, fractions: tuple[float, ...]
) -> dict[str, Curves]:
    from wsi_gradcam.audit.measures.removal import removal_curves

    return removal_curves(batch.subject, batch.images, batch.aim, maps, replace, fractions, batch.seed)


def measure_slide(batch: Batch) -> SlideRemoval:
    """Measure the slide's score, the mean of its patches' probabilities, as relevant patches are removed."""
    fractions = np.array(REMOVED_FRACTIONS)
    return SlideRemoval(
        scores={
            label: slide_removal(relevance, scores, lambda left: float(left.mean()), fractions, seed=batch.seed)
            for label, (relevance, scores) in batch.data.slide_relevance.items()
        }
    )


def fractions_of(baseline: str) -> tuple[float, ...]:
    """Return the fractions at which the curves of a baseline are measured."""
    return ROAD_FRACTIONS if baseline == ROAD else CURVE_FRACTIONS


def area(curves: Floats, baseline: str = MAIN) -> Floats:
    """Return the mean height [N] of a baseline's curves [N, Q]; for ROAD, the mean over its fractions."""
    return curves.mean(axis=1) if baseline == ROAD else mean_height(curves, CURVE_FRACTIONS)


def score(curves: Curves, baseline: str = MAIN) -> Floats:
    """Return half of insertion minus deletion [N], in logits: the value of the map's order; 0 for chance."""
    return curves.road if baseline == ROAD else curves.score(CURVE_FRACTIONS)


def assess(findings: Findings, scope: Scope) -> None:
    """Add curves, areas and scores of all maps, and a verdict for each method."""
    data = findings.measurements
    if (found := data.of(Faithfulness)) is None:
        return
    for baseline in BASELINES:
        for name, curves in found.curves.get(baseline, {}).items():
            _add_curves(findings, baseline, name, curves, with_interval=name in scope.methods and baseline == MAIN)
    _add_empty(findings, found)
    for method in scope.methods:
        verdict = _verdict(data, found, method)
        for name, one in verdict.evidence.items():
            assert isinstance(one, Comparison)
            findings.add_comparison(SCORE, one, method=method, control=name, baseline=MAIN)
        p, is_finding = _p_of(verdict)
        findings.conclude(method, verdict, p, SCORE, is_finding=is_finding, method=method, baseline=MAIN)
        for baseline in BASELINES[1:]:
            if method in (some := found.curves.get(baseline, {})):
                pair = (score(some[name], baseline) for name in (method, RANDOM))
                findings.compare(SCORE, *pair, method=method, control=RANDOM, baseline=baseline)
    first, *others = scope.methods
    for other in others:
        pair = (score(found.main[name]) for name in (first, other))
        findings.compare(SCORE, *pair, method=first, other_method=other, baseline=MAIN)
    _describe_maps(findings, scope.methods)
    _add_slide_scores(findings)


def faithful_where(data: Measurements, method: str, rows: NDArray[np.bool_]) -> Verdict | None:
    """Return whether a method's map is faithful on some of the patches; None if it was not measured."""
    some = data.only(rows)
    found = some.of(Faithfulness)
    return None if found is None or not len(some) else _verdict(some, found, method)


def _verdict(data: Measurements, found: Faithfulness, method: str) -> Verdict:
    controls = {name: score(found.main[name]) for name in CONTROLS if name in found.main}
    verdict = faithful(score(found.main[method]), controls, data.slides, data.weights, data.seed)
    gains = {
        baseline: data.compare(score(some[method], baseline), score(some[RANDOM], baseline))
        for baseline, some in found.curves.items()
        if method in some and RANDOM in some
    }
    return with_baselines(verdict, _empty_changes(data, found), gains)


def _empty_changes(data: Measurements, found: Faithfulness) -> dict[str, Comparison]:
    """Return the change of the logit when every pixel is replaced, by baseline; ROAD has nothing to impute from."""
    whole = {name: found.curves[name][RANDOM] for name in BASELINE_WORDS if RANDOM in found.curves.get(name, {})}
    return {name: data.compare(one.deletion[:, -1], one.deletion[:, 0]) for name, one in whole.items()}


def with_baselines(verdict: Verdict, empty: Mapping[str, Comparison], gains: Mapping[str, Comparison]) -> Verdict:
    """Return the verdict of `faithful`, qualified by the baselines: curves cannot fall towards a picture of the class.

    If the main baseline does not lower the answer, one that does must confirm that the map beats noise.

    Args:
        empty: change of the logit when every pixel is replaced, by baseline.
        gains: score of the map against that of noise, by baseline.
    """
    if verdict.outcome != "holds" or not (MAIN in empty and empty[MAIN].difference.patches) or _lowers(empty[MAIN]):
        return verdict
    lowering = [name for name in BASELINE_WORDS if name in empty and name in gains and _lowers(empty[name])]
    sure = [name for name in lowering if gains[name].p < ALPHA and gains[name].difference.value > 0]
    words = (
        f"{verdict.words} {capitalised(BASELINE_WORDS[MAIN])}, which replaces them, does not itself lower the answer"
    )
    if sure:
        return replace(verdict, words=f"{words}; with {BASELINE_WORDS[sure[0]]}, which does, the map also beats noise.")
    if lowering:
        doubt = f"{words}; with {BASELINE_WORDS[lowering[0]]}, which does, the map is not distinguished from noise."
        return replace(verdict, outcome="unclear", words=doubt)
    return replace(verdict, words=f"{words}, nor does any other baseline: the curves cannot fall.")


def _lowers(change: Comparison) -> bool:
    return change.difference.high < 0


def faithful(
    score: ArrayLike,
    controls: Mapping[str, ArrayLike],
    slides: ArrayLike,
    weights: ArrayLike | None = None,
    seed: int = 0,
    chance: str = RANDOM,
) -> Verdict:
    """Return whether the answer depends on what the map marks: its scores [N] against each control's.

    It holds if the map beats every control, each at the 5% level on its own, because all are required. It fails if a
    control beats the map (corrected for their number), or if enough patches show no difference from `chance`: an
    interval that contains 0, and no large effect (Cohen's d of 0.8). Whatever too few slides leave uncertain is
    unclear.
    """
    question = "Does the model's answer depend on what the map shows?"
    found = {name: compare(score, other, slides, weights, seed) for name, other in controls.items()}
    adjusted = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
    beaten = [name for name, one in found.items() if one.p < ALPHA and one.difference.value > 0]
    lost = [name for name, one in found.items() if adjusted[name] < ALPHA and one.difference.value < 0]
    others = [name for name in found if name not in beaten]
    if not others:
        return Verdict(
            question,
            "holds",
            f"Replacing pixels in the order of the map changes the answer more than any control: {_controls(beaten)}.",
            found,
        )
    if lost:
        words = (
            f"The order of a control that ignores the model changes the answer more than the map: {_controls(lost)}."
        )
        return Verdict(question, "fails", words, found)
    if chance in others and _is_no_better(found[chance]):
        return Verdict(question, "fails", "The order of the map changes the answer no more than a random order.", found)
    words = f"These patches do not distinguish the map from some controls: {_controls(others)}."
    return Verdict(question, "unclear", words, found)


def _controls(names: Sequence[str]) -> str:
    return ", ".join(CONTROL_WORDS.get(name, name) for name in names)


def _is_no_better(found: Comparison) -> bool:
    """Return whether enough patches show that there is no difference, or a small one."""
    interval = found.difference
    return interval.patches >= ENOUGH and interval.low <= 0 and interval.high <= LARGE * found.spread


def _p_of(verdict: Verdict) -> tuple[float, bool]:
    """Return (p, whether something was found): for beating all controls, the largest p; for losing to one, its p."""
    found = {name: one for name, one in verdict.evidence.items() if isinstance(one, Comparison)}
    adjusted = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
    lost = [adjusted[name] for name, one in found.items() if one.difference.value < 0 and adjusted[name] < ALPHA]
    if verdict.outcome == "fails":
        return (min(lost), True) if lost else (float("nan"), False)
    known = [one.p for one in found.values() if not np.isnan(one.p)]
    return (max(known) if known else float("nan")), True


def _add_curves(findings: Findings, baseline: str, name: str, curves: Curves, with_interval: bool) -> None:
    keys = Keys(baseline=baseline, **map_keys(name))
    fractions = fractions_of(baseline)
    parts = ((curves.deletion, curves.deletion_probability), (curves.insertion, curves.insertion_probability))
    for way, (logits, probabilities) in zip(WAYS, parts, strict=True):
        x_name = "share of the pixels removed" if way == "deletion" else "share of the pixels kept"
        findings.curve(CURVES[way], (x_name, "logit"), fractions, logits, with_interval, **keys)
        findings.estimate(AREAS[way], area(logits, baseline), **keys)
        if probabilities is not None:
            axes = (x_name, "probability")
            findings.curve(PROBABILITY_CURVES[way], axes, fractions, probabilities, False, **keys)
            if baseline == MAIN:
                findings.estimate(PROBABILITY_AREAS[way], area(probabilities), **keys)
    findings.estimate(SCORE, score(curves, baseline), **keys)


def _add_empty(findings: Findings, found: Faithfulness) -> None:
    """Add the model's answers to fully replaced patches, by baseline."""
    for baseline, change in _empty_changes(findings.measurements, found).items():
        curves = found.curves[baseline][RANDOM]
        findings.estimate(EMPTY_LOGIT, curves.deletion[:, -1], baseline=baseline)
        if curves.deletion_probability is not None:
            findings.estimate(EMPTY_PROBABILITY, curves.deletion_probability[:, -1], baseline=baseline)
        findings.add_comparison(EMPTY_CHANGE, change, baseline=baseline)


def _describe_maps(findings: Findings, methods: Sequence[str]) -> None:
    """Add the shares of a map's values that are 0, tied or not finite, and how far maps are from those of the run."""
    patches = findings.measurements.patches
    for method in methods:
        maps = patches.maps[method].reshape(len(patches.number), -1)
        broken: NDArray[np.bool_] = ~np.logical_and.reduce(np.isfinite(maps), axis=1)
        tied: Floats = 1 - np.array([len(np.unique(map_)) for map_ in maps]) / maps.shape[1]
        findings.estimate(ZEROS, np.where(broken, np.nan, np.mean(maps == 0, axis=1)), method=method)
        findings.estimate(TIES, np.where(broken, np.nan, tied), method=method)
        findings.estimate(BROKEN_MAPS, broken.astype(np.float64), method=method)
        findings.estimate(RUN_DIFFERENCE, patches.difference[method], method=method)


def _add_slide_scores(findings: Findings) -> None:
    """Add the means over slides of their scores as patches are removed."""
    of_slides = findings.measurements.of_slides(SlideRemoval).values()
    for label in sorted({label for one in of_slides for label in one.scores}):
        axes = ("share of the slide's patches removed", f"mean probability of {label}")
        for order in sorted(REMOVAL_ORDERS):
            mean = np.mean([one.scores[label][order] for one in of_slides if label in one.scores], axis=0)
            findings.add_curve(SLIDE_SCORE, axes, REMOVED_FRACTIONS, mean.tolist(), label=label, order=order)


def figures(metrics: Metrics) -> list[Figure]:
    """Return curves and scores of all maps and controls, and the scores of slides."""
    curves = [row for row in metrics.curves if any(y is not None for y in row.y)]
    found: list[Figure] = []
    for measures, name in ((CURVES, "logits"), (PROBABILITY_CURVES, "probabilities")):
        instead = _instead(metrics)
        for baseline in (MAIN, *instead):
            note = f", with {BASELINE_WORDS[baseline]}" if instead else ""
            panels = [
                (
                    f"{way}{note}: {'lower' if way == 'deletion' else 'higher'} is better",
                    [
                        (row_title(row), row)
                        for row in curves
                        if row.measure == measures[way].name and row.baseline == baseline
                    ],
                )
                for way in WAYS
            ]
            if any(rows for _, rows in panels):
                description = f"Mean curves of deletion and insertion{note}, in {name}, all maps and controls"
                found.append(CurvesFigure(panels, description))
    scores = [row for row in metrics.estimates if row.measure == SCORE.name and row.baseline == MAIN]
    lines = [(row_title(row), row) for row in sorted(scores, key=lambda row: row.control is not None)]
    if lines:
        axis = "(insertion − deletion) / 2, in logits"
        found.append(IntervalsFigure(lines, axis, "Scores of all maps and controls", reference=0.0))
    return found + _slide_figures([row for row in curves if row.measure == SLIDE_SCORE.name])


def _instead(metrics: Metrics) -> list[str]:
    """Return the first baseline that lowers the answer, if the main one does not."""
    lowers = _lowering(metrics)
    return [] if lowers.get(MAIN, True) else [name for name in BASELINE_WORDS if lowers.get(name)][:1]


def _lowering(metrics: Metrics) -> dict[str | None, bool]:
    """Return whether a baseline lowers the answer when it replaces every pixel, by baseline."""
    rows = [row for row in metrics.comparisons if row.measure == EMPTY_CHANGE.name and row.patches]
    return {row.baseline: row.high is not None and row.high < 0 for row in rows}


def remarks(metrics: Metrics) -> list[str]:
    """Return what the model answers to fully replaced patches, and what follows for the curves."""
    for measures, scale in ((PROBABILITY_CURVES, "probability of the explained class"), (CURVES, "logit")):
        ends = {
            row.baseline: (row.y[0], row.y[-1])
            for row in metrics.curves
            if row.measure == measures["deletion"].name and row.control == RANDOM and row.baseline in BASELINE_WORDS
        }
        parts = [
            f"from {ends[name][0]:.2f} to {ends[name][1]:.2f} with {words}"
            for name, words in BASELINE_WORDS.items()
            if None not in ends.get(name, (None,))
        ]
        if parts:
            found = [f"Replacing every pixel changes the mean {scale} {', '.join(parts)}."]
            return found if _lowering(metrics).get(MAIN, True) else [*found, CANNOT_FALL]
    return []


def _slide_figures(curves: Sequence[CurveRow]) -> list[Figure]:
    labels = list(dict.fromkeys(row.label for row in curves))[:3]
    if not labels:
        return []
    panels = [(f"slide score: {label}", [_by_order(row) for row in curves if row.label == label]) for label in labels]
    description = "Scores of slides as patches are removed, most or least relevant first, or at random"
    return [CurvesFigure(panels, description)]


def _by_order(row: CurveRow) -> tuple[str, CurveRow]:
    """Return a slide's curve, named by the order in which patches are removed; the random one is a control."""
    if row.order == "random":
        return "at random (control)", row.model_copy(update={"control": RANDOM})
    return f"{row.order} relevant first", row


QUESTION = Question(
    Words(
        title="Does the answer depend on what the map shows?",
        how="Pixels are replaced in the order of the map, the hottest first (deletion), or restored in that order "
        "(insertion). If the map is faithful, the answer moves away from the class early in deletion and returns early "
        "in insertion. The same is done in the order of controls that know nothing of the model: noise, edges of the "
        "image, the centre first, pixels in random order, and the probabilities of the neighbouring patches. What "
        "counts is insertion minus deletion, because an order that tears the image apart lowers both curves. The map "
        "must beat every control. Where both curves end depends on the baseline, the picture that replaces the pixels: "
        "a model may call that picture by the class, too, so its own answer is stated below.",
        not_proven="No slide contains images with replaced pixels, so several baselines are compared. A map that is "
        "faithful to a bad model is still faithful.",
        source="Petsiuk 2018 (arXiv 1806.07421); ROAD: Rong 2022 (arXiv 2202.00449)",
    ),
    measure,
    assess,
    measures=(
        *(one for some in (CURVES, PROBABILITY_CURVES, AREAS, PROBABILITY_AREAS) for one in some.values()),
        *(SCORE, PROBABILITY_SCORE, ZEROS, TIES, BROKEN_MAPS, RUN_DIFFERENCE, SLIDE_SCORE),
        *(EMPTY_LOGIT, EMPTY_PROBABILITY, EMPTY_CHANGE),
    ),
    figures=figures,
    remarks=remarks,
    measure_slide=measure_slide,
)
