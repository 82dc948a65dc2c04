"""Measures of likeness: against plain definitions, and what chance gives."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from skimage.metrics import structural_similarity
from skimage.transform import resize

from wsi_gradcam.audit.measures.sanity import LIKENESS, is_constant, resembles, spearman, spearman_absolute, ssim


def noise(count: int, side: int = 7, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, (count, side, side)).astype(np.float32)


def test_spearman_is_scipys() -> None:
    first, second = noise(20), noise(20, seed=1)
    second[:10] = np.round(second[:10])  # ties
    expected = [stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(spearman(first, second), expected, atol=1e-12)
    expected = [stats.spearmanr(abs(a).ravel(), abs(b).ravel()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(spearman_absolute(first, second), expected, atol=1e-12)


@pytest.mark.parametrize("name", LIKENESS)
def test_a_map_is_like_itself_at_any_scale_and_unlike_others(name: str) -> None:
    maps = noise(60)
    np.testing.assert_allclose(LIKENESS[name](maps, maps * 1000), 1, atol=1e-5)
    chance = LIKENESS[name](maps, noise(60, seed=1))
    assert abs(chance.mean()) < 0.15 if name != "hog" else chance.mean() < 0.5


def test_constant_maps_are_counted_apart() -> None:
    maps = noise(4)
    other = maps.copy()
    other[1] = 0
    other[2] = 3.7
    other[3, 0, 0] = np.nan
    assert is_constant(other).tolist() == [False, True, True, True]
    for alike in LIKENESS.values():
        assert np.isnan(alike(maps, other)).tolist() == [False, True, True, True]
    assert np.isnan(resembles(maps, other)).tolist() == [False, True, True, True]


def test_at_their_own_grid_independent_maps_are_not_alike_and_enlarged_ones_are() -> None:
    first, second = noise(40), noise(40, seed=1)
    low, high = (np.quantile(ssim(first, second), q) for q in (0.1, 0.9))
    assert low < 0 < high
    assert abs(ssim(first, second).mean()) < 0.1
    large = [[resize(m, (224, 224), order=1) for m in maps[:10]] for maps in (first, second)]
    unit = [[(m - m.min()) / np.ptp(m) for m in maps] for maps in large]
    enlarged = [structural_similarity(a, b, data_range=1) for a, b in zip(*unit, strict=True)]
    assert np.mean(enlarged) > 0.3


def test_one_in_twenty_independent_maps_resembles() -> None:
    share = resembles(noise(1000), noise(1000, seed=1)).mean()
    assert 0.03 < share < 0.07
    assert resembles(noise(50), -noise(50)).mean() == 0  # it says the opposite
    assert resembles(noise(50), noise(50) + noise(50, seed=1)).mean() > 0.95
