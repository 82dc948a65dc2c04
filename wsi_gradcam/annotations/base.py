"""What every reader of annotations gives: named areas in level-0 pixels; and the bounds on what is read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

# Plain Python values take about twenty times the bytes of their JSON: this keeps a hostile file below a gigabyte.
MOST_BYTES = 32 << 20
FARTHEST_PX = 1e8  # no slide is larger: what lies beyond is no pixel coordinate


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
        """Names of the classes, each once, sorted."""
        return tuple(sorted({area.name for area in self.areas}))


def annotations_of(path: Path, areas: Iterable[Area], ignored: Iterable[str]) -> Annotations:
    """The file's annotations.

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


def outline_of(path: Path, what: str, points: Any) -> NDArray[np.float64]:
    """The outline float64 [n, 2] of (y, x) from points of (x, y), as all formats have them.

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
    if not bool(np.isfinite(xy).all()) or float(np.abs(xy).max()) > FARTHEST_PX:
        raise AnnotationError(f"{path}: {what} has coordinates that are no level-0 pixels of any slide")
    return xy[:, ::-1].copy()


def ellipse(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """The outline of the ellipse that touches the sides of the box round `corners`."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    centre, radius = (low + high) / 2, (high - low) / 2
    angle = np.linspace(0, 2 * math.pi, 180, endpoint=False)
    outline: NDArray[np.float64] = centre + radius * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return outline


def box(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """The outline of the box round `corners`."""
    (top, left), (bottom, right) = corners.min(axis=0), corners.max(axis=0)
    return np.array([(top, left), (top, right), (bottom, right), (bottom, left)])
