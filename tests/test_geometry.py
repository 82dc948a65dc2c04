"""Regions and pyramid arithmetic against counting pixel by pixel."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.geometry import Region, ceil_div, pyramid_shapes, tiles
from wsi_gradcam.tissue.quality import fill, fill_small

regions = st.builds(Region, st.integers(-6, 6), st.integers(-6, 6), st.integers(0, 8), st.integers(0, 8))


def pixels(region: Region) -> set[tuple[int, int]]:
    return {(y, x) for y in range(region.y, region.y + region.height) for x in range(region.x, region.x + region.width)}


@given(regions, regions)
def test_intersection_holds_the_common_pixels(a: Region, b: Region) -> None:
    assert pixels(a.intersect(b)) == pixels(a) & pixels(b)


@given(regions, regions)
def test_intersection_is_empty_never_negative(a: Region, b: Region) -> None:
    common = a.intersect(b)
    assert common.height >= 0
    assert common.width >= 0
    assert (common.height * common.width == 0) == (not pixels(a) & pixels(b))


@given(regions, regions)
def test_intersection_is_the_same_from_both_sides(a: Region, b: Region) -> None:
    assert a.intersect(b) == b.intersect(a)


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_slices_cut_the_regions_own_pixels(y: int, x: int, height: int, width: int) -> None:
    image = np.arange(100).reshape(10, 10)
    region = Region(y, x, height, width)
    assert set(image[region.slices].ravel().tolist()) == {10 * i + j for i, j in pixels(region)}


@given(st.integers(-1000, 1000), st.integers(1, 50))
def test_ceil_div_is_the_smallest_whole_number_not_below(a: int, b: int) -> None:
    q = ceil_div(a, b)
    assert q * b >= a
    assert (q - 1) * b < a


def test_ceil_div_is_exact_beyond_floats() -> None:
    assert ceil_div(2**60 + 1, 2) == 2**59 + 1


@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 9))
def test_tiles_hold_every_pixel_once_row_by_row(height: int, width: int, side: int) -> None:
    count = np.zeros((height, width), int)
    found = tiles(height, width, side)
    for tile in found:
        assert 1 <= tile.height <= side
        assert 1 <= tile.width <= side
        count[tile.slices] += 1
    assert (count == 1).all()
    assert [(t.y, t.x) for t in found] == sorted((t.y, t.x) for t in found)


@given(st.integers(1, 200_000), st.integers(1, 200_000), st.integers(1, 300))
def test_every_pyramid_level_covers_the_one_before_and_none_more(height: int, width: int, smallest: int) -> None:
    shapes = pyramid_shapes(height, width, smallest)
    assert shapes[0] == (height, width)
    for fine, coarse in pairwise(shapes):
        for a, b in zip(fine, coarse, strict=True):
            assert 2 * b - 1 <= a <= 2 * b


@given(st.integers(1, 200_000), st.integers(1, 200_000), st.integers(2, 300))
def test_pyramid_goes_on_as_long_as_both_axes_allow(height: int, width: int, smallest: int) -> None:
    shapes = pyramid_shapes(height, width, smallest)
    assert all(min(shape) >= smallest for shape in shapes[1:])
    assert min(ceil_div(n, 2) for n in shapes[-1]) < smallest


def test_pyramid_ends_at_a_single_pixel() -> None:
    assert pyramid_shapes(5, 2, smallest=1) == [(5, 2), (3, 1), (2, 1), (1, 1)]


def test_small_outlines_together_fill_what_each_does_alone() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        expected, hits, placed = np.zeros((50, 60), np.bool_), [], []
        for _ in range(int(rng.integers(0, 30))):
            outline = np.round(rng.uniform(-10, 70, (int(rng.integers(3, 12)), 2)) * 2) / 2
            low = np.clip(np.floor(outline.min(axis=0)), 0, (50, 60)).astype(int).tolist()
            high = np.clip(np.ceil(outline.max(axis=0)), 0, (50, 60)).astype(int).tolist()
            if high[0] <= low[0] or high[1] <= low[1]:
                continue
            alone = fill(outline - low, (high[0] - low[0], high[1] - low[1]))
            expected[low[0] : high[0], low[1] : high[1]] |= alone
            hits.append(bool(alone.any()))
            placed.append((outline, (low[0], low[1], high[0], high[1])))
        found = np.zeros((50, 60), np.bool_)
        assert fill_small(placed, found).tolist() == hits
        np.testing.assert_array_equal(found, expected)
