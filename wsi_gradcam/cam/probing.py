"""The methods that ask the model again, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from wsi_gradcam.cam.perturbation import ablationcam, occlusion, scorecam
from wsi_gradcam.cam.pixels import gradient, guided_backprop, integrated_gradients, smoothgrad
from wsi_gradcam.cam.probe import Probe, Score

PROBING: dict[str, Callable[[Probe, Score], Tensor]] = {
    "scorecam": scorecam,
    "ablationcam": ablationcam,
    "occlusion": occlusion,
    "gradient": gradient,
    "smoothgrad": smoothgrad,
    "integrated_gradients": integrated_gradients,
    "guided_backprop": guided_backprop,
}
