"""napari gets the slide and the heatmap in one frame: a marker lies at one place in all layers and levels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.made_results import Flags, Made, Values, make
from tests.runs import ROOT
from tests.synthetic import MarkerSlide, write_marker_slide
from wsi_gradcam.errors import ResultError
from wsi_gradcam.export import export
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.heatmap import EXPLAINED
from wsi_gradcam.results.run import open_result
from wsi_gradcam.slides import open_slide
from wsi_gradcam.viewer import get_reader, read

MPP, STRIDE = (0.25, 0.3), 8
SIZE, SHAPE = (2099, 3001), (263, 376)
MARKER, MARKER_PX = (1040, 2400), 160


def made(slide: MarkerSlide, path: str) -> Made:
    """A result that is hot exactly on the marker."""
    opened = open_slide(slide.path)
    digest = opened.info.digest
    opened.close()
    values, flags = np.zeros((3, *SHAPE), np.float32), np.full(SHAPE, EXPLAINED, np.uint8)
    top, left, bottom, right = (edge // STRIDE for edge in slide.boxes()[0])
    values[:, top:bottom, left:right] = 2

    def draw(region: Region) -> tuple[Values, Flags]:
        return values[(slice(None), *region.slices)], flags[region.slices]

    return Made(SIZE, draw, mpp=MPP, stride=STRIDE, path=path, digest=digest)


@pytest.fixture(scope="module", params=[(2, 4), (3, 7)], ids=str)
def slide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MarkerSlide:
    return write_marker_slide(
        tmp_path_factory.mktemp("slide") / "a.tif",
        *SIZE,
        mpp=MPP,
        markers=[MARKER],
        marker_px=MARKER_PX,
        downsamples=request.param,
    )


@pytest.fixture(scope="module")
def out(slide: MarkerSlide) -> Path:
    return make(slide.path.parent / "out", {"a.tif": made(slide, str(slide.path))})


def centre_um(data: Any, about: dict[str, Any], factor: float, hot: Any) -> Any:
    """Where the middle of what is hot lies in napari's world: pixel i of a level is factor * i + (factor - 1) / 2."""
    places = np.argwhere(hot(np.asarray(data))).mean(axis=0)[:2]
    level0 = places * factor + (factor - 1) / 2
    return level0 * about["scale"] + np.asarray(about.get("translate", (0, 0)))


def test_slide_and_heatmap_lie_on_each_other(out: Path) -> None:
    found = read(str(out))
    assert [(about["name"], kind) for _, about, kind in found] == [
        ("a.tif", "image"),
        ("a.tif gradcam: tumour", "image"),
        ("a.tif eigencam: tumour", "image"),
        ("a.tif probability: tumour", "image"),
        ("a.tif coverage", "labels"),
    ]
    truth = (np.array(MARKER) - 0.5) * MPP  # napari's world begins in the middle of the slide's first pixel
    for number, hot in ((0, lambda rgb: (rgb == (0, 255, 0)).all(axis=2)), (1, lambda values: values == 2)):
        levels, about, _ = found[number]
        shapes = np.array([level.shape[:2] for level in levels])
        for level, shape in zip(levels, shapes, strict=True):
            (factor, _) = ratios = shapes[0] / shape  # as napari computes it
            assert ratios[0] == ratios[1] == round(factor)
            # An edge of a coarse level may fall a pixel short on one side: half a pixel of the level.
            slack = np.array(MPP) * (0.01 if number == 0 and factor == 1 else factor * (STRIDE if number else 1) / 2)
            assert (np.abs(centre_um(level, about, factor, hot) - truth) <= slack).all()
    levels, about, _ = found[1]
    np.testing.assert_allclose(centre_um(levels[0], about, 1, lambda values: values == 2), truth)


def test_channels_have_windows_and_colours(out: Path) -> None:
    found, windows = read(str(out)), open_result(out).windows()
    for _, about, _ in found[1:-1]:
        label = about["name"].removeprefix("a.tif ")
        assert about["contrast_limits"] == windows[label]
        assert about["colormap"].shape == (256, 4)
        assert about["colormap"][0, 3] == 0
        assert about["colormap"][-1, 3] == pytest.approx(0.6)
    assert [about["visible"] for _, about, _ in found[1:]] == [True, False, False, False]
    coverage = found[-1][0][0].compute()
    assert set(np.unique(coverage)) == {0, EXPLAINED}  # 0 where it was padded
    assert (coverage[: SHAPE[0], : SHAPE[1]] == EXPLAINED).all()


def test_without_the_slide_there_are_the_heatmaps(slide: MarkerSlide, tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"a.tif": made(slide, str(tmp_path / "gone.tif"))})
    assert [kind for _, _, kind in read(str(out / "a.tif"))] == ["image", "image", "image", "labels"]


def test_results_are_recognised(slide: MarkerSlide, tmp_path: Path) -> None:
    one = made(slide, str(slide.path))
    out = make(tmp_path / "out", {"a.tif": one, "b.tif": one})
    for path in (out, out / "a.tif", out / "a.tif" / "heatmap.ome.zarr", out / "run.yaml"):
        assert get_reader(str(path)) is read
    assert get_reader(str(tmp_path)) is None
    assert get_reader(str(slide.path)) is None
    assert get_reader([str(out)]) is None
    assert read(str(out / "b.tif"))[0][1]["name"] == "b.tif"
    with pytest.raises(ResultError, match=r"2 slides are finished; open the folder of one, such as .*a\.tif"):
        read(str(out))
    with pytest.raises(ResultError, match="0 slides are finished"):
        read(str(make(tmp_path / "none", {"c": Made((9, 9), one.draw, status="failed")})))


def test_the_manifest_names_what_there_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package, _, name = project["entry-points"]["napari.manifest"]["wsi-gradcam"].partition(":")
    manifest = yaml.safe_load((ROOT / package / name).read_text(encoding="utf-8"))
    assert manifest["name"] == project["name"]
    (command,) = manifest["contributions"]["commands"]
    module, _, function = command["python_name"].partition(":")
    assert getattr(import_module(module), function) is get_reader
    assert [reader["command"] for reader in manifest["contributions"]["readers"]] == [command["id"]]


IN_NAPARI = """
import json, sys
import numpy as np
from napari.components import ViewerModel
from npe2 import PluginManager, PluginManifest
from pathlib import Path
import wsi_gradcam
manager = PluginManager.instance()
if "wsi-gradcam" not in manager:
    manager.register(PluginManifest.from_file(Path(wsi_gradcam.__file__).parent / "napari.yaml"))
viewer = ViewerModel()  # all of napari but the window, which needs OpenGL
layers = viewer.open(sys.argv[1], plugin="wsi-gradcam")
found = []
for layer in layers[:2]:
    level = layer.data[0] if layer.multiscale else layer.data
    values = np.asarray(level)
    hot = (values == (0, 255, 0)).all(axis=2) if layer.rgb else values == 2
    found.append(list(layer.data_to_world(np.argwhere(hot).mean(axis=0))))
print(json.dumps({"names": [layer.name for layer in layers], "centres": found}))
"""


def in_napari(script: str, *arguments: Path) -> Any:
    """What a script that runs where napari is prints last, as JSON.

    That is with the extra `napari`, or in NAPARI_PYTHON, a Python of another environment that has all we need.
    """
    python = os.environ.get("NAPARI_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import napari, napari_ome_zarr"], capture_output=True, check=False).returncode:
        assert "NAPARI_PYTHON" not in os.environ, "napari is not there, as `make test` would have it"
        pytest.skip("needs napari: pip install '.[napari]', or NAPARI_PYTHON")
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={"QT_QPA_PLATFORM": "offscreen", **os.environ},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_napari_itself_opens_a_result(out: Path) -> None:
    told = in_napari(IN_NAPARI, out / "a.tif")
    assert told["names"][0] == "a.tif"
    assert len(told["names"]) == 5
    truth = (np.array(MARKER) - 0.5) * MPP
    np.testing.assert_allclose(told["centres"], [truth, truth], atol=1e-6)


IN_NAPARI_OME_ZARR = """
import json, sys
import numpy as np
from napari_ome_zarr._reader import napari_get_reader
found = []
for path in sys.argv[1:]:
    (levels, image, _), (flags, label, kind) = napari_get_reader(path)(path)
    places = np.argwhere(np.asarray(levels[0])[0] == 2).mean(axis=0)
    found.append([list(places * np.array(image["scale"][-2:])), [list(x.shape) for x in levels], image["name"], kind])
print(json.dumps(found))
"""


def test_napari_ome_zarr_opens_heatmap_and_export(out: Path, tmp_path: Path) -> None:
    """By the corner-based scale alone: half a heatmap pixel, less half a slide's, off, which our reader sets right."""
    (done,) = export(out, "ome-zarr-0.4", tmp_path)
    told = in_napari(IN_NAPARI_OME_ZARR, out / "a.tif" / "heatmap.ome.zarr", done.paths[0])
    labels = [channel.label for channel in open_result(out)["a.tif"].channels]
    for centre, shapes, names, kind in told:
        np.testing.assert_allclose(centre, (np.array(MARKER) - STRIDE / 2) * MPP)
        assert shapes == [[3, *shape] for shape in open_result(out)["a.tif"].levels]
        assert [name.removeprefix("a.tif: ") for name in names] == labels
        assert kind == "labels"
