"""How much is out at once: so many orders for each that can run, and towards the end fewer and smaller ones.

Which worker is next: the one that will have done its work first.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field

from wsi_gradcam.executors.dask.rates import LEAST_S, ORDER_S, Rates
from wsi_gradcam.executors.dask.running import Running
from wsi_gradcam.run.types import Stage, Task

# An order costs the scheduler, the client and the way together some 2 ms, and a GPU its first patches' reading, some
# 30 ms: a hundredth of this. Small tasks, such as spans on a GPU (0.2 s) or blocks of coarse levels, travel together.
# Until one is done; what a span takes, which is a hundred times more on some devices than on others, is not guessed.


# Orders in flight for each that can run at once. Dask's adaptive clusters grow to (seconds of work that the scheduler
# knows) / 5 s: 4 orders of 3 s ask for more than twice the workers there are, until there are enough; and 12 s of work
# are left to each while a slide is planned.
ORDERS_PER_SLOT = 4
# Workers shall end together: an order of the model is at most one of so many parts of what is left for each, and when
# that is less than one order, fewer are out. Other orders of a slide follow each other: smaller ones only wait.
LAST_PER_SLOT, LAST_PARTS, LAST_PARTS_OTHER = 2, 8, 2


@dataclass(frozen=True)
class Window:
    """What may be out, of the model's (True) and other work.

    Attributes:
        orders: how many orders.
        seconds: of work in each.
        ahead: slides are planned while fewer orders of the model are out, and spans wait, than this.
    """

    orders: Mapping[bool, int]
    seconds: Mapping[bool, float]
    ahead: int

    @classmethod
    def of(cls, left_s: Mapping[bool, float], slots: Mapping[bool, int]) -> Window:
        """For seconds of work that are left in all, as far as is known, and so many that can run at once."""
        each_s = {model: left_s[model] / max(1, slots[model]) for model in (True, False)}
        few = LAST_PER_SLOT if each_s[True] < ORDER_S else ORDERS_PER_SLOT
        parts = {True: LAST_PARTS, False: LAST_PARTS_OTHER}
        return cls(
            {True: few * max(1, slots[True]), False: ORDERS_PER_SLOT * max(1, slots[False])},
            {model: min(ORDER_S, max(LEAST_S, each_s[model] / parts[model])) for model in (True, False)},
            ORDERS_PER_SLOT * max(1, slots[True]),
        )


class Outlook:
    """What is left to do: of slides that are planned, and of the others, if it is known how many they are."""

    def __init__(self, rates: Rates, slides: Iterable[object]) -> None:
        self._rates = rates
        self._ahead = len(slides) if isinstance(slides, Sized) else math.inf
        self._planned = 0
        self._stages: Counter[Stage] = Counter()  # tasks of the model in slides that were planned
        self._out: Counter[Stage] = Counter()  # tasks on their way

    def begun(self) -> None:
        """A slide is."""
        self._ahead = max(0, self._ahead - 1)

    def over(self) -> None:
        """There are no more slides."""
        self._ahead = 0

    def planned(self, running: Running) -> None:
        """A slide is: those that come are taken to be like those that were."""
        self._planned += 1
        for phase in running.phases:
            if phase[0][1].stage.needs_model:
                self._stages[phase[0][1].stage] += len(phase)

    def sent(self, tasks: Iterable[Task]) -> None:
        """They are on their way."""
        self._out.update(task.stage for task in tasks)

    def back(self, tasks: Iterable[Task]) -> None:
        """They are no more."""
        self._out.subtract(task.stage for task in tasks)

    def left_s(self, active: Iterable[Running], enough_s: float = math.inf) -> dict[bool, float]:
        """Seconds of work of the model, and of other work; infinite where that is not known, or is more than enough."""
        ahead_s = self._ahead_s()
        if ahead_s == math.inf or ahead_s > enough_s:
            return {True: math.inf, False: math.inf}
        left_s = {True: ahead_s, False: math.inf if self._ahead else 0.0}
        left = Counter(self._out)
        for running in active:
            for phase in running.phases:
                left[phase[0][1].stage] += len(phase)
        for stage, count in left.items():
            left_s[stage.needs_model] += count * self._rates.seconds(stage)
        return left_s

    def window(self, active: Iterable[Running], slots: Mapping[bool, int]) -> Window:
        """What may be out, for so much that can run at once: until the end comes near, always the same."""
        return Window.of(self.left_s(active, LAST_PARTS * ORDER_S * max(1, slots[True])), slots)

    def _ahead_s(self) -> float:
        """Of the model for slides that are not begun."""
        if not self._ahead:
            return 0.0
        if not self._planned:
            return math.inf
        planned_s = sum(count * self._rates.seconds(stage) for stage, count in self._stages.items())
        return self._ahead * planned_s / self._planned


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
