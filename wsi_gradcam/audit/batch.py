"""A batch of patches under audit: what every question measures it with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from wsi_gradcam.audit.measurements import Patches
from wsi_gradcam.audit.measures.subject import Subject, control_maps
from wsi_gradcam.audit.plan import BATCH_SIZE
from wsi_gradcam.audit.vocabulary import PROBABILITY
from wsi_gradcam.cam.engine import pool_to_layer_grid

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from wsi_gradcam.audit.measures.subject import Aim
    from wsi_gradcam.audit.patch_data import PatchData
    from wsi_gradcam.audit.plan import AuditPlan
    from wsi_gradcam.models.load import Model

SHOWN_PX = 160  # of the longer side of an example


@dataclass(frozen=True, eq=False)
class Batch:
    """Patches under audit.

    Attributes:
        images: [P, 3, H, W] as the network sees them.
        maps: [P, h, w] of the run's methods, by name, on the grid that the run stores.
        controls: maps that know nothing of the model, by name, on the same grid.
        in_depth: whether what is slow is measured too.
    """

    plan: AuditPlan
    subject: Subject
    data: PatchData
    images: Tensor
    aim: Aim
    maps: dict[str, Tensor]
    controls: dict[str, Tensor]
    in_depth: bool

    @classmethod
    def of(cls, plan: AuditPlan, subject: Subject, data: PatchData, in_depth: bool) -> Batch:
        """Return the batch of some patches; runs the model and each method once."""
        images = subject.images(data.rgb)
        aim = subject.aim(images, plan.target)
        grid = plan.run.facts.cam_shape
        methods = plan.run.settings.method
        maps = {name: pool_to_layer_grid(subject.maps(images, aim, name), name, grid) for name in methods}
        controls = control_maps(images, grid, data.seeds)
        if data.probability is not None and aim.classes is not None:
            rows = torch.arange(len(images))
            controls[PROBABILITY] = torch.from_numpy(data.probability)[rows, aim.classes].to(images.device)
        return cls(plan, subject, data, images, aim, maps, controls, in_depth)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of the run."""
        return self.plan.run.settings.method

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the maps."""
        return self.plan.run.facts.cam_shape

    @property
    def patch_px(self) -> tuple[int, int]:
        """(height, width) of a patch."""
        return self.plan.run.patch_px

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of a patch."""
        return self.plan.run.mpp

    @property
    def seed(self) -> int:
        """The seed of what is the same for all patches."""
        return self.plan.settings.seed

    @cached_property
    def map_arrays(self) -> dict[str, NDArray[np.float32]]:
        """The maps of the methods as arrays."""
        return {name: map_.float().cpu().numpy() for name, map_ in self.maps.items()}

    def input_masks(self, masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return masks [P, h, w] of patches as the network sees them, [P, H, W]: the nearest pixel of each."""
        height, width = self.images.shape[2:]
        top, left, view_height, view_width = self.plan.run.facts.view
        scale = masks.shape[1] / self.patch_px[0], masks.shape[2] / self.patch_px[1]
        rows = ((top + (torch.arange(height) + 0.5) * view_height / height) * scale[0]).long().clamp(0)
        columns = ((left + (torch.arange(width) + 0.5) * view_width / width) * scale[1]).long().clamp(0)
        rows, columns = rows.clamp(max=masks.shape[1] - 1), columns.clamp(max=masks.shape[2] - 1)
        found: NDArray[np.bool_] = masks[:, rows.numpy()[:, None], columns.numpy()[None]]
        return found


def subject_of(plan: AuditPlan, model: Model) -> Subject:
    """Return the run's model under audit."""
    return Subject.of(model, plan.run.settings.method, plan.run.facts.layer, BATCH_SIZE)


def describe(batch: Batch, slide_id: str, number: int) -> Patches:
    """Return what is known of every patch of batch `number` of a slide.

    That is what was explained of it, its maps, and whether they are the run's.
    """
    data, aim = batch.data, batch.aim
    sample = batch.plan.samples[slide_id]
    weights = np.zeros(BATCH_SIZE)
    weights[: data.count] = sample.weights[sample.batch(number)]
    classes, probability = aim.classes, aim.probability(aim.logits)
    known = classes is not None and probability is not None
    return Patches(
        number=data.number,
        weight=weights,
        readable=data.readable.astype(np.uint8),
        in_depth=np.full(BATCH_SIZE, batch.in_depth, np.uint8),
        logits=aim.logits.float().cpu().numpy(),
        logit=aim.logit(aim.logits).double().cpu().numpy(),
        explained_class=classes.numpy() if known and classes is not None else None,
        probability=probability.double().cpu().numpy() if known and probability is not None else None,
        difference={name: _difference(batch, name) for name in batch.methods},
        maps=batch.map_arrays,
        shown=np.stack([_small(rgb) for rgb in data.rgb]) if number == 0 else None,
    )


def _difference(batch: Batch, method: str) -> NDArray[np.float64]:
    """Return how far the maps are from those that the run stored, relative to these; NaN where none was stored."""
    run, stored, maps = batch.plan.run, batch.data.stored, batch.map_arrays[method]
    found = np.full(len(maps), np.nan)
    if stored is None:
        return found
    rows = {
        shown.target.index if shown.target.is_class else shown.target: number
        for number, shown in enumerate(run.maps)
        if shown.method == method
    }
    classes = None if batch.aim.classes is None else batch.aim.classes.tolist()
    for i, map_ in enumerate(maps):
        keys = [batch.plan.target] if classes is None else [classes[i], None]
        row = next((rows[key] for key in keys if key in rows), None)
        if row is not None and (size := np.linalg.norm(stored[i, row])) > 0:
            found[i] = np.linalg.norm(map_ - stored[i, row]) / size
    return found


def _small(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    scale = min(1.0, SHOWN_PX / max(rgb.shape[:2]))
    size = max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))
