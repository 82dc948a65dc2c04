"""From measurements to `metrics.json`: estimates, curves, verdicts, and what was not tested."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import Findings, Outcome, Verdict, capitalised, corrected
from wsi_gradcam.audit.measurements import across
from wsi_gradcam.audit.questions import Scope, question_named
from wsi_gradcam.audit.questions.bag_orders import SRG, BagFaithfulness, gains
from wsi_gradcam.audit.questions.bag_trust import CHANGE_WORDS as BAG_CHANGE_WORDS
from wsi_gradcam.audit.questions.bag_trust import BagPlausibility
from wsi_gradcam.audit.questions.faithfulness import MAIN, SCORE, Faithfulness, faithful_where, score
from wsi_gradcam.audit.questions.plausibility import AUROC, Plausibility
from wsi_gradcam.audit.questions.shortcuts import suspect_words
from wsi_gradcam.audit.questions.stability import CHANGE_WORDS
from wsi_gradcam.audit.schema import (
    EXPENSIVE,
    ConclusionRow,
    Keys,
    Measure,
    Metrics,
    QuadrantRow,
    RunFacts,
    SampleFacts,
    StrataRow,
    Unit,
    UntestedRow,
    VerdictRow,
    method_title,
    questions_of,
)
from wsi_gradcam.audit.stages import has_overlap
from wsi_gradcam.cam.targets import PREDICTED
from wsi_gradcam.results.run_files import versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.plan import AuditPlan

PROBABILITY = Measure("probability", "probability of the explained class", of="model")
QUADRANTS = {  # (faithful, plausible)
    (True, True): "The model looks where a pathologist would, and its answer depends on what it sees there.",
    (True, False): "The answer depends on something other than what was annotated: a shortcut, or something new.",
    (False, True): "The map looks right, but the answer does not depend on what it shows: it flatters the model.",
    (False, False): "The map shows neither what the model uses nor what was annotated: it is uninformative.",
}


@dataclass(frozen=True)
class Kind:
    """A kind of verdict in the conclusion: the clause used if it fails, and the noun used if it is unclear."""

    failing: str
    noun: str


# By question and whether it is about the map; suspects, changes and glass have words of their own. Without a clause:
# what belief rests on.
KINDS = {
    ("locality", True): Kind("the map does not show how much the answer would change", "the size of the effects"),
    ("saturation", False): Kind("the model is saturated on most patches", "saturation"),
    ("stability", True): Kind("the map is not reproducible", "the reproducibility of the map"),
    ("sufficiency", True): Kind("no small part of the patches decides", "the number of patches that decide"),
    ("plausibility", True): Kind("the map does not match the annotation", "the match with the annotation"),
    ("plausibility", False): Kind(
        "the answer does not depend on what was annotated", "the influence of what was annotated"
    ),
    ("sanity", True): Kind("", "the dependence of the map on training"),
    ("sanity", False): Kind("", "what the model has learned"),
}
UNTESTED = {"sanity": "dependence on training", "stability": "stability", "shortcuts": "the influence of artefacts"}


@dataclass(frozen=True)
class ArchiveFacts:
    """Facts about the archive that the metrics contain besides numbers of patches.

    Attributes:
        slides_of_run, patches_of_run: numbers of those that could be audited.
        not_audited: slides that were not audited, and why.
        groups: of slides: "site", "scanner", "label" -> slide id -> its value.
        spreads: by slide id and target: means of the spread of overlapping patches, and of the map's magnitude.
    """

    slides_of_run: int
    patches_of_run: int
    not_audited: tuple[UntestedRow, ...] = ()
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    spreads: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupedNumber:
    """A number for each patch [N] that may differ between sites and scanners."""

    question: str
    measure: Measure
    keys: Keys
    values: NDArray[np.float64]


def metrics_of(data: Measurements, plan: AuditPlan, archive: ArchiveFacts, slide: str = "") -> Metrics:
    """Return the metrics of the archive, or of one `slide` if `data` contains only its patches."""
    scope, facts, sample = _scope(plan, archive, slide), run_facts(plan), _sample(data, plan, archive, slide)
    readable = data.only(data.patches.readable == 1)
    sections, untested = _sections(readable, plan, scope)
    verdicts = corrected([one for section in sections for one in section.conclusions])
    return Metrics(
        slide=slide,
        run=facts,
        sample=sample,
        conclusion=conclusion(verdicts, facts, sample),
        verdicts=verdicts,
        quadrants=_quadrants(readable, verdicts, scope.methods),
        estimates=[row for section in sections for row in section.estimates],
        comparisons=[row for section in sections for row in section.comparisons],
        curves=[row for section in sections for row in section.curves],
        strata=strata(readable, _grouped_numbers(readable, scope), archive.groups) if not slide else [],
        not_tested=[*untested, *_untested(plan, readable, scope)],
        not_audited=list(archive.not_audited),
    )


def conclusion(verdicts: Sequence[VerdictRow], run: RunFacts, sample: SampleFacts) -> ConclusionRow:
    """Return the conclusion on the map of the run's first method: a sentence that follows from the verdicts by rule.

    The map can be believed if faithfulness holds and neither its own sanity nor the model's fails. Anything else that
    fails, is unclear, or was not tested is named after that; nothing that fails is left out.
    """
    method = run.methods[0]
    about = [verdict for verdict in verdicts if verdict.method in (method, None)]
    outcome, reasons = _belief({(one.question, one.method is not None): one.outcome for one in about}, run.unit)
    shown = f"the map of {'the predicted class' if run.target == PREDICTED else run.target} ({method_title(method)})"
    plausible = any(one.question == "plausibility" and one.method and one.outcome == "holds" for one in about)
    main = {
        "holds": f"{shown} can be believed where it is hot{' and matches the annotation' * plausible}",
        "fails": f"{shown} cannot be believed{', although it matches the annotation' * plausible}",
        "unclear": f"it is unclear whether {shown} can be believed{', although it matches the annotation' * plausible}",
    }[outcome]
    untested = [words for name, words in UNTESTED.items() if name not in {one.question for one in verdicts}]
    clauses = [
        f"on {_sampled(run, sample)}, {main}{': ' * bool(reasons)}{' and '.join(reasons)}",
        *_failures(about),
        *_sentence_part(_open_points(about), "unclear", "is", "are"),
        *_sentence_part(untested, "not tested", "was", "were"),
    ]
    return ConclusionRow(method=method, outcome=outcome, words=f"{capitalised('; '.join(clauses))}.")


def _belief(outcomes: Mapping[tuple[str, bool], Outcome], unit: Unit) -> tuple[Outcome, list[str]]:
    """Return whether a map can be believed, and why not; `outcomes` by question and whether it is about the map."""
    faithful, units = outcomes.get(("faithfulness", True)), "patches" if unit == "patch" else "slides"
    reasons = {
        f"the model has not learned to tell these {units} apart": outcomes.get(("sanity", False)) == "fails",
        "the answer does not depend on what the map shows": faithful == "fails",
        "the map stays the same when the weights of the model are random": outcomes.get(("sanity", True)) == "fails",
    }
    if any(reasons.values()):
        return "fails", [words for words, is_so in reasons.items() if is_so]
    if faithful == "holds":
        return "holds", []
    untested = "whether the answer depends on what it shows was not tested"
    return "unclear", [f"these {units} do not show whether the answer depends on it" if faithful else untested]


def _failures(about: Sequence[VerdictRow]) -> list[str]:
    """Return what fails besides the basis of `_belief`, with a clause for each kind."""
    failed = [one for one in about if one.outcome == "fails"]
    suspects, changes, map_changes = _suspects(failed), _changes(failed, False), _changes(failed, True)
    clauses = [
        f"the answer depends on {listed(suspects)}" if suspects else "",
        *(f"bare glass is called {one.label}" for one in failed if one.label),
        f"the answer changes under {listed(changes)}" if changes else "",
        f"the map changes under {listed(map_changes)}" if map_changes else "",
        *(KINDS[kind].failing for kind in _kinds(failed)),
    ]
    return [*filter(None, clauses)]


def _open_points(about: Sequence[VerdictRow]) -> list[str]:
    """Return what is unclear besides faithfulness, as nouns."""
    unclear = [one for one in about if one.outcome == "unclear"]
    influences, map_changes = [*_suspects(unclear), *_changes(unclear, False)], _changes(unclear, True)
    nouns = [
        f"the influence of {listed(influences)}" if influences else "",
        *(f"whether bare glass is called {one.label}" for one in unclear if one.label),
        f"the stability of the map under {listed(map_changes)}" if map_changes else "",
        *(KINDS[kind].noun for kind in _kinds(unclear)),
    ]
    return [*filter(None, nouns)]


def _kinds(rows: Sequence[VerdictRow]) -> list[tuple[str, bool]]:
    """Return the kinds of verdicts not about a suspect, a change or glass, in the order of `KINDS`."""
    there = {(one.question, one.method is not None) for one in rows if not (one.suspect or one.change or one.label)}
    return [kind for kind in KINDS if kind in there]


def _suspects(rows: Sequence[VerdictRow]) -> list[str]:
    return [suspect_words(one.suspect) for one in rows if one.suspect]


def _changes(rows: Sequence[VerdictRow], of_map: bool) -> list[str]:
    words = {**BAG_CHANGE_WORDS, **CHANGE_WORDS}
    names = [one.change for one in rows if one.change and (one.method is not None) == of_map]
    return [words.get(name, name) for name in names]


def _sentence_part(nouns: Sequence[str], what: str, one: str, many: str) -> list[str]:
    """Return a clause that says something about nouns; none without nouns."""
    return [f"{listed(nouns)} {one if len(nouns) == 1 else many} {what}"] if nouns else []


def _sampled(run: RunFacts, sample: SampleFacts) -> str:
    if run.unit == "patch" and not run.run_digest:  # patches in memory
        return "this patch" if sample.patches == 1 else f"these {sample.patches:,} patches"
    return "this slide" if sample.slides == 1 else f"these {sample.slides:,} slides"


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence.

    >>> listed(["ink"]), listed(["ink", "glass", "blur"])
    ('ink', 'ink, glass and blur')
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _sections(readable: Measurements, plan: AuditPlan, scope: Scope) -> tuple[list[Findings], list[UntestedRow]]:
    """Return the findings of each question, and the questions without findings."""
    in_depth = readable.only(readable.patches.in_depth == 1)
    sections: list[Findings] = []
    untested: list[UntestedRow] = []
    for name in plan.settings.only:
        question = question_named(name, plan.unit)
        section = Findings(name, in_depth if question.in_depth else readable)
        if not len(section.measurements):
            why = "no patch was measured in depth" if len(readable) else "no patch could be read"
            untested.append(UntestedRow(what=name, why=why))
            continue
        question.assess(section, scope)
        sections.append(section)
        if not section.estimates and not section.comparisons:
            untested.append(UntestedRow(what=name, why=question.no_numbers))
    return sections, untested


def _scope(plan: AuditPlan, archive: ArchiveFacts, slide: str) -> Scope:
    slides = [slide] if slide in archive.spreads else sorted(archive.spreads)
    return Scope(
        methods=plan.methods,
        classes=plan.run.facts.classes,
        positive=positive_class(plan),
        is_class=plan.target.is_class,
        overlaps=has_overlap(plan) if plan.run_digest and plan.unit == "patch" else None,
        disagreement={
            label: {name: _ratio(**archive.spreads[name][label]) for name in slides}
            for label in (archive.spreads[slides[0]] if slides else ())
        },
    )


def _ratio(spread: float | None, size: float | None) -> float:
    return spread / size if spread is not None and size else float("nan")


def positive_class(plan: AuditPlan) -> str:
    """Return the class that bare glass must not get: the audited one; if both of two are audited, the second; or none.

    In nearly all models with two classes, the second is the positive one.
    """
    if not plan.target.is_class:
        return ""
    if plan.target.index is not None:
        return plan.target.label
    classes = plan.run.facts.classes
    return classes[-1] if len(classes) <= 2 else ""


def to_bytes(metrics: Metrics) -> bytes:
    """Return the metrics as written to disk: the same metrics give the same bytes."""
    values = metrics.model_dump(mode="json")
    return (json.dumps(values, indent=1, allow_nan=False, ensure_ascii=True) + "\n").encode()


def run_facts(plan: AuditPlan) -> RunFacts:
    """Return what is audited."""
    facts = plan.run.facts
    return RunFacts(
        out=str(plan.run.out),
        run_digest=plan.run_digest,
        audit_digest=plan.audit_digest(),
        model=facts.name,
        model_digest=facts.digest,
        layer=facts.layer,
        classes=list(facts.classes),
        target=plan.target.label,
        methods=list(plan.methods),
        questions=list(plan.settings.only),
        annotations=str(plan.settings.annotations or ""),
        regions=str(plan.settings.regions or ""),
        versions=versions(),
        unit=plan.unit,
    )


def _sample(data: Measurements, plan: AuditPlan, archive: ArchiveFacts, slide: str) -> SampleFacts:
    slides = set(data.slides.tolist())
    strata = Counter(stratum for name in slides for stratum in plan.samples[name].strata)
    of_slides = plan.unit == "slide"
    return SampleFacts(
        asked=plan.settings.slides if of_slides else plan.settings.patches,
        patches=int(data.arrays["base/bag"].sum()) if of_slides else len(data),
        deep=int((data.patches.in_depth == 1).sum()),
        unreadable=int((data.patches.readable == 0).sum()),
        slides=len(slides),
        slides_of_run=1 if slide else archive.slides_of_run,
        patches_of_run=_patches_of_slide(data) if slide else archive.patches_of_run,
        seed=plan.settings.seed,
        strata=dict(sorted(strata.items())),
    )


def _patches_of_slide(data: Measurements) -> int:
    """Return how many patches a slide has: those of its bag, or those represented by the sample."""
    return round(float(data.arrays.get("base/bag", data.weights).sum()))


def _quadrants(data: Measurements, verdicts: Sequence[VerdictRow], methods: Sequence[str]) -> list[QuadrantRow]:
    """Return faithfulness and plausibility together, both on the patches that the annotation covers.

    On different patches they would be about different tissue.
    """
    found = []
    aurocs = _aurocs(data)
    plausible = {verdict.method: verdict.outcome for verdict in verdicts if verdict.question == "plausibility"}
    for method in methods if aurocs else ():
        rows = np.isfinite(aurocs[method])
        faithful = _faithful_where(data, method, rows)
        if faithful is not None and method in plausible:
            outcomes = faithful.outcome, plausible[method]
            found.append(
                QuadrantRow(
                    method=method,
                    patches=int(rows.sum()),
                    faithful=outcomes[0],
                    plausible=outcomes[1],
                    meaning=quadrant(*outcomes),
                )
            )
    return found


def _aurocs(data: Measurements) -> dict[str, NDArray[np.float64]]:
    """Return how well maps match the annotation, by method; empty if there is none."""
    if (of_patches := data.of(Plausibility)) is not None:
        return {name: np.asarray(one.auroc, np.float64) for name, one in of_patches.maps.items()}
    of_slides = data.of(BagPlausibility)
    return {} if of_slides is None else dict(of_slides.auroc)


def _faithful_where(data: Measurements, method: str, rows: NDArray[np.bool_]) -> Verdict | None:
    some = data.only(rows)
    if len(some) and (found := some.of(BagFaithfulness)) is not None and method in found.most:
        return gains(found, method, some)
    return faithful_where(data, method, rows)


def quadrant(faithful: Outcome, plausible: Outcome) -> str:
    """Return what the two mean together; they are never combined into one number."""
    if "unclear" in (faithful, plausible):
        return "Faithfulness or plausibility is unclear, so nothing can be said about the two together."
    return QUADRANTS[faithful == "holds", plausible == "holds"]


def _grouped_numbers(data: Measurements, scope: Scope) -> list[GroupedNumber]:
    """Return what is compared between sites and scanners."""
    curves, flips, aurocs = data.of(Faithfulness), data.of(BagFaithfulness), _aurocs(data)
    found = []
    for method in scope.methods:
        if curves is not None and method in curves.main:
            keys = Keys(method=method, baseline=MAIN)
            found.append(GroupedNumber("faithfulness", SCORE, keys, score(curves.main[method])))
        if flips is not None and method in flips.most:
            found.append(GroupedNumber("faithfulness", SRG, Keys(method=method), flips.srg(method)))
        if method in aurocs:
            found.append(GroupedNumber("plausibility", AUROC, Keys(method=method), aurocs[method]))
    if data.patches.probability is not None:
        probability = np.asarray(data.patches.probability, np.float64)
        found.append(GroupedNumber("", PROBABILITY, Keys(), probability))
    return found


def strata(
    data: Measurements, numbers: Sequence[GroupedNumber], groups: Mapping[str, Mapping[str, str]]
) -> list[StrataRow]:
    """Return whether numbers of the patches differ between groups of slides.

    Args:
        groups: by kind, such as "site": the group by slide id; slides without a group are left out.
    """
    found = []
    for by, of_slide in groups.items():
        group = np.array([of_slide.get(slide, "") for slide in data.slides.tolist()])
        known = group != ""
        names = sorted(set(group[known].tolist()))
        if len(names) < 2:
            continue
        for one in numbers:
            means = {name: data.only(group == name).estimate(one.values[group == name]).value for name in names}
            found.append(
                StrataRow(
                    question=one.question,
                    measure=one.measure.name,
                    **one.keys,
                    **one.measure.texts(one.keys),
                    by=by,
                    groups=means,
                    p=across(one.values[known], group[known], data.slides[known]),
                )
            )
    return found


def _untested(plan: AuditPlan, data: Measurements, scope: Scope) -> list[UntestedRow]:
    """Return the parts of questions that were left out, and the questions that were."""
    found = [
        UntestedRow(what=name, why="not requested, see --only")
        for name in questions_of(plan.unit)
        if name not in plan.settings.only
    ]
    why = "each map takes dozens of passes through the model; only all weights together were randomised"
    found += [
        UntestedRow(what=f"stability of {method}, and its randomisation layer by layer", why=why)
        for method in scope.methods
        if method in EXPENSIVE and plan.unit == "patch"
    ]
    for name in plan.settings.only:
        found += [
            UntestedRow(what=what, why=why) for what, why in question_named(name, plan.unit).untested(data, scope)
        ]
    if not scope.is_class:
        found.append(UntestedRow(what="curves of probabilities", why="the target is not a class"))
    return found
