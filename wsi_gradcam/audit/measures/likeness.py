"""How alike two maps of a patch are, at the grid of the CAM itself.

Enlarged maps are alike because they are smooth: independent ones of 7 x 7 cells have an SSIM of 0.31 to 0.61 at
224 px. A constant map is like nothing: rank correlation is not defined, and SSIM of two of them is 1. It gives NaN
here, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from skimage.feature import hog
from skimage.metrics import structural_similarity

Maps = NDArray[np.float32]
Numbers = NDArray[np.float64]

PERMUTATIONS = 199
LEVEL = 0.95
SSIM_PX, HOG_CELLS, HOG_ANGLES = 3, 3, 9


def is_constant(maps: Maps) -> NDArray[np.bool_]:
    """Which maps [P, h, w] have one value alone, but for rounding; also those that are not finite."""
    flat = maps.reshape(len(maps), -1)
    with np.errstate(invalid="ignore"):
        spread, size = np.ptp(flat, axis=1), np.abs(flat).max(axis=1)
    constant: NDArray[np.bool_] = ~(spread > 1e-6 * size)
    return constant


def spearman(first: Maps, second: Maps) -> Numbers:
    """Rank correlation [P] of maps [P, h, w], ties at their mean rank; NaN where one is constant."""
    a, b = _ranks(first), _ranks(second)
    return np.where(is_constant(first) | is_constant(second), np.nan, _correlation(a, b))


def spearman_absolute(first: Maps, second: Maps) -> Numbers:
    """Rank correlation [P] of the maps' absolute values: whether they point at the same places, for or against."""
    return spearman(np.abs(first), np.abs(second))


def ssim(first: Maps, second: Maps) -> Numbers:
    """Structural similarity [P] (Wang 2004), windows of 3 x 3 cells, of maps divided by their largest size."""
    constant = is_constant(first) | is_constant(second)
    found = np.full(len(first), np.nan)
    for i in np.flatnonzero(~constant).tolist():
        a, b = (maps[i] / np.abs(maps[i]).max() for maps in (first, second))
        found[i] = structural_similarity(a, b, win_size=SSIM_PX, data_range=2.0)
    return found


def hog_similarity(first: Maps, second: Maps) -> Numbers:
    """Pearson correlation [P] of the maps' histograms of oriented gradients (Adebayo 2018), cells of 3 x 3."""
    constant = is_constant(first) | is_constant(second)
    found = np.full(len(first), np.nan)
    for i in np.flatnonzero(~constant).tolist():
        a, b = (_hog(maps[i])[None] for maps in (first, second))
        found[i] = _correlation(a, b)[0]
    return found


LIKENESS: dict[str, Callable[[Maps, Maps], Numbers]] = {
    "spearman": spearman,
    "spearman_absolute": spearman_absolute,
    "ssim": ssim,
    "hog": hog_similarity,
}


def resembles(first: Maps, second: Maps, seed: int = 0) -> Numbers:
    """Whether `second` is more like `first` than 95 % of its own cells' permutations are: 1 or 0 [P]; NaN if constant.

    By `spearman`, with its sign: the opposite map is another map. Of maps that have nothing to do with each other 5 %
    resemble where cells are independent, and more where they are smooth.
    """
    found = stays_or_turns(first, second, seed)
    return np.where(np.isnan(found), np.nan, (found > 0).astype(np.float64))


def stays_or_turns(first: Maps, second: Maps, seed: int = 0) -> Numbers:
    """1 where `second` resembles `first` (see `resembles`), -1 where its opposite does, else 0 [P]; NaN if constant."""
    a, b = _ranks(first), _ranks(second)
    observed = _correlation(a, b)
    random = np.random.default_rng(seed)
    above, below = np.zeros((2, len(a)))
    for _ in range(PERMUTATIONS):
        by_chance = _correlation(a, b[:, random.permutation(a.shape[1])])
        above += by_chance >= observed - 1e-12
        below += by_chance <= observed + 1e-12
    stays, turns = ((reached + 1) / (PERMUTATIONS + 1) <= 1 - LEVEL + 1e-12 for reached in (above, below))
    found = stays.astype(np.float64) - turns
    return np.where(is_constant(first) | is_constant(second), np.nan, found)


def _ranks(maps: Maps) -> Numbers:
    ranks: Numbers = rankdata(maps.reshape(len(maps), -1), axis=1)
    return ranks


def _correlation(a: Numbers, b: Numbers) -> Numbers:
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    found: Numbers = np.divide((a * b).sum(axis=1), size, out=np.full(len(a), np.nan), where=size > 0)
    return found


def _hog(map_: NDArray[np.float32]) -> Numbers:
    cells = tuple(min(HOG_CELLS, side) for side in map_.shape)
    scaled = map_ / np.abs(map_).max()
    found: Numbers = hog(scaled, HOG_ANGLES, pixels_per_cell=cells, cells_per_block=(1, 1))
    return found
