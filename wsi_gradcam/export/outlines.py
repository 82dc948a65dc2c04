"""Outlines of what is hot, exactly along the borders of pixels, streamed: no seams between the parts that are read.

Borders are runs of pixel sides along which hot lies on one side alone. Runs end exactly where borders meet, also
where two hot pixels touch at a corner, so GEOS can make faces of them without searching for crossings, and a run that
is cut between two bands of rows is joined again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import shapely

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
