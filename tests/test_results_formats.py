"""Results of each format that versions of 0.1 have written are read by this one: opened, validated, shown, exported.

`data/formats.tar.xz` holds what `explain` wrote of one slide with one network, at the last commit of each format
(`FORMAT` in run/plan.py), and of the fourth also since files are sealed by digests. A format that changes adds its own.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.runs import ROOT
from tests.viewer_runs import client, facts_of
from wsi_gradcam import open_result
from wsi_gradcam.export import export
from wsi_gradcam.results.validation import check
from wsi_gradcam.run.plan import FORMAT

FORMATS = ["format-1", "format-2", "format-3", "format-4", "format-4-sealed"]
NEWEST = FORMATS[-1]
MARKER = (slice(64, 128), slice(64, 128))  # y, x in level-0 px
WHERE = "/srv/archive/slide.tif"  # the slide was then


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    with tarfile.open(ROOT / "tests" / "data" / "formats.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder


def test_there_is_a_result_of_each_format(formats: Path) -> None:
    found = {yaml.safe_load((formats / name / "run.yaml").read_text())["identity"]["format"] for name in FORMATS}
    assert found == set(range(1, FORMAT + 1))


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_newest(formats: Path, name: str) -> None:
    old, new = open_result(formats / name)["slide.tif"], open_result(formats / NEWEST)["slide.tif"]
    assert [channel.label for channel in old.channels] == ["gradcam: marker", "probability: marker"]
    for channel in old.channels:
        np.testing.assert_array_equal(old.heatmap(channel.label).values, new.heatmap(channel.label).values)
    np.testing.assert_array_equal(old.coverage().values, new.coverage().values)
    shared = ["y", "x", "tissue", "status", "logit_marker", "probability_marker", "cam_mean_marker", "cam_max_marker"]
    assert old.patches[shared].equals(new.patches[shared])
    np.testing.assert_array_equal(old.cam(4, "gradcam: marker"), new.cam(4, "gradcam: marker"))
    map_ = old.heatmap("gradcam: marker")
    y, x = MARKER
    assert abs(float(map_.sel(y=y, x=x).mean()) - float(map_.mean())) > 0.01  # it is a map of that slide


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_found_but_that_the_slide_has_moved(formats: Path, name: str) -> None:
    found = check(formats / name)
    assert [(each.slide, each.problem.partition(": ")[0]) for each in found.findings] == [("slide.tif", WHERE)]
    assert bool(found.notes) == (name != NEWEST)  # fewer digests


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_found(formats: Path, name: str) -> None:
    chunk = next(path for path in (formats / name / "slide.tif" / "cams.zarr" / "logits").rglob("0") if path.is_file())
    before = chunk.read_bytes()
    chunk.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        assert len(check(formats / name).findings) > 1
    finally:
        chunk.write_bytes(before)


@pytest.mark.parametrize("name", FORMATS)
def test_the_viewer_shows_it_over_its_slide(formats: Path, name: str) -> None:
    with client(formats / name, slides_folder=formats) as server:
        facts = facts_of(server, "slide.tif")
        assert not facts["slide"].get("problem")
        assert facts["table"]
        key = facts["key"]
        patch = server.get(f"/api/slides/{key}/patches/at?y=96&x=96").json()
        assert patch["number"] == 5
        top = server.get(f"/api/slides/{key}/patches/top?by=cam_max_marker&count=3")
        assert top.status_code == 200


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("to", ["png", "geojson", "ome-tiff", "ome-zarr-0.4"])
def test_it_is_exported(formats: Path, name: str, to: str, tmp_path: Path) -> None:
    (done,) = export(formats / name, to, tmp_path)
    assert not done.error
    assert done.paths
