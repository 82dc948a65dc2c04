"""What planning must know of a model: sent around instead of the model. Needs no torch, so clients stay thin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsi_gradcam.models.activation import Activation


@dataclass(frozen=True)
class ModelFacts:
    """A model's description without its weights.

    Attributes:
        cam_shape: (h, w) of the layer's maps; `channels` of them.
        parameters: how many numbers the model has.
        activation_bytes: the largest input plus output of any layer for one patch.
    """

    name: str
    source: str
    digest: str
    license: str | None
    classes: tuple[str, ...]
    activation: Activation
    patch_px: tuple[int, int]
    mpp: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layer: str
    channels: int
    cam_shape: tuple[int, int]
    parameters: int
    activation_bytes: int
