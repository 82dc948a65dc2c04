"""What the model makes of patches: the contributions of places to its answer, and the answer with some of them covered.

A place is a cell of the explained layer in a patch. Its contributions are activation times gradient, a number for each
channel, whose sum is the cell of the map (HiResCAM, arXiv 2011.08891); where a mean and a linear layer follow, the sum
of all cells is the logit but for its bias. What kind of evidence a place is says the direction of that vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wsi_gradcam.audit.measures.removal import mean_colour, replace_by
from wsi_gradcam.audit.measures.sanity import random_answers
from wsi_gradcam.audit.measures.shortcuts import cover, masking, suspects
from wsi_gradcam.audit.measures.subject import Aim, Subject
from wsi_gradcam.cam.engine import gradients
from wsi_gradcam.cam.targets import make_score
from wsi_gradcam.cam.trunks import exact

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.folder import Arrays
    from wsi_gradcam.cam.engine import AnyTarget
    from wsi_gradcam.evidence.clusters import Kinds

    Rgb = NDArray[np.uint8]
    Masks = NDArray[np.bool_]
    Floats = NDArray[np.float64]

# A batch is always of this size, filled up where need be: for others torch chooses other kernels, whose sums differ.
BATCH_SIZE = 16
CELLS = 4  # places that are drawn from a patch
EVENLY = 0.5  # of the draws go to any cell, the others to where the contributions are
CONTROLS = 4  # equal areas elsewhere, for each patch that is covered


@dataclass(frozen=True, eq=False)
class Seen:
    """Patches as they are on the slide, and as the model sees them.

    Attributes:
        raw: uint8 [P, h, w, 3] of the slide; what is ink, glass or blur is judged by it.
        rgb: the same with the stain that the model wants.
        mpp: micrometres per pixel.
        glass: RGB of the slide's bare glass.
        seeds: one for each patch.
        shown: returns masks [P, h, w] of patches as the network sees them, [P, H, W].
    """

    raw: Rgb
    rgb: Rgb
    mpp: float
    glass: tuple[int, int, int]
    seeds: Sequence[int]
    shown: Callable[[Masks], Masks] = lambda masks: masks


@torch.enable_grad()
def contributions(subject: Subject, images: Tensor, target: AnyTarget) -> tuple[Tensor, Tensor]:
    """Return logits [P, K] of images and the contribution of each channel in each cell to the target, [P, C, h, w]."""
    answers, parts = [], []
    layout = subject.program.layers[0].layout
    with exact(images.device):
        for some in _filled(images):
            done = subject.program.forward(some)
            (gradient, *_) = next(gradients(done.logits, [make_score(target, done.logits)], done.values[:1]))
            answers.append(done.logits.detach())
            parts.append((layout.to_map(done.values[0].detach()) * layout.to_map(gradient)).detach())
    count = len(images)
    return torch.cat(answers)[:count], torch.cat(parts)[:count]


def _filled(images: Tensor) -> Sequence[Tensor]:
    """Return batches of one size; the last image stands for what is missing."""
    missing = -len(images) % BATCH_SIZE
    return torch.split(torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]), BATCH_SIZE)


def describe(subject: Subject, seen: Seen, target: AnyTarget, cells: int = CELLS) -> Arrays:
    """Return what patches are (`patch/...`, [P]), and the places that are drawn from them (`place/...`, [n]).

    Cells are drawn with a probability that grows with their contribution, and each stands for as many others as that
    makes just: weighted sums over places are those over all cells, on average.
    """
    logits, parts = contributions(subject, subject.images(seen.rgb), target)
    grid = (parts.shape[2], parts.shape[3])
    values = parts.sum(dim=1).flatten(1).double().cpu().numpy()
    rows, chosen, weights = draw_cells(values, seen.seeds, cells)
    features = parts.flatten(2)[torch.from_numpy(rows), :, torch.from_numpy(chosen)].float().cpu().numpy()
    length = np.linalg.norm(features, axis=1, keepdims=True)
    aim = Aim(target, logits, subject.model.activation)
    probability = aim.probability(logits)
    found: Arrays = {
        "patch/logits": logits.float().cpu().numpy(),
        "patch/logit": aim.logit(logits).double().cpu().numpy(),
        "place/patch": rows,
        "place/cell": chosen,
        "place/value": values[rows, chosen],
        "place/weight": weights,
        "place/features": np.divide(features, length, out=np.zeros_like(features), where=length > 0).astype(np.float16),
    }
    if probability is not None:
        found["patch/probability"] = probability.double().cpu().numpy()
    for name, masks in suspects(seen.raw, seen.mpp, seen.glass).items():
        covered = cover(seen.shown(masks), grid).reshape(len(values), -1)
        found[f"suspect/{name}"] = covered[rows, chosen].astype(np.float32)
    return found


def draw_cells(values: Floats, seeds: Sequence[int], cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Return (patch, cell, weight) of the cells that are drawn from each patch, `values` [P, n] being contributions.

    `cells` draws of a patch, half of them in proportion to the size of the contribution (all evenly where there is
    none). A cell that is drawn k times weighs k / (cells * its probability): unbiased (Hansen and Hurwitz 1943).
    """
    rows, chosen, weights = [], [], []
    for row, (own, seed) in enumerate(zip(np.abs(values), seeds, strict=True)):
        size, total = len(own), float(own.sum())
        even = np.full(size, 1 / size)
        share = EVENLY * even + (1 - EVENLY) * (own / total if total > 0 else even)
        drawn = np.random.default_rng(seed).choice(size, cells, p=share / share.sum())
        unique, times = np.unique(drawn, return_counts=True)
        rows.append(np.full(len(unique), row))
        chosen.append(unique)
        weights.append(times / (cells * share[unique]))
    return np.concatenate(rows), np.concatenate(chosen), np.concatenate(weights)


def probe(subject: Subject, rgb: Rgb, seed: int) -> NDArray[np.float32]:
    """Return answers [P, draws, K] of copies of the model with random weights; see `sanity.random_answers`."""
    answers = random_answers(subject, subject.images(rgb), seed=seed)
    return answers.swapaxes(0, 1).float().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Sorted:
    """Patches with all their cells sorted into kinds.

    Attributes:
        logits: [P, K].
        map: [P, h, w] sum of the contributions.
        kinds: [P, h, w] the kind of each cell, -1 where it contributes next to nothing.
    """

    images: Tensor
    logits: Tensor
    map: NDArray[np.float32]
    kinds: NDArray[np.int64]


def sort_cells(subject: Subject, rgb: Rgb, target: AnyTarget, kinds: Kinds) -> Sorted:
    """Return patches with each of their cells sorted into kinds."""
    images = subject.images(rgb)
    logits, parts = contributions(subject, images, target)
    shape = (parts.shape[0], parts.shape[2], parts.shape[3])
    features = parts.flatten(2).transpose(1, 2).flatten(0, 1).float().cpu().numpy()
    values = features.sum(axis=1, dtype=np.float64)
    return Sorted(images, logits, values.reshape(shape).astype(np.float32), kinds.sort(features, values).reshape(shape))


def cover_kinds(
    subject: Subject, patches: Sorted, target: AnyTarget, wanted: Sequence[int], seed: int
) -> tuple[Floats, Floats]:
    """Return (change, change of equal areas) [P] of the explained scalar where the cells of a kind are covered.

    The kind of patch i is `wanted`[i]. What is covered takes the patch's mean colour; areas elsewhere have the same
    form, see `masking`. NaN where the kind is not there, or all there is.
    """
    cells = patches.kinds == np.asarray(wanted)[:, None, None]
    size = patches.images.shape[2:]
    ways = [np.arange(side) * own // side for side, own in zip(size, cells.shape[1:], strict=True)]
    masks = cells[:, ways[0][:, None], ways[1][None]]
    aim = Aim(target, patches.logits, subject.model.activation)
    replace = replace_by(patches.images, mean_colour(patches.images))
    with exact(patches.images.device):
        found = masking(subject, patches.images, aim, masks, replace, CONTROLS, seed)
    return found.change, found.control_changes.mean(axis=1)
