"""Exports in the code of the programs that they are for: large_image (DSA, HistomicsUI), HistomicsTK, TissUUmaps.

`make` installs these packages without what they depend on, which are servers.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from PIL import Image

from tests.made_results import Made, make, steps
from tests.test_export_shapes import HOT, LABEL, MARKER, MPP, SHAPE, SIZE, STRIDE, marked
from wsi_gradcam.export import Options, export
from wsi_gradcam.export.job import Job
from wsi_gradcam.export.shapes import hot_regions
from wsi_gradcam.results.run import open_result

THRESHOLD = -0.5  # what lies above has holes


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of a heatmap with one hot pixel."""
    root = tmp_path_factory.mktemp("marker")
    out = make(root / "out", {"a.svs": Made(SIZE, marked, mpp=MPP)})
    done = export(out, "ome-tiff,asap,tissuumaps", root / "dest", threshold=1.0, window=(0.0, HOT))
    assert [each.error for each in done] == [""] * 3
    return root / "dest"


def needed(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}, which `make` installs without what it depends on")
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("source", "ending", "cold"),
    [
        ("tifffile", "*tumour.tiff", True),
        ("openslide", "*tumour.tiff", True),  # white but for the marker
        ("tifffile", "*.ome.tiff", False),
        ("tifffile", "*_likelihood_map.tif", False),
        ("openslide", "*_likelihood_map.tif", False),
    ],
)
def test_dsa_shows_the_marker_in_its_place(dest: Path, source: str, ending: str, cold: bool) -> None:
    """By large_image, which serves tiles in DSA: place, and size in millimetres, of the marker's pixel."""
    (path,) = dest.glob(ending)
    picture = needed(f"large_image_source_{source}").open(str(path))
    about = picture.getMetadata()
    assert (about["mm_y"], about["mm_x"]) == pytest.approx([mpp * STRIDE / 1000 for mpp in MPP])
    values, _ = picture.getRegion(format="numpy", frame=0)
    found = (values[..., 0].astype(float) * (-1 if cold else 1)).argmax()
    assert divmod(int(found), values.shape[1]) == MARKER


def histomics() -> Any:
    """HistomicsTK's module of annotations, of its file: the package itself loads all of its analyses."""
    spec = importlib.util.find_spec("histomicstk")
    if spec is None or spec.origin is None:
        pytest.skip("needs histomicstk, which `make` installs without what it depends on")
    path = Path(spec.origin).parent / "annotations_and_masks" / "annotation_and_mask_utils.py"
    found = importlib.util.spec_from_file_location("annotation_and_mask_utils", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_histomicstk_makes_tables_of_regions(tmp_path: Path) -> None:
    """Of each region outline, box, group and label, as it gets annotations from DSA."""
    out = make(tmp_path / "out", {"a.svs": Made(SIZE, steps(SHAPE), mpp=MPP)})
    (done,) = export(out, "dsa", tmp_path / "dest", threshold=THRESHOLD)
    hot, _ = json.loads(done.paths[0].read_text())
    for number, element in enumerate(hot["elements"]):
        element["id"] = f"{number:024x}"  # which the server gives
    of_server = {
        "_id": "1",
        "itemId": "2",
        "created": "",
        "creatorId": "3",
        "public": True,
        "updated": "",
        "groups": [],
    }
    _, table = histomics().parse_slide_annotations_into_tables([{**of_server, "annotation": hot}])
    slide = open_result(out)["a.svs"]
    regions = hot_regions(Job(slide, tmp_path, Options(threshold=THRESHOLD)), slide.channel("tumour")).polygons
    assert len(table) == len(regions) >= 3
    assert set(table["group"]) == {"tumour"}
    assert list(table["label"]) == [f"{LABEL} {number}" for number in range(len(regions))]
    for row, polygon in zip(table.to_dict("records"), regions, strict=True):
        x, y = (list(map(float, row[f"coords_{axis}"].split(","))) for axis in "xy")
        drawn = shapely.Polygon(zip(x, y, strict=True))
        assert drawn.symmetric_difference(shapely.Polygon(polygon.exterior)).area < polygon.length  # whole pixels
        assert (row["xmin"], row["ymin"], row["xmax"], row["ymax"]) == pytest.approx(polygon.bounds, abs=1)


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
def test_tissuumaps_opens_the_project_and_its_tiles(
    dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By TissUUmaps' own server: the page without a warning, and the marker in the layer's finest tile."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where it looks for its settings
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)  # which it changes
    needed("pyvips")
    app = needed("tissuumaps").app
    monkeypatch.setattr(app, "basedir", str(dest), raising=False)
    client = app.test_client()
    page = client.get("/a.svs.tmap?path=")
    assert page.status_code == 200
    assert not re.search(r"Warning when loading|Error when loading|Unsupported", page.text)
    (layer,) = dest.glob("*tumour.tiff")
    size = re.search(r'Width="(\d+)" Height="(\d+)"', client.get(f"/{layer.name}.dzi").text)
    assert size is not None
    assert tuple(map(int, size.groups())) == SHAPE[::-1]
    level = int(np.ceil(np.log2(max(SHAPE))))
    tile = client.get(f"/{layer.name}_files/{level}/0_0.jpeg")
    assert tile.status_code == 200
    shown = np.asarray(Image.open(io.BytesIO(tile.data)).convert("RGB")).astype(int)
    assert shown.shape[:2] == SHAPE
    assert divmod(int(shown[..., 2].argmin()), SHAPE[1]) == MARKER  # of inferno's end, less blue than white
