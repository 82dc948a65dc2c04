"""TIFFs hold what the heatmap holds: OpenSlide and tifffile read levels, sizes and values back."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import openslide
import pytest
import tifffile
from matplotlib import colormaps

from tests.made_results import Made, make, steps
from wsi_gradcam.export import export
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.slide import SlideResult
from wsi_gradcam.slides import open_slide

SIZE = (14_000, 17_003)  # two tiles of 512 heatmap pixels and a cut one
OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Made(SIZE, steps((875, 1063)))
    return make(tmp_path_factory.mktemp("made") / "out", {"a.svs": made})


@pytest.fixture
def slide(out: Path) -> SlideResult:
    return open_result(out)["a.svs"]


def coloured(slide: SlideResult, level: int) -> npt.NDArray[np.uint8]:
    """The picture of a level in inferno from 0 to 2, white where nothing was explained, in plain numpy."""
    values, flags = slide.heatmap("tumour", level).values, slide.coverage(level).values
    table = colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    picture = table[np.clip(np.floor(values.astype(np.float64) * 128), 0, 255).astype(int)]
    return np.where((flags & 2 > 0)[..., None], picture, 255).astype(np.uint8)


def test_openslide_opens_the_tiff_as_a_pyramid(out: Path, slide: SlideResult, tmp_path: Path) -> None:
    (done,) = export(out, "tiff", tmp_path, window=(0.0, 2.0))
    with openslide.OpenSlide(done.paths[0]) as opened:
        assert opened.properties["openslide.vendor"] == "generic-tiff"
        assert opened.level_dimensions == tuple((w, h) for h, w in slide.levels)
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.3 * 16, rel=1e-5)
        assert float(opened.properties["openslide.mpp-y"]) == pytest.approx(0.25 * 16, rel=1e-5)
        for level, (width, height) in enumerate(opened.level_dimensions):
            pixels = np.asarray(opened.read_region((0, 0), level, (width, height)))
            assert (pixels[..., 3] == 255).all()
            expected = coloured(slide, level)
            exact = (pixels[..., :3] == expected).all(axis=2)
            # Values of level 0 are exact in any arithmetic; means of four may lie on a border of two colours.
            assert exact.all() if level == 0 else exact.mean() > 0.999
            assert 0.5 < (expected != 255).any(axis=2).mean() < 0.9


def test_our_own_reader_opens_it_with_its_mpp(out: Path, tmp_path: Path) -> None:
    (done,) = export(out, "tiff", tmp_path)
    opened = open_slide(done.paths[0])
    try:
        assert opened.info.mpp == pytest.approx((4.0, 4.8), rel=1e-5)
    finally:
        opened.close()


def test_gray_is_one_sample_with_0_for_nothing(out: Path, slide: SlideResult, tmp_path: Path) -> None:
    (done,) = export(out, "tiff", tmp_path, colormap="gray", window=(0.0, 2.0), threshold=0.5)
    pixels = tifffile.imread(done.paths[0], level=0)
    values, flags = slide.heatmap("tumour").values, slide.coverage().values
    expected = np.where((flags & 2 > 0) & (values >= 0.5), np.clip(values * 128, 1, 255).astype(np.uint8), 0)
    np.testing.assert_array_equal(pixels, expected)
    assert 0 < (pixels > 0).mean() < 0.6
    with openslide.OpenSlide(done.paths[0]) as opened:
        found = np.asarray(opened.read_region((0, 0), 0, (300, 200)))
    np.testing.assert_array_equal(found[..., 0], expected[:200, :300])


def test_ome_tiff_has_the_values_of_all_channels_and_levels(out: Path, slide: SlideResult, tmp_path: Path) -> None:
    (done,) = export(out, "ome-tiff", tmp_path)
    with tifffile.TiffFile(done.paths[0]) as file:
        (series,) = file.series
        assert (series.axes, str(series.dtype), file.is_bigtiff) == ("CYX", "float32", True)
        assert len(file.pages.first.subifds or ()) == len(slide.levels) - 1
        for level, found in enumerate(series.levels):
            pixels = found.asarray()
            for channel in slide.channels:
                np.testing.assert_array_equal(pixels[channel.number], slide.heatmap(channel.label, level).values)
            np.testing.assert_array_equal(pixels[-1], slide.coverage(level).values)


def test_ome_xml_tells_sizes_and_names(out: Path, slide: SlideResult, tmp_path: Path) -> None:
    (done,) = export(out, "ome-tiff", tmp_path, channel=("probability: tumour",))
    with tifffile.TiffFile(done.paths[0]) as file:
        root = ET.fromstring(file.ome_metadata or "")
    pixels = root.find(f"{OME}Image/{OME}Pixels")
    assert pixels is not None
    sizes = {name: float(pixels.attrib[name]) for name in ("PhysicalSizeX", "PhysicalSizeY", "SizeX", "SizeY", "SizeC")}
    assert sizes == {"PhysicalSizeX": 4.8, "PhysicalSizeY": 4, "SizeX": 1063, "SizeY": 875, "SizeC": 2}
    assert (pixels.attrib["PhysicalSizeXUnit"], pixels.attrib["Type"]) == ("µm", "float")
    assert [c.attrib["Name"] for c in pixels.findall(f"{OME}Channel")] == ["probability: tumour", "coverage"]
    assert [int(c.attrib["Color"]) for c in pixels.findall(f"{OME}Channel")] == [0x009E73FF, -1]


def test_the_tiniest_heatmap_is_a_file_too(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"a.svs": Made((20, 33), steps((2, 3)))})
    for to in ("tiff", "ome-tiff"):
        (done,) = export(out, to, tmp_path)
        assert done.error == ""
        assert tifffile.imread(done.paths[0]).shape[-3:-1] == ((2, 3) if to == "tiff" else (4, 2))


@pytest.mark.parametrize("size", [SIZE, (14_000, 17_000), (13_999, 17_007), (100, 5000), (3001, 31), (7, 5), (1, 1)])
def test_asap_takes_the_size_for_the_slide_s(size: tuple[int, int], tmp_path: Path) -> None:
    """ASAP divides in whole numbers, refuses axes that differ, and draws at that factor: it must be the true one."""
    shape = (-(-size[0] // 16), -(-size[1] // 16))
    out = make(tmp_path / "out", {"in/a.svs": Made(size, steps(shape))})
    (done,) = export(out, "asap", tmp_path / "dest", window=(0.0, 2.0))
    assert [path.relative_to(tmp_path / "dest").as_posix() for path in done.paths] == ["in/a_likelihood_map.tif"]
    slide = open_result(out)["in/a.svs"]
    with tifffile.TiffFile(done.paths[0]) as file:
        first = file.pages.first
        height, width = first.shape  # one sample a pixel
        step = size[0] // height
        assert step == size[1] // width
        assert (first.photometric, str(first.dtype)) == (tifffile.PHOTOMETRIC.MINISBLACK, "uint8")
        values, flags = slide.heatmap("tumour").values, slide.coverage().values
        rows, columns = (np.arange(n) * step // 16 for n in (height, width))
        expected = np.where(flags & 2 > 0, np.clip(np.floor(values * 128), 1, 255), 0)[rows[:, None], columns]
        np.testing.assert_array_equal(first.asarray(), expected)
        for coarse, fine in zip(file.pages[1:], file.pages, strict=False):
            assert coarse.shape == tuple(-(-n // 2) for n in fine.shape)


def test_no_two_slides_have_one_likelihood_map(tmp_path: Path) -> None:
    made = Made((500, 700), steps((32, 44)))
    out = make(tmp_path / "out", {"a.svs": made, "a.tif": made, "in/a.svs": made})
    done = export(out, "asap", tmp_path / "dest", channel=("tumour", "probability: tumour"))
    names = [path.relative_to(tmp_path / "dest").as_posix() for each in done for path in each.paths]
    assert names == [
        "a.svs_likelihood_map.tif",
        "a.svs.2-probability-tumour_likelihood_map.tif",
        "a.tif_likelihood_map.tif",
        "a.tif.2-probability-tumour_likelihood_map.tif",
        "in/a_likelihood_map.tif",
        "in/a.2-probability-tumour_likelihood_map.tif",
    ]


def test_tissuumaps_gets_a_project_with_slide_and_scale(tmp_path: Path) -> None:
    path = tmp_path / "slides" / "ä #1.svs"
    made = Made((500, 700), steps((32, 44)), path=str(path))
    out = make(tmp_path / "out", {"in/ä #1.svs": made})
    (done,) = export(out, "tissuumaps", tmp_path / "dest", channel=("tumour", "probability: tumour"))
    project = json.loads(done.paths[0].read_text(encoding="utf-8"))
    assert done.paths[0] == tmp_path / "dest" / "in" / "ä #1.svs.tmap"
    places = [done.paths[0].parent / unquote(layer["tileSource"]).removesuffix(".dzi") for layer in project["layers"]]
    assert [place.resolve() for place in places] == [path, *done.paths[1:]]
    assert [layer["scale"] for layer in project["layers"]] == [1, 16, 16]  # level-0 px of the slide
    assert not any("#" in layer["tileSource"] or " " in layer["tileSource"] for layer in project["layers"])
    assert project["layerVisibilities"] == {"0": True, "1": True, "2": False}


def test_tissuumaps_is_not_given_a_url(tmp_path: Path) -> None:
    made = Made((500, 700), steps((32, 44)), path="s3://bucket/a.svs")
    (done,) = export(make(tmp_path / "out", {"a.svs": made}), "tissuumaps", tmp_path / "dest")
    assert "TissUUmaps opens no URLs" in done.error
    assert not (tmp_path / "dest").exists()
