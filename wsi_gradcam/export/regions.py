"""Hot regions: polygons around what reaches a threshold, in level-0 px of the slide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsi_gradcam.export.colours import Colouring
from wsi_gradcam.export.outlines import TooManyRunsError, outlines
from wsi_gradcam.geometry import Region
from wsi_gradcam.stores.heatmap import CHUNK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.export.job import Job
    from wsi_gradcam.result import ChannelInfo

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
