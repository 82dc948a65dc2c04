"""Limits of how many batches are in flight, of which size, and the choice of the worker that gets the next one.

There are a few batches in flight for each that can run at once, and towards the end of a run fewer and smaller ones, so
that all workers end together.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field

from wsi_gradcam.executors.dask.running import BATCH_S, LEAST_S, Rates, RunningSlide
from wsi_gradcam.executors.dask.workers import Pools
from wsi_gradcam.run.types import Stage, Task

# Batches in flight for each that can run at once. Dask's adaptive clusters grow to (seconds of work that the scheduler
# knows) / 5 s: 4 batches of 3 s ask for more than twice the workers there are, until there are enough; and 12 s of work
# are left to each while a slide is planned.
BATCHES_PER_SLOT = 4
# And slides are planned so far ahead of the model that it does not wait where many small ones follow each other, and
# those that plan are at other work, which nothing interrupts: finishing a slide takes most of a second.
PLANNED_S = BATCH_S
# Workers shall end together: a batch for the model is at most one of so many parts of the work left for each, and when
# that is less than one batch, fewer are in flight. Other batches of a slide follow each other: smaller ones only wait.
LAST_PER_SLOT, LAST_PARTS, LAST_PARTS_OTHER = 2, 8, 2


@dataclass(frozen=True)
class BatchLimits:
    """The most that may be in flight.

    Attributes:
        batches: how many batches.
        seconds: of work in each.
        ahead: slides are planned while fewer batches for the model are in flight, and spans wait, than this.
    """

    batches: Pools[int]
    seconds: Pools[float]
    ahead: int

    @classmethod
    def of(cls, left_s: Pools[float], slots: Pools[int], slide_s: float = BATCH_S) -> BatchLimits:
        """Return the limits for seconds of work that are left in all, and so many batches that can run at once.

        `slide_s` are the seconds of the model for a slide.
        """
        model_slots, other_slots = max(1, slots.model), max(1, slots.other)
        model_s, other_s = left_s.model / model_slots, left_s.other / other_slots
        few = LAST_PER_SLOT if model_s < BATCH_S else BATCHES_PER_SLOT
        return cls(
            Pools(few * model_slots, BATCHES_PER_SLOT * other_slots),
            Pools(_batch_s(model_s / LAST_PARTS), _batch_s(other_s / LAST_PARTS_OTHER)),
            model_slots * max(BATCHES_PER_SLOT, math.ceil(PLANNED_S / _batch_s(slide_s))),
        )


def _batch_s(seconds: float) -> float:
    return min(BATCH_S, max(LEAST_S, seconds))


class RemainingWork:
    """The work that is left: of slides that are planned, and of the others, if it is known how many they are."""

    def __init__(self, rates: Rates, slides: Iterable[object]) -> None:
        self._rates = rates
        self._ahead = len(slides) if isinstance(slides, Sized) else math.inf
        self._planned = 0
        self._stages: Counter[Stage] = Counter()  # tasks of the model in slides that were planned
        self._out: Counter[Stage] = Counter()  # tasks in flight

    def slide_begun(self) -> None:
        """Count a slide as begun."""
        self._ahead = max(0, self._ahead - 1)

    def no_more_slides(self) -> None:
        """Count no more slides that are not begun."""
        self._ahead = 0

    def slide_planned(self, running: RunningSlide) -> None:
        """Learn the tasks of a slide; those that are not planned yet are taken to be like the mean of these."""
        self._planned += 1
        for phase in running.phases:
            if phase[0][1].stage.needs_model:
                self._stages[phase[0][1].stage] += len(phase)

    def sent(self, tasks: Iterable[Task]) -> None:
        """Count tasks as in flight."""
        self._out.update(task.stage for task in tasks)

    def returned(self, tasks: Iterable[Task]) -> None:
        """Count tasks as no longer in flight."""
        self._out.subtract(task.stage for task in tasks)

    def left_s(self, active: Iterable[RunningSlide], enough_s: float = math.inf) -> Pools[float]:
        """Return the seconds of work left; infinite where they are not known, or more than enough for the model."""
        ahead_s = self._ahead_s()
        if ahead_s == math.inf or ahead_s > enough_s:
            return Pools(math.inf, math.inf)
        left = Counter(self._out)
        for running in active:
            for phase in running.phases:
                left[phase[0][1].stage] += len(phase)
        model_s, other_s = ahead_s, math.inf if self._ahead else 0.0
        for stage, count in left.items():
            seconds = count * self._rates.seconds(stage)
            model_s, other_s = model_s + seconds * stage.needs_model, other_s + seconds * (not stage.needs_model)
        return Pools(model_s, other_s)

    def limits(self, active: Iterable[RunningSlide], slots: Pools[int]) -> BatchLimits:
        """Return the limits for so many batches that can run at once: until the end comes near, always the same."""
        left_s = self.left_s(active, LAST_PARTS * BATCH_S * max(1, slots.model))
        return BatchLimits.of(left_s, slots, self._slide_s())

    def _ahead_s(self) -> float:
        """Return the seconds of the model for slides that are not begun."""
        if not self._ahead:
            return 0.0
        if not self._planned:
            return math.inf
        return self._ahead * self._slide_s()

    def _slide_s(self) -> float:
        """Return the seconds of the model for a slide, in the mean of those planned."""
        planned_s = sum(count * self._rates.seconds(stage) for stage, count in self._stages.items())
        return planned_s / self._planned if self._planned else BATCH_S


@dataclass
class Backlog:
    """The batches of a worker.

    Attributes:
        batches: seconds of work in each, by its key; the worker is at the first, as far as the client can see.
        since: when it began that one.
    """

    batches: dict[str, float] = field(default_factory=dict)
    since: float = 0.0

    def left_s(self, now: float) -> float:
        """Return the seconds of work left; a batch that takes longer than expected is taken to be nearly done."""
        if not self.batches:
            return 0.0
        first_s = next(iter(self.batches.values()))
        return sum(self.batches.values()) - min(now - self.since, first_s)


class Backlogs:
    """The work of each worker, of the batches for which one was chosen here.

    Dask chooses by all that a worker has to do, with as many threads as it has. A GPU does two batches at a time, and
    whether it runs dry does not depend on what its worker's other threads have to plan and stitch.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: dict[str, Backlog] = {}
        self._at: dict[str, str] = {}

    def soonest(self, slots: Mapping[str, int]) -> str:
        """Return the address of the worker that is free first, among some that do so many batches at once."""
        now = self._clock()
        idle = Backlog()
        return min(slots, key=lambda address: self._of.get(address, idle).left_s(now) / slots[address])

    def add(self, key: str, worker: str, seconds: float) -> None:
        """Add a batch that is sent to a worker."""
        backlog = self._of.setdefault(worker, Backlog())
        if not backlog.batches:
            backlog.since = self._clock()
        backlog.batches[key] = seconds
        self._at[key] = worker

    def remove(self, key: str) -> None:
        """Remove a batch that is done, or will not be done; of others nothing happens."""
        if (worker := self._at.pop(key, None)) is not None:
            backlog = self._of[worker]
            del backlog.batches[key]
            backlog.since = self._clock()
            if not backlog.batches:
                del self._of[worker]
