"""The parts of a slide that are explained: tissue masks, quality, annotations, stain, and the grid of patches.

This room sees thumbnails and areas, never a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.tissue.masks import Shares

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 1 << 16  # patches whose boxes are in memory at once


@dataclass(frozen=True)
class PatchGrid:
    """A regular grid from (0, 0) that covers a whole slide; the last patches reach beyond its edges.

    Attributes:
        slide_px: (height, width) of level 0.
        footprint: (height, width) of a patch in level-0 px; generally not integers.
        step: distance from one patch to the next in level-0 px, (y, x).
    """

    slide_px: tuple[int, int]
    footprint: tuple[float, float]
    step: tuple[float, float]

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns of patches."""
        rows, columns = (
            1 + math.ceil(max(0.0, size - patch) / step - 1e-9)
            for size, patch, step in zip(self.slide_px, self.footprint, self.step, strict=True)
        )
        return rows, columns

    def positions(self, axis: int) -> NDArray[np.int64]:
        """Return the level-0 px of the patches' top (axis 0) or left (axis 1) edges, int64.

        Each is rounded from its exact position, so that errors do not add up over the slide.
        """
        return np.round(np.arange(self.shape[axis]) * self.step[axis]).astype(np.int64)


@dataclass(frozen=True)
class Patches:
    """The chosen patches, in working order.

    Attributes:
        yx: int64 [n, 2], level-0 px of the top left corners.
        tissue: float32 [n], share of the patch, as far as it lies on the slide, that is tissue to be explained.
        pen: float32 [n], the same for ink.
        glass: float32 [n], the same for what is neither tissue nor ink.
    """

    yx: NDArray[np.int64]
    tissue: NDArray[np.float32]
    pen: NDArray[np.float32]
    glass: NDArray[np.float32]


def patch_grid(
    slide_px: tuple[int, int],
    slide_mpp: tuple[float, float],
    patch_px: tuple[int, int],
    mpp: float,
    stride_px: tuple[int, int],
) -> PatchGrid:
    """Return the grid of patches of `patch_px` pixels at `mpp`, `stride_px` patch pixels apart.

    >>> grid = patch_grid((1000, 2000), (0.25, 0.25), (224, 224), 0.5, (224, 224))
    >>> grid.footprint, grid.shape
    ((448.0, 448.0), (3, 5))

    Raises:
        ConfigError: a stride that leaves gaps or does not advance.
    """
    for stride, size in zip(stride_px, patch_px, strict=True):
        if not 1 <= stride <= size:
            raise ConfigError(
                f"stride is {stride} px, expected 1 to the patch's {size} px: with gaps, skipped tissue "
                "would look like glass"
            )
    scale = (mpp / slide_mpp[0], mpp / slide_mpp[1])
    return PatchGrid(
        slide_px,
        (patch_px[0] * scale[0], patch_px[1] * scale[1]),
        (stride_px[0] * scale[0], stride_px[1] * scale[1]),
    )


def choose_patches(
    grid: PatchGrid,
    mask: NDArray[np.bool_],
    min_tissue: float,
    block_px: int,
    pen: NDArray[np.bool_] | None = None,
    glass: NDArray[np.bool_] | None = None,
) -> Patches:
    """Return the patches with at least `min_tissue` of their area on tissue (and more than none), in working order.

    The masks cover the whole slide. `mask` is the tissue; without `pen` there is no ink, without `glass` the rest is
    glass. If a patch reaches beyond the slide, only the part on the slide counts, so that a strip of tissue along the
    edge is not left out.

    Order: by the blocks of `block_px` x `block_px` level-0 px that contain the top left corner, row by row; within a
    block, row by row. So reads stay local, and a block of the heatmap needs only a few runs of patches: its own and a
    rim above and to the left.
    """
    ys, xs = grid.positions(0), grid.positions(1)
    on_tissue = Shares(mask)
    places: list[NDArray[np.int64]] = []
    shares: list[NDArray[np.float32]] = []
    for y in ys:  # a row at a time: the boxes of a whole 100-gigapixel grid would be 300 MB
        row = np.stack([np.full(len(xs), y), xs], axis=1)
        share = on_tissue.of(_boxes(grid, row, mask.shape))
        keep = (share >= min_tissue) & (share > 0)
        places.append(row[keep])
        shares.append(share[keep])
    yx, tissue = np.concatenate(places), np.concatenate(shares)
    order = np.lexsort((yx[:, 1], yx[:, 0], yx[:, 1] // block_px, yx[:, 0] // block_px))
    yx, tissue = yx[order], tissue[order]
    ink = np.zeros(len(yx), np.float32) if pen is None else _shares(grid, yx, pen)
    return Patches(yx, tissue, ink, _shares(grid, yx, ~mask if glass is None else glass))


def patches_at(
    boxes: NDArray[np.float64],
    slide_px: tuple[int, int],
    mask: NDArray[np.bool_],
    pen: NDArray[np.bool_],
    glass: NDArray[np.bool_],
) -> Patches:
    """Return patches at given places, in the given order: float64 [n, 4], y, x, height, width in level-0 px."""
    scale = np.array(mask.shape) / np.array(slide_px)
    ends = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) * np.tile(scale, 2)
    inside = np.clip(ends, 0, np.tile(mask.shape, 2))
    return Patches(np.round(boxes[:, :2]).astype(np.int64), *(Shares(each).of(inside) for each in (mask, pen, glass)))


def _boxes(grid: PatchGrid, yx: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the patches, clipped to the slide, in pixels of a mask of `shape`, float64 [n, 4]."""
    scale = np.array([shape[0] / grid.slide_px[0], shape[1] / grid.slide_px[1]])
    end = np.minimum((yx + np.array(grid.footprint)) * scale, shape)
    return np.concatenate([yx * scale, end], axis=1)


def _shares(grid: PatchGrid, yx: NDArray[np.int64], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the share of each patch that lies in the mask, float32 [n]."""
    inside = Shares(mask)
    parts = [inside.of(_boxes(grid, yx[i : i + CHUNK], mask.shape)) for i in range(0, len(yx), CHUNK)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
