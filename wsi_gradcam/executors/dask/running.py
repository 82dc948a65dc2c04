"""A slide's job at work on Dask: its phases, cut into orders for workers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from wsi_gradcam.executors.dask.rates import MOST, Rates
from wsi_gradcam.run.types import SlideJob, SlideRecord, Stage, Task, TaskResult
from wsi_gradcam.run.workload import PLAN

MODEL = "model"  # what stages that want the run's device are counted as


@dataclass
class Running:
    """A slide's job and how far it is.

    Attributes:
        number: of the slide in its run.
        phases: tasks that wait, with their positions among `results`, by phase.
        out: how many tasks are on their way.
        open: whether tasks of the first phase may be sent now.
        orders: how many were made.
        planned: whether it is known what there is to do.
    """

    job: SlideJob
    number: int
    phases: deque[deque[tuple[int, Task]]] = field(default_factory=deque)
    results: list[TaskResult] = field(default_factory=list)
    out: int = 0
    open: bool = True
    orders: int = 0
    planned: bool = False
    error: BaseException | None = None

    def begin(self) -> SlideRecord | None:
        """Make the job begin; as `advance`."""
        return self._set(lambda: next(self.job))

    def advance(self) -> SlideRecord | None:
        """Tell the job what came of its tasks, once none is left; the record if that was the end."""
        if self.error is not None:
            error, self.error = self.error, None
            return self._set(lambda: self.job.throw(error))
        return self._set(lambda: self.job.send(self.results))

    def _set(self, proceed: Any) -> SlideRecord | None:
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
    def waits_for(self) -> Stage | None:
        """The stage of the tasks that may be sent now; None where none may."""
        return self.phases[0][0][1].stage if self.open and self.phases else None

    @property
    def spans(self) -> int:
        """How many spans wait."""
        return len(self.phases[0]) if self.waits_for is not None and self.waits_for.needs_model else 0

    def take(self, rates: Rates, budget_s: float) -> Sent:
        """The next tasks, one or more, that take about `budget_s`.

        What is whole with them may be followed by tasks of the next phase, where it is for the same kind of worker.
        """
        taken: list[tuple[int, Task]] = []
        first, whole, left_s = self.phases[0], not self.out, budget_s
        while self.phases and len(taken) < MOST:
            phase = self.phases[0]
            stage = phase[0][1].stage
            if phase is not first and (not whole or stage.needs_model != taken[0][1].stage.needs_model):
                break
            if taken and left_s < rates.seconds(stage):
                break
            taken.append(phase.popleft())
            left_s -= rates.seconds(stage)
            if not phase:
                self.phases.popleft()
        self.open = bool(self.phases) and self.phases[0] is first
        self.out += len(taken)
        self.orders += 1
        positions, tasks = zip(*taken, strict=True)
        return Sent(self, positions, tasks, self.orders)

    def came_back(self, count: int) -> None:
        """Tasks are no longer on their way."""
        self.out -= count
        if not self.out:
            self.open = True

    def fail(self, error: BaseException) -> None:
        """Send nothing more; the job is told when all that is out has come back."""
        self.error = self.error or error
        self.phases.clear()

    @property
    def ended(self) -> bool:
        """Whether nothing waits and nothing is out."""
        return not self.phases and not self.out


@dataclass(frozen=True)
class Sent:
    """Tasks of a slide on their way, or waiting to be sent again.

    Attributes:
        positions: of the tasks' results in the slide's.
        order: number of the order among the slide's.
        attempt: how often they failed for a reason that may pass.
        alone: they were there when workers died, and are at work by themselves now.
        trials: how often they were sent so.
        begun: how often a worker has begun them so, and died.
        avoid: address of a worker that could not do them.
    """

    running: Running
    positions: tuple[int, ...]
    tasks: tuple[Task, ...]
    order: int
    attempt: int = 0
    alone: bool = False
    trials: int = 0
    begun: int = 0
    avoid: str = ""

    @property
    def model(self) -> bool:
        """Whether they want the run's device."""
        return self.tasks[0].stage.needs_model

    @property
    def kind(self) -> str:
        """What is counted together."""
        return "alone" if self.alone else kind_of(self.tasks[0].stage)

    def rest(self, done: int, **changes: Any) -> Sent:
        """What is left of it after the first tasks, under a new number."""
        self.running.orders += 1
        changes["order"] = self.running.orders
        return replace(self, positions=self.positions[done:], tasks=self.tasks[done:], **changes)

    def singly(self) -> list[Sent]:
        """Its tasks, each to be alone, so that the one that kills is known; what builds on others stays together."""
        if not self.model:
            return [self.rest(0, alone=True)]
        pairs = enumerate(zip(self.positions, self.tasks, strict=True))
        return [replace(self.rest(i, alone=True), positions=(at,), tasks=(task,)) for i, (at, task) in pairs]


def kind_of(stage: Stage) -> str:
    """What stages are counted together: those of other workers than the model's have a window of their own."""
    return MODEL if stage.needs_model else "plan" if stage == PLAN else "other"
