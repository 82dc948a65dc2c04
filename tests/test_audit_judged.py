"""Verdicts together, metrics as they are written, and the steps between numbers and both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_gradcam.audit.archive import SIDE_PX, annotated_slide
from wsi_gradcam.audit.findings import UNSURE, Conclusion, Findings, Verdict, corrected, interval_p
from wsi_gradcam.audit.measurements import Estimate, Measurements, arrays_of, joined, record_from
from wsi_gradcam.audit.measures.removal import Curves
from wsi_gradcam.audit.metrics import GroupedNumber, strata
from wsi_gradcam.audit.plan import read_arrays, write_arrays
from wsi_gradcam.audit.questions.faithfulness import CURVE_FRACTIONS, MAIN, ROAD, Faithfulness, score
from wsi_gradcam.audit.questions.sanity import Sanity, Stages
from wsi_gradcam.audit.questions.shortcuts import Shortcuts
from wsi_gradcam.audit.questions.stability import AnswerChange, Stability, steady
from wsi_gradcam.audit.schema import EstimateRow, Keys, Measure, fill, metrics_schema
from wsi_gradcam.errors import AnnotationError, StoreError
from wsi_gradcam.io.paths import storage_path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def conclusion(outcome: Any, p: float, is_finding: bool = True) -> Conclusion:
    return Conclusion("sanity", "gradcam", Verdict("?", outcome, "Words."), p, is_finding)


def measurements(count: int) -> Measurements:
    slides = np.array([f"s{i // 4}" for i in range(count)])
    return Measurements({"base/weight": np.ones(count)}, slides, {}, 0)


def test_a_finding_must_stand_when_corrected() -> None:
    rows = corrected([conclusion("fails", 0.02), *[conclusion("unclear", 0.5)] * 9])
    assert rows[0].outcome == "unclear"
    assert rows[0].words.endswith(UNSURE)
    assert rows[0].p_adjusted == pytest.approx(0.2)
    assert corrected([conclusion("fails", 0.02)])[0].outcome == "fails"
    assert corrected([conclusion("holds", 0.001), *[conclusion("unclear", 0.5)] * 9])[0].outcome == "holds"


def test_what_rests_on_finding_nothing_stays() -> None:
    rows = corrected([conclusion("holds", 0.7, is_finding=False), conclusion("fails", float("nan"))])
    assert [row.outcome for row in rows] == ["holds", "fails"]
    assert rows[1].p is None
    assert rows[1].p_adjusted is None


def test_p_of_an_interval() -> None:
    def estimate(value: float, low: float, high: float) -> Estimate:
        return Estimate(value, low, high, 40, 8, 0, "slide")

    assert interval_p(estimate(0.5, 0.0, 1.0), 0.0) == pytest.approx(0.05, abs=1e-6)
    few, many = estimate(0.5, 0.4, 0.6), Estimate(0.5, 0.4, 0.6, 400, 2, 0, "patch")
    assert interval_p(many, 0.0) < 1e-15 < interval_p(few, 0.0) < 1e-5  # Student's, of 8 slides or 400 patches
    assert interval_p(estimate(0.0, 0.0, 0.0), 0.5) == 0.0
    assert interval_p(estimate(0.5, 0.5, 0.5), 0.5) == 1.0
    assert np.isnan(interval_p(Estimate(np.nan, np.nan, np.nan, 0, 0, 5, "patch"), 0.0))


@pytest.mark.parametrize(("low", "high", "outcome"), [(0.1, 0.3, "holds"), (0.7, 0.9, "fails"), (0.3, 0.7, "unclear")])
def test_a_steady_map(low: float, high: float, outcome: str) -> None:
    share = Estimate((low + high) / 2, low, high, 40, 8, 0, "slide")
    assert steady("noise", share).outcome == outcome


def test_scores_are_half_of_insertion_less_deletion() -> None:
    at = np.array(CURVE_FRACTIONS)
    falling, rising = np.stack([1 - at, 1 - at]), np.stack([at, np.ones(9)])
    np.testing.assert_allclose(score(Curves(falling, rising), MAIN), [0.0, 0.25])
    road = Curves(np.array([[0, 1, 2]] * 2), np.array([[2, 3, 4]] * 2))
    np.testing.assert_allclose(score(road, ROAD), [1.0, 1.0])


def test_means_leave_out_what_was_not_measured() -> None:
    one, values = measurements(4), np.array([1.0, np.nan, 3.0, 4.0])
    curve = np.array([[1.0, 2.0], [np.nan, 0.0], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_allclose(one.mean(curve), [3.0, 4.0])
    rows = Findings("sanity", one)
    assert rows.estimate(Measure("a", "a", "1"), values, method="m").value == pytest.approx(8 / 3)
    assert (rows.estimates[0].patches, rows.estimates[0].missing) == (3, 1)
    rows.curve(Measure("c", "c"), ("x", "y"), [0, 1], curve, interval=True, method="m")
    low, high = rows.curves[0].low, rows.curves[0].high
    assert low is not None
    assert high is not None
    assert all(a is not None and b is not None and a <= m <= b for a, b, m in zip(low, high, [3.0, 4.0], strict=True))
    assert np.isnan(one.mean(np.full((4, 2), np.nan))).all()


def test_strata_are_compared() -> None:
    values = np.repeat([0.0, 10.0], 12) + np.tile([0.0, 1.0, 2.0], 8)
    groups = {"site": {f"s{i}": "north" if i < 3 else "south" for i in range(6)}, "scanner": {"s0": "x"}}
    number = GroupedNumber("faithfulness", Measure("a", "A"), Keys(method="m"), values)
    (row,) = strata(measurements(24), [number], groups)
    assert (row.by, row.question, row.measure, row.method) == ("site", "faithfulness", "a", "m")
    assert (row.of, row.what) == ("m", "A")
    assert row.groups == {"north": 1.0, "south": 11.0}
    assert row.p is not None
    assert row.p < 0.1


def test_records_are_arrays_by_name_and_back() -> None:
    a, b = np.arange(4.0), np.ones((4, 9))
    curves = Faithfulness(curves={"mean": {"gradcam": Curves(b, b + 1), "random": Curves(b, b, b, b)}})
    assert set(arrays_of(curves)) == {
        *(f"faithfulness/mean/gradcam/{part}" for part in ("deletion", "insertion")),
        *(
            f"faithfulness/mean/random/{part}"
            for part in ("deletion", "insertion", "deletion_probability", "insertion_probability")
        ),
    }
    moves = Stability(
        answers={"stain": AnswerChange(logit_change=a, flips=a)},
        noise_as_strong={"stain": AnswerChange(logit_change=a + 1, flips=a)},
        map_change={"stain": {"gradcam": a}, "shift": {"gradcam": a}},
        other_patch={"stain": {"gradcam": a}},
    )
    assert set(arrays_of(moves)) == {
        "stability/stain/logit_change",
        "stability/stain/flips",
        "stability/noise as strong as stain/logit_change",
        "stability/noise as strong as stain/flips",
        "stability/stain/gradcam/map_change",
        "stability/shift/gradcam/map_change",
        "stability/stain/gradcam/other_patch",
    }
    stages = Stages(complexity=b, constant=b, hog=b, resembles=b, spearman=b, spearman_absolute=b, ssim=b)
    random = Sanity(answers=b.astype(np.float32), draws={"m": b}, stages={"m": {"top_down": stages}}, smoothed={"m": a})
    places = Shortcuts(share={"pen": a, "a b (given)": a}, area={"pen": a}, mass={"pen": {"gradcam": a}})
    for record in (curves, moves, random, places):
        arrays = arrays_of(record)
        found = record_from(type(record), dict(sorted(arrays.items(), reverse=True)))
        assert found is not None
        again = arrays_of(found, np.float32)
        assert again.keys() == arrays.keys()
        assert all(array.dtype == np.float32 for array in again.values())
        for name, array in arrays.items():
            np.testing.assert_array_equal(again[name], array)
    assert record_from(Sanity, {"sanity/m/draws": b}) is None
    assert record_from(Stability, {}) is None


def test_what_a_batch_did_not_measure_is_nan() -> None:
    def batch(numbers: list[int], **more: Any) -> dict[str, Any]:
        return {"base/number": np.array(numbers), "base/weight": np.ones(len(numbers)), **more}

    place = {"shortcuts/pen/share": np.array([1.0, 2.0]), "slide/glass_called": np.array([[0.25]]), "shown/rgb": 0}
    found = joined([("a", batch([3, 4], **place)), ("b", batch([5]))], seed=1)
    assert found.slides.tolist() == ["a", "a", "b"]
    np.testing.assert_array_equal(found.arrays["shortcuts/pen/share"], [1.0, 2.0, np.nan])
    assert found.slide_arrays["a"]["slide/glass_called"].tolist() == [0.25]
    assert "shown/rgb" not in found.arrays
    assert found.of_slide("b").arrays["base/number"].tolist() == [5]
    assert found.of_slide("b").slide_arrays == {}


def test_numbers_are_written_and_read(tmp_path: Path) -> None:
    place = storage_path(tmp_path / "a" / "n.npz")
    numbers = {"b/c": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([1, 2])}
    write_arrays(place, numbers)
    data = place.read()
    write_arrays(place, dict(reversed(numbers.items())))
    assert place.read() == data
    found = read_arrays(place)
    assert set(found) == set(numbers)
    np.testing.assert_array_equal(found["b/c"], numbers["b/c"])
    for broken in (data[:50], b"", b"nonsense"):
        place.write(broken)
        with pytest.raises(StoreError, match="damaged"):
            read_arrays(place)


def test_rows_say_what_they_are_about_in_keys_and_in_words() -> None:
    one, values = Findings("faithfulness", measurements(8)), np.arange(8.0)
    score = Measure("score", "score, {baseline}", "logits", evidence="score with {baseline}")
    one.compare(score, values, 0 * values, method="gradcam", control="edges", baseline="mean")
    one.compare(score, values, 0 * values, method="gradcam", other_method="hirescam", baseline="mean")
    one.estimate(Measure("share", "{order} of {{}}", of="{suspect}"), values, suspect="{pen}", order="x")
    first, second = one.comparisons
    assert (first.measure, first.method, first.control, first.other_method) == ("score", "gradcam", "edges", None)
    assert (first.of, first.against, first.what) == ("gradcam", "edges", "score, mean")
    assert (second.other_method, second.control, second.against) == ("hirescam", None, "hirescam")
    assert fill(score.evidence, first.model_dump(exclude_none=True)) == "score with mean"
    assert (one.estimates[0].of, one.estimates[0].what) == ("{pen}", "x of {}")


def test_what_is_no_number_is_null() -> None:
    row = EstimateRow(
        question="q",
        measure="m",
        of="o",
        what="w",
        unit="1",
        value=float("nan"),
        low=float("inf"),
        high=1.0,
        patches=0,
        slides=0,
        missing=0,
        resampled="patch",
    )
    assert json.loads(row.model_dump_json()) | {"high": 1.0} == json.loads(row.model_dump_json())
    assert (row.value, row.low) == (None, None)


def test_the_published_schema_is_the_schema() -> None:
    published = json.loads((DOCS / "audit-metrics.schema.json").read_text(encoding="utf-8"))
    assert published == metrics_schema()


SQUARE = {
    "type": "Feature",
    "properties": {"name": "tumour"},
    "geometry": {"type": "Polygon", "coordinates": [[[100, 200], [164, 200], [164, 232], [100, 232]]]},
}


def test_masks_of_annotations_are_cut_out_of_the_slide(tmp_path: Path) -> None:
    """A rectangle of x 100 to 164 and y 200 to 232, on patches of 64 px."""
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(SQUARE), encoding="utf-8")
    found = annotated_slide(path, "a.svs", (), (1000, 800))
    assert found is not None
    yx = np.array([(200, 100), (184, 132), (600, 600)])
    view = (0.0, 0.0, 64.0, 64.0)
    masks = found.masks([(y, x) for y, x in yx.tolist()], view)
    expected = np.zeros((3, SIDE_PX, SIDE_PX), bool)
    expected[0, :32] = True
    expected[1, 16:48, :32] = True
    np.testing.assert_array_equal(masks, expected)
    np.testing.assert_allclose(found.shares(yx, view), expected.mean(axis=(1, 2)), atol=0.03)
    inner = found.masks([(200, 100)], (16.0, 16.0, 32.0, 32.0))
    np.testing.assert_array_equal(inner[0], np.arange(SIDE_PX)[:, None] < np.full(SIDE_PX, 32))
    other = annotated_slide(path, "a.svs", ("liver",), (1000, 800))
    assert other is not None
    with pytest.raises(AnnotationError, match="no annotation is called 'liver'"):
        other.shares(yx, view)


def test_a_mask_picture_is_cut_likewise(tmp_path: Path) -> None:
    from PIL import Image

    mask = np.zeros((100, 80), np.uint8)
    mask[20:23, 10:16] = 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    found = annotated_slide(tmp_path / "a.png", "a.svs", (), (1000, 800))
    assert found is not None
    (cut,) = found.masks([(200, 100)], (0.0, 0.0, 64.0, 64.0))
    assert cut[:29].any(axis=1).all()
    assert not cut[31:].any()
    assert not cut[:, 62:].any()
    (outside,) = found.masks([(-30, -30)], (0.0, 0.0, 20.0, 20.0))
    assert not outside.any()


def test_a_folder_need_not_have_a_file_for_every_slide(tmp_path: Path) -> None:
    (tmp_path / "a.geojson").write_text(json.dumps(SQUARE), encoding="utf-8")
    assert annotated_slide(tmp_path, "a.svs", (), (10, 10)) is not None
    assert annotated_slide(tmp_path, "folder/a.svs", (), (10, 10)) is not None
    assert annotated_slide(tmp_path, "b.svs", (), (10, 10)) is None
    assert annotated_slide(None, "a.svs", (), (10, 10)) is None


def test_a_picture_of_labels_has_classes_by_value(tmp_path: Path) -> None:
    from PIL import Image

    labels = np.zeros((100, 80), np.uint8)
    labels[20:30, 10:20], labels[20:30, 20:30] = 1, 2
    Image.fromarray(labels).save(tmp_path / "a.tif")
    view = (0.0, 0.0, 100.0, 100.0)
    both = annotated_slide(tmp_path / "a.tif", "a.svs", (), (1000, 800))
    assert both is not None
    regions = both.masks_by_class([(200, 100)], view)
    assert {name: float(mask.mean()) for name, mask in regions.items()} == {"1": 1.0, "2": 0.0}
    with pytest.raises(AnnotationError, match="has the values 0, 1, 2"):
        both.masks([(200, 100)], view)
    chosen = annotated_slide(tmp_path / "a.tif", "a.svs", ("2",), (1000, 800))
    assert chosen is not None
    assert chosen.masks([(200, 100), (200, 200)], view).mean(axis=(1, 2)).tolist() == [0.0, 1.0]
    assert annotated_slide(tmp_path, "a.svs", ("3",), (1000, 800)) is None
    turned = annotated_slide(tmp_path / "a.tif", "a.svs", ("2",), (800, 1000))
    assert turned is not None
    with pytest.raises(AnnotationError, match="do not have the proportions"):
        turned.masks([(200, 100)], view)
