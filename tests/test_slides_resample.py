"""Reading at any mpp against an exact triangle filter in float64, in parts against whole, and by marker position."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import crop, triangle_resample
from tests.slides_in_memory import BACKGROUND, ArraySlide
from tests.synthetic import Damage, corrupt_tile, tissue_texture
from wsi_gradcam.demo.slide import shrink, write_slide
from wsi_gradcam.errors import ConfigError, MppError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide, read_region, resample, thumbnail
from wsi_gradcam.slides.resample import best_level

Rgb = npt.NDArray[np.uint8]
# Pillow rounds to 8 bits after each of its two passes, and a start within 0.01 px of whole is taken as whole.
GRAY_LEVELS = 3

PYRAMIDS: dict[str, tuple[tuple[int, int], tuple[int, ...], tuple[float, float]]] = {
    "one level": ((131, 97), (), (0.5, 0.5)),
    "by two": ((256, 320), (2, 4), (0.5, 0.5)),
    "by two, cut levels": ((253, 319), (2, 4), (0.499, 0.499)),
    "by three and seven": ((231, 189), (3, 7), (0.25, 0.25)),
    "anisotropic": ((240, 200), (2, 4), (0.6, 0.4)),
}


def memory_slide(name: str) -> ArraySlide:
    (height, width), factors, mpp = PYRAMIDS[name]
    level0 = np.tile(tissue_texture(256, np.random.default_rng(3)), (2, 2, 1))[:height, :width]
    return ArraySlide([level0, *(shrink(level0, f) for f in factors)], mpp)


SLIDES = {name: memory_slide(name) for name in PYRAMIDS}


def expected_region(
    slide: ArraySlide, factors: tuple[int, ...], y: float, x: float, size: tuple[int, int], step: tuple[float, float]
) -> npt.NDArray[np.float64]:
    """The oracle's pixels from the coarsest level that is no more than 1 % coarser than asked for."""
    factor = max((f for f in (1, *factors) if f <= 1.01 * min(step)), default=1)
    level = slide.levels[(1, *factors).index(factor)]
    scale = (step[0] / factor, step[1] / factor)
    return triangle_resample(level, (y / factor, x / factor), scale, size, BACKGROUND)


@pytest.mark.parametrize("name", PYRAMIDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_region_at_any_mpp_equals_the_exact_filter(name: str, data: st.DataObject) -> None:
    slide, (extent, factors, mpp_yx) = SLIDES[name], PYRAMIDS[name]
    y = data.draw(st.one_of(st.floats(-40, extent[0] + 20), st.integers(-40, extent[0] + 20)))
    x = data.draw(st.one_of(st.floats(-40, extent[1] + 20), st.integers(-40, extent[1] + 20)))
    size = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    mpps: st.SearchStrategy[float | tuple[float, float]] = st.one_of(
        st.floats(0.15, 6), st.sampled_from([0.25, 0.5, 1.0, 2.0, mpp_yx[0]]), st.just(mpp_yx)
    )
    mpp = data.draw(mpps)
    mpp_y, mpp_x = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    got = read_region(slide, y, x, *size, mpp)
    expected = expected_region(slide, factors, y, x, size, (mpp_y / mpp_yx[0], mpp_x / mpp_yx[1]))
    assert got.shape == (*size, 3)
    assert got.dtype == np.uint8
    assert np.abs(got - expected).max() <= GRAY_LEVELS


@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("limit", [1 << 23, 900])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_reading_in_parts_equals_reading_whole(name: str, limit: int, data: st.DataObject) -> None:
    slide, mpp_yx = SLIDES[name], PYRAMIDS[name][2]
    y, x = data.draw(st.floats(-20, 60)), data.draw(st.floats(-20, 60))
    height, width = data.draw(st.integers(2, 50)), data.draw(st.integers(2, 50))
    row, column = data.draw(st.integers(1, height - 1)), data.draw(st.integers(1, width - 1))
    mpp = data.draw(st.floats(0.2, 5))
    whole = read_region(slide, y, x, height, width, mpp)
    parts = np.empty_like(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample, "MAX_SOURCE_PX", limit)
        for top, bottom in ((0, row), (row, height)):
            for left, right in ((0, column), (column, width)):
                place = y + top * mpp / mpp_yx[0], x + left * mpp / mpp_yx[1]
                parts[top:bottom, left:right] = read_region(slide, *place, bottom - top, right - left, mpp)
    assert np.abs(parts.astype(int) - whole).max() <= GRAY_LEVELS


@pytest.mark.parametrize("step", [1.0, 2.3, 9.0, 48.0])
def test_no_read_is_much_larger_than_the_limit(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "MAX_SOURCE_PX", 200 * 200)
    slide = ArraySlide([np.zeros((1500, 1500, 3), np.uint8)], (1.0, 1.0))
    size = math.ceil(1500 / step)
    read_region(slide, 0, 0, size, size, step)
    margin = 2 * math.ceil(step + 2)
    assert len(slide.reads) > 1
    assert max(r.height * r.width for _, r in slide.reads) <= (200 + margin) ** 2


@pytest.mark.parametrize("step", [1.0, 1.5, 3.0])
def test_one_region_is_one_read_where_it_fits(step: float) -> None:
    slide = memory_slide("one level")
    read_region(slide, 3, 5, 30, 40, 0.5 * step)
    assert len(slide.reads) == 1


@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("place", [(0, 0), (17, 31), (-9, 200), (240, -3)])
def test_native_pixels_pass_unchanged(name: str, place: tuple[int, int]) -> None:
    slide, mpp_yx = SLIDES[name], PYRAMIDS[name][2]
    got = read_region(slide, *place, 33, 21, mpp_yx)
    np.testing.assert_array_equal(got, crop(slide.levels[0], *place, 33, 21, BACKGROUND))


def test_pixels_of_a_coarser_level_pass_unchanged_at_its_own_mpp() -> None:
    slide = SLIDES["by three and seven"]
    got = read_region(slide, 3 * 11, 3 * 5, 20, 30, 0.75)
    np.testing.assert_array_equal(got, crop(slide.levels[1], 11, 5, 20, 30, BACKGROUND))


@pytest.mark.parametrize(("y", "x"), [(9.996, 3.3), (10.004, 3.3), (3.3, 9.996), (3.3, 10.004)])
def test_one_axis_may_need_no_resampling(y: float, x: float) -> None:
    slide = SLIDES["one level"]
    expected = triangle_resample(slide.levels[0], (y, x), (1, 1), (50, 40), BACKGROUND)
    assert np.abs(read_region(slide, y, x, 50, 40, 0.5) - expected).max() <= GRAY_LEVELS


@pytest.mark.parametrize("mpp", [0.3, 0.5, 1.1, 7.0])
@pytest.mark.parametrize("place", [(-400, 10), (10, 1000), (5000, 5000)])
def test_outside_is_background(mpp: float, place: tuple[int, int]) -> None:
    got = read_region(SLIDES["by two"], *place, 20, 20, mpp)
    assert (got == BACKGROUND).all()


def test_a_stripe_pattern_is_averaged_not_aliased() -> None:
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[::2] = 200
    got = read_region(ArraySlide([stripes], (1.0, 1.0)), 100, 100, 20, 20, 7.3)
    assert np.abs(got.astype(int) - 100).max() <= 5


@given(st.floats(0.01, 300), st.floats(0.01, 300))
def test_the_best_level_is_the_coarsest_that_loses_nothing(step_y: float, step_x: float) -> None:
    shapes = [(8000, 6000), (2000, 3000), (2000, 1500), (500, 375), (125, 94)]
    info = ArraySlide([np.broadcast_to(np.uint8(0), (*s, 3)) for s in shapes]).info
    downs = [(1, 1), (4, 2), (4, 4), (16, 16), (64, 64)]
    fine = [i for i, (y, x) in enumerate(downs) if y <= 1.01 * step_y and x <= 1.01 * step_x]
    chosen = best_level(info, step_y, step_x)
    assert chosen in (fine or [0])
    assert downs[chosen][0] == max((downs[i][0] for i in fine), default=1)


@pytest.mark.parametrize(
    ("mpp", "level"), [(0.5, 0), (0.99, 0), (0.9950, 1), (1.0, 1), (1.01, 1), (1.9, 1), (2.0, 2), (50.0, 2), (0.1, 0)]
)
def test_pixels_come_from_the_best_level(mpp: float, level: int) -> None:
    slide = memory_slide("by two")
    read_region(slide, 0, 0, 10, 10, mpp)
    slide.reads.clear()  # the first time levels were compared
    read_region(slide, 0, 0, 10, 10, mpp)
    assert {read for read, _ in slide.reads} == {level}


MPPS = [0.2, 0.37, 0.5, 0.75, 1.0, 1.7, 4.1]


@pytest.mark.parametrize("mpp", MPPS)
@pytest.mark.parametrize("extent", [(840, 672), (841, 673), (839, 681)])
@pytest.mark.parametrize("factors", [(), (2, 4), (3, 7)])
def test_a_marker_is_where_it_is(mpp: float, extent: tuple[int, int], factors: tuple[int, ...], tmp_path: Path) -> None:
    """The centroid of a dark square through file, OpenSlide and resampling, near the origin and the far corner."""
    level0 = np.full((*extent, 3), 255, np.uint8)
    centres = [(61, 85), (extent[0] - 60, extent[1] - 70)]
    for y, x in centres:
        level0[y - 16 : y + 16, x - 16 : x + 16] = 55
    path = write_slide(
        tmp_path / "m.tiff",
        level0,
        mpp=0.5,
        tile_px=128,
        downsample=factors or 2,
        levels=None if factors else 1,
        compression="deflate",
    )
    slide = open_slide(path)
    # OpenSlide places a level whose size is not an exact fraction to half a level-0 pixel only.
    whole = all(n % f == 0 for n in extent for f in factors)
    step = mpp / 0.5
    size = math.ceil(100 / step)
    for y, x in centres:
        top, left = y - 50.3, x - 49.6
        dark = 255.0 - read_region(slide, top, left, size, size, mpp)[..., 0]
        rows, columns = dark.sum(axis=1), dark.sum(axis=0)
        at = (np.arange(size) + 0.5) * step
        found = top + (rows * at).sum() / rows.sum(), left + (columns * at).sum() / columns.sum()
        assert np.abs(np.subtract(found, (y, x))).max() < 0.05 * max(1, step) + (0 if whole else 0.5)
    slide.close()


@pytest.mark.parametrize("size", [(300, 200), (7, 900), (900, 7), (1, 1)])
@pytest.mark.parametrize("max_px", [1, 16, 64, 2048])
def test_the_thumbnail_is_as_fine_as_asked_or_as_large_as_allowed(size: tuple[int, int], max_px: int) -> None:
    slide = ArraySlide([np.zeros((*size, 3), np.uint8)], (0.5, 0.5))
    step = max(4.0 / 0.5, max(size) / max_px)
    expected = [max(1, round(n / step)) for n in size]
    assert thumbnail(slide, 4.0, max_px).rgb.shape == (*expected, 3)


@pytest.mark.parametrize("size", [(301, 203), (130, 907), (907, 130)])
@pytest.mark.parametrize("max_px", [64, 2048])
@pytest.mark.parametrize("mpp", [1.3, 4.0])
def test_the_thumbnail_spans_the_slide_exactly(size: tuple[int, int], max_px: int, mpp: float) -> None:
    level0 = np.empty((*size, 3), np.uint8)
    level0[:] = BACKGROUND
    centre = size[0] - 62, size[1] - 62
    level0[centre[0] - 20 : centre[0] + 20, centre[1] - 20 : centre[1] + 20] = 0
    dark = BACKGROUND[0] - thumbnail(ArraySlide([level0], (0.5, 0.5)), mpp, max_px).rgb[..., 0].astype(float)
    for axis in (0, 1):
        profile = dark.sum(axis=1 - axis)
        found = (profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()
        assert found == pytest.approx(centre[axis] * len(profile) / size[axis], abs=0.05)


def test_the_thumbnail_of_an_anisotropic_slide_has_square_pixels() -> None:
    thumb = thumbnail(ArraySlide([np.zeros((400, 400, 3), np.uint8)], (1.0, 0.5)), 4.0, 2048).rgb
    assert thumb.shape == (100, 50, 3)


@pytest.mark.parametrize("mpp", [0, -0.5, math.nan, math.inf, (0.5, 0.0), (math.nan, 0.5)])
def test_a_request_that_makes_no_sense_is_refused(mpp: float | tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="expected positive, finite sizes"):
        read_region(SLIDES["by two"], 0, 0, 10, 10, mpp)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 5)])
def test_an_empty_region_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="expected positive, finite sizes"):
        read_region(SLIDES["by two"], 0, 0, *size, 0.5)


def test_a_slide_without_mpp_is_refused() -> None:
    with pytest.raises(MppError, match="--mpp"):
        read_region(ArraySlide([np.zeros((9, 9, 3), np.uint8)], None), 0, 0, 5, 5, 0.5)


def test_what_cannot_be_decoded_is_raised_also_where_only_the_filter_meets_it() -> None:
    slide = memory_slide("one level")
    slide.bad = Region(50, 50, 10, 10)
    for place, size, mpp in ((0, 50, 0.5), (0.5, 49, 0.5), (0, 24, 1.0), (0, 99, 0.25)):
        assert read_region(slide, place, place, size, size, mpp).any()
    for place, size, mpp in ((0.5, 50, 0.5), (0, 25, 1.0), (0, 100, 0.25)):  # all end at 50, or half a pixel beyond
        with pytest.raises(SlideReadError):
            read_region(slide, place, place, size, size, mpp)


@given(st.one_of(st.floats(-30, 90), st.integers(-30, 90)), st.integers(1, 40), st.floats(0.15, 3))
def test_exactly_what_the_filter_weighs_is_read(start: float, size: int, step: float) -> None:
    """What lies beside it may be damaged. A start within 0.01 px of whole may count as whole."""
    slide = ArraySlide([SLIDES["one level"].levels[0]], (1.0, 1.0))
    read_region(slide, start, 0, size, 5, (step, 1.0))
    ((_, read),) = slide.reads
    centres = start + (np.arange(size) + 0.5) * step
    rows = np.arange(-60, 260)
    away = np.abs(rows[:, None] + 0.5 - centres).min(axis=1) - max(1.0, step)
    found = (rows >= read.y) & (rows < read.bottom)
    assert found[away < -0.02].all()
    assert not found[away > 0.02].any()


@pytest.mark.parametrize("damage", ["unreadable", "missing"])
def test_the_thumbnail_leaves_out_only_what_cannot_be_decoded(tmp_path: Path, damage: Damage) -> None:
    level0 = np.full((1024, 1024, 3), 120, np.uint8)
    write_slide(tmp_path / "good.tiff", level0, mpp=0.5, levels=1)
    corrupt_tile(tmp_path / "good.tiff", tmp_path / "bad.tiff", 0, 1, 2, damage=damage)
    thumb = thumbnail(open_slide(tmp_path / "bad.tiff"), 1.0, 2048)
    bad = np.zeros((512, 512), np.bool_)
    bad[128:256, 256:384] = True
    assert (thumb.unreadable & bad).sum() == bad.sum()
    bad[112:272, 240:400] = True  # parts of 16 px whose filter reaches into the tile
    assert not (thumb.unreadable & ~bad).any()
    assert (thumb.rgb[2:-2, 2:-2][~thumb.unreadable[2:-2, 2:-2]] == 120).all()
    assert (thumb.rgb[thumb.unreadable] == 255).all()


def test_a_slide_of_which_most_is_gone_has_no_thumbnail(tmp_path: Path) -> None:
    level0 = np.full((512, 512, 3), 120, np.uint8)
    path = write_slide(tmp_path / "0.tiff", level0, mpp=0.5, levels=1)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        corrupt_tile(path, tmp_path / f"{i + 1}.tiff", 0, row, column)
        path = tmp_path / f"{i + 1}.tiff"
    with pytest.raises(SlideReadError, match="cannot be decoded"):
        thumbnail(open_slide(path), 1.0, 2048)
