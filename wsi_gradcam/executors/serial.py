"""One process, one task after another: the reference with which every other executor must agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import one_line
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
