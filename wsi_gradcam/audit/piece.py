"""A piece of an audit: read its patches, ask all questions, keep the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wsi_gradcam.audit.asked import Asked, explained_classes
from wsi_gradcam.audit.asking_maps import faithfulness, sanity, stability
from wsi_gradcam.audit.asking_model import glass, locality, plausibility, saturated, shortcuts
from wsi_gradcam.audit.measured import REMOVED_FRACTIONS
from wsi_gradcam.audit.measures.faithfulness import slide_removal
from wsi_gradcam.audit.measures.subject import Subject
from wsi_gradcam.audit.plan import PIECE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.folder import Numbers
    from wsi_gradcam.audit.patch_data import PatchData
    from wsi_gradcam.audit.plan import AuditPlan
    from wsi_gradcam.models.load import Model

QUESTIONS: dict[str, Callable[[Asked], Numbers]] = {
    "faithfulness": faithfulness,
    "sanity": sanity,
    "stability": stability,
    "locality": locality,
    "saturation": saturated,
    "shortcuts": shortcuts,
    "plausibility": plausibility,
}
SHOWN_PX = 160  # of the longer side of an example


def subject_of(audit: AuditPlan, model: Model) -> Subject:
    """The run's model under audit."""
    return Subject.of(model, audit.run.settings.method, audit.run.facts.layer, PIECE)


def measure(audit: AuditPlan, subject: Subject, data: PatchData, slide_id: str, number: int) -> Numbers:
    """The numbers of a piece by name; of a patch that cannot be read any more, NaN."""
    asked = Asked.of(audit, subject, data, number < audit.samples[slide_id].deep)
    found = _base(asked, slide_id, number)
    for name, ask in QUESTIONS.items():
        if audit.settings.asks(name):
            found |= {key: np.asarray(values, np.float32) for key, values in ask(asked).items()}
    if number == 0:
        found["shown/rgb"] = np.stack([_small(rgb) for rgb in data.rgb])
        if audit.settings.asks("shortcuts"):
            found |= glass(asked)
        if audit.settings.asks("faithfulness"):
            found |= _removed(asked)
    return {key: _counted(key, values, data.count, data.readable) for key, values in found.items()}


def _base(asked: Asked, slide_id: str, number: int) -> Numbers:
    """What is known of every patch: what was explained of it, its maps, and whether they are those of the run."""
    data, aim, audit = asked.data, asked.aim, asked.audit
    sample = audit.samples[slide_id]
    part = sample.piece(number)
    weights = np.zeros(PIECE)
    weights[: data.count] = sample.weights[part]
    found: Numbers = {
        "base/number": data.number,
        "base/weight": weights,
        "base/readable": data.readable.astype(np.uint8),
        "base/deep": np.full(PIECE, asked.deep, np.uint8),
        "base/logits": aim.logits.float().cpu().numpy(),
        "base/logit": aim.logit(aim.logits).double().cpu().numpy(),
    }
    classes, probability = explained_classes(aim), aim.probability(aim.logits)
    if classes is not None and probability is not None:
        found |= {"base/class": classes.numpy(), "base/probability": probability.double().cpu().numpy()}
    for name, map_ in asked.maps.items():
        values = map_.float().cpu().numpy()
        found[f"map/{name}"] = values
        found[f"base/{name}/differs"] = _differs(asked, values, name, None if classes is None else classes.numpy())
    return found


def _differs(
    asked: Asked, values: NDArray[np.float32], method: str, classes: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """How far the maps are from those that the run stored, relative to these; NaN where none was stored."""
    audit, stored = asked.audit, asked.data.stored
    if stored is None:
        return np.full(len(values), np.nan)
    rows = {
        shown.target.index if shown.target.is_class else shown.target: number
        for number, shown in enumerate(audit.run.maps)
        if shown.method == method
    }
    found = np.full(len(values), np.nan)
    for i, map_ in enumerate(values):
        keys = [audit.target] if classes is None else [int(classes[i]), None]
        row = next((rows[key] for key in keys if key in rows), None)
        if row is not None and (size := np.linalg.norm(stored[i, row])) > 0:
            found[i] = np.linalg.norm(map_ - stored[i, row]) / size
    return found


def _removed(asked: Asked) -> Numbers:
    """Scores of the slide, the mean of its patches' probabilities, as its relevant patches are taken away."""
    found: Numbers = {}
    for label, (relevance, scores) in asked.data.slide_relevance.items():
        fractions = np.array(REMOVED_FRACTIONS)
        curves = slide_removal(relevance, scores, lambda left: float(left.mean()), fractions, seed=asked.seed)
        found |= {f"slide/removal/{label}/{order}": curve[None] for order, curve in curves.items()}
    return found


def _counted(key: str, values: NDArray[np.generic], count: int, readable: NDArray[np.bool_]) -> NDArray[np.generic]:
    """Without what fills the piece up, and without what was measured of patches that could not be read."""
    if key.startswith("slide/"):
        return values
    found = values[:count].copy()
    if np.issubdtype(found.dtype, np.floating) and key != "base/weight":
        found[~readable[:count]] = np.nan
    return found


def _small(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    scale = min(1.0, SHOWN_PX / max(rgb.shape[:2]))
    size = max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))
