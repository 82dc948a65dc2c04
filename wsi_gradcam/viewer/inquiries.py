"""Questions of the page about slides, points and patches.

Questions to a slide's table of patches: which lies here, which are beside it, which are highest.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import NotShownError, SlideError, TileError, WsiGradcamError
from wsi_gradcam.viewer.describe import audit_address, patch_columns, slide_facts
from wsi_gradcam.viewer.heat import Heat
from wsi_gradcam.viewer.memo import Memo

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa
    from numpy.typing import NDArray

    from wsi_gradcam.viewer.archive import Archive, Shown
    from wsi_gradcam.viewer.describe import Windows
    from wsi_gradcam.viewer.slides_open import OpenSlides
    from wsi_gradcam.viewer.spread import Spread, Spreads


NUMBERS = ("y", "x")
TEXTS = ("status", "cause")
DIRECTIONS = ("E", "NE", "N", "NW", "W", "SW", "S", "SE")
NEIGHBOURS = 8
MOST_LOOKED_AT = 50_000  # candidates of a top-k, of which neighbours are left out


class PatchTable:
    """The rows of patches.parquet as arrays; `footprint` is a patch's (height, width) in level-0 px."""

    def __init__(self, table: pa.Table, footprint: tuple[float, float]) -> None:
        names = [name for name in table.column_names if name not in (*NUMBERS, *TEXTS)]
        self.values = {name: _floats(table, name) for name in names}
        self.y, self.x = (table.column(name).to_numpy().astype(np.int64) for name in NUMBERS)
        self._texts = {name: table.column(name) for name in TEXTS}
        self.footprint = footprint
        self.nbytes = int(table.nbytes) + sum(array.nbytes for array in (*self.values.values(), self.y, self.x))

    def __len__(self) -> int:
        return len(self.y)

    def at(self, y: float, x: float) -> int | None:
        """The patch that covers level-0 (y, x); of several, the one whose centre is nearest."""
        height, width = self.footprint
        inside = (self.y <= y) & (y < self.y + height) & (self.x <= x) & (x < self.x + width)
        (found,) = np.nonzero(inside)
        if not len(found):
            return None
        return int(found[np.argmin(self._distances(found, y - height / 2, x - width / 2))])

    def neighbours(self, number: int) -> list[tuple[int, str]]:
        """Up to 8 patches around one, at most one in each direction: their numbers and where they lie."""
        y, x, reach = float(self.y[number]), float(self.x[number]), 1.5 * max(self.footprint)
        near = (np.abs(self.y - y) <= reach) & (np.abs(self.x - x) <= reach)
        near[number] = False
        (found,) = np.nonzero(near)
        order = found[np.argsort(self._distances(found, y, x), kind="stable")]
        nearest: dict[str, int] = {}
        for other in order.tolist():
            nearest.setdefault(_direction(self.y[other] - y, self.x[other] - x), other)
        return [(nearest[name], name) for name in DIRECTIONS if name in nearest][:NEIGHBOURS]

    def top(self, column: str, count: int, lowest: bool = False) -> list[int]:
        """The patches with the highest values of a column, of overlapping ones the highest alone.

        Raises:
            NotShownError: there is no such column.
        """
        values = self._column(column)
        ranked = np.argsort(values if lowest else -values, kind="stable")  # NaN comes last
        chosen: list[int] = []
        for number in ranked[:MOST_LOOKED_AT].tolist():
            if len(chosen) == count or math.isnan(values[number]):
                break
            if not self._overlaps(number, chosen):
                chosen.append(number)
        return chosen

    def row(self, number: int) -> dict[str, Any]:
        """Everything of a patch; None for what is not known.

        Raises:
            NotShownError: there is no such patch.
        """
        if not 0 <= number < len(self):
            raise NotShownError(f"no patch {number}; there are {len(self)}, counted from 0")
        row: dict[str, Any] = {"number": number, "y": int(self.y[number]), "x": int(self.x[number])}
        row |= {name: column[number].as_py() for name, column in self._texts.items()}
        return row | {name: _known(array[number]) for name, array in self.values.items()}

    def value(self, column: str, number: int) -> float | None:
        """One number of a patch."""
        return _known(self._column(column)[number])

    def _column(self, name: str) -> NDArray[np.float64]:
        if name not in self.values:
            raise NotShownError(f"no column {name[:100]!r}; expected one of {', '.join(self.values)}")
        return self.values[name]

    def _distances(self, numbers: NDArray[np.intp], y: float, x: float) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.hypot(self.y[numbers] - y, self.x[numbers] - x)
        return found

    def _overlaps(self, number: int, chosen: list[int]) -> bool:
        """Whether a patch shares more than half its length with one of others, along both axes."""
        height, width = self.footprint
        return any(
            abs(self.y[number] - self.y[o]) < height / 2 and abs(self.x[number] - self.x[o]) < width / 2 for o in chosen
        )


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column of numbers; null is NaN. Float64, for that JSON shows the numbers that are stored."""
    column = table.column(name)
    return np.asarray(column.to_numpy(), np.float64)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _direction(dy: float, dx: float) -> str:
    """Where something lies, as on a map: y runs down."""
    return DIRECTIONS[round(math.atan2(-dy, dx) / (math.pi / 4)) % 8]


MOST_TOP = 100
TABLE_BYTES = 512 << 20  # four slides of a million patches
WHOLE = re.compile(r"\d{1,9}", re.ASCII)


class Inquiries:
    """Answers them; the tables of the slides looked at last are kept."""

    def __init__(self, archive: Archive, slides: OpenSlides, spreads: Spreads, windows: Callable[[], Windows]) -> None:
        self._archive, self._slides, self._spreads, self._windows = archive, slides, spreads, windows
        self._heat = Heat(16 << 20)
        self._tables = Memo(TABLE_BYTES)

    def slide(self, key: str) -> dict[str, Any]:
        """Facts of a slide; that it cannot be opened is one of them."""
        shown = self._archive.find(key)
        spread, windows = self._spread(shown), self._windows()
        audit = {"audit": audit_address(self._archive, shown)}
        try:
            with self._slides.lent(f"{key} {shown.version}", lambda: self._archive.open_slide(shown)) as slide:
                return slide_facts(shown, slide, spread, windows) | audit
        except SlideError as error:
            return slide_facts(shown, error, spread, windows) | audit

    def values(self, key: str, y: float, x: float) -> dict[str, Any]:
        """All channels' values over level-0 (y, x), those of the spread last."""
        shown = self._archive.find(key)
        found = self._heat.at(shown, y, x)
        if found is None:
            return {"values": None, "tissue": False, "explained": False, "unreadable": False}
        return found | {"values": [*found["values"], *self._unsure(shown, y, x)]}

    def patch_at(self, key: str, y: float, x: float) -> dict[str, Any]:
        """The patch that covers level-0 (y, x); `{"number": None}` where none does."""
        shown = self._archive.find(key)
        table = self._table(shown)
        number = table.at(y, x)
        return {"number": None} if number is None else self._patch(shown, table, number)

    def patch(self, key: str, number: int) -> dict[str, Any]:
        """A patch: its row, its own maps, its neighbours."""
        shown = self._archive.find(key)
        return self._patch(shown, self._table(shown), number)

    def top(self, key: str, column: str, count: int, lowest: bool) -> dict[str, Any]:
        """The patches with the highest values of a column; without one, the columns there are."""
        table = self._table(self._archive.find(key))
        numbers = table.top(column, min(count, MOST_TOP), lowest) if column else []
        patches = [
            {"number": n, "y": int(table.y[n]), "x": int(table.x[n]), "value": table.value(column, n)} for n in numbers
        ]
        return {"columns": list(table.values), "patches": patches}

    def _spread(self, shown: Shown) -> Spread | WsiGradcamError | None:
        """What there is of a slide's spread: it is never a reason not to show the slide."""
        try:
            return self._spreads.of(shown)
        except WsiGradcamError as error:
            return error

    def _unsure(self, shown: Shown, y: float, x: float) -> list[float | None]:
        spread = self._spread(shown)
        if spread is None or isinstance(spread, WsiGradcamError):
            return []
        try:
            found = self._heat.at(spread, y, x)
        except WsiGradcamError:  # its tiles say what is wrong
            found = None
        return found["values"] if found else [None] * len(spread.result.channels)

    def _patch(self, shown: Shown, table: PatchTable, number: int) -> dict[str, Any]:
        row = table.row(number)
        neighbours = [{"number": other, "direction": name} for other, name in table.neighbours(number)]
        return {**row, "maps": patch_columns(shown.result, number), "neighbours": neighbours}

    def _table(self, shown: Shown) -> PatchTable:
        def read() -> PatchTable:
            return PatchTable(shown.result.table(), shown.result.plan.footprint)

        return self._tables.get((shown.key, shown.version), read, lambda table: table.nbytes)


def number(text: str) -> int:
    """A whole number of an address.

    Raises:
        TileError: it is none, or an absurd one.
    """
    if WHOLE.fullmatch(text) is None:
        raise TileError(f"{text[:40]!r} is no whole number up to 999999999")
    return int(text)


def real(text: str) -> float:
    """A coordinate of an address.

    Raises:
        NotShownError: it is none.
    """
    try:
        value = float(text[:40])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise NotShownError(f"{text[:40]!r} is no coordinate; expected y and x in level-0 px")
    return value
