"""Bounded caches that threads share: `Cache` for values, `ResourcePool` for things that must be closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cachetools import LRUCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def _count(value: object) -> int:
    return 1


class Cache(Generic[K, V]):
    """A cache of the most recently used values: up to `maxsize` of them, or of their sizes by `getsizeof` in all.

    Thread-safe; concurrent callers with the same key share one computation. Values are shared too: do not modify them.
    A value that is larger than the whole cache is returned, but not kept.
    """

    def __init__(self, maxsize: float, getsizeof: Callable[[V], float] = _count) -> None:
        self._values: LRUCache[K, V] = LRUCache(maxsize, getsizeof)
        self._pending: dict[K, Future[dict[K, V | Exception]]] = {}
        self._lock = threading.Lock()

    @property
    def currsize(self) -> float:
        """The sum of the sizes of all values kept."""
        return self._values.currsize

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of `key`, computed by `make` if it is missing.

        An exception from `make` is raised in all threads that wait for the value, and is not kept.
        """
        return self.get_many([key], lambda _: [make()])[0]

    def get_many(self, keys: Sequence[K], make: Callable[[list[K]], Sequence[V | Exception]]) -> list[V]:
        """Return the values of `keys`, the missing ones computed in one call of `make`.

        For each of its keys, `make` returns the value or an exception, which is raised here and in all threads that
        wait for that value, and is not kept. An exception that it raises counts for all its keys.
        """
        found: dict[K, V | Exception] = {}
        claimed: list[K] = []
        pending: dict[K, Future[dict[K, V | Exception]]] = {}
        own: Future[dict[K, V | Exception]] | None = None
        with self._lock:
            for key in keys:
                if key in self._values:
                    found[key] = self._values[key]
                elif key in self._pending:
                    pending[key] = self._pending[key]
                else:  # one for all: making one takes longer than looking up a value
                    own = own or Future()
                    self._pending[key] = own
                    claimed.append(key)
        # A thread computes all that it has claimed before it waits for others: no thread waits for one that waits.
        if own is not None:
            found |= self._make(claimed, own, make)
        for key, future in pending.items():
            found[key] = future.result()[key]
        return [_raised(found[key]) for key in keys]

    def peek(self, key: K) -> V | None:
        """Return the value of `key`, None if it is missing."""
        with self._lock:
            return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value, replacing the key's previous one."""
        with self._lock:
            self._keep(key, value)

    def discard(self, key: K) -> None:
        """Drop the value of `key`, if there is one."""
        with self._lock:
            self._values.pop(key, None)

    def _make(
        self,
        claimed: list[K],
        future: Future[dict[K, V | Exception]],
        make: Callable[[list[K]], Sequence[V | Exception]],
    ) -> dict[K, V | Exception]:
        """Return the claimed values or their errors, which are passed on to all that wait for the future."""
        try:
            made = dict(zip(claimed, make(claimed.copy()), strict=True))
        except BaseException as error:
            with self._lock:
                for key in claimed:
                    del self._pending[key]
            future.set_exception(error)
            raise
        with self._lock:
            for key, value in made.items():
                del self._pending[key]
                if not isinstance(value, Exception):
                    self._keep(key, value)
        future.set_result(made)
        return made

    def _keep(self, key: K, value: V) -> None:
        if self._values.getsizeof(value) <= self._values.maxsize:
            self._values[key] = value


def _raised(value: V | Exception) -> V:
    """Return a value, or raise it if it is an exception."""
    if isinstance(value, Exception):
        raise value
    return value


@dataclass
class _Shared(Generic[V]):
    """A resource in use. Its lock is held while it is opened, so that only one thread does it."""

    value: V | None = None
    users: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class ResourcePool(Generic[K, V]):
    """Open resources that threads share; idle ones stay open as long as no more than `maxsize` are open in all.

    The idle ones are closed in the order of their last use; those in use never are, even if they exceed `maxsize`.
    """

    def __init__(self, maxsize: int, close: Callable[[V], None]) -> None:
        self._maxsize = maxsize
        self._close = close
        self._in_use: dict[K, _Shared[V]] = {}
        self._idle: dict[K, V] = {}  # in the order of their last use
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, key: K, open_: Callable[[], V]) -> Iterator[V]:
        """Provide the resource of `key`, opened by `open_` if needed; it stays open until the context ends."""
        with self._lock:
            if key not in self._in_use:
                self._in_use[key] = _Shared(self._idle.pop(key, None))
            shared = self._in_use[key]
            shared.users += 1
        try:
            self._close_idle(self._maxsize)  # closed before another is opened
            with shared.lock:
                if shared.value is None:
                    shared.value = open_()
            yield shared.value
        finally:
            self._release(key, shared)

    def close(self) -> None:
        """Close all resources that are not in use."""
        self._close_idle(0)

    def _release(self, key: K, shared: _Shared[V]) -> None:
        with self._lock:
            shared.users -= 1
            if not shared.users:
                del self._in_use[key]
                if shared.value is not None:
                    self._idle[key] = shared.value
        self._close_idle(self._maxsize)

    def _close_idle(self, maxsize: int) -> None:
        with self._lock:
            surplus = max(0, len(self._idle) + len(self._in_use) - maxsize)
            closing = [self._idle.pop(key) for key in list(self._idle)[:surplus]]
        for value in closing:
            self._close(value)
