"""From the numbers of patches to `metrics.json`: estimates, curves, verdicts, and what was not tested."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit import judging_faithfulness as of_faith
from wsi_gradcam.audit import judging_maps as of_maps
from wsi_gradcam.audit import judging_model as of_model
from wsi_gradcam.audit.estimates import estimate
from wsi_gradcam.audit.findings import Keys, Measure
from wsi_gradcam.audit.judged import Judged, corrected
from wsi_gradcam.audit.measured import EXPENSIVE, GUIDED, MAIN
from wsi_gradcam.audit.plan import QUESTIONS
from wsi_gradcam.audit.schema import Metrics, QuadrantRow, RunFacts, SampleFacts, UntestedRow, VerdictRow
from wsi_gradcam.audit.spreading import has_overlap
from wsi_gradcam.audit.verdict import Verdict, quadrant
from wsi_gradcam.results.run_files import versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.audit.findings import Findings
    from wsi_gradcam.audit.gathered import Gathered
    from wsi_gradcam.audit.plan import AuditPlan

PROBABILITY = Measure("probability", "probability of the explained class", of="model")
# What is said of a question of which no number came.
WHY_NOT = {
    "plausibility": "no patch of the sample is partly annotated; give --annotations",
    "saturation": "the target is no class, and has no probability",
}


@dataclass(frozen=True)
class About:
    """What metrics tell besides numbers.

    Attributes:
        slides_of_run, patches_of_run: that could be audited.
        not_audited: slides that were not, and why.
        groups: what is told of slides: "site", "scanner", "label" -> slide id -> its value.
        spreads: by slide id and target: means of the spread of overlapping patches, and of the map's size.
    """

    slides_of_run: int
    patches_of_run: int
    not_audited: tuple[UntestedRow, ...] = ()
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    spreads: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)


def metrics_of(gathered: Gathered, plan: AuditPlan, about: About, slide: str = "") -> Metrics:
    """The metrics of the archive, or of a `slide` whose patches alone are in `gathered`."""
    methods = list(plan.run.settings.method)
    sections: list[tuple[Findings, list[Judged]]] = []
    untested: list[UntestedRow] = []
    readable = gathered.only(gathered["base/readable"] == 1)
    deep = readable.only(readable["base/deep"] == 1)
    positive = positive_class(plan)
    for question in plan.settings.only:
        part = deep if question in ("sanity", "locality") else readable
        if not len(part.slides):
            why = "no patch was measured in depth" if len(readable.slides) else "no patch could be read"
            untested.append(UntestedRow(what=question, why=why))
            continue
        if question == "shortcuts":
            section = of_model.shortcuts(part, methods, plan.run.facts.classes, positive)
        else:
            section = SECTIONS[question](part, methods)
        sections.append(section)
        if question == "stability":
            _spread(section[0], about, slide)
        if not section[0].estimates and not section[0].comparisons:
            untested.append(UntestedRow(what=question, why=WHY_NOT.get(question, "nothing could be measured")))
    verdicts = corrected([one for _, judged in sections for one in judged])
    return Metrics(
        slide=slide,
        run=run_facts(plan),
        sample=_sample(gathered, plan, about, slide),
        verdicts=verdicts,
        quadrants=_quadrants(readable, verdicts, methods),
        estimates=[row for rows, _ in sections for row in rows.estimates],
        comparisons=[row for rows, _ in sections for row in rows.comparisons],
        curves=[row for rows, _ in sections for row in rows.curves],
        strata=of_model.strata(readable, _numbers_by_method(readable, plan), about.groups) if not slide else [],
        not_tested=[*untested, *_untested(plan, readable)],
        not_audited=list(about.not_audited),
    )


def positive_class(plan: AuditPlan) -> str:
    """The class that bare glass must not be called: the audited one; of two that both are audited the second; or none.

    That the second of two is the positive one is how nearly all models name their classes.
    """
    if not plan.target.is_class:
        return ""
    if plan.target.index is not None:
        return plan.target.label
    classes = plan.run.facts.classes
    return classes[-1] if len(classes) <= 2 else ""


SECTIONS = {
    "faithfulness": of_faith.faithfulness,
    "sanity": of_maps.sanity,
    "stability": of_maps.stability,
    "plausibility": of_faith.plausibility,
    "locality": of_model.locality,
    "saturation": of_model.saturation,
}


def to_bytes(metrics: Metrics) -> bytes:
    """As it is written: the same metrics give the same bytes."""
    values = metrics.model_dump(mode="json")
    return (json.dumps(values, indent=1, allow_nan=False, ensure_ascii=True) + "\n").encode()


def run_facts(plan: AuditPlan) -> RunFacts:
    """What is audited."""
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
        methods=list(plan.run.settings.method),
        questions=list(plan.settings.only),
        annotations=str(plan.settings.annotations or ""),
        regions=str(plan.settings.regions or ""),
        versions=versions(),
    )


def _spread(rows: Findings, about: About, slide: str) -> None:
    """Where overlapping patches disagree, over the size of the map, in the mean over slides."""
    slides = [slide] if slide in about.spreads else sorted(about.spreads)
    for label in about.spreads[slides[0]] if slides else ():
        pairs = [about.spreads[name][label] for name in slides]
        shares = [_over(pair["spread"], pair["size"]) for pair in pairs]
        ids = np.array(slides, object).astype(np.str_)
        found = estimate(np.array(shares), ids, None, rows.gathered.seed)
        rows.add(of_maps.DISAGREEMENT, found, label=label)


def _over(first: float | None, second: float | None) -> float:
    return first / second if first is not None and second else float("nan")


def _sample(gathered: Gathered, plan: AuditPlan, about: About, slide: str) -> SampleFacts:
    strata: Counter[str] = Counter()
    for name in {*gathered.slides.tolist()}:
        strata.update(plan.samples[name].strata)
    return SampleFacts(
        asked=plan.settings.patches,
        patches=len(gathered.slides),
        deep=int((gathered["base/deep"] == 1).sum()),
        unreadable=int((gathered["base/readable"] == 0).sum()),
        slides=len(set(gathered.slides.tolist())),
        slides_of_run=1 if slide else about.slides_of_run,
        patches_of_run=round(float(gathered.weights.sum())) if slide else about.patches_of_run,
        seed=plan.settings.seed,
        strata=dict(sorted(strata.items())),
    )


def _quadrants(gathered: Gathered, verdicts: Sequence[VerdictRow], methods: Sequence[str]) -> list[QuadrantRow]:
    """Faithful and plausible together, both on the patches of which the annotation tells."""
    plausible = {verdict.of: verdict for verdict in verdicts if verdict.question == "plausibility"}
    found = []
    for method, (faithful, patches) in of_faith.faithful_where_annotated(gathered, methods).items():
        if method in plausible:
            other = plausible[method]
            meaning = quadrant(faithful, Verdict(other.asked, other.outcome, other.words))
            found.append(
                QuadrantRow(
                    method=method, faithful=faithful.outcome, plausible=other.outcome, patches=patches, meaning=meaning
                )
            )
    return found


def _numbers_by_method(gathered: Gathered, plan: AuditPlan) -> list[tuple[str, Measure, Keys, NDArray[np.float64]]]:
    """What is compared between sites and scanners."""
    found: list[tuple[str, Measure, Keys, NDArray[np.float64]]] = []
    for method in plan.run.settings.method:
        if plan.settings.asks("faithfulness"):
            score = of_faith.score_of(gathered, MAIN, method)
            found.append(("faithfulness", of_faith.SCORE, Keys(method=method, baseline=MAIN), score))
        if f"plausibility/{method}/auroc" in gathered:
            auroc = np.asarray(gathered[f"plausibility/{method}/auroc"], np.float64)
            found.append(("plausibility", of_faith.AUROC, Keys(method=method), auroc))
    if "base/probability" in gathered:
        found.append(("", PROBABILITY, Keys(), np.asarray(gathered["base/probability"], np.float64)))
    return found


def _untested(plan: AuditPlan, gathered: Gathered) -> list[UntestedRow]:
    """What was left out, besides questions that were not asked."""
    found = [
        UntestedRow(what=name, why="not asked: see --only") for name in QUESTIONS if name not in plan.settings.only
    ]
    dear = "it runs the model dozens of times for a map; only all weights together were made random"
    found += [
        UntestedRow(what=f"stability of {method}, and its randomisation layer by layer", why=dear)
        for method in plan.run.settings.method
        if method in EXPENSIVE
    ]
    if plan.settings.asks("sanity") and f"sanity/{GUIDED}/draws" not in gathered:
        found.append(
            UntestedRow(
                what="guided backpropagation as the control that must fail",
                why="the model has no ReLU, or several layers are explained",
            )
        )
    if plan.settings.asks("stability") and plan.run_digest and not has_overlap(plan):
        why = "the run's patches do not overlap; explain with --overlap 0.5"
        found.append(UntestedRow(what="where overlapping patches disagree", why=why))
    if plan.settings.asks("shortcuts") and not positive_class(plan):
        why = "no class is known to be the positive one; say which with --target"
        found.append(UntestedRow(what="whether bare glass is called a class of tissue", why=why))
    if not plan.target.is_class:
        found.append(UntestedRow(what="curves of probabilities", why="the target is no class"))
    elif plan.settings.asks("saturation") and not gathered.names("saturation/", "/like_leaky"):
        found.append(UntestedRow(what="maps with a leaky backward", why="the network cannot be cut at one layer"))
    return found
