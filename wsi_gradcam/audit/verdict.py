"""From numbers and their controls to plain words.

What is enough comes from controls: a map must beat maps that know nothing, a cause must do more than an equal area
elsewhere. What cannot be told with the patches at hand is said to be unclear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from wsi_gradcam.audit.estimates import Comparison, Estimate, compare, holm

Outcome = Literal["holds", "fails", "unclear"]
ALPHA = 0.05
RARE = 0.02  # an untrained model that is said to have learned something is the worst error of all
MOST = 0.5
STAYING = 0.25  # of the maps: a quarter that ignores the model is too many; of chance none are left
CHANCE = 0.5  # of the area under a ROC curve
# A paired t test of so many patches finds half a standard deviation in 4 of 5 samples (two-sided, 5 %).
ENOUGH = 34
LARGE = 0.8  # of a standard deviation: a large effect (Cohen)
QUADRANTS = {  # (faithful, plausible)
    (True, True): "The model looks where a pathologist would, and its answer hangs on that.",
    (True, False): "The answer hangs on something else than what was annotated: a shortcut, or something new.",
    (False, True): "The map looks right, but the answer does not hang on it: it flatters the model.",
    (False, False): "The map shows neither what the model uses nor what was annotated: it says nothing.",
}


@dataclass(frozen=True)
class Verdict:
    """An answer to one question of the audit.

    Attributes:
        question: as a reader would ask it.
        outcome: `holds`: the explanation, or the model, passes; `fails`; `unclear`: these patches do not tell.
        words: why, in a sentence.
        evidence: the numbers behind it, by name.
    """

    question: str
    outcome: Outcome
    words: str
    evidence: Mapping[str, Comparison | Estimate | float] = field(default_factory=dict)


def faithful(
    score: ArrayLike,
    controls: Mapping[str, ArrayLike],
    slides: ArrayLike,
    weights: ArrayLike | None = None,
    seed: int = 0,
    chance: str = "random",
) -> Verdict:
    """Whether the answer hangs on what the map calls relevant: scores [N] of the map against those of each control.

    It holds where the map beats every control: each alone at 5 %, as all are asked together. It fails where a control
    beats it (corrected for their number), or where enough patches do not set it apart from `chance`: an interval that
    holds 0, and no large effect (Cohen's d of 0.8). What is not certain for want of slides is unclear.
    """
    question = "Does the model's answer hang on what the map shows?"
    found = {name: compare(score, other, slides, weights, seed) for name, other in controls.items()}
    adjusted = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
    beaten = [name for name, one in found.items() if one.p < ALPHA and one.difference.value > 0]
    lost = [name for name, one in found.items() if adjusted[name] < ALPHA and one.difference.value < 0]
    others = [name for name in found if name not in beaten]
    if not others:
        return Verdict(question, "holds", f"The map beats every control: {_list(beaten)}.", found)
    if lost:
        words = f"Taking pixels away in the order of {_list(lost)}, which ignores the model, tells more than the map."
        return Verdict(question, "fails", words, found)
    if chance in others and _is_nothing(found[chance]):
        return Verdict(question, "fails", "The map's order of the pixels is worth no more than a random one.", found)
    words = f"The map is not told apart from {_list(others)} with these patches."
    return Verdict(question, "unclear", words, found)


def _is_nothing(found: Comparison) -> bool:
    """Whether enough patches show that a difference is none, or small."""
    interval = found.difference
    return interval.patches >= ENOUGH and interval.low <= 0 and interval.high <= LARGE * found.spread


def depends_on_weights(staying: Estimate) -> Verdict:
    """Whether the map follows what the model has learned: the share of the patches whose map stays with random weights.

    Less those whose map turns into its opposite, see `wsi_gradcam.audit.measures.sanity.staying_maps`: 0 is chance.
    """
    question = "Does the map depend on what the model has learned?"
    evidence = {"maps that stay": staying}
    share = _percent(max(0.0, staying.value))
    if staying.low > STAYING:
        words = f"With random weights {share} of the maps stay, more than chance: they show the picture, not the model."
        return Verdict(question, "fails", words, evidence)
    if staying.high < STAYING:
        words = f"With random weights maps change; {share} stay, more than chance."
        return Verdict(question, "holds", words, evidence)
    words = f"With random weights about {share} of the maps stay, more than chance."
    return Verdict(question, "unclear", words, evidence)


def free_of(suspect: str, drop: Comparison, flips: Comparison) -> Verdict:
    """Whether the model leaves a suspect region alone: what hiding it does, against equal areas elsewhere.

    Args:
        suspect: in words, such as "ink".
        drop: size of the logit's change with the suspect hidden, against equal areas.
        flips: whether the predicted class changes (0 or 1), against its share for equal areas.
    """
    question = f"Does the answer do without {suspect}?"
    evidence = {"change of the logit": drop, "changed answers": flips}
    if flips.p < ALPHA and flips.difference.value > 0:
        share = _percent(flips.difference.value)
        words = f"Hiding {suspect} changes the answer for {share} more of the patches than hiding as much elsewhere."
        return Verdict(question, "fails", words, evidence)
    if drop.p < ALPHA and drop.difference.value > 0:
        words = f"{_begun(suspect)} moves the logit more than an equal area does, but seldom decides."
        return Verdict(question, "unclear", words, evidence)
    if drop.difference.patches < ENOUGH:
        return Verdict(
            question,
            "unclear",
            f"Only {drop.difference.patches} patches show {suspect}, and something else as large.",
            evidence,
        )
    return Verdict(question, "holds", f"Hiding {suspect} does no more than hiding as much elsewhere.", evidence)


def robust_to(change: str, flips: Comparison, control: str) -> Verdict:
    """Whether answers survive a change that slides vary by, against a harmless one: 0 or 1 a patch, if it changed."""
    question = f"Does the answer survive {change}?"
    evidence = {"changed answers": flips}
    if flips.p < ALPHA and flips.difference.value > 0:
        share = _percent(flips.difference.value)
        words = f"{_begun(change)} changes the answer for {share} more of the patches than {control} does."
        return Verdict(question, "fails", words, evidence)
    if flips.difference.patches < ENOUGH:
        return Verdict(question, "unclear", f"{flips.difference.patches} patches are too few to tell.", evidence)
    words = f"{_begun(change)} changes the answer no more often than {control} does."
    return Verdict(question, "holds", words, evidence)


def promises_kept(worth: Estimate) -> Verdict:
    """Whether the logit moves as the gradient promises when the picture really changes: `FiniteSteps.worth`.

    0 is what promising no change at all is worth.
    """
    question = "Does the model do what its gradient promises?"
    evidence = {"worth of the promise": worth}
    if worth.low > 0:
        words = "Real changes along the map move the answer about as the map promises."
        return Verdict(question, "holds", words, evidence)
    if worth.high < 0:
        words = (
            "Real changes along the map move the answer otherwise than it promises: it tells of the nearest step only."
        )
        return Verdict(question, "fails", words, evidence)
    return Verdict(question, "unclear", "The map's promise is not told apart from promising no change.", evidence)


def plausible(area: Estimate) -> Verdict:
    """Whether the map looks where the annotation says: `plausibility.auroc`, 0.5 by chance."""
    question = "Does the map look where the annotation says?"
    evidence = {"auroc": area}
    if area.low > CHANCE:
        words = f"In {_percent(area.value)} of all pairs, what was annotated is higher on the map than what was not."
        return Verdict(question, "holds", words, evidence)
    if area.high < CHANCE:
        words = "What was annotated is lower on the map than what was not: the model looks elsewhere."
        return Verdict(question, "fails", words, evidence)
    return Verdict(question, "unclear", "The map meets the annotation no better than chance does.", evidence)


def has_learned(spread: float, of_random: ArrayLike) -> Verdict:
    """Whether answers to these patches differ by more than those of random copies of the model do.

    Args:
        spread: `wsi_gradcam.audit.measures.sanity.answer_spread` of the model.
        of_random: [draws] the same of its copies with random weights; 49 or more, or nothing can be told.
    """
    question = "Has the model learned what tells these patches apart?"
    others = np.asarray(of_random, np.float64)
    p = float((1 + (others >= spread).sum()) / (1 + len(others)))
    middle = float(np.median(others)) if len(others) else float("nan")
    evidence = {"spread of its answers": spread, "with random weights": middle, "p": p}
    if 1 / (1 + len(others)) > RARE:
        return Verdict(question, "unclear", f"{len(others)} random copies are too few to tell.", evidence)
    if p <= RARE:
        words = "Its answers differ from patch to patch more than those of its copies with random weights."
        return Verdict(question, "holds", words, evidence)
    words = (
        "Its answers differ no more than those of copies with random weights: it is untrained, or for other patches."
    )
    return Verdict(question, "fails", words, evidence)


def not_saturated(saturated: Estimate, silent: Estimate) -> Verdict:
    """Whether gradients can see: the shares of the patches where the probability is saturated, and the logit silent.

    Args:
        saturated, silent: of the columns of `wsi_gradcam.audit.measures.saturation.Saturation`.
    """
    question = "Can a gradient see what the model uses?"
    evidence = {"saturated": saturated, "silent": silent}
    if silent.low > MOST:
        words = f"On {_percent(silent.value)} of the patches even the logit has no gradient: the map shows nothing."
        return Verdict(question, "fails", words, evidence)
    if saturated.low > MOST:
        share = _percent(saturated.value)
        words = f"On {share} of the patches the probability is saturated: only the logit can be explained by gradients."
        return Verdict(question, "fails", words, evidence)
    if saturated.high < MOST and silent.high < MOST:
        words = f"The probability is saturated on {_percent(saturated.value)} of the patches."
        return Verdict(question, "holds", words, evidence)
    return Verdict(question, "unclear", "On about half of the patches the probability is saturated.", evidence)


def quiet_on_glass(name: str, called: Estimate) -> Verdict:
    """Whether bare glass is left alone: the share of patches of glass, with a scanner's grain, that are called `name`.

    Args:
        name: a class of tissue, such as "tumour".
    """
    question = f"Is bare glass not called {name}?"
    evidence = {f"glass called {name}": called}
    if called.low > MOST:
        words = f"{_percent(called.value)} of patches of bare glass are called {name}: it is what is left by default."
        return Verdict(question, "fails", words, evidence)
    if called.high < MOST:
        return Verdict(question, "holds", f"{_percent(called.value)} of patches of glass are called {name}.", evidence)
    return Verdict(question, "unclear", f"About half of the patches of bare glass are called {name}.", evidence)


def quadrant(is_faithful: Verdict, is_plausible: Verdict) -> str:
    """What the two together mean; they are never mixed into one number."""
    if "unclear" in (is_faithful.outcome, is_plausible.outcome):
        return "One of the two is not known: no statement about the pair."
    return QUADRANTS[is_faithful.outcome == "holds", is_plausible.outcome == "holds"]


def _begun(text: str) -> str:
    """As a sentence begins."""
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _list(names: list[str]) -> str:
    return ", ".join(names)
