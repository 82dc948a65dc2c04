"""Shortcuts: does the answer hang on ink, glass, blur, folds or borders?

Attribution on such a region is a correlation. Hiding it is an experiment: the answer must change more than when as much
is hidden elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_gradcam.audit.measures.removal import Replace
from wsi_gradcam.audit.measures.subject import Aim, Subject

CONTROLS = 8
PLACES = 8  # tried for each
GLASS_GRAIN = 2.0  # grey levels of noise on pure glass

Masks = NDArray[np.bool_]
Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Masking:
    """What hiding a region does to P patches; NaN for a patch without it, or with nothing else.

    Attributes:
        change: [P] explained scalar without the region less with it.
        control_changes: [P, C] the same for equal areas elsewhere.
        flips: [P] 1 where another class is predicted without the region, else 0.
        control_flips: [P] share of the equal areas of which the same is true.
    """

    change: Numbers
    control_changes: Numbers
    flips: Numbers
    control_flips: Numbers

    @property
    def size(self) -> Numbers:
        """[P] absolute change."""
        return np.abs(self.change)

    @property
    def control_size(self) -> Numbers:
        """[P] mean absolute change of equal areas."""
        size: Numbers = np.abs(self.control_changes).mean(axis=1)
        return size


def masking(
    subject: Subject, images: Tensor, aim: Aim, masks: Masks, replace: Replace, controls: int = CONTROLS, seed: int = 0
) -> Masking:
    """What hiding `masks` bool [P, H, W] does to images [P, 3, H, W], against equal areas elsewhere.

    The control of a mask is the mask itself, elsewhere in the patch: of the same area and shape, see `moved_masks`.

    Args:
        replace: what is put in place of hidden pixels, see `wsi_gradcam.audit.measures.removal`.
        controls: areas for each patch.
    """
    hidden = torch.from_numpy(np.stack([masks, *moved_masks(masks, controls, seed)])).to(images.device)
    rows = torch.arange(len(images), device=images.device)
    answers = torch.stack([_hiding(subject, replace, rows, mask) for mask in hidden], dim=1)
    changes = (aim.logit(answers) - aim.logit(aim.logits)[:, None]).double().cpu().numpy()
    flips = (_predicted(answers) != _predicted(aim.logits)[:, None]).double().cpu().numpy()
    share = masks.mean(axis=(1, 2))
    for values in (changes, flips):
        values[(share == 0) | (share == 1)] = np.nan
    return Masking(changes[:, 0], changes[:, 1:], flips[:, 0], flips[:, 1:].mean(axis=1))


def moved_masks(masks: Masks, controls: int, seed: int = 0) -> Masks:
    """Masks [C, P, H, W] moved within the patch; of several random places, where each overlaps least with itself.

    Cut by the border and wound round it, a mask would hide less of the middle than the whole one does. Only
    where it is longer than half of the patch does it go round, as else it could hardly move. What is drawn is the same
    for all patches, so that batches change nothing.
    """
    places = np.random.default_rng(seed).random((controls, PLACES, 2))
    moved: Masks = np.array([[_moved(mask, some) for mask in masks] for some in places])
    return moved


def _moved(mask: Masks, places: Numbers) -> Masks:
    """A mask [H, W] at that of `places` [n, 2], 0 to 1 along what is free, where it overlaps least with itself."""
    if not mask.any():
        return mask
    ways = np.stack([_ways(np.nonzero(mask)[i], mask.shape[i], places[:, i]) for i in (0, 1)], axis=1)
    moved = [np.roll(mask, way, axis=(0, 1)) for way in ways.tolist()]
    return min(moved, key=lambda other: int((other & mask).sum()))


def _ways(inside: NDArray[np.int64], size: int, places: Numbers) -> NDArray[np.int64]:
    """How far to move along an axis of `size` pixels, of which the mask is on those `inside`."""
    first = int(inside.min())
    length = int(inside.max()) + 1 - first
    ways = places * size if 2 * length > size else np.floor(places * (size - length + 1)) - first
    return np.asarray(ways, np.int64)


def mass_on(maps: NDArray[np.float32], masks: Masks) -> tuple[Numbers, Numbers]:
    """(share of the positive attribution of maps [P, h, w] on masks [P, H, W], the masks' share of the area), [P] each.

    A cell counts by how much of it the mask covers. The first is NaN where nothing is positive.
    """
    cells = cover(masks, (maps.shape[1], maps.shape[2]))
    positive = np.maximum(maps, 0).astype(np.float64)
    total = positive.sum(axis=(1, 2))
    mass = np.divide((positive * cells).sum(axis=(1, 2)), total, out=np.full(len(maps), np.nan), where=total > 0)
    return mass, cells.mean(axis=(1, 2))


def cover(masks: Masks, grid: tuple[int, int]) -> Numbers:
    """The share of each cell of `grid` that masks [P, H, W] cover, [P, h, w]; cells need not be whole pixels."""
    rows, columns = (_overlap(size, cells) for size, cells in zip(masks.shape[1:], grid, strict=True))
    shares: Numbers = rows @ masks.astype(np.float64) @ columns.T
    return shares


def border(size: tuple[int, int], width_px: int) -> NDArray[np.bool_]:
    """The outer `width_px` pixels of a patch of `size`, bool [H, W]."""
    found = np.ones(size, np.bool_)
    found[width_px : size[0] - width_px, width_px : size[1] - width_px] = False
    return found


def glass_patches(colour: tuple[int, int, int], patch_px: tuple[int, int], count: int, seed: int) -> NDArray[np.uint8]:
    """Patches of bare glass, uint8 [count, h, w, 3]: one colour and the grain of a scanner."""
    grain = np.random.default_rng(seed).normal(0, GLASS_GRAIN, (count, *patch_px, 3))
    return (np.array(colour) + grain).round().clip(0, 255).astype(np.uint8)


def _hiding(subject: Subject, replace: Replace, rows: Tensor, hidden: Tensor) -> Tensor:
    parts = zip(torch.split(rows, subject.batch_size), torch.split(hidden, subject.batch_size), strict=True)
    return torch.cat([subject.program.predict(replace(some, mask)).detach() for some, mask in parts])


def _predicted(answers: Tensor) -> Tensor:
    """The class of answers [..., K]; of a single logit, its sign."""
    return answers.argmax(dim=-1) if answers.shape[-1] > 1 else (answers[..., 0] > 0).long()


def _overlap(size: int, cells: int) -> Numbers:
    """How much of each cell each pixel makes up, [cells, size]; rows sum to 1."""
    edges = np.arange(cells + 1) * size / cells
    pixel = np.arange(size)
    part = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    shares: Numbers = np.maximum(part, 0) * cells / size
    return shares
