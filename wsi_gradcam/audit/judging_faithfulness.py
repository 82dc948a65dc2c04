"""From numbers to estimates and verdicts: does the answer hang on a map, and does it look where an annotation says?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.estimates import Comparison, holm
from wsi_gradcam.audit.findings import Findings, Keys, Measure
from wsi_gradcam.audit.gathered import Gathered
from wsi_gradcam.audit.judged import Judged, interval_p
from wsi_gradcam.audit.measured import (
    BASELINES,
    CONTROLS,
    CURVE_FRACTIONS,
    MAIN,
    REMOVED_FRACTIONS,
    ROAD,
    ROAD_FRACTIONS,
)
from wsi_gradcam.audit.verdict import ALPHA, CHANCE, Verdict, faithful, plausible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RANDOM = "random"
CURVES = {
    "deletion": Measure("deletion", "deletion, {baseline}"),
    "insertion": Measure("insertion", "insertion, {baseline}"),
    "deletion_probability": Measure("deletion_probability", "deletion, {baseline}, probability"),
    "insertion_probability": Measure("insertion_probability", "insertion, {baseline}, probability"),
}
AREAS = {
    "deletion": Measure("deletion_area", "deletion area, {baseline}", "logits"),
    "insertion": Measure("insertion_area", "insertion area, {baseline}", "logits"),
    "deletion_probability": Measure(
        "deletion_area_probability", "deletion area, {baseline}, probability", "probability"
    ),
    "insertion_probability": Measure(
        "insertion_area_probability", "insertion area, {baseline}, probability", "probability"
    ),
}
SCORE = Measure("score", "score, {baseline}", "logits")
SCORE_PROBABILITY = Measure("score_probability", "score, {baseline}, probability", "probability")
ZERO_VALUES = Measure("zero_values", "values that are 0", "share")
TIED_VALUES = Measure("tied_values", "values that are tied", "share")
BROKEN_MAPS = Measure("broken_maps", "maps that are no numbers", "share")
RUN_DIFFERENCE = Measure("run_difference", "difference from the run's map", "relative")
SLIDE_SCORE = Measure("slide_score", "slide, {order}", of="{label}")
ANNOTATED_SHARE = Measure("annotated_share", "annotated share of the patch", "share", of="chance")
AUROC = Measure("auroc", "auroc", "0 to 1", evidence="area under the ROC curve")
PLAUSIBLE = {
    name: AUROC if name == "auroc" else Measure(name, name, "0 to 1")
    for name in ("pointing_game", "relevance_mass", "relevance_rank", "auroc", "iou")
}


def keys_of_map(name: str) -> Keys:
    """The key of a map: a control, or else a method."""
    return Keys(control=name) if name in CONTROLS else Keys(method=name)


def faithfulness(gathered: Gathered, methods: Sequence[str]) -> tuple[Findings, list[Judged]]:
    """Curves, areas and scores of all maps; a verdict for each method."""
    rows = Findings("faithfulness", gathered)
    judged = []
    for baseline in BASELINES:
        for name in gathered.names(f"faithfulness/{baseline}/", "/deletion"):
            _curves_of(rows, baseline, name, name in methods)
    scores = {name: score_of(gathered, MAIN, name) for name in gathered.names(f"faithfulness/{MAIN}/", "/deletion")}
    for method in methods:
        verdict = _is_faithful(gathered, method)
        for name, found in verdict.evidence.items():
            assert isinstance(found, Comparison)
            rows.add_comparison(SCORE, found, method=method, control=name, baseline=MAIN)
        p, found_something = _faithful_p(verdict)
        keys = Keys(method=method, baseline=MAIN)
        judged.append(Judged("faithfulness", method, verdict, p, found_something, (SCORE,), keys))
        for baseline in BASELINES[1:]:
            if f"faithfulness/{baseline}/{method}/deletion" in gathered:
                pair = (score_of(gathered, baseline, name) for name in (method, RANDOM))
                rows.compare(SCORE, *pair, method=method, control=RANDOM, baseline=baseline)
    for other in methods[1:]:
        rows.compare(SCORE, scores[methods[0]], scores[other], method=methods[0], other_method=other, baseline=MAIN)
    _describe_maps(rows, methods)
    _removal(rows)
    return rows, judged


def faithful_where_annotated(gathered: Gathered, methods: Sequence[str]) -> dict[str, tuple[Verdict, int]]:
    """(whether a map is faithful, of how many patches) on the patches of which the annotation tells, by method.

    Faithful and plausible are held against each other on the same patches, or they would speak of different tissue.
    """
    found = {}
    for method in methods:
        if f"plausibility/{method}/auroc" in gathered and f"faithfulness/{MAIN}/{method}/deletion" in gathered:
            some = gathered.only(np.isfinite(gathered[f"plausibility/{method}/auroc"]))
            if len(some.slides):
                found[method] = _is_faithful(some, method), len(some.slides)
    return found


def _is_faithful(gathered: Gathered, method: str) -> Verdict:
    names = gathered.names(f"faithfulness/{MAIN}/", "/deletion")
    controls = {name: score_of(gathered, MAIN, name) for name in CONTROLS if name in names}
    return faithful(score_of(gathered, MAIN, method), controls, gathered.slides, gathered.weights, gathered.seed)


def score_of(gathered: Gathered, baseline: str, name: str) -> Floats:
    """Half of insertion less deletion [N], in logits: as `Curves.score`, and `Curves.road` for ROAD."""
    parts = [np.asarray(gathered[f"faithfulness/{baseline}/{name}/{way}"]) for way in ("insertion", "deletion")]
    heights = [_height(part, fractions_of(baseline), baseline) for part in parts]
    return (heights[0] - heights[1]) / 2


def probability_score_of(gathered: Gathered, name: str) -> Floats | None:
    """As `score_of` with the first baseline, in probability; None where no class is explained."""
    names = [f"faithfulness/{MAIN}/{name}/{way}_probability" for way in ("insertion", "deletion")]
    if names[0] not in gathered:
        return None
    kept, gone = (_height(gathered[part], CURVE_FRACTIONS, MAIN) for part in names)
    return (kept - gone) / 2


def fractions_of(baseline: str) -> tuple[float, ...]:
    """Where the curves of a baseline were measured."""
    return ROAD_FRACTIONS if baseline == ROAD else CURVE_FRACTIONS


def _height(curves: Floats, fractions: tuple[float, ...], baseline: str) -> Floats:
    """The mean height [N] of curves [N, Q]."""
    if baseline == ROAD:
        mean: Floats = curves.mean(axis=1)
        return mean
    at = np.array(fractions)
    height: Floats = ((curves[:, 1:] + curves[:, :-1]) / 2 * np.diff(at)).sum(axis=1) / (at[-1] - at[0])
    return height


def _curves_of(rows: Findings, baseline: str, name: str, interval: bool) -> None:
    start = f"faithfulness/{baseline}/{name}"
    gathered, fractions = rows.gathered, fractions_of(baseline)
    keys = Keys(baseline=baseline, **keys_of_map(name))
    for way in ("deletion", "insertion"):
        axes = ("share of the pixels removed" if way == "deletion" else "share of the pixels kept", "logit")
        values = gathered[f"{start}/{way}"]
        rows.curve(CURVES[way], axes, fractions, values, interval and baseline == MAIN, **keys)
        rows.estimate(AREAS[way], _height(values, fractions, baseline), **keys)
        if f"{start}/{way}_probability" in gathered:
            way = f"{way}_probability"
            values = gathered[f"{start}/{way}"]
            rows.curve(CURVES[way], (axes[0], "probability"), fractions, values, False, **keys)
            if baseline == MAIN:
                rows.estimate(AREAS[way], _height(values, fractions, baseline), **keys)
    rows.estimate(SCORE, score_of(gathered, baseline, name), **keys)


def _faithful_p(verdict: Verdict) -> tuple[float, bool]:
    """(p, whether something was found): for beating all controls the largest p, for losing to one that one's."""
    found = {name: one for name, one in verdict.evidence.items() if isinstance(one, Comparison)}
    adjusted = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
    lost = [adjusted[name] for name, one in found.items() if one.difference.value < 0 and adjusted[name] < ALPHA]
    if verdict.outcome == "fails":
        return (min(lost), True) if lost else (float("nan"), False)
    known = [one.p for one in found.values() if not np.isnan(one.p)]
    return (max(known) if known else float("nan")), True


def _describe_maps(rows: Findings, methods: Sequence[str]) -> None:
    """Shares of a map's values that are 0, tied, or no number; and how far maps are from those of the run."""
    gathered = rows.gathered
    for method in methods:
        maps = gathered[f"map/{method}"].reshape(len(gathered.slides), -1)
        broken = ~np.isfinite(maps).all(axis=1)
        tied = 1 - np.array([len(np.unique(map_)) for map_ in maps]) / maps.shape[1]
        rows.estimate(ZERO_VALUES, np.where(broken, np.nan, (maps == 0).mean(axis=1)), method=method)
        rows.estimate(TIED_VALUES, np.where(broken, np.nan, tied), method=method)
        rows.estimate(BROKEN_MAPS, broken.astype(np.float64), method=method)
        rows.estimate(RUN_DIFFERENCE, gathered[f"base/{method}/differs"], method=method)


def _removal(rows: Findings) -> None:
    """Means over slides of their scores as patches are taken away."""
    of_slides = rows.gathered.of_slides
    for name in sorted(of_slides):
        _, kind, *rest = name.split("/")
        if kind == "removal":
            label, order = "/".join(rest[:-1]), rest[-1]
            mean = np.mean(list(of_slides[name].values()), axis=0)
            axes = ("share of the slide's patches removed", f"mean probability of {label}")
            rows.add_curve(SLIDE_SCORE, axes, REMOVED_FRACTIONS, mean.tolist(), label=label, order=order)


def plausibility(gathered: Gathered, methods: Sequence[str]) -> tuple[Findings, list[Judged]]:
    """How well maps meet the annotation; a verdict for each method."""
    rows = Findings("plausibility", gathered)
    judged: list[Judged] = []
    names = gathered.names("plausibility/", "/auroc")
    if not names:
        return rows, judged
    answered = np.isfinite(gathered[f"plausibility/{names[0]}/auroc"]) | np.isfinite(
        gathered[f"plausibility/{RANDOM}/auroc"]
    )
    rows.estimate(ANNOTATED_SHARE, np.where(answered, gathered["plausibility/chance"], np.nan))
    for name in names:
        for kind in gathered.names(f"plausibility/{name}/"):
            rows.estimate(PLAUSIBLE[kind], gathered[f"plausibility/{name}/{kind}"], **keys_of_map(name))
    for method in methods:
        area = gathered.estimate(gathered[f"plausibility/{method}/auroc"])
        if area.patches:
            p = interval_p(area, CHANCE)
            judged.append(Judged("plausibility", method, plausible(area), p, True, (AUROC,), Keys(method=method)))
        pair = (gathered[f"plausibility/{name}/auroc"] for name in (method, RANDOM))
        rows.compare(AUROC, *pair, method=method, control=RANDOM)
    return rows, judged
