"""Spread of overlapping patches: against a plain sum for each pixel, and what it is where nothing is known."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_gradcam.audit.stages import spread
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.heatmap import GROUP, Blender, Enlarger, Window


def some(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 200, (count, 2)), random.normal(0, 1, (count, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("window", ["hann", "uniform"])
def test_it_is_the_weighted_standard_deviation_of_each_pixel(window: Window) -> None:
    enlarger, block = Enlarger((64, 64), (3, 3), 16, window), Region(2, 1, 12, 10)
    yx, cams = some(GROUP + 20)
    mean, found, several = spread(enlarger, block, yx, cams)
    values: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for place, value in zip(yx, cams, strict=True):
        (rows, row_weight), (columns, column_weight) = (enlarger.axis(i, place[i : i + 1]) for i in (0, 1))
        large = rows[0] @ value @ columns[0].T
        top, left = (int(enlarger.first(place)[i]) for i in (0, 1))
        for i, j in np.ndindex(large.shape):
            if (weight := float(row_weight[0, i] * column_weight[0, j])) > 0:
                values.setdefault((top + i, left + j), []).append((float(large[i, j]), weight))
    for y, x in np.ndindex(found.shape):
        pairs = values.get((block.y + y, block.x + x), [])
        assert several[y, x] == (len(pairs) > 1)
        expected = 0.0
        if len(pairs) > 1:
            v, w = np.array(pairs).T
            expected = np.sqrt(np.average((v - np.average(v, weights=w)) ** 2, weights=w))
        assert found[y, x] == pytest.approx(expected, abs=1e-4)
    blender = Blender(enlarger, block)
    blender.add(yx, cams)
    assert np.array_equal(mean, blender.result()[0])


def test_patches_that_agree_have_no_spread_however_large_their_values() -> None:
    enlarger = Enlarger((64, 64), (3, 3), 16)
    yx, cams = some(40)
    _, found, several = spread(enlarger, Region(0, 0, 16, 16), yx, np.full_like(cams, 1e6))
    assert several.any()
    assert found.max() < 1.0  # of a million: squares of float32 alone would be off by hundreds


def test_pixels_that_one_patch_sees_are_not_known() -> None:
    enlarger = Enlarger((32, 32), (2, 2), 16)
    yx = np.array([[0, 0], [0, 16]])
    _, found, several = spread(
        enlarger, Region(0, 0, 2, 4), yx, np.stack([np.zeros((2, 2)), np.ones((2, 2))]).astype(np.float32)
    )
    assert several.tolist() == [[False, True, False, False]] * 2
    assert (found[several] > 0.4).all()
    assert not found[~several].any()
