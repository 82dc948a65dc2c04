"""Things that are made once and kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Memo:
    """The values used last, up to `most_bytes`. What several threads want at the same time is made once."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T], bytes_of: Callable[[T], int]) -> T:
        """The value of a key, made where it is not kept; what `make` raises is raised, and nothing kept."""
        with self._one_at_a_time(key):
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    value: T = self._kept[key][0]
                    return value
            value = make()
            self._keep(key, value, bytes_of(value))
            return value

    @contextmanager
    def _one_at_a_time(self, key: Hashable) -> Iterator[None]:
        with self._lock:
            mine = self._making.setdefault(key, threading.Lock())
        try:
            with mine:
                yield
        finally:
            with self._lock:
                if self._making.get(key) is mine:
                    del self._making[key]

    def _keep(self, key: Hashable, value: object, size: int) -> None:
        with self._lock:
            if (old := self._kept.pop(key, None)) is not None:
                self.bytes -= old[1]
            if size > self.most_bytes:
                return
            self._kept[key] = (value, size)
            self.bytes += size
            while self.bytes > self.most_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self.bytes -= freed
