"""The synthetic slides are what they claim, in OpenSlide's eyes; so is the demo's slide and its layout."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from tests.synthetic import (
    CENTIMETRES,
    INCHES,
    GigapixelSlide,
    MarkerSlide,
    corrupt_tile,
    set_resolution,
    strip_mpp,
    tissue_texture,
    truncate,
    write_gigapixel_slide,
    write_marker_slide,
)
from wsi_gradcam.demo.slide import Layout, lay_out, plan_layout, quadrants, shrink, write_slide
from wsi_gradcam.errors import ConfigError, MppError

Rgba = npt.NDArray[np.uint8]
TILE_PX = 256


def read(path: Path, y: int, x: int, size: tuple[int, int], level: int = 0) -> Rgba:
    """A region [height, width, 4] by a handle of its own; y and x in level-0 px."""
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((x, y), level, (size[1], size[0])))


def mpp_of(path: Path) -> tuple[float | None, float | None]:
    """(y, x) as OpenSlide tells it."""
    with openslide.OpenSlide(path) as slide:
        found = [slide.properties.get(f"openslide.mpp-{axis}") for axis in "yx"]
    y, x = (None if value is None else float(value) for value in found)
    return y, x


def in_blocks(mask: npt.NDArray[np.bool_], factor: int) -> npt.NDArray[np.bool_]:
    """True where a block of factor x factor px is wholly True."""
    rows = np.logical_and.reduceat(mask, range(0, mask.shape[0], factor), axis=0)
    blocks: npt.NDArray[np.bool_] = np.logical_and.reduceat(rows, range(0, mask.shape[1], factor), axis=1)
    return blocks


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> GigapixelSlide:
    path = tmp_path_factory.mktemp("giant") / "giant.tiff"
    return write_gigapixel_slide(path, 98_400, 98_400, mpp=0.25, tissue_fraction=0.05)


@pytest.fixture(scope="module", params=["jpeg", "deflate"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MarkerSlide:
    path = tmp_path_factory.mktemp("small") / f"{request.param}.tiff"
    return write_marker_slide(
        path,
        700,
        1100,
        mpp=0.5,
        markers=[(300, 400)],
        marker_px=32,
        downsamples=(2,),
        compression=request.param,
    )


class TestGigapixelSlide:
    def test_opens_as_a_small_generic_tiff_of_full_size(self, giant: GigapixelSlide) -> None:
        assert giant.path.stat().st_size < 6e6
        assert openslide.OpenSlide.detect_format(giant.path) == "generic-tiff"
        with openslide.OpenSlide(giant.path) as slide:
            assert slide.level_dimensions == (
                (98_400, 98_400),
                (24_600, 24_600),
                (6_150, 6_150),
                (1_538, 1_538),
            )
        assert mpp_of(giant.path) == (0.25, 0.25)

    def test_tissue_has_the_stated_share_in_a_handful_of_blobs(self, giant: GigapixelSlide) -> None:
        assert giant.tissue.shape == (385, 385)
        assert giant.tissue.sum() == round(0.05 * 385 * 385)
        assert 1 <= ndimage.label(giant.tissue)[1] <= 5

    def test_thumbnail_shows_the_tissue_map(self, giant: GigapixelSlide) -> None:
        rgb = read(giant.path, 0, 0, (1_538, 1_538), level=3)[..., :3].astype(int)
        pink = rgb.max(-1) - rgb.min(-1) > 25
        expected = giant.tissue.repeat(4, 0).repeat(4, 1)[:1_538, :1_538]
        assert pink.mean() == pytest.approx(0.05, rel=0.02)
        assert (pink != expected).mean() < 0.001

    def test_each_tile_is_what_the_map_says(self, giant: GigapixelSlide) -> None:
        edge = giant.tissue[:, 1:] != giant.tissue[:, :-1]
        for row, col in np.argwhere(edge)[::40]:
            pair = read(giant.path, row * TILE_PX, col * TILE_PX, (TILE_PX, 2 * TILE_PX))[..., 1]
            tissue = [bool(half.mean() < 200) for half in (pair[:, :TILE_PX], pair[:, TILE_PX:])]
            assert tissue == giant.tissue[row, col : col + 2].tolist()

    def test_coarse_levels_are_the_mean_of_level_0(self, tmp_path: Path) -> None:
        texture = tissue_texture(3 * 64, np.random.default_rng(1))  # a period of 3 tiles: no divisor of 4 or 16
        slide = write_gigapixel_slide(
            tmp_path / "s.tiff",
            1_500,
            2_000,
            mpp=None,
            tile_px=64,
            tissue_fraction=0.4,
            downsamples=(4, 16),
            tissue_rgb=texture,
            quality=98,
        )
        level0 = read(slide.path, 0, 0, (1_500, 2_000))[..., :3]
        for level, factor in enumerate(slide.downsamples[1:], start=1):
            coarse = shrink(level0, factor)[:-1, :-1].astype(int)  # the last row and column reach over the edge
            found = read(slide.path, 0, 0, coarse.shape[:2], level)[..., :3]
            assert np.abs(found - coarse).mean() < 2.5
        assert mpp_of(slide.path) == (None, None)


class TestMarkerSlide:
    @pytest.mark.parametrize("downsamples", [(2, 4), (4,), (3, 7), (3, 9)])
    def test_markers_stand_at_their_place_on_every_level(self, tmp_path: Path, downsamples: tuple[int, ...]) -> None:
        slide = write_marker_slide(
            tmp_path / "m.tiff",
            1_000,
            1_401,
            mpp=(0.5, 0.25),
            markers=[(60, 90), (517, 1_222), (960, 700)],
            marker_px=70,
            downsamples=downsamples,
            glass_px=20,
        )
        assert mpp_of(slide.path) == (0.5, 0.25)
        in_marker = np.zeros((1_000, 1_401), bool)
        for top, left, bottom, right in slide.boxes():
            in_marker[top:bottom, left:right] = True
        for level, factor in enumerate((1, *downsamples)):
            size = (math.ceil(1_000 / factor), math.ceil(1_401 / factor))
            with openslide.OpenSlide(slide.path) as opened:
                assert opened.level_dimensions[level] == (size[1], size[0])
            rgb = read(slide.path, 0, 0, size, level)[..., :3]
            whole, none = in_blocks(in_marker, factor), in_blocks(~in_marker, factor)
            assert whole.sum() >= 3 * (70 // factor - 1) ** 2
            assert (rgb[whole] == (0, 255, 0)).all()
            assert (rgb[none].astype(int) @ (-1, 2, -1) < 60).all()  # greenness; a marker's is 510

    def test_level_0_is_lossless(self, tmp_path: Path) -> None:
        slide = write_marker_slide(tmp_path / "m.tiff", 300, 500, mpp=1, markers=[(99, 40)], marker_px=9)
        assert slide.boxes() == [(95, 36, 104, 45)]
        np.testing.assert_array_equal(read(slide.path, 0, 0, (300, 500))[..., :3], slide.level0)

    def test_a_marker_outside_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"\(5, 40\) leaves the slide of 300 x 500 px"):
            write_marker_slide(tmp_path / "m.tiff", 300, 500, mpp=1, markers=[(5, 40)], marker_px=20)


class TestDamage:
    ROW, COL = 1, 2

    def damaged_and_others(self) -> list[tuple[bool, int, int]]:
        return [((row, col) == (self.ROW, self.COL), row, col) for row in range(3) for col in range(5)]

    def test_an_unreadable_tile_raises_and_its_neighbours_do_not(self, small: MarkerSlide, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.tiff"
        corrupt_tile(small.path, damaged, 0, self.ROW, self.COL)
        for bad, row, col in self.damaged_and_others():
            place = (row * TILE_PX, col * TILE_PX, (TILE_PX, TILE_PX))
            if bad:
                with pytest.raises(openslide.OpenSlideError, match=r"Not a JPEG file|Decoding error"):
                    read(damaged, *place)
            else:
                np.testing.assert_array_equal(read(damaged, *place), read(small.path, *place))

    def test_a_handle_does_not_survive_an_unreadable_tile(self, small: MarkerSlide, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.tiff"
        corrupt_tile(small.path, damaged, 0, self.ROW, self.COL)
        with openslide.OpenSlide(damaged) as slide:
            slide.read_region((0, 0), 0, (8, 8))
            for place in ((self.COL * TILE_PX, self.ROW * TILE_PX), (0, 0)):
                with pytest.raises(openslide.OpenSlideError):
                    slide.read_region(place, 0, (8, 8))

    def test_a_silent_tile_reads_wrong_only_in_jpeg(self, small: MarkerSlide, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.tiff"
        corrupt_tile(small.path, damaged, 0, self.ROW, self.COL, damage="silent")
        place = (self.ROW * TILE_PX, self.COL * TILE_PX, (TILE_PX, TILE_PX))
        if small.path.stem == "deflate":
            with pytest.raises(openslide.OpenSlideError, match="Decoding error"):
                read(damaged, *place)
        else:
            wrong = (read(damaged, *place) != read(small.path, *place)).any(-1).mean()
            assert 0.3 < wrong < 0.7

    def test_a_missing_tile_is_transparent(self, small: MarkerSlide, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.tiff"
        corrupt_tile(small.path, damaged, 0, self.ROW, self.COL, damage="missing")
        for bad, row, col in self.damaged_and_others():
            place = (row * TILE_PX, col * TILE_PX, (TILE_PX, TILE_PX))
            expected = 0 if bad else read(small.path, *place)
            assert (read(damaged, *place) == expected).all()

    def test_one_of_many_tiles_that_share_bytes_is_damaged(self, giant: GigapixelSlide, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.tiff"
        corrupt_tile(giant.path, damaged, 0, 7, 9)
        with pytest.raises(openslide.OpenSlideError, match="Not a JPEG file"):
            read(damaged, 7 * TILE_PX, 9 * TILE_PX, (8, 8))
        place = (7 * TILE_PX, 10 * TILE_PX, (TILE_PX, TILE_PX))
        np.testing.assert_array_equal(read(damaged, *place), read(giant.path, *place))

    def test_a_coarser_level_can_be_damaged(self, small: MarkerSlide, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.tiff"
        corrupt_tile(small.path, damaged, 1, 0, 1)
        read(damaged, 0, 0, (700, 1100))
        with pytest.raises(openslide.OpenSlideError):
            read(damaged, 0, 2 * TILE_PX, (8, 8), level=1)

    def test_a_tile_that_is_not_there_is_refused(self, small: MarkerSlide, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"3 x 5 tiles, so none at \(3, 0\)"):
            corrupt_tile(small.path, tmp_path / "damaged.tiff", 0, 3, 0)

    @pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99])
    def test_a_truncated_file_does_not_open(self, small: MarkerSlide, tmp_path: Path, fraction: float) -> None:
        truncate(small.path, tmp_path / "short.tiff", fraction)
        with pytest.raises(openslide.OpenSlideError):
            openslide.OpenSlide(tmp_path / "short.tiff")


class TestResolution:
    @pytest.mark.parametrize(
        ("x", "y", "unit", "mpp"),
        [
            (40_000, 20_000, CENTIMETRES, (0.5, 0.25)),
            (72, 72, INCHES, (25_400 / 72, 25_400 / 72)),
            (20_000, 20_000, None, (1.27, 1.27)),
            (20_000, 20_000, 1, (None, None)),
            (20_000, 20_000, 9, (None, None)),
            (0, 0, CENTIMETRES, (None, None)),
            ((0, 0), (0, 0), CENTIMETRES, (None, None)),
            (-20_000, -20_000, CENTIMETRES, (-0.5, -0.5)),
            (1e-3, 1e-3, CENTIMETRES, (1e7, 1e7)),
            (4e9, 4e9, CENTIMETRES, (2.5e-6, 2.5e-6)),
        ],
    )
    def test_what_openslide_makes_of_it(
        self,
        small: MarkerSlide,
        tmp_path: Path,
        x: float,
        y: float,
        unit: int | None,
        mpp: tuple[float | None, float | None],
    ) -> None:
        set_resolution(small.path, tmp_path / "set.tiff", x, y, unit)
        found = mpp_of(tmp_path / "set.tiff")
        assert found == (mpp if None in mpp else pytest.approx(mpp))

    def test_a_zero_denominator_in_a_bigtiff_hides_the_slide(self, giant: GigapixelSlide, tmp_path: Path) -> None:
        set_resolution(giant.path, tmp_path / "set.tiff", (1, 0), (1, 0))
        with pytest.raises(openslide.OpenSlideUnsupportedFormatError):
            openslide.OpenSlide(tmp_path / "set.tiff")

    def test_stripping_leaves_every_pixel(self, small: MarkerSlide, tmp_path: Path) -> None:
        strip_mpp(small.path, tmp_path / "stripped.tiff")
        assert mpp_of(tmp_path / "stripped.tiff") == (None, None)
        for level, size in ((0, (700, 1_100)), (1, (350, 550))):
            stripped = read(tmp_path / "stripped.tiff", 0, 0, size, level)
            np.testing.assert_array_equal(stripped, read(small.path, 0, 0, size, level))


class TestWriteSlide:
    def test_equal_input_gives_equal_bytes_and_no_other_file(self, tmp_path: Path) -> None:
        level0 = tissue_texture(512, np.random.default_rng(0))
        first, second = (write_slide(tmp_path / name, level0, mpp=0.5) for name in ("a.tiff", "b.tiff"))
        assert first.read_bytes() == second.read_bytes()
        assert {path.name for path in tmp_path.iterdir()} == {"a.tiff", "b.tiff"}

    def test_jpeg_keeps_the_picture(self, tmp_path: Path) -> None:
        level0 = tissue_texture(512, np.random.default_rng(0))[:500, :300]
        path = write_slide(tmp_path / "a.tiff", level0, mpp=0.5, tile_px=128, levels=2, downsample=4, quality=95)
        with openslide.OpenSlide(path) as slide:
            assert slide.level_dimensions == ((300, 500), (75, 125))
        error = read(path, 0, 0, (500, 300))[..., :3].astype(int) - level0
        assert np.abs(error @ (0.299, 0.587, 0.114)).mean() < 2  # luma; chroma is subsampled
        assert np.abs(error.mean((0, 1))).max() < 1

    @pytest.mark.parametrize("mpp", [0, -0.5, math.nan, math.inf, (0.5, 0.0)])
    def test_mpp_without_sense_is_refused(self, tmp_path: Path, mpp: float | tuple[float, float]) -> None:
        with pytest.raises(MppError, match=r"a\.tiff: mpp is .* above 0"):
            write_slide(tmp_path / "a.tiff", np.zeros((64, 64, 3), np.uint8), mpp=mpp)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tile_px": 100}, "multiple of 16"),
            ({"downsample": 1}, "at least 2"),
            ({"downsample": (4, 2)}, "grow from 1"),
            ({"downsample": (4, 128)}, "at most 64"),
            ({"downsample": (4,), "levels": 3}, "omit levels"),
            ({"levels": 0}, "grow from 1"),
            ({"compression": "lzw"}, "'lzw'; expected 'jpeg'"),
        ],
    )
    def test_impossible_pyramids_are_refused(self, tmp_path: Path, options: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            write_slide(tmp_path / "a.tiff", np.zeros((64, 64, 3), np.uint8), mpp=1, **options)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "level0", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3)), np.zeros((0, 64, 3), np.uint8)]
    )
    def test_what_is_no_rgb_image_is_refused(self, tmp_path: Path, level0: npt.NDArray[np.uint8]) -> None:
        with pytest.raises(ConfigError, match="expected uint8 RGB"):
            write_slide(tmp_path / "a.tiff", level0, mpp=1)

    def test_levels_stop_when_one_fits_into_a_few_tiles(self, tmp_path: Path) -> None:
        path = write_slide(tmp_path / "a.tiff", np.full((700, 300, 3), 9, np.uint8), mpp=1, tile_px=64)
        with openslide.OpenSlide(path) as slide:
            assert slide.level_dimensions == ((300, 700), (150, 350), (75, 175), (38, 88))

    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
    def test_shrink_is_the_mean_of_each_block(self, height: int, width: int, factor: int, seed: int) -> None:
        image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        small = shrink(image, factor)
        assert small.shape == (math.ceil(height / factor), math.ceil(width / factor), 3)
        for y in range(len(small)):
            for x in range(small.shape[1]):
                block = image[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
                assert np.abs(block.mean((0, 1)) - small[y, x]).max() <= 0.5


class TestLayout:
    SIZE, SOURCE = (900, 1_300), (120, 80)

    @pytest.fixture
    def layout(self) -> Layout:
        return plan_layout(self.SOURCE, self.SIZE, glass_px=24, seed=3)

    def test_everything_is_painted_alike(self, layout: Layout) -> None:
        source = np.arange(self.SOURCE[0] * self.SOURCE[1]).reshape(self.SOURCE)
        index = layout.paint(source, -1)
        picture = np.random.default_rng(0).integers(0, 256, (*self.SOURCE, 3), np.uint8)
        tissue = layout.tissue()
        np.testing.assert_array_equal(index >= 0, tissue)
        on_slide = layout.paint(picture, (1, 2, 3))
        np.testing.assert_array_equal(on_slide[tissue], picture.reshape(-1, 3)[index[tissue]])
        assert (on_slide[~tissue] == (1, 2, 3)).all()
        quadrant = layout.paint(quadrants(self.SOURCE), 255)
        np.testing.assert_array_equal(quadrant[tissue], quadrants(self.SOURCE).ravel()[index[tissue]])

    def test_copies_have_no_seams(self, layout: Layout) -> None:
        y, x = np.mgrid[: self.SOURCE[0], : self.SOURCE[1]]
        place = layout.paint(np.stack([y, x], -1), -1)
        tissue = layout.tissue()
        for axis in (0, 1):
            step = np.abs(np.diff(place, axis=axis)).sum(-1)
            inside = np.minimum(*(np.delete(tissue, end, axis) for end in (0, -1)))
            assert inside.any()
            assert step[inside].max() == 1

    def test_tissue_is_framed_by_glass_and_irregular(self, layout: Layout) -> None:
        tissue = layout.tissue()
        assert 0.3 < tissue.mean() < 0.7
        assert not any(edge.any() for edge in (tissue[:20], tissue[-20:], tissue[:, :20], tissue[:, -20:]))
        assert ndimage.label(tissue)[1] >= 3
        assert (tissue != plan_layout(self.SOURCE, self.SIZE, glass_px=24, seed=4).tissue()).mean() > 0.02

    def test_a_soft_picture_fades_and_keeps_the_rest(self, layout: Layout) -> None:
        white, black = np.full((*self.SOURCE, 3), 255, np.uint8), 0
        soft = layout.paint(white, black, soft=True)
        np.testing.assert_array_equal(soft[..., 0] >= 128, layout.tissue())
        assert 0.001 < ((soft > 0) & (soft < 255)).mean() < 0.2

    def test_lay_out_gives_a_slide_of_tissue_on_noisy_glass(self) -> None:
        micrograph = np.full((*self.SOURCE, 3), (120, 60, 140), np.uint8)
        slide, layout = lay_out(micrograph, self.SIZE, glass_px=24, seed=3)
        again, _ = lay_out(micrograph, self.SIZE, glass_px=24, seed=3)
        np.testing.assert_array_equal(slide, again)
        glass = slide[:12]
        assert glass.mean() == pytest.approx(243.3, abs=0.5)
        assert 1 < glass[..., 0].std() < 2
        assert (slide[layout.tissue()] == (120, 60, 140)).all(-1).mean() > 0.9

    def test_what_does_not_fit_is_refused(self, layout: Layout) -> None:
        with pytest.raises(ConfigError, match="paints images of 80 x 120 px"):
            layout.paint(np.zeros((80, 120)), 0)
        with pytest.raises(ConfigError, match="reduce the glass"):
            plan_layout(self.SOURCE, (300, 300), glass_px=60)
