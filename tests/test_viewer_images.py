"""Tiles cover what they say, hold the values that are stored, and fit without seams."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.slides_in_memory import ArraySlide
from tests.viewer_runs import make_run
from wsi_gradcam.errors import RangeError, TileError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.heatmap import CHUNK, EXPLAINED
from wsi_gradcam.slides import read_region
from wsi_gradcam.viewer.archive import Archive, ServedSlide
from wsi_gradcam.viewer.images import (
    COVERAGE,
    HeatmapReader,
    TilePyramid,
    ValueScale,
    channel_scale,
    encode_values,
    find_channel,
    finer_levels,
    heatmap_pyramid,
    pixel_at,
    slide_pyramid,
    slide_tile,
)
from wsi_gradcam.viewer.responses import byte_range

SIZES = st.integers(1, 5000)


@given(SIZES, SIZES, st.sampled_from([64, 256]), st.data())
def test_tiles_cover_each_level_once(height: int, width: int, tile_px: int, data: st.DataObject) -> None:
    grid = TilePyramid.covering(height, width, tile_px)
    level = data.draw(st.integers(0, grid.levels - 1))
    shape = grid.shape(level)
    assert shape == (math.ceil(height / 2**level), math.ceil(width / 2**level))
    rows, columns = (math.ceil(size / tile_px) for size in shape)
    regions = [grid.region(level, row, column) for row in range(rows) for column in range(columns)]
    assert sum(r.height * r.width for r in regions) == shape[0] * shape[1]
    assert all(r.bottom <= shape[0] and r.right <= shape[1] for r in regions)
    assert max(grid.shape(grid.levels - 1)) <= tile_px
    for row, column in ((rows, 0), (0, columns), (-1, 0), (0, -1), (10**30, 0)):
        with pytest.raises(TileError):
            grid.region(level, row, column)


@pytest.mark.parametrize("level", [-1, 5, 10**30])
def test_a_level_that_is_not_there_is_refused(level: int) -> None:
    with pytest.raises(TileError, match="no level"):
        TilePyramid.covering(2967, 2220).region(level, 0, 0)


def test_a_tile_is_the_slide_at_its_place() -> None:
    rng = np.random.default_rng(0)
    whole = np.kron(rng.integers(0, 255, (40, 60, 1)), np.ones((16, 16, 3))).astype(
        np.uint8
    )  # gray: JPEG halves colours
    slide = ArraySlide([whole, whole[1::3, 1::3]], (0.5, 0.25))
    grid = slide_pyramid(slide.info)
    for level, row, column in ((0, 1, 2), (1, 1, 1), (2, 0, 0)):
        region, step = grid.region(level, row, column), 2**level
        tile = np.asarray(Image.open(io.BytesIO(slide_tile(slide, grid, level, row, column))), np.float64)
        expected = read_region(
            slide, region.y * step, region.x * step, region.height, region.width, (0.5 * step, 0.25 * step)
        )
        assert tile.shape == expected.shape
        assert np.abs(tile - expected).mean() < 6


def test_levels_that_read_too_much_are_not_served() -> None:
    """A slide without a pyramid: one tile of a coarse level would read all of it."""
    flat = np.broadcast_to(np.uint8(200), (20_000, 20_000, 3))
    assert slide_pyramid(ArraySlide([flat]).info).levels == 5
    assert slide_pyramid(ArraySlide([flat, flat[::16, ::16]]).info).levels == 8
    assert slide_pyramid(ArraySlide([flat[:3000, :3000]]).info).levels == 5


@given(st.floats(-50, 50), st.floats(0.001, 100), st.integers(0, 2**32 - 1))
def test_values_survive_a_tile(low: float, span: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale = ValueScale.around(low, low + span)
    values = rng.uniform(scale.low, scale.high, (5, 7)).astype(np.float32)
    flags = rng.integers(0, 8, (5, 7), np.uint8)
    rgb = np.asarray(Image.open(io.BytesIO(encode_values(values, flags, scale))))
    step = (scale.high - scale.low) / 65535
    found = scale.low + (rgb[..., 0].astype(np.int64) * 256 + rgb[..., 1]) * step
    np.testing.assert_allclose(found, values, atol=step * 0.51 + abs(low) * 1e-6 + span * 1e-6)
    np.testing.assert_array_equal(rgb[..., 2], flags)


def test_values_beyond_the_scale_and_nan_are_its_ends() -> None:
    steps = ValueScale(-1.0, 1.0).steps(np.array([-9, -1, 1, 9, np.nan, np.inf], np.float32))
    assert steps.tolist() == [0, 0, 65535, 65535, 0, 65535]


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=9-", (9, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=5-99", (5, 10)),
    ],
)
def test_one_range_is_answered(header: str, found: tuple[int, int]) -> None:
    assert byte_range(header, 10) == found


@pytest.mark.parametrize(
    "header",
    [
        "bytes=0-1,3-4",
        "bytes=" + ",".join(["0-"] * 1300),
        "bytes=10-",
        "bytes=5-2",
        "bytes=-0",
        "bytes=",
        "lines=0-1",
        "bytes=-",
        "bytes=0-1" + " " * 100,
        "bytes=99999999999999999999999-",
        "bytes=\u0661-2",
    ],
)
def test_other_ranges_are_refused(header: str) -> None:
    with pytest.raises(RangeError):
        byte_range(header, 10)


def test_the_pixel_under_a_place() -> None:
    assert pixel_at(0, 0, 16, (2, 3)) == (0, 0)
    assert pixel_at(31.99, 47.99, 16, (2, 3)) == (1, 2)
    for y, x in ((32, 0), (0, 48), (-0.01, 0), (math.nan, 0), (0, math.inf)):
        assert pixel_at(y, x, 16, (2, 3)) is None


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> ServedSlide:
    archive = Archive(make_run(tmp_path_factory.mktemp("tiles"), heatmap_stride=2))
    return archive.find_by_id("a.tif")


def decoded(data: bytes, scale: ValueScale) -> tuple[np.ndarray, np.ndarray]:
    rgb = np.asarray(Image.open(io.BytesIO(data))).astype(np.int64)
    steps = rgb[..., 0] * 256 + rgb[..., 1]
    return scale.low + steps * (scale.high - scale.low) / 65535, rgb[..., 2]


def test_a_tile_has_the_stored_values_across_chunks(shown: ServedSlide) -> None:
    result, heat = shown.result, HeatmapReader()
    assert result.levels[0][1] > 2 * CHUNK
    region = Region(CHUNK - 30, CHUNK - 20, 60, 70)
    np.testing.assert_array_equal(heat.read(shown, 1, 0, region), result.read(result.channels[1], 0, region))
    np.testing.assert_array_equal(heat.read(shown, COVERAGE, 0, region), result.read_coverage(0, region))
    grid, finer, channel = heatmap_pyramid(result), finer_levels(result), result.channels[1]
    for level in range(finer, grid.levels):
        tile = grid.region(level, 0, 0)
        values, flags = decoded(heat.tile(shown, 1, level, 0, 0), channel_scale(channel))
        step = channel_scale(channel).high - channel_scale(channel).low
        np.testing.assert_allclose(values, result.read(channel, level - finer, tile), atol=step / 65535)
        np.testing.assert_array_equal(flags, result.read_coverage(level - finer, tile))


def test_finer_levels_interpolate_and_meet_without_a_seam(shown: ServedSlide) -> None:
    result, heat = shown.result, HeatmapReader()
    assert finer_levels(result) == 1
    channel, scale = result.channels[1], channel_scale(result.channels[1])
    grid = heatmap_pyramid(result)
    found = np.concatenate([decoded(heat.tile(shown, 1, 0, 3, column), scale)[0] for column in range(3)], axis=1)
    region = grid.region(0, 3, 0)
    # By hand: at twice the size, centres lie a quarter to either side of the stored pixels'.
    source = result.read(channel, 0, Region(region.y // 2 - 1, 0, region.height // 2 + 2, 768 // 2 + 1)).astype(float)
    places = (np.arange(768) + 0.5) / 2 - 0.5
    rows = (np.arange(region.height) + 0.5) / 2 + 0.5
    across = np.stack([np.interp(places, np.arange(source.shape[1]), line) for line in source])
    expected = np.stack([np.interp(rows, np.arange(len(source)), line) for line in across.T], axis=1)
    assert (result.read_coverage(0, Region(0, 0, *result.levels[0])) & EXPLAINED).all()
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_cells_repeat_the_stored_pixels(shown: ServedSlide) -> None:
    result, heat = shown.result, HeatmapReader()
    region = heatmap_pyramid(result).region(0, 1, 2)
    values, _ = decoded(heat.tile(shown, 1, 0, 1, 2, smooth=False), channel_scale(result.channels[1]))
    stored = result.read(result.channels[1], 0, Region(region.y // 2, region.x // 2, 128, 128))
    np.testing.assert_allclose(values, np.kron(stored, np.ones((2, 2))), atol=1e-3)


def test_what_was_not_explained_has_no_part_in_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: ServedSlide
) -> None:
    half = np.zeros((64, 64), np.float32)
    half[:, :32] = 5.0

    def read(self: HeatmapReader, shown: ServedSlide, channel: int, level: int, region: Region) -> np.ndarray:
        part = half[region.slices]
        return (part > 0).astype(np.uint8) * EXPLAINED if channel == COVERAGE else part

    monkeypatch.setattr(HeatmapReader, "read", read)
    values, flags = HeatmapReader()._enlarge(shown, 0, Region(8, 0, 40, 128), 2, True)
    assert (flags[:, :64] == EXPLAINED).all()
    assert (flags[:, 64:] == 0).all()
    np.testing.assert_allclose(values[:, :64], 5.0)


def test_a_channel_that_is_not_there_is_refused(shown: ServedSlide) -> None:
    with pytest.raises(TileError, match="no channel 99"):
        find_channel(shown.result, 99)
