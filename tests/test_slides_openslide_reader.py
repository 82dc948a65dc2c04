"""The OpenSlide reader: exact pixels, transparency, mpp, damage, and reading on after damage."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.oracles import crop
from tests.synthetic import corrupt_tile, set_resolution, strip_mpp, tissue_texture, truncate
from wsi_gradcam import slides as readers
from wsi_gradcam.demo.slide import write_slide
from wsi_gradcam.errors import MppError, SlideFormatError, SlideReadError, one_line
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import Slide, openslide_reader, read_region
from wsi_gradcam.slides.openslide_reader import OpenSlideSlide


def open_slide(path: Path, mpp: float | tuple[float, float] | None = None) -> Slide:
    return readers.open_slide(path, mpp, "openslide")


Rgb = npt.NDArray[np.uint8]
WHITE = (255, 255, 255)
TILE_PX = 64


class Written(NamedTuple):
    path: Path
    levels: list[Rgb]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slides")


@pytest.fixture(scope="module")
def written(folder: Path) -> Written:
    """Lossless, with whole downsamples 2 and 4 in OpenSlide's eyes too."""
    return write(folder / "even.tiff", (256, 320), (2, 4))


def write(path: Path, size: tuple[int, int], factors: tuple[int, ...]) -> Written:
    level0 = np.tile(tissue_texture(256, np.random.default_rng(1)), (3, 3, 1))[: size[0], : size[1]]
    write_slide(path, level0, mpp=(0.6, 0.5), tile_px=TILE_PX, downsample=factors, compression="deflate")
    with tifffile.TiffFile(path) as tiff:
        return Written(path, [page.asarray() for page in tiff.pages])


regions = st.builds(Region, st.integers(-30, 270), st.integers(-30, 330), st.integers(1, 50), st.integers(1, 50))


@given(region=regions, level=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_every_region_of_every_level_is_the_files_own_pixels(written: Written, region: Region, level: int) -> None:
    slide = open_slide(written.path)
    got = slide.read_level(level, region)
    slide.close()
    expected = crop(written.levels[level], region.y, region.x, region.height, region.width, WHITE)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [(250, 310), (255, 317), (257, 322)])
@pytest.mark.parametrize("factors", [(4,), (3, 7)])
def test_above_and_left_of_a_level_with_an_inexact_downsample_nothing_is_shifted(
    folder: Path, size: tuple[int, int], factors: tuple[int, ...]
) -> None:
    odd = write(folder / "odd.tiff", size, factors)
    slide = open_slide(odd.path)
    got = slide.read_level(1, Region(-23, -31, 60, 60))
    slide.close()
    np.testing.assert_array_equal(got, crop(odd.levels[1], -23, -31, 60, 60, WHITE))


@pytest.mark.parametrize(
    "region", [Region(10_000, 0, 5, 7), Region(-50, -50, 50, 50), Region(256, 0, 3, 3), Region(-(10**12), 0, 4, 4)]
)
def test_what_lies_wholly_outside_is_background(written: Written, region: Region) -> None:
    slide = open_slide(written.path)
    got = slide.read_level(0, region)
    slide.close()
    assert got.shape == (region.height, region.width, 3)
    assert (got == WHITE).all()


def test_the_slides_own_background_colour_is_used(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openslide_reader, "_background", lambda properties: (10, 20, 30))
    slide = open_slide(written.path)
    got = slide.read_level(0, Region(-2, -2, 4, 4))
    slide.close()
    np.testing.assert_array_equal(got, crop(written.levels[0], -2, -2, 4, 4, (10, 20, 30)))


@pytest.mark.parametrize(
    ("text", "colour"),
    [("F1E0d2", (241, 224, 210)), ("000000", (0, 0, 0)), ("", WHITE), ("FFF", WHITE), ("nope", WHITE)],
)
def test_background_property(text: str, colour: tuple[int, int, int]) -> None:
    assert openslide_reader._background({openslide.PROPERTY_NAME_BACKGROUND_COLOR: text}) == colour


def test_a_slide_without_a_background_colour_lies_on_white() -> None:
    assert openslide_reader._background({}) == WHITE


@given(st.integers(0, 255), st.tuples(*[st.integers(0, 255)] * 3), st.tuples(*[st.integers(0, 255)] * 3))
def test_alpha_is_composited_on_the_background(
    alpha: int, colour: tuple[int, int, int], background: tuple[int, int, int]
) -> None:
    got = openslide_reader._composite(Image.new("RGBA", (2, 1), (*colour, alpha)), background)
    share = alpha / 255
    expected = [share * c + (1 - share) * b for c, b in zip(colour, background, strict=True)]
    assert np.abs(got - np.array(expected)).max() <= 1


def test_a_missing_tile_is_an_error_and_not_glass(written: Written, folder: Path) -> None:
    hole = folder / "hole.tiff"
    corrupt_tile(written.path, hole, 0, 1, 2, damage="missing")
    slide = open_slide(hole)
    with pytest.raises(SlideReadError, match="a tile is missing"):
        slide.read_level(0, Region(0, 0, 256, 320))
    top = Region(0, 0, TILE_PX, 320)
    np.testing.assert_array_equal(slide.read_level(0, top), written.levels[0][top.slices])
    slide.close()


def test_formats_that_leave_out_glass_show_it(written: Written, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hole = folder / "sparse.tiff"
    corrupt_tile(written.path, hole, 0, 1, 2, damage="missing")
    monkeypatch.setattr(openslide_reader, "DENSE", frozenset())
    expected = written.levels[0].copy()
    expected[TILE_PX : 2 * TILE_PX, 2 * TILE_PX : 3 * TILE_PX] = WHITE
    slide = open_slide(hole)
    np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 256, 320)), expected)
    slide.close()


def test_bounds_are_read_where_the_format_has_them() -> None:
    names = ("Y", "X", "HEIGHT", "WIDTH")
    properties = {getattr(openslide, f"PROPERTY_NAME_BOUNDS_{n}"): v for n, v in zip(names, "5678", strict=True)}
    assert openslide_reader._bounds(properties, (90, 90)) == Region(5, 6, 7, 8)
    del properties[openslide.PROPERTY_NAME_BOUNDS_WIDTH]
    assert openslide_reader._bounds(properties, (90, 90)) is None


class TestMpp:
    def test_anisotropic_is_told_as_y_x(self, written: Written) -> None:
        slide = open_slide(written.path)
        assert slide.info.mpp_yx == pytest.approx((0.6, 0.5), rel=1e-5)
        slide.close()

    @pytest.mark.parametrize("given", [0.25, (0.25, 0.3), 1])
    def test_given_replaces_the_files(self, written: Written, given: float | tuple[float, float]) -> None:
        slide = open_slide(written.path, mpp=given)
        assert slide.info.mpp_yx == (given if isinstance(given, tuple) else (given, given))
        slide.close()

    def test_given_stands_in_for_a_missing_one(self, written: Written, folder: Path) -> None:
        strip_mpp(written.path, folder / "stripped.tiff")
        slide = open_slide(folder / "stripped.tiff", mpp=0.5)
        native = read_region(slide, 0, 0, 20, 20, 0.5)
        slide.close()
        np.testing.assert_array_equal(native, written.levels[0][:20, :20])

    def test_missing_names_property_and_mend_on_first_use_only(self, written: Written, folder: Path) -> None:
        strip_mpp(written.path, folder / "stripped.tiff")
        slide = open_slide(folder / "stripped.tiff")
        with pytest.raises(MppError, match=r"stripped\.tiff: the file has no openslide\.mpp-y; .*--mpp") as caught:
            _ = slide.info.mpp_yx
        slide.close()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("x", "y", "told"), [(72, 72, "352.778"), (-20000, -20000, "-"), (1, 1, "25400"), (4e9, 4e9, "e-06")]
    )
    def test_nonsense_in_the_tags_is_quoted(
        self, written: Written, folder: Path, x: float, y: float, told: str
    ) -> None:
        path = folder / "nonsense.tiff"
        set_resolution(written.path, path, x, y, unit=2)
        self.refused(path, "openslide.mpp-y is", told)

    @pytest.mark.parametrize("text", ["inf", "-inf", "-0.499", "0", "9999"])
    def test_nonsense_in_an_aperio_header_is_quoted(self, folder: Path, text: str) -> None:
        self.refused(aperio(folder, text), "openslide.mpp-y is", text)

    @pytest.mark.parametrize("text", ["nan", "abc", ""])
    def test_what_openslide_does_not_take_for_a_number_is_missing(self, folder: Path, text: str) -> None:
        self.refused(aperio(folder, text), "has no openslide.mpp-y", "")

    @pytest.mark.parametrize("text", ["nan", "abc", "", "0.5 um"])
    def test_a_property_that_is_no_number_is_quoted(self, text: str) -> None:
        mpp, problem = openslide_reader._mpp({"openslide.mpp-y": "0.5", "openslide.mpp-x": text})
        assert mpp is None
        assert "openslide.mpp-x is" in problem
        assert text in problem
        assert "--mpp" in problem

    @pytest.mark.parametrize("given", [0, -1.0, float("nan"), float("inf"), 5000, (0.5, 0.0), (-0.5, 0.5)])
    def test_an_impossible_given_one_is_refused(self, written: Written, given: float) -> None:
        with pytest.raises(MppError, match=r"even\.tiff: the given mpp is .*--mpp"):
            open_slide(written.path, mpp=given)

    @staticmethod
    def refused(path: Path, what: str, told: str) -> None:
        slide = open_slide(path)
        with pytest.raises(MppError) as caught:
            _ = slide.info.mpp_yx
        slide.close()
        message = str(caught.value)
        assert path.name in message
        assert what in message
        assert told in message
        assert "--mpp" in message
        assert "\n" not in message


def aperio(folder: Path, mpp: str) -> Path:
    path = folder / "aperio.svs"
    tifffile.imwrite(
        path,
        tissue_texture(256, np.random.default_rng(0)),
        tile=(64, 64),
        photometric="rgb",
        compression="jpeg",
        description=f"Aperio Image Library v1\r\n256x256 |AppMag = 20|MPP = {mpp}",
        metadata=None,
    )
    return path


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class TestDamagedFile:
    @pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 0.9, 0.999])
    def test_truncated_is_refused_on_one_line(self, written: Written, folder: Path, fraction: float) -> None:
        truncate(written.path, folder / "cut.tiff", fraction)
        with pytest.raises(SlideFormatError, match=r"cut\.tiff: .*copy the file again") as caught:
            open_slide(folder / "cut.tiff")
        assert "\n" not in one_line(caught.value)

    @pytest.mark.parametrize("content", [b"", b"II*\0", b"hello\n" * 1000, bytes(5000)])
    def test_not_a_slide_is_refused_whatever_its_name(self, folder: Path, content: bytes) -> None:
        path = folder / "fake.svs"
        path.write_bytes(content)
        with pytest.raises(SlideFormatError, match=r"fake\.svs: .*convert it"):
            open_slide(path)

    def test_refused_files_are_not_kept_open(self, folder: Path) -> None:
        path = folder / "fake.svs"
        path.write_bytes(b"no slide")
        before = open_files()
        for _ in range(20):
            with pytest.raises(SlideFormatError):
                open_slide(path)
        assert open_files() <= before + 2


class TestDamagedTile:
    BAD = Region(TILE_PX, 2 * TILE_PX, TILE_PX, TILE_PX)

    @pytest.fixture
    def bad(self, written: Written, folder: Path) -> Path:
        path = folder / "bad.tiff"
        corrupt_tile(written.path, path, 0, 1, 2)
        return path

    def test_is_an_error_that_names_slide_and_region(self, bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        slide = open_slide(bad)
        with pytest.raises(SlideReadError, match=r"bad\.tiff: level 0, x 100, y 60, 40 x 30 px cannot be") as caught:
            slide.read_level(0, Region(60, 100, 30, 40))
        slide.close()
        assert "DeflateError" in str(caught.value)  # our own decoder's
        monkeypatch.setattr(OpenSlideSlide, "read_level", OpenSlideSlide.read_as_it_is)
        slide = open_slide(bad)
        with pytest.raises(SlideReadError, match=r"bad\.tiff: level 0, x 100, y 60, 40 x 30 px cannot be") as caught:
            slide.read_level(0, Region(60, 100, 30, 40))
        slide.close()
        assert isinstance(caught.value.__cause__, openslide.OpenSlideError)

    @pytest.mark.parametrize("region", [BAD, Region(0, 0, 256, 320), Region(127, 191, 2, 2)])
    def test_is_never_background(self, bad: Path, region: Region) -> None:
        slide = open_slide(bad)
        for _ in range(2):
            with pytest.raises(SlideReadError):
                slide.read_level(0, region)
        slide.close()

    def test_leaves_every_other_tile_readable(self, bad: Path, written: Written) -> None:
        slide = open_slide(bad)
        for y in range(0, 256, TILE_PX):
            for x in range(0, 320, TILE_PX):
                self.check(slide, written, Region(y, x, TILE_PX, TILE_PX))
        for level in (1, 2):
            np.testing.assert_array_equal(
                slide.read_level(level, Region(0, 0, 64, 64)), written.levels[level][:64, :64]
            )
        slide.close()

    def test_costs_later_regions_nothing(self, bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        slide = open_slide(bad)
        with pytest.raises(SlideReadError):
            slide.read_level(0, self.BAD)
        monkeypatch.delattr(openslide_reader, "_open")
        for _ in range(3):
            assert slide.read_level(0, Region(0, 0, 8, 8)).shape == (8, 8, 3)
        slide.close()

    def test_leaves_other_threads_their_good_regions(self, bad: Path, written: Written) -> None:
        slide = open_slide(bad)
        good = [Region(y, x, 40, 40) for y in (0, 140, 200) for x in (3, 70, 230)]
        start = threading.Barrier(6)

        def reader(offset: int) -> None:
            start.wait()
            for i in range(60):
                self.check(slide, written, self.BAD if (i + offset) % 3 == 0 else good[(i + offset) % len(good)])

        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(reader, offset) for offset in range(6)]:
                done.result()
        slide.close()

    def test_opens_no_more_files_than_it_closes(self, bad: Path) -> None:
        slide = open_slide(bad)
        before = open_files()
        for _ in range(20):
            with pytest.raises(SlideReadError):
                slide.read_level(0, self.BAD)
        assert open_files() <= before + 2
        slide.close()

    def check(self, slide: Slide, written: Written, region: Region) -> None:
        if region == self.BAD:
            with pytest.raises(SlideReadError):
                slide.read_level(0, region)
        else:
            np.testing.assert_array_equal(slide.read_level(0, region), written.levels[0][region.slices])


def test_a_file_that_vanishes_while_reading_is_an_error_of_ours(written: Written, folder: Path) -> None:
    path = folder / "vanishing.tiff"
    corrupt_tile(written.path, path, 0, 0, 0)
    slide = open_slide(path)
    path.unlink()
    with pytest.raises(SlideFormatError, match=r"vanishing\.tiff"):
        slide.read_level(0, Region(0, 0, 8, 8))
    slide.close()


class TestDigest:
    def test_is_the_same_for_a_copy_and_any_given_mpp(self, written: Written, folder: Path) -> None:
        shutil.copyfile(written.path, folder / "copy.tif")
        digests = set()
        for slide in (open_slide(written.path), open_slide(folder / "copy.tif"), open_slide(written.path, mpp=0.1)):
            digests.add(slide.info.digest)
            slide.close()
        assert len(digests) == 1

    def test_changes_with_a_damaged_tile_and_with_the_tags(self, written: Written, folder: Path) -> None:
        corrupt_tile(written.path, folder / "a.tiff", 0, 3, 3)
        strip_mpp(written.path, folder / "b.tiff")
        slides = [open_slide(path) for path in (written.path, folder / "a.tiff", folder / "b.tiff")]
        assert len({slide.info.digest for slide in slides}) == 3
        for slide in slides:
            slide.close()


def test_a_closed_slide_holds_no_file(written: Written) -> None:
    before = open_files()
    slides = [OpenSlideSlide(written.path) for _ in range(10)]
    for slide in slides:
        slide.read_level(0, Region(0, 0, 8, 8))
        slide.close()
    assert open_files() <= before
