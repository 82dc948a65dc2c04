"""One process, one task after the other: the reference that every other executor must agree with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import one_line
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.run.jobs import Job, Observer, SlideRecord, drive, slide_job
from wsi_gradcam.run.retries import retried
from wsi_gradcam.run.stages import Context, Performed, Task, examine_model, perform, read_ahead
from wsi_gradcam.system.isolation import WATCH
from wsi_gradcam.system.stopping import STOP

if TYPE_CHECKING:
    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.run.plan import RunPlan


class SerialExecutor:
    """Runs everything in this process; while the model works, the next slide is planned in a thread."""

    def __init__(self, model: Model | None = None) -> None:
        self._model = model
        self._explainer: Explainer | None = None

    def examine(self, spec: ModelSpec, *request: Any) -> ModelFacts:
        """`stages.examine_model`, here; the model stays loaded for the run."""
        self._explainer = examine_model(self._model or spec, *request)
        return self._explainer.facts

    def run(
        self, run: RunPlan, slides: Iterable[SlideEntry], overwrite: bool, observe: Observer, job: Job | None = None
    ) -> Iterator[SlideRecord]:
        """The record of each slide as it is finished; a `job` other than explaining may be given.

        Raises:
            FatalError: the run cannot go on.
        """
        job = job or partial(slide_job, max_unreadable=run.settings.max_unreadable)
        context = Context(run, overwrite, self._explainer)
        ahead = _Ahead(context, slides)

        def perform_and_tell(task: Task, then: Task | None) -> Any:
            STOP.check()
            if task.stage == "explain":
                ahead.plan_next()
            planning = task.stage == "plan"

            def tell_of(error: Exception, again: bool) -> None:
                observe(task, Performed(None, worker=context.worker, error=one_line(error), again=again))

            try:
                performed = retried(
                    lambda: ahead.planned(task) if planning else perform(context, task, then), task, tell_of
                )
            except Exception as error:
                tell_of(error, again=False)
                raise
            observe(task, performed)
            return performed.result

        try:
            with STOP.heeded():
                for slide in ahead:
                    yield drive(job(slide), perform_and_tell)
                    WATCH.finished(slide.path)
        finally:
            ahead.close()
            context.close()

    def close(self) -> None:
        """Nothing to release."""


class _Ahead:
    """The slides; while one is worked on, the next is planned and its first patches are read, in a thread."""

    def __init__(self, context: Context, slides: Iterable[SlideEntry]) -> None:
        self._context = context
        self._slides = iter(slides)
        self._next: SlideEntry | None = None
        self._plan: Future[Performed] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="plan")

    def __iter__(self) -> Iterator[SlideEntry]:
        while (slide := self._following()) is not None:
            self._next = None
            yield slide

    def plan_next(self) -> None:
        """Begin to plan the next slide, unless that was done."""
        if self._plan is None and not WATCH.one_at_a_time and (slide := self._following()) is not None:
            self._plan = self._pool.submit(self._prepare, slide)

    def planned(self, task: Task) -> Performed:
        """The result of planning a slide, ahead of its turn or now."""
        plan, self._plan = self._plan, None
        return perform(self._context, task) if plan is None else plan.result()

    def close(self) -> None:
        """Wait until nothing is planned any more."""
        self._pool.shutdown(cancel_futures=True)

    def _prepare(self, slide: SlideEntry) -> Performed:
        """Plan a slide and begin to read it; what comes of that is kept for its turn."""
        performed = perform(self._context, Task("plan", slide))
        if spans := performed.result.spans:
            read_ahead(self._context, slide, spans[0])
        return performed

    def _following(self) -> SlideEntry | None:
        if self._next is None:
            self._next = next(self._slides, None)
        return self._next
