"""The pieces of work: each reads its input from disk, writes its output, and records that it is done.

A piece is named by a stage, a slide and numbers; no pixels travel (P1). Pieces of one stage never write the same
file (P3), so they run anywhere, in any order, and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from wsi_gradcam.models.environment import steady_sums
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.results.manifest import Manifest, SlideOutcome
from wsi_gradcam.run.context import RUN_MODEL, Audited, Context, Explained, Performed, Task
from wsi_gradcam.run.sampling import sample_patches
from wsi_gradcam.run.stages.auditing import audit_piece, audit_spread
from wsi_gradcam.run.stages.explaining import explain_span, read_ahead
from wsi_gradcam.run.stages.finishing import finish_slide
from wsi_gradcam.run.stages.planning import Pending, plan_slide
from wsi_gradcam.run.stages.stitching import channels, coarsen_block, stitch_block
from wsi_gradcam.system.memory import give_back, share_arenas

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.cam.facts import Choice
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.run.settings import Settings

__all__ = [
    "RUN_MODEL",
    "Audited",
    "Context",
    "Explained",
    "Pending",
    "Performed",
    "Task",
    "audit_piece",
    "coarsen_block",
    "examine_model",
    "explain_span",
    "finish",
    "perform",
    "plan_slide",
    "read_ahead",
    "stitch_block",
]


def examine_model(
    model: ModelSpec | Model, settings: Settings, slides: Sequence[SlideEntry], choice: Choice | None = None
) -> Explainer:
    """Learn of a model, loaded here unless it is, what planning needs, and choose what runs it.

    A `choice` that was made before is kept.

    Raises:
        ModelError: it cannot be loaded, no layer can be explained, or an engine cannot be had.
    """
    steady_sums()
    share_arenas()
    from wsi_gradcam.cam.examine import MOST_FOR_CHOICE, Request
    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.models.load import load_model

    def patches(model: Model) -> NDArray[np.uint8] | None:
        mpp = settings.patch_mpp or model.mpp
        return (
            None if mpp is None else sample_patches(slides, settings, model.patch_px, mpp, MOST_FOR_CHOICE, model.stain)
        )

    request = Request(settings.layer, settings.method, settings.engine, settings.precision, settings.batch_size, choice)
    loaded = load_model(model, settings.device) if isinstance(model, ModelSpec) else model
    return Explainer.examine(loaded, request, patches)


def finish(context: Context, entry: SlideEntry) -> SlideOutcome:
    """Make the slide's table, overview and final record; returns what must be known of that.

    A cluster may ask twice, when the worker that did it dies before it tells: the record stays as it is.
    """
    folder = context.folder(entry)
    manifest = Manifest(folder.manifest)
    if (done := manifest.done()) is not None:
        manifest.fold()
        return done.outcome
    with context.slide(entry) as slide:
        return finish_slide(context.run, context.plan(entry), folder, slide, channels(context.run))


STAGES: dict[str, Callable[..., Any]] = {
    "plan": plan_slide,
    "explain": explain_span,
    "stitch": stitch_block,
    "coarsen": coarsen_block,
    "finish": finish,
    "audit": audit_piece,
    "spread": audit_spread,
}


def perform(context: Context, task: Task, then: Task | None = None) -> Performed:
    """Do a piece of work and say what came of it; where it is known what follows, that may be prepared."""
    started = time.perf_counter()
    following = {"following": then.index[0]} if then and task.stage == then.stage == "explain" else {}
    try:
        result = STAGES[task.stage](context, task.slide, *task.index, **following)
    finally:
        give_back()
    return Performed(result, time.perf_counter() - started, context.worker)
