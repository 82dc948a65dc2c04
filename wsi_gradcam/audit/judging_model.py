"""From numbers to estimates and verdicts, for what is asked of the model: locality, saturation, shortcuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.estimates import Estimate, across, estimate
from wsi_gradcam.audit.gathered import Gathered, Rows
from wsi_gradcam.audit.judged import Judged, interval_p
from wsi_gradcam.audit.measured import INTEGRATED, STEPS
from wsi_gradcam.audit.measures.suspects import in_words
from wsi_gradcam.audit.schema import StrataRow
from wsi_gradcam.audit.verdict import MOST, free_of, not_saturated, promises_kept, quiet_on_glass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

ATTRIBUTION, SHARE_OF_AREA = "positive attribution on it", "its share of the area"  # of a suspect
GLASS_CALLED = "patches of bare glass called so"
LEAKY = "likeness to the map with a leaky backward"


def locality(gathered: Gathered, methods: Sequence[str]) -> tuple[Rows, list[Judged]]:
    """What finite steps do against what the gradient promises; a verdict for each method."""
    rows = Rows.of("locality", gathered)
    judged = []
    for method in methods:
        start = f"locality/{method}"
        if f"{start}/worth" not in gathered:
            continue
        worth = rows.estimate(method, "worth of the promise", "-1 to 1", gathered[f"{start}/worth"])
        judged.append(Judged("locality", method, promises_kept(worth), interval_p(worth, 0.0), True))
        rows.estimate(method, "reach of the promise", "of the patch's contrast", gathered[f"{start}/reach"])
        for part in ("promised", "actual"):
            axes = ("step along the map", "change of the logit")
            rows.curve(method, part, axes, STEPS, gathered[f"{start}/{part}"], True)
        rows.estimate(method, "infidelity, best scaled", "logits²", gathered[f"{start}/infidelity"])
        rows.estimate(method, "infidelity of promising nothing", "logits²", gathered[f"{start}/moved"])
        if f"{start}/like_integrated_gradients" in gathered:
            likeness = gathered[f"{start}/like_integrated_gradients"]
            rows.estimate(method, "likeness to Integrated Gradients", "rank correlation", likeness)
    if f"locality/{INTEGRATED}/completeness_gap" in gathered:
        gap = np.abs(gathered[f"locality/{INTEGRATED}/completeness_gap"])
        rows.estimate(INTEGRATED, "gap of completeness", "logits", gap)
        change = np.abs(gathered[f"locality/{INTEGRATED}/score_change"])
        rows.estimate(INTEGRATED, "what its values should sum to", "logits", change)
    return rows, judged


def saturation(gathered: Gathered, methods: Sequence[str]) -> tuple[Rows, list[Judged]]:
    """Where gradients are blind; one verdict."""
    rows = Rows.of("saturation", gathered)
    if "saturation/saturated" not in gathered:
        return rows, []
    saturated = rows.estimate(
        "model", "patches with a saturated probability", "share", gathered["saturation/saturated"]
    )
    silent = rows.estimate("model", "patches without any gradient", "share", gathered["saturation/silent"])
    ratio = gathered["saturation/gradient_ratio"]
    rows.estimate("model", "gradient of the probability over that of the logit", "ratio", ratio)
    rows.estimate("model", "dead channels of a patch", "share", gathered["saturation/dead_share"])
    for method in methods:
        if f"saturation/{method}/like_leaky" in gathered:
            likeness = gathered[f"saturation/{method}/like_leaky"]
            rows.estimate(method, LEAKY, "rank correlation", likeness)
    worse = max((saturated, silent), key=lambda found: found.value)
    verdict = not_saturated(saturated, silent)
    return rows, [Judged("saturation", "model", verdict, interval_p(worse, MOST), True)]


def shortcuts(
    gathered: Gathered, methods: Sequence[str], classes: Sequence[str], positive: str
) -> tuple[Rows, list[Judged]]:
    """What hiding suspects does, and what bare glass is called; verdicts on suspects, and on the class `positive`."""
    rows = Rows.of("shortcuts", gathered)
    judged = []
    for suspect in gathered.names("shortcuts/", "/share"):
        start = f"shortcuts/{suspect}"
        shown = (gathered[f"{start}/share"] > 0).astype(np.float64)
        rows.estimate(
            suspect, "patches that show it", "share", np.where(np.isnan(gathered[f"{start}/share"]), np.nan, shown)
        )
        area = gathered.only(shown == 1)
        rows.keep(suspect, SHARE_OF_AREA, "share", area.estimate(area[f"{start}/area"]))
        for method in methods:
            mass = rows.estimate(f"{suspect}, {method}", ATTRIBUTION, "share", gathered[f"{start}/{method}/mass"])
            if mass.patches:
                rows.compare(
                    f"{suspect}, {method}",
                    SHARE_OF_AREA,
                    ATTRIBUTION,
                    "share",
                    gathered[f"{start}/{method}/mass"],
                    gathered[f"{start}/area"],
                )
        if f"{start}/size" not in gathered:
            continue
        pairs = {"size": ("change of the logit", "logits"), "flips": ("changed answers", "share")}
        drop, flips = (
            rows.compare(
                suspect,
                "as much elsewhere",
                what,
                unit,
                gathered[f"{start}/{kind}"],
                gathered[f"{start}/control_{kind}"],
            )
            for kind, (what, unit) in pairs.items()
        )
        if drop.difference.patches:
            verdict = free_of(in_words(suspect), drop, flips)
            judged.append(Judged("shortcuts", suspect, verdict, flips.p, verdict.outcome == "fails"))
    return rows, judged + _glass(rows, classes, positive)


def _glass(rows: Rows, classes: Sequence[str], positive: str) -> list[Judged]:
    """What the slides' bare glass is called, in the mean over slides."""
    by_slide = rows.gathered.of_slides.get("slide/glass_called", {})
    if not by_slide:
        return []
    names = list(by_slide)
    judged = []
    for number, label in enumerate(classes):
        values = np.array([by_slide[name][number] for name in names], np.float64)
        called = _of_slides(values, names, rows.gathered.seed)
        rows.keep(f"glass, {label}", GLASS_CALLED, "share", called)
        if label == positive:
            judged.append(Judged("shortcuts", "glass alone", quiet_on_glass(label, called), float("nan"), True))
    return judged


def _of_slides(values: NDArray[np.float64], names: Sequence[str], seed: int) -> Estimate:
    return estimate(values, np.array(names, object).astype(np.str_), None, seed)


def strata(
    gathered: Gathered, numbers: Mapping[str, NDArray[np.float64]], groups: Mapping[str, Mapping[str, str]]
) -> list[StrataRow]:
    """Whether numbers of the patches differ by what is told of their slides.

    Args:
        numbers: [N] by (method, measure) as "METHOD/MEASURE".
        groups: what is told, such as "site", by slide id; slides of which nothing is told are left out.
    """
    found = []
    for by, of_slide in groups.items():
        group = np.array([of_slide.get(slide, "") for slide in gathered.slides.tolist()])
        known = group != ""
        names = sorted(set(group[known].tolist()))
        if len(names) < 2:
            continue
        for key, values in numbers.items():
            of, _, what = key.partition("/")
            means = {name: gathered.only(group == name).estimate(values[group == name]).value for name in names}
            p = across(values[known], group[known], gathered.slides[known])
            found.append(StrataRow(by=by, of=of, what=what, groups=means, p=p))
    return found
