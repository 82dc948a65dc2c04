"""CAMs of patches -> one blended block of the heatmap. Pure arrays, no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from wsi_gradcam.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from wsi_gradcam.geometry import Region

Window = Literal["hann", "uniform"]
# Where a single patch reaches, its own edge value counts in full after division; the floor keeps that division
# well-behaved in float32.
FLOOR = 1e-3
T = TypeVar("T", bound=np.generic)
GROUP = 64  # patches enlarged at once


@dataclass(frozen=True)
class Enlarger:
    """Enlarges CAMs of one size onto heatmap pixels.

    A CAM cell j of `cells` along an axis stands for the j-th equal part of the patch's footprint and its value
    for the centre of that part. A heatmap pixel takes the value at its own centre: linear between cell centres,
    constant beyond the outer ones; where cells are finer than heatmap pixels, a triangle of a pixel's width is
    averaged. A heatmap pixel belongs to the patches whose half-open footprint holds its centre.

    Attributes:
        footprint: (height, width) of a patch in level-0 px.
        cells: (h, w) of a CAM.
        stride: level-0 px per heatmap pixel.
        window: how overlapping patches are weighed: "hann" is sin^2 from edge to edge, "uniform" is 1.
    """

    footprint: tuple[float, float]
    cells: tuple[int, int]
    stride: int
    window: Window = "hann"

    def __post_init__(self) -> None:
        if min(self.footprint) < self.stride:
            raise ConfigError(
                f"a patch covers {min(self.footprint):g} level-0 px, less than one heatmap pixel of {self.stride}; "
                "choose a smaller --heatmap-stride"
            )

    def first(self, start: NDArray[Any]) -> NDArray[np.int64]:
        """Return the index of the first heatmap pixel whose centre is at or after `start` level-0 px."""
        return np.ceil(start / self.stride - 0.5).astype(np.int64)

    def axis(self, axis: int, start: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return interpolation [n, pixels, cells] and blending weights [n, pixels] from `first(start)` on."""
        size, cells = self.footprint[axis], self.cells[axis]
        pixels = int(np.ceil(size / self.stride)) + 1
        index = self.first(start)[:, None] + np.arange(pixels)
        place = ((index + 0.5) * self.stride - start[:, None]) / size  # 0 to 1 inside the patch
        reach = max(1.0, self.stride * cells / size)
        distance = np.abs((place * cells - 0.5)[..., None] - np.arange(cells))
        enlarge = np.maximum(0.0, 1.0 - distance / reach)
        enlarge /= np.maximum(enlarge.sum(axis=2, keepdims=True), 1e-9)
        inside = (place >= 0) & (place < 1)
        weight = np.maximum(np.sin(np.pi * place) ** 2, FLOOR) if self.window == "hann" else np.ones_like(place)
        return enlarge.astype(np.float32), np.where(inside, weight, 0).astype(np.float32)


class Blender:
    """The running weighted mean of what patches say about one block of the heatmap.

    Patches must be added in the same order every time: float sums depend on it, and results must not.
    """

    def __init__(self, enlarger: Enlarger, block: Region) -> None:
        self._enlarger = enlarger
        self._block = block
        self._sum = np.zeros((block.height, block.width), np.float32)
        self._weight = np.zeros_like(self._sum)

    def add(self, yx: NDArray[Any], cams: NDArray[np.float32]) -> None:
        """Add patches at `yx` int64 [n, 2] (level-0 px) with `cams` float32 [n, h, w]."""
        for start in range(0, len(yx), GROUP):
            self._add(yx[start : start + GROUP], cams[start : start + GROUP])

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return (values float32, covered bool), both [height, width] of the block; 0 where nothing covers."""
        covered = self._weight > 0
        return np.divide(self._sum, self._weight, out=np.zeros_like(self._sum), where=covered), covered

    def joined(self, other: Blender) -> Blender:
        """Add what another blender has been given of the same block; return this one."""
        self._sum += other._sum
        self._weight += other._weight
        return self

    def _add(self, yx: NDArray[Any], cams: NDArray[np.float32]) -> None:
        for place, value, weight in self.placements(yx, cams, weighted=True):
            self._sum[place] += value
            self._weight[place] += weight

    def placements(
        self, yx: NDArray[Any], cams: NDArray[np.float32], weighted: bool = False
    ) -> Iterator[tuple[tuple[slice, slice], NDArray[np.float32], NDArray[np.float32]]]:
        """Yield (slices of the block, enlarged CAM there, its weight there) of each patch that meets it, in order.

        With `weighted`, the CAM times its weight.
        """
        rows, row_weight = self._enlarger.axis(0, yx[:, 0])
        columns, column_weight = self._enlarger.axis(1, yx[:, 1])
        values = rows @ cams @ columns.transpose(0, 2, 1)
        weights = row_weight[:, :, None] * column_weight[:, None, :]
        if weighted:
            values *= weights
        tops = self._enlarger.first(yx[:, 0]) - self._block.y
        lefts = self._enlarger.first(yx[:, 1]) - self._block.x
        height, width = values.shape[1:]
        for value, weight, top, left in zip(values, weights, tops.tolist(), lefts.tolist(), strict=True):
            y, x = max(0, top), max(0, left)
            bottom = min(self._block.height, top + height)
            right = min(self._block.width, left + width)
            if y < bottom and x < right:
                here = slice(y - top, bottom - top), slice(x - left, right - left)
                yield (slice(y, bottom), slice(x, right)), value[here], weight[here]


def blend_boxes(
    boxes: NDArray[np.float64], values: NDArray[np.float32], stride: int, block: Region, window: Window = "uniform"
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return (values float32, covered bool), both [height, width], of one value for each patch, blended in a block.

    Patches may lie anywhere and be of any size; where they overlap, each heatmap pixel is their weighted mean.

    Args:
        boxes: float64 [n, 4], y, x, height, width in level-0 px.
        values: float32 [n].
        stride: level-0 px per heatmap pixel.
        block: in heatmap pixels.
        window: as of `Enlarger`.

    Raises:
        ConfigError: a patch is smaller than a heatmap pixel.
    """
    total: Blender | None = None
    near = touching(boxes[:, :2], boxes[:, 2:], stride, block)
    boxes, values = boxes[near], values[near]
    for height, width in np.unique(boxes[:, 2:], axis=0).tolist():
        alike = (boxes[:, 2:] == (height, width)).all(axis=1)
        blender = Blender(Enlarger((height, width), (1, 1), stride, window), block)
        blender.add(boxes[alike, :2], values[alike, None, None])
        total = blender if total is None else total.joined(blender)
    if total is None:
        return np.zeros((block.height, block.width), np.float32), np.zeros((block.height, block.width), np.bool_)
    return total.result()


def touching(
    yx: NDArray[Any], footprint: tuple[float, float] | NDArray[np.float64], stride: int, block: Region
) -> NDArray[np.int64]:
    """Return the indices, ascending, of the patches whose footprint meets `block` (in heatmap px of `stride`).

    The footprint is (height, width), one for all patches or [n, 2].
    """
    y, x = yx[:, 0], yx[:, 1]
    height, width = np.asarray(footprint).T
    rows = (y < block.bottom * stride) & (y + height > block.y * stride)
    columns = (x < block.right * stride) & (x + width > block.x * stride)
    return np.flatnonzero(rows & columns)


def coarsen(values: NDArray[np.float32], covered: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the half-size mean over the covered pixels of each 2 x 2, float32 [..., ceil(h / 2), ceil(w / 2)].

    Pixels that no patch covers do not pull their neighbours towards 0, so edges of tissue do not fade.
    `values` is [h, w], 0 where not `covered`.
    """
    total = _sum2x2(np.where(covered, values, np.float32(0)))
    count = _sum2x2(covered.astype(np.float32))
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def coarsen_flags(flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the half-size bitwise or of each 2 x 2, uint8 [ceil(h / 2), ceil(w / 2)]: no flag is lost from view."""
    padded = _even(flags)
    return padded[::2, ::2] | padded[1::2, ::2] | padded[::2, 1::2] | padded[1::2, 1::2]


def _sum2x2(image: NDArray[np.float32]) -> NDArray[np.float32]:
    padded = _even(image)
    return padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]


def _even(image: NDArray[T]) -> NDArray[T]:
    height, width = image.shape
    return np.pad(image, ((0, height % 2), (0, width % 2)))
