"""What planning must know of a model: sent around instead of the model. Needs no torch, so clients stay thin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsi_gradcam.cam.choice import Choice
    from wsi_gradcam.cam.layout import Layer
    from wsi_gradcam.models.activation import Activation
    from wsi_gradcam.stain import Stain


@dataclass(frozen=True)
class ModelFacts:
    """A model's description without its weights.

    Attributes:
        patch_px: (height, width) of what is read from the slide for one input.
        view: (y, x, height, width) of the part of a patch that the network sees, in patch px.
        layers: what is explained; `traced`: their names are those of operators of the model's graph.
        cam_shape: (h, w) of the maps; of several layers, of the finest.
        parameters: how many numbers the model has.
        activation_bytes: the largest input plus output of any layer for one patch.
        batch_size: patches per forward pass.
        choice: engine and precision.
        stain: what slides are normalised to; None: they stay as they are.
    """

    name: str
    source: str
    digest: str
    license: str | None
    classes: tuple[str, ...]
    activation: Activation
    patch_px: tuple[int, int]
    view: tuple[float, float, float, float]
    mpp: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layers: tuple[Layer, ...]
    traced: bool
    cam_shape: tuple[int, int]
    parameters: int
    activation_bytes: int
    batch_size: int
    choice: Choice
    stain: Stain | None = None

    @property
    def layer(self) -> str:
        """The layers' names in one word."""
        return "+".join(layer.name for layer in self.layers)
