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


def one_by_one(method: Callable[[Tensor, Tensor], list[list[float]]], A: Tensor, g: Tensor) -> Tensor:
    """Maps [B, h, w] in float64 of a `method` that gets one image's activation and gradient [K, h, w]."""
    maps = [method(a, b) for a, b in zip(A.double(), g.double(), strict=True)]
    return torch.tensor(maps, dtype=torch.float64)


def weighted_sum(weights: list[float], A: Tensor) -> list[list[float]]:
    """sum_k w_k A_k of one image, cell by cell."""
    _, height, width = A.shape
    return [[sum(w * float(A[k, y, x]) for k, w in enumerate(weights)) for x in range(width)] for y in range(height)]


def cells_of(channel: Tensor) -> list[float]:
    """The values of a map [h, w] as plain numbers."""
    return [float(value) for value in channel.flatten()]


def gradcam_of_image(A: Tensor, g: Tensor) -> list[list[float]]:
    """Grad-CAM of one image."""
    return weighted_sum([sum(cells_of(channel)) / channel.numel() for channel in g], A)


def cam_of_image(A: Tensor, g: Tensor) -> list[list[float]]:
    """CAM of one image with pooling and a linear layer: the gradient of one cell times the cells is W."""
    return weighted_sum([float(channel[0, 0]) * channel.numel() for channel in g], A)


def gradcam_plus_plus_of_image(A: Tensor, g: Tensor) -> list[list[float]]:
    """Grad-CAM++ of one image, with alpha written as in the paper."""
    weights = []
    for activations, gradients in zip(A, g, strict=True):
        total, weight = sum(cells_of(activations)), 0.0
        for value in cells_of(gradients):
            if value > 0:  # relu(g) is 0 elsewhere
                weight += value**2 / (2 * value**2 + total * value**3) * value
        weights.append(weight)
    return weighted_sum(weights, A)


def hirescam_of_image(A: Tensor, g: Tensor) -> list[list[float]]:
    """HiResCAM of one image."""
    channels, height, width = A.shape
    return [
        [sum(float(A[k, y, x]) * float(g[k, y, x]) for k in range(channels)) for x in range(width)]
        for y in range(height)
    ]


def layercam_of_image(A: Tensor, g: Tensor) -> list[list[float]]:
    """LayerCAM of one image."""
    channels, height, width = A.shape
    return [
        [sum(float(A[k, y, x]) * max(0.0, float(g[k, y, x])) for k in range(channels)) for x in range(width)]
        for y in range(height)
    ]


def xgradcam_of_image(A: Tensor, g: Tensor) -> list[list[float]]:
    """XGrad-CAM of one image."""
    weights = []
    for activations, gradients in zip(A, g, strict=True):
        total = sum(cells_of(activations))
        products = [a * b for a, b in zip(cells_of(activations), cells_of(gradients), strict=True)]
        weights.append(sum(products) / total if total != 0 else 0.0)
    return weighted_sum(weights, A)


def eigencam_of_image(A: Tensor, g: Tensor) -> list[list[float]]:
    """Eigen-CAM of one image by a full singular value decomposition."""
    cells = np.array([cells_of(channel) for channel in A]).T
    direction = np.linalg.svd(cells)[2][0]
    weights = direction if direction.sum() >= 0 else -direction
    return weighted_sum([float(w) for w in weights], A)


def finer_by_hand(logits: list[float], own: int, gamma: float, compared: int) -> float:
    """Finer-CAM's score of one image."""
    others = sorted((abs(value - logits[own]), d) for d, value in enumerate(logits) if d != own)[:compared]
    shares = [math.exp(logits[d] - max(logits)) for _, d in others]
    differences = [logits[own] - gamma * logits[d] for _, d in others]
    return sum(p * s for p, s in zip(shares, differences, strict=True)) / sum(shares)


def enlarged_by_pixel(cells: Tensor, height: int, width: int) -> Tensor:
    """A map [h, w] in another size, bilinear, pixel by pixel; outermost cells reach to the edge."""
    out = torch.empty(height, width, dtype=torch.float64)
    for i, j in np.ndindex(height, width):
        value = 0.0
        place = [
            min(max((p + 0.5) * n / size - 0.5, 0.0), n - 1.0)
            for p, n, size in zip((i, j), cells.shape, (height, width), strict=True)
        ]
        low = [math.floor(p) for p in place]
        for dy, dx in np.ndindex(2, 2):
            weight = 1.0
            for d, p, start in zip((dy, dx), place, low, strict=True):
                weight *= p - start if d else 1 - (p - start)
            if weight:
                value += weight * float(cells[low[0] + dy, low[1] + dx])
        out[i, j] = value
    return out


def scorecam_by_hand(model: Callable[[Tensor], Tensor], image: Tensor, A: Tensor, index: int) -> list[list[float]]:
    """Score-CAM of one image [3, H, W] with maps [K, h, w]."""
    scores = []
    for channel in A:
        mask = enlarged_by_pixel(channel, *image.shape[1:])
        span = float(mask.max() - mask.min())
        mask = (mask - mask.min()) / span if span > 0 else mask * 0
        with torch.no_grad():
            scores.append(float(model((image.double() * mask).float()[None])[0, index]))
    shares = [math.exp(score - max(scores)) for score in scores]
    return weighted_sum([share / sum(shares) for share in shares], A)


def ablationcam_by_hand(head: Callable[[Tensor], Tensor], A: Tensor, index: int) -> list[list[float]]:
    """Ablation-CAM of one image's maps [K, h, w]."""
    with torch.no_grad():
        whole = float(head(A.clone()[None])[0, index])
        weights = []
        for k in range(len(A)):
            kept = torch.stack([channel * 0 if i == k else channel for i, channel in enumerate(A)])
            weights.append(whole - float(head(kept[None])[0, index]))
    return weighted_sum(weights, A)


def occlusion_by_hand(
    model: Callable[[Tensor], Tensor], image: Tensor, index: int, window: float, stride: float
) -> list[list[float]]:
    """What windows centred on squares of `stride` px hide of one image's logit."""

    def hidden(size: int, place: int) -> list[int]:
        return [p for p in range(size) if -window / 2 < p + 0.5 - (place + 0.5) * stride <= window / 2]

    _, height, width = image.shape
    rows = []
    with torch.no_grad():
        whole = float(model(image[None])[0, index])
        for i in range(round(height / stride)):
            row = []
            for j in range(round(width / stride)):
                changed = image.clone()
                for y in hidden(height, i):
                    changed[:, y, hidden(width, j)] = 0
                row.append(whole - float(model(changed[None])[0, index]))
            rows.append(row)
    return rows


def input_gradient(model: Callable[[Tensor], Tensor], image: Tensor, index: int) -> Tensor:
    """The gradient [3, H, W] of one image's logit."""
    leaf = image[None].clone().requires_grad_(True)
    model(leaf)[0, index].backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad[0]


def strongest_colour(gradients: Tensor) -> Tensor:
    """The largest absolute value over colours, [3, H, W] to [H, W]."""
    red, green, blue = gradients.abs().unbind()
    return torch.maximum(red, torch.maximum(green, blue))


def smoothgrad_by_hand(
    model: Callable[[Tensor], Tensor], image: Tensor, index: int, samples: int, spread: float, seed: int
) -> Tensor:
    """SmoothGrad [H, W] of one image."""
    generator = torch.Generator().manual_seed(seed)
    deviation = spread * float(image.max() - image.min())
    gradients = []
    for _ in range(samples):
        noise = torch.randn(image.shape, generator=generator)
        gradients.append(input_gradient(model, image + deviation * noise, index))
    return strongest_colour(torch.stack(gradients).mean(dim=0))


def integrated_by_hand(
    model: Callable[[Tensor], Tensor], image: Tensor, index: int, rule: list[tuple[float, float]]
) -> Tensor:
    """Integrated Gradients [H, W] of one image from zeros, with places from 0 to 1 and their weights."""
    gradients = [weight * input_gradient(model, image * place, index) for place, weight in rule]
    return (image * torch.stack(gradients).sum(dim=0)).sum(dim=0)


def guided_by_hand(model: torch.nn.Module, image: Tensor, index: int) -> Tensor:
    """Guided backpropagation [3, H, W] of one image: each ReLU's output loses the negative part of its gradient."""

    def clip(module: torch.nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[no-untyped-call]

    handles = [m.register_forward_hook(clip) for m in model.modules() if isinstance(m, torch.nn.ReLU)]
    try:
        return input_gradient(model, image, index)
    finally:
        for handle in handles:
            handle.remove()


def layer_and_gradient(
    network: torch.nn.Module, layer: str, image: Tensor, score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """What a layer returned for one image [3, H, W], and the gradient of a score of the logits.

    The whole network runs with a graph; later in-place operations get a copy.
    """
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = network.get_submodule(layer).register_forward_hook(keep)
    try:
        scalar = score(network(image[None].clone().requires_grad_(True)))
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(scalar.sum(), kept[0])
    return kept[0].detach(), gradient
