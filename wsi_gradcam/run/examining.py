"""Examining a model before a run: loading it, testing it on a few patches, choosing what runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wsi_gradcam.models.environment import make_sums_deterministic
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.run.sampling import sample_patches
from wsi_gradcam.system.processes import limit_arenas

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.cam.facts import Choice
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.run.settings import Settings


def examine_model(
    model: ModelSpec | Model, settings: Settings, slides: Sequence[SlideEntry], choice: Choice | None = None
) -> Explainer:
    """Load a model, unless it is loaded, learn what planning needs of it, and choose what runs it.

    A `choice` that was made before is kept.

    Raises:
        ModelError: it cannot be loaded, no layer can be explained, or an engine cannot be had.
    """
    make_sums_deterministic()
    limit_arenas()
    from wsi_gradcam.cam.examine import MAX_CHOICE_PATCHES, Request
    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.models.load import load_model

    def patches(model: Model) -> NDArray[np.uint8] | None:
        mpp = settings.patch_mpp or model.mpp
        return (
            None
            if mpp is None
            else sample_patches(slides, settings, model.patch_px, mpp, MAX_CHOICE_PATCHES, model.stain)
        )

    request = Request(settings.layer, settings.method, settings.engine, settings.precision, settings.batch_size, choice)
    loaded = load_model(model, settings.device) if isinstance(model, ModelSpec) else model
    return Explainer.examine(loaded, request, patches)
