"""Methods that differentiate by the input; maps [B, H, W] of the input's pixels.

The input is the normalised image, so a gradient is per standard deviation of a colour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from wsi_gradcam.cam.probe import Probe, Score

SAMPLES, SPREAD, SEED = 25, 0.15, 0
# At kinks the integrand jumps. EfficientNet-Lite0, 4 photographs: 32 points miss the score's change by 3 to 19 %, 128
# by 2 to 6 %, 256 by 0.2 to 2.5 %; the midpoint rule misses more (256: 1 to 4 %), and a trapezoid counts the
# baseline, where a network without biases has a kink in all units at once (ResNet-18, untrained: 1.6 % against 0).
STEPS = 64


def gradient(probe: Probe, score: Score) -> Tensor:
    """Gradient [B, H, W], the maximum over colours of |ds/dx|, not negative (Simonyan 2013, arXiv 1312.6034)."""
    return _strongest(_gradient(probe.differentiable, probe.images, score))


def smoothgrad(probe: Probe, score: Score, samples: int = SAMPLES, spread: float = SPREAD) -> Tensor:
    """SmoothGrad [B, H, W], the maximum over colours of |mean of ds/dx at noisy x|, not negative.

    Gaussian noise of standard deviation `spread` times the image's own range (its largest less its smallest value).
    The signed gradients are averaged (Smilkov 2017, arXiv 1706.03825). Each image gets the same noise, from a fixed
    seed on the CPU, so that its map depends neither on its place in the batch nor on the device.
    """
    images = probe.images
    generator = torch.Generator().manual_seed(SEED)
    deviation = spread * (images.amax(dim=(1, 2, 3), keepdim=True) - images.amin(dim=(1, 2, 3), keepdim=True))
    total = torch.zeros_like(images)
    for _ in range(samples):
        noise = torch.randn(images.shape[1:], generator=generator).to(images)
        total += _gradient(probe.differentiable, images + deviation * noise, score)
    return _strongest(total / samples)


def integrated_gradients(probe: Probe, score: Score, steps: int = STEPS) -> Tensor:
    """Integrated Gradients [B, H, W], signed, x times the mean of ds/dx on the way from 0 to x, summed over colours.

    0 of a normalised image is the data set's mean colour. The sum over pixels is s(x) - s(0), as far as `steps`
    Gauss-Legendre points tell the integral (Sundararajan 2017, arXiv 1703.01365).
    """
    images = probe.images
    total = torch.zeros_like(images)
    for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):  # on -1 to 1, weights sum to 2
        total += float(weight / 2) * _gradient(probe.differentiable, images * float((node + 1) / 2), score)
    return (images * total).sum(dim=1)


def guided_backprop(probe: Probe, score: Score) -> Tensor:
    """Guided backpropagation [B, H, W], not negative: `gradient`, where ReLU's backward also clips what is negative.

    (Springenberg 2014, arXiv 1412.6806.) It shows edges, whatever the model has learned: it is the negative control
    of sanity checks. The paper shows signed colours; here it is reduced as `gradient` is, so that the two differ in
    ReLU's rule and nothing else.

    Raises:
        LayerError: the model has no ReLU.
    """
    return _strongest(_gradient(probe.guided, probe.images, score))


@torch.enable_grad()  # also for a caller under no_grad
def _gradient(ask: Callable[[Tensor], Tensor], images: Tensor, score: Score) -> Tensor:
    """ds/dx [B, 3, H, W] at `images`; zeros where the score does not depend on them."""
    leaf = images.detach().clone().requires_grad_(True)
    (found,) = torch.autograd.grad(score(ask(leaf)).sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found.detach()


def _strongest(gradients: Tensor) -> Tensor:
    return gradients.abs().amax(dim=1)
