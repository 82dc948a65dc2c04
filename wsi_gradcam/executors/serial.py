"""One process, one task after the other: the reference that every other executor must agree with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from wsi_gradcam.inputs import SlideEntry
from wsi_gradcam.stages import Context, Task, examine_model, perform
from wsi_gradcam.workflow import Observer, SlideRecord, drive, slide_job

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.explainer import Explainer
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.plan import RunPlan


class SerialExecutor:
    """Runs everything in this process."""

    def __init__(self, model: Model | None = None) -> None:
        self._model = model
        self._explainer: Explainer | None = None

    def examine(self, spec: ModelSpec, *request: Any) -> ModelFacts:
        """`stages.examine_model`, here; the model stays loaded for the run."""
        self._explainer = examine_model(self._model or spec, *request)
        return self._explainer.facts

    def run(
        self, run: RunPlan, slides: Iterable[SlideEntry], overwrite: bool, observe: Observer
    ) -> Iterator[SlideRecord]:
        """The record of each slide as it is finished.

        Raises:
            FatalError: the run cannot go on.
        """
        context = Context(run, overwrite, self._explainer)

        def perform_and_tell(task: Task, then: Task | None) -> Any:
            result = perform(context, task, then)
            observe(task, result)
            return result

        try:
            for slide in slides:
                yield drive(slide_job(slide, run.settings.max_unreadable), perform_and_tell)
        finally:
            context.close()

    def close(self) -> None:
        """Nothing to release."""
