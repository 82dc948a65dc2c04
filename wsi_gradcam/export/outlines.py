"""Outlines of hot regions: polygons around values that reach a threshold.

They follow the borders of pixels exactly and are traced band by band, without seams. A border is a run of pixel sides
with a hot pixel on one side only. Runs end exactly where borders meet, also where two hot pixels touch at a corner, so
that GEOS can make faces of them without searching for crossings, and joins runs that bands have cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsi_gradcam.geometry import Region
from wsi_gradcam.results.display import Colouring
from wsi_gradcam.results.heatmap import CHUNK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.export.job import Job
    from wsi_gradcam.results.display import ChannelInfo

    Mask = NDArray[np.bool_]
    Runs = NDArray[np.int64]


MAX_RUNS = 250_000  # about 200 MB while polygons are made of them
TOLERANCE_PX = 0.75  # traced pixels; turns a staircase of pixels into the line that it approximates
MIN_AREA_PX2 = 25  # smaller regions are not simplified: they could lose most of their area


class TooManyRunsError(Exception):
    """The outline has more runs than fit into bounded memory."""


def outlines(bands: Iterable[Mask], max_runs: int) -> list[shapely.Polygon]:
    """Return polygons, with holes, around the True pixels of an image given in `bands` of rows [n, w], top first.

    Coordinates are x, y in pixels, the first pixel from 0 to 1. Pixels that share a side are in one polygon.

    Raises:
        TooManyRunsError: there are more than `max_runs` runs.
    """
    flat, upright, count, top = [], [], 0, 0
    above: Mask | None = None
    for band in bands:
        above = np.zeros(band.shape[1], np.bool_) if above is None else above
        flat.append(_flat_runs(above, band, top))
        upright.append(_upright_runs(band, top))
        count += len(flat[-1]) + len(upright[-1])
        if count > max_runs:
            raise TooManyRunsError
        above, top = band[-1], top + len(band)
    if above is None:
        return []
    flat.append(_flat_runs(above, np.zeros((1, len(above)), np.bool_), top))
    return _faces(np.concatenate(flat), np.concatenate(upright))


def _flat_runs(above: Mask, band: Mask, top: int) -> Runs:
    """Return runs along the upper sides of a band's rows, [n, 4]: y, first x, last x, 1 if hot is below, else -1."""
    rows = np.concatenate([above[None], band]).astype(np.int8)
    return np.add(_runs(rows[1:] - rows[:-1]), (top, 0, 0, 0), dtype=np.int64)


def _upright_runs(band: Mask, top: int) -> Runs:
    """Return runs along the left and right sides of a band's pixels, [n, 4]: x, first y, last y, 1 if hot is right."""
    columns = np.pad(band, ((0, 0), (1, 1))).astype(np.int8)
    return np.add(_runs((columns[:, 1:] - columns[:, :-1]).T), (0, top, top, 0), dtype=np.int64)


def _runs(steps: NDArray[np.int8]) -> Runs:
    """Return runs of equal values other than 0 in rows, [n, 4]: row, first, end, value."""
    padded = np.pad(steps, ((0, 0), (1, 1)))
    rows, ends = np.nonzero(padded[:, 1:] != padded[:, :-1])
    value = padded[rows, ends + 1]
    begins = np.flatnonzero(value)
    return np.stack([rows[begins], ends[begins], ends[begins + 1], value[begins]], axis=1).astype(np.int64)


def _faces(flat: Runs, upright: Runs) -> list[shapely.Polygon]:
    """Return the hot faces of those that the runs enclose."""
    if not len(flat):
        return []
    y, first, end, _ = flat.T
    x, top, bottom, _ = upright.T
    lines = np.concatenate([np.stack([first, y, end, y], axis=1), np.stack([x, top, x, bottom], axis=1)])
    collection = shapely.polygonize(np.asarray(shapely.linestrings(lines.reshape(-1, 2, 2).astype(np.float64))))
    faces = shapely.get_parts(collection)
    # The pixel below the upper left corner of a face is in it: it is hot if such a run begins there.
    below = flat[flat[:, 3] == 1]
    hot = set(zip(below[:, 0].tolist(), below[:, 1].tolist(), strict=True))
    return [face for face in faces if _corner(face) in hot]


def _corner(face: shapely.Polygon) -> tuple[int, int]:
    """Return (y, x) of the leftmost of the uppermost corners."""
    ring = shapely.get_coordinates(face.exterior)
    x, y = ring[np.lexsort((ring[:, 0], ring[:, 1]))[0]]
    return int(y), int(x)


def mask_polygons(mask: Mask) -> list[shapely.Polygon]:
    """Return polygons around the True pixels of an image, bool [H, W], simplified, x, y in its pixels.

    Raises:
        TooManyRunsError: the mask is too ragged.
    """
    return [_simplified(polygon) for polygon in outlines([mask], MAX_RUNS)]


@dataclass(frozen=True)
class HotRegions:
    """Polygons around hot pixels.

    Attributes:
        polygons: with holes, x, y in level-0 px of the slide, valid, not touching each other but at corners.
        level: the level of the heatmap that was traced, the finest without too many borders.
        threshold: the lowest value that is hot.
    """

    polygons: list[shapely.Polygon]
    level: int
    threshold: float


def hot_regions(job: Job, channel: ChannelInfo, *, simplified: bool = True) -> HotRegions:
    """Return polygons around explained pixels whose values reach the threshold, without those below `min_area`."""
    threshold = job.threshold(channel)
    last = len(job.slide.levels) - 1
    for level in range(last + 1):
        try:
            found = outlines(_bands(job, channel, threshold, level), MAX_RUNS if level < last else 1 << 62)
        except TooManyRunsError:
            continue
        tolerance = job.options.simplify if simplified else 0
        least = job.options.min_area / (job.slide.mpp[0] * job.slide.mpp[1] * (job.slide.stride_px * 2**level) ** 2)
        kept = [face for face in found if face.area >= least]
        polygons = [_in_slide(_simplified(face, tolerance), job, level) for face in kept]
        return HotRegions(polygons, level, threshold)
    raise AssertionError("the last level has no limit")


def _bands(job: Job, channel: ChannelInfo, threshold: float, level: int) -> Iterator[NDArray[np.bool_]]:
    height, width = job.slide.levels[level]
    colouring = Colouring("gray", 0.0, 1.0, threshold)
    for y in range(0, height, CHUNK):
        band = Region(y, 0, min(CHUNK, height - y), width)
        yield colouring.shown(job.slide.read(channel, level, band), job.slide.read_coverage(level, band))


def _straight(face: shapely.Polygon) -> shapely.Polygon:
    """Return the face without points on straight sides, which the division into bands has left."""
    return shapely.simplify(face, 0)


def _simplified(face: shapely.Polygon, tolerance_px: float = TOLERANCE_PX) -> shapely.Polygon:
    if face.area < MIN_AREA_PX2 or not tolerance_px:
        return _straight(face)
    found = shapely.simplify(face, tolerance_px)
    return found if found.is_valid else _straight(face)


def _in_slide(face: shapely.Polygon, job: Job, level: int) -> shapely.Polygon:
    """Return a face in level-0 px, cut at the slide's borders: the heatmap's last pixels may reach beyond."""
    step = job.slide.stride_px * 2**level
    height, width = job.slide.size_px
    placed = shapely.transform(face, lambda xy: np.minimum(xy * step, (width, height)))
    return shapely.orient_polygons(placed)
