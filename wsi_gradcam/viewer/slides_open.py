"""The slides that are open: a few, each while someone reads it and for some time after."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsi_gradcam.slides import Slide

MOST_OPEN = 8


@dataclass
class _Open:
    lock: threading.Lock = field(default_factory=threading.Lock)
    slide: Slide | None = None
    users: int = 0


class OpenSlides:
    """Lends open slides to threads; those used last stay open, at most `most` that nobody uses."""

    def __init__(self, most: int = MOST_OPEN) -> None:
        self._most = most
        self._known: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, key: str, opener: Callable[[], Slide]) -> Iterator[Slide]:
        """The slide of a key, opened if need be; not closed before the context ends.

        Raises:
            SlideError: as `opener` does.
        """
        with self._lock:
            mine = self._known.setdefault(key, _Open())
            self._known.move_to_end(key)
            mine.users += 1
        try:
            with mine.lock:  # the others wait for the first that opens it
                if mine.slide is None:
                    mine.slide = opener()
            yield mine.slide
        finally:
            with self._lock:
                mine.users -= 1
            self._close_idle(self._most)

    def close(self) -> None:
        """Close all that nobody uses."""
        self._close_idle(0)

    def _close_idle(self, most: int) -> None:
        with self._lock:
            idle = [key for key, known in self._known.items() if known.users == 0]
            failed = [key for key in idle if self._known[key].slide is None]
            dropped = {*idle[: max(0, len(idle) - most)], *failed}
            leaving = [self._known.pop(key) for key in dropped]
        for known in leaving:
            if known.slide is not None:
                known.slide.close()
