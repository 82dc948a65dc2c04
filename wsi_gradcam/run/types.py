"""The vocabulary that a run, its executors and its listeners share: stages, tasks, their results, workloads.

A workload is a kind of work on the slides of a run, such as explaining or auditing them. Executors know nothing else:
they split a workload's jobs into tasks, and perform these wherever they like.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from wsi_gradcam.results.manifest import SlideOutcome, SlideStatus
from wsi_gradcam.run.status import Part as Part

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import Choice, ModelFacts
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.mil.spec import SlideModelSpec
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.run.plan import RunPlan
    from wsi_gradcam.run.settings import Settings


class FatalError(Exception):
    """An error that concerns the whole run, such as a full disk, so that no other slide is tried."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True)
class Planned:
    """The result of planning a slide: what is left to do.

    Attributes:
        patches: of the slide.
        left: how many of them remain to be explained.
        spans: numbers of the spans that remain to be explained.
        blocks: numbers of the heatmap's blocks that remain to be made, by level.
        outcome: that of a finished slide, otherwise None.
        encode: numbers of the spans whose features remain to be computed, for slide-level models.
        aggregate: whether the slide's features remain to be aggregated, for slide-level models.
        to_encode: how many patches are in the spans of `encode`.
        given: True if the features were made elsewhere.
        pixels: False if no patch is explained down to its pixels.
    """

    patches: int
    left: int
    spans: list[int]
    blocks: list[list[int]]
    outcome: SlideOutcome | None = None
    encode: list[int] = field(default_factory=list)
    aggregate: bool = False
    to_encode: int = 0
    given: bool = False
    pixels: bool = True

    @property
    def first_spans(self) -> list[int]:
        """The spans whose pixels are read first; none if other work comes before."""
        if self.encode and self.given:
            return []
        return self.encode or (self.spans if self.pixels else [])


@dataclass(frozen=True)
class Processed:
    """The result of a task that ran the model: the number of patches, and where the time went.

    Attributes:
        patches: how many there were.
        unreadable: how many of them could not be read, if known yet.
        waited_s: seconds that the model waited for pixels.
        model_s: seconds spent in the model and on preparing its input.
        read_s: seconds that threads spent reading patches, summed over the threads.
        at_once: the most patches in a forward pass if memory did not hold a batch, otherwise 0.
        encoded: how many patches were encoded, in the first of a slide-level model's two passes.
    """

    patches: int
    unreadable: int = 0
    waited_s: float = 0.0
    model_s: float = 0.0
    read_s: float = 0.0
    at_once: int = 0
    encoded: int = 0


TaskResult = Planned | Processed | SlideOutcome | None


@dataclass(frozen=True)
class Stage:
    """A kind of task.

    Attributes:
        name: its name in logs and reports.
        function: performs a task, given the `Context` of the process, the slide and the task's numbers. It belongs to
            a module, so that it can be pickled.
        needs_model: whether it must run where the device is.
        reads_ahead: whether the function takes `upcoming`, the number of the task that comes next, if it is known.
    """

    name: str
    function: Callable[..., TaskResult]
    needs_model: bool = False
    reads_ahead: bool = False


@dataclass(frozen=True)
class Task:
    """A piece of work: a stage, a slide, and the numbers of the piece. This is all that is sent to a worker.

    Tasks of one stage never write the same file, so they may run anywhere, in any order, and again.
    """

    stage: Stage
    slide: SlideEntry
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.stage.name, *map(str, self.index)])


@dataclass(frozen=True)
class Performed:
    """An attempt at a task.

    Attributes:
        result: the stage's result; None after an error.
        seconds: wall time.
        worker: the process, as `host:process id`.
        error: why it failed, on one line; "" if it did not.
        again: whether the task is tried again after the error.
    """

    result: TaskResult
    seconds: float = 0.0
    worker: str = ""
    error: str = ""
    again: bool = False


@dataclass(frozen=True)
class SlideRecord:
    """How a slide ended: a row of slides.csv.

    Attributes:
        skipped: whether nothing was done because the slide had ended before.
        lasting: whether it failed, and the same command would fail again.
    """

    slide: SlideEntry
    status: SlideStatus
    error: str
    patches: int
    unreadable: int
    seconds: float
    skipped: bool = False
    lasting: bool = False


Phases = list[list[Task]]
SlideJob = Generator[Phases, list[TaskResult], SlideRecord]
Observer = Callable[[Task, Performed], None]  # is called after each attempt at a task


class Workload(Protocol):
    """A kind of work on the slides of a run. Picklable: each worker gets it once."""

    @property
    def name(self) -> str:
        """The command to which it belongs: explain or audit."""

    @property
    def patches(self) -> int | None:
        """The number of patches of all slides together; None if it is not known before they are planned."""

    @property
    def run(self) -> RunPlan:
        """The plan of the run whose slides these are."""

    def job(self, slide: SlideEntry) -> SlideJob:
        """Return the phases of a slide.

        It yields the tasks of one or more phases, is sent all their results, and ends with the slide's record. The
        tasks of a phase may run at once; a phase begins when the one before it is complete. An error of this slide ends
        only this job; an error of the store or the cluster is raised as `FatalError`.
        """


class Executor(Protocol):
    """Runs workloads: in this process, or on workers."""

    @property
    def dashboard(self) -> str:
        """Address of a page that shows the work; "" if there is none."""

    def examine(
        self, spec: ModelSpec | SlideModelSpec, settings: Settings, slides: Sequence[SlideEntry], choice: Choice | None
    ) -> ModelFacts:
        """Return what planning needs to know about the model; see `examine_model`."""

    def run(self, workload: Workload, slides: Iterable[SlideEntry], observe: Observer) -> Iterator[SlideRecord]:
        """Yield the record of each slide as it is finished.

        Raises:
            FatalError: the run cannot go on.
        """


class RunListener:
    """A listener that is notified of what happens in a run; its methods do nothing unless overridden."""

    def run_started(self, workload: Workload, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """The model is known and the work begins; `dashboard` is the address of a page that shows the work, or ""."""

    def part_began(self, part: Part, slides: int, patches: int | None) -> None:
        """A pass over so many slides begins, if the work takes several; `patches` is None before they are drawn."""

    def task_done(self, task: Task, performed: Performed) -> None:
        """A task has succeeded."""

    def task_failed(self, task: Task, performed: Performed) -> None:
        """An attempt at a task has failed; if it is not tried again, its slide fails."""

    def slide_done(self, record: SlideRecord) -> None:
        """A slide is finished or has failed."""

    def message(self, text: str) -> None:
        """A message for the user. It may come from another thread, and before the work begins."""
