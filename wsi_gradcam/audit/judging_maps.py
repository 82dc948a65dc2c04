"""From numbers to estimates and verdicts: do maps follow what was learned, and do they survive what slides vary by?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.estimates import Estimate, estimate
from wsi_gradcam.audit.findings import Findings, Keys, Measure
from wsi_gradcam.audit.judged import Judged, interval_p
from wsi_gradcam.audit.measured import CHANGES, COPIES, ORDERS, STRONG_NOISE
from wsi_gradcam.audit.verdict import MOST, STAYING, Verdict, depends_on_weights, has_learned, robust_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.audit.gathered import Gathered

    Floats = NDArray[np.float64]

STAYING_MAPS = Measure("staying_maps", "maps that stay with random weights", "share")
ANSWER_SPREAD = Measure("answer_spread", "spread of the answers", "logits", of="model")
RANDOM_ANSWER_SPREAD = Measure(
    "random_answer_spread",
    "spread of the answers",
    "logits",
    of=COPIES,
    evidence="spread of the answers with random weights",
)
RANDOMISED = {
    name: Measure(name, f"{name}, {{order}}")
    for name in ("spearman", "spearman_absolute", "ssim", "hog", "resembles", "constant", "complexity")
}
SMOOTHED = Measure("smoothed_spearman", "spearman with all weights random, of averaged maps", "correlation")
CHANGED_ANSWERS = Measure("changed_answers", "changed answers", "share", "{change}", f"{STRONG_NOISE} it")
LOGIT_CHANGE = Measure("logit_change", "change of the logit", "logits", "{change}")
MAP_CHANGE = Measure("map_change", "change of the map with {change}", "relative")
MAP_CHANGE_RELATIVE = Measure(
    "map_change_relative", "change of the map with {change}, over that to another patch", "ratio"
)
DISAGREEMENT = Measure(
    "disagreement", "disagreement of overlapping patches, over the size of the map", "ratio", of="{label}"
)
CHANGE_WORDS = {"noise": "noise", "stain": "another stain", "jpeg": "JPEG compression", "shift": "a shift of the grid"}


def sanity(gathered: Gathered, methods: Sequence[str]) -> tuple[Findings, list[Judged]]:
    """Likeness to maps of randomised models; a verdict for each method, and one on what the model has learned."""
    rows = Findings("sanity", gathered)
    judged = _learned(rows)
    for name in gathered.names("sanity/", "/draws"):
        stays = _of_draws(gathered[f"sanity/{name}/draws"], gathered)
        rows.add(STAYING_MAPS, stays, draws=True, method=name)
        if name in methods:
            p, keys = interval_p(stays, STAYING), Keys(method=name)
            judged.append(Judged("sanity", name, depends_on_weights(stays), p, True, (STAYING_MAPS,), keys))
    for method in methods:
        for order in ORDERS:
            for kind in gathered.names(f"sanity/{method}/{order}/"):
                values = gathered[f"sanity/{method}/{order}/{kind}"]
                x = (np.arange(values.shape[1]) + 1) / values.shape[1]
                stage = "stage" if order == "independent" else "share of the layers that are random"
                rows.curve(RANDOMISED[kind], (stage, kind), x.tolist(), values, False, method=method, order=order)
        if (name := f"sanity/{method}/smooth/spearman") in gathered:
            rows.estimate(SMOOTHED, gathered[name], method=method)
    return rows, judged


def _learned(rows: Findings) -> list[Judged]:
    """Whether the model's answers tell these patches apart more than those of its random copies do."""
    gathered = rows.gathered
    if "sanity/answers" not in gathered:
        return []
    own = _spread_of_answers(gathered["base/logits"])
    others = _spread_of_answers(np.moveaxis(gathered["sanity/answers"], 1, 0))
    patches, slides = len(gathered.slides), len(set(gathered.slides.tolist()))
    low, middle, high = np.quantile(others, [0.025, 0.5, 0.975]).tolist()
    found = Estimate(float(own), math.nan, math.nan, patches, slides, 0, "patch")
    rows.add(ANSWER_SPREAD, found, draws=True)
    found = Estimate(middle, low, high, patches, slides, 0, "patch")
    rows.add(RANDOM_ANSWER_SPREAD, found, draws=True, control="random_weights")
    measures = (ANSWER_SPREAD, RANDOM_ANSWER_SPREAD)
    return [Judged("sanity", "model", has_learned(float(own), others), math.nan, False, measures)]


def _spread_of_answers(logits: Floats) -> Floats:
    """As `wsi_gradcam.audit.measures.sanity.answer_spread`, of logits [..., P, K]."""
    values = np.asarray(logits, np.float64)
    if values.shape[-1] > 1:
        values = values - values.mean(axis=-1, keepdims=True)
    spread: Floats = np.sqrt(values.var(axis=-2).sum(axis=-1))
    return spread


def _of_draws(stays: Floats, gathered: Gathered) -> Estimate:
    """The share of maps that stay; the unit is the draw of weights."""
    patches, draws = stays.shape
    numbers = np.repeat(np.arange(draws)[None], patches, axis=0)
    weights = np.repeat(gathered.weights[:, None], draws, axis=1)
    return estimate(stays.ravel(), numbers.ravel(), weights.ravel(), gathered.seed)


def stability(gathered: Gathered, methods: Sequence[str]) -> tuple[Findings, list[Judged]]:
    """How far maps and answers move; a verdict on maps for each method and change, on answers for each change."""
    rows = Findings("stability", gathered)
    judged = []
    for change in CHANGES:
        start = f"stability/{change}"
        if f"{start}/flips" not in gathered:
            continue
        rows.estimate(CHANGED_ANSWERS, gathered[f"{start}/flips"], change=change)
        rows.estimate(LOGIT_CHANGE, gathered[f"{start}/logit_change"], change=change)
        control = f"stability/{STRONG_NOISE} {change}"
        if f"{control}/flips" in gathered:
            pair = (gathered[f"{name}/flips"] for name in (start, control))
            flips = rows.compare(CHANGED_ANSWERS, *pair, change=change, control="equal_noise")
            verdict = robust_to(CHANGE_WORDS[change], flips, "noise as strong")
            found, keys = verdict.outcome == "fails", Keys(change=change)
            judged.append(Judged("stability", change, verdict, flips.p, found, (CHANGED_ANSWERS,), keys))
    for method in methods:
        for change in (*CHANGES, "shift"):
            if f"stability/{change}/{method}/map_change" in gathered:
                judged += _steady(rows, method, change)
    return rows, judged


def _steady(rows: Findings, method: str, change: str) -> list[Judged]:
    gathered = rows.gathered
    moved = gathered[f"stability/{change}/{method}/map_change"]
    keys = Keys(method=method, change=change)
    rows.estimate(MAP_CHANGE, moved, **keys)
    if change == "shift":  # another part of the tissue is seen: there is no bound to hold it to
        return []
    other = gathered[f"stability/{change}/{method}/other_patch"]
    share = np.divide(moved, other, out=np.full(len(moved), np.nan), where=np.isfinite(other) & (other > 0))
    found = rows.estimate(MAP_CHANGE_RELATIVE, share, **keys)
    verdict, p = steady(CHANGE_WORDS[change], found), interval_p(found, MOST)
    return [Judged("stability", f"{method}, {change}", verdict, p, True, (MAP_CHANGE_RELATIVE,), keys)]


def steady(change: str, share: Estimate) -> Verdict:
    """Whether a map stays when the patch changes: its change, over that to the map of another patch.

    Half as far as to another patch is the bound: what moves farther tells little of this patch.
    """
    question = f"Does the map survive {change}?"
    evidence = {"change, over that to another patch": share}
    percent, begun = f"{100 * share.value:.0f} %", change[:1].upper() + change[1:]
    if share.high < MOST:
        words = f"{begun} moves the map {percent} as far as another patch would."
        return Verdict(question, "holds", words, evidence)
    if share.low > MOST:
        words = f"{begun} moves the map {percent} as far as another patch would: it tells little of this one."
        return Verdict(question, "fails", words, evidence)
    return Verdict(question, "unclear", f"{begun} moves the map about half as far as another patch would.", evidence)
