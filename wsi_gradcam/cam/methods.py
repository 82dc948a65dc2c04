"""CAM methods: each is a small pure function of activation and gradient.

`A` and `g` = ds/dA are [B, K, h, w] float32; the result is the raw signed map [B, h, w], without ReLU and without
normalisation, which are views. An image's map does not depend on any other image of the batch.

Methods that run the model again, on changed inputs or maps of the layer, or to differentiate with respect to the input,
get a `Probe` instead. Perturbing methods give maps of the layer's cells; differentiating ones give maps [B, H, W] of
the input's pixels. The input is the normalised image, so a gradient is per standard deviation of a colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wsi_gradcam.errors import LayerError

Method = Callable[[Tensor, Tensor], Tensor]

# Share of an image's largest gradient. Pooling gives the same number to every cell, so only rounding may differ.
CONSTANT_GRADIENT = 1e-4
# Share of the terms that cancel: below it, a float32 sum of a layer's cells is rounding, and its sign is unknown.
CANCELLED = 1e-6


def cam(A: Tensor, g: Tensor) -> Tensor:
    """CAM, sum_k W_ck A_k, for global average pooling and a linear layer W (Zhou 2016, arXiv 1512.04150).

    There g_k is W_ck / (h w) in every cell, so that W = sum_hw g; the map's mean plus the bias is the logit, and the
    map is (h w) times Grad-CAM's. From A and g alone, pooling before a curved head looks the same: W is then the
    gradient of the pooled channels.

    Raises:
        LayerError: the gradient differs between the cells of an image.
    """
    weights = g.sum(dim=(2, 3))
    mean = weights[:, :, None, None] / (g.shape[2] * g.shape[3])
    spread, largest = (g - mean).abs().amax(dim=(1, 2, 3)), g.abs().amax(dim=(1, 2, 3))
    if bool((spread > CONSTANT_GRADIENT * largest).any()):  # not for NaN, which stages report with the patch
        share = float((spread / largest).nan_to_num().max())
        raise LayerError(
            "CAM is defined only where global average pooling and a linear layer follow the layer, but the gradient "
            f"differs between cells by {share:.2g} of its largest value; use gradcam"
        )
    return _weighted(weights, A)


def gradcam(A: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM, sum_k mean_hw(g)_k A_k, without ReLU, which is a view (Selvaraju 2017, arXiv 1610.02391).

    With global average pooling and a linear layer its sum over h, w plus the bias is the logit.
    """
    return _weighted(g.mean(dim=(2, 3)), A)


def gradcam_plus_plus(A: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM++, sum_k w_k A_k with w_k = sum_hw alpha relu(g) (Chattopadhyay 2018, arXiv 1710.11063, eq. 19).

    alpha = g² / (2 g² + S g³) with S = sum_hw A, and 0 where g = 0. It is computed as 1 / (2 + S g), which does not
    underflow where g² does. After a ReLU, the divisor is at least 2. If A is signed, it can be negative, and alpha is
    then as the formula says; where it cancels to 0 (within rounding), alpha is 0.
    """
    product = A.sum(dim=(2, 3), keepdim=True) * g
    divisor = 2 + product
    cancelled = divisor.abs() <= CANCELLED * (2 + product.abs())
    alpha = torch.where(cancelled, 0.0, 1 / torch.where(cancelled, 1.0, divisor))
    return _weighted((alpha * g.relu()).sum(dim=(2, 3)), A)


def hirescam(A: Tensor, g: Tensor) -> Tensor:
    """HiResCAM, sum_k g_k A_k cell by cell (Draelos 2020, arXiv 2011.08891)."""
    return (A * g).sum(dim=1)


def layercam(A: Tensor, g: Tensor) -> Tensor:
    """LayerCAM, sum_k relu(g_k) A_k cell by cell (Jiang 2021, TIP, doi 10.1109/TIP.2021.3089943)."""
    return (A * g.relu()).sum(dim=1)


def xgradcam(A: Tensor, g: Tensor) -> Tensor:
    """XGrad-CAM, sum_k w_k A_k with w_k = sum_hw(g A) / sum_hw(A) (Fu 2020, arXiv 2008.02312).

    Its sum over h, w is that of HiResCAM. A channel that sums to 0 (dead, or signed and cancelling within rounding)
    has weight 0.
    """
    total = A.sum(dim=(2, 3))
    cancelled = total.abs() <= CANCELLED * A.abs().sum(dim=(2, 3))
    weights = (g * A).sum(dim=(2, 3)) / torch.where(cancelled, 1.0, total)
    return _weighted(torch.where(cancelled, 0.0, weights), A)


def eigencam(A: Tensor, g: Tensor) -> Tensor:
    """Eigen-CAM, X v with X = A as [h w, K] and v its first right singular vector (Muhammad 2020, arXiv 2008.00299).

    As in the paper, X is not centred. The gradient is not used: all targets have the same map. A singular vector's sign
    is arbitrary: here sum_k v_k >= 0, so that the map agrees with the sum of the channels, and no cell is negative
    after a ReLU.

    v comes from the smaller of the two Gram matrices, X Xᵀ = U S² Uᵀ, where X v = u s, or XᵀX, which is faster than an
    SVD of X (7 x 7 x 2048: 3 ms per image instead of 6, or 60 for a full one). This is done in float64, because a Gram
    matrix squares the condition number; for Apple's GPUs, which lack float64, on the CPU. An image that is not finite
    has a map of NaN.
    """
    X = (A.cpu() if A.device.type == "mps" else A).flatten(2).mT.double()
    finite = X.isfinite().all(dim=2, keepdim=True).all(dim=1, keepdim=True)
    X = torch.where(finite, X, 0.0)
    if X.shape[1] <= X.shape[2]:
        values, vectors = torch.linalg.eigh(X @ X.mT)  # ascending
        projection = vectors[:, :, -1:] * values[:, None, -1:].clamp(min=0).sqrt()
    else:
        projection = X @ torch.linalg.eigh(X.mT @ X).eigenvectors[:, :, -1:]
    agreement = (projection * X.sum(dim=2, keepdim=True)).sum(dim=1, keepdim=True)
    projection = torch.where(agreement < 0, -projection, projection)
    return torch.where(finite, projection, torch.nan).to(A.dtype).to(A.device).reshape(len(A), *A.shape[2:])


def _weighted(weights: Tensor, A: Tensor) -> Tensor:
    return torch.einsum("bk,bkhw->bhw", weights, A)


METHODS: dict[str, Method] = {
    "cam": cam,
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "layercam": layercam,
    "xgradcam": xgradcam,
    "eigencam": eigencam,
    "finercam": gradcam,  # of the gradient of `wsi_gradcam.cam.targets.finer_score`
}


Score = Callable[[Tensor], Tensor]
"""Logits [B, K] -> the explained scalar of each image [B]. Row i always belongs to image i of the batch: a score
may hold a class per image (the one predicted for the unchanged image)."""


@dataclass(frozen=True)
class Probe:
    """A batch, with functions that run the model on it. Every call takes and returns the same B images.

    Attributes:
        images: normalised float32 [B, 3, H, W].
        activation: the layer's maps [B, K, h, w], detached.
        predict: images -> logits [B, K], without a graph; runs the fast trunk.
        resume: maps [B, K, h, w] in place of the layer's -> logits [B, K], without a graph; runs only the head if the
            model could be split.
        differentiable: images that may require grad -> logits [B, K] with a graph, in float32.
        guided: as `differentiable`, but ReLU's backward also clips negative gradients; raises a LayerError if the model
            has no ReLU.
    """

    images: Tensor
    activation: Tensor
    predict: Callable[[Tensor], Tensor]
    resume: Callable[[Tensor], Tensor]
    differentiable: Callable[[Tensor], Tensor]
    guided: Callable[[Tensor], Tensor]


# With windows of one cell, an object's neighbours still give it away; with two, each pixel is hidden by four windows.
WINDOW_CELLS = 2.0


@torch.no_grad()
def scorecam(probe: Probe, score: Score) -> Tensor:
    """Score-CAM [B, h, w], sum_k w_k A_k with w = softmax_k s(x ⊙ norm(up(A_k))) (Wang 2020, arXiv 1910.01279).

    up is bilinear to the input's size, norm the min-max of each enlarged map, and a constant map is a mask of zeros. x
    is the normalised image, so what is masked turns into the mean colour, as in the authors' code. Their baseline s(0)
    is the same for all k and cancels in the softmax. One pass of the model per channel; only the scores are kept.
    """
    A = probe.activation.float()
    scores = [
        score(probe.predict(probe.images * _mask(A[:, k : k + 1], probe.images))).float() for k in range(A.shape[1])
    ]
    return torch.einsum("bk,bkhw->bhw", torch.stack(scores, dim=1).softmax(dim=1), A)


@torch.no_grad()
def ablationcam(probe: Probe, score: Score) -> Tensor:
    """Ablation-CAM [B, h, w], sum_k w_k A_k with w_k = s - s(A_k set to 0) (Desai 2020, WACV).

    It is not divided by s, which would flip all signs where s < 0. One pass of the head per channel.
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
    square of `stride_px`, and cut off at the image's edge. One pass of the model per window.

    Args:
        window_px: height and width; `WINDOW_CELLS` strides by default.
        stride_px: height and width; by default a cell of the layer, which gives a map of the layer's cells.
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
    # A copy for each: the head may change its input in place.
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
    return math.floor(value + 0.5)  # halves always round up, so that adjacent windows neither overlap nor leave a gap


def _covered(images: Tensor, rows: slice, columns: slice) -> Tensor:
    changed = images.clone()
    changed[:, :, rows, columns] = 0
    return changed


SAMPLES, SPREAD, SEED = 25, 0.15, 0
# At kinks the integrand jumps. EfficientNet-Lite0, 4 photographs: 32 points miss the score's change by 3 to 19%, 128
# by 2 to 6%, 256 by 0.2 to 2.5%; the midpoint rule misses more (256: 1 to 4%), and a trapezoid counts the
# baseline, where a network without biases has a kink in all units at once (ResNet-18, untrained: 1.6% against 0).
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
    Gauss-Legendre points approximate the integral (Sundararajan 2017, arXiv 1703.01365).
    """
    images = probe.images
    total = torch.zeros_like(images)
    for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):  # on -1 to 1, weights sum to 2
        total += float(weight / 2) * _gradient(probe.differentiable, images * float((node + 1) / 2), score)
    return (images * total).sum(dim=1)


def guided_backprop(probe: Probe, score: Score) -> Tensor:
    """Guided backpropagation [B, H, W], not negative: `gradient`, where ReLU's backward also clips what is negative.

    (Springenberg 2014, arXiv 1412.6806.) It shows edges, whatever the model has learned: it is the negative control of
    sanity checks. The paper shows signed colours; here it is reduced like `gradient`, so that the two differ only in
    ReLU's rule.

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
