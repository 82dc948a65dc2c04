"""Finds out, once a run and on a worker, what planning must know of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wsi_gradcam.cam.layers import check_layer, find_layer, probe_images
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.facts import ModelFacts

if TYPE_CHECKING:
    from wsi_gradcam.models.load import Model


def examine(model: Model, layer: str | None = None) -> ModelFacts:
    """Facts of `model`, with `layer`, else the specification's, else the one found, tested.

    Raises:
        LayerError: no layer can be tapped.
        ModelError: the output is not finite, or the tap changes it.
    """
    images = probe_images(model.patch_px).to(next(iter(model.module.parameters()), torch.empty(0)).device)
    _check_finite(model, images)
    layer = layer or model.layer or find_layer(model.module, images)
    channels, height, width = check_layer(model.module, layer, images)
    return ModelFacts(
        name=model.name,
        source=model.source,
        digest=model.digest,
        license=model.license,
        classes=model.classes,
        activation=model.activation,
        patch_px=model.patch_px,
        mpp=model.mpp,
        mean=model.mean,
        std=model.std,
        layer=layer,
        channels=channels,
        cam_shape=(height, width),
        parameters=sum(p.numel() for p in model.module.parameters()),
        activation_bytes=_activation_bytes(model.module, images[:1]),
    )


def _check_finite(model: Model, images: Tensor) -> None:
    with torch.no_grad():
        output = model.module(images)
    if not torch.isfinite(output).all():
        raise ModelError(f"{model.name}: gives NaN or infinite values for pictures of noise; check its weights")


def _activation_bytes(module: nn.Module, image: Tensor) -> int:
    largest = 0

    def record(part: nn.Module, args: tuple[Any, ...], output: object) -> None:
        nonlocal largest
        tensors = [t for t in (*args, output) if isinstance(t, Tensor)]
        largest = max(largest, sum(t.numel() * t.element_size() for t in tensors))

    handles = [part.register_forward_hook(record) for part in module.modules() if not list(part.children())]
    try:
        with torch.no_grad():
            module(image)
    finally:
        for handle in handles:
            handle.remove()
    return largest
