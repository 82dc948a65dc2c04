"""Parts of the audit's report: verdicts, the square of faithful and plausible, figures and tables of a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wsi_gradcam.audit.judging_faithfulness import AUROC, SCORE
from wsi_gradcam.audit.judging_maps import RANDOM_ANSWER_SPREAD
from wsi_gradcam.audit.judging_model import GLASS_CALLED, LEAKY
from wsi_gradcam.audit.report.numbers import difference, number, p_text, value
from wsi_gradcam.audit.report.question_figures import figures_of, is_control
from wsi_gradcam.audit.report.words import OUTCOMES, STATES, WORDS, named
from wsi_gradcam.audit.verdict import QUADRANTS
from wsi_gradcam.pages.parts import Html, paragraph, table, text

if TYPE_CHECKING:
    from wsi_gradcam.audit.schema import ComparisonRow, EstimateRow, Metrics, QuadrantRow, VerdictRow

LIKE = 0.9  # rank correlation from which maps are taken for nearly the same


def pill(outcome: str) -> Html:
    """An outcome, as a word with a sign: colour alone would say nothing to some."""
    return Html(f'<span class="state {STATES[outcome]}">{text(OUTCOMES[outcome])}</span>')


def verdict_list(metrics: Metrics) -> str:
    """All verdicts by question, with the evidence beside."""
    parts = []
    for question in dict.fromkeys(verdict.question for verdict in metrics.verdicts):
        cards = "".join(_verdict(metrics, verdict) for verdict in metrics.verdicts if verdict.question == question)
        title = f'<a href="#{text(question)}">{text(question.capitalize())}</a>'
        parts.append(f'<h3>{title}</h3><div class="verdicts">{cards}</div>')
    return "".join(parts)


def _verdict(metrics: Metrics, verdict: VerdictRow) -> str:
    evidence = "".join(f"<li>{text(item)}</li>" for item in _evidence(metrics, verdict))
    of = "" if verdict.of == "model" else f' <span class="of">({text(named(verdict.of))})</span>'
    return (
        f'<div class="verdict"><div>{pill(verdict.outcome)}</div><div><p><strong>{text(verdict.asked)}</strong>{of}</p>'
        f"<p>{text(verdict.words)}</p><ul>{evidence}</ul></div></div>"
    )


def _evidence(metrics: Metrics, verdict: VerdictRow) -> list[str]:
    """The comparisons that a verdict rests on, or else the estimates; and its p."""
    found = [
        f"against {named(row.against)}: {difference(row)}"
        if row.measure == SCORE.name
        else f"{_called(row)}, against {named(row.against)}: {difference(row)}"
        for row in metrics.comparisons
        if row.control is not None and _backs(row, verdict)
    ]
    found = found or [f"{_called(row)}: {value(row)}" for row in metrics.estimates if _backs(row, verdict)]
    return [
        *found,
        *([] if verdict.p_adjusted is None else [f"{p_text(verdict.p_adjusted)}, corrected for all verdicts"]),
    ]


NAMED_OTHERWISE = {measure.name: measure for measure in (AUROC, RANDOM_ANSWER_SPREAD, GLASS_CALLED)}


def _called(row: EstimateRow | ComparisonRow) -> str:
    """What a number says, where the verdict's own words do not tell of whom."""
    other = NAMED_OTHERWISE.get(row.measure)
    return row.what if other is None else other.evidence_of(row)


def _backs(row: EstimateRow | ComparisonRow, verdict: VerdictRow) -> bool:
    """Whether a number is what a verdict rests on."""
    keys = ("question", "method", "baseline", "change", "suspect")
    return row.measure in verdict.measures and all(getattr(row, key) == getattr(verdict, key) for key in keys)


def square(quadrants: Sequence[QuadrantRow]) -> str:
    """Faithful and plausible, with the methods where they belong."""
    if not quadrants:
        return paragraph("Without annotations nothing is known of plausibility, so no method has a place here.")
    cells = ['<div class="name"></div><div class="name">plausible</div><div class="name">implausible</div>']
    for faithful in (True, False):
        cells.append(f'<div class="name">{"faithful" if faithful else "not faithful"}</div>')
        for plausible in (True, False):
            here = [named(q.method) for q in quadrants if (q.faithful, q.plausible) == _pair(faithful, plausible)]
            names = f"<p><strong>{text(', '.join(here))}</strong></p>" if here else ""
            kind = ' class="here"' if here else ""
            cells.append(f"<div{kind}>{names}{text(QUADRANTS[faithful, plausible])}</div>")
    known = {f"{named(q.method)} on {q.patches} patches": "unclear" not in (q.faithful, q.plausible) for q in quadrants}
    unknown = [name for name, is_known in known.items() if not is_known]
    note = paragraph("Both are of the patches through which the border of an annotation runs.")
    note += paragraph(f"One of the two is not known of {', '.join(unknown)}.") if unknown else ""
    return f'<div class="square">{"".join(cells)}</div>{note}'


def question_part(metrics: Metrics, question: str) -> str:
    """A question: how it is answered, figures with controls, all numbers, what a pass does not prove."""
    words = WORDS[question]
    estimates = sorted((r for r in metrics.estimates if r.question == question and r.patches), key=is_control)
    comparisons = [row for row in metrics.comparisons if row.question == question and row.patches]
    numbers = table(
        ("of", "measure", "value (95 % range)", "unit", "patches", "slides"),
        [(named(r.of), r.what, value(r), r.unit, r.patches, r.slides) for r in estimates],
    )
    tests = table(
        ("of", "against", "measure", "difference (95 % range)", "p", "effect (d)"),
        [(named(r.of), named(r.against), r.what, difference(r), number(r.p), number(r.effect)) for r in comparisons],
    )
    figures = "".join(figures_of(metrics, question)) + "".join(map(paragraph, _leaks(estimates)))
    if not estimates and not comparisons:
        return f'<p class="how">{text(words.how)}</p>{paragraph("It was not tested; why stands below.")}'
    return (
        f'<p class="how">{text(words.how)}</p>{figures}'
        f'<p class="how"><strong>What a pass does not prove.</strong> {text(words.not_proven)}</p>'
        f"<details><summary>All numbers of this question</summary>{numbers}{tests if comparisons else ''}"
        f"{paragraph(f'Source: {words.source}.')}</details>"
    )


def _leaks(estimates: Sequence[EstimateRow]) -> list[str]:
    """What the map with a leaky backward says, in words."""
    said = []
    for row in estimates:
        if row.measure == LEAKY.name and row.value is not None:
            like = f"The map of {named(row.of)} with a leaky backward (rank correlation {row.value:.2f})"
            bites = row.value < LIKE
            said.append(
                f"{like} is another: units that are off hold back evidence, which this map does not show."
                if bites
                else f"{like} is nearly the same: hardly anything is hidden by units that are off."
            )
    return said


def _pair(faithful: bool, plausible: bool) -> tuple[str, str]:
    return "holds" if faithful else "fails", "holds" if plausible else "fails"
