"""CAM methods: a method is a small pure function of activation and gradient.

`A` and `g` = ds/dA are [B, K, h, w] float32; the result is the raw signed map [B, h, w], without ReLU and without
normalisation, which are views. An image's map depends on no other image of the batch.

Methods that run the model again get a `Probe` instead, see `wsi_gradcam.cam.perturbation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wsi_gradcam.errors import LayerError

Method = Callable[[Tensor, Tensor], Tensor]

# Of an image's largest gradient. Pooling hands the same number to every cell, so only rounding may differ.
CONSTANT_GRADIENT = 1e-4
# Of the terms that cancel: below it a float32 sum of a layer's cells is rounding, and its sign unknown.
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
    underflow where g² does. Behind a ReLU the divisor is at least 2. Where A is signed it can be negative, and alpha
    then is as the formula says; where it cancels to 0 (within rounding), alpha is 0.
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

    As in the paper X is not centred. The gradient is not used: all targets have the same map. A singular vector's
    sign is arbitrary: here sum_k v_k >= 0, so that the map agrees with the sum of the channels, and behind a ReLU
    no cell is negative.

    v comes from the smaller of the two Gram matrices, X Xᵀ = U S² Uᵀ, where X v = u s, or XᵀX, which is faster than
    an SVD of X (7 x 7 x 2048: 3 ms an image against 6, or 60 for a full one). In float64, as a Gram matrix squares
    the condition number; for Apple's GPUs, which have none, on the CPU. An image that is not finite has a map of NaN.
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
    """A batch and ways to ask the model about it. Every call takes and gives whole batches of the same B images.

    Attributes:
        images: normalised float32 [B, 3, H, W].
        activation: the layer's maps [B, K, h, w], detached.
        predict: images -> logits [B, K], without a graph; runs the fast trunk.
        resume: maps [B, K, h, w] put in the layer's place -> logits [B, K], without a graph; runs the head alone
            where the model could be split.
        differentiable: images that may require grad -> logits [B, K] with a graph, in float32.
        guided: as `differentiable`, but ReLU's backward also clips negative gradient; raises LayerError where the
            model has no ReLU.
    """

    images: Tensor
    activation: Tensor
    predict: Callable[[Tensor], Tensor]
    resume: Callable[[Tensor], Tensor]
    differentiable: Callable[[Tensor], Tensor]
    guided: Callable[[Tensor], Tensor]
