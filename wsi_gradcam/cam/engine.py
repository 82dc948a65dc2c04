"""Images in, logits and CAMs out: prediction and explanation in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wsi_gradcam.cam.tap import gradients, tapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from wsi_gradcam.cam.methods import Method
    from wsi_gradcam.cam.targets import Target


@torch.enable_grad()  # also for a caller under no_grad
def explain_batch(
    module: nn.Module, layer: str, images: Tensor, targets: Sequence[Target], method: Method
) -> tuple[Tensor, Tensor]:
    """(logits [B, K], raw signed CAMs [B, T, h, w]), float32, for normalised `images` [B, 3, H, W].

    The trunk runs once, whatever the number of targets; logits are explained, not probabilities, whose gradient
    vanishes where the model is sure.

    Raises:
        LayerError: no such layer.
    """
    with tapped(module, layer) as tap:
        logits = tap.forward(module, images)
        activation = tap.activation
    assert activation is not None  # Tap.forward raises otherwise
    scalars = torch.stack([_scalar(logits, target) for target in targets], dim=1)
    frozen = activation.detach()
    cams = [method(frozen, gradient) for gradient in gradients(scalars, activation)]
    return logits.detach(), torch.stack(cams, dim=1)


def _scalar(logits: Tensor, target: Target) -> Tensor:
    if target.index is None:
        return logits.max(dim=1).values
    return logits[:, target.index]
