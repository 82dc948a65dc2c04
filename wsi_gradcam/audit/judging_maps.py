"""From numbers to estimates and verdicts: do maps follow what was learned, and do they survive what slides vary by?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.estimates import Estimate, estimate
from wsi_gradcam.audit.gathered import Gathered, Rows
from wsi_gradcam.audit.judged import Judged, interval_p
from wsi_gradcam.audit.measured import CHANGES, COPIES, ORDERS, STRONG_NOISE
from wsi_gradcam.audit.verdict import MOST, STAYING, Verdict, depends_on_weights, has_learned, robust_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CHANGE_WORDS = {"noise": "noise", "stain": "another stain", "jpeg": "JPEG compression", "shift": "a shift of the grid"}


def sanity(gathered: Gathered, methods: Sequence[str]) -> tuple[Rows, list[Judged]]:
    """Likeness to maps of randomised models; a verdict for each method, and one on what the model has learned."""
    rows = Rows.of("sanity", gathered)
    judged = _learned(rows)
    for name in gathered.names("sanity/", "/draws"):
        stays = _of_draws(gathered[f"sanity/{name}/draws"], gathered)
        rows.keep(name, "maps that stay with random weights", "share", stays, draws=True)
        if name in methods:
            p = interval_p(stays, STAYING)
            judged.append(Judged("sanity", name, depends_on_weights(stays), p, True))
    for method in methods:
        for order in ORDERS:
            for kind in gathered.names(f"sanity/{method}/{order}/"):
                values = gathered[f"sanity/{method}/{order}/{kind}"]
                x = (np.arange(values.shape[1]) + 1) / values.shape[1]
                stage = "stage" if order == "independent" else "share of the layers that are random"
                rows.curve(method, f"{kind}, {order}", (stage, kind), x.tolist(), values, False)
        if (name := f"sanity/{method}/smooth/spearman") in gathered:
            rows.estimate(method, "spearman with all weights random, of averaged maps", "correlation", gathered[name])
    return rows, judged


def _learned(rows: Rows) -> list[Judged]:
    """Whether the model's answers tell these patches apart more than those of its random copies do."""
    gathered = rows.gathered
    if "sanity/answers" not in gathered:
        return []
    own = _spread_of_answers(gathered["base/logits"])
    others = _spread_of_answers(np.moveaxis(gathered["sanity/answers"], 1, 0))
    patches, slides = len(gathered.slides), len(set(gathered.slides.tolist()))
    low, middle, high = np.quantile(others, [0.025, 0.5, 0.975]).tolist()
    for of, value, least, most in (("model", float(own), math.nan, math.nan), (COPIES, middle, low, high)):
        found = Estimate(value, least, most, patches, slides, 0, "patch")
        rows.keep(of, "spread of the answers", "logits", found, draws=True)
    return [Judged("sanity", "model", has_learned(float(own), others), math.nan, False)]


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


def stability(gathered: Gathered, methods: Sequence[str]) -> tuple[Rows, list[Judged]]:
    """How far maps and answers move; a verdict on maps for each method and change, on answers for each change."""
    rows = Rows.of("stability", gathered)
    judged = []
    for change in CHANGES:
        start = f"stability/{change}"
        if f"{start}/flips" not in gathered:
            continue
        rows.estimate(change, "changed answers", "share", gathered[f"{start}/flips"])
        rows.estimate(change, "change of the logit", "logits", gathered[f"{start}/logit_change"])
        control = f"stability/{STRONG_NOISE} {change}"
        if f"{control}/flips" in gathered:
            flips = rows.compare(
                change,
                f"{STRONG_NOISE} it",
                "changed answers",
                "share",
                gathered[f"{start}/flips"],
                gathered[f"{control}/flips"],
            )
            verdict = robust_to(CHANGE_WORDS[change], flips, "noise as strong")
            judged.append(Judged("stability", change, verdict, flips.p, verdict.outcome == "fails"))
    for method in methods:
        for change in (*CHANGES, "shift"):
            if f"stability/{change}/{method}/map_change" in gathered:
                judged += _steady(rows, method, change)
    return rows, judged


def _steady(rows: Rows, method: str, change: str) -> list[Judged]:
    gathered = rows.gathered
    moved = gathered[f"stability/{change}/{method}/map_change"]
    rows.estimate(method, f"change of the map with {change}", "relative", moved)
    if change == "shift":  # another part of the tissue is seen: there is no bound to hold it to
        return []
    other = gathered[f"stability/{change}/{method}/other_patch"]
    share = np.divide(moved, other, out=np.full(len(moved), np.nan), where=np.isfinite(other) & (other > 0))
    found = rows.estimate(method, f"change of the map with {change}, over that to another patch", "ratio", share)
    verdict = steady(CHANGE_WORDS[change], found)
    return [Judged("stability", f"{method}, {change}", verdict, interval_p(found, MOST), True)]


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
