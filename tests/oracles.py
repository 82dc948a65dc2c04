"""Slow, plain, independent re-implementations that tests compare the package with."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsi_gradcam.geometry import Region

Rgb = npt.NDArray[np.uint8]


def crop(image: Rgb, y: int, x: int, height: int, width: int, background: tuple[int, int, int]) -> Rgb:
    """A part of `image` [h, w, 3], pixel by pixel; background where there is no image."""
    out = np.empty((height, width, 3), np.uint8)
    for i in range(height):
        for j in range(width):
            inside = 0 <= y + i < image.shape[0] and 0 <= x + j < image.shape[1]
            out[i, j] = image[y + i, x + j] if inside else background
    return out


def triangle_resample(
    image: Rgb,
    start: tuple[float, float],
    scale: tuple[float, float],
    size: tuple[int, int],
    background: tuple[int, int, int],
) -> npt.NDArray[np.float64]:
    """`size` pixels of `scale` image pixels each from `start` on, by a triangle filter as wide as a pixel's own.

    Pixel i covers [start + i * scale, start + (i + 1) * scale); weights fall linearly from its centre to zero at
    a distance of max(1, scale) image pixels.
    """
    pad = 2 + math.ceil(max(1.0, *scale))
    first = [math.floor(s) - pad for s in start]
    last = [math.ceil(s + step * n) + pad for s, step, n in zip(start, scale, size, strict=True)]
    pixels = np.empty((last[0] - first[0], last[1] - first[1], 3))
    pixels[:] = background
    top, left = max(0, first[0]), max(0, first[1])
    bottom, right = min(image.shape[0], last[0]), min(image.shape[1], last[1])
    if top < bottom and left < right:
        here = slice(top - first[0], bottom - first[0]), slice(left - first[1], right - first[1])
        pixels[here] = image[top:bottom, left:right]
    for axis in (0, 1):
        weights = np.zeros((size[axis], pixels.shape[axis]))
        for i in range(size[axis]):
            centre = start[axis] + (i + 0.5) * scale[axis]
            for j in range(pixels.shape[axis]):
                distance = abs(first[axis] + j + 0.5 - centre)
                weights[i, j] = max(0.0, 1 - distance / max(1.0, scale[axis]))
        weights /= weights.sum(axis=1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(weights, pixels, axes=(1, axis)), 0, axis)
    return pixels


def share_of(mask: npt.NDArray[np.bool_], top: float, left: float, bottom: float, right: float) -> float:
    """Share of a box that is True, from the overlap of the box with each pixel; outside the mask is False."""
    inside = 0.0
    for y, x in np.argwhere(mask).tolist():
        height = max(0.0, min(bottom, y + 1) - max(top, y))
        width = max(0.0, min(right, x + 1) - max(left, x))
        inside += height * width
    return inside / ((bottom - top) * (right - left)) if bottom > top and right > left else 0.0


def gradcam_by_hand(
    trunk: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], images: Tensor, index: int | None
) -> Tensor:
    """Grad-CAM [B, h, w] of logit `index` (None: the largest), one image and one channel at a time.

    `head` maps the trunk's output, and nothing else, to logits.
    """
    maps = []
    for image in images.unbind():
        activation = trunk(image[None]).detach().requires_grad_(True)
        logits = head(activation)[0]
        chosen = int(logits.argmax()) if index is None else index
        (gradients,) = torch.autograd.grad(logits[chosen], activation)
        total = torch.zeros(activation.shape[2:])
        for channel, gradient in zip(activation.detach()[0], gradients[0], strict=True):
            total += channel * float(gradient.sum()) / gradient.numel()
        maps.append(total)
    return torch.stack(maps)


def stitch_by_pixel(
    yx: npt.NDArray[np.int64],
    cams: npt.NDArray[np.float32],
    footprint: tuple[float, float],
    stride: int,
    window: str,
    region: Region,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(values, covered) of a region of the heatmap, pixel by pixel and patch by patch, in level-0 px."""
    values, covered = np.zeros((region.height, region.width)), np.zeros((region.height, region.width), bool)
    for i, j in np.ndindex(values.shape):
        centre = ((region.y + i + 0.5) * stride, (region.x + j + 0.5) * stride)
        total = weights = 0.0
        for corner, cam in zip(yx.tolist(), cams.astype(float), strict=True):
            place = [c - s for c, s in zip(centre, corner, strict=True)]
            if all(0 <= p < size for p, size in zip(place, footprint, strict=True)):
                columns = [cell_value(row, place[1], footprint[1], stride) for row in cam]
                value = cell_value(np.array(columns), place[0], footprint[0], stride)
                weight = math.prod(
                    1.0 if window == "uniform" else max(math.sin(math.pi * p / size) ** 2, 1e-3)
                    for p, size in zip(place, footprint, strict=True)
                )
                total, weights = total + weight * value, weights + weight
        if weights > 0:
            values[i, j], covered[i, j] = total / weights, True
    return values, covered


def cell_value(cells: npt.NDArray[np.float64], place: float, size: float, stride: int) -> float:
    """The value at `place` of cells that share `size` px equally: linear, or a mean where they are finer than a pixel.

    The mean falls linearly to zero at a pixel's distance.
    """
    cell = size / len(cells)
    centres = (np.arange(len(cells)) + 0.5) * cell
    if cell >= stride:
        return float(np.interp(place, centres, cells))
    weights = np.array([max(0.0, 1 - abs(place - c) / stride) for c in centres])
    return float((weights * cells).sum() / weights.sum())


def coarsen_by_pixel(values: npt.NDArray[np.float32], covered: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Mean over the covered pixels of each 2 x 2; 0 where there is none."""
    height, width = values.shape
    out = np.zeros(((height + 1) // 2, (width + 1) // 2))
    for i, j in np.ndindex(out.shape):
        block = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
        chosen = [float(v) for v in values[block][covered[block]]]
        out[i, j] = sum(chosen) / len(chosen) if chosen else 0.0
    return out
