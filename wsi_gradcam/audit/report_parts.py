"""Parts of the audit's report: verdicts, the square of faithful and plausible, figures and tables of a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wsi_gradcam.audit.figures import RANDOMLY, curves_figure, intervals_figure
from wsi_gradcam.audit.judging_model import ATTRIBUTION, LEAKY, SHARE_OF_AREA
from wsi_gradcam.audit.likeness import LEVEL
from wsi_gradcam.audit.measured import CONTROLS, COPIES, GUIDED, MAIN
from wsi_gradcam.audit.suspects import in_words
from wsi_gradcam.audit.verdict import QUADRANTS, STAYING
from wsi_gradcam.audit.words import OUTCOMES, STATES, WORDS, named
from wsi_gradcam.page import Html, paragraph, table, text

if TYPE_CHECKING:
    from wsi_gradcam.audit.schema import ComparisonRow, CurveRow, EstimateRow, Metrics, QuadrantRow, VerdictRow

MAIN_SCORE = f"score, {MAIN}"
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
    """The numbers that a verdict rests on, and its p."""
    found = []
    for row in metrics.comparisons:
        if row.question != verdict.question or row.of != verdict.of:
            continue
        if row.what == MAIN_SCORE and row.against in CONTROLS:
            found.append(f"against {named(row.against)}: {difference(row)}")
        elif row.what in verdict.evidence:
            found.append(f"{row.what}, against {row.against}: {difference(row)}")
    for backing in metrics.estimates:
        if _backs(backing, verdict):
            of = " with random weights" if backing.of == COPIES else ""
            found.append(f"{backing.what}{of}: {value(backing)}")
    return [
        *found,
        *([] if verdict.p_adjusted is None else [f"{p_text(verdict.p_adjusted)}, corrected for all verdicts"]),
    ]


def p_text(p: float) -> str:
    """A p as papers give it.

    >>> p_text(0.0341), p_text(1e-9)
    ('p = 0.034', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


BACKING = {
    "sanity": ("maps that stay with random weights", "spread of the answers"),
    "locality": ("worth of the promise",),
    "plausibility": ("auroc",),
    "saturation": ("patches with a saturated probability", "patches without any gradient"),
    "shortcuts": ("patches of bare glass called so",),
}


def _backs(row: EstimateRow, verdict: VerdictRow) -> bool:
    """Whether an estimate is what a verdict rests on."""
    if row.question != verdict.question:
        return False
    if verdict.question == "stability":
        method, _, change = verdict.of.partition(", ")
        return (
            bool(change)
            and row.of == method
            and row.what == f"change of the map with {change}, over that to another patch"
        )
    if row.of == COPIES:
        return verdict.of == "model"
    if verdict.of == "glass alone":
        return row.what in BACKING["shortcuts"]
    return row.of == verdict.of and row.what in BACKING.get(verdict.question, ())


def value(row: EstimateRow) -> str:
    """An estimate in text."""
    if row.value is None:
        return "no number"
    show = _percent if row.unit == "share" else _number
    interval = "" if row.low is None or row.high is None else f" ({show(row.low)} to {show(row.high)})"
    return f"{show(row.value)}{interval}"


def difference(row: ComparisonRow) -> str:
    """A comparison in text."""
    if row.difference is None:
        return "no number"
    if row.unit == "share":
        return f"{_signed(f'{100 * row.difference:+.0f}')} % ({_percent(row.low)} to {_percent(row.high)})"
    better = "" if row.better is None else f", larger in {100 * row.better:.0f} % of the patches"
    return f"{_signed(f'{row.difference:+.3g}')} {row.unit} ({_number(row.low)} to {_number(row.high)}){better}"


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
    estimates = [row for row in metrics.estimates if row.question == question and row.patches]
    comparisons = [row for row in metrics.comparisons if row.question == question and row.patches]
    numbers = table(
        ("of", "measure", "value (95 % range)", "unit", "patches", "slides"),
        [(named(r.of), r.what, value(r), r.unit, r.patches, r.slides) for r in estimates],
    )
    tests = table(
        ("of", "against", "measure", "difference (95 % range)", "p", "effect (d)"),
        [(named(r.of), named(r.against), r.what, difference(r), _number(r.p), _number(r.effect)) for r in comparisons],
    )
    figures = "".join(_figures(metrics, question)) + "".join(map(paragraph, _leaks(estimates)))
    if not estimates and not comparisons:
        return f'<p class="how">{text(words.how)}</p>{paragraph("It was not tested; why stands below.")}'
    return (
        f'<p class="how">{text(words.how)}</p>{figures}'
        f'<p class="how"><strong>What a pass does not prove.</strong> {text(words.not_proven)}</p>'
        f"<details><summary>All numbers of this question</summary>{numbers}{tests if comparisons else ''}"
        f"{paragraph(f'Source: {words.source}.')}</details>"
    )


def _figures(metrics: Metrics, question: str) -> list[Html]:
    curves = [row for row in metrics.curves if row.question == question and any(y is not None for y in row.y)]
    if question == "faithfulness":
        return _faithfulness_figures(metrics, curves)
    if question == "sanity":
        return _sanity_figures(metrics, curves)
    if question == "locality" and curves:
        methods = list(dict.fromkeys(row.of for row in curves))
        panels = [(named(method), [row for row in curves if row.of == method]) for method in methods]
        said = "What steps along the map do, against what the gradient promises; the dashed line is no change"
        return [curves_figure(panels, said, reference=0.0)]
    if question == "stability":
        rows = [
            (f"{named(r.of)}: {named(r.what.split(' with ')[1].split(',')[0])}", r)
            for r in metrics.estimates
            if r.what.endswith("another patch")
        ]
        return (
            [intervals_figure(rows, 0.5, "change of the map; 1 is as far as another patch's", "How far maps move", 0.0)]
            if rows
            else []
        )
    if question == "plausibility":
        rows = [(named(r.of), r) for r in metrics.estimates if r.question == question and r.what == "auroc"]
        return (
            [intervals_figure(rows, 0.5, "area under the ROC curve; chance is 0.5", "How well maps meet annotations")]
            if rows
            else []
        )
    if question == "shortcuts":
        rows = attribution_rows(metrics)
        axis = "share of the positive attribution; gray: share of the area"
        return [intervals_figure(rows, None, axis, "Attribution on suspects", 0.0)] if rows else []
    return []


def _faithfulness_figures(metrics: Metrics, curves: Sequence[CurveRow]) -> list[Html]:
    found = []
    for kind, name in (("", "logits"), (", probability", "probabilities")):
        ways = [
            (way, [row for row in curves if row.what == f"{way}, {MAIN}{kind}"]) for way in ("deletion", "insertion")
        ]
        if any(rows for _, rows in ways):
            panels = [(f"{way}: {'lower' if way == 'deletion' else 'higher'} is better", rows) for way, rows in ways]
            found.append(
                curves_figure(panels, f"Mean curves of deletion and insertion in {name}, all maps and controls")
            )
    rows = [(named(r.of), r) for r in metrics.estimates if r.question == "faithfulness" and r.what == MAIN_SCORE]
    if rows:
        found.append(
            intervals_figure(rows, 0.0, "(insertion − deletion) / 2, in logits", "Scores of all maps and controls")
        )
    slides = [row for row in curves if row.what.startswith("slide, ")]
    if slides:
        labels = list(dict.fromkeys(row.of for row in slides))
        panels = [(f"slide score: {label}", [_ordered(r) for r in slides if r.of == label]) for label in labels[:3]]
        found.append(
            curves_figure(
                panels, "Scores of slides as patches are taken away, most or least relevant first, or at random"
            )
        )
    return found


def attribution_rows(metrics: Metrics) -> list[tuple[str, EstimateRow]]:
    """The attribution on each suspect, with its share of the area, which is what chance would give it, beside."""
    found = []
    for row in metrics.estimates:
        if row.question == "shortcuts" and row.value is not None:
            if row.what == SHARE_OF_AREA:
                found.append((f"{in_words(row.of)}: its area (control)", row))
            elif row.what == ATTRIBUTION:
                suspect, _, method = row.of.partition(", ")
                found.append((f"{in_words(suspect)}: {named(method)}", row))
    return found


def _leaks(estimates: Sequence[EstimateRow]) -> list[str]:
    """What the map with a leaky backward says, in words."""
    said = []
    for row in estimates:
        if row.what == LEAKY and row.value is not None:
            like = f"The map of {named(row.of)} with a leaky backward (rank correlation {row.value:.2f})"
            bites = row.value < LIKE
            said.append(
                f"{like} is another: units that are off hold back evidence, which this map does not show."
                if bites
                else f"{like} is nearly the same: hardly anything is hidden by units that are off."
            )
    return said


def _ordered(row: CurveRow) -> CurveRow:
    """A slide's curve, named by the order in which patches are taken away."""
    order = row.what.removeprefix("slide, ")
    return row.model_copy(update={"of": RANDOMLY if order == "random" else f"{order} relevant first", "what": ""})


def _sanity_figures(metrics: Metrics, curves: Sequence[CurveRow]) -> list[Html]:
    found = []
    said = "Likeness of maps to those of the trained model as layers become random, from the head down"
    for kind, title, chance in (
        ("spearman", "rank correlation with the first map", 0.0),
        ("resembles", "share of maps like the first", 1 - LEVEL),
    ):
        lines = [row.model_copy(update={"y_name": kind}) for row in curves if row.what == f"{kind}, top_down"]
        if lines:
            found.append(curves_figure([(title, lines)], f"{said}: {title}", reference=chance))
    rows = [
        (f"{named(row.of)} (should fail)" if row.of == GUIDED else named(row.of), row)
        for row in metrics.estimates if row.what == "maps that stay with random weights"
    ]  # fmt: skip
    if rows:
        axis = "share of maps that stay, less those that turn into their opposite"
        found.append(intervals_figure(rows, STAYING, axis, "Maps that stay with random weights"))
    return found


def _pair(faithful: bool, plausible: bool) -> tuple[str, str]:
    return "holds" if faithful else "fails", "holds" if plausible else "fails"


def _number(found: float | None) -> str:
    return "–" if found is None else _minus(f"{found:.3g}")


def _percent(found: float | None) -> str:
    return "–" if found is None else f"{_minus(f'{100 * found:.0f}')} %"


def _minus(number: str) -> str:
    """A number with a minus sign, and none before zero."""
    return number.lstrip("-") if float(number) == 0 else number.replace("-", "−")


def _signed(number: str) -> str:
    """As `_minus`, of a number that has a plus where it is positive."""
    return "0" if float(number) == 0 else _minus(number)
