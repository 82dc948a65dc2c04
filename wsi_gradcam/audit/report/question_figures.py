"""Figures of each question of the audit's report, with their controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wsi_gradcam.audit.judging_faithfulness import AUROC, CURVES, SCORE, SLIDE_SCORE
from wsi_gradcam.audit.judging_maps import MAP_CHANGE_RELATIVE, RANDOMISED, STAYING_MAPS
from wsi_gradcam.audit.judging_model import AREA, ATTRIBUTION
from wsi_gradcam.audit.measured import CONTROLS, GUIDED, MAIN
from wsi_gradcam.audit.measures.likeness import LEVEL
from wsi_gradcam.audit.measures.suspects import in_words
from wsi_gradcam.audit.report.figures import curves_figure, intervals_figure
from wsi_gradcam.audit.report.words import named
from wsi_gradcam.audit.verdict import STAYING

if TYPE_CHECKING:
    from wsi_gradcam.audit.report.figures import Svg
    from wsi_gradcam.audit.schema import CurveRow, EstimateRow, Metrics


def figures_of(metrics: Metrics, question: str) -> list[Svg]:
    """The figures of a question."""
    curves = [row for row in metrics.curves if row.question == question and any(y is not None for y in row.y)]
    if question == "faithfulness":
        return _faithfulness_figures(metrics, curves)
    if question == "sanity":
        return _sanity_figures(metrics, curves)
    if question == "locality" and curves:
        methods = list(dict.fromkeys(row.of for row in curves))
        panels = [(named(method), [row for row in curves if row.of == method]) for method in methods]
        said = "What steps along the map do, against what the gradient promises"
        return [curves_figure(panels, said, reference=0.0, named_reference="no change (control)")]
    if question == "stability":
        rows = [
            (f"{named(r.of)}: {named(r.change or '')}", r)
            for r in metrics.estimates
            if r.measure == MAP_CHANGE_RELATIVE.name
        ]
        return (
            [intervals_figure(rows, 0.5, "change of the map; 1 is as far as another patch's", "How far maps move", 0.0)]
            if rows
            else []
        )
    if question == "plausibility":
        rows = [(named(r.of), r) for r in metrics.estimates if r.question == question and r.measure == AUROC.name]
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


def _faithfulness_figures(metrics: Metrics, curves: Sequence[CurveRow]) -> list[Svg]:
    found = []
    main = [row for row in curves if row.baseline == MAIN]
    for kind, name in (("", "logits"), ("_probability", "probabilities")):
        ways = [
            (way, [row for row in main if row.measure == CURVES[f"{way}{kind}"].name])
            for way in ("deletion", "insertion")
        ]
        if any(rows for _, rows in ways):
            panels = [(f"{way}: {'lower' if way == 'deletion' else 'higher'} is better", rows) for way, rows in ways]
            found.append(
                curves_figure(panels, f"Mean curves of deletion and insertion in {name}, all maps and controls")
            )
    scores = [r for r in metrics.estimates if r.measure == SCORE.name and r.baseline == MAIN]
    rows = [(named(row.of), row) for row in sorted(scores, key=is_control)]
    if rows:
        found.append(
            intervals_figure(rows, 0.0, "(insertion − deletion) / 2, in logits", "Scores of all maps and controls")
        )
    slides = [row for row in curves if row.measure == SLIDE_SCORE.name]
    if slides:
        labels = list(dict.fromkeys(row.label for row in slides))
        panels = [(f"slide score: {label}", [_ordered(r) for r in slides if r.label == label]) for label in labels[:3]]
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
            suspect = in_words(row.suspect or "")
            if row.measure == AREA.name:
                control = row.model_copy(update={"control": "share_of_area"})
                found.append((f"{suspect}: its area (control)", control))
            elif row.measure == ATTRIBUTION.name:
                found.append((f"{suspect}: {named(row.method or '')}", row))
    return found


def _ordered(row: CurveRow) -> CurveRow:
    """A slide's curve, named by the order in which patches are taken away."""
    if row.order == "random":
        return row.model_copy(update={"of": "at random (control)", "what": "", "control": "random"})
    return row.model_copy(update={"of": f"{row.order} relevant first", "what": ""})


def _sanity_figures(metrics: Metrics, curves: Sequence[CurveRow]) -> list[Svg]:
    found = []
    said = "Likeness of maps to those of the trained model as layers become random, from the head down"
    for kind, title, name, chance in (
        ("spearman", "how the maps' ranks agree with the first map", "rank correlation", 0.0),
        ("resembles", "maps like the first, more than 95 % of its permutations", "share of the patches", 1 - LEVEL),
    ):
        lines = [
            row.model_copy(update={"y_name": name})
            for row in curves
            if row.measure == RANDOMISED[kind].name and row.order == "top_down"
        ]
        if lines:
            found.append(curves_figure([(title, lines)], f"{said}: {title}", reference=chance))
    rows = [
        (f"{named(row.of)} (should fail)" if row.method == GUIDED else named(row.of), row)
        for row in metrics.estimates
        if row.measure == STAYING_MAPS.name
    ]
    if rows:
        axis = "share of maps that stay, less those that turn into their opposite"
        found.append(intervals_figure(rows, STAYING, axis, "Maps that stay with random weights"))
    return found


def is_control(row: EstimateRow) -> bool:
    """Whether it is of a map that knows nothing of the model."""
    return row.control in CONTROLS
