"""The words that a run, its executors and its listeners share: stages, tasks, their results, workloads.

A workload is a kind of work on the slides of a run, such as explaining or auditing them. Executors know nothing else:
they take a workload's jobs apart into tasks, and perform these wherever they like.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from wsi_gradcam.results.manifest import SlideOutcome, SlideStatus

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import Choice, ModelFacts
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.mil.spec import SlideModelSpec
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.run.plan import RunPlan
    from wsi_gradcam.run.settings import Settings


class FatalError(Exception):
    """Wraps an error that concerns the whole run, such as a full disk: no other slide is tried."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True)
class Planned:
    """The result of planning a slide: what is left to do.

    Attributes:
        patches: of the slide.
        left: how many of them are to be explained.
        spans: numbers of the spans that are to be explained.
        blocks: numbers of the heatmap's blocks that are to be made, by level.
        outcome: of a slide that is finished; None of others.
        encode: numbers of the spans whose features are to be made, of slide-level models.
        aggregate: whether the slide's features are to be aggregated, of slide-level models.
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
        """The spans whose pixels are read first; none where other work comes before."""
        if self.encode and self.given:
            return []
        return self.encode or (self.spans if self.pixels else [])


@dataclass(frozen=True)
class Processed:
    """The result of a task that ran the model: how many patches it took, and where the time went.

    Attributes:
        patches: how many there were.
        unreadable: how many of them could not be read, where that is known yet.
        waited_s: seconds that the model waited for pixels.
        model_s: seconds of the model, and of preparing its input.
        read_s: seconds that threads spent reading patches, summed over the threads.
        at_once: the most patches of a forward pass, where memory did not hold a batch; 0 where it did.
        encoded: how many patches features were made of, in the first of a slide-level model's two passes.
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
        name: as logs and reports call it.
        function: performs a task, given the `Context` of the process, the slide and the task's numbers. It belongs to
            a module, so that it can be pickled.
        needs_model: whether it runs on the run's device.
        reads_ahead: whether the function takes `upcoming`, the number of the task that comes next, if it is known.
    """

    name: str
    function: Callable[..., TaskResult]
    needs_model: bool = False
    reads_ahead: bool = False


@dataclass(frozen=True)
class Task:
    """A piece of work: a stage, a slide, and the numbers of the piece. All that travels to a worker.

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
        result: of the stage; None after an error.
        seconds: wall time.
        worker: the process, as `host:process id`.
        error: why it failed, on one line; "" where it did not.
        again: whether the task is tried once more after the error.
    """

    result: TaskResult
    seconds: float = 0.0
    worker: str = ""
    error: str = ""
    again: bool = False


@dataclass(frozen=True)
class SlideRecord:
    """The end of a slide: a row of slides.csv.

    Attributes:
        skipped: nothing was done, it had ended before.
        lasting: it has failed, and the same command would fail again.
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
        """The command that asks for it: explain or audit."""

    @property
    def patches(self) -> int | None:
        """The number of patches of all slides together; None where it is not known before they are planned."""

    @property
    def run(self) -> RunPlan:
        """The plan of the run whose slides these are."""

    def job(self, slide: SlideEntry) -> SlideJob:
        """Return the phases of a slide.

        It yields the tasks of one or more phases, is sent all their results, and ends with the slide's record. All
        tasks of a phase may run at once; a phase begins when the one before it is complete. An error of this slide
        ends this job alone; an error of the store or of the cluster is raised as `FatalError`.
        """


class Executor(Protocol):
    """Runs workloads: in this process, or on workers."""

    @property
    def dashboard(self) -> str:
        """Address of a page that shows the work; "" where there is none."""

    def examine(
        self, spec: ModelSpec | SlideModelSpec, settings: Settings, slides: Sequence[SlideEntry], choice: Choice | None
    ) -> ModelFacts:
        """Return what planning must know of the model; see `examine_model`."""

    def run(self, workload: Workload, slides: Iterable[SlideEntry], observe: Observer) -> Iterator[SlideRecord]:
        """Yield the record of each slide as it is finished.

        Raises:
            FatalError: the run cannot go on.
        """


class RunListener:
    """Is told what happens in a run; the methods do nothing unless they are overridden."""

    def run_started(self, workload: Workload, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """The model is known and the work begins; `dashboard` is the address of a page that shows it, or ""."""

    def task_done(self, task: Task, performed: Performed) -> None:
        """A task has succeeded."""

    def task_failed(self, task: Task, performed: Performed) -> None:
        """An attempt at a task has failed; where it is not made again, its slide fails."""

    def slide_done(self, record: SlideRecord) -> None:
        """A slide is finished or has failed."""

    def message(self, text: str) -> None:
        """Something is worth a line. It may come from another thread, and before the work begins."""
