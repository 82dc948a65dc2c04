"""From numbers to estimates and verdicts, for what is asked of the model: locality, saturation, shortcuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.estimates import Estimate, across, estimate
from wsi_gradcam.audit.findings import Findings, Keys, Measure
from wsi_gradcam.audit.judged import Judged, interval_p
from wsi_gradcam.audit.measured import INTEGRATED, STEPS
from wsi_gradcam.audit.measures.suspects import in_words
from wsi_gradcam.audit.schema import StrataRow
from wsi_gradcam.audit.verdict import MOST, free_of, not_saturated, promises_kept, quiet_on_glass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.audit.gathered import Gathered

WORTH = Measure("worth", "worth of the promise", "-1 to 1")
REACH = Measure("reach", "reach of the promise", "of the patch's contrast")
STEPS_ALONG = {name: Measure(name, name) for name in ("promised", "actual")}
INFIDELITY = Measure("infidelity", "infidelity, best scaled", "logits²")
NO_PROMISE = Measure("infidelity_of_nothing", "infidelity of promising nothing", "logits²")
LIKE_INTEGRATED = Measure("like_integrated_gradients", "likeness to Integrated Gradients", "rank correlation")
COMPLETENESS_GAP = Measure("completeness_gap", "gap of completeness", "logits")
COMPLETENESS_SUM = Measure("completeness_sum", "what its values should sum to", "logits")
SATURATED = Measure("saturated", "patches with a saturated probability", "share", of="model")
SILENT = Measure("silent", "patches without any gradient", "share", of="model")
GRADIENT_RATIO = Measure("gradient_ratio", "gradient of the probability over that of the logit", "ratio", of="model")
DEAD_CHANNELS = Measure("dead_channels", "dead channels of a patch", "share", of="model")
LEAKY = Measure("like_leaky", "likeness to the map with a leaky backward", "rank correlation")
SHOWN = Measure("suspect_shown", "patches that show it", "share", of="{suspect}")
AREA = Measure("suspect_area", "its share of the area", "share", of="{suspect}")
ATTRIBUTION = Measure(
    "attribution_on_suspect", "positive attribution on it", "share", of="{suspect}, {method}", against=AREA.what
)
HIDDEN = {
    "size": Measure("logit_change", "change of the logit", "logits", "{suspect}", "as much elsewhere"),
    "flips": Measure("changed_answers", "changed answers", "share", "{suspect}", "as much elsewhere"),
}
GLASS_CALLED = Measure(
    "glass_called",
    "patches of bare glass called so",
    "share",
    of="glass, {label}",
    evidence="patches of bare glass called {label}",
)


def locality(gathered: Gathered, methods: Sequence[str]) -> tuple[Findings, list[Judged]]:
    """What finite steps do against what the gradient promises; a verdict for each method."""
    rows = Findings("locality", gathered)
    judged = []
    for method in methods:
        start = f"locality/{method}"
        if f"{start}/worth" not in gathered:
            continue
        keys = Keys(method=method)
        worth = rows.estimate(WORTH, gathered[f"{start}/worth"], **keys)
        judged.append(Judged("locality", method, promises_kept(worth), interval_p(worth, 0.0), True, (WORTH,), keys))
        rows.estimate(REACH, gathered[f"{start}/reach"], **keys)
        for part, measure in STEPS_ALONG.items():
            axes = ("step along the map", "change of the logit")
            rows.curve(measure, axes, STEPS, gathered[f"{start}/{part}"], True, **keys)
        rows.estimate(INFIDELITY, gathered[f"{start}/infidelity"], **keys)
        rows.estimate(NO_PROMISE, gathered[f"{start}/moved"], **keys)
        if f"{start}/like_integrated_gradients" in gathered:
            rows.estimate(LIKE_INTEGRATED, gathered[f"{start}/like_integrated_gradients"], **keys)
    if f"locality/{INTEGRATED}/completeness_gap" in gathered:
        gap = np.abs(gathered[f"locality/{INTEGRATED}/completeness_gap"])
        rows.estimate(COMPLETENESS_GAP, gap, method=INTEGRATED)
        change = np.abs(gathered[f"locality/{INTEGRATED}/score_change"])
        rows.estimate(COMPLETENESS_SUM, change, method=INTEGRATED)
    return rows, judged


def saturation(gathered: Gathered, methods: Sequence[str]) -> tuple[Findings, list[Judged]]:
    """Where gradients are blind; one verdict."""
    rows = Findings("saturation", gathered)
    if "saturation/saturated" not in gathered:
        return rows, []
    saturated = rows.estimate(SATURATED, gathered["saturation/saturated"])
    silent = rows.estimate(SILENT, gathered["saturation/silent"])
    rows.estimate(GRADIENT_RATIO, gathered["saturation/gradient_ratio"])
    rows.estimate(DEAD_CHANNELS, gathered["saturation/dead_share"])
    for method in methods:
        if f"saturation/{method}/like_leaky" in gathered:
            rows.estimate(LEAKY, gathered[f"saturation/{method}/like_leaky"], method=method)
    worse = max((saturated, silent), key=lambda found: found.value)
    verdict = not_saturated(saturated, silent)
    return rows, [Judged("saturation", "model", verdict, interval_p(worse, MOST), True, (SATURATED, SILENT))]


def shortcuts(
    gathered: Gathered, methods: Sequence[str], classes: Sequence[str], positive: str
) -> tuple[Findings, list[Judged]]:
    """What hiding suspects does, and what bare glass is called; verdicts on suspects, and on the class `positive`."""
    rows = Findings("shortcuts", gathered)
    judged = []
    for suspect in gathered.names("shortcuts/", "/share"):
        start = f"shortcuts/{suspect}"
        shown = (gathered[f"{start}/share"] > 0).astype(np.float64)
        known = np.where(np.isnan(gathered[f"{start}/share"]), np.nan, shown)
        rows.estimate(SHOWN, known, suspect=suspect)
        area = gathered.only(shown == 1)
        rows.add(AREA, area.estimate(area[f"{start}/area"]), suspect=suspect)
        for method in methods:
            on_it = gathered[f"{start}/{method}/mass"]
            mass = rows.estimate(ATTRIBUTION, on_it, suspect=suspect, method=method)
            if mass.patches:
                chance = gathered[f"{start}/area"]
                rows.compare(ATTRIBUTION, on_it, chance, suspect=suspect, method=method, control="share_of_area")
        if f"{start}/size" not in gathered:
            continue
        drop, flips = (
            rows.compare(
                measure,
                gathered[f"{start}/{kind}"],
                gathered[f"{start}/control_{kind}"],
                suspect=suspect,
                control="equal_area",
            )
            for kind, measure in HIDDEN.items()
        )
        if drop.difference.patches:
            verdict = free_of(in_words(suspect), drop, flips)
            found, measures = verdict.outcome == "fails", tuple(HIDDEN.values())
            judged.append(Judged("shortcuts", suspect, verdict, flips.p, found, measures, Keys(suspect=suspect)))
    return rows, judged + _glass(rows, classes, positive)


def _glass(rows: Findings, classes: Sequence[str], positive: str) -> list[Judged]:
    """What the slides' bare glass is called, in the mean over slides."""
    by_slide = rows.gathered.of_slides.get("slide/glass_called", {})
    if not by_slide:
        return []
    names = list(by_slide)
    judged = []
    for number, label in enumerate(classes):
        values = np.array([by_slide[name][number] for name in names], np.float64)
        called = _of_slides(values, names, rows.gathered.seed)
        rows.add(GLASS_CALLED, called, label=label)
        if label == positive:
            verdict, keys = quiet_on_glass(label, called), Keys(label=label)
            judged.append(Judged("shortcuts", "glass alone", verdict, float("nan"), True, (GLASS_CALLED,), keys))
    return judged


def _of_slides(values: NDArray[np.float64], names: Sequence[str], seed: int) -> Estimate:
    return estimate(values, np.array(names, object).astype(np.str_), None, seed)


def strata(
    gathered: Gathered,
    numbers: Sequence[tuple[str, Measure, Keys, NDArray[np.float64]]],
    groups: Mapping[str, Mapping[str, str]],
) -> list[StrataRow]:
    """Whether numbers of the patches differ by what is told of their slides.

    Args:
        numbers: [N] each, with their question, measure and keys.
        groups: what is told, such as "site", by slide id; slides of which nothing is told are left out.
    """
    found = []
    for by, of_slide in groups.items():
        group = np.array([of_slide.get(slide, "") for slide in gathered.slides.tolist()])
        known = group != ""
        names = sorted(set(group[known].tolist()))
        if len(names) < 2:
            continue
        for question, measure, keys, values in numbers:
            means = {name: gathered.only(group == name).estimate(values[group == name]).value for name in names}
            p = across(values[known], group[known], gathered.slides[known])
            found.append(
                StrataRow(
                    question=question,
                    measure=measure.name,
                    **keys,
                    **measure.texts(keys),
                    by=by,
                    groups=means,
                    p=p,
                )
            )
    return found
