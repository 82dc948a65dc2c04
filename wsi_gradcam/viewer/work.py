"""Threads that make answers, and a bound on how many requests may wait for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class BusyError(Exception):
    """Too many requests wait already."""


class GoneError(Exception):
    """Who asked has gone meanwhile."""


class Work:
    """Runs functions in at most `threads` threads; further callers wait their turn, up to `most_waiting`."""

    def __init__(self, threads: int, most_waiting: int = 256) -> None:
        self._threads, self._most_waiting = threads, most_waiting
        self._limiter: CapacityLimiter | None = None
        self._waiting = 0

    async def run(self, gone: Callable[[], Awaitable[bool]], function: Callable[[], T]) -> T:
        """What `function` returns; it is not called when `gone` says that nobody wants it any more.

        Raises:
            BusyError: too many wait.
            GoneError: nobody wants it any more.
        """
        if self._limiter is None:  # not before: it belongs to the event loop
            self._limiter = CapacityLimiter(self._threads)
        if self._waiting >= self._most_waiting:
            raise BusyError
        self._waiting += 1
        try:
            async with self._limiter:
                if await gone():
                    raise GoneError
                return await to_thread.run_sync(function, limiter=CapacityLimiter(1))
        finally:
            self._waiting -= 1
