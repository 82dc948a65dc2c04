"""A periodic timer in a thread of its own, and durations as people read them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class PeriodicTimer:
    """Calls a function, which must not raise, every `interval_s` seconds while its context lasts."""

    def __init__(self, interval_s: float, function: Callable[[], None], name: str) -> None:
        self._interval_s, self._function = interval_s, function
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; when this returns, no call is under way."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._function()


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> format_duration(59.4), format_duration(61), format_duration(7300), format_duration(200_000)
    ('59 s', '1 min 1 s', '2 h 1 min', '2 d 7 h')
    """
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"
