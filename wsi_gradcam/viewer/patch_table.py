"""The table of a slide's patches: which patch lies at a point, which lie beside it, which have the highest values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import NotShownError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

COORDINATES = ("y", "x")
TEXTS = ("status", "cause")
DIRECTIONS = ("E", "NE", "N", "NW", "W", "SW", "S", "SE")
MAX_CANDIDATES = 50_000  # of a top-k, of which neighbours are left out


class PatchTable:
    """The rows of patches.parquet as arrays; `footprint` is a patch's (height, width) in level-0 px."""

    def __init__(self, table: pa.Table, footprint: tuple[float, float]) -> None:
        names = [name for name in table.column_names if name not in (*COORDINATES, *TEXTS)]
        self.values = {name: _floats(table, name) for name in names}
        self.y, self.x = (table.column(name).to_numpy().astype(np.int64) for name in COORDINATES)
        self._texts = {name: table.column(name) for name in TEXTS}
        self.footprint = footprint
        self.nbytes = int(table.nbytes) + sum(array.nbytes for array in (*self.values.values(), self.y, self.x))

    def __len__(self) -> int:
        return len(self.y)

    def at(self, y: float, x: float) -> int | None:
        """Return the patch that covers level-0 (y, x); of several, the one whose centre is nearest."""
        height, width = self.footprint
        inside = (self.y <= y) & (y < self.y + height) & (self.x <= x) & (x < self.x + width)
        (found,) = np.nonzero(inside)
        if not len(found):
            return None
        return int(found[np.argmin(self._distances(found, y - height / 2, x - width / 2))])

    def neighbours(self, number: int) -> list[tuple[int, str]]:
        """Return the numbers and directions of up to 8 patches around one, the nearest in each direction."""
        y, x, reach = float(self.y[number]), float(self.x[number]), 1.5 * max(self.footprint)
        near = (np.abs(self.y - y) <= reach) & (np.abs(self.x - x) <= reach)
        near[number] = False
        (found,) = np.nonzero(near)
        order = found[np.argsort(self._distances(found, y, x), kind="stable")]
        nearest: dict[str, int] = {}
        for other in order.tolist():
            nearest.setdefault(_direction(self.y[other] - y, self.x[other] - x), other)
        return [(nearest[name], name) for name in DIRECTIONS if name in nearest]

    def top(self, column: str, count: int, lowest: bool = False) -> list[int]:
        """Return the patches with the highest values of a column; of overlapping ones only the highest.

        Raises:
            NotShownError: there is no such column.
        """
        values = self._column(column)
        ranked = np.argsort(values if lowest else -values, kind="stable")  # NaN comes last
        chosen: list[int] = []
        for number in ranked[:MAX_CANDIDATES].tolist():
            if len(chosen) == count or math.isnan(values[number]):
                break
            if not self._overlaps(number, chosen):
                chosen.append(number)
        return chosen

    def row(self, number: int) -> dict[str, Any]:
        """Return all columns of a patch; None for values that are not known.

        Raises:
            NotShownError: there is no such patch.
        """
        if not 0 <= number < len(self):
            raise NotShownError(f"no patch {number}; there are {len(self)}, counted from 0")
        row: dict[str, Any] = {"number": number, "y": int(self.y[number]), "x": int(self.x[number])}
        row |= {name: column[number].as_py() for name, column in self._texts.items()}
        return row | {name: _known(array[number]) for name, array in self.values.items()}

    def value(self, column: str, number: int) -> float | None:
        """Return one value of a patch; None if it is not known."""
        return _known(self._column(column)[number])

    def _column(self, name: str) -> NDArray[np.float64]:
        if name not in self.values:
            raise NotShownError(f"no column {name[:100]!r}; expected one of {', '.join(self.values)}")
        return self.values[name]

    def _distances(self, numbers: NDArray[np.intp], y: float, x: float) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.hypot(self.y[numbers] - y, self.x[numbers] - x)
        return found

    def _overlaps(self, number: int, chosen: list[int]) -> bool:
        """Return whether a patch shares more than half its length with one of others, along both axes."""
        height, width = self.footprint
        return any(
            abs(self.y[number] - self.y[o]) < height / 2 and abs(self.x[number] - self.x[o]) < width / 2 for o in chosen
        )


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column as float64, so that JSON shows the numbers that are stored; null becomes NaN."""
    return np.asarray(table.column(name).to_numpy(), np.float64)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _direction(dy: float, dx: float) -> str:
    """Return a compass direction, as on a map; y runs down."""
    return DIRECTIONS[round(math.atan2(-dy, dx) / (math.pi / 4)) % 8]
