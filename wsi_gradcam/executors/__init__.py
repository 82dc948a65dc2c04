"""Executors run the workloads of a run: `SerialExecutor` is the reference, and `dask` does the same in many processes.

They know the room `run` and those below it; `audit` and `api` give them workloads. The reference is one process that
performs one task after the other: every other executor must agree with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ConfigError, from_extra, one_line
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.run.context import Context, perform
from wsi_gradcam.run.examining import examine_for_run
from wsi_gradcam.run.failures import retried
from wsi_gradcam.run.stages import read_ahead
from wsi_gradcam.run.types import Observer, Performed, Planned, SlideRecord, Task, TaskResult, Workload
from wsi_gradcam.run.workload import ENCODE, EXPLAIN, IMPORT, PLAN, perform_job
from wsi_gradcam.system.isolation import CRASHES, STOP

if TYPE_CHECKING:
    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.cam.facts import Choice, ModelFacts
    from wsi_gradcam.mil.spec import SlideModelSpec
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.run.examining import Blind
    from wsi_gradcam.run.plan import RunPlan
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.run.types import Executor


def check_workers(workers: int | None, scheduler: str | None) -> None:
    """Refuse fewer than one worker, and workers in two places.

    Raises:
        ConfigError: fewer than one worker, or both are given.
    """
    if workers is not None and scheduler is not None:
        raise ConfigError("workers and scheduler are both given; give only one")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}, expected 1 or more; omit it to run in this process")


@contextmanager
def open_executor(
    workers: int | None, scheduler: str | None, settings: Settings, loaded: Model | None, wait_s: float | None
) -> Iterator[Executor]:
    """Open an executor, as a context: this process, worker processes on this machine, or a cluster.

    Args:
        workers: how many processes to start on this machine; None: none, but one for a GPU ("cuda").
        scheduler: address of a Dask scheduler; None: none.
        settings: the run's settings, which say where the model runs and with how many threads.
        loaded: a model that is loaded in this process.
        wait_s: how long to wait for missing workers.

    Raises:
        ConfigError: two places are given, or a loaded model would have to run in another process.
        MissingExtraError: Dask is not installed.
        WorkerError: no scheduler answers, or no worker appears.
    """
    check_workers(workers, scheduler)
    if loaded is not None and (workers, scheduler) != (None, None):
        raise ConfigError(
            f"{loaded.name}: a loaded model exists only in this process; for workers, give what they can load "
            "themselves, such as a file from torch.export.save, or module:function"
        )
    if settings.device == "cuda" and loaded is None and scheduler is None:
        workers = workers or 1  # in this process planning and stitching would keep the GPU waiting
    if workers is None and scheduler is None:
        if settings.torch_threads:
            import torch

            torch.set_num_threads(settings.torch_threads)
        yield SerialExecutor(loaded)
    else:
        with from_extra("cluster", "running in other processes (--workers, --scheduler, --device cuda)"):
            from wsi_gradcam.executors.dask import DaskExecutor

        executor = DaskExecutor(workers, scheduler, settings.torch_threads, settings.device, wait_s)
        try:
            yield executor
        finally:
            executor.close()


class SerialExecutor:
    """Run everything in this process; while the model works, a thread plans the next slide."""

    dashboard = ""

    def __init__(self, model: Model | None = None) -> None:
        self._model = model
        self._explainer: Explainer | Blind | None = None

    def examine(
        self,
        spec: ModelSpec | SlideModelSpec,
        settings: Settings,
        slides: Sequence[SlideEntry],
        choice: Choice | None = None,
    ) -> ModelFacts:
        """Return what `examine_for_run` finds out about the model, which stays loaded for the run."""
        self._explainer = examine_for_run(self._model or spec, settings, slides, choice)
        return self._explainer.facts

    def rate(self, run: RunPlan) -> float:
        """Return the patches per second that the model explains in this process; call `examine` first."""
        assert self._explainer is not None
        return self._explainer.rate(run.targets, run.settings.methods)

    def run(self, workload: Workload, slides: Iterable[SlideEntry], observe: Observer) -> Iterator[SlideRecord]:
        """Yield the record of each slide as it is finished.

        Raises:
            FatalError: the run cannot go on.
        """
        context = Context(workload, self._explainer)
        ahead = _LookAhead(context, slides)

        def perform_observed(task: Task, upcoming: Task | None) -> TaskResult:
            STOP.check()
            if task.stage in (EXPLAIN, ENCODE, IMPORT):
                ahead.plan_next()

            def attempt() -> Performed:
                return ahead.planned(task) if task.stage == PLAN else perform(context, task, upcoming)

            def failed(error: Exception, again: bool) -> None:
                observe(task, Performed(None, worker=context.worker, error=one_line(error), again=again))

            try:
                performed = retried(attempt, task, failed)
            except Exception as error:
                failed(error, again=False)
                raise
            observe(task, performed)
            return performed.result

        try:
            with STOP.graceful():
                for slide in ahead:
                    yield perform_job(workload.job(slide), perform_observed)
                    CRASHES.finished(slide.path)
        finally:
            ahead.close()
            context.close()


class _LookAhead:
    """The slides; while one is explained, the next is planned and its first patches are read, in a thread."""

    def __init__(self, context: Context[Any], slides: Iterable[SlideEntry]) -> None:
        self._context = context
        self._slides = iter(slides)
        self._next: SlideEntry | None = None
        self._plan: Future[Performed] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="plan")

    def __iter__(self) -> Iterator[SlideEntry]:
        while (slide := self._peek()) is not None:
            self._next = None
            yield slide

    def plan_next(self) -> None:
        """Begin to plan the next slide, unless that has begun."""
        if self._plan is None and not CRASHES.one_at_a_time and (slide := self._peek()) is not None:
            self._plan = self._pool.submit(self._prepare, slide)

    def planned(self, task: Task) -> Performed:
        """Return the result of planning a slide, which began ahead of its turn or is done now."""
        plan, self._plan = self._plan, None
        return perform(self._context, task) if plan is None else plan.result()

    def close(self) -> None:
        """Wait until no slide is being planned."""
        self._pool.shutdown(cancel_futures=True)

    def _prepare(self, slide: SlideEntry) -> Performed:
        """Plan a slide and begin to read it; an error is raised when the slide's turn has come."""
        performed = perform(self._context, Task(PLAN, slide))
        if isinstance(performed.result, Planned) and (spans := performed.result.first_spans):
            read_ahead(self._context, slide, spans[0])
        return performed

    def _peek(self) -> SlideEntry | None:
        if self._next is None:
            self._next = next(self._slides, None)
        return self._next
