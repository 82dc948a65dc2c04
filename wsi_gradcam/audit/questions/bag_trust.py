"""Slide-level models: sanity, stability, shortcuts and plausibility, with slides in place of patches.

Patches are removed or changed as feature vectors, and weights are replaced by random ones; see `audit.measures.bags`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import ALPHA, ENOUGH, HALF, Findings, Verdict, interval_p, percent
from wsi_gradcam.audit.measurements import FEWEST_SLIDES, Comparison, Estimate, optional, stored
from wsi_gradcam.audit.questions import Question, Scope, plausibility, shortcuts
from wsi_gradcam.audit.questions.plausibility import AUROC, CHANCE, auroc
from wsi_gradcam.audit.questions.sanity import (
    ANSWER_SPREAD,
    RANDOM_ANSWER_SPREAD,
    STAYING,
    STAYING_MAPS,
    answer_spread,
    depends_on_weights,
    estimate_of_draws,
    has_learned,
)
from wsi_gradcam.audit.questions.shortcuts import free_of, suspect_words
from wsi_gradcam.audit.questions.stability import OFTEN, keeps_order, lasting
from wsi_gradcam.audit.schema import (
    ATTENTION,
    RANDOM,
    Figure,
    IntervalsFigure,
    Keys,
    Measure,
    Words,
    change_title,
    map_keys,
    method_title,
    row_title,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.batch import SlideBag
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.measures.shortcuts import Removal
    from wsi_gradcam.audit.schema import Metrics

    Floats = NDArray[np.float64]
    Masks = NDArray[np.bool_]

DRAWS = 12  # pairs of networks with random weights
COPIES = 49  # copies, none of which may differ as much: a false pass in 50
DRAWN, DRAWN_AT_ONCE = (
    500,
    100,
)  # patches of a slide on which weights are randomised, for networks that see a bag as a whole
CHANGES = ("noise", "float16", "half")
REPEATS = 4
CHANGE_WORDS = {
    "noise": "noise in the features",
    "float16": "rounding to 16 bits",
    "half": "the loss of half of the patches",
}
DRAWS_ELSEWHERE = 20
SHOWS = 0.05  # share of a patch: with this much of a region, it counts as a patch of the region
ANNOTATED = 0.5  # share from which a patch counts as annotated when maps are compared with annotations

STAYING_ENCODER = Measure("staying_maps_encoder", "maps that stay the same with random weights of the encoder", "share")
CHANGED_ANSWERS = Measure("changed_answers", "changed answers", "share", "{change}")
LOGIT_CHANGE = Measure("logit_change", "change of the logit", "logits", "{change}")
MAP_LIKENESS = Measure("map_likeness", "rank correlation with the original map, with {change}", "correlation")
WORST_LIKENESS = Measure("worst_map_likeness", "rank correlation with the original map, at worst", "correlation")
SHOWN = Measure("suspect_shown", "slides that show it", "share", of="{suspect}")
AREA = Measure("suspect_area", "share of the patches", "share", of="{suspect}")
ATTRIBUTION = Measure(
    "attribution_on_suspect", "share of the positive relevance", "share", of="{suspect}, {method}", against=AREA.what
)
REMOVAL_CHANGE = Measure(
    "removal_change", "absolute change of the logit", "logits", "{suspect}", "an equal area elsewhere"
)
REMOVAL_FLIPS = Measure("removal_flips", "changed answers", "share", "{suspect}", "an equal area elsewhere")
REMOVAL_DROP = Measure(
    "annotated_drop", "fall of the logit without it", "logits", "annotation", "an equal area elsewhere"
)
REMOVAL_ANNOTATED_FLIPS = Measure(
    "annotated_flips", "changed answers", "share", "annotation", "an equal area elsewhere"
)
ANNOTATED_SHARE = Measure("annotated_share", "annotated share of the patches", "share", of="chance")


@dataclass(frozen=True, kw_only=True, eq=False)
class BagSanity:
    """Relevances and answers with random weights.

    Attributes:
        draws: [N, draws] maps that stay, minus those that flip, by method.
        encoder: the same with random weights in the encoder.
        own: [N, K] the model's answers to the patches that random copies are shown.
        answers: [N, copies, K] those of random copies of the aggregator.
    """

    draws: Mapping[str, Floats] = stored("bag/sanity/{}/draws")
    encoder: Mapping[str, Floats] = stored("bag/sanity/{}/encoder")
    own: NDArray[np.float32] | None = optional("bag/sanity/own")
    answers: NDArray[np.float32] | None = optional("bag/sanity/answers")


@dataclass(frozen=True, kw_only=True, eq=False)
class BagStability:
    """Changes of answers and maps, [N] each by change, averaged over repeats.

    Attributes:
        flips, logit_change: those of the answer.
        likeness: rank correlation with the original map, by method.
    """

    flips: Mapping[str, Floats] = stored("bag/stability/{}/flips")
    logit_change: Mapping[str, Floats] = stored("bag/stability/{}/logit_change")
    likeness: Mapping[str, Mapping[str, Floats]] = stored("bag/stability/{}/{}/likeness")


@dataclass(frozen=True, kw_only=True, eq=False)
class Removed:
    """The effects of removing some patches, [N] each; NaN for a slide without them (`measures.shortcuts.Removal`)."""

    drop: Floats
    control_drop: Floats
    control_size: Floats
    flips: Floats
    control_flips: Floats

    @classmethod
    def of(cls, found: Removal | None) -> Removed:
        """Return the record of a slide."""
        names = ("drop", "control_drop", "control_size", "flips", "control_flips")
        return cls(**{name: np.array([np.nan if found is None else getattr(found, name)]) for name in names})


@dataclass(frozen=True, kw_only=True, eq=False)
class BagShortcuts:
    """Suspects on slides, [N] each by suspect.

    Attributes:
        share: share of the patches that show it.
        mass: share of the positive relevance on them, by method; NaN for a slide without any.
        removed: the effects of removing them.
    """

    share: Mapping[str, Floats] = stored("bag/shortcuts/{}/share")
    mass: Mapping[str, Mapping[str, Floats]] = stored("bag/shortcuts/{}/{}/mass")
    removed: Mapping[str, Removed] = stored("bag/shortcuts/{}/removed", Removed)


@dataclass(frozen=True, kw_only=True, eq=False)
class BagPlausibility:
    """Relevances compared with annotations.

    Attributes:
        share: [N] share of the patches that are annotated.
        auroc: [N] area under the ROC curve, by map; NaN if all or none are annotated.
        removed: the effects of removing the annotated patches.
    """

    share: Floats = stored("bag/plausibility/share")
    auroc: Mapping[str, Floats] = stored("bag/plausibility/{}/auroc")
    removed: Mapping[str, Removed] = stored("bag/plausibility/{}/removed", Removed)


def measure_sanity(bag: SlideBag) -> BagSanity:
    """Measure how similar relevances are to those with random weights, and the answers of random copies.

    This uses a part of a large bag, the same for all.
    """
    from wsi_gradcam.audit.measures.bags import random_answers

    part = bag.some(DRAWN if bag.subject.in_one_go else DRAWN_AT_ONCE)
    answers = random_answers(part.network, part.features, COPIES, bag.model_seed)
    return BagSanity(
        draws={name: np.array([values]) for name, values in _staying(bag, part).items()},
        encoder={name: np.array([values]) for name, values in bag.staying_of_encoder().items()},
        own=part.logits[None].astype(np.float32) if len(answers) else None,
        answers=answers[None].astype(np.float32) if len(answers) else None,
    )


def _staying(bag: SlideBag, part: object) -> dict[str, list[float]]:
    from wsi_gradcam.audit.measures.bags import BagSubject, randomised_pairs, relevance_of
    from wsi_gradcam.audit.measures.sanity import stays

    assert isinstance(part, BagSubject)
    before = part.relevance(bag.methods)
    found: dict[str, list[float]] = {name: [] for name in bag.methods}
    relevant = [name for name in bag.methods if name != ATTENTION]
    for changed, turned, looking in randomised_pairs(part.network, part.features, DRAWS, bag.model_seed):
        first = relevance_of(changed, part.features, part.target, bag.methods)
        second = relevance_of(turned, part.features, part.target, relevant)
        if ATTENTION in bag.methods:
            second |= relevance_of(looking, part.features, part.target, [ATTENTION])
        for name, values in found.items():
            values.append(float(np.mean([stays(before[name], one[name]) for one in (first, second)])))
    return {name: values for name, values in found.items() if values}


def measure_stability(bag: SlideBag) -> BagStability:
    """Measure changes of the answer and of maps with noise, rounding, and half of the patches."""
    from wsi_gradcam.audit.measures.bags import BagSubject, perturbed
    from wsi_gradcam.audit.measures.sanity import rank_likeness

    part = bag.some(DRAWN if bag.subject.in_one_go else DRAWN_AT_ONCE)
    values, before, said = np.asarray(part.features), part.relevance(bag.methods), part.says_so(part.logits)
    flips: dict[str, Floats] = {}
    moved: dict[str, Floats] = {}
    alike: dict[str, dict[str, Floats]] = {}
    for number, change in enumerate(CHANGES):
        random = np.random.default_rng([bag.seed, number])
        found: list[tuple[float, float, dict[str, float]]] = []
        for _ in range(1 if change == "float16" else REPEATS):
            rows = np.arange(len(values))
            if change == "half":
                rows = np.sort(random.choice(len(values), max(1, len(values) // 2), replace=False))
            changed = values[rows] if change == "half" else perturbed(values, change, random)
            if not np.isfinite(changed).all():
                continue
            other = BagSubject.of(part.network, changed, part.target, part.activation)
            now = other.says_so(other.logits)
            ranks = {name: rank_likeness(before[name][rows], one) for name, one in other.relevance(bag.methods).items()}
            step = abs(float(part.scalar(other.logits)) - float(part.scalar(part.logits)))
            found.append((np.nan if now is None else float(now != said), step, ranks))
        if found:
            flips[change] = np.array([np.mean([one[0] for one in found])])
            moved[change] = np.array([np.mean([one[1] for one in found])])
            alike[change] = {name: np.array([np.mean([one[2][name] for one in found])]) for name in bag.methods}
    return BagStability(flips=flips, logit_change=moved, likeness=alike)


def measure_shortcuts(bag: SlideBag) -> BagShortcuts | None:
    """Measure the effects of removing suspects, against equal areas elsewhere, and the relevance on them."""
    from wsi_gradcam.audit.measures.shortcuts import relevance_on

    if not bag.suspects:
        return None
    return BagShortcuts(
        share={name: np.array([mask.mean()]) for name, mask in bag.suspects.items()},
        mass={
            name: {
                method: np.array([relevance_on(values, mask) if mask.any() else np.nan])
                for method, values in bag.relevance.items()
            }
            for name, mask in bag.suspects.items()
        },
        removed={name: _removed(bag, mask) for name, mask in bag.suspects.items()},
    )


def _removed(bag: SlideBag, mask: Masks) -> Removed:
    from wsi_gradcam.audit.measures.shortcuts import equal_areas, removal

    elsewhere = equal_areas(mask, bag.places, DRAWS_ELSEWHERE, bag.seed)
    return Removed.of(None if elsewhere is None else removal(bag.subject, mask, elsewhere))


def measure_plausibility(bag: SlideBag) -> BagPlausibility | None:
    """Measure the agreement of relevances with the annotation, and the effects of removing it; None without one."""
    if bag.annotated is None:
        return None
    inside = bag.annotated >= ANNOTATED
    noise = np.random.default_rng(bag.seed).standard_normal(len(inside))
    maps = {**bag.relevance, RANDOM: noise}
    return BagPlausibility(
        share=np.array([inside.mean()]),
        auroc={name: auroc(values.astype(np.float32)[None, None], inside[None, None]) for name, values in maps.items()},
        removed={"annotation": _removed(bag, bag.annotated >= SHOWS)},
    )


def assess_sanity(findings: Findings, scope: Scope) -> None:
    """Add the similarity to maps with random weights, a verdict for each method, and one on what the model learned."""
    data = findings.measurements
    if (found := data.of(BagSanity)) is None:
        return
    if found.own is not None and found.answers is not None:
        _add_answers(findings, np.asarray(found.own, np.float64), np.asarray(found.answers, np.float64))
    for method in scope.methods:
        if method in found.draws:
            staying = estimate_of_draws(found.draws[method], data)
            findings.add(STAYING_MAPS, staying, draws=True, method=method)
            p = interval_p(staying, STAYING)
            findings.conclude(method, depends_on_weights(staying), p, STAYING_MAPS, method=method)
        if method in found.encoder:
            findings.add(STAYING_ENCODER, estimate_of_draws(found.encoder[method], data), draws=True, method=method)


def _add_answers(findings: Findings, own: Floats, answers: Floats) -> None:
    """Add whether the answers distinguish slides better than those of random copies; nothing if slides are too few."""
    slides = len(own)
    spread, others = float(answer_spread(own)), answer_spread(np.moveaxis(answers, 1, 0))
    if slides < FEWEST_SLIDES:
        return
    low, middle, high = np.quantile(others, [0.025, 0.5, 0.975]).tolist()
    findings.add(ANSWER_SPREAD, Estimate(spread, np.nan, np.nan, slides, slides, 0, "patch"), draws=True)
    of_copies = Estimate(middle, low, high, slides, slides, 0, "patch")
    findings.add(RANDOM_ANSWER_SPREAD, of_copies, draws=True, control="random_weights")
    verdict = has_learned(spread, others, "slide")
    findings.conclude("model", verdict, np.nan, ANSWER_SPREAD, RANDOM_ANSWER_SPREAD, is_finding=False)


def untested_sanity(data: Measurements, scope: Scope) -> list[tuple[str, str]]:
    """Return the encoder if it was not run, and what the model has learned if slides are few."""
    found, rows = data.of(BagSanity), []
    if found is None or not found.encoder:
        rows.append(("random weights of the encoder", "the run has no encoder, or its slides cannot be read"))
    if len(data) < FEWEST_SLIDES:
        rows.append(("whether the model has learned anything", f"this needs at least {FEWEST_SLIDES} slides"))
    return rows


def assess_stability(findings: Findings, scope: Scope) -> None:
    """Add changes of answers and maps; a verdict for each change, and for each method's worst case."""
    if (found := findings.measurements.of(BagStability)) is None:
        return
    for change in CHANGES:
        if change in found.flips:
            changed = findings.estimate(CHANGED_ANSWERS, found.flips[change], change=change)
            findings.estimate(LOGIT_CHANGE, found.logit_change[change], change=change)
            if changed.patches:
                verdict, p = lasting(CHANGE_WORDS[change], changed), interval_p(changed, OFTEN)
                findings.conclude(change, verdict, p, CHANGED_ANSWERS, is_finding=False, change=change)
    for method in scope.methods:
        ranks = {change: found.likeness[change][method] for change in CHANGES if change in found.likeness}
        for change, values in ranks.items():
            findings.estimate(MAP_LIKENESS, values, method=method, change=change)
        worst = findings.estimate(WORST_LIKENESS, np.min(list(ranks.values()), axis=0), method=method)
        if worst.patches:
            findings.conclude(method, keeps_order(worst), interval_p(worst, HALF), WORST_LIKENESS, method=method)


def assess_shortcuts(findings: Findings, scope: Scope) -> None:
    """Add the effects of removing suspects, and the relevance on them, and a verdict for each."""
    if (found := findings.measurements.of(BagShortcuts)) is None:
        return
    for suspect, share in found.share.items():
        shown = share > 0
        findings.estimate(SHOWN, np.where(np.isnan(share), np.nan, shown.astype(np.float64)), suspect=suspect)
        findings.estimate(AREA, np.where(shown, share, np.nan), suspect=suspect)
        for method in scope.methods:
            mass = found.mass[suspect][method]
            if findings.estimate(ATTRIBUTION, mass, suspect=suspect, method=method).patches:
                findings.compare(ATTRIBUTION, mass, share, suspect=suspect, method=method, control="share_of_area")
        one = found.removed[suspect]
        keys = Keys(suspect=suspect, control="equal_area")
        size = findings.compare(REMOVAL_CHANGE, np.abs(one.drop), one.control_size, **keys)
        flips = findings.compare(REMOVAL_FLIPS, one.flips, one.control_flips, **keys)
        if size.difference.patches:
            verdict = free_of(suspect_words(suspect), size, flips, "slide")
            found_one = verdict.outcome == "fails"
            measures = (REMOVAL_CHANGE, REMOVAL_FLIPS)
            findings.conclude(suspect, verdict, flips.p, *measures, is_finding=found_one, suspect=suspect)


def assess_plausibility(findings: Findings, scope: Scope) -> None:
    """Add the agreement of maps with annotations, what removing these does, and verdicts on both."""
    if (found := findings.measurements.of(BagPlausibility)) is None:
        return
    findings.estimate(ANNOTATED_SHARE, np.where(np.isfinite(found.auroc[RANDOM]), found.share, np.nan))
    for name, values in found.auroc.items():
        findings.estimate(AUROC, values, **map_keys(name))
    for method in scope.methods:
        values = found.auroc[method]
        chance = findings.compare(AUROC, values, found.auroc[RANDOM], method=method, control=RANDOM)
        if chance.difference.patches:
            area = findings.measurements.estimate(values)
            findings.conclude(method, meets(area, chance), chance.p, AUROC, method=method)
    (one,) = found.removed.values()
    keys = Keys(control="equal_area")
    drop = findings.compare(REMOVAL_DROP, one.drop, one.control_drop, **keys)
    flips = findings.compare(REMOVAL_ANNOTATED_FLIPS, one.flips, one.control_flips, **keys)
    if drop.difference.patches:
        verdict = depends_on_annotation(drop, flips)
        p, measures = drop.p, (REMOVAL_DROP, REMOVAL_ANNOTATED_FLIPS)
        findings.conclude("annotation", verdict, p, *measures, is_finding=verdict.outcome == "holds")


def meets(area: Estimate, chance: Comparison) -> Verdict:
    """Return whether the most relevant patches are annotated: the `auroc` of slides, against that of noise."""
    question = "Does the map highlight what was annotated?"
    evidence = {"auroc": chance}
    if chance.p < ALPHA and chance.difference.value > 0:
        words = f"In {percent(area.value)} of all pairs, an annotated patch is more relevant than one that is not."
        return Verdict(question, "holds", words, evidence)
    if chance.p < ALPHA and area.high < CHANCE:
        words = "Annotated patches are less relevant than others: the model looks elsewhere."
        return Verdict(question, "fails", words, evidence)
    return Verdict(question, "unclear", "The map matches the annotation no better than chance.", evidence)


def depends_on_annotation(drop: Comparison, flips: Comparison) -> Verdict:
    """Return whether the slide's answer depends on what was annotated: removal, against equal areas elsewhere."""
    question = "Does the slide's answer depend on what was annotated?"
    evidence = {"fall of the logit": drop, "changed answers": flips}
    if drop.p < ALPHA and drop.difference.value > 0:
        words = "Removing the annotated area lowers the logit more than removing an equal area elsewhere"
        share = f", and the answer changes for {percent(flips.difference.value)} more of the slides"
        changed = flips.p < ALPHA and flips.difference.value > 0
        return Verdict(question, "holds", f"{words}{share if changed else ''}.", evidence)
    if drop.difference.patches < ENOUGH:
        return Verdict(question, "unclear", f"Too few slides ({drop.difference.patches}) to tell.", evidence)
    words = "Removing the annotated area lowers the logit no more than removing an equal area elsewhere."
    return Verdict(question, "fails", words, evidence)


def sanity_figures(metrics: Metrics) -> list[Figure]:
    """Return a figure of the maps that stay the same with random weights."""
    titles = {STAYING_MAPS.name: "aggregator", STAYING_ENCODER.name: "encoder"}
    rows = [(f"{row_title(row)}, {titles[row.measure]}", row) for row in metrics.estimates if row.measure in titles]
    axis = "share of maps that stay the same, minus those that are inverted"
    return (
        [IntervalsFigure(rows, axis, "Maps that stay the same with random weights", reference=STAYING)] if rows else []
    )


def stability_figures(metrics: Metrics) -> list[Figure]:
    """Return a figure of the similarity of maps to the original."""
    rows = [
        (f"{method_title(row.method or '')}: {change_title(row.change or '')}", row)
        for row in metrics.estimates
        if row.measure == MAP_LIKENESS.name
    ]
    axis = "rank correlation with the original map; 1: unchanged"
    return [IntervalsFigure(rows, axis, "How stable maps are", reference=HALF)] if rows else []


SANITY = Question(
    Words(
        title="Does the map depend on what the model has learned?",
        how="The weights of the aggregator are replaced by random ones, and the relevance of a slide's patches is "
        "computed again. If it stays the same, it shows the features and not the model. Each random network is paired "
        "with its opposite, so that agreement by chance cancels out. For some patches of each slide the same is done "
        "with the encoder. The answers are also compared with those of random copies: if they vary no more, the "
        "aggregator has learned nothing about such slides.",
        not_proven="The test finds maps that ignore the model. It cannot say which of two methods that pass is better. "
        "It does not notice an encoder that was trained on a different kind of image.",
        source="Adebayo 2018 (arXiv 1810.03292); that it ranks nothing: Binder 2022 (arXiv 2211.12486)",
    ),
    measure_sanity,
    assess_sanity,
    measures=(STAYING_MAPS, STAYING_ENCODER, ANSWER_SPREAD, RANDOM_ANSWER_SPREAD),
    figures=sanity_figures,
    untested=untested_sanity,
)
STABILITY = Question(
    Words(
        title="Are answer and map stable under small changes of the bag?",
        how="Noise of a tenth of their standard deviation is added to the features, they are rounded to 16 bits, and a "
        "random half of the patches is left out. The answer and the order of the patches should stay the same.",
        not_proven="Other changes, such as another laboratory's staining or another encoder, may have a larger effect.",
        source="Yeh 2019 (arXiv 1901.09392) for small changes; ranks in place of sizes, which a smaller bag changes",
    ),
    measure_stability,
    assess_stability,
    measures=(CHANGED_ANSWERS, LOGIT_CHANGE, MAP_LIKENESS, WORST_LIKENESS),
    figures=stability_figures,
)
SHORTCUTS = Question(
    Words(
        title="Does the slide's answer depend on ink, glass or other regions that should not decide?",
        how="All patches that show such a region are removed from the bag, and the model answers again; then the same "
        "number of patches, in areas of the same size, is removed elsewhere. If the answer changes more without the "
        "region, the region is a cause of the answer.",
        not_proven="Only ink and glass that are detected, and regions that are given (--regions), are tested. "
        "Shortcuts that look like tissue, such as a stain used by one hospital only, are not among them: compare "
        "sites and scanners below.",
        source="a removal with equal areas as controls, as HIPPO (arXiv 2409.03080) removes regions",
    ),
    measure_shortcuts,
    assess_shortcuts,
    measures=(SHOWN, AREA, ATTRIBUTION, REMOVAL_CHANGE, REMOVAL_FLIPS),
    figures=shortcuts.figures,
    no_numbers="no patch shows ink or glass; give --regions",
)
PLAUSIBILITY = Question(
    Words(
        title="Does the map highlight what was annotated, and does the answer depend on it?",
        how="The relevance of annotated patches is compared with that of the slide's other patches. Then the annotated "
        "patches are removed, and compared with removing areas of the same size elsewhere.",
        not_proven="A map that looks right does not prove that the model uses what it shows: read this together with "
        "faithfulness. Annotations are coarse.",
        source="area under the ROC curve with ties counting half; removal as in HIPPO (arXiv 2409.03080)",
    ),
    measure_plausibility,
    assess_plausibility,
    measures=(ANNOTATED_SHARE, AUROC, REMOVAL_DROP, REMOVAL_ANNOTATED_FLIPS),
    figures=plausibility.figures,
    no_numbers="no slide of the sample is partly annotated; give --annotations",
)
