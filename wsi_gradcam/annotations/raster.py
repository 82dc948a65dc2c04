"""Areas -> bool masks. Exact at pixel centres, whatever the outline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import AnnotationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.annotations.base import Area

CROSSINGS = 1 << 20  # of an outline with rows of pixels that are looked at together: bounds the memory
# Pixels and crossings of all outlines: some ten seconds. A thousand annotations that each fill a large slide's mask.
MOST_WORK = 4e9


def rasterise(
    areas: Sequence[Area], slide_px: tuple[int, int], shape: tuple[int, int], source: str = "annotations"
) -> NDArray[np.bool_]:
    """Which pixels of a mask over a slide lie in some area, bool [h, w].

    A pixel is in an area when its centre lies inside the outline and in no hole. An outline that crosses itself
    holds all that it goes round. Of an area too small to hold any centre, the pixel in its middle counts, so that
    nothing that was drawn on the slide is lost.

    Args:
        areas: in level-0 px.
        slide_px: (height, width) of level 0, which the mask covers.
        shape: (h, w) of the mask.
        source: what an error names.

    Raises:
        AnnotationError: more and larger areas than people draw.
    """
    mask = np.zeros(shape, np.bool_)
    scale = np.array([shape[0] / slide_px[0], shape[1] / slide_px[1]])
    work = 0.0
    for area in areas:
        outlines = [outline * scale for outline in (area.outline, *area.holes)]
        top, left, bottom, right = _box(outlines[0], shape)
        if bottom <= top or right <= left:  # beside the slide
            continue
        work += len(outlines) * (bottom - top) * (right - left) + sum(_crossings(o, top, bottom) for o in outlines)
        if work > MOST_WORK:
            raise AnnotationError(f"{source}: its outlines cover the slide too many times over; expected fewer areas")
        mask[top:bottom, left:right] |= _inside(outlines, (top, left), (bottom - top, right - left))
    return mask


def _box(outline: NDArray[np.float64], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the pixels that an outline can touch."""
    low = np.clip(np.floor(outline.min(axis=0)), 0, shape).astype(int).tolist()
    high = np.clip(np.ceil(outline.max(axis=0)), 0, shape).astype(int).tolist()
    return low[0], low[1], high[0], high[1]


def _crossings(outline: NDArray[np.float64], top: int, bottom: int) -> float:
    return float(np.abs(np.diff(np.clip(outline[:, 0], top, bottom))).sum()) + len(outline)


def _inside(outlines: list[NDArray[np.float64]], corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """What lies in the first outline and not in the others; all are in mask pixels, the result begins at `corner`."""
    origin = np.array(corner)
    inside = fill(outlines[0] - origin, size)
    if not inside.any():
        middle = np.clip(outlines[0].mean(axis=0) - origin, 0, np.array(size) - 1).astype(int)
        inside[middle[0], middle[1]] = True
    for hole in outlines[1:]:
        inside &= ~fill(hole - origin, size)
    return inside


def fill(outline: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels whose centres the outline goes round, bool [h, w]; (y, x) are in pixels from the corner.

    Each edge adds its direction to the winding number of what lies right of where it crosses a row of centres
    (half-open, so that a vertex on a row counts once); a pixel is inside where the number is not 0.
    """
    height, width = shape
    start, end = outline, np.roll(outline, -1, axis=0)
    first = _row(np.minimum(start[:, 0], end[:, 0]), height)
    counts = _row(np.maximum(start[:, 0], end[:, 0]), height) - first
    turns = np.zeros(height * (width + 1), np.int32)
    for part in _parts(counts):
        edges = np.repeat(np.arange(part.start, part.stop), counts[part])
        within = np.arange(len(edges)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        rows = first[edges] + within
        (y0, x0), (y1, x1) = start[edges].T, end[edges].T
        x = x0 + (rows + 0.5 - y0) / (y1 - y0) * (x1 - x0)
        columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        np.add.at(turns, rows * (width + 1) + columns, np.where(y1 > y0, 1, -1).astype(np.int32))
    inside: NDArray[np.bool_] = np.cumsum(turns.reshape(height, width + 1)[:, :width], axis=1, dtype=np.int32) != 0
    return inside


def _row(y: NDArray[np.float64], height: int) -> NDArray[np.int64]:
    """The first row whose centre is at or below `y`."""
    return np.clip(np.ceil(y - 0.5), 0, height).astype(np.int64)


def _parts(counts: NDArray[np.int64]) -> list[slice]:
    """Runs of edges with about CROSSINGS crossings each."""
    total = np.cumsum(counts)
    if not total[-1]:
        return []
    steps = np.arange(1, math.ceil(int(total[-1]) / CROSSINGS)) * CROSSINGS
    cuts = sorted({0, *np.searchsorted(total, steps).tolist(), len(counts)})
    return [slice(a, b) for a, b in pairwise(cuts)]
