"""Stability: how far maps, and answers, move when patches change as slides do.

Noise of the camera, strength of the stains, JPEG, and where the grid of patches happens to begin.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor

from wsi_gradcam.audit.measures.subject import Aim, Subject, enlarge, predicted_classes

Rgb = NDArray[np.uint8]
Change = Callable[[Rgb, np.random.Generator], Rgb]
"""A patch uint8 [h, w, 3] -> the patch changed."""

REPEATS = 5
NOISE_LEVELS = 5.0  # standard deviation in grey levels, of 255
STAIN_STRENGTH = 0.2
STAIN_SHIFT = 0.1  # of natural density, in which a nucleus has about 1 and eosin 0.5
JPEG_QUALITY = 50


@dataclass(frozen=True, eq=False)
class Moves:
    """Effects of a change of P patches, over several repeats; NaN where nothing can be said.

    Attributes:
        map_change: [P] largest relative change of the map, max |M(x') - M(x)| / |M(x)|, over the repeats in which the
            prediction stays. NaN where it never stays, or where M(x) is 0.
        logit_change: [P] mean absolute change of the explained scalar.
        flips: [P] share of the repeats in which another class is predicted.
        other_patch: [P] the same relative change, to the map of the patch before it in the same call (of the first, the
            last): as far as a map can reasonably move. NaN where there is one patch alone.
    """

    map_change: NDArray[np.float64]
    logit_change: NDArray[np.float64]
    flips: NDArray[np.float64]
    other_patch: NDArray[np.float64]


def moves(
    subject: Subject,
    rgb: Rgb,
    aim: Aim,
    change: Change,
    method: str = "gradcam",
    repeats: int = REPEATS,
    seeds: Sequence[int] | None = None,
) -> Moves:
    """Return the effects of `change` on patches uint8 [P, h, w, 3], which `aim` is of; raw maps.

    The largest change over small perturbations is the sensitivity of Yeh 2019 (arXiv 1901.09392).

    Args:
        repeats: of the change, with other random numbers.
        seeds: one a patch, so that batches change nothing; their numbers unless told.
    """
    before = subject.maps(subject.images(rgb), aim, method)
    predicted = predicted_classes(aim.logits)
    random = [np.random.default_rng(seed) for seed in (range(len(rgb)) if seeds is None else seeds)]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(repeats):
        images = subject.images(np.stack([change(patch, own) for patch, own in zip(rgb, random, strict=True)]))
        answers = subject.answers(images)
        flipped = predicted_classes(answers) != predicted
        moved = relative_change(before, subject.maps(images, aim, method))
        found.append(
            (moved.masked_fill(flipped, torch.nan), (aim.logit(answers) - aim.logit(aim.logits)).abs(), flipped)
        )
    changes, logits, flips = (torch.stack(part).cpu().double().numpy() for part in zip(*found, strict=True))
    largest = np.where(np.isnan(changes).all(axis=0), np.nan, np.fmax.reduce(changes, axis=0))
    others = relative_change(before, before.roll(1, dims=0)).cpu().double().numpy()
    others = others if len(others) > 1 else np.full_like(others, np.nan)
    return Moves(largest, logits.mean(axis=0), flips.mean(axis=0), others)


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Return |after - before| / |before| [P] of maps [P, h, w], Euclidean; NaN where `before` is 0."""
    size: Tensor = before.flatten(1).norm(dim=1)
    moved: Tensor = (after - before).flatten(1).norm(dim=1)
    return moved / torch.where(size > 0, size, torch.nan)


def noise(patch: Rgb, random: np.random.Generator, levels: float = NOISE_LEVELS) -> Rgb:
    """Return the patch with Gaussian noise of `levels` of 255 on each pixel and colour."""
    return _rounded(patch + random.normal(0, levels, patch.shape))


def stain_jitter(patch: Rgb, random: np.random.Generator, strength: float = STAIN_STRENGTH) -> Rgb:
    """Return the patch with each stain's density times 1 ± `strength`, plus ± `STAIN_SHIFT` times it, uniformly.

    (Tellez 2018, 10.1109/TMI.2018.2820199.) Haematoxylin, eosin and DAB are separated by the matrix of Ruifrok and
    Johnston (2001), on natural optical densities and without clipping, so that a strength of 0 changes nothing.
    """
    scale, shift = strength * random.uniform(-1, 1, (2, 3))
    density = -np.log(np.maximum(patch, 1) / 255.0)
    stains = (density @ hed_from_rgb) * (1 + scale) + STAIN_SHIFT * shift
    return _rounded(255 * np.exp(-stains @ rgb_from_hed))


def jpeg(patch: Rgb, random: np.random.Generator, quality: int = JPEG_QUALITY) -> Rgb:
    """Return the patch as it comes back from JPEG, of a random quality from `quality` to 95."""
    file = io.BytesIO()
    Image.fromarray(patch).save(file, "JPEG", quality=int(random.integers(quality, 96)))
    return np.asarray(Image.open(file))


CHANGE_FUNCTIONS: Mapping[str, Change] = {"noise": noise, "stain": stain_jitter, "jpeg": jpeg}


def as_strong_noise(change: Change) -> Change:
    """Return noise that moves pixels as far as `change` does (root mean square), as a control."""

    def control(patch: Rgb, random: np.random.Generator) -> Rgb:
        moved = change(patch, random).astype(np.float64) - patch
        return _rounded(patch + random.normal(0, np.sqrt((moved**2).mean()), patch.shape))

    return control


def shift_change(
    subject: Subject, rgb: Rgb, target_of: Callable[[Tensor], Aim], offset: tuple[int, int], method: str = "gradcam"
) -> NDArray[np.float64]:
    """Return the relative change [P] of the map where the grid of patches begins `offset` (y, x) pixels later.

    Args:
        rgb: patches with a margin at the bottom and the right, uint8 [P, patch + margin, patch + margin, 3].
        target_of: images -> aim, such as `partial(subject.aim, target=...)`; of the unshifted patches.
        offset: not negative, at most the margin, in pixels of the patch.

    Maps are compared where both patches are, at the size of the image.
    """
    height, width = subject.model.patch_px
    y, x = offset
    cut = partial(_cut, rgb, size=(height, width))
    first, second = subject.images(cut((0, 0))), subject.images(cut((y, x)))
    aim = target_of(first)
    large = [enlarge(subject.maps(images, aim, method), (height, width)) for images in (first, second)]
    before, after = large[0][:, y:, x:], large[1][:, : height - y, : width - x]
    found: NDArray[np.float64] = relative_change(before, after).cpu().double().numpy()
    return found


def _cut(rgb: Rgb, start: tuple[int, int], size: tuple[int, int]) -> Rgb:
    (y, x), (height, width) = start, size
    return np.ascontiguousarray(rgb[:, y : y + height, x : x + width])


def _rounded(patch: NDArray[np.float64]) -> Rgb:
    return patch.round().clip(0, 255).astype(np.uint8)
