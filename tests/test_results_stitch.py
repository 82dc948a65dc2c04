"""Stitching equals a slow per-pixel oracle, block by block to the bit, and keeps constants, coverage and symmetry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.oracles import coarsen_by_pixel, stitch_by_pixel
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.heatmap import GROUP, Blender, Enlarger, Window, blend_boxes, coarsen, coarsen_flags, touching

Image = npt.NDArray[np.float32]
Covered = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]
WINDOWS: tuple[Window, ...] = ("hann", "uniform")
PLAIN = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Case:
    """Patches and the part of the heatmap they are stitched into."""

    enlarger: Enlarger
    yx: Places
    cams: Image
    region: Region

    def stitch(self, region: Region | None = None, cams: Image | None = None) -> tuple[Image, Covered]:
        """As a block's task does it: only the patches that touch, in their order."""
        region, cams = region or self.region, self.cams if cams is None else cams
        chosen = touching(self.yx, self.enlarger.footprint, self.enlarger.stride, region)
        blender = Blender(self.enlarger, region)
        blender.add(self.yx[chosen], cams[chosen])
        return blender.result()


@st.composite
def cases(draw: st.DrawFn, max_patches: int = 6) -> Case:
    """Patches anywhere in and around a small region, off the grid; cells finer and coarser than heatmap pixels."""
    stride = draw(st.sampled_from([1, 2, 8, 16]))
    height, width = (stride * draw(st.floats(1, 6)) for _ in range(2))
    cells = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    region = Region(*(draw(st.integers(0, 5)) for _ in range(2)), *(draw(st.integers(1, 9)) for _ in range(2)))
    count = draw(st.integers(0, max_patches))
    position = st.tuples(
        st.integers(int(region.y * stride - height) - 2, region.bottom * stride + 1),
        st.integers(int(region.x * stride - width) - 2, region.right * stride + 1),
    )
    yx = np.array(draw(st.lists(position, min_size=count, max_size=count)), np.int64).reshape(count, 2)
    seed = draw(st.integers(0, 2**32 - 1))
    cams = np.random.default_rng(seed).normal(size=(count, *cells)).astype(np.float32)
    return Case(Enlarger((height, width), cells, stride, draw(st.sampled_from(WINDOWS))), yx, cams, region)


@PLAIN
@given(cases())
def test_stitching_equals_the_oracle_pixel_by_pixel(case: Case) -> None:
    found, covered = case.stitch()
    e = case.enlarger
    expected, expected_covered = stitch_by_pixel(case.yx, case.cams, e.footprint, e.stride, e.window, case.region)
    assert np.array_equal(covered, expected_covered)  # exactly where a centre lies in a footprint
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@PLAIN
@given(cases(), st.floats(-1e4, 1e4, width=32))
def test_a_constant_stitches_to_the_constant(case: Case, value: float) -> None:
    found, covered = case.stitch(cams=np.full_like(case.cams, value))
    np.testing.assert_allclose(found[covered], value, rtol=2e-6, atol=1e-30)
    assert not found[~covered].any()


@PLAIN
@given(cases(), st.data())
def test_blocks_equal_the_whole_bit_by_bit(case: Case, data: st.DataObject) -> None:
    whole, covered = case.stitch()
    region = case.region
    cut_y = data.draw(st.integers(0, region.height))
    cut_x = data.draw(st.integers(0, region.width))
    for top, height in ((0, cut_y), (cut_y, region.height - cut_y)):
        for left, width in ((0, cut_x), (cut_x, region.width - cut_x)):
            block = Region(region.y + top, region.x + left, height, width)
            part, part_covered = case.stitch(block)
            here = slice(top, top + height), slice(left, left + width)
            assert part.tobytes() == np.ascontiguousarray(whole[here]).tobytes()
            assert np.array_equal(part_covered, covered[here])


@PLAIN
@given(cases(), st.data())
def test_adding_in_portions_changes_no_bit(case: Case, data: st.DataObject) -> None:
    whole, _ = case.stitch()
    cut = data.draw(st.integers(0, len(case.yx)))
    blender = Blender(case.enlarger, case.region)
    blender.add(case.yx[:cut], case.cams[:cut])
    blender.add(case.yx[cut:], case.cams[cut:])
    assert blender.result()[0].tobytes() == whole.tobytes()


def test_more_patches_than_are_enlarged_at_once() -> None:
    count = 2 * GROUP + 3
    yx = np.stack([np.full(count, 5), np.arange(count) * 3], axis=1)
    cams = np.random.default_rng(0).normal(size=(count, 2, 3)).astype(np.float32)
    case = Case(Enlarger((20.0, 9.5), (2, 3), 4), yx, cams, Region(0, 0, 8, 110))
    found, covered = case.stitch()
    expected, expected_covered = stitch_by_pixel(yx, cams, (20.0, 9.5), 4, "hann", case.region)
    assert np.array_equal(covered, expected_covered)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@PLAIN
@given(cases())
def test_transposed_input_gives_transposed_output(case: Case) -> None:
    found, covered = case.stitch()
    e, r = case.enlarger, case.region
    turned = Enlarger((e.footprint[1], e.footprint[0]), (e.cells[1], e.cells[0]), e.stride, e.window)
    mirrored = Case(turned, case.yx[:, ::-1], case.cams.transpose(0, 2, 1), Region(r.x, r.y, r.width, r.height))
    other, other_covered = mirrored.stitch()
    assert np.array_equal(other_covered.T, covered)
    np.testing.assert_allclose(other.T, found, rtol=1e-5, atol=1e-6)


@PLAIN
@given(cases(), st.integers(1, 6), st.integers(1, 6))
def test_mirrored_input_gives_mirrored_output(case: Case, height: int, width: int) -> None:
    # Pixel centres lie between whole pixels at stride 1: no centre meets an edge, whose two sides differ.
    e, r = case.enlarger, case.region
    enlarger = Enlarger((height, width), e.cells, 1, e.window)
    yx = case.yx // e.stride
    found, covered = Case(enlarger, yx, case.cams, r).stitch()
    mirrored = np.array([2 * r.y + r.height - height, 2 * r.x + r.width - width]) - yx
    other, other_covered = Case(enlarger, mirrored, case.cams[:, ::-1, ::-1], r).stitch()
    assert np.array_equal(other_covered[::-1, ::-1], covered)
    np.testing.assert_allclose(other[::-1, ::-1], found, rtol=1e-4, atol=1e-5)


@PLAIN
@given(cases(), st.integers(-3, 3), st.integers(-3, 3))
def test_moving_everything_by_whole_pixels_moves_the_picture(case: Case, down: int, right: int) -> None:
    found, covered = case.stitch()
    r = case.region
    moved = Case(
        case.enlarger,
        case.yx + np.array([down, right]) * case.enlarger.stride,
        case.cams,
        Region(r.y + down, r.x + right, r.height, r.width),
    )
    other, other_covered = moved.stitch()
    assert np.array_equal(other_covered, covered)
    np.testing.assert_allclose(other, found, rtol=1e-5, atol=1e-6)


@PLAIN
@given(cases())
def test_values_stay_between_the_smallest_and_the_largest(case: Case) -> None:
    found, covered = case.stitch()
    assume(covered.any())
    assert found[covered].min() >= case.cams.min() - 1e-5
    assert found[covered].max() <= case.cams.max() + 1e-5


@PLAIN
@given(cases())
def test_patches_that_do_not_touch_change_nothing(case: Case) -> None:
    blender = Blender(case.enlarger, case.region)
    blender.add(case.yx, case.cams)
    assert blender.result()[0].tobytes() == case.stitch()[0].tobytes()


@PLAIN
@given(cases())
def test_touching_finds_every_patch_that_covers_a_pixel(case: Case) -> None:
    e = case.enlarger
    chosen = touching(case.yx, e.footprint, e.stride, case.region)
    assert np.array_equal(chosen, np.unique(chosen))
    for i in range(len(case.yx)):
        _, covered = stitch_by_pixel(case.yx[[i]], case.cams[[i]], e.footprint, e.stride, e.window, case.region)
        y, x = case.yx[i]
        apart = (
            y >= case.region.bottom * e.stride
            or x >= case.region.right * e.stride
            or y + e.footprint[0] <= case.region.y * e.stride
            or x + e.footprint[1] <= case.region.x * e.stride
        )
        assert (i in chosen) == (not apart)
        assert not (apart and covered.any())


def test_a_patch_that_ends_where_a_block_begins_does_not_touch_it() -> None:
    yx = np.array([[40, 16], [16, 40], [17, 17], [47, 47], [47, 48], [48, 47]])
    assert touching(yx, (16.0, 16.0), 16, Region(2, 2, 1, 1)).tolist() == [2, 3]
    assert touching(yx, (16.5, 16.5), 16, Region(2, 2, 1, 1)).tolist() == [0, 1, 2, 3]


def test_the_middle_of_a_patch_outweighs_its_neighbours_edge() -> None:
    yx, cams = np.array([[0, 0], [0, 8]]), np.array([[[0.0]], [[1.0]]], np.float32)
    region = Region(0, 0, 16, 24)
    hann = Case(Enlarger((16.0, 16.0), (1, 1), 1, "hann"), yx, cams, region).stitch()[0][8]
    uniform = Case(Enlarger((16.0, 16.0), (1, 1), 1, "uniform"), yx, cams, region).stitch()[0][8]
    assert np.all(np.diff(hann[8:16]) > 0)  # a slope and no seam
    assert hann[8] < 0.05
    assert hann[15] > 0.95
    np.testing.assert_allclose(uniform, [0] * 8 + [0.5] * 8 + [1] * 8)


def test_a_cell_is_drawn_where_it_lies() -> None:
    cam = np.zeros((1, 4, 4), np.float32)
    cam[0, 1, 2] = 1
    found, _ = Case(Enlarger((64.0, 64.0), (4, 4), 16), np.array([[32, 16]]), cam, Region(0, 0, 8, 8)).stitch()
    assert np.argwhere(found > 0).tolist() == [[2 + 1, 1 + 2]]


@pytest.mark.parametrize("footprint", [(15.9, 300.0), (300.0, 15.9)])
def test_patches_smaller_than_a_heatmap_pixel_are_refused(footprint: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"covers 15\.9 level-0 px, .* choose a smaller --heatmap-stride"):
        Enlarger(footprint, (7, 7), 16)
    Enlarger((16.0, 16.0), (7, 7), 16)


def test_no_patches_cover_nothing() -> None:
    values, covered = Blender(Enlarger((16, 16), (2, 2), 8), Region(0, 0, 3, 4)).result()
    assert values.tolist() == [[0] * 4] * 3
    assert not covered.any()


SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)


@st.composite
def partly_covered(draw: st.DrawFn) -> tuple[Image, Covered]:
    shape = draw(SHAPES)
    values = draw(hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32)))
    return values, draw(hnp.arrays(np.bool_, shape))


@PLAIN
@given(partly_covered())
def test_coarsen_is_the_mean_over_what_is_covered(given_: tuple[Image, Covered]) -> None:
    values, covered = given_
    found = coarsen(values, covered)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, coarsen_by_pixel(values, covered), rtol=1e-5, atol=1e-4)


@PLAIN
@given(partly_covered(), st.floats(-1e5, 1e5, width=32))
def test_coarsen_keeps_a_constant(given_: tuple[Image, Covered], value: float) -> None:
    _, covered = given_
    found = coarsen(np.where(covered, np.float32(value), np.float32(0)), covered)
    there = coarsen_flags(covered.astype(np.uint8)) > 0
    np.testing.assert_allclose(found[there], np.float32(value), rtol=2e-7, atol=1e-30)
    assert not found[~there].any()


@PLAIN
@given(hnp.arrays(np.uint8, SHAPES))
def test_flags_are_never_lost_and_never_made(flags: npt.NDArray[np.uint8]) -> None:
    found = coarsen_flags(flags)
    assert found.shape == tuple((n + 1) // 2 for n in flags.shape)
    for i, j in np.ndindex(found.shape):
        expected = 0
        for value in flags[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flat:
            expected |= int(value)
        assert found[i, j] == expected


@PLAIN
@given(partly_covered(), st.data())
def test_coarsening_in_parts_cut_at_even_pixels_equals_the_whole(
    given_: tuple[Image, Covered], data: st.DataObject
) -> None:
    values, covered = given_
    cut = 2 * data.draw(st.integers(0, values.shape[0] // 2))
    parts: list[Any] = [coarsen(values[p], covered[p]) for p in (slice(cut), slice(cut, None))]
    assert np.concatenate(parts).tobytes() == coarsen(values, covered).tobytes()


def boxes_anywhere(count: int) -> tuple[npt.NDArray[np.float64], Image]:
    """Patches of three sizes, two of them no squares, that overlap as it comes."""
    rng = np.random.default_rng(5)
    sizes = np.array([(40.0, 40.0), (25.5, 61.25), (33.0, 17.0)])[rng.integers(0, 3, count)]
    return np.concatenate([rng.uniform(-20, 300, (count, 2)), sizes], axis=1), rng.normal(size=count).astype(np.float32)


def test_boxes_of_any_place_and_size_are_the_mean_of_those_that_hold_a_pixel() -> None:
    stride, region = 8, Region(0, 0, 40, 38)
    boxes, values = boxes_anywhere(90)
    y, x = (np.arange(n) * stride + stride / 2 for n in (region.height, region.width))
    rows = (y >= boxes[:, 0, None]) & (y < boxes[:, 0, None] + boxes[:, 2, None])
    columns = (x >= boxes[:, 1, None]) & (x < boxes[:, 1, None] + boxes[:, 3, None])
    holds = rows[:, :, None] & columns[:, None, :]
    expected = (holds * values[:, None, None]).sum(axis=0) / np.maximum(holds.sum(axis=0), 1)
    found, covered = blend_boxes(boxes, values, stride, region)
    np.testing.assert_array_equal(covered, holds.any(axis=0))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_boxes_block_by_block_are_the_whole_to_the_bit(window: Window) -> None:
    boxes, values = boxes_anywhere(90)
    whole, covered = blend_boxes(boxes, values, 8, Region(0, 0, 40, 38), window)
    for block in (Region(0, 0, 16, 16), Region(16, 16, 24, 22), Region(0, 16, 16, 22)):
        part, there = blend_boxes(boxes, values, 8, block, window)
        assert part.tobytes() == whole[block.slices].tobytes()
        np.testing.assert_array_equal(there, covered[block.slices])


def test_no_boxes_cover_nothing_and_small_ones_are_refused() -> None:
    values, covered = blend_boxes(np.zeros((0, 4)), np.zeros(0, np.float32), 8, Region(0, 0, 4, 5))
    assert values.shape == covered.shape == (4, 5)
    assert not values.any()
    assert not covered.any()
    with pytest.raises(ConfigError, match="choose a smaller --heatmap-stride"):
        blend_boxes(np.array([[0.0, 0, 4, 4]]), np.ones(1, np.float32), 8, Region(0, 0, 4, 5))
