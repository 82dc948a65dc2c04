"""Annotations beside maps: outlines as they were drawn, and agreement as scikit-learn and a plain FROC have it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from tests.viewer_runs import MARKER_PX, MARKERS, SIZES, client, facts_of, make_run, plant, plant_annotations, square
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.results.run import open_result
from wsi_gradcam.viewer import annotations as measured
from wsi_gradcam.viewer.annotations import AnnotationFiles, agreement_of, detections, froc
from wsi_gradcam.viewer.archive import Archive

Values = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
SLIDE = "a.tif"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = make_run(tmp_path_factory.mktemp("annotations"))
    plant(found, SLIDE)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_agreement_is_that_of_scikit_learn(seed: int) -> None:
    """To 1e-6, with ties, however few or many pixels are annotated."""
    draw = np.random.default_rng(seed)
    inside = draw.random(500) < draw.uniform(0.01, 0.9)
    inside[:2] = True, False
    values = (draw.normal(size=500) + inside * draw.uniform(-1, 2)).astype(np.float32)
    if seed % 2:
        values = np.round(values, 1)
    found = agreement_of(values, inside, (0.0, 1.0))
    assert found["auroc"] == pytest.approx(roc_auc_score(inside, values), abs=1e-6)
    assert found["ap"] == pytest.approx(average_precision_score(inside, values), abs=1e-6)
    assert found["chance"] == inside.mean()
    assert found["dice"] == pytest.approx(max(f1_score(inside, values >= t) for t in np.unique(values)), abs=1e-6)
    assert f1_score(inside, values >= found["threshold"]) == pytest.approx(found["dice"], abs=1e-6)
    for threshold, dice in found["curve"][::7]:
        assert dice == pytest.approx(f1_score(inside, values >= threshold, zero_division=0), abs=1e-6)


def test_where_nothing_or_all_is_annotated_there_is_no_agreement() -> None:
    for inside in (np.zeros(5, np.bool_), np.ones(5, np.bool_)):
        found = agreement_of(np.arange(5, dtype=np.float32), inside, (0.0, 1.0))
        assert (found["auroc"], found["ap"], found["dice"], found["curve"]) == (None, None, None, [])


def plain_peaks(values: Values, known: Mask, reach: int) -> list[tuple[int, int]]:
    """By the definition, for values that are all different."""
    height, width = values.shape
    found = []
    for y in range(height):
        for x in range(width):
            near = slice(max(0, y - reach), y + reach + 1), slice(max(0, x - reach), x + reach + 1)
            if known[y, x] and values[y, x] > values[known].min() and values[y, x] >= values[near][known[near]].max():
                found.append((y, x))
    return found


def plain_froc(peaks: list[tuple[float, int]], count: int) -> list[float]:
    """Sensitivity by the number of false positives that are allowed: every threshold is tried."""
    found = []
    for rate in measured.FROC_RATES:
        best = 0.0
        for threshold in {value for value, _ in peaks}:
            called = [lesion for value, lesion in peaks if value >= threshold]
            if called.count(0) <= rate:
                best = max(best, len(set(called) - {0}) / count)
        found.append(best)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_froc_is_that_of_a_plain_one(seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = draw.permutation(30 * 40).reshape(30, 40).astype(np.float32)
    known = draw.random((30, 40)) < 0.8
    lesions = np.zeros((30, 40), np.int32)
    count = int(draw.integers(1, 7))
    for number in range(count):
        y, x = 5 * (number // 3), 13 * (number % 3)
        lesions[y : y + 4, x : x + 5] = number + 1
    peaks = plain_peaks(values, known, 2)
    expected = sorted(((float(values[place]), int(lesions[place])) for place in peaks), reverse=True)
    heights, where = detections(values, known, lesions, 2)
    assert [*zip(heights.tolist(), where.tolist(), strict=True)] == expected
    found = froc(heights, where, count)
    assert found is not None
    assert found["sensitivity"] == pytest.approx(plain_froc(expected, count), abs=1e-6)
    assert found["score"] == pytest.approx(np.mean(plain_froc(expected, count)), abs=1e-6)


def test_a_plateau_is_one_detection_and_a_flat_map_none() -> None:
    values = np.zeros((9, 9), np.float32)
    values[2:5, 3:6] = 1
    known = np.ones_like(values, np.bool_)
    heights, where = detections(values, known, (values > 0).astype(np.int32), 1)
    assert (heights.tolist(), where.tolist()) == ([1.0], [1])
    assert not len(detections(np.zeros_like(values), known, np.zeros((9, 9), np.int32), 1)[0])
    assert froc(heights, where, 0) is None


def test_outlines_and_agreement_of_a_slide(out: Path, tmp_path: Path) -> None:
    """Where the map is the markers themselves, it agrees with their outlines wholly, and finds both."""
    plant_annotations(tmp_path, SLIDE, square(300, 400, 200, "stroma"))
    with client(out, annotations=tmp_path) as server:
        key = facts_of(server, SLIDE)["key"]
        facts = server.get(f"/api/slides/{key}/annotations").json()
        assert (facts["file"], facts["problem"]) == (f"{SLIDE}.geojson", None)
        classes = {found["name"]: found for found in facts["classes"]}
        assert list(classes) == ["marker", "stroma"]
        assert classes["marker"]["colour"] != classes["stroma"]["colour"]
        corners = np.array(classes["marker"]["outlines"][0]).reshape(-1, 2)
        y, x = MARKERS[SLIDE][0]
        assert corners.min(axis=0).tolist() == [y - MARKER_PX / 2, x - MARKER_PX / 2]
        assert corners.max(axis=0).tolist() == [y + MARKER_PX / 2, x + MARKER_PX / 2]
        found = server.get(f"/api/slides/{key}/agreement", params={"class": "marker"}).json()
        first = found["channels"][0]
        assert first["auroc"] > 0.999
        assert first["ap"] > 0.99
        assert first["dice"] > 0.95
        assert (found["lesions"], first["froc"]["sensitivity"]) == (2, [1.0] * 6)
        assert server.get(f"/api/slides/{key}/agreement", params={"class": "none"}).status_code == 404
        other = facts_of(server, "inner/b.tif")["key"]
        assert server.get(f"/api/slides/{other}/annotations").json()["classes"] == []
        assert server.get(f"/api/slides/{other}/agreement", params={"class": "marker"}).status_code == 404


def test_outlines_are_sent_once(out: Path, tmp_path: Path) -> None:
    """They may be megabytes: a page that has them is told that they are still the same, until the file changes."""
    plant_annotations(tmp_path, SLIDE)
    with client(out, annotations=tmp_path) as server:
        address = f"/api/slides/{facts_of(server, SLIDE)['key']}/annotations"
        first = server.get(address)
        known = {"If-None-Match": first.headers["ETag"]}
        assert server.get(address, headers=known).status_code == 304
        plant_annotations(tmp_path, SLIDE, square(300, 400, 200, "stroma"))
        changed = server.get(address, headers=known)
        assert (changed.status_code, len(changed.json()["classes"])) == (200, 2)


def test_a_mask_is_traced_and_a_changed_file_read_anew(out: Path, tmp_path: Path) -> None:
    height, width = (side // 4 for side in SIZES[SLIDE])
    labels = np.zeros((height, width), np.uint8)
    labels[50:100, 60:120], labels[200:240, 300:330] = 1, 2
    Image.fromarray(labels).save(tmp_path / f"{SLIDE}.png")
    served = Archive(out)
    slide = served.find_by_id(SLIDE)
    files = AnnotationFiles(served, tmp_path)
    found = files.of(slide)
    assert found is not None
    assert list(found.outlines) == ["1", "2"]
    points = np.concatenate(found.outlines["1"])
    np.testing.assert_allclose(points.min(axis=0), np.array((50, 60)) * 4, atol=4)
    np.testing.assert_allclose(points.max(axis=0), np.array((100, 120)) * 4, atol=4)
    assert files.of(slide) is found
    Image.fromarray(labels * (labels == 1)).save(tmp_path / f"{SLIDE}.png")
    changed = files.of(slide)
    assert changed is not None
    assert list(changed.outlines) == ["1"]


def test_what_cannot_be_read_is_told_and_hides_nothing_else(out: Path, tmp_path: Path) -> None:
    (tmp_path / f"{SLIDE}.geojson").write_text("[", encoding="utf-8")
    with client(out, annotations=tmp_path) as server:
        key = facts_of(server, SLIDE)["key"]
        facts = server.get(f"/api/slides/{key}/annotations").json()
        assert "not a JSON file" in facts["problem"]
        assert facts["classes"] == []
    with pytest.raises(ConfigError, match="--annotations"):
        AnnotationFiles(Archive(out), tmp_path / "gone")
    with pytest.raises(ConfigError, match="one file of --annotations for 3 slides"):
        AnnotationFiles(Archive(out), tmp_path / f"{SLIDE}.geojson")


def test_very_many_points_are_thinned_and_it_is_told(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    angles = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    ring = np.stack([700 + 300 * np.cos(angles), 800 + 300 * np.sin(angles)], axis=1).tolist()
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (tmp_path / f"{SLIDE}.geojson").write_text(json.dumps(feature), encoding="utf-8")
    monkeypatch.setattr(measured, "MAX_POINTS", 500)
    archive = Archive(out)
    found = AnnotationFiles(archive, tmp_path).of(archive.find_by_id(SLIDE))
    assert found is not None
    (thin,) = found.outlines[""]
    assert len(thin) <= 500
    assert found.simplified >= 1
    radius = np.hypot(thin[:, 0] - 800, thin[:, 1] - 700)
    np.testing.assert_allclose(radius, 300, atol=found.simplified)


def test_agreement_is_measured_on_a_level_that_is_small_enough(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_annotations(tmp_path, SLIDE)
    result = open_result(out)[SLIDE]
    archive = Archive(out)
    found = AnnotationFiles(archive, tmp_path).of(archive.find_by_id(SLIDE))
    assert found is not None
    assert found.drawn is not None
    fine = measured.agreement(result, found.drawn, "marker")
    monkeypatch.setattr(measured, "MAX_PX", 3000)
    coarse = measured.agreement(result, found.drawn, "marker")
    assert coarse["um_per_px"] > fine["um_per_px"]
    assert coarse["pixels"] < fine["pixels"]
    assert coarse["channels"][0]["auroc"] > 0.99
