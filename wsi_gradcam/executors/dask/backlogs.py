"""Which worker is next: the one that will have done its work first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Backlog:
    """The orders of a worker.

    Attributes:
        orders: seconds of work in each, by its key; it is at the first, as far as can be seen from here.
        since: when that began.
    """

    orders: dict[str, float] = field(default_factory=dict)
    since: float = 0.0

    def left_s(self, now: float) -> float:
        """Seconds of work that are left; an order that takes longer than expected is taken to be nearly done."""
        if not self.orders:
            return 0.0
        first_s = next(iter(self.orders.values()))
        return sum(self.orders.values()) - min(now - self.since, first_s)


class Backlogs:
    """What each worker has to do, of the orders for which one was chosen here.

    Dask chooses by all that a worker has to do, with as many threads as it has. A GPU does one order at a time, and
    whether it runs dry does not depend on what its worker's other threads have to plan and stitch.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: dict[str, Backlog] = {}
        self._at: dict[str, str] = {}

    def soonest(self, slots: Mapping[str, int]) -> str:
        """The address of the worker that is free first, among some that do so many orders at once."""
        now = self._clock()
        idle = Backlog()
        return min(slots, key=lambda address: self._of.get(address, idle).left_s(now) / slots[address])

    def add(self, key: str, worker: str, seconds: float) -> None:
        """An order is sent to a worker."""
        backlog = self._of.setdefault(worker, Backlog())
        if not backlog.orders:
            backlog.since = self._clock()
        backlog.orders[key] = seconds
        self._at[key] = worker

    def remove(self, key: str) -> None:
        """An order is done, or will not be; any may be named."""
        if (worker := self._at.pop(key, None)) is not None:
            backlog = self._of[worker]
            del backlog.orders[key]
            backlog.since = self._clock()
            if not backlog.orders:
                del self._of[worker]
