"""Deep Zoom by its rules, checked against OpenSlide's own generator; PNGs with everything in its place."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import openslide
import pytest
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from tests.made_results import Flags, Made, Values, make, steps
from tests.synthetic import MarkerSlide, write_marker_slide
from wsi_gradcam.export import Options, export
from wsi_gradcam.export.job import Job
from wsi_gradcam.export.png import INCH_PX, MARGIN, TITLE, overlay
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.display import Colouring
from wsi_gradcam.results.heatmap import EXPLAINED
from wsi_gradcam.results.run import open_result
from wsi_gradcam.slides import open_slide

DEEPZOOM = "{http://schemas.microsoft.com/deepzoom/2008}"
MARKER, MARKER_PX = (700, 1100), 200


@pytest.mark.parametrize("shape", [(875, 1063), (512, 64), (1, 1), (3, 2), (100, 1025)])
def test_deep_zoom_has_the_tiles_that_its_rules_ask_for(tmp_path: Path, shape: tuple[int, int]) -> None:
    size = shape[0] * 16 - 5, shape[1] * 16 - 11
    out = make(tmp_path / "out", {"a.svs": Made(size, steps(shape))})
    (done,) = export(out, "deepzoom", tmp_path / "dest", window=(0.0, 2.0), alpha=1.0, threshold=-99.0)
    assert done.error == ""
    dzi, place, folder = done.paths
    assert folder.name == f"{dzi.stem}_files"
    root = ET.parse(dzi).getroot()
    assert root.attrib == {"Format": "png", "Overlap": "0", "TileSize": "512"}
    extent = root.find(f"{DEEPZOOM}Size")
    assert extent is not None
    assert (int(extent.attrib["Height"]), int(extent.attrib["Width"])) == shape
    with openslide.ImageSlide(Image.new("RGB", shape[::-1])) as image:
        rule = DeepZoomGenerator(image, tile_size=512, overlap=0)
        assert sorted(path.name for path in folder.iterdir()) == sorted(map(str, range(rule.level_count)))
        for level, (columns, rows) in enumerate(rule.level_tiles):
            wanted = {
                f"{x}_{y}.png": rule.get_tile_dimensions(level, (x, y)) for x in range(columns) for y in range(rows)
            }
            found = {}
            for path in (folder / str(level)).iterdir():
                with Image.open(path) as tile:
                    found[path.name] = tile.size
                    assert tile.mode == "RGBA"
            assert found == wanted
    assert json.loads(place.read_text())["width"] == shape[1] * 16 / size[1]


def test_deep_zoom_tiles_have_the_heatmap_s_colours(tmp_path: Path) -> None:
    shape = (600, 1100)
    out = make(tmp_path / "out", {"a.svs": Made((600 * 16, 1100 * 16), steps(shape))})
    (done,) = export(out, "deepzoom", tmp_path / "dest", window=(0.0, 2.0), threshold=0.25, alpha=0.5)
    slide = open_result(out)["a.svs"]
    for level, (height, width) in enumerate(slide.levels):
        picture = np.zeros((height, width, 4), np.uint8)
        for path in (done.paths[2] / str(11 - level)).iterdir():
            x, y = map(int, path.stem.split("_"))
            with Image.open(path) as tile:
                picture[y * 512 : y * 512 + tile.height, x * 512 : x * 512 + tile.width] = np.asarray(tile)
        colouring = Colouring("inferno", 0.0, 2.0, 0.25, 0.5)
        expected = colouring.rgba(slide.heatmap("tumour", level).values, slide.coverage(level).values)
        np.testing.assert_array_equal(picture, expected)
        shown = slide.heatmap("tumour", level).values >= 0.25
        np.testing.assert_array_equal(picture[..., 3] > 0, shown & (slide.coverage(level).values & 2 > 0))


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> tuple[MarkerSlide, Path]:
    """A slide with a marker, and a result that is hot exactly there."""
    folder = tmp_path_factory.mktemp("marked")
    slide = write_marker_slide(folder / "a.tif", 1603, 2107, mpp=(0.25, 0.3), markers=[MARKER], marker_px=MARKER_PX)
    opened = open_slide(slide.path)
    digest = opened.info.digest
    opened.close()
    values, flags = np.zeros((3, 201, 264), np.float32), np.full((201, 264), EXPLAINED, np.uint8)
    (top, left, bottom, right), flags[:, :20] = slide.boxes()[0], 1
    values[:, top // 8 : bottom // 8, left // 8 : right // 8] = 2

    def draw(region: Region) -> tuple[Values, Flags]:
        return values[(slice(None), *region.slices)], flags[region.slices]

    made = Made((1603, 2107), draw, stride=8, path=str(slide.path), digest=digest)
    gone = Made((1603, 2107), draw, stride=8, path=str(folder / "gone.tif"), digest=digest)
    return slide, make(folder / "out", {"a.tif": made, "gone.tif": gone})


@pytest.mark.parametrize("size", [300, 1000])
def test_a_picture_shows_the_heat_where_the_marker_is(
    marked: tuple[MarkerSlide, Path], tmp_path: Path, size: int
) -> None:
    (done,) = export(marked[1], "png", tmp_path, ["a.tif"], window=(0.0, 2.0), threshold=1.0, alpha=1.0, size=size)
    with Image.open(done.paths[0]) as image:
        picture = np.asarray(image.convert("RGB")).astype(int)
    dpi = max(100, 100 * size // INCH_PX)
    left, top = round(MARGIN * dpi), round(TITLE * dpi)
    height = round(size * 1603 * 0.25 / (2107 * 0.3))
    inside = picture[top : top + height, left : left + size]
    y, x = np.nonzero((inside == (252, 254, 164)).all(axis=2))  # the last colour of inferno
    pitch = np.array([1603 / height, 2107 / size])
    for found, (low, high) in ((y * pitch[0], (600, 800)), (x * pitch[1], (1000, 1200))):
        assert abs(found.min() - low) <= 8 + 2 * pitch.max()
        assert abs(found.max() - high) <= 8 + 2 * pitch.max()
    # The scale bar: a black line in the lower left, 200 µm or as long as fits a quarter.
    rows, columns = np.nonzero((inside[-round(0.06 * height) :, : size // 2] == 0).all(axis=2))
    length_um = (np.bincount(rows).max()) * 2107 * 0.3 / size
    assert length_um == pytest.approx(100, rel=0.06)
    assert len(columns) > 0


def test_colours_are_laid_on_the_nearest_pixels(marked: tuple[MarkerSlide, Path], tmp_path: Path) -> None:
    job = Job(open_result(marked[1])["a.tif"], tmp_path, Options(threshold=1.0, alpha=1.0, window=(0.0, 2.0)))
    channel, white = job.slide.channel("tumour"), np.full((1603, 2107, 3), 255, np.uint8)
    whole = overlay(job, channel, job.colouring(channel), white)
    top, left, bottom, right = marked[0].boxes()[0]
    expected = np.zeros((1603, 2107), np.bool_)
    expected[top // 8 * 8 : bottom // 8 * 8, left // 8 * 8 : right // 8 * 8] = True
    np.testing.assert_array_equal((whole != 255).any(axis=2), expected)


def test_without_the_slide_the_heatmap_is_shown_alone(marked: tuple[MarkerSlide, Path], tmp_path: Path) -> None:
    with_slide, without = export(marked[1], "png", tmp_path, size=500)
    assert without.error == ""
    with Image.open(with_slide.paths[0]) as one, Image.open(without.paths[0]) as other:
        assert one.size == other.size
        red = (np.asarray(other.convert("RGB")) == (160, 0, 0)).all(axis=2)
        assert red.sum() > 20  # the note
        assert not (np.asarray(one.convert("RGB")) == (160, 0, 0)).all(axis=2).any()
