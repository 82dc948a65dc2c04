"""Methods that run the model again: on changed inputs or maps of the layer, or to differentiate by the input.

Perturbing methods give maps of the layer's cells; methods that differentiate give maps [B, H, W] of the input's pixels.
The input is the normalised image, so a gradient is per standard deviation of a colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wsi_gradcam.cam.methods import Probe, Score

# Windows of one cell leave an object's neighbours to answer for it; of two, each pixel is hidden by four windows.
WINDOW_CELLS = 2.0


@torch.no_grad()
def scorecam(probe: Probe, score: Score) -> Tensor:
    """Score-CAM [B, h, w], sum_k w_k A_k with w = softmax_k s(x ⊙ norm(up(A_k))) (Wang 2020, arXiv 1910.01279).

    up is bilinear to the input's size, norm the min-max of each enlarged map, and a constant map is a mask of zeros.
    x is the normalised image, so what is masked turns into the mean colour, as in the authors' code. Their
    baseline s(0) is the same for all k and falls out of the softmax. One pass of the model a channel; kept are the
    scores alone.
    """
    A = probe.activation.float()
    scores = [
        score(probe.predict(probe.images * _mask(A[:, k : k + 1], probe.images))).float() for k in range(A.shape[1])
    ]
    return torch.einsum("bk,bkhw->bhw", torch.stack(scores, dim=1).softmax(dim=1), A)


@torch.no_grad()
def ablationcam(probe: Probe, score: Score) -> Tensor:
    """Ablation-CAM [B, h, w], sum_k w_k A_k with w_k = s - s(A_k set to 0) (Desai 2020, WACV).

    Not divided by s, which would flip all signs where s < 0. One pass of the head a channel.
    """
    A = probe.activation
    whole = score(probe.resume(A.clone())).float()
    drops = [whole - score(probe.resume(_without(A, k))).float() for k in range(A.shape[1])]
    return torch.einsum("bk,bkhw->bhw", torch.stack(drops, dim=1), A.float())


@torch.no_grad()
def occlusion(
    probe: Probe,
    score: Score,
    window_px: tuple[float, float] | None = None,
    stride_px: tuple[float, float] | None = None,
) -> Tensor:
    """Occlusion [B, h, w], s(x) - s(x with a window set to 0), in logits (Zeiler 2013, arXiv 1311.2901).

    0 of a normalised image is the data set's mean colour, which is not that of glass. A window is centred on each
    square of `stride_px`, and cut off at the image's edge. One pass of the model a window.

    Args:
        window_px: height and width; `WINDOW_CELLS` strides unless told.
        stride_px: height and width; a cell of the layer unless told, which gives a map of the layer's cells.
    """
    height, width = probe.images.shape[2:]
    cells_y, cells_x = probe.activation.shape[2:]
    stride_y, stride_x = stride_px or (height / cells_y, width / cells_x)
    window_y, window_x = window_px or (WINDOW_CELLS * stride_y, WINDOW_CELLS * stride_x)
    rows, columns = _windows(height, window_y, stride_y), _windows(width, window_x, stride_x)
    whole = score(probe.predict(probe.images)).float()
    drops = [whole - score(probe.predict(_covered(probe.images, y, x))).float() for y in rows for x in columns]
    return torch.stack(drops, dim=1).reshape(len(whole), len(rows), len(columns))


def _mask(maps: Tensor, images: Tensor) -> Tensor:
    """Return `maps` [B, 1, h, w] in the images' size, each stretched to 0..1."""
    enlarged = F.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)
    low, high = enlarged.amin(dim=(2, 3), keepdim=True), enlarged.amax(dim=(2, 3), keepdim=True)
    return (enlarged - low) / torch.where(high > low, high - low, 1.0)


def _without(A: Tensor, channel: int) -> Tensor:
    # A copy for each: the head may change what it is given in place.
    changed = A.clone()
    changed[:, channel] = 0
    return changed


def _windows(size: int, window: float, stride: float) -> list[slice]:
    """Return the pixels of windows centred on each `stride` of `size` pixels.

    >>> _windows(8, 4, 2)
    [slice(0, 3, None), slice(1, 5, None), slice(3, 7, None), slice(5, 8, None)]
    """
    centres = [(i + 0.5) * stride for i in range(max(1, round(size / stride)))]
    return [slice(max(0, _rounded(c - window / 2)), min(size, _rounded(c + window / 2))) for c in centres]


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)  # halves always up, so that windows side by side neither overlap nor leave a gap


def _covered(images: Tensor, rows: slice, columns: slice) -> Tensor:
    changed = images.clone()
    changed[:, :, rows, columns] = 0
    return changed


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
    """Return ds/dx [B, 3, H, W] at `images`; zeros if the score does not depend on them."""
    leaf = images.detach().clone().requires_grad_(True)
    (found,) = torch.autograd.grad(score(ask(leaf)).sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found.detach()


def _strongest(gradients: Tensor) -> Tensor:
    return gradients.abs().amax(dim=1)


PROBING: dict[str, Callable[[Probe, Score], Tensor]] = {
    "scorecam": scorecam,
    "ablationcam": ablationcam,
    "occlusion": occlusion,
    "gradient": gradient,
    "smoothgrad": smoothgrad,
    "integrated_gradients": integrated_gradients,
    "guided_backprop": guided_backprop,
}
