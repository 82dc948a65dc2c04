"""From numbers to estimates and verdicts: does the answer hang on a map, and does it look where an annotation says?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.estimates import Comparison, holm
from wsi_gradcam.audit.gathered import Gathered, Rows
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
from wsi_gradcam.audit.schema import CurveRow
from wsi_gradcam.audit.verdict import ALPHA, CHANCE, Verdict, faithful, plausible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RANDOM = "random"


def faithfulness(gathered: Gathered, methods: Sequence[str]) -> tuple[Rows, list[Judged]]:
    """Curves, areas and scores of all maps; a verdict for each method."""
    rows = Rows.of("faithfulness", gathered)
    judged = []
    for baseline in BASELINES:
        for name in gathered.names(f"faithfulness/{baseline}/", "/deletion"):
            _curves_of(rows, baseline, name, name in methods)
    scores = {name: score_of(gathered, MAIN, name) for name in gathered.names(f"faithfulness/{MAIN}/", "/deletion")}
    for method in methods:
        verdict = _is_faithful(gathered, method)
        for name, found in verdict.evidence.items():
            assert isinstance(found, Comparison)
            rows.keep_comparison(method, name, f"score, {MAIN}", "logits", found)
        p, found_something = _faithful_p(verdict)
        judged.append(Judged("faithfulness", method, verdict, p, found_something))
        for baseline in BASELINES[1:]:
            if f"faithfulness/{baseline}/{method}/deletion" in gathered:
                pair = (score_of(gathered, baseline, name) for name in (method, RANDOM))
                rows.compare(method, RANDOM, f"score, {baseline}", "logits", *pair)
    for other in methods[1:]:
        rows.compare(methods[0], other, f"score, {MAIN}", "logits", scores[methods[0]], scores[other])
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


def _curves_of(rows: Rows, baseline: str, name: str, interval: bool) -> None:
    start = f"faithfulness/{baseline}/{name}"
    gathered, fractions = rows.gathered, fractions_of(baseline)
    for way in ("deletion", "insertion"):
        axes = ("share of the pixels removed" if way == "deletion" else "share of the pixels kept", "logit")
        values = gathered[f"{start}/{way}"]
        rows.curve(name, f"{way}, {baseline}", axes, fractions, values, interval and baseline == MAIN)
        rows.estimate(name, f"{way} area, {baseline}", "logits", _height(values, fractions, baseline))
        if f"{start}/{way}_probability" in gathered:
            values = gathered[f"{start}/{way}_probability"]
            rows.curve(name, f"{way}, {baseline}, probability", (axes[0], "probability"), fractions, values, False)
            if baseline == MAIN:
                area = _height(values, fractions, baseline)
                rows.estimate(name, f"{way} area, {baseline}, probability", "probability", area)
    rows.estimate(name, f"score, {baseline}", "logits", score_of(gathered, baseline, name))


def _faithful_p(verdict: Verdict) -> tuple[float, bool]:
    """(p, whether something was found): for beating all controls the largest p, for losing to one that one's."""
    found = {name: one for name, one in verdict.evidence.items() if isinstance(one, Comparison)}
    adjusted = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
    lost = [adjusted[name] for name, one in found.items() if one.difference.value < 0 and adjusted[name] < ALPHA]
    if verdict.outcome == "fails":
        return (min(lost), True) if lost else (float("nan"), False)
    known = [one.p for one in found.values() if not np.isnan(one.p)]
    return (max(known) if known else float("nan")), True


def _describe_maps(rows: Rows, methods: Sequence[str]) -> None:
    """Shares of a map's values that are 0, tied, or no number; and how far maps are from those of the run."""
    gathered = rows.gathered
    for method in methods:
        maps = gathered[f"map/{method}"].reshape(len(gathered.slides), -1)
        broken = ~np.isfinite(maps).all(axis=1)
        tied = 1 - np.array([len(np.unique(map_)) for map_ in maps]) / maps.shape[1]
        rows.estimate(method, "values that are 0", "share", np.where(broken, np.nan, (maps == 0).mean(axis=1)))
        rows.estimate(method, "values that are tied", "share", np.where(broken, np.nan, tied))
        rows.estimate(method, "maps that are no numbers", "share", broken.astype(np.float64))
        rows.estimate(method, "difference from the run's map", "relative", gathered[f"base/{method}/differs"])


def _removal(rows: Rows) -> None:
    """Means over slides of their scores as patches are taken away."""
    of_slides = rows.gathered.of_slides
    for name in sorted(of_slides):
        _, kind, *rest = name.split("/")
        if kind == "removal":
            label, order = "/".join(rest[:-1]), rest[-1]
            mean = np.mean(list(of_slides[name].values()), axis=0)
            axes = ("share of the slide's patches removed", f"mean probability of {label}")
            rows.curves.append(
                CurveRow(
                    question="faithfulness",
                    of=label,
                    what=f"slide, {order}",
                    x_name=axes[0],
                    y_name=axes[1],
                    x=list(REMOVED_FRACTIONS),
                    y=mean.tolist(),
                )
            )


def plausibility(gathered: Gathered, methods: Sequence[str]) -> tuple[Rows, list[Judged]]:
    """How well maps meet the annotation; a verdict for each method."""
    rows = Rows.of("plausibility", gathered)
    judged: list[Judged] = []
    names = gathered.names("plausibility/", "/auroc")
    if not names:
        return rows, judged
    answered = np.isfinite(gathered[f"plausibility/{names[0]}/auroc"]) | np.isfinite(
        gathered[f"plausibility/{RANDOM}/auroc"]
    )
    rows.estimate(
        "chance", "annotated share of the patch", "share", np.where(answered, gathered["plausibility/chance"], np.nan)
    )
    for name in names:
        for kind in gathered.names(f"plausibility/{name}/"):
            rows.estimate(name, kind, "0 to 1", gathered[f"plausibility/{name}/{kind}"])
    for method in methods:
        area = gathered.estimate(gathered[f"plausibility/{method}/auroc"])
        if area.patches:
            judged.append(Judged("plausibility", method, plausible(area), interval_p(area, CHANCE), True))
        rows.compare(
            method,
            RANDOM,
            "auroc",
            "0 to 1",
            gathered[f"plausibility/{method}/auroc"],
            gathered[f"plausibility/{RANDOM}/auroc"],
        )
    return rows, judged
