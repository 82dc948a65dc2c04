"""The methods by name, without their code, so that a client can check them without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method before it runs.

    Attributes:
        asks: `gradient`: a function of activation and gradient alone; `model`: runs the model again, many times,
            see `wsi_gradcam.cam.methods`.
        grid: `layer`: a map of the layer's cells; `pixels`: a map of the input's pixels.
        scale: factor from the raw map to what a heatmap shows. `cells`: times the number of the map's values, where
            the raw map sums to (a part of) the logit, so that the heatmap's mean is in logits; `one`: shown as it is.
        unit: `logit`, or `arbitrary` where values of two images cannot be compared in logits.
        title: as the literature writes it.
    """

    asks: Literal["gradient", "model"]
    grid: Literal["layer", "pixels"]
    scale: Literal["cells", "one"]
    unit: Literal["logit", "arbitrary"]
    title: str


METHOD_INFO: dict[str, MethodInfo] = {
    "cam": MethodInfo("gradient", "layer", "one", "logit", "CAM"),
    "gradcam": MethodInfo("gradient", "layer", "cells", "logit", "Grad-CAM"),
    "gradcam++": MethodInfo("gradient", "layer", "one", "arbitrary", "Grad-CAM++"),
    "hirescam": MethodInfo("gradient", "layer", "cells", "logit", "HiResCAM"),
    "layercam": MethodInfo("gradient", "layer", "cells", "logit", "LayerCAM"),
    "xgradcam": MethodInfo("gradient", "layer", "cells", "logit", "XGrad-CAM"),
    "eigencam": MethodInfo("gradient", "layer", "one", "arbitrary", "Eigen-CAM"),
    "finercam": MethodInfo("gradient", "layer", "cells", "logit", "Finer-CAM"),
    "scorecam": MethodInfo("model", "layer", "one", "arbitrary", "Score-CAM"),
    "ablationcam": MethodInfo("model", "layer", "one", "arbitrary", "Ablation-CAM"),
    "occlusion": MethodInfo("model", "layer", "one", "logit", "Occlusion"),
    "gradient": MethodInfo("model", "pixels", "one", "arbitrary", "Gradient"),
    "smoothgrad": MethodInfo("model", "pixels", "one", "arbitrary", "SmoothGrad"),
    "integrated_gradients": MethodInfo("model", "pixels", "cells", "logit", "Integrated Gradients"),
    "guided_backprop": MethodInfo("model", "pixels", "one", "arbitrary", "Guided backpropagation"),
}

METHOD_NAMES = tuple(METHOD_INFO)
