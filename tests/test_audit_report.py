"""The pages of an audit: well-formed, escaped, with controls in every plot, and nothing from elsewhere."""

from __future__ import annotations

import io
import json
import re
from html import escape
from typing import Any, Unpack

import numpy as np
import pytest
from PIL import Image

from tests.test_run_report import HOSTILE, Page
from wsi_gradcam.audit.metrics import QUADRANTS
from wsi_gradcam.audit.questions import question_named
from wsi_gradcam.audit.questions.faithfulness import CURVE_FRACTIONS, CURVES, SCORE, WAYS, Way
from wsi_gradcam.audit.questions.gradients import LIKE_LEAKY
from wsi_gradcam.audit.questions.shortcuts import AREA, ATTRIBUTION
from wsi_gradcam.audit.report.figures import (
    DrawnSlide,
    Example,
    colour_scale,
    curves_figure,
    examples_of,
    intervals_figure,
    outline_colours,
    overlay,
    scale_of,
)
from wsi_gradcam.audit.report.page import archive_page, difference, p_text, slide_page, square, undecided, value
from wsi_gradcam.audit.schema import (
    CONTROLS,
    QUESTIONS,
    AgainstFacts,
    ComparisonRow,
    CurveRow,
    CurvesFigure,
    EstimateRow,
    IntervalsFigure,
    Keys,
    Measure,
    Metrics,
    QuadrantRow,
    RunFacts,
    SampleFacts,
    StrataRow,
    UntestedRow,
    VerdictRow,
    map_keys,
    row_title,
)
from wsi_gradcam.tissue.annotations import drawn_labels

WORTH = Measure("worth", "agreement with the gradient's prediction")


def estimate_row(question: str, measure: Measure, value: float | None = 0.25, **keys: Unpack[Keys]) -> EstimateRow:
    low, high = (None, None) if value is None else (value - 0.1, value + 0.1)
    return EstimateRow(
        question=question,
        measure=measure.name,
        **keys,
        **measure.texts(keys),
        unit="logits",
        value=value,
        low=low,
        high=high,
        patches=40,
        slides=8,
        missing=0,
        resampled="slide",
    )


def comparison_row(of: str, against: str) -> ComparisonRow:
    return ComparisonRow(
        question="faithfulness",
        measure=SCORE.name,
        method=of,
        control=against,
        baseline="mean",
        of=of,
        against=against,
        what="score, mean",
        unit="logits",
        difference=0.5,
        low=0.4,
        high=0.6,
        p=0.001,
        effect=1.2,
        better=0.9,
        patches=40,
        slides=8,
    )


def curve_row(of: str, way: Way) -> CurveRow:
    keys: Any = {"baseline": "mean", **map_keys(of)}
    y = np.linspace(2.0, 0.0, len(CURVE_FRACTIONS)).tolist()
    return CurveRow(
        question="faithfulness",
        measure=CURVES[way].name,
        **keys,
        **CURVES[way].texts(keys),
        x_name="share",
        y_name="logit",
        x=list(CURVE_FRACTIONS),
        y=y,
        low=y if of == "gradcam" else None,
        high=y if of == "gradcam" else None,
    )


def verdict_row(outcome: Any = "holds", words: str = "The map beats every control.") -> VerdictRow:
    return VerdictRow(
        question="faithfulness",
        method="gradcam",
        baseline="mean",
        measures=[SCORE.name],
        of="gradcam",
        asked="Does it?",
        outcome=outcome,
        words=words,
        p=0.001,
        p_adjusted=0.0301,
        evidence=["random"],
    )


def metrics(**changes: Any) -> Metrics:
    values: dict[str, Any] = {
        "run": RunFacts(
            out="out",
            run_digest="0" * 64,
            audit_digest="1" * 64,
            model="tiny",
            model_digest="2" * 64,
            layer="l",
            classes=["other", "tumour"],
            target="predicted",
            methods=["gradcam"],
            questions=list(QUESTIONS),
            annotations="",
            regions="",
            versions={"python": "3"},
        ),
        "sample": SampleFacts(
            asked=40,
            patches=40,
            deep=24,
            unreadable=1,
            slides=8,
            slides_of_run=20,
            patches_of_run=4000,
            seed=7,
            strata={"tumour": 20},
        ),
        "verdicts": [verdict_row()],
        "quadrants": [],
        "estimates": [
            estimate_row("faithfulness", SCORE, **(map_keys(name) | Keys(baseline="mean")))
            for name in ("gradcam", *CONTROLS)
        ],
        "comparisons": [comparison_row("gradcam", name) for name in CONTROLS],
        "curves": [curve_row(of, way) for of in ("gradcam", *CONTROLS) for way in WAYS],
        "strata": [],
        "not_tested": [],
        "not_audited": [],
    }
    return Metrics(**{**values, **changes})


def example(title: str = "a.svs, patch 3", leaks: bool = False) -> Example:
    random = np.random.default_rng(0)
    at = np.linspace(0, 1, len(CURVE_FRACTIONS))
    rgb = random.integers(0, 255, (20, 30, 3)).astype(np.uint8)
    own, leaky = random.normal(size=(2, 4, 4)).astype(np.float32)
    return Example(title, rgb, own, leaky if leaks else None, {"gradcam": (1 - at, at), "random": (at, at)})


def read(data: bytes) -> tuple[Page, str]:
    text = data.decode()
    drawn = re.sub(r"<svg.*?</svg>|<img[^>]*>", "", text, flags=re.DOTALL)
    return Page(drawn.encode()), text


def test_a_page_is_well_formed_and_says_all() -> None:
    page, text = read(archive_page(metrics(), ["a.svs", "more/b.svs"], [example()], 1.0))
    for question in QUESTIONS:
        assert question_named(question).words.title in page.text
    assert "holds" in page.text
    assert "against noise (control): +0.5 logits (0.4 to 0.6), larger in 90% of the patches" in page.text
    assert "p = 0.03, corrected for all verdicts" in page.text
    assert "40 of 4,000, from 8 of 20 slides" in page.text
    assert 'href="./more/b.svs/report.html"' in text
    assert text.count("<svg") == 3
    assert "seed" in page.text.lower()


def test_the_findings_of_the_evidence_have_a_section_where_there_are_any() -> None:
    words = "65 % of the evidence for <tumour> lies on cluster 1."
    page, text = read(archive_page(metrics(), [], [], 1.0, looks_at=[words]))
    assert words in page.text
    assert 'href="../evidence/report.html"' in text
    page, _ = read(archive_page(metrics(), [], [], 1.0))
    assert "What the model looks at" not in page.text


def test_numbers_have_a_minus_sign_and_no_minus_zero() -> None:
    row = estimate_row("locality", WORTH, -0.25, method="gradcam")
    assert value(row) == "−0.25 (−0.35 to −0.15)"
    assert (
        value(row.model_copy(update={"unit": "share", "value": -0.001, "low": -0.2, "high": 0.0})) == "0% (−20% to 0%)"
    )
    assert value(row.model_copy(update={"low": None})) == "−0.25"
    change = comparison_row("jpeg", "noise")
    assert difference(change.model_copy(update={"unit": "share", "difference": -0.004})) == "0% (40% to 60%)"
    assert difference(change.model_copy(update={"difference": -0.5, "better": None})) == "−0.5 logits (0.4 to 0.6)"
    assert difference(change.model_copy(update={"unit": "0 to 1", "better": None})) == "+0.5 (0.4 to 0.6)"


def test_the_map_with_leaky_gradients_stands_beside() -> None:
    page, text = read(archive_page(metrics(), ["a.svs"], [example(leaks=True)], 1.0))
    assert text.count("data:image/png") == 1 + 3
    assert "leaky gradients, which also pass inactive units" in page.text
    for found, said in ((0.4, "inactive units hide evidence from it"), (0.99, "is nearly the same")):
        page, _ = read(
            archive_page(
                metrics(estimates=[estimate_row("saturation", LIKE_LEAKY, found, method="gradcam")]), [], [], 1.0
            )
        )
        assert said in page.text


def test_the_area_of_suspects_stands_beside_the_attribution() -> None:
    rows = [
        estimate_row("shortcuts", AREA, suspect="pen"),
        estimate_row("shortcuts", ATTRIBUTION, suspect="pen", method="gradcam"),
    ]
    (figure,) = question_named("shortcuts").figures(metrics(estimates=rows))
    assert isinstance(figure, IntervalsFigure)
    assert [name for name, _ in figure.rows] == ["ink: its area (control)", "ink: Grad-CAM"]


def test_everything_is_escaped() -> None:
    hostile = metrics(
        slide=HOSTILE,
        verdicts=[verdict_row(words=HOSTILE)],
        not_tested=[UntestedRow(what=HOSTILE, why=HOSTILE)],
        not_audited=[UntestedRow(what=HOSTILE, why=HOSTILE)],
        strata=[
            StrataRow(
                question="faithfulness",
                measure="score",
                by="site",
                of=HOSTILE,
                what=HOSTILE,
                groups={HOSTILE: 1.0},
                p=0.5,
            )
        ],
    )
    for data in (
        archive_page(hostile, [HOSTILE], [example(HOSTILE)], 1.0),
        slide_page(hostile, [example(HOSTILE)], 1.0, None),
    ):
        page, text = read(data)
        assert "<script" not in text
        assert HOSTILE in page.text


def test_each_plot_shows_its_controls() -> None:
    _, text = read(archive_page(metrics(), [], [], 1.0))
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 2
    ids = [name for figure in figures for name in re.findall(r'\bid="([^"]+)"', figure)]
    assert len(ids) == len(set(ids))
    for figure in figures:
        for reference in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', figure):
            assert next(filter(None, reference)) in ids
        assert "aria-label=" in figure
        assert "<metadata" not in figure


def test_a_figure_is_the_same_each_time_and_takes_what_is_unknown() -> None:
    rows = [(name, curve_row(name, "deletion")) for name in ("gradcam", "random")]
    figure = CurvesFigure([("a", rows)], "description")
    assert curves_figure(figure) == curves_figure(figure)
    empty = CurveRow(question="q", measure="m", of="m", what="w", x_name="x", y_name="y", x=[0, 1], y=[None, None])
    assert "<path" in curves_figure(CurvesFigure([("a", [("m", empty)]), ("b", [])], "empty")).content
    nothing = [("x", estimate_row("q", WORTH, None, method="x"))]
    assert "<path" in intervals_figure(IntervalsFigure(nothing, "axis", "nothing", reference=0.5)).content


def test_figures_do_not_depend_on_the_words_of_rows() -> None:
    """All are found by their keys: rewording changes nothing."""
    whole = metrics()
    reworded = metrics(
        **{
            name: [row.model_copy(update={"of": "x", "what": "y"}) for row in getattr(whole, name)]
            for name in ("estimates", "comparisons", "curves")
        }
    )

    def shapes(found: Metrics) -> list[tuple[str, list[str]]]:
        return [
            (figure.description, [name for _, curves in figure.panels for name, _ in curves])
            if isinstance(figure, CurvesFigure)
            else (figure.description, [name for name, _ in figure.rows])
            for name in QUESTIONS
            for figure in question_named(name).figures(found)
        ]

    assert len(shapes(whole)) == 2
    assert shapes(reworded) == shapes(whole)


@pytest.mark.parametrize(("faithful", "plausible"), list(QUADRANTS))
def test_the_square_marks_where_a_method_is(faithful: bool, plausible: bool) -> None:
    outcome = {True: "holds", False: "fails"}
    row = QuadrantRow(
        method="gradcam",
        patches=40,
        faithful=outcome[faithful],
        plausible=outcome[plausible],
        meaning=QUADRANTS[faithful, plausible],
    )
    cells = {(cell.faithful, cell.plausible): cell for cell in square([row])}
    assert {place for place, cell in cells.items() if cell.methods} == {(faithful, plausible)}
    assert undecided([row]) == []
    _, text = read(archive_page(metrics(quadrants=[row]), [], [], 1.0))
    (here,) = re.findall(r'<div class="here">(.*?)</div>', text)
    assert here == f"<p><strong>Grad-CAM</strong></p>{escape(QUADRANTS[faithful, plausible])}"


def test_the_square_without_annotations_and_with_doubt() -> None:
    page, _ = read(archive_page(metrics(), [], [], 1.0))
    assert "Plausibility can only be judged with annotations" in page.text
    doubt = QuadrantRow(method="gradcam", patches=3, faithful="unclear", plausible="holds", meaning="?")
    page, text = read(archive_page(metrics(quadrants=[doubt]), [], [], 1.0))
    assert "is unclear for Grad-CAM on 3 patches" in page.text
    assert "here" not in re.findall(r'class="(\w+)"', text)


def test_a_comparison_with_another_audit() -> None:
    against = AgainstFacts(
        out="there",
        model="other",
        audit_digest="3" * 64,
        patches=12,
        only_there=4,
        comparisons=[comparison_row("gradcam, here", "gradcam, there")],
    )
    page, _ = read(archive_page(metrics(against=against), [], [], 1.0))
    assert "12 patches are in both audits; the other audit is of other in there" in page.text
    assert page.row("gradcam, here")[3] == "0.5 (0.4 to 0.6)"


def test_examples_are_of_readable_patches() -> None:
    numbers: dict[str, Any] = {
        "base/number": np.arange(3),
        "base/weight": np.ones(3),
        "base/readable": np.array([1, 0, 1]),
        "base/deep": np.ones(3),
        "base/logits": np.zeros((3, 2)),
        "base/logit": np.array([1.0, 9.0, 2.0]),
        "base/probability": np.array([0.6, 0.9, 0.7]),
        "base/class": np.array([0, 0, 1]),
        "shown/rgb": np.zeros((3, 4, 4, 3), np.uint8),
        "map/gradcam": np.ones((3, 2, 2), np.float32),
    }
    found = examples_of(numbers, "a.svs", "gradcam", 16, ("other", "tumour"))
    assert [one.title for one in found] == [
        "a.svs, patch 2, probability of tumour 0.70",
        "a.svs, patch 0, probability of other 0.60",
    ]
    assert found[0].map.tolist() == [[16.0, 16.0], [16.0, 16.0]]
    assert found[0].curves == {}
    assert found[0].outlined == []
    annotated = np.zeros((3, 4, 4), np.bool_)
    annotated[2, :, :2] = True
    bits, names = drawn_labels({"tumour": annotated, "stroma": ~annotated & False}, {"pen": annotated.swapaxes(1, 2)})
    assert bits[2].tolist() == [[5, 5, 4, 4]] * 2 + [[1, 1, 0, 0]] * 2  # both, where both are
    assert json.loads(names) == ["tumour", "stroma", "region: pen"]
    stored = {"shown/drawn": bits, "shown/drawn_names": np.array([names] * 3)}
    outer, inner = examples_of({**numbers, **stored}, "a.svs", "gradcam", 16, ("other", "tumour"))
    assert (outer.outlined, inner.outlined) == (["tumour", "region: pen"], [])
    colours = outline_colours(outer.names)
    lines = [tuple(bytes.fromhex(colours[name][1:])) for name in outer.outlined]
    assert len(set(lines)) == 2
    for picture in outer.pictures(1.0, colours):
        assert "outlines of tumour, region: pen" in picture.description
        with Image.open(io.BytesIO(picture.png)) as image:
            seen = {colour for _, colour in image.getcolors() or ()}
        assert set(lines) <= seen
    assert outer.pictures(1.0, colours)[0].png != inner.pictures(1.0, colours)[0].png
    page, text = read(archive_page(metrics(), [], [outer, inner], 1.0))
    assert "Outlines: annotated classes, and regions" in page.text
    assert "region: pen" in page.text
    assert "stroma" not in page.text  # none of the examples shows it
    assert text.count(f"background: {colours['tumour']}") == 1
    old = {"shown/drawn": np.array([[[0, 1], [2, 2]]] * 3, np.uint8)}  # of an audit by an older version
    assert examples_of({**numbers, **old}, "a.svs", "gradcam", 16, ("other", "tumour"))[0].outlined == [
        "annotated",
        "region: given",
    ]
    arrays = {**numbers, "shown/slide": np.full((1, 8, 8, 3), 90, np.uint8)}
    assert DrawnSlide.of(arrays, "a.svs") is None
    arrays |= {"shown/slide_drawn": np.eye(8, dtype=np.uint32)[None], "shown/slide_names": np.array([names])}
    slide = DrawnSlide.of(arrays, "a.svs")
    assert slide is not None
    _, text = read(slide_page(metrics(slide="a.svs"), [outer], 1.0, None, slide))
    assert 'alt="a.svs: outlines of tumour"' in text
    numbers["base/readable"][:] = 0
    assert examples_of(numbers, "a.svs", "gradcam", 16, ("other", "tumour")) == []
    page, _ = read(archive_page(metrics(), [], [], 1.0))
    assert "No patch could be read." in page.text


def test_maps_share_a_scale() -> None:
    assert scale_of(np.array([0.0, np.nan, -4.0], np.float32)) == pytest.approx(4.0, rel=0.05)
    assert scale_of(np.zeros(3, np.float32)) == 1.0
    rgb = np.full((8, 8, 3), 200, np.uint8)
    weak, strong = (overlay(rgb, np.full((2, 2), value, np.float32), 1.0, "x") for value in (0.01, 1.0))
    assert weak != strong
    assert colour_scale(2.0, "in logits").description == "colours from -2 (blue) over 0 (gray) to 2 (red), in logits"
    page, _ = read(archive_page(metrics(), [], [example()], 2.0))
    assert "blue, against the class: −2; gray: 0; red, for the class: 2 (in logits, as in the heatmap)" in page.text


def test_names_and_p() -> None:
    both = estimate_row("shortcuts", ATTRIBUTION, suspect="pen", method="gradcam")
    verdict = verdict_row().model_copy(update={"question": "stability", "change": "jpeg"})
    control = estimate_row("faithfulness", SCORE, control="random", baseline="mean")
    names = [row_title(row) for row in (both, verdict, control, estimate_row("shortcuts", AREA, suspect="pen"))]
    assert names == ["pen, Grad-CAM", "Grad-CAM, JPEG", "noise (control)", "pen"]
    assert (p_text(0.0341), p_text(1e-5)) == ("p = 0.034", "p < 0.001")
