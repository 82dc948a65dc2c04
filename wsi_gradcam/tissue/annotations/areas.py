"""Areas of annotations in level-0 pixels, as all readers return them, and masks of areas, exact at pixel centres."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


# Plain Python values take about twenty times the bytes of their JSON: this keeps a hostile file below a gigabyte.
MAX_BYTES = 32 << 20
MAX_COORDINATE_PX = 1e8  # no slide is larger: what lies beyond is no pixel coordinate


@dataclass(frozen=True, eq=False)
class Area:
    """A closed shape that somebody drew on a slide.

    Attributes:
        name: of its class, as the program that drew it shows it; "" where it has none.
        outline: float64 [n, 2] of (y, x) in level-0 px; the last point is joined to the first.
        holes: outlines of what is cut out of it; they may reach beyond it.
    """

    name: str
    outline: NDArray[np.float64]
    holes: tuple[NDArray[np.float64], ...] = ()


@dataclass(frozen=True, eq=False)
class Annotations:
    """The areas in a file.

    Attributes:
        areas: in the order of the file.
        ignored: how many shapes enclose nothing, by what they are, such as {"Point": 3}.
    """

    areas: tuple[Area, ...]
    ignored: dict[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, each once, sorted."""
        return tuple(sorted({area.name for area in self.areas}))


def make_annotations(path: Path, areas: Iterable[Area], ignored: Iterable[str]) -> Annotations:
    """Return the annotations of a file.

    Raises:
        AnnotationError: there is no area among them.
    """
    found = Annotations(tuple(areas), dict(Counter(ignored)))
    if not found.areas:
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(found.ignored.items()))
        raise AnnotationError(
            f"{path}: holds {what + ', which enclose nothing' if what else 'no annotation'}; expected polygons"
        )
    return found


def make_outline(path: Path, what: str, points: Any) -> NDArray[np.float64]:
    """Return the outline float64 [n, 2] of (y, x) from points of (x, y), as all formats have them.

    Raises:
        AnnotationError: not at least three points of finite numbers that can be pixels.
    """
    try:
        flat = (float(point[axis]) for point in points for axis in (0, 1))
        xy = np.fromiter(flat, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise AnnotationError(f"{path}: {what} has points that are not pairs of numbers; expected x and y") from error
    if len(xy) < 3:
        raise AnnotationError(f"{path}: {what} has {len(xy)} points, expected 3 or more")
    if not bool(np.isfinite(xy).all()) or float(np.abs(xy).max()) > MAX_COORDINATE_PX:
        raise AnnotationError(f"{path}: {what} has coordinates that are no level-0 pixels of any slide")
    return xy[:, ::-1].copy()


def ellipse(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the outline of the ellipse in the bounding box of `corners`."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    centre, radius = (low + high) / 2, (high - low) / 2
    angle = np.linspace(0, 2 * math.pi, 180, endpoint=False)
    outline: NDArray[np.float64] = centre + radius * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return outline


def box(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the outline of the bounding box of `corners`."""
    (top, left), (bottom, right) = corners.min(axis=0), corners.max(axis=0)
    return np.array([(top, left), (top, right), (bottom, right), (bottom, left)])


CROSSINGS = 1 << 20  # of an outline with rows of pixels in one step: bounds the memory
# Pixels and crossings of all outlines: some ten seconds. A thousand annotations that each fill a large slide's mask.
MAX_WORK = 4e9


def rasterise(
    areas: Sequence[Area], slide_px: tuple[int, int], shape: tuple[int, int], source: str = "annotations"
) -> NDArray[np.bool_]:
    """Return the pixels of a mask over a slide that lie in some area, bool [h, w].

    A pixel is in an area when its centre lies inside the outline and in no hole. An outline that crosses itself
    contains all that it surrounds. Of an area too small to hold any centre, the pixel in its middle counts, so that
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
        if work > MAX_WORK:
            raise AnnotationError(f"{source}: its outlines cover the slide too many times over; expected fewer areas")
        mask[top:bottom, left:right] |= _inside(outlines, (top, left), (bottom - top, right - left))
    return mask


def _box(outline: NDArray[np.float64], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of the pixels that an outline can touch."""
    low = np.clip(np.floor(outline.min(axis=0)), 0, shape).astype(int).tolist()
    high = np.clip(np.ceil(outline.max(axis=0)), 0, shape).astype(int).tolist()
    return low[0], low[1], high[0], high[1]


def _crossings(outline: NDArray[np.float64], top: int, bottom: int) -> float:
    return float(np.abs(np.diff(np.clip(outline[:, 0], top, bottom))).sum()) + len(outline)


def _inside(outlines: list[NDArray[np.float64]], corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the inside of the first outline without the others, all in mask pixels; the result begins at `corner`."""
    origin = np.array(corner)
    inside = fill(outlines[0] - origin, size)
    if not inside.any():
        middle = np.clip(outlines[0].mean(axis=0) - origin, 0, np.array(size) - 1).astype(int)
        inside[middle[0], middle[1]] = True
    for hole in outlines[1:]:
        inside &= ~fill(hole - origin, size)
    return inside


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
