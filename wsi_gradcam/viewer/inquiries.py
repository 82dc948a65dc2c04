"""Questions of the page about slides, points and patches."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import NotShownError, SlideError, TileError, WsiGradcamError
from wsi_gradcam.viewer.describe import audit_address, patch_columns, slide_facts
from wsi_gradcam.viewer.heat import Heat
from wsi_gradcam.viewer.memo import Memo
from wsi_gradcam.viewer.patch_table import PatchTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from wsi_gradcam.viewer.archive import Archive, Shown
    from wsi_gradcam.viewer.describe import Windows
    from wsi_gradcam.viewer.slides_open import OpenSlides
    from wsi_gradcam.viewer.spread import Spread, Spreads

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
