"""Regions, pyramid arithmetic and filled outlines. Sizes are (height, width), positions (y, x), regions half-open."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Corners = tuple[int, int, int, int]  # top, left, bottom, right
    Placed = tuple[NDArray[np.float64], Corners]  # an outline, and a box of pixels


@dataclass(frozen=True)
class Region:
    """A half-open rectangle [y, y + height) x [x, x + width) in pixels of a level that the caller states.

    >>> Region(0, 0, 10, 10).intersect(Region(5, 8, 10, 10))
    Region(y=5, x=8, height=5, width=2)
    """

    y: int
    x: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """First row below the region."""
        return self.y + self.height

    @property
    def right(self) -> int:
        """First column right of the region."""
        return self.x + self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """The region as (row, column) slices of an array of its level."""
        return slice(self.y, self.bottom), slice(self.x, self.right)

    def intersect(self, other: Region) -> Region:
        """The common rectangle; of zero height or width where there is none."""
        y, x = max(self.y, other.y), max(self.x, other.x)
        height = max(0, min(self.bottom, other.bottom) - y)
        width = max(0, min(self.right, other.right) - x)
        return Region(y, x, height, width)


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up.

    >>> ceil_div(7, 2), ceil_div(8, 2)
    (4, 4)
    """
    return -(-a // b)


def pyramid_shapes(height: int, width: int, smallest: int = 64) -> list[tuple[int, int]]:
    """Shapes of all levels: each is ceil(half) of the one before, while no axis falls below `smallest`.

    Viewers take a last axis of 3 or 4 pixels for colour, so pyramids end early.

    >>> pyramid_shapes(186, 139)
    [(186, 139), (93, 70)]
    >>> pyramid_shapes(10, 10)
    [(10, 10)]
    """
    shapes = [(height, width)]
    while True:
        height, width = ceil_div(height, 2), ceil_div(width, 2)
        if min(height, width) < smallest or (height, width) == shapes[-1]:
            return shapes
        shapes.append((height, width))


def tiles(height: int, width: int, side: int) -> list[Region]:
    """The regions of a `side` x `side` tiling of a height x width image, row by row; the last ones are cut.

    >>> tiles(3, 5, 4)
    [Region(y=0, x=0, height=3, width=4), Region(y=0, x=4, height=3, width=1)]
    """
    return [
        Region(y, x, min(side, height - y), min(side, width - x))
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]


CROSSINGS = 1 << 20  # of an outline with rows of pixels in one step: bounds the memory
SMALL_PX, SMALL_POINTS = 64, 1 << 8  # of outlines that are filled together


def fill(outline: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels whose centres the outline surrounds, bool [h, w]; (y, x) are in pixels from the corner.

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
    """Return the first row whose centre is at or below `y`."""
    return np.clip(np.ceil(y - 0.5), 0, height).astype(np.int64)


def _parts(counts: NDArray[np.int64]) -> list[slice]:
    """Return runs of edges with about CROSSINGS crossings each."""
    total = np.cumsum(counts)
    if not total[-1]:
        return []
    steps = np.arange(1, math.ceil(int(total[-1]) / CROSSINGS)) * CROSSINGS
    cuts = sorted({0, *np.searchsorted(total, steps).tolist(), len(counts)})
    return [slice(a, b) for a, b in pairwise(cuts)]


def is_small(outline: NDArray[np.float64], box: Corners) -> bool:
    """Return True for an outline that `fill_small` takes, in a box of pixels."""
    return box[2] - box[0] <= SMALL_PX and box[3] - box[1] <= SMALL_PX and len(outline) <= SMALL_POINTS


def fill_small(placed: Sequence[Placed], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Set the pixels of a mask that small outlines surround, by the rule of `fill`; many cost little more than one.

    Returns whether each outline surrounds the centre of a pixel of its box.
    """
    found = np.zeros(len(placed), np.bool_)
    if not placed:
        return found
    costs = np.cumsum([len(outline) * (box[2] - box[0] + 1) for outline, box in placed])
    cuts = np.unique(np.searchsorted(costs, np.arange(0, int(costs[-1]) + CROSSINGS, CROSSINGS)))
    for start, stop in pairwise(sorted({0, *cuts.tolist(), len(placed)})):
        found[start:stop] = _fill_together(placed[start:stop], mask)
    return found


def _fill_together(placed: Sequence[Placed], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    boxes = np.array([box for _, box in placed])
    corners, (heights, widths) = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).T
    lengths = np.array([len(outline) for outline, _ in placed])
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(placed)), lengths)
    start = np.concatenate([outline for outline, _ in placed]) - corners[owner]
    following = np.arange(1, len(start) + 1)
    following[ends - 1] = ends - lengths
    end = start[following]
    first = np.clip(np.ceil(np.minimum(start[:, 0], end[:, 0]) - 0.5), 0, heights[owner]).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(start[:, 0], end[:, 0]) - 0.5), 0, heights[owner]).astype(np.int64)
    counts = last - first
    edges = np.repeat(np.arange(len(start)), counts)
    rows = first[edges] + np.arange(len(edges)) - np.repeat(np.cumsum(counts) - counts, counts)
    (y0, x0), (y1, x1), of = start[edges].T, end[edges].T, owner[edges]
    columns = np.clip(np.ceil(x0 + (rows + 0.5 - y0) / (y1 - y0) * (x1 - x0) - 0.5), 0, widths[of]).astype(np.int64)
    # One canvas after the other, each a column wider than its box: rows end at winding number 0.
    sizes = heights * (widths + 1)
    bases = np.cumsum(sizes) - sizes
    turns = np.zeros(int(sizes.sum()), np.int32)
    np.add.at(turns, bases[of] + rows * (widths[of] + 1) + columns, np.where(y1 > y0, 1, -1).astype(np.int32))
    (inside,) = np.nonzero(np.cumsum(turns, dtype=np.int32))
    of = np.searchsorted(bases, inside, "right") - 1
    y, x = np.divmod(inside - bases[of], widths[of] + 1)
    mask[y + corners[of, 0], x + corners[of, 1]] = True
    hit: NDArray[np.bool_] = np.bincount(of, minlength=len(placed)) > 0
    return hit
