"""The pages of an audit, for the archive and each slide: their numbers in words, and the values for their template."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from wsi_gradcam.audit.metrics import QUADRANTS, metrics_of
from wsi_gradcam.audit.plan import REPORT, read_arrays
from wsi_gradcam.audit.questions import question_named
from wsi_gradcam.audit.questions.bag_orders import SRG
from wsi_gradcam.audit.questions.faithfulness import CURVE_FRACTIONS, CURVES, SCORE, WAYS
from wsi_gradcam.audit.report.figures import (
    SHOWN,
    SMALL_PANEL,
    DrawnSlide,
    Example,
    Picture,
    colour_scale,
    curves_figure,
    drawn,
    examples_of,
    outline_colours,
    scale_of,
    smaller,
)
from wsi_gradcam.audit.schema import (
    CONTROLS,
    CurveRow,
    CurvesFigure,
    fill,
    map_keys,
    method_title,
    questions_of,
    reference_title,
    row_title,
)
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import StoreError, one_line
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.pages import render
from wsi_gradcam.results.run_files import RunFolder, folder_name
from wsi_gradcam.run.claims import EVIDENCE

if TYPE_CHECKING:
    from wsi_gradcam.audit.findings import Outcome
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.metrics import ArchiveFacts
    from wsi_gradcam.audit.plan import AuditFolder, AuditPlan
    from wsi_gradcam.audit.report.figures import Svg
    from wsi_gradcam.audit.schema import (
        ComparisonRow,
        EstimateRow,
        Measure,
        Metrics,
        QuadrantRow,
        StrataRow,
        VerdictRow,
        Words,
    )
    from wsi_gradcam.io.paths import StoragePath

OVERVIEW_PX = 1100
UNITS = {
    "logit": "in logits, as in the heatmap",
    "drop": "in logits lost when the place is covered",
    "arbitrary": "in the method's own unit",
}
BARE = ("0 to 1", "-1 to 1", "ratio", "relative")  # units that mean nothing after a number

Cells = tuple[object, ...]


@dataclass(frozen=True)
class Legend:
    """The colours of maps with the value of the strongest."""

    picture: Picture
    scale: float
    unit: str


@dataclass(frozen=True)
class ExampleCard:
    """An example patch: its pictures, the last with leaky gradients if `leaky`, and its curves."""

    title: str
    pictures: Sequence[Picture]
    leaky: bool
    curves: Svg | None


@dataclass(frozen=True)
class VerdictCard:
    """A verdict, and the numbers it rests on in words."""

    row: VerdictRow
    evidence: Sequence[str]


@dataclass(frozen=True)
class SquareCell:
    """A cell of the faithful/plausible square, with the methods that belong in it."""

    faithful: bool
    plausible: bool
    meaning: str
    methods: Sequence[str]


@dataclass(frozen=True)
class QuestionPart:
    """A question of the audit with its figures and tables; if it has no rows, it was not tested."""

    name: str
    words: Words
    figures: Sequence[Svg]
    remarks: Sequence[str]
    estimates: Sequence[Cells]
    comparisons: Sequence[Cells]


def archive_page(
    metrics: Metrics,
    slides: Sequence[str],
    examples: Sequence[Example],
    scale: float,
    path_of: Callable[[str], str] = folder_name,
    looks_at: Sequence[str] = (),
) -> bytes:
    """Return the page of the archive.

    Args:
        slides: those that have pages of their own.
        scale: the map value shown in full colour.
        path_of: returns the path of a slide's folder from the page.
        looks_at: the findings of the run's evidence in words; empty if there is no evidence.
    """
    title = f"Can these explanations be believed? {metrics.run.model}"
    urls = {name: f"{path_of(name)}/{REPORT}" for name in slides}
    return _page(title, metrics, examples, scale, slides=urls, looks_at=looks_at)


def slide_page(
    metrics: Metrics,
    examples: Sequence[Example],
    scale: float,
    overview: Picture | None,
    drawn_slide: DrawnSlide | None = None,
) -> bytes:
    """Return the page of a slide."""
    up = "../" * (metrics.slide.count("/") + 1)
    return _page(
        metrics.slide, metrics, examples, scale, archive_url=up + REPORT, overview=overview, drawn_slide=drawn_slide
    )


def _page(
    title: str,
    metrics: Metrics,
    examples: Sequence[Example],
    scale: float,
    *,
    slides: Mapping[str, str] | None = None,
    archive_url: str = "",
    overview: Picture | None = None,
    drawn_slide: DrawnSlide | None = None,
    looks_at: Sequence[str] = (),
) -> bytes:
    colours = outline_colours(
        [*(() if drawn_slide is None else drawn_slide.names), *(name for example in examples for name in example.names)]
    )
    first, unit_of = metrics.run.methods[0], metrics.run.unit
    units = "patches" if unit_of == "patch" else "slides"
    unit = UNITS[METHOD_INFO[first].unit if unit_of == "patch" else "logit"]
    page = render(
        "audit/report/page.html",
        title=title,
        metrics=metrics,
        methods=[method_title(name) for name in metrics.run.methods],
        units=units,
        counts=Counter(verdict.outcome for verdict in metrics.verdicts),
        archive_url=archive_url,
        overview=overview,
        verdicts=_verdicts(metrics),
        square=square(metrics.quadrants),
        undecided=undecided(metrics.quadrants, units),
        legend=Legend(colour_scale(scale, unit), scale, unit),
        examples=[_card(example, scale, colours) for example in examples],
        outlines=_seen(colours, (name for example in examples for name in example.outlined)),
        drawn_slide=None if drawn_slide is None else drawn_slide.picture(colours),
        slide_outlines={} if drawn_slide is None else _seen(colours, drawn_slide.outlined),
        questions=[_question(metrics, name) for name in questions_of(unit_of) if name in metrics.run.questions],
        strata=[_strata_cells(row) for row in metrics.strata],
        against=[_against_cells(row) for row in metrics.against.comparisons] if metrics.against else [],
        untested=[(row.what, row.why) for row in metrics.not_tested],
        not_audited=[(row.what, row.why) for row in metrics.not_audited],
        slides=slides or {},
        looks_at=looks_at,
        row_title=row_title,
    )
    return page.encode()


def _verdicts(metrics: Metrics) -> Mapping[str, Sequence[VerdictCard]]:
    """Return all verdicts by question."""
    found: dict[str, list[VerdictCard]] = defaultdict(list)
    for verdict in metrics.verdicts:
        found[verdict.question].append(VerdictCard(verdict, _evidence(metrics, verdict)))
    return found


def _evidence(metrics: Metrics, verdict: VerdictRow) -> list[str]:
    """Return the comparisons that a verdict rests on, or otherwise the estimates, and its p, in words."""
    measures = {measure.name: measure for measure in question_named(verdict.question, metrics.run.unit).measures}
    units = "patches" if metrics.run.unit == "patch" else "slides"
    found = [
        f"against {reference_title(row)}: {difference(row, units)}"
        if row.measure in (SCORE.name, SRG.name)
        else f"{_evidence_name(row, measures)}, against {reference_title(row)}: {difference(row, units)}"
        for row in metrics.comparisons
        if row.control is not None and _backs(row, verdict)
    ]
    found = found or [
        f"{_evidence_name(row, measures)}: {value(row)}" for row in metrics.estimates if _backs(row, verdict)
    ]
    return [
        *found,
        *([] if verdict.p_adjusted is None else [f"{p_text(verdict.p_adjusted)}, corrected for all verdicts"]),
    ]


def _evidence_name(row: EstimateRow | ComparisonRow, measures: Mapping[str, Measure]) -> str:
    """Return what a number is called beside a verdict."""
    return fill(measures[row.measure].evidence, row.model_dump(exclude_none=True)) or row.what


def _backs(row: EstimateRow | ComparisonRow, verdict: VerdictRow) -> bool:
    """Return whether a verdict rests on a number."""
    keys = ("question", "method", "baseline", "change", "suspect")
    return row.measure in verdict.measures and all(getattr(row, key) == getattr(verdict, key) for key in keys)


def square(quadrants: Sequence[QuadrantRow]) -> list[SquareCell]:
    """Return the cells of the square, row by row, with the methods that belong in each."""
    places = defaultdict(list)
    for row in quadrants:
        places[row.faithful, row.plausible].append(method_title(row.method))
    outcome: dict[bool, Outcome] = {True: "holds", False: "fails"}
    return [
        SquareCell(faithful, plausible, meaning, places[outcome[faithful], outcome[plausible]])
        for (faithful, plausible), meaning in QUADRANTS.items()
    ]


def undecided(quadrants: Sequence[QuadrantRow], units: str = "patches") -> list[str]:
    """Return the methods that belong nowhere in the square."""
    return [
        f"{method_title(q.method)} on {q.patches} {units}" for q in quadrants if "unclear" in (q.faithful, q.plausible)
    ]


def _card(example: Example, scale: float, colours: Mapping[str, str]) -> ExampleCard:
    curves = _patch_curves(example) if example.curves else None
    return ExampleCard(example.title, example.pictures(scale, colours), example.leaky is not None, curves)


def _seen(colours: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return the colours of names, each once, in the order of all colours."""
    seen = set(names)
    return {name: colour for name, colour in colours.items() if name in seen}


def _patch_curves(example: Example) -> Svg:
    panels = []
    for i, way in enumerate(WAYS):
        rows = [
            CurveRow(
                question="faithfulness",
                measure=CURVES[way].name,
                **map_keys(name),
                of=name,
                what=way,
                x_name="share of the pixels",
                y_name="logit",
                x=list(CURVE_FRACTIONS),
                y=pair[i].tolist(),
            )
            for name, pair in example.curves.items()
        ]
        panels.append((way, [(row_title(row), row) for row in rows]))
    return curves_figure(CurvesFigure(panels, f"{example.title}: curves of deletion and insertion"), SMALL_PANEL)


def _question(metrics: Metrics, name: str) -> QuestionPart:
    question = question_named(name, metrics.run.unit)
    estimates = [row for row in metrics.estimates if row.question == name and row.patches]
    estimates.sort(key=lambda row: row.control in CONTROLS)
    cells = 6 if metrics.run.unit == "patch" else 5  # patches are slides there
    return QuestionPart(
        name,
        question.words,
        [drawn(figure) for figure in question.figures(metrics)],
        question.remarks(metrics),
        [(row_title(r), r.what, value(r), r.unit, r.patches, r.slides)[:cells] for r in estimates],
        [_comparison_cells(row) for row in metrics.comparisons if row.question == name and row.patches],
    )


def _comparison_cells(row: ComparisonRow) -> Cells:
    return row_title(row), reference_title(row), row.what, difference(row), number(row.p), number(row.effect)


def _against_cells(row: ComparisonRow) -> Cells:
    interval = f"{number(row.difference)} ({number(row.low)} to {number(row.high)})"
    return row.of, row.against, row.what, interval, row.unit, number(row.p), number(row.effect)


def _strata_cells(row: StrataRow) -> Cells:
    means = ", ".join(f"{name}: {number(mean)}" for name, mean in row.groups.items())
    return row.by, row.of, row.what, means, number(row.p)


def p_text(p: float) -> str:
    """Return a p as papers give it.

    >>> p_text(0.0341), p_text(1e-9)
    ('p = 0.034', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def value(row: EstimateRow) -> str:
    """Return an estimate with its interval as text."""
    if row.value is None:
        return "no value"
    show = _percent if row.unit == "share" else number
    interval = "" if row.low is None or row.high is None else f" ({show(row.low)} to {show(row.high)})"
    return f"{show(row.value)}{interval}"


def difference(row: ComparisonRow, units: str = "patches") -> str:
    """Return a difference with its interval and unit as text."""
    if row.difference is None:
        return "no value"
    if row.unit == "share":
        return f"{_signed(f'{100 * row.difference:+.0f}')}% ({_percent(row.low)} to {_percent(row.high)})"
    better = "" if row.better is None else f", larger in {100 * row.better:.0f}% of the {units}"
    unit = "" if row.unit in BARE else f" {row.unit}"
    return f"{_signed(f'{row.difference:+.3g}')}{unit} ({number(row.low)} to {number(row.high)}){better}"


def number(found: float | None) -> str:
    """Return a number with three digits; a dash if there is none."""
    return "–" if found is None else _minus(f"{found:.3g}")


def _percent(found: float | None) -> str:
    return "–" if found is None else f"{_minus(f'{100 * found:.0f}')}%"


def _minus(number: str) -> str:
    """Return a number with a proper minus sign, and none before zero."""
    return number.lstrip("-") if float(number) == 0 else number.replace("-", "−")


def _signed(number: str) -> str:
    """Return a number as `_minus` does, with a plus if it is positive."""
    return "0" if float(number) == 0 else _minus(number)


def write_reports(
    folder: AuditFolder, plan: AuditPlan, data: Measurements, metrics: Metrics, archive: ArchiveFacts
) -> None:
    """Write a page for each slide of the sample, and that of the archive."""
    if plan.unit == "slide":
        _write_slide_reports(folder, plan, data, metrics, archive)
        return
    method, digest = plan.run.settings.method[0], plan.audit_digest()
    slides = list(dict.fromkeys(data.slides.tolist()))
    factor = next(shown.factor for shown in plan.run.maps if shown.method == method)
    scale = scale_of(data.patches.maps[method]) * factor
    each = max(1, -(-SHOWN // len(slides)))
    shown: list[Example] = []
    alone = replace(archive, not_audited=())
    for slide in slides:
        own = metrics_of(data.of_slide(slide), plan, alone, slide)
        first = read_arrays(folder.batch(slide, digest, 0))
        examples = examples_of(first, slide, method, factor, plan.run.facts.classes)
        if len(shown) < SHOWN:
            shown += examples[:each]
        page = slide_page(own, examples, scale, _overview(plan, slide), DrawnSlide.of(first, slide))
        folder.slide_report(slide).write(page)
    looks_at = evidence_words(plan.run.out, plan.run_digest)
    folder.report.write(archive_page(metrics, slides, shown[:SHOWN], scale, folder.path_of, looks_at))


def evidence_words(out: StoragePath, run_digest: str) -> list[str]:
    """Return the findings of a run's evidence in words; none if there is no evidence, or it belongs to other results.

    Raises:
        StoreError: it is damaged.
    """
    place = out / EVIDENCE / "evidence.json"
    try:
        found = read_json(place.read(SMALL_BYTES))
        if found["run"] != run_digest:
            return []
        words = [str(finding["words"]) for finding in found["findings"]]
        beside = [str(one) for one in (found.get("against") or {}).get("words", [])]
        return [*words, *beside] if found["worth_sorting"] else [str(found["learned"])]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{place}: damaged ({one_line(error)}); run evidence again with --overwrite") from error


def _write_slide_reports(
    folder: AuditFolder, plan: AuditPlan, data: Measurements, metrics: Metrics, archive: ArchiveFacts
) -> None:
    """Write the same for a slide-level model, where slides were measured."""
    slides, alone = list(dict.fromkeys(data.slides.tolist())), replace(archive, not_audited=())
    for slide in slides:
        own = metrics_of(data.of_slide(slide), plan, alone, slide)
        folder.slide_report(slide).write(slide_page(own, [], 1.0, _overview(plan, slide)))
    folder.report.write(archive_page(metrics, slides, [], 1.0, folder.path_of))


def _overview(plan: AuditPlan, slide: str) -> Picture | None:
    """Return the slide beside its heatmaps, as drawn by the run; None if the run drew none."""
    try:
        return smaller(
            RunFolder(plan.run.out).slide(slide).overview, f"{slide}: the slide and its heatmaps", OVERVIEW_PX
        )
    except FileNotFoundError:
        return None
