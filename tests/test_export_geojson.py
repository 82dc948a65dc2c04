"""Regions are exactly the hot pixels before they are simplified, and GeoJSON is what its specification says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import shapely
from geojson_pydantic import FeatureCollection
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from matplotlib.path import Path as Outline

from tests.made_results import PATCH_PX, Made, make, steps
from wsi_gradcam.export import Options, export
from wsi_gradcam.export import shapes as outlining
from wsi_gradcam.export.geojson import annotation_features
from wsi_gradcam.export.job import Job
from wsi_gradcam.export.shapes import TooManyRunsError, hot_regions, outlines
from wsi_gradcam.results.run import open_result

Mask = npt.NDArray[np.bool_]
MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))
STRIDE, SIZE = 8, (1601, 2003)
SHAPE = (201, 251)
THRESHOLD = -0.5  # what lies above has holes


def drawn(polygons: list[shapely.Polygon], shape: tuple[int, int], step: float = 1) -> npt.NDArray[np.int64]:
    """How many polygons hold each pixel's centre, by matplotlib: an even-odd count of rings."""
    y, x = (np.mgrid[: shape[0], : shape[1]] + 0.5) * step
    centres = np.stack([x.ravel(), y.ravel()], axis=1)
    total = np.zeros(shape, np.int64)
    for polygon in polygons:
        rings = [polygon.exterior, *polygon.interiors]
        inside = sum(Outline(shapely.get_coordinates(ring)).contains_points(centres).astype(int) for ring in rings)
        total += (np.asarray(inside) % 2).reshape(shape)
    return total


@given(MASKS, st.lists(st.integers(0, 12), max_size=3))
def test_outlines_are_exactly_the_hot_pixels_however_they_are_cut(mask: Mask, cuts: list[int]) -> None:
    bands = [band for band in np.split(mask, sorted(cuts)) if len(band)]
    found = outlines(bands, 1 << 62)
    assert all(polygon.is_valid for polygon in found)
    np.testing.assert_array_equal(drawn(found, mask.shape), mask)
    whole = outlines([mask], 1 << 62)
    assert {polygon.normalize().simplify(0).normalize() for polygon in found} == {
        polygon.normalize().simplify(0).normalize() for polygon in whole
    }


@given(MASKS)
def test_there_is_a_polygon_for_each_piece_and_a_hole_for_each_gap(mask: Mask) -> None:
    found = outlines([mask], 1 << 62)
    assert len(found) == pieces(mask)
    gaps = pieces(np.pad(~mask, 1, constant_values=True), corners=True) - 1
    rings = sum(len(polygon.interiors) for polygon in found)
    # A gap that touches itself or another at a corner may be ringed as one hole or as several.
    assert (rings > 0) == (gaps > 0) or rings >= gaps


def pieces(mask: Mask, *, corners: bool = False) -> int:
    """How many groups of pixels that share a side, or a corner, by flooding."""
    left, count = {(int(y), int(x)) for y, x in np.argwhere(mask)}, 0
    near = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (corners or y == 0 or x == 0) and (y, x) != (0, 0)]
    while left:
        count += 1
        reached = [left.pop()]
        for y, x in reached:
            fresh = {(y + dy, x + dx) for dy, dx in near} & left
            left -= fresh
            reached += fresh
    return count


def test_a_mask_becomes_annotations_of_a_class() -> None:
    mask = np.zeros((60, 90), np.bool_)
    mask[10:40, 20:70] = True
    mask[20:30, 30:40] = False
    (feature,) = annotation_features(mask, "tumour")
    polygon = shapely.geometry.shape(feature["geometry"])
    assert polygon.bounds == (20, 10, 70, 40)
    assert polygon.area == 30 * 50 - 10 * 10
    assert feature["properties"]["classification"]["name"] == "tumour"


def test_no_image_has_no_outlines() -> None:
    assert outlines([], 9) == []
    with pytest.raises(TooManyRunsError):
        outlines([np.eye(9, dtype=np.bool_)], 9)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    slide = Made(SIZE, steps(SHAPE), stride=STRIDE)
    return make(tmp_path_factory.mktemp("made") / "out", {"a.svs": slide})


@pytest.fixture
def job(out: Path, tmp_path: Path) -> Job:
    return Job(open_result(out)["a.svs"], tmp_path / "a.svs", Options(threshold=THRESHOLD, window="slide"))


def hot(job: Job, level: int = 0) -> Mask:
    values, flags = job.slide.heatmap("tumour", level).values, job.slide.coverage(level).values
    return np.asarray((flags & 2 > 0) & (values >= THRESHOLD))


def test_regions_lie_where_the_heatmap_is_hot(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlining, "CHUNK", 50)  # rows at a time: seams cross the regions
    found = hot_regions(job, job.slide.channel("tumour"), simplified=False)
    assert (found.level, found.threshold) == (0, THRESHOLD)
    inside = drawn(found.polygons, SHAPE, STRIDE)
    expected = hot(job)
    np.testing.assert_array_equal(inside[:-1, :-1], expected[:-1, :-1])  # the last pixels' centres may lie outside
    bounds = shapely.total_bounds(found.polygons)
    assert bounds[0] >= 0
    assert bounds[1] >= 3 * STRIDE
    assert (bounds[2], bounds[3]) <= (SIZE[1], SIZE[0])
    assert any(polygon.interiors for polygon in found.polygons)


def test_simplified_regions_are_nearly_the_same_with_far_fewer_corners(job: Job) -> None:
    channel = job.slide.channel("tumour")
    exact, simple = (hot_regions(job, channel, simplified=flag).polygons for flag in (False, True))
    assert len(exact) == len(simple)
    assert all(polygon.is_valid for polygon in simple)
    for before, after in zip(exact, simple, strict=True):
        assert before.symmetric_difference(after).area <= 0.75 * STRIDE * before.length
        assert before.hausdorff_distance(after) <= 1.5 * STRIDE
        assert len(before.interiors) == len(after.interiors)
    corners = [sum(len(shapely.get_coordinates(p)) for p in polygons) for polygons in (exact, simple)]
    assert corners[1] < corners[0] / 2


def test_too_long_borders_are_traced_on_a_coarser_level(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlining, "MAX_RUNS", 10)
    found = hot_regions(job, job.slide.channel("tumour"), simplified=False)
    assert found.level == len(job.slide.levels) - 1 > 0
    shape, step = job.slide.levels[found.level], STRIDE * 2**found.level
    inside = drawn(found.polygons, shape, step)
    np.testing.assert_array_equal(inside[:-1, :-1], hot(job, found.level)[:-1, :-1])


def collections(out: Path, dest: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Patches and regions, checked against the specification's models."""
    (done,) = export(out, "geojson", dest, **options)
    assert [path.name for path in done.paths] == ["a.svs.patches.geojson", "a.svs.0-gradcam-tumour.regions.geojson"]
    patches, found = (json.loads(path.read_text()) for path in done.paths)
    for collection in (patches, found):
        FeatureCollection.model_validate(collection)
        assert len({feature["id"] for feature in collection["features"]}) == len(collection["features"])
    return patches, found


def test_patches_are_detections_with_their_measurements(out: Path, tmp_path: Path) -> None:
    patches, _ = collections(out, tmp_path)
    table = open_result(out)["a.svs"].patches
    assert len(patches["features"]) == len(table)
    for feature, (_, row) in zip(patches["features"], table.iterrows(), strict=True):
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        box = shapely.box(row["x"], row["y"], row["x"] + PATCH_PX, row["y"] + PATCH_PX)
        assert shapely.from_geojson(json.dumps(feature["geometry"])).equals(box)
        if row["status"] == "unreadable":
            assert properties["classification"]["name"] == "unreadable"
            assert properties["measurements"] == {"tissue": 1.0}
        else:
            best = "tumour" if row["logit_tumour"] > row["logit_other"] else "other"
            assert properties["classification"]["name"] == best
            assert properties["measurements"]["cam_mean_tumour"] == row["cam_mean_tumour"]


def test_regions_are_annotations(out: Path, tmp_path: Path) -> None:
    _, found = collections(out, tmp_path, threshold=0.5)
    assert len(found["features"]) > 3
    for feature in found["features"]:
        polygon = shapely.from_geojson(json.dumps(feature["geometry"]))
        assert isinstance(polygon, shapely.Polygon)
        assert polygon.is_valid
        assert polygon.exterior.is_ccw  # RFC 7946, section 3.1.6
        assert not any(ring.is_ccw for ring in polygon.interiors)
        properties = feature["properties"]
        assert (properties["objectType"], properties["classification"]["name"]) == ("annotation", "tumour hot")
        assert properties["classification"]["color"] == [0x00, 0x72, 0xB2]  # of class 1, as its patches have
        assert properties["measurements"]["area µm²"] == pytest.approx(polygon.area * 0.25 * 0.3)


def test_nothing_hot_is_an_empty_collection(out: Path, tmp_path: Path) -> None:
    _, found = collections(out, tmp_path, threshold=1000.0)
    assert found["features"] == []


def test_the_same_object_has_the_same_id(out: Path, tmp_path: Path) -> None:
    first, second = (collections(out, tmp_path / name)[0]["features"] for name in "ab")
    assert [feature["id"] for feature in first] == [feature["id"] for feature in second]


def test_qupath_s_folder_has_all_that_its_script_names(out: Path, tmp_path: Path) -> None:
    from PIL import Image

    (done,) = export(out, "qupath", tmp_path, threshold=THRESHOLD)
    (folder,) = done.paths
    script = (folder / "show_in_qupath.groovy").read_text()
    lines = [line.strip(" ,") for line in script.splitlines() if line.startswith("    ['overlay-")]
    parts = [json.loads(line.replace("'", '"')) for line in lines]
    assert f"new File('{folder}')" in script
    assert f"server.getWidth() == {SIZE[1]} && server.getHeight() == {SIZE[0]}" in script
    shown = np.zeros(SHAPE, np.bool_)
    for name, x, y, width, height in parts:
        with Image.open(folder / name) as image:
            assert (image.width * STRIDE, image.height * STRIDE) == (width, height)
            y, x = y // STRIDE, x // STRIDE
            shown[y : y + image.height, x : x + image.width] = np.asarray(image)[..., 3] > 0
    np.testing.assert_array_equal(shown, hot(Job(open_result(out)["a.svs"], folder, Options())))
    for name in ("patches", "regions"):
        FeatureCollection.model_validate_json((folder / f"{name}.geojson").read_bytes())


def test_names_are_quoted_for_groovy(out: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s ${x} "y"'
    (done,) = export(out, "qupath", odd)
    script = (done.paths[0] / "show_in_qupath.groovy").read_text()
    assert 'it\\\'s ${x} "y"' in script
