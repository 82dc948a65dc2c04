"""Our TIFF reader gives what OpenSlide gives, and what the file says where OpenSlide reads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import tifffile
import torch  # noqa: F401 - which reading at half of a level is done by
from PIL import Image

from tests.synthetic import corrupt_tile, write_marker_slide
from wsi_gradcam.errors import MppError, SlideFormatError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import Slide, open_slide, opening, read_region
from wsi_gradcam.slides.base import LocalFile
from wsi_gradcam.slides.openslide_reader import OpenSlideSlide
from wsi_gradcam.slides.tiff_levels import tiff_levels
from wsi_gradcam.slides.tiff_reader import TiffSlide

Rgb = npt.NDArray[np.uint8]


def regions(height: int, width: int, count: int = 12) -> Iterator[Region]:
    """Regions of many sizes, some beyond the edges, the whole picture last."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        y, x = int(rng.integers(-40, height)), int(rng.integers(-40, width))
        yield Region(y, x, int(rng.integers(1, 300)), int(rng.integers(1, 300)))
    yield Region(0, 0, height, width)


@pytest.fixture
def aperio(shared_data: Path) -> Path:
    return shared_data / "slides/aperio/CMU-1-Small-Region.svs"


def assert_same(found: Slide, expected: Slide) -> None:
    assert found.info == expected.info
    for number, level in enumerate(expected.info.levels):
        for region in regions(level.height, level.width):
            np.testing.assert_array_equal(found.read_level(number, region), expected.read_level(number, region))


def open_files(path: Path) -> int:
    return sum(file.path == str(path.resolve()) for file in psutil.Process().open_files())


def noise(height: int, width: int) -> Rgb:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- as OpenSlide ---


def test_a_real_slide_is_read_as_by_openslide(aperio: Path) -> None:
    fast = open_slide(aperio)
    assert isinstance(fast, TiffSlide)
    assert_same(fast, open_slide(aperio, reader="openslide"))


@pytest.mark.parametrize("compression", ["jpeg", "deflate", None])
@pytest.mark.parametrize("downsamples", [(), (2, 4, 8)])
def test_pyramids_are_read_as_by_openslide(compression: Any, downsamples: tuple[int, ...], tmp_path: Path) -> None:
    slide = write_marker_slide(
        tmp_path / "a.tif",
        704,
        1104,
        mpp=(0.25, 0.3),
        markers=[(100, 200)],
        marker_px=60,
        glass_px=90,
        downsamples=downsamples,
        compression=compression,
    )
    fast = open_slide(slide.path)
    assert isinstance(fast, TiffSlide)
    assert_same(fast, open_slide(slide.path, reader="openslide"))


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("compression", ["lzw", "jpeg", "aperio_jp2000_rgb", "aperio_jp2000_ycbc"])
def test_aperio_codecs_are_read_as_by_openslide(compression: str, bigtiff: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    smooth = np.asarray(Image.fromarray(noise(30, 40)).resize((500, 400)))
    tifffile.imwrite(
        path,
        smooth,
        tile=(240, 240),
        photometric="rgb",
        compression=compression,
        compressionargs={"mct": False} if compression.endswith("ycbc") else {},
        bigtiff=bigtiff,
        metadata=None,
        description="Aperio Image Library v1\n500x400 (240x240)|AppMag = 20|MPP = 0.499",
    )
    fast, known = open_slide(path), open_slide(path, reader="openslide")
    assert isinstance(fast, TiffSlide)
    assert fast.info.vendor == "aperio"
    assert fast.info.mpp == (0.499, 0.499)
    assert_same(fast, known)


def test_patches_at_any_mpp_are_the_same(aperio: Path) -> None:
    fast, known = open_slide(aperio), open_slide(aperio, reader="openslide")
    for mpp in (0.499, 0.73, 1.0, 2.0):
        found, expected = (read_region(slide, 333.5, 777.25, 200, 224, mpp) for slide in (fast, known))
        np.testing.assert_array_equal(found, expected)


def test_at_half_of_a_level_nothing_is_copied_for_the_filter(aperio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read goes into the frame that the filter wants; other readers' pixels are copied there."""
    with closing(open_slide(aperio)) as slide, closing(open_slide(aperio, reader="openslide")) as expected:
        mpp = 2 * slide.info.mpp_yx[0]
        known = [read_region(expected, y, x, 50, 60, mpp) for y, x in ((-9, -9), (300, 500))]
        monkeypatch.setattr(TiffSlide, "read_level", None)
        for (y, x), pixels in zip(((-9, -9), (300, 500)), known, strict=True):
            np.testing.assert_array_equal(read_region(slide, y, x, 50, 60, mpp), pixels)


def test_what_differs_from_openslide_is_read_by_openslide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slide = write_marker_slide(tmp_path / "a.tif", 500, 500, mpp=0.25, markers=[(100, 200)], marker_px=60)
    plain = TiffSlide.read_level
    monkeypatch.setattr(TiffSlide, "read_level", lambda self, *where: plain(self, *where) ^ 1)
    with caplog.at_level("INFO", "wsi_gradcam"):
        assert isinstance(open_slide(slide.path), OpenSlideSlide)
    assert "is read by OpenSlide: " in caplog.text
    assert "level 0, x 0, y 0 differs from OpenSlide's by 1" in caplog.text


def test_what_tifffile_cannot_read_is_read_by_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = write_marker_slide(tmp_path / "a.tif", 500, 500, mpp=0.25, markers=[(100, 200)], marker_px=60)

    def fail(file: object) -> None:
        raise KeyError("unheard of")

    monkeypatch.setattr(opening, "tiff_levels", fail)
    before = open_files(slide.path)
    assert isinstance(open_slide(slide.path), OpenSlideSlide)
    assert open_files(slide.path) <= before + 1


# --- what OpenSlide does not know ---


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_honoured(orientation: int, tmp_path: Path) -> None:
    picture = noise(90, 70)
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        picture,
        tile=(32, 48),
        photometric="rgb",
        metadata=None,
        resolution=(20_000, 10_000),
        resolutionunit="CENTIMETER",
        extratags=[(274, "H", 1, orientation, True)],
    )
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    image = Image.fromarray(picture)
    expected = np.asarray(image.transpose(turned[orientation]) if orientation > 1 else image)
    slide = open_slide(path, reader="tiff")
    assert (slide.info.height, slide.info.width) == expected.shape[:2]
    assert slide.info.mpp == ((1.0, 0.5) if orientation < 5 else (0.5, 1.0))
    padded = np.pad(expected, ((400, 400), (400, 400), (0, 0)), constant_values=255)
    for region in regions(*expected.shape[:2]):
        shown = padded[400 + region.y : 400 + region.bottom, 400 + region.x : 400 + region.right]
        np.testing.assert_array_equal(slide.read_level(0, region), shown)
        assert isinstance(slide, TiffSlide)
        larger = np.full((region.height + 4, region.width + 6, 3), 99, np.uint8)
        slide.read_into(0, region, larger[2:-2, 3:-3])
        np.testing.assert_array_equal(larger, np.pad(shown, ((2, 2), (3, 3), (0, 0)), constant_values=99))
    assert isinstance(slide, TiffSlide)
    covered = np.zeros(expected.shape[:2], int)
    for region in slide.sample_tiles(0, 99):
        covered[region.slices] += 1
    assert covered.min() == covered.max() == 1


def write_ome(path: Path, picture: Rgb, levels: int = 3, **metadata: Any) -> Path:
    with tifffile.TiffWriter(path, ome=True) as writer:
        options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "compression": "deflate"}
        writer.write(picture, subifds=levels - 1, metadata={"axes": "YXS", **metadata}, **options)
        for i in range(1, levels):
            writer.write(picture[:: 2**i, :: 2**i], subfiletype=1, **options)
    return path


@pytest.mark.parametrize(
    ("metadata", "mpp"),
    [
        ({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}, (0.5, 0.25)),
        (
            {"PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.0005, "PhysicalSizeYUnit": "mm"},
            (0.5, 0.25),
        ),
    ],
)
def test_levels_in_subifds_are_found(metadata: dict[str, Any], mpp: tuple[float, float], tmp_path: Path) -> None:
    picture = noise(300, 400)
    slide = open_slide(write_ome(tmp_path / "a.ome.tif", picture, **metadata))
    assert isinstance(slide, TiffSlide)
    assert [(level.height, level.width) for level in slide.info.levels] == [(300, 400), (150, 200), (75, 100)]
    assert slide.info.mpp == pytest.approx(mpp)
    for number in range(3):
        expected = picture[:: 2**number, :: 2**number]
        np.testing.assert_array_equal(slide.read_level(number, Region(0, 0, *expected.shape[:2])), expected)


def test_a_single_level_says_its_mpp_in_ome_xml(tmp_path: Path) -> None:
    """OpenSlide knows such a file, and looks at its resolution tags alone."""
    about: Any = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}
    picture = noise(300, 400)
    tifffile.imwrite(tmp_path / "a.ome.tif", picture, ome=True, tile=(128, 128), photometric="rgb", metadata=about)
    with closing(open_slide(tmp_path / "a.ome.tif")) as slide:
        assert slide.info.mpp == pytest.approx((0.5, 0.25))
        np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 300, 400)), picture)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "the file has no PhysicalSizeY; give the micrometres per pixel, such as --mpp 0.25"),
        (
            {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "pixel"},
            "PhysicalSizeY is '0.25' 'pixel'",
        ),
        ({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.0}, "PhysicalSizeY is 0, expected 0.01 to 100 um per pixel"),
    ],
)
def test_an_ome_tiff_without_mpp_says_so(metadata: dict[str, Any], said: str, tmp_path: Path) -> None:
    slide = open_slide(write_ome(tmp_path / "a.ome.tif", noise(300, 400), **metadata), reader="tiff")
    with pytest.raises(MppError, match=said):
        _ = slide.info.mpp_yx


@pytest.mark.parametrize(
    ("resolution", "unit", "said"),
    [
        ((72, 72), "INCH", "the pixel size from tag YResolution is 352.778, expected 0.01 to 100"),
        ((1, 1), "NONE", "the file does not state its resolution"),
        ((0, 0), "INCH", "the pixel size from tag YResolution is 0"),
    ],
)
def test_a_tiff_without_mpp_says_so(resolution: tuple[int, int], unit: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(50, 60), photometric="rgb", resolution=resolution, resolutionunit=unit, metadata=None)
    with pytest.raises(MppError, match=said):
        _ = open_slide(path, reader="tiff").info.mpp_yx


@pytest.mark.parametrize("downsamples", [(4, 8), (3, 7), (2, 3, 16)])
def test_levels_may_shrink_by_different_factors(downsamples: tuple[int, ...], tmp_path: Path) -> None:
    made = write_marker_slide(
        tmp_path / "a.tif", 1024, 1536, mpp=0.5, markers=[(9, 9)], marker_px=9, downsamples=downsamples
    )
    with closing(open_slide(made.path)) as slide:
        assert isinstance(slide, TiffSlide)
        assert [level.width for level in slide.info.levels] == [1536, *(-(-1536 // d) for d in downsamples)]


def test_a_reduced_picture_of_another_shape_is_no_level(tmp_path: Path) -> None:
    """Such as a macro picture of the glass, in tiles."""
    picture = np.random.default_rng(0).integers(0, 256, (256, 384, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for kind, part in enumerate((picture, picture[::2, ::2], picture[:32, :16])):
            writer.write(part, tile=(64, 64), photometric="rgb", subfiletype=int(kind > 0), metadata=None)
    with closing(open_slide(tmp_path / "a.tif", 0.5, "tiff")) as slide:
        assert [(level.height, level.width) for level in slide.info.levels] == [(256, 384), (128, 192)]


def test_several_pictures_that_belong_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    stains = np.zeros((3, 50, 60), np.uint8)
    tifffile.imwrite(path, stains, ome=True, metadata={"axes": "CYX"}, photometric="minisblack")
    with pytest.raises(SlideFormatError, match=r"3 separate channels.*expected one image in colour"):
        open_slide(path)


# --- damage ---


@pytest.mark.parametrize("damage", ["unreadable", "missing"])
def test_a_damaged_tile_is_its_own_matter(damage: Any, tmp_path: Path) -> None:
    slide = write_marker_slide(
        tmp_path / "whole.tif", 800, 800, mpp=0.25, markers=[(100, 200)], marker_px=60, compression="deflate"
    )
    corrupt_tile(slide.path, tmp_path / "a.tif", 0, 1, 2, damage=damage)
    found = open_slide(tmp_path / "a.tif")
    assert isinstance(found, TiffSlide)
    for _ in range(2):
        with pytest.raises(SlideReadError, match=r"a.tif: level 0, x 512, y 256, 256 x 256 px cannot be decoded"):
            found.read_level(0, Region(500, 700, 20, 20))
    np.testing.assert_array_equal(found.read_level(0, Region(0, 0, 256, 800)), slide.level0[:256])


def test_tiles_that_claim_too_much_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(64, 64), tile=(32, 32), photometric="rgb", metadata=None)
    slide = open_slide(path, 0.5, "tiff")
    assert isinstance(slide, TiffSlide)
    level = slide._levels[0]
    for tile, (offset, count) in enumerate([(-5, 100), (8, 1 << 40), (1 << 40, 3072), (8, 3072)]):
        level.offsets[tile], level.counts[tile] = offset, count
    for tile, said in enumerate(["-5 are claimed", "are claimed for a tile", "the file ends 3072 bytes"]):
        with pytest.raises(SlideReadError, match=said):
            slide.read_level(0, Region(32 * (tile // 2), 32 * (tile % 2), 4, 4))
    slide.read_level(0, Region(32, 32, 4, 4))


def test_closing_releases_the_file(tmp_path: Path) -> None:
    slide = write_marker_slide(tmp_path / "a.tif", 300, 300, mpp=0.25, markers=[(100, 200)], marker_px=60)
    opened = open_slide(slide.path)
    assert open_files(slide.path) == 1
    opened.close()
    assert open_files(slide.path) == 0


def test_an_unknown_reader_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="reader 'tif' is not known; expected one of auto, openslide, tiff, ome-zarr"):
        open_slide(path, reader="tif")


@pytest.mark.parametrize("colours", ["rgb", "ycbcr"])
def test_jpeg_tiles_are_decoded_as_by_tifffile(colours: Any, tmp_path: Path) -> None:
    """To memory of our own, at addresses that libjpeg writes to faster."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        noise(200, 300),
        tile=(64, 64),
        photometric="rgb",
        compression="jpeg",
        metadata=None,
        compressionargs={"outcolorspace": colours},
    )
    with tifffile.TiffFile(path) as file, closing(LocalFile(path)) as source:
        (level,), page = tiff_levels(file), cast(tifffile.TiffPage, file.pages[0])
        assert level.decode_jpeg is not None
        for i in range(20):
            (data,) = source.read_many([(int(level.offsets[i]), int(level.counts[i]))])
            assert isinstance(data, bytes)
            expected, _, shape = page.decode(data, i, jpegtables=level.jpegtables)
            assert expected is not None
            np.testing.assert_array_equal(level.decode([i], [data]), expected[0, : shape[1], : shape[2]])
            found = level.decode_jpeg(data, 1)
            assert found is not None
            assert found.ctypes.data % 32 == 16
