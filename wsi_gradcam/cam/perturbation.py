"""Methods that change the input or the layer's maps and ask the model again; maps of the layer's cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from wsi_gradcam.cam.probe import Probe, Score

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
        score(probe.answer(probe.images * _mask(A[:, k : k + 1], probe.images))).float() for k in range(A.shape[1])
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
    whole = score(probe.answer(probe.images)).float()
    drops = [whole - score(probe.answer(_covered(probe.images, y, x))).float() for y in rows for x in columns]
    return torch.stack(drops, dim=1).reshape(len(whole), len(rows), len(columns))


def _mask(maps: Tensor, images: Tensor) -> Tensor:
    """`maps` [B, 1, h, w] in the images' size, each stretched from 0 to 1."""
    enlarged = F.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)
    low, high = enlarged.amin(dim=(2, 3), keepdim=True), enlarged.amax(dim=(2, 3), keepdim=True)
    return (enlarged - low) / torch.where(high > low, high - low, 1.0)


def _without(A: Tensor, channel: int) -> Tensor:
    # A copy for each: the head may change what it is given in place.
    changed = A.clone()
    changed[:, channel] = 0
    return changed


def _windows(size: int, window: float, stride: float) -> list[slice]:
    """The pixels of windows centred on each `stride` of `size` pixels.

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
