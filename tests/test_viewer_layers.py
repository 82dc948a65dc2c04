"""Two runs over the same slides: what the second one says, the difference, and how much they differ."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from tests.viewer_runs import MARKERS, client, facts_of, make_run, plant, tiles_of
from wsi_gradcam.errors import NotShownError, ResultError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.heatmap import HeatmapStore
from wsi_gradcam.results.run import open_result
from wsi_gradcam.viewer.archive import Archive
from wsi_gradcam.viewer.layers import ClassMap, Comparison, Difference

SLIDE, OTHER_SLIDE = "a.tif", "inner/b.tif"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def second(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, but that a slide's first map shows the markers, and its second is turned."""
    copy = tmp_path_factory.mktemp("second") / "new"
    shutil.copytree(out, copy)
    plant(copy, SLIDE)
    store = HeatmapStore(copy / SLIDE / "heatmap.ome.zarr")
    for level, shape in enumerate(store.shapes):
        whole = Region(0, 0, *shape)
        store.write(level, 1, whole, store.read(level, 1, whole)[::-1, ::-1])
    return copy


def test_a_difference_is_the_second_run_minus_the_first(out: Path, second: Path) -> None:
    first, other = open_result(out)[SLIDE], open_result(second)[SLIDE]
    found = Difference(first, other)
    assert [channel.label for channel in found.channels] == [f"difference: {c.label}" for c in first.channels]
    for level, shape in enumerate(found.levels):
        whole = Region(0, 0, *shape)
        for channel in found.channels:
            expected = other.read(channel.number, level, whole) - first.read(channel.number, level, whole)
            np.testing.assert_array_equal(found.read(channel, level, whole), expected)
        both = first.read_coverage(level, whole) & other.read_coverage(level, whole)
        np.testing.assert_array_equal(found.read_coverage(level, whole), both)


def test_runs_of_other_grids_are_compared_on_the_coarser_one(out: Path, tmp_path: Path) -> None:
    coarse = make_run(tmp_path, heatmap_stride=16, method="gradcam")
    first, other = open_result(out)[SLIDE], open_result(coarse)[SLIDE]
    for found in (Difference(first, other), Difference(other, first)):
        assert found.stride_px == 16
        assert found.levels == other.levels[: len(found.levels)]
        assert len(found.channels) == 4  # of one method, and two probabilities
        whole = Region(0, 0, *found.levels[0])
        step = (16 // first.stride_px).bit_length() - 1
        for channel in found.channels:
            label = channel.label.removeprefix("difference: ")
            expected = other.read(label, 0, whole) - first.read(label, step, whole)
            values = found.read(channel, 0, whole)
            np.testing.assert_array_equal(np.abs(values), np.abs(expected))


def test_what_is_not_the_same_slide_is_not_compared(out: Path) -> None:
    result = open_result(out)
    with pytest.raises(ResultError, match="another file under this name"):
        Difference(result[SLIDE], result[OTHER_SLIDE])


def test_the_page_gets_channels_tiles_values_and_scores_of_both(out: Path, second: Path) -> None:
    with client(out, second=second) as server:
        assert server.get("/api/run").json()["second"] == "new"
        facts = facts_of(server, SLIDE)
        labels = [channel["label"] for channel in facts["channels"]]
        own = labels[:6]
        assert labels == [*own, *(f"{x} (new)" for x in own), *(f"difference: {x}" for x in own)]
        assert facts["second_problem"] is None
        addresses = {channel["label"]: channel["address"] for channel in facts["channels"]}
        y, x = MARKERS[SLIDE][0]
        values = server.get(f"/api/slides/{facts['key']}/values", params={"y": y, "x": x}).json()["values"]
        assert len(values) == len(labels)
        assert values[12] == pytest.approx(values[6] - values[0], abs=1e-5)
        assert values[6] == 1.0
        level = facts["heat"]["levels"] - 1
        for label in (f"{own[0]} (new)", f"difference: {own[0]}"):
            tile = server.get(f"{tiles_of(facts)}/heat/{addresses[label]}/{level}/0_0.png")
            assert (tile.status_code, "immutable" in tile.headers["cache-control"]) == (200, True)
            assert np.asarray(Image.open(io.BytesIO(tile.content))).any()
        for wrong in ("other-0", "difference-0", "else-" + addresses[f"{own[0]} (new)"].split("-")[1].split("/")[0]):
            assert server.get(f"{tiles_of(facts)}/heat/{wrong}/0/{level}/0_0.png").status_code == 404
        end = time.monotonic() + 60
        while True:
            query = {"sort": "difference:maps", "order": "down"}
            slides = server.get("/api/slides", params=query).json()["slides"]
            if sum("maps" in slide["difference"] for slide in slides) == 2:
                break
            assert time.monotonic() < end
            time.sleep(0.05)
        assert [slide["id"] for slide in slides[:2]] == [SLIDE, OTHER_SLIDE]
        assert slides[0]["difference"]["maps"] > 0.1
        assert slides[1]["difference"] == {"maps": pytest.approx(0, abs=1e-9), "probabilities": 0.0}


def test_disagreement_is_that_of_ranks(out: Path, second: Path) -> None:
    archive = Archive(out)
    found = Comparison(archive, Archive(second)).scores(archive.find_by_id(SLIDE))
    first, other = open_result(out)[SLIDE], open_result(second)[SLIDE]
    level = next(i for i, (h, w) in enumerate(first.levels) if h * w <= 1 << 16)
    whole = Region(0, 0, *first.levels[level])
    known = (first.read_coverage(level, whole) & other.read_coverage(level, whole) & 2) > 0
    expected = []
    for channel in first.channels[:4]:
        a, b = (run.read(channel.number, level, whole)[known] for run in (first, other))
        if np.ptp(a) and np.ptp(b):
            expected.append(1 - spearmanr(a, b).statistic)
    assert found["maps"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_slide_that_the_second_run_lacks_is_shown_alone(out: Path, second: Path, tmp_path: Path) -> None:
    shutil.copytree(second, tmp_path / "new")
    file = tmp_path / "new/slides.csv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if OTHER_SLIDE not in line), encoding="utf-8")
    plan = tmp_path / "new" / SLIDE / "manifest/plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"slide_digest": "0" * 64}), encoding="utf-8")
    with client(out, second=tmp_path / "new") as server:
        assert len(facts_of(server, OTHER_SLIDE)["channels"]) == 6
        facts = facts_of(server, SLIDE)
        assert len(facts["channels"]) == 6
        assert facts["second_problem"]
    archive = Archive(out)
    with pytest.raises(NotShownError):
        Comparison(archive).layer(archive.find_by_id(SLIDE), "other", "0")


def test_levels_are_those_that_both_have(out: Path) -> None:
    store = HeatmapStore(out / SLIDE / "heatmap.ome.zarr", read_only=True)
    result = open_result(out)[SLIDE]
    assert Difference(result, result).levels == list(store.shapes)


def test_the_highest_patches_of_all_slides(out: Path) -> None:
    """Sorted over slides, filtered by site and quality, as the tables have them."""
    result = open_result(out)
    with client(out) as server:
        end = time.monotonic() + 60
        query = {"class": "marker", "count": "100"}
        while (found := server.get("/api/top", params=query).json())["collected"] < found["finished"]:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert (found["finished"], found["sites"]) == (2, [])
        values = [patch["value"] for patch in found["patches"]]
        assert values == sorted(values, reverse=True)
        assert {patch["slide"] for patch in found["patches"]} == {SLIDE, OTHER_SLIDE}
        for patch in found["patches"]:
            table = result[patch["slide"]].table(["probability_marker", "glass"])
            assert table.column(0)[patch["number"]].as_py() == pytest.approx(patch["value"])
            assert ("glass" in patch["flags"]) == (table.column(1)[patch["number"]].as_py() > 0.05)
        first = {name: max(result[name].table(["probability_marker"]).column(0).to_pylist()) for name in MARKERS}
        assert values[0] == pytest.approx(max(first.values()))
        for flag in ("none", "pen", "glass", "blur"):
            chosen = server.get("/api/top", params=query | {"flag": flag}).json()["patches"]
            expected = [p for p in found["patches"] if (not p["flags"] if flag == "none" else flag in p["flags"])]
            assert chosen == expected
        assert server.get("/api/top", params=query | {"site": "elsewhere"}).json()["patches"] == []
        assert server.get("/api/top", params={"class": "nothing"}).json()["patches"] == []
        assert server.get("/api/top", params={"count": "-1"}).status_code == 404


def test_predicted_classes_are_those_of_the_probabilities(out: Path) -> None:
    result = open_result(out)[SLIDE]
    whole = Region(0, 0, *result.levels[0])
    found = ClassMap(result)
    values = found.read(found.channels[0], 0, whole)
    shares = np.stack([result.read(f"probability: {label}", 0, whole) for label in result.classes])
    np.testing.assert_array_equal(np.floor(values), shares.argmax(axis=0))
    np.testing.assert_allclose(values % 1, np.minimum(shares.max(axis=0), 0.998), atol=1e-6)
    np.testing.assert_array_equal(found.read_coverage(0, whole), result.read_coverage(0, whole))
    with client(out) as server:
        facts = facts_of(server, SLIDE)
        channel = facts["predicted"]
        assert (channel["label"], channel["classes"]) == ("predicted class", result.classes)
        level = facts["heat"]["finer"]
        tile = server.get(f"{tiles_of(facts)}/cells/{channel['address']}/{level}/0_0.png")
        red, green, _ = np.moveaxis(np.asarray(Image.open(io.BytesIO(tile.content)), np.float64), 2, 0)
        low, high = channel["scale"]
        shown = low + (red * 256 + green) * (high - low) / 65535
        np.testing.assert_array_equal(np.floor(shown), np.floor(values[: len(shown), : shown.shape[1]]))


def test_without_all_probabilities_there_are_no_predicted_classes(out: Path) -> None:
    result = open_result(out)[SLIDE]
    result.__dict__["channels"] = [channel for channel in result.channels if channel.label != "probability: other"]
    with pytest.raises(ResultError, match="probabilities of all classes"):
        ClassMap(result)
