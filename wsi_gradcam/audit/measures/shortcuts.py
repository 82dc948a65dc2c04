"""Shortcuts: does the answer depend on ink, glass, blur, folds or borders?

Attribution on such a region is a correlation. Hiding it is an experiment: the answer must change more than if as much
is hidden elsewhere.

`suspects` finds such regions. Colours are judged at the resolution at which the rules were measured, about 8 um per
pixel; edges of masks are as coarse. Rulers, folds and other things are given as masks by people who know about them.
Folds are not searched for: the published rule compares saturation and intensity with the rest of a whole slide (Kothari
2013, 10.4103/2153-3539.117448; it finds half of them). Within a patch, with a threshold that 1 in 100 pixels of flat
tissue reaches, less than a fifth of doubled tissue was found, and none of another laboratory's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

from wsi_gradcam.audit.measures.removal import Replace, answers_without
from wsi_gradcam.audit.measures.subject import Aim, Subject, predicted_classes
from wsi_gradcam.audit.schema import BLUR, BORDER, GLASS, PEN
from wsi_gradcam.tissue.masks import HIGHEST, MASK_MPP
from wsi_gradcam.tissue.quality import measure_blur, pen_mask

if TYPE_CHECKING:
    from wsi_gradcam.audit.measures.bags import BagSubject

CONTROLS = 8
PLACES = 8  # places that are tried for each
TOUCHING = 1.5  # at most this many sides of a patch lie between the corners of neighbours, diagonal ones included
GLASS_GRAIN = 2.0  # noise on pure glass, in grey levels

WINDOWS = 4  # per side: blur is judged in windows of a quarter of the patch
SMALLEST_WINDOW_PX = 24
# At most 0.1% of windows of 56 px of sharp tissue (four sources, two magnifications) are above this; of those blurred
# by a Gaussian of 3 px, 9 in 10 are, and about half of those blurred by 2 px. Nearly flat windows tell nothing, and
# count as sharp.
BLURRED = 0.45
BORDER_SHARE = 1 / 14  # share of the side: half a cell of 7 x 7
SMALLEST_PEN_PX, PEN_EDGE_PX = 4, 2  # pixels of 8 um: further away, tissue beside a stroke would be taken for its edge

Rgb = NDArray[np.uint8]
Masks = NDArray[np.bool_]
Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Masking:
    """The effects of hiding a region in P patches; NaN for a patch without the region, or with nothing else.

    Attributes:
        change: [P] explained scalar without the region minus with it.
        control_changes: [P, C] the same for equal areas elsewhere.
        flips: [P] 1 if another class is predicted without the region, else 0.
        control_flips: [P] share of the equal areas for which the same is true.
    """

    change: Numbers
    control_changes: Numbers
    flips: Numbers
    control_flips: Numbers

    @property
    def size(self) -> Numbers:
        """The absolute change, [P]."""
        return np.abs(self.change)

    @property
    def control_size(self) -> Numbers:
        """The mean absolute change for equal areas, [P]."""
        size: Numbers = np.abs(self.control_changes).mean(axis=1)
        return size


def masking(
    subject: Subject, images: Tensor, aim: Aim, masks: Masks, replace: Replace, controls: int = CONTROLS, seed: int = 0
) -> Masking:
    """Return the effects of hiding `masks` bool [P, H, W] in images [P, 3, H, W], against equal areas elsewhere.

    The control for a mask is the mask itself, elsewhere in the patch, with the same area and shape: see `moved_masks`.

    Args:
        replace: what is put in place of hidden pixels, see `wsi_gradcam.audit.measures.removal`.
        controls: areas for each patch.
    """
    hidden = torch.from_numpy(np.stack([masks, *moved_masks(masks, controls, seed)])).to(images.device)
    answers = torch.stack([answers_without(subject, replace, mask) for mask in hidden], dim=1)
    changes = (aim.logit(answers) - aim.logit(aim.logits)[:, None]).cpu().double().numpy()
    flips = (predicted_classes(answers) != predicted_classes(aim.logits)[:, None]).cpu().double().numpy()
    share = masks.mean(axis=(1, 2))
    for values in (changes, flips):
        values[(share == 0) | (share == 1)] = np.nan
    return Masking(changes[:, 0], changes[:, 1:], flips[:, 0], flips[:, 1:].mean(axis=1))


def moved_masks(masks: Masks, controls: int, seed: int = 0) -> Masks:
    """Return masks [C, P, H, W] moved within the patch, each to the random place where it overlaps least with itself.

    If it were wrapped around the border, a mask would hide less of the middle than the original does. It is wrapped
    only if it is longer than half of the patch, because otherwise it could hardly move. The random numbers are the same
    for all patches, so that batches do not matter.
    """
    places = np.random.default_rng(seed).random((controls, PLACES, 2))
    moved: Masks = np.array([[_moved(mask, some) for mask in masks] for some in places])
    return moved


def _moved(mask: Masks, places: Numbers) -> Masks:
    """Return a mask [H, W] at the one of `places` [n, 2], 0 to 1 of the free way, where it overlaps itself least."""
    if not mask.any():
        return mask
    ways = np.stack([_ways(np.nonzero(mask)[i], mask.shape[i], places[:, i]) for i in (0, 1)], axis=1)
    moved = [np.roll(mask, way, axis=(0, 1)) for way in ways.tolist()]
    return min(moved, key=lambda other: int((other & mask).sum()))


def _ways(inside: NDArray[np.int64], size: int, places: Numbers) -> NDArray[np.int64]:
    """Return distances to move along an axis of `size` pixels, where the mask covers those `inside`."""
    first = int(inside.min())
    length = int(inside.max()) + 1 - first
    ways = places * size if 2 * length > size else np.floor(places * (size - length + 1)) - first
    return np.asarray(ways, np.int64)


def mass_on(maps: NDArray[np.float32], masks: Masks) -> tuple[Numbers, Numbers]:
    """Return (share of the positive attribution of maps [P, h, w] on masks [P, H, W], share of the area), [P] each.

    A cell counts by how much of it the mask covers. The first is NaN if nothing is positive.
    """
    cells = cover(masks, (maps.shape[1], maps.shape[2]))
    positive = np.maximum(maps, 0).astype(np.float64)
    total = positive.sum(axis=(1, 2))
    mass = np.divide((positive * cells).sum(axis=(1, 2)), total, out=np.full(len(maps), np.nan), where=total > 0)
    return mass, cells.mean(axis=(1, 2))


def cover(masks: Masks, grid: tuple[int, int]) -> Numbers:
    """Return the share of each cell of `grid` that masks [P, H, W] cover, [P, h, w]; cells may end within pixels."""
    rows, columns = (_overlap(size, cells) for size, cells in zip(masks.shape[1:], grid, strict=True))
    shares: Numbers = rows @ masks.astype(np.float64) @ columns.T
    return shares


def input_masks(
    masks: Masks, size: tuple[int, int], view: tuple[float, float, float, float], patch_px: tuple[int, int]
) -> Masks:
    """Return masks [P, h, w] of patches of `patch_px` as the network sees them at `size`: the nearest pixel of each.

    `view` is (y, x, height, width) of the part of a patch that it sees.
    """
    top, left, view_height, view_width = view
    scale = masks.shape[1] / patch_px[0], masks.shape[2] / patch_px[1]
    rows = ((top + (torch.arange(size[0]) + 0.5) * view_height / size[0]) * scale[0]).long().clamp(0)
    columns = ((left + (torch.arange(size[1]) + 0.5) * view_width / size[1]) * scale[1]).long().clamp(0)
    rows, columns = rows.clamp(max=masks.shape[1] - 1), columns.clamp(max=masks.shape[2] - 1)
    found: Masks = masks[:, rows.numpy()[:, None], columns.numpy()[None]]
    return found


def border(size: tuple[int, int], width_px: int) -> NDArray[np.bool_]:
    """Return the outer `width_px` pixels of a patch of `size`, bool [H, W]."""
    found = np.ones(size, np.bool_)
    found[width_px : size[0] - width_px, width_px : size[1] - width_px] = False
    return found


def glass_patches(colour: tuple[int, int, int], patch_px: tuple[int, int], count: int, seed: int) -> NDArray[np.uint8]:
    """Return patches of bare glass, uint8 [count, h, w, 3]: one colour with the grain of a scanner."""
    grain = np.random.default_rng(seed).normal(0, GLASS_GRAIN, (count, *patch_px, 3))
    return (np.array(colour) + grain).round().clip(0, 255).astype(np.uint8)


def _overlap(size: int, cells: int) -> Numbers:
    """Return the share of each cell that each pixel makes up, [cells, size]; rows sum to 1."""
    edges = np.arange(cells + 1) * size / cells
    pixel = np.arange(size)
    part = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    shares: Numbers = np.maximum(part, 0) * cells / size
    return shares


def suspects(rgb: Rgb, mpp: float, glass: tuple[int, int, int] = (255, 255, 255)) -> dict[str, Masks]:
    """Return masks bool [P, h, w] by suspect, for patches uint8 [P, h, w, 3]; they may overlap.

    Args:
        mpp: micrometres per pixel of the patches.
        glass: the colour of the slide's bare glass, see `wsi_gradcam.tissue.masks.glass_colour`.
    """
    size, side = (rgb.shape[1], rgb.shape[2]), max(1, round(MASK_MPP / mpp))
    coarse = block_means(rgb, side)
    pen = np.stack([pen_mask(patch, SMALLEST_PEN_PX, PEN_EDGE_PX) for patch in coarse])
    bare = glass_of(coarse, glass)
    large = partial(spread_out, side=side, size=size)
    return {
        PEN: large(pen),
        GLASS: large(bare & ~pen),
        BLUR: blurred_windows(rgb) & ~large(bare),
        BORDER: np.broadcast_to(border(size, max(1, round(BORDER_SHARE * min(size)))), rgb.shape[:3]),
    }


def glass_of(rgb: Rgb, glass: tuple[int, int, int]) -> Masks:
    """Return which pixels of RGB uint8 [..., 3] are as close to `glass` as bare glass in all channels, bool [...]."""
    difference = np.abs(rgb.astype(np.int16) - np.array(glass, np.int16)).max(axis=-1)
    near: Masks = difference <= HIGHEST * 255
    return near


def blurred_windows(rgb: Rgb) -> Masks:
    """Return the windows of a quarter of the side that `tissue.quality.measure_blur` finds blurred, bool [P, h, w]."""
    height, width = rgb.shape[1:3]
    windows = max(1, min(WINDOWS, min(height, width) // SMALLEST_WINDOW_PX))
    found = np.zeros(rgb.shape[:3], np.bool_)
    for y in range(windows):
        for x in range(windows):
            rows, columns = _part(height, y, windows), _part(width, x, windows)
            blur = measure_blur(np.ascontiguousarray(rgb[:, rows, columns]))
            found[:, rows, columns] = (blur > BLURRED)[:, None, None]
    return found


def block_means(rgb: Rgb, side: int) -> Rgb:
    """Return means of blocks of `side` pixels, uint8 [P, ceil(h / side), ceil(w / side), 3]; borders repeat."""
    height, width = rgb.shape[1:3]
    padded = np.pad(rgb, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    blocks = padded.reshape(len(rgb), padded.shape[1] // side, side, padded.shape[2] // side, side, 3)
    means: Rgb = blocks.mean(axis=(2, 4), dtype=np.float32).round().astype(np.uint8)
    return means


def spread_out(masks: Masks, side: int, size: tuple[int, int]) -> Masks:
    """Return masks [P, h, w] of blocks of `side` pixels, for patches of `size`."""
    large: Masks = masks.repeat(side, axis=1).repeat(side, axis=2)[:, : size[0], : size[1]]
    return large


def _part(size: int, number: int, parts: int) -> slice:
    return slice(size * number // parts, size * (number + 1) // parts)


def equal_areas(removed: Masks, places: Numbers | None, draws: int, seed: int) -> Masks | None:
    """Return masks [draws, N] of as many patches elsewhere as in `removed` [N]; None if there are not that many.

    If positions are known, each connected area has a counterpart: the patches nearest to a random one. Scattered
    patches would be a mean of the whole slide, which no region is.

    Args:
        places: [N, 2] of the patches, in units of their sides; None draws patches one by one.
    """
    free = ~removed
    size = int(removed.sum())
    if not size or free.sum() < size:
        return None
    random = np.random.default_rng(seed)
    found = np.zeros((draws, len(removed)), np.bool_)
    sizes = [1] * size if places is None else areas_of(places[removed])
    for mask in found:
        left = free.copy()
        for area in sizes:
            rows = np.flatnonzero(left)
            centre = rows[random.integers(len(rows))]
            if places is None or area == 1:
                near = np.array([centre])
            else:
                distance = ((places[rows] - places[centre]) ** 2).sum(axis=1)
                near = rows[np.argsort(distance, kind="stable")[:area]]
            mask[near], left[near] = True, False
    return found


def areas_of(places: Numbers) -> list[int]:
    """Return the sizes of connected areas of patches at `places` [n, 2], in units of their sides, largest first."""
    pairs = cKDTree(places).query_pairs(TOUCHING, output_type="ndarray")
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(places), len(places)))
    _, member = connected_components(graph, directed=False)
    return sorted(np.bincount(member).tolist(), reverse=True)


@dataclass(frozen=True)
class Removal:
    """The effects of removing some patches, against equal areas elsewhere.

    Attributes:
        drop: drop of the explained scalar, signed: with all patches minus without these.
        control_drop, control_size: mean of the same for equal areas, and of its absolute value.
        flips: 1 if the answer changes, else 0; NaN if there is no answer.
        control_flips: the share of the equal areas for which that is true.
    """

    drop: float
    control_drop: float
    control_size: float
    flips: float
    control_flips: float


def removal(subject: BagSubject, removed: Masks, elsewhere: Masks) -> Removal:
    """Return the effects of removing the patches in a mask [N], against masks [draws, N] elsewhere."""
    logits = subject.without(np.concatenate([removed[None], elsewhere]))
    drops = float(subject.scalar(subject.logits)) - subject.scalar(logits)
    before, after = subject.says_so(subject.logits), subject.says_so(logits)
    flips = np.full(len(drops), np.nan) if after is None else (after != before).astype(np.float64)
    return Removal(
        float(drops[0]),
        float(drops[1:].mean()),
        float(np.abs(drops[1:]).mean()),
        float(flips[0]),
        float(flips[1:].mean()),
    )


def relevance_on(relevance: Numbers, mask: Masks) -> float:
    """Return the share of the positive relevance [N] on the patches in a mask; NaN if nothing is positive."""
    positive = np.maximum(np.nan_to_num(relevance), 0)
    total = float(positive.sum())
    return float(positive[mask].sum() / total) if total > 0 else float("nan")
