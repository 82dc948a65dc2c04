"""What was decoded or fetched, kept while neighbouring patches are likely to ask for it again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")  # an array, or bytes


class TileCache(Generic[Key, Value]):
    """The values that were used last, up to a number of bytes. Safe for threads: each is made by one of them.

    A thread first makes all that it has claimed and only then waits for others, so none waits for one that waits.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[Key, Value] = OrderedDict()
        self._making: dict[Key, Future[Value]] = {}
        self._lock = threading.Lock()

    def get_many(self, keys: Sequence[Key], make: Callable[[list[Key]], Sequence[Value | Exception]]) -> list[Value]:
        """The values of `keys`, not to be written to; those neither kept nor being made are made now by one call.

        `make` returns a value for each key it gets, or the exception that this one came to. That is raised here too,
        also in threads that wait for it, and is not kept; what `make` raises itself holds for all its keys.
        """
        kept: dict[Key, Value] = {}
        claimed: dict[Key, Future[Value]] = {}
        waiting: dict[Key, Future[Value]] = {}
        with self._lock:
            for key in keys:
                if (value := self._kept.get(key)) is not None:
                    self._kept.move_to_end(key)
                    kept[key] = value
                elif (making := self._making.get(key)) is not None:
                    waiting[key] = making
                else:
                    claimed[key] = self._making[key] = Future()
        if claimed:
            self._make(claimed, make)
            waiting |= claimed
        return [kept[key] if key in kept else waiting[key].result() for key in keys]

    def _make(
        self, claimed: dict[Key, Future[Value]], make: Callable[[list[Key]], Sequence[Value | Exception]]
    ) -> None:
        try:
            made = dict(zip(claimed, make(list(claimed)), strict=True))
        except BaseException as error:
            with self._lock:
                for key in claimed:
                    del self._making[key]
            for future in claimed.values():
                future.set_exception(error)
            raise
        with self._lock:
            for key, value in made.items():
                del self._making[key]
                if not isinstance(value, Exception):
                    self._keep(key, value)
        for key, value in made.items():
            if isinstance(value, Exception):
                claimed[key].set_exception(value)
            else:
                claimed[key].set_result(value)

    def _keep(self, key: Key, value: Value) -> None:
        self._kept[key] = value
        self._bytes += _bytes_of(value)
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _bytes_of(oldest)


def _bytes_of(value: object) -> int:
    return memoryview(value).nbytes  # type: ignore[arg-type]
