"""Plausibility: does a map look where an annotation says? Kept apart from faithfulness, and never mixed with it.

All take maps [P, h, w] and masks bool [P, h, w] of the same grid and give a number a patch, NaN where the question has
no answer: a mask that is empty or full, a map that is constant or not finite. Counting those as hits flatters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from wsi_gradcam.audit.measures.likeness import is_constant

Maps = NDArray[np.float32]
Masks = NDArray[np.bool_]
Numbers = NDArray[np.float64]


def pointing_game(maps: Maps, masks: Masks) -> Numbers:
    """Whether the highest cell lies in the mask, 1 or 0; of several, the share (Zhang 2016, arXiv 1608.00507)."""
    flat, inside = _flat(maps, masks)
    highest = flat == flat.max(axis=1, keepdims=True)
    return _answered((highest & inside).sum(axis=1) / np.maximum(highest.sum(axis=1), 1), maps, masks)


def relevance_mass(maps: Maps, masks: Masks) -> Numbers:
    """Share of the positive relevance that lies in the mask, 0 to 1 (Arras 2022, arXiv 2003.07258).

    NaN also where nothing is positive. By chance it is the mask's share of the area.
    """
    flat, inside = _flat(maps, masks)
    positive = np.maximum(flat, 0).astype(np.float64)
    total = positive.sum(axis=1)
    share = np.divide((positive * inside).sum(axis=1), total, out=np.full(len(maps), np.nan), where=total > 0)
    return _answered(share, maps, masks)


def relevance_rank(maps: Maps, masks: Masks) -> Numbers:
    """Share of the n highest cells that lie in a mask of n cells, 0 to 1 (Arras 2022, arXiv 2003.07258).

    Cells that tie at the n-th place count as if drawn at random. By chance it is the mask's share of the area.
    """
    flat, inside = _flat(maps, masks)
    size = inside.sum(axis=1)
    last = np.sort(flat, axis=1)[np.arange(len(flat)), -np.maximum(size, 1)][:, None]
    above, tied = flat > last, flat == last
    free = size - above.sum(axis=1)
    hits = (above & inside).sum(axis=1) + free * (tied & inside).sum(axis=1) / np.maximum(tied.sum(axis=1), 1)
    return _answered(hits / np.maximum(size, 1), maps, masks)


def auroc(maps: Maps, masks: Masks) -> Numbers:
    """Chance that a cell of the mask is higher than one outside it, ties counting half; 0.5 by chance."""
    flat, inside = _flat(maps, masks)
    size = inside.sum(axis=1).astype(np.float64)
    others = inside.shape[1] - size
    ranks = (rankdata(flat, axis=1) * inside).sum(axis=1)
    return _answered((ranks - size * (size + 1) / 2) / np.maximum(size * others, 1), maps, masks)


def iou(maps: Maps, masks: Masks, threshold: float = 0.0) -> Numbers:
    """Intersection over union of the mask and of where the map is above `threshold`, 0 to 1.

    Above 0 a raw map speaks for the class; of methods that are never negative, name a threshold.
    """
    flat, inside = _flat(maps, masks)
    above = flat > threshold
    return _answered((above & inside).sum(axis=1) / np.maximum((above | inside).sum(axis=1), 1), maps, masks)


PLAUSIBILITY: dict[str, Callable[[Maps, Masks], Numbers]] = {
    "pointing_game": pointing_game,
    "relevance_mass": relevance_mass,
    "relevance_rank": relevance_rank,
    "auroc": auroc,
    "iou": iou,
}


def chance(masks: Masks) -> Numbers:
    """What pointing game, mass and rank are by chance: the share of the area [P] that the mask has."""
    share: Numbers = masks.reshape(len(masks), -1).mean(axis=1)
    return share


def _flat(maps: Maps, masks: Masks) -> tuple[Maps, Masks]:
    if maps.shape != masks.shape or masks.dtype != np.bool_:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} {masks.dtype}; expected bool masks of equal shape")
    return maps.reshape(len(maps), -1), masks.reshape(len(masks), -1)


def _answered(values: Numbers, maps: Maps, masks: Masks) -> Numbers:
    share = chance(masks)
    return np.where((share > 0) & (share < 1) & ~is_constant(maps), values, np.nan)
