"""Slide-level models: does the slide's answer depend on the patches that a map marks, and how few decide?

Patches are removed in the order of their relevance, see `wsi_gradcam.audit.measures.bags`. The unit is the slide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import ALPHA, ENOUGH, Findings, Verdict, percent
from wsi_gradcam.audit.measurements import Comparison, compare, stored
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.schema import (
    ATTENTION,
    RANDOM_ORDER,
    CurvesFigure,
    Figure,
    IntervalsFigure,
    Keys,
    Measure,
    Words,
    map_keys,
    method_title,
    row_title,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from wsi_gradcam.audit.batch import SlideBag
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.measures.bags import BagSubject, Flipping
    from wsi_gradcam.audit.schema import Metrics

    Floats = NDArray[np.float64]

LARGE = 0.8  # standard deviations: a large effect (Cohen)
TOP = 10  # per hundred patches, for which the overlap of two methods is computed

WAYS = {"most": "most relevant first", "least": "least relevant first"}
FLIPPED = {way: Measure(f"{way}_first", f"answer, {words}") for way, words in WAYS.items()}
FLIPPED_PROBABILITY = {way: Measure(f"{way}_first_probability", f"probability, {words}") for way, words in WAYS.items()}
AUPC = Measure("aupc", "area, most relevant first", "logits")
AUPC_PROBABILITY = Measure("aupc_probability", "area, most relevant first, probability", "probability")
SRG = Measure("srg", "symmetric relevance gain", "logits")
SRG_PROBABILITY = Measure("srg_probability", "symmetric relevance gain, probability", "probability")
TIED = Measure("tied_values", "tied values", "share")
KEPT = Measure("sufficient_share", "patches that keep the answer", "share")
REMOVED = Measure("necessary_share", "patches whose removal changes the answer", "share")
KEPT_COUNT = Measure("sufficient_patches", "number of patches that keep the answer", "patches")
REMOVED_COUNT = Measure("necessary_patches", "number of patches whose removal changes the answer", "patches")
PAIR = "{method} and {other_method}"
RANKS = Measure("agreement_spearman", "rank correlation", "correlation", of=PAIR)
SHARED = Measure("agreement_top", f"shared among the top {TOP}% of patches", "share", of=PAIR)


@dataclass(frozen=True, kw_only=True, eq=False)
class BagFaithfulness:
    """Answers [N, Q] for slides as their patches leave, by map; for noise, the mean of several random orders.

    Attributes:
        most, least: explained scalar without the most, or the least relevant patches.
        most_probability, least_probability: probability of the explained class, if there is one.
        tied: [N] share of the values that another patch has too.
    """

    most: Mapping[str, Floats] = stored("bag/faithfulness/{}/most")
    least: Mapping[str, Floats] = stored("bag/faithfulness/{}/least")
    most_probability: Mapping[str, Floats] = stored("bag/faithfulness/{}/most_probability")
    least_probability: Mapping[str, Floats] = stored("bag/faithfulness/{}/least_probability")
    tied: Mapping[str, Floats] = stored("bag/faithfulness/{}/tied")

    def srg(self, name: str) -> Floats:
        """Return the symmetric relevance gain [N] of a map in logits."""
        gain: Floats = (self.least[name] - self.most[name]).mean(axis=1)
        return gain


@dataclass(frozen=True, kw_only=True, eq=False)
class Sufficiency:
    """How few patches decide, [N] by map; NaN for a slide that is not predicted to be of the explained class.

    Attributes:
        kept: share of the patches, most relevant first, that keep the answer alone.
        removed: share of them whose removal changes it; 1 if no number does.
        count: number of the slide's patches.
    """

    kept: Mapping[str, Floats] = stored("bag/sufficiency/{}/kept")
    removed: Mapping[str, Floats] = stored("bag/sufficiency/{}/removed")
    count: Floats = stored("bag/sufficiency/count")


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreement:
    """Similarity [N] of the relevance by one method to that by another."""

    ranks: Mapping[str, Mapping[str, Floats]] = stored("bag/agreement/{}/{}/ranks")
    shared: Mapping[str, Mapping[str, Floats]] = stored("bag/agreement/{}/{}/shared")
    chance: Floats = stored("bag/agreement/chance")


def measure_flipping(bag: SlideBag) -> BagFaithfulness:
    """Measure the answers as patches leave, by the map of each method and at random."""
    subject = bag.subject
    curves = {name: _mean_curves(subject, some) for name, some in bag.flips.items()}
    return BagFaithfulness(
        most={name: found[0] for name, found in curves.items()},
        least={name: found[1] for name, found in curves.items()},
        most_probability={name: found[2] for name, found in curves.items() if found[2] is not None},
        least_probability={name: found[3] for name, found in curves.items() if found[3] is not None},
        tied={name: np.array([1 - len(np.unique(values)) / len(values)]) for name, values in bag.relevance.items()},
    )


def _mean_curves(subject: BagSubject, flips: Sequence[Flipping]) -> tuple[Floats, Floats, Floats | None, Floats | None]:
    """Return a map's curves for `BagFaithfulness`, [1, Q] each: most, least, and their probabilities."""
    parts = [np.stack([getattr(one, way) for one in flips]) for way in WAYS]
    most, least = (subject.scalar(part).mean(axis=0)[None] for part in parts)
    shares = [subject.probability(part) for part in parts]
    p_most, p_least = (None if share is None else share.mean(axis=0)[None] for share in shares)
    return most, least, p_most, p_least


def measure_sufficiency(bag: SlideBag) -> Sufficiency | None:
    """Measure how few patches keep the answer, and how few must be removed; None if the answer is not a class."""
    from wsi_gradcam.audit.measures.bags import fewest_that_change, fewest_that_keep

    subject, count = bag.subject, len(bag.subject.features)
    called = subject.says_so(subject.logits)
    if called is None:
        return None
    kept: dict[str, Floats] = {}
    removed: dict[str, Floats] = {}
    for name, flips in bag.flips.items():
        pairs = [(subject.says_so(one.kept), subject.says_so(one.removed)) for one in flips] if called else []
        keep = [fewest_that_keep(one.counts, a) for one, (a, _) in zip(flips, pairs, strict=False) if a is not None]
        change = [fewest_that_change(one.counts, b) for one, (_, b) in zip(flips, pairs, strict=False) if b is not None]
        kept[name], removed[name] = (np.array([np.mean(some) / count if some else np.nan]) for some in (keep, change))
    return Sufficiency(kept=kept, removed=removed, count=np.array([float(count)]))


def measure_agreement(bag: SlideBag) -> Agreement | None:
    """Measure how similar the relevances of each pair of methods are; None for a single method."""
    from wsi_gradcam.audit.measures.bags import overlap_of_top
    from wsi_gradcam.audit.measures.sanity import rank_likeness

    names, count = list(bag.relevance), len(bag.subject.features)
    top = max(1, round(count * TOP / 100))
    ranks: dict[str, dict[str, Floats]] = {}
    shared: dict[str, dict[str, Floats]] = {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            pair = bag.relevance[first], bag.relevance[second]
            ranks.setdefault(first, {})[second] = np.array([rank_likeness(*pair)])
            shared.setdefault(first, {})[second] = np.array([overlap_of_top(*pair, top, bag.seed)])
    return Agreement(ranks=ranks, shared=shared, chance=np.array([top / count])) if ranks else None


def assess_flipping(findings: Findings, scope: Scope) -> None:
    """Add curves, areas and gains of all maps, and a verdict for each method."""
    if (found := findings.measurements.of(BagFaithfulness)) is None:
        return
    for name in (*scope.methods, RANDOM_ORDER):
        _add_flipping(findings, found, name)
    for method in scope.methods:
        verdict = gains(found, method, findings.measurements)
        for name, one in verdict.evidence.items():
            assert isinstance(one, Comparison)
            findings.add_comparison(SRG, one, method=method, control=name)
        p, is_finding = _p_of(verdict)
        findings.conclude(method, verdict, p, SRG, is_finding=is_finding, method=method)
        if method in found.least_probability:
            pair = (_gain(found, name) for name in (method, RANDOM_ORDER))
            findings.compare(SRG_PROBABILITY, *pair, method=method, control=RANDOM_ORDER)
        findings.estimate(TIED, found.tied[method], method=method)


def _gain(found: BagFaithfulness, name: str) -> Floats:
    gain: Floats = (found.least_probability[name] - found.most_probability[name]).mean(axis=1)
    return gain


def _add_flipping(findings: Findings, found: BagFaithfulness, name: str) -> None:
    keys, interval = map_keys(name), name != RANDOM_ORDER and len(findings.measurements) > 1
    for way in WAYS:
        curve = getattr(found, way)[name]
        x = (np.arange(curve.shape[1]) / curve.shape[1]).tolist()
        axes = ("share of the patches removed", "logit of the slide")
        findings.curve(FLIPPED[way], axes, x, curve, interval, **keys)
        shares = getattr(found, f"{way}_probability")
        if name in shares:
            findings.curve(FLIPPED_PROBABILITY[way], (axes[0], "probability"), x, shares[name], interval, **keys)
    findings.estimate(AUPC, found.most[name].mean(axis=1), **keys)
    findings.estimate(SRG, found.srg(name), **keys)
    if name in found.most_probability:
        findings.estimate(AUPC_PROBABILITY, found.most_probability[name].mean(axis=1), **keys)
        findings.estimate(SRG_PROBABILITY, _gain(found, name), **keys)


def gains(found: BagFaithfulness, method: str, data: Measurements) -> Verdict:
    """Return whether the slide's answer depends on what a map marks, see `gains_more`."""
    others = {RANDOM_ORDER: found.srg(RANDOM_ORDER)}
    if ATTENTION in found.most and method != ATTENTION:
        others[ATTENTION] = found.srg(ATTENTION)
    return gains_more(found.srg(method), others, data.slides, data.seed)


def gains_more(gain: ArrayLike, controls: Mapping[str, ArrayLike], slides: ArrayLike, seed: int = 0) -> Verdict:
    """Return whether the answer depends on what the map marks: relevance gains [N] against those of random orders.

    It holds if the gain is larger than that of random orders. It fails if random orders gain more, or if enough slides
    show no difference from them: an interval that contains 0, and no large effect (Cohen's d of 0.8). Attention, which
    costs nothing extra, is a control too: the words say so if a map gains less.
    """
    question = "Does the slide's answer depend on what the map shows?"
    found = {name: compare(gain, other, slides, None, seed) for name, other in controls.items()}
    chance, attention = found[RANDOM_ORDER], found.get(ATTENTION)
    if chance.p < ALPHA and chance.difference.value < 0:
        words = "Removing patches in a random order changes the answer more than removing them in the order of the map."
        return Verdict(question, "fails", words, found)
    if chance.p < ALPHA and chance.difference.value > 0:
        words = "The answer changes without the patches that the map marks, and stays without the others."
        if attention is not None and attention.p < ALPHA and attention.difference.value < 0:
            words += " The order of attention changes it even more."
        return Verdict(question, "holds", words, found)
    if _is_no_better(chance):
        return Verdict(
            question, "fails", "The map's order of the patches changes the answer no more than a random order.", found
        )
    return Verdict(question, "unclear", "These slides do not distinguish the map from a random order.", found)


def _is_no_better(found: Comparison) -> bool:
    """Return whether enough slides show that there is no difference, or a small one; larger is better."""
    interval = found.difference
    return interval.patches >= ENOUGH and interval.low <= 0 and interval.high <= LARGE * found.spread


def _p_of(verdict: Verdict) -> tuple[float, bool]:
    """Return (p, whether something was found)."""
    chance = verdict.evidence[RANDOM_ORDER]
    assert isinstance(chance, Comparison)
    if verdict.outcome == "fails" and not (chance.p < ALPHA and chance.difference.value < 0):
        return float("nan"), False
    return chance.p, True


def assess_sufficiency(findings: Findings, scope: Scope) -> None:
    """Add how few patches keep the answer, and how many must be removed to change it; a verdict for each method."""
    if (found := findings.measurements.of(Sufficiency)) is None:
        return
    for name in (*scope.methods, RANDOM_ORDER):
        for measure, counted, shares in ((KEPT, KEPT_COUNT, found.kept), (REMOVED, REMOVED_COUNT, found.removed)):
            findings.estimate(measure, shares[name], **map_keys(name))
            findings.estimate(counted, shares[name] * found.count, **map_keys(name))
    for method in scope.methods:
        keys = Keys(method=method, control=RANDOM_ORDER)
        kept = findings.compare(KEPT, found.kept[method], found.kept[RANDOM_ORDER], **keys)
        removed = findings.compare(REMOVED, found.removed[method], found.removed[RANDOM_ORDER], **keys)
        if kept.difference.patches:
            means = [
                float(np.nanmean(part[name])) for part in (found.kept, found.removed) for name in (method, RANDOM_ORDER)
            ]
            verdict, p = few_decide(kept, removed, means), max(kept.p, removed.p)
            findings.conclude(method, verdict, p, KEPT, REMOVED, is_finding=verdict.outcome == "holds", method=method)


def few_decide(kept: Comparison, removed: Comparison, means: Sequence[float]) -> Verdict:
    """Return whether few patches decide: shares that keep the answer, and that must go, against random orders.

    Args:
        means: share that keeps it by the map, and at random; share that must be removed by the map, and at random.
    """
    question = "Do a few of the patches that the map marks decide the answer?"
    evidence = {"patches that keep the answer": kept, "patches whose removal changes it": removed}
    shares = [share_text(value) for value in means]
    words = (
        f"The top {shares[0]} of the patches are enough to keep the answer ({shares[1]} at random), and the top "
        f"{shares[2]} must be removed to change it ({shares[3]} at random)"
    )
    better = [one.p < ALPHA and one.difference.value < 0 for one in (kept, removed)]
    if all(better):
        return Verdict(question, "holds", f"{words}.", evidence)
    if not any(better) and all(one.difference.patches >= ENOUGH for one in (kept, removed)):
        return Verdict(question, "fails", f"{words}: no fewer than at random.", evidence)
    return Verdict(question, "unclear", f"{words}.", evidence)


def share_text(share: float) -> str:
    """Return a share as text, with enough digits to distinguish it from nothing.

    >>> share_text(0.257), share_text(0.0042), share_text(1.0)
    ('26%', '0.42%', '100%')
    """
    return percent(share) if share >= 0.1 or share == 0 else f"{100 * share:.2g}%"


def assess_agreement(findings: Findings, scope: Scope) -> None:
    """Add how similar methods are."""
    if (found := findings.measurements.of(Agreement)) is None:
        return
    for first, others in found.ranks.items():
        for second, ranks in others.items():
            findings.estimate(RANKS, ranks, method=first, other_method=second)
            findings.estimate(SHARED, found.shared[first][second], method=first, other_method=second)


def flipping_figures(metrics: Metrics) -> list[Figure]:
    """Return figures of the answers as patches leave, and of the gains of all maps."""
    curves = [row for row in metrics.curves if any(y is not None for y in row.y)]
    found: list[Figure] = []
    for measures, name in ((FLIPPED, "logits"), (FLIPPED_PROBABILITY, "probabilities")):
        panels = [
            (
                f"{words}: {'lower' if way == 'most' else 'higher'} is better",
                [(row_title(row), row) for row in curves if row.measure == measures[way].name],
            )
            for way, words in WAYS.items()
        ]
        if any(rows for _, rows in panels):
            found.append(CurvesFigure(panels, f"Mean answers of slides in {name} as patches are removed, all maps"))
    rows = [row for row in metrics.estimates if row.measure == SRG.name]
    lines = [(row_title(row), row) for row in sorted(rows, key=lambda row: row.control is not None)]
    if lines:
        axis = "symmetric relevance gain, in logits; about 0 for random orders"
        found.append(IntervalsFigure(lines, axis, "Relevance gains of all maps", reference=0.0))
    return found


def sufficiency_figures(metrics: Metrics) -> list[Figure]:
    """Return figures of the shares of patches that keep the answer, and that must be removed."""
    found: list[Figure] = []
    for measure in (KEPT, REMOVED):
        rows = [(row_title(row), row) for row in metrics.estimates if row.measure == measure.name and row.patches]
        if rows:
            found.append(IntervalsFigure(rows, f"share of the {measure.what}; fewer is better", measure.what, left=0.0))
    return found


def agreement_figures(metrics: Metrics) -> list[Figure]:
    """Return a figure of the rank correlations of methods."""
    rows = [
        (f"{method_title(row.method or '')} and {method_title(row.other_method or '')}", row)
        for row in metrics.estimates
        if row.measure == RANKS.name
    ]
    axis = "rank correlation of the relevance of a slide's patches"
    return [IntervalsFigure(rows, axis, "Similarity of methods", reference=0.0)] if rows else []


FAITHFULNESS = Question(
    Words(
        title="Does the slide's answer depend on what the map shows?",
        how="Patches are removed from the slide's bag in the order of the map, the most relevant first, and the model "
        "answers each time; then again with the least relevant first. If the map is faithful, the answer falls "
        "early in the first order and late in the second. The difference between the two is the symmetric relevance "
        "gain. The same is done in random orders, which gain nothing, and in the order of attention.",
        not_proven="The answer is based on features: whether the encoder sees what a pathologist sees in a patch is "
        "not tested. A map that is faithful to a bad model is still faithful. The model may never have been trained "
        "on bags with so few patches.",
        source="Hense 2024 (arXiv 2406.04280); symmetric relevance gain: Blücher 2024 (arXiv 2401.06654)",
    ),
    measure_flipping,
    assess_flipping,
    measures=(
        *(one for some in (FLIPPED, FLIPPED_PROBABILITY) for one in some.values()),
        *(AUPC, AUPC_PROBABILITY, SRG, SRG_PROBABILITY, TIED),
    ),
    figures=flipping_figures,
)
SUFFICIENCY = Question(
    Words(
        title="How few patches decide?",
        how="For slides that are called by the explained class: how many of the most relevant patches are enough to "
        "keep that answer (sufficient), and how many must be removed before it changes (necessary), each in the order "
        "of the map and at random.",
        not_proven="That a few patches suffice does not prove that they show what should decide: look at them. Where "
        "much of a slide supports the same answer, nearly all of it must be removed, for any map.",
        source="Kaczmarzyk 2024 (HIPPO, arXiv 2409.03080)",
    ),
    measure_sufficiency,
    assess_sufficiency,
    measures=(KEPT, REMOVED, KEPT_COUNT, REMOVED_COUNT),
    figures=sufficiency_figures,
    no_numbers="no slide is called by the explained class, or the answer is a number rather than a class",
)
AGREEMENT = Question(
    Words(
        title="Do methods agree on which patches are relevant?",
        how="The relevance of a slide's patches by one method is compared with that by another: the correlation of "
        f"their ranks, and how many of the top {TOP}% of patches they share ({TOP}% by chance).",
        not_proven="Methods that agree may all be wrong, and methods that answer different questions may differ and "
        "all be right: faithfulness shows which to believe.",
        source="rank correlation: Spearman 1904; ties at their mean rank",
    ),
    measure_agreement,
    assess_agreement,
    measures=(RANKS, SHARED),
    figures=agreement_figures,
    no_numbers="only one method was audited",
)
