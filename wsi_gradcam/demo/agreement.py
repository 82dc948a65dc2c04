"""How well a heatmap agrees with a truth mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

if TYPE_CHECKING:
    from numpy.typing import NDArray


def majority(mask: NDArray[np.bool_], stride: int) -> NDArray[np.bool_]:
    """Whether most of each `stride` x `stride` cell is True, bool [ceil(h / stride), ceil(w / stride)]."""
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % stride), (0, -width % stride)))
    cells = padded.reshape(padded.shape[0] // stride, stride, padded.shape[1] // stride, stride)
    share: NDArray[np.float64] = cells.mean(axis=(1, 3))
    return share > 0.5


def roc_auc(scores: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of flat `scores` for flat `truth`, ties counting half; nan with one class alone.

    >>> roc_auc(np.array([0.1, 0.4, 0.4, 0.9], np.float32), np.array([False, False, True, True]))
    0.875
    """
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))
