"""What every question of the audit is asked with: a model, patches, what is explained of them, and its maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from wsi_gradcam.audit.measured import PROBABILITY
from wsi_gradcam.audit.measures.controls import control_maps
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.cam.targets import Target, classes_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from wsi_gradcam.audit.measures.subject import Aim, Subject
    from wsi_gradcam.audit.patch_data import PatchData
    from wsi_gradcam.audit.plan import AuditPlan


@dataclass(frozen=True, eq=False)
class Asked:
    """A piece at hand.

    Attributes:
        images: [P, 3, H, W] as the network sees them.
        maps: [P, h, w] of the run's methods, by name, on the grid that the run stores.
        controls: maps that know nothing of the model, by name, on the same grid.
        deep: whether what is slow is measured too.
    """

    audit: AuditPlan
    subject: Subject
    data: PatchData
    images: Tensor
    aim: Aim
    maps: dict[str, Tensor]
    controls: dict[str, Tensor]
    deep: bool

    @classmethod
    def of(cls, audit: AuditPlan, subject: Subject, data: PatchData, deep: bool) -> Asked:
        """All of a piece; runs the model and each method once."""
        images = subject.images(data.rgb)
        aim = subject.aim(images, audit.target)
        grid = audit.run.facts.cam_shape
        maps = {name: on_grid(subject.maps(images, aim, name), name, grid) for name in audit.run.settings.method}
        controls = control_maps(images, grid, data.seeds)
        if data.probability is not None and (classes := explained_classes(aim)) is not None:
            rows = torch.arange(len(images))
            controls[PROBABILITY] = torch.from_numpy(data.probability)[rows, classes].to(images.device)
        return cls(audit, subject, data, images, aim, maps, controls, deep)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the maps."""
        return self.audit.run.facts.cam_shape

    @property
    def seed(self) -> int:
        """For what is the same for all patches."""
        return self.audit.settings.seed

    def input_masks(self, masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Masks [P, h, w] over patches as the network sees them, [P, H, W]: the nearest pixel of each."""
        height, width = self.images.shape[2:]
        top, left, view_height, view_width = self.audit.run.facts.view
        patch = self.audit.run.patch_px
        scale = masks.shape[1] / patch[0], masks.shape[2] / patch[1]
        rows = ((top + (torch.arange(height) + 0.5) * view_height / height) * scale[0]).long().clamp(0)
        columns = ((left + (torch.arange(width) + 0.5) * view_width / width) * scale[1]).long().clamp(0)
        rows, columns = rows.clamp(max=masks.shape[1] - 1), columns.clamp(max=masks.shape[2] - 1)
        found: NDArray[np.bool_] = masks[:, rows.numpy()[:, None], columns.numpy()[None]]
        return found


def on_grid(maps: Tensor, method: str, grid: tuple[int, int]) -> Tensor:
    """Maps [P, h, w] on the grid that a run stores, as it stores them: see `Explainer`."""
    if METHOD_INFO[method].grid == "layer":
        return maps
    pooled = F.adaptive_avg_pool2d(maps[:, None], grid)[:, 0]
    return pooled * (maps[0].numel() / (grid[0] * grid[1])) if METHOD_INFO[method].scale == "cells" else pooled


def explained_classes(aim: Aim) -> Tensor | None:
    """The class [P] that each patch is explained for; None where the target is no class."""
    if not isinstance(aim.target, Target) or not aim.target.is_class:
        return None
    return classes_of(aim.target, aim.logits).cpu()
