"""Hot regions: polygons around what reaches a threshold, in level-0 px of the slide.

Outlines of what is hot, exactly along the borders of pixels, streamed: no seams between the parts that are read.

Borders are runs of pixel sides along which hot lies on one side alone. Runs end exactly where borders meet, also
where two hot pixels touch at a corner, so GEOS can make faces of them without searching for crossings, and a run that
is cut between two bands of rows is joined again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsi_gradcam.export.colours import Colouring
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.heatmap import CHUNK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.export.job import Job
    from wsi_gradcam.results.channels import ChannelInfo

    Mask = NDArray[np.bool_]
    Runs = NDArray[np.int64]


class TooManyRunsError(Exception):
    """The outline has more runs than memory shall hold."""


def outlines(bands: Iterable[Mask], most_runs: int) -> list[shapely.Polygon]:
    """Polygons, with holes, around the True pixels of an image that comes in `bands` of rows [n, w], top first.

    Coordinates are x, y in pixels, the first pixel from 0 to 1. Pixels that share a side are in one polygon.

    Raises:
        TooManyRunsError: memory would not be bounded.
    """
    flat, upright, count, top = [], [], 0, 0
    above: Mask | None = None
    for band in bands:
        above = np.zeros(band.shape[1], np.bool_) if above is None else above
        flat.append(_flat_runs(above, band, top))
        upright.append(_upright_runs(band, top))
        count += len(flat[-1]) + len(upright[-1])
        if count > most_runs:
            raise TooManyRunsError
        above, top = band[-1], top + len(band)
    if above is None:
        return []
    flat.append(_flat_runs(above, np.zeros((1, len(above)), np.bool_), top))
    return _faces(np.concatenate(flat), np.concatenate(upright))


def _flat_runs(above: Mask, band: Mask, top: int) -> Runs:
    """Runs along the upper sides of a band's rows: [n, 4] of y, first x, last x, 1 where hot lies below or -1."""
    rows = np.concatenate([above[None], band]).astype(np.int8)
    return np.add(_runs(rows[1:] - rows[:-1]), (top, 0, 0, 0), dtype=np.int64)


def _upright_runs(band: Mask, top: int) -> Runs:
    """Runs along the left and right sides of a band's pixels: [n, 4] of x, first y, last y, 1 where hot is right."""
    columns = np.pad(band, ((0, 0), (1, 1))).astype(np.int8)
    return np.add(_runs((columns[:, 1:] - columns[:, :-1]).T), (0, top, top, 0), dtype=np.int64)


def _runs(steps: NDArray[np.int8]) -> Runs:
    """Where equal values other than 0 follow each other in a row: [n, 4] of row, first, end, value."""
    padded = np.pad(steps, ((0, 0), (1, 1)))
    rows, ends = np.nonzero(padded[:, 1:] != padded[:, :-1])
    value = padded[rows, ends + 1]
    begins = np.flatnonzero(value)
    return np.stack([rows[begins], ends[begins], ends[begins + 1], value[begins]], axis=1).astype(np.int64)


def _faces(flat: Runs, upright: Runs) -> list[shapely.Polygon]:
    """The hot ones of the faces that the runs enclose."""
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
    """(y, x) of the leftmost of the uppermost corners."""
    ring = shapely.get_coordinates(face.exterior)
    x, y = ring[np.lexsort((ring[:, 0], ring[:, 1]))[0]]
    return int(y), int(x)


MOST_RUNS = 250_000  # some 200 MB while polygons are made of them
TOLERANCE_PX = 0.75  # of a pixel that is traced: a staircase of pixels becomes the line it stands for
SMALLEST_PX2 = 25  # regions below are left as they are: simplified they could lose most of their area


@dataclass(frozen=True)
class HotRegions:
    """Polygons around what is hot.

    Attributes:
        polygons: with holes, x, y in level-0 px of the slide, valid, not touching each other but at corners.
        level: of the heatmap that was traced: the finest that has not too many borders.
        threshold: from which value on it is hot.
    """

    polygons: list[shapely.Polygon]
    level: int
    threshold: float


def hot_regions(job: Job, channel: ChannelInfo, *, simplified: bool = True) -> HotRegions:
    """Where explained values reach the threshold."""
    threshold = job.threshold(channel)
    last = len(job.slide.levels) - 1
    for level in range(last + 1):
        try:
            found = outlines(_bands(job, channel, threshold, level), MOST_RUNS if level < last else 1 << 62)
        except TooManyRunsError:
            continue
        polygons = [_in_slide(_simplified(face) if simplified else _straight(face), job, level) for face in found]
        return HotRegions(polygons, level, threshold)
    raise AssertionError("the last level has no limit")


def _bands(job: Job, channel: ChannelInfo, threshold: float, level: int) -> Iterator[NDArray[np.bool_]]:
    height, width = job.slide.levels[level]
    colouring = Colouring("gray", 0.0, 1.0, threshold)
    for y in range(0, height, CHUNK):
        band = Region(y, 0, min(CHUNK, height - y), width)
        yield colouring.shown(job.slide.read(channel, level, band), job.slide.read_coverage(level, band))


def _straight(face: shapely.Polygon) -> shapely.Polygon:
    """The same with corners alone: without what cutting into bands has left on straight sides."""
    return shapely.simplify(face, 0)


def _simplified(face: shapely.Polygon) -> shapely.Polygon:
    if face.area < SMALLEST_PX2:
        return _straight(face)
    found = shapely.simplify(face, TOLERANCE_PX)
    return found if found.is_valid else _straight(face)


def _in_slide(face: shapely.Polygon, job: Job, level: int) -> shapely.Polygon:
    """A face of pixels in level-0 px; the heatmap's last pixels may reach beyond the slide, no region does."""
    step = job.slide.stride_px * 2**level
    height, width = job.slide.size_px
    placed = shapely.transform(face, lambda xy: np.minimum(xy * step, (width, height)))
    return shapely.orient_polygons(placed)
