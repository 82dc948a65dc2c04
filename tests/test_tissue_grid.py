"""The grid covers the slide without gaps or drift, and patches come in working order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tests.oracles import share_of
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.tissue import PatchGrid, choose_patches, patch_grid

mpps = st.one_of(st.sampled_from([0.25, 0.5, 0.499, 0.2532, 1.0]), st.floats(0.1, 4))


@st.composite
def grids(draw: st.DrawFn, largest: int = 20_000) -> PatchGrid:
    """A grid whose patches cover at least 2 level-0 px."""
    patch = draw(st.integers(8, 600)), draw(st.integers(8, 600))
    stride = draw(st.integers(1 + patch[0] // 4, patch[0])), draw(st.integers(1 + patch[1] // 4, patch[1]))
    slide = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    slide_mpp = draw(mpps), draw(mpps)
    mpp = max(draw(mpps), max(slide_mpp) / 4)
    return patch_grid(slide, slide_mpp, patch, mpp, stride)


@given(grids())
def test_footprints_cover_every_pixel_of_the_slide(grid: PatchGrid) -> None:
    for axis in (0, 1):
        starts = grid.positions(axis)
        ends = starts + grid.footprint[axis]
        assert starts[0] == 0
        # Starts are whole and footprints are not, so less than a pixel may lie between; never a whole one.
        assert (starts[1:] - ends[:-1] < 1).all()
        assert ends[-1] > grid.slide_px[axis] - 1


@given(grids(), st.sampled_from([2, 4, 16, 64]))
def test_footprints_hold_the_centre_of_every_heatmap_pixel(grid: PatchGrid, stride: int) -> None:
    for axis in (0, 1):
        starts = grid.positions(axis)
        centres = np.arange(stride // 2, grid.slide_px[axis], stride)
        before = starts[np.searchsorted(starts, centres, side="right") - 1]
        assert (centres - before < grid.footprint[axis]).all()


@given(grids())
def test_positions_do_not_drift(grid: PatchGrid) -> None:
    for axis in (0, 1):
        positions = grid.positions(axis)
        exact = [k * grid.step[axis] for k in range(len(positions))]
        assert np.abs(positions - exact).max() <= 0.5


@given(grids())
def test_every_row_and_column_is_needed(grid: PatchGrid) -> None:
    """Without its last patch the grid would stop short of the edge."""
    for axis in (0, 1):
        count = grid.shape[axis]
        if count > 1:
            assert (count - 2) * grid.step[axis] + grid.footprint[axis] < grid.slide_px[axis]


def test_the_last_patch_of_a_large_slide_is_in_place() -> None:
    """A step rounded once would be 98 px off at the end of this slide."""
    grid = patch_grid((98_400, 98_400), (0.2529, 0.2529), (224, 224), 0.5, (224, 224))
    step = 224 * 0.5 / 0.2529
    assert grid.shape[0] == math.ceil(98_400 / step)
    assert grid.positions(0)[-1] == round((math.ceil(98_400 / step) - 1) * step)


@pytest.mark.parametrize(("height", "rows"), [(1, 1), (447, 1), (448, 1), (449, 2), (896, 2), (897, 3)])
def test_one_more_row_where_one_more_pixel_asks_for_it(height: int, rows: int) -> None:
    assert patch_grid((height, 10), (0.25, 0.25), (224, 224), 0.5, (224, 224)).shape == (rows, 1)


def test_rounding_of_floats_adds_no_row() -> None:
    """0.3 / 0.1 is 2.9999999999999996 and 0.1 * 3 is 0.30000000000000004."""
    assert patch_grid((6720, 6720), (0.1, 0.1), (224, 224), 0.3, (224, 224)).shape == (10, 10)
    assert patch_grid((6720, 6720), (0.1, 0.1), (224, 224), 0.1 * 3, (224, 224)).shape == (10, 10)


def test_axes_have_their_own_scale() -> None:
    grid = patch_grid((1000, 1000), (0.5, 0.25), (100, 200), 0.5, (50, 100))
    assert grid.footprint == (100, 400)
    assert grid.step == (50, 200)


@pytest.mark.parametrize("stride", [(0, 10), (10, 0), (-5, 10), (11, 10), (10, 11)])
def test_strides_that_leave_gaps_or_stand_still_are_refused(stride: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="expected 1 to the patch's 10 px"):
        patch_grid((100, 100), (0.5, 0.5), (10, 10), 0.5, stride)


masks = npst.arrays(np.bool_, st.tuples(st.integers(1, 6), st.integers(1, 6)))


@st.composite
def small_grids(draw: st.DrawFn) -> PatchGrid:
    slide = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    patch = draw(st.integers(6, 20)), draw(st.integers(6, 20))
    overlap = draw(st.integers(0, 3))
    stride = patch[0] - overlap, patch[1] - overlap
    return patch_grid(slide, (0.5, 0.4), patch, draw(st.sampled_from([0.5, 0.7])), stride)


def shares(grid: PatchGrid, mask: npt.NDArray[np.bool_]) -> dict[tuple[int, int], float]:
    """Share of tissue of every patch of the grid, by its place."""
    scale_y, scale_x = mask.shape[0] / grid.slide_px[0], mask.shape[1] / grid.slide_px[1]
    height, width = grid.footprint
    return {
        (y, x): share_of(
            mask,
            y * scale_y,
            x * scale_x,
            min((y + height) * scale_y, mask.shape[0]),
            min((x + width) * scale_x, mask.shape[1]),
        )
        for y in grid.positions(0).tolist()
        for x in grid.positions(1).tolist()
    }


@given(small_grids(), masks, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([8, 16, 64]))
def test_chosen_are_exactly_the_patches_with_enough_tissue(
    grid: PatchGrid, mask: npt.NDArray[np.bool_], min_tissue: float, block_px: int
) -> None:
    chosen = choose_patches(grid, mask, min_tissue, block_px)
    found = {(y, x): float(t) for (y, x), t in zip(chosen.yx.tolist(), chosen.tissue, strict=True)}
    expected = shares(grid, mask)
    assert len(found) == len(chosen.yx)
    for place, share in expected.items():
        if abs(share - min_tissue) > 1e-5:
            assert (place in found) == (share >= min_tissue and share > 0)
        if place in found:
            assert found[place] == pytest.approx(share, abs=2e-6)
    assert set(found) <= set(expected)


@given(small_grids(), masks)
def test_every_tissue_pixel_lies_in_a_chosen_patch(grid: PatchGrid, mask: npt.NDArray[np.bool_]) -> None:
    chosen = choose_patches(grid, mask, 0, 16).yx
    ys, xs = (np.arange(n) for n in grid.slide_px)
    tissue = mask[np.ix_(ys * mask.shape[0] // grid.slide_px[0], xs * mask.shape[1] // grid.slide_px[1])]
    covered = np.zeros(grid.slide_px, np.bool_)
    for y, x in chosen.tolist():
        covered[y : y + math.ceil(grid.footprint[0]), x : x + math.ceil(grid.footprint[1])] = True
    assert (covered | ~tissue).all()


@given(small_grids(), masks, st.sampled_from([4, 16, 32]))
def test_order_is_block_by_block_and_rows_inside(grid: PatchGrid, mask: npt.NDArray[np.bool_], block_px: int) -> None:
    places = [tuple(p) for p in choose_patches(grid, mask, 0, block_px).yx.tolist()]
    runs = [(b, list(group)) for b, group in itertools.groupby(places, lambda p: (p[0] // block_px, p[1] // block_px))]
    blocks = [block for block, _ in runs]
    assert blocks == sorted(set(blocks))
    assert all(inside == sorted(inside) for _, inside in runs)


@given(small_grids(), masks)
def test_block_size_changes_the_order_only(grid: PatchGrid, mask: npt.NDArray[np.bool_]) -> None:
    rows = [
        sorted((*p, float(t)) for p, t in zip(c.yx.tolist(), c.tissue, strict=True))
        for c in (choose_patches(grid, mask, 0.1, block_px) for block_px in (5, 1 << 30))
    ]
    assert rows[0] == rows[1]


def test_no_tissue_is_an_empty_choice_ready_for_use() -> None:
    grid = patch_grid((1000, 1000), (0.5, 0.5), (100, 100), 0.5, (100, 100))
    chosen = choose_patches(grid, np.zeros((20, 20), np.bool_), 0.0, 512)
    assert chosen.yx.shape == (0, 2)
    assert chosen.yx.dtype == np.int64
    assert chosen.tissue.shape == (0,)
    assert chosen.tissue.dtype == np.float32


def test_of_a_patch_that_reaches_beyond_the_slide_only_the_part_on_it_counts() -> None:
    grid = patch_grid((150, 100), (0.5, 0.5), (100, 100), 0.5, (100, 100))
    chosen = choose_patches(grid, np.ones((3, 2), np.bool_), 0.0, 512)
    assert chosen.yx.tolist() == [[0, 0], [100, 0]]
    assert chosen.tissue.tolist() == [1.0, 1.0]
