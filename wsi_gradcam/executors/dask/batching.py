"""Limits on the number and size of batches in flight, and the choice of the worker that gets the next one.

There are a few batches in flight for each that can run at once and, towards the end of a run, fewer and smaller ones,
so that all workers finish together. The first half of the module is about a running slide: its tasks, divided into
batches, and the trials of tasks on which workers died.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any

from wsi_gradcam.executors.dask.workers import Pools
from wsi_gradcam.run.types import Phases, SlideJob, SlideRecord, Stage, Task, TaskResult
from wsi_gradcam.run.workload import COARSEN, FINISH, PLAN, STITCH

LOG = logging.getLogger("wsi_gradcam")
# A batch costs the scheduler, the client and the network about 2 ms in all, and a GPU the reading of its first patches,
# about 30 ms: a hundredth of this. Small tasks, such as spans on a GPU (0.2 s) or blocks of coarse levels, travel
# together.
BATCH_S = 3.0
MAX_TASKS = 64  # tasks in a batch: about 3 kB
WEIGHT = 0.2  # weight of the newest
LEAST_S = 0.2  # less is not worth sending, even if workers are waiting
# Until one is done; the time for a span, which takes a hundred times longer on some devices than on others, is not
# guessed.
GUESSED_S = {STITCH.name: 0.2, COARSEN.name: 0.1, FINISH.name: 0.5}


class Rates:
    """The seconds that a task of a stage takes, learned from finished tasks."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def learn(self, stage: Stage, seconds: float) -> None:
        """Learn from a finished task."""
        known = self._seconds.get(stage.name, seconds)
        self._seconds[stage.name] = known + WEIGHT * (seconds - known)

    def seconds(self, stage: Stage) -> float:
        """Return the seconds that a task is expected to take."""
        return self._seconds.get(stage.name, GUESSED_S.get(stage.name, BATCH_S))

    def of(self, tasks: Iterable[Task]) -> float:
        """Return the seconds that tasks are expected to take, one after another."""
        return sum(self.seconds(task.stage) for task in tasks)


MODEL, PLANNING, OTHER, ALONE = "model", "plan", "other", "alone"  # kinds of batches that are counted separately


@dataclass
class RunningSlide:
    """A slide's job and its progress.

    Attributes:
        number: the slide's number in its run.
        phases: waiting tasks, with their positions among `results`, by phase.
        out: the number of tasks in flight.
        open: whether tasks of the first phase may be sent now.
        batches: the number of batches made so far.
        planned: whether the slide has been planned.
        error: the first error of its tasks.
    """

    job: SlideJob
    number: int
    phases: deque[deque[tuple[int, Task]]] = field(default_factory=deque)
    results: list[TaskResult] = field(default_factory=list)
    out: int = 0
    open: bool = True
    batches: int = 0
    planned: bool = False
    error: BaseException | None = None

    def begin(self) -> SlideRecord | None:
        """Begin the job; returns as `advance` does."""
        return self._set(lambda: next(self.job))

    def advance(self) -> SlideRecord | None:
        """Send the job the results of its tasks once none is left; return the record if that was its end."""
        if self.error is not None:
            error, self.error = self.error, None
            return self._set(lambda: self.job.throw(error))
        return self._set(lambda: self.job.send(self.results))

    def _set(self, proceed: Callable[[], Phases]) -> SlideRecord | None:
        try:
            phases = proceed()
        except StopIteration as end:
            record: SlideRecord = end.value
            return record
        positions = iter(range(sum(map(len, phases))))
        self.phases = deque(deque((next(positions), task) for task in phase) for phase in phases if phase)
        self.results = [None] * sum(map(len, self.phases))
        self.open = True
        return None

    @property
    def next_stage(self) -> Stage | None:
        """The stage of the tasks that may be sent now; None if there are none."""
        return self.phases[0][0][1].stage if self.open and self.phases else None

    @property
    def waiting_for_model(self) -> int:
        """The number of tasks that wait for the model."""
        return len(self.phases[0]) if self.next_stage is not None and self.next_stage.needs_model else 0

    def next_batch(self, rates: Rates, budget_s: float) -> SentBatch:
        """Return a batch of the next tasks, one or more, that take about `budget_s`.

        If they complete their phase, tasks of the next one may follow, provided that they are for the same kind of
        worker.
        """
        taken: list[tuple[int, Task]] = []
        first, is_complete, left_s = self.phases[0], not self.out, budget_s
        while self.phases and len(taken) < MAX_TASKS:
            phase = self.phases[0]
            stage = phase[0][1].stage
            if phase is not first and (not is_complete or stage.needs_model != taken[0][1].stage.needs_model):
                break
            if taken and left_s < rates.seconds(stage):
                break
            taken.append(phase.popleft())
            left_s -= rates.seconds(stage)
            if not phase:
                self.phases.popleft()
        self.open = bool(self.phases) and self.phases[0] is first
        self.out += len(taken)
        self.batches += 1
        positions, tasks = zip(*taken, strict=True)
        return SentBatch(self, positions, tasks, self.batches)

    def returned(self, count: int) -> None:
        """Count tasks as no longer in flight."""
        self.out -= count
        if not self.out:
            self.open = True

    def fail(self, error: BaseException) -> None:
        """Send nothing more; the job gets the error when no task is in flight."""
        self.error = self.error or error
        self.phases.clear()

    @property
    def ended(self) -> bool:
        """True when no task waits or is in flight."""
        return not self.phases and not self.out


@dataclass(frozen=True)
class SentBatch:
    """Tasks of a slide in flight, or waiting to be sent again.

    Attributes:
        positions: positions of the tasks' results among the slide's.
        number: the batch's number among the slide's.
        attempt: how often they failed for a transient reason.
        alone: whether they run alone in their process now, because workers died while they were in flight.
        trials: how often they were sent to run alone.
        begun: how often a worker has begun them alone, and died.
        avoid: address of a worker that could not do them.
    """

    running: RunningSlide
    positions: tuple[int, ...]
    tasks: tuple[Task, ...]
    number: int
    attempt: int = 0
    alone: bool = False
    trials: int = 0
    begun: int = 0
    avoid: str = ""

    @property
    def needs_model(self) -> bool:
        """True where the tasks run on the run's device."""
        return self.tasks[0].stage.needs_model

    @property
    def kind(self) -> str:
        """The kind of batch that it is counted as."""
        return ALONE if self.alone else kind_of(self.tasks[0].stage)

    def rest(self, done: int, **changes: Any) -> SentBatch:
        """Return the rest of the batch after its first tasks, under a new number."""
        self.running.batches += 1
        changes["number"] = self.running.batches
        return replace(self, positions=self.positions[done:], tasks=self.tasks[done:], **changes)

    def singly(self) -> list[SentBatch]:
        """Return a batch for each task, to run alone; tasks that depend on each other stay together."""
        if not self.needs_model:
            return [self.rest(0, alone=True)]
        pairs = enumerate(zip(self.positions, self.tasks, strict=True))
        return [replace(self.rest(i, alone=True), positions=(at,), tasks=(task,)) for i, (at, task) in pairs]


def kind_of(stage: Stage) -> str:
    """Return the kind of batch as which tasks of a stage are counted: each kind has its own limits."""
    return MODEL if stage.needs_model else PLANNING if stage == PLAN else OTHER


# A task that was begun alone in its process this often, with the process dying each time, is what killed it.
DEATHS_ALONE = 2
MAX_TRIALS = 4  # trials of a task whose workers always die before it begins


class CrashTrials:
    """Batches on which workers died; they are retried with each task alone.

    Dask blames all tasks of a worker that dies. A task that is blamed too often is run again with nothing else of the
    run active in its process: if workers die of that too, it is the culprit. Only a few run alone at once.

    Attributes:
        waiting: batches that are not sent yet.
        lost: why the GPU of the last worker that held a batch failed, by the batch's key.
    """

    def __init__(self) -> None:
        self.waiting: deque[SentBatch] = deque()
        self.lost: dict[str, str] = {}
        self._begun: Counter[str] = Counter()

    def record(self, event: tuple[float, Any]) -> None:
        """Count a batch that a worker has begun alone, or note that a worker's GPU has failed."""
        told = event[1]
        if "lost" in told:
            self.lost[told["lost"]] = told["cause"]
            LOG.warning("the GPU of worker %s has failed, so that process ends: %s", told["worker"], told["cause"])
        else:
            self._begun[told["alone"]] += 1

    def is_culprit(self, sent: SentBatch, key: str) -> bool:
        """Return whether a batch on which workers died is the cause; otherwise it gets another trial."""
        begun = sent.begun + self._begun.pop(key, 0)
        if sent.alone and (begun >= DEATHS_ALONE or sent.trials >= MAX_TRIALS):
            return True
        again = [sent.rest(0)] if sent.alone else sent.singly()
        self.waiting += [replace(trial, trials=sent.trials + 1, begun=begun) for trial in again]
        return False


# Batches in flight for each that can run at once. Dask's adaptive clusters grow to (seconds of work known to the
# scheduler) / 5 s: 4 batches of 3 s ask for more than twice the present number of workers, until there are enough; and
# each has 12 s of work left while a slide is planned.
BATCHES_PER_SLOT = 4
# And slides are planned so far ahead of the model that it does not have to wait when many small ones follow each other
# while the planning workers are busy with other work, which nothing interrupts: finishing a slide takes most of a
# second.
PLANNED_S = BATCH_S
MOST_AHEAD = 64  # slides for each that can run the model
# Workers should finish together: a batch for the model is at most one of so many parts of the work left for each, and
# when that is less than one batch, fewer are in flight. Other batches of a slide follow one another: smaller ones would
# only wait.
LAST_PER_SLOT, LAST_PARTS, LAST_PARTS_OTHER = 2, 8, 2


@dataclass(frozen=True)
class BatchLimits:
    """The most that may be in flight.

    Attributes:
        batches: number of batches.
        seconds: seconds of work in each.
        ahead: slides are planned as long as fewer batches for the model than this are in flight or waiting as spans.
    """

    batches: Pools[int]
    seconds: Pools[float]
    ahead: int

    @classmethod
    def of(cls, left_s: Pools[float], slots: Pools[int], slide_s: float = BATCH_S) -> BatchLimits:
        """Return the limits for the seconds of work left in all, and the number of batches that can run at once.

        `slide_s` is the model's time for a slide, in seconds.
        """
        model_slots, other_slots = max(1, slots.model), max(1, slots.other)
        model_s, other_s = left_s.model / model_slots, left_s.other / other_slots
        few = LAST_PER_SLOT if model_s < BATCH_S else BATCHES_PER_SLOT
        return cls(
            Pools(few * model_slots, BATCHES_PER_SLOT * other_slots),
            Pools(_batch_s(model_s / LAST_PARTS), _batch_s(other_s / LAST_PARTS_OTHER)),
            model_slots * max(BATCHES_PER_SLOT, min(MOST_AHEAD, math.ceil(PLANNED_S / max(slide_s, 1e-3)))),
        )


def _batch_s(seconds: float) -> float:
    return min(BATCH_S, max(LEAST_S, seconds))


class RemainingWork:
    """The remaining work: of planned slides, and of the others, if their number is known."""

    def __init__(self, rates: Rates, slides: Iterable[object]) -> None:
        self._rates = rates
        self._ahead = len(slides) if isinstance(slides, Sized) else math.inf
        self._planned = 0
        self._stages: Counter[Stage] = Counter()  # the model's tasks in slides that were planned
        self._out: Counter[Stage] = Counter()  # tasks in flight

    def slide_begun(self) -> None:
        """Count a slide as begun."""
        self._ahead = max(0, self._ahead - 1)

    def no_more_slides(self) -> None:
        """Record that there are no more slides to begin."""
        self._ahead = 0

    def slide_planned(self, running: RunningSlide) -> None:
        """Count the tasks of a planned slide; slides not yet planned are taken to be like their mean."""
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
        """Return the seconds of work left; infinite if unknown, or more than enough for the model."""
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
        """Return the limits for this many batches that can run at once: always the same until the end is near."""
        left_s = self.left_s(active, LAST_PARTS * BATCH_S * max(1, slots.model))
        return BatchLimits.of(left_s, slots, self._slide_s())

    def _ahead_s(self) -> float:
        """Return the model's time for slides that have not begun, in seconds."""
        if not self._ahead:
            return 0.0
        if not self._planned:
            return math.inf
        return self._ahead * self._slide_s()

    def _slide_s(self) -> float:
        """Return the model's mean time for a planned slide, in seconds."""
        planned_s = sum(count * self._rates.seconds(stage) for stage, count in self._stages.items())
        return planned_s / self._planned if self._planned else BATCH_S


@dataclass
class Backlog:
    """The batches of a worker.

    Attributes:
        batches: seconds of work in each, by its key; the worker is on the first one, as far as the client can see.
        since: when it began that one.
    """

    batches: dict[str, float] = field(default_factory=dict)
    since: float = 0.0

    def left_s(self, now: float) -> float:
        """Return the seconds of work left; a batch that takes longer than expected counts as nearly done."""
        if not self.batches:
            return 0.0
        first_s = next(iter(self.batches.values()))
        return sum(self.batches.values()) - min(now - self.since, first_s)


class Backlogs:
    """The work of each worker, in batches for which a worker was chosen here.

    Dask chooses by everything that a worker has to do, with as many threads as it has. A GPU does a few batches at a
    time, and whether it runs dry does not depend on what its worker's other threads have to plan and stitch.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: dict[str, Backlog] = {}
        self._at: dict[str, str] = {}

    def soonest(self, slots: Mapping[str, int]) -> str:
        """Return the address of the worker that will be free first, among those given with their batches at once."""
        now = self._clock()
        idle = Backlog()
        return min(slots, key=lambda address: self._of.get(address, idle).left_s(now) / slots[address])

    def add(self, key: str, worker: str, seconds: float) -> None:
        """Add a batch that was sent to a worker."""
        backlog = self._of.setdefault(worker, Backlog())
        if not backlog.batches:
            backlog.since = self._clock()
        backlog.batches[key] = seconds
        self._at[key] = worker

    def remove(self, key: str) -> None:
        """Remove a batch that is done, or will not be done; unknown ones are ignored."""
        if (worker := self._at.pop(key, None)) is not None:
            backlog = self._of[worker]
            del backlog.batches[key]
            backlog.since = self._clock()
            if not backlog.batches:
                del self._of[worker]
