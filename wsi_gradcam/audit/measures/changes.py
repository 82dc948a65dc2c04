"""The effects of small and finite changes of a patch on maps and answers, and compared with the gradient's prediction.

Maps and answers change when patches vary as slides do: camera noise, strength of the stains, JPEG, and the origin of
the patch grid.

A gradient describes an infinitesimal step. Two models may agree in value and gradient on every patch, so that all their
maps are equal, and diverge at the next step: one stays on a plateau, the other falls off a cliff. No gradient shows
that; a finite step does.

A probability near 0 or 1 hardly changes, so its gradient is nearly 0 although the evidence is strongest there; that of
the logit is not. An inactive ReLU passes nothing, even if a little more would activate it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor

from wsi_gradcam.audit.measures.removal import Replace, answers_without
from wsi_gradcam.audit.measures.subject import Aim, Subject, enlarge, predicted_classes
from wsi_gradcam.cam.engine import gradients
from wsi_gradcam.cam.layers import leaky_graph
from wsi_gradcam.cam.methods import Score
from wsi_gradcam.cam.program import SplitProgram, cut_at
from wsi_gradcam.cam.targets import Target, classes_of
from wsi_gradcam.cam.trunks import make_trunk
from wsi_gradcam.errors import LayerError, TargetError

Numbers = NDArray[np.float64]
STEPS = (-1.0, -0.5, -0.25, -0.1, -0.05, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class FiniteSteps:
    """Steps along (positive) and against the map: changes that the gradient predicts, and actual ones, for P patches.

    Attributes:
        steps: [S] ascending, without 0; at -1, the map's highest place is replaced altogether.
        promised: [P, S] change of the explained scalar, step times slope.
        actual: [P, S].
    """

    steps: Numbers
    promised: Numbers
    actual: Numbers

    @property
    def worth(self) -> Numbers:
        """(moved - missed) / (moved + missed), [P], for the side (along, against) where it is lower.

        moved is the sum of actual² over the side's steps, missed that of (actual - promised)². 1: exactly predicted;
        0: no better than predicting no change; -1: nothing moves. NaN if no change was predicted either.
        """
        return np.fmin(*(self._worth(side) for side in (self.steps > 0, self.steps < 0)))

    def _worth(self, side: NDArray[np.bool_]) -> Numbers:
        missed, moved = ((values[:, side] ** 2).sum(axis=1) for values in (self.departure, self.actual))
        total = moved + missed
        kept: Numbers = np.divide(moved - missed, total, out=np.full(len(total), np.nan), where=total > 0)
        return kept

    @property
    def departure(self) -> Numbers:
        """[P, S] actual minus predicted, in logits: below 0 on the far side of a cliff."""
        return self.actual - self.promised

    @property
    def reach(self) -> Numbers:
        """[P] the largest step, either way, up to which all steps are closer to the prediction than to no change."""
        found = np.zeros(len(self.actual))
        kept = np.abs(self.departure) < np.abs(self.actual)
        for size in np.unique(np.abs(self.steps)):
            inside = np.abs(self.steps) <= size
            found = np.where(kept[:, inside].all(axis=1), size, found)
        return found


def finite_steps(
    subject: Subject, images: Tensor, aim: Aim, maps: Tensor, others: Tensor, steps: Sequence[float] = STEPS
) -> FiniteSteps:
    """Return steps of images [P, 3, H, W] along and against maps [P, h, w].

    x(t) = x + t m ⊙ (x - x'), where m is the positive part of the enlarged map over its largest value, and x' is
    `others`, the picture without content: a blurred patch, a colour. So t = -1 removes what the map shows, and t = 1
    shows it twice as strongly. The prediction is t <ds/dx, m ⊙ (x - x')>, from one backward pass of the network.
    """
    weight = enlarge(maps.float(), (images.shape[2], images.shape[3])).clamp(min=0)[:, None]
    largest = weight.amax(dim=(2, 3), keepdim=True)
    way = weight / torch.where(largest > 0, largest, 1.0) * (images - others)
    slope = (input_gradient(subject, images, aim) * way).sum(dim=(1, 2, 3)).cpu().double().numpy()
    answers = torch.stack([subject.answers(images + step * way) for step in steps], dim=1)
    actual = aim.logit(answers) - aim.logit(aim.logits)[:, None]
    sizes = np.array(steps, np.float64)
    return FiniteSteps(sizes, slope[:, None] * sizes, actual.cpu().double().numpy())


@torch.enable_grad()
def input_gradient(subject: Subject, images: Tensor, aim: Aim) -> Tensor:
    """Return ds/dx [P, 3, H, W] of the explained scalar, in float32."""
    found: list[Tensor] = []
    for start in range(0, len(images), subject.batch_size):
        rows = slice(start, start + subject.batch_size)
        leaf = images[rows].detach().clone().requires_grad_(True)
        score = aim.score(rows)(subject.program.differentiable(leaf)).sum()
        found += torch.autograd.grad(score, leaf)
    return torch.cat(found)


def infidelity(promised: Numbers, actual: Numbers, normalise: bool = False) -> Numbers:
    """Return mean over R perturbations of (promised - actual)² [P], both changes [P, R] (Yeh 2019, arXiv 1901.09392).

    `promised` is the sum of the map over what is perturbed, times how much; `actual` is the score before minus after.
    If normalised, the map may first be multiplied by the factor that fits it best: for maps without a unit.
    """
    scale = np.ones((len(promised), 1))
    if normalise:
        size = (promised**2).sum(axis=1, keepdims=True)
        product = (promised * actual).sum(axis=1, keepdims=True)
        scale = np.divide(product, size, out=np.zeros_like(size), where=size > 0)
    missed: Numbers = ((scale * promised - actual) ** 2).mean(axis=1)
    return missed


def hiding_changes(
    subject: Subject, images: Tensor, aim: Aim, maps: Tensor, masks: Tensor, replace: Replace
) -> tuple[Numbers, Numbers]:
    """Return (promised, actual) changes [P, R] of hiding each of `masks` bool [R, H, W], for `infidelity`.

    A map of cells predicts the sum of what the mask covers, each cell by the part that is covered.
    """
    cells = torch.stack([enlarge(mask[None].float(), (maps.shape[1], maps.shape[2]))[0] for mask in masks])
    promised = torch.einsum("phw,rhw->pr", maps.cpu().double(), cells.cpu().double())
    everywhere = [mask.expand(len(images), -1, -1) for mask in masks]
    answers = torch.stack([answers_without(subject, replace, mask) for mask in everywhere], dim=1)
    actual = aim.logit(aim.logits)[:, None] - aim.logit(answers)
    return promised.numpy(), actual.cpu().double().numpy()


def completeness_gap(maps: Tensor, whole: Tensor, baseline: Tensor) -> Numbers:
    """Return the sum of maps [P, h, w] minus (score of the patch minus the baseline's), [P], in logits; 0 is complete.

    Integrated Gradients are complete, apart from numerical integration (Sundararajan 2017, arXiv 1703.01365); so is
    Grad-CAM with global average pooling and a linear layer, relative to the bias.
    """
    gap: Numbers = (maps.cpu().double().sum(dim=(1, 2)) - (whole - baseline).cpu().double()).numpy()
    return gap


# dp/ds = p (1 - p) is then below 1% of its largest value, 1/4.
SATURATED = 0.0025


@dataclass(frozen=True, eq=False)
class Saturation:
    """The saturation of the model on P patches.

    Attributes:
        saturated: [P] 1 where the class's probability is within `SATURATED` of 0 or 1, else 0.
        gradient_ratio: [P] size of the probability's gradient at the layer over the logit's; NaN if that is 0.
        silent: [P] 1 if the logit's own gradient is 0 everywhere: no gradient method can show anything.
        dead: bool [K] channels of the layer that are 0 on all cells of all P patches.
        dead_share: [P] share of the channels that are 0 on all cells of the patch.
    """

    saturated: NDArray[np.float64]
    gradient_ratio: NDArray[np.float64]
    silent: NDArray[np.float64]
    dead: NDArray[np.bool_]
    dead_share: NDArray[np.float64]


def saturation(subject: Subject, images: Tensor, aim: Aim) -> Saturation:
    """Return the model's saturation on images [P, 3, H, W]; the target must be a class.

    Dead channels mean something only after a ReLU: other activations are 0 nowhere.

    Raises:
        TargetError: the target is not a class; only classes have a probability.
    """
    probability = aim.probability(aim.logits)
    if probability is None:
        raise TargetError("saturation is of a class's probability, and the target is not a class; give a class")
    layout = subject.program.layers[0].layout
    sizes, off = [], []
    for start in range(0, len(images), subject.batch_size):
        rows = slice(start, start + subject.batch_size)
        with torch.enable_grad():
            done = subject.program.forward(images[rows])
            found = gradients(done.logits, [aim.score(rows), _share(aim, rows)], done.values[:1])
            sizes.append(torch.stack([g[0].detach().flatten(1).norm(dim=1) for g in found], dim=1))
        off.append((layout.to_map(done.values[0].detach()) == 0).flatten(2).all(dim=2))
    of_logit, of_probability = torch.cat(sizes).cpu().double().numpy().T
    dead: NDArray[np.bool_] = torch.cat(off).cpu().numpy()
    always: NDArray[np.bool_] = np.logical_and.reduce(dead, axis=0)
    near = np.minimum(probability.cpu().numpy(), 1 - probability.cpu().numpy())
    return Saturation(
        (near < SATURATED).astype(np.float64),
        np.divide(of_probability, of_logit, out=np.full(len(of_logit), np.nan), where=of_logit > 0),
        (of_logit == 0).astype(np.float64),
        always,
        dead.mean(axis=1),
    )


def leaky_maps(subject: Subject, images: Tensor, aim: Aim, method: str = "gradcam") -> Tensor:
    """Return the maps [P, h, w] with a backward pass that leaks through the ReLUs after the layer: what they hide.

    They are the plain maps if no ReLU follows. Predictions are unchanged.

    Raises:
        LayerError: several layers are explained together.
        EngineError: the network cannot be cut at the layer.
    """
    if len(subject.program.layers) > 1:
        raise LayerError("the leaky map is of one layer; give one --layer")
    (layer,) = subject.program.layers
    batch = images[: subject.batch_size]
    trunk, head = cut_at(subject.program.module, layer.name, batch)
    eager = make_trunk(trunk, "eager", "float32", batch)
    program = SplitProgram(subject.program.module, layer, eager, leaky_graph(head))
    return replace(subject, program=program).maps(images, aim, method)


def _share(aim: Aim, rows: slice) -> Score:
    """Return the class's probability as a function of logits, with a graph."""
    assert isinstance(aim.target, Target)
    classes = classes_of(aim.target, aim.logits[rows])[:, None]

    def share(logits: Tensor) -> Tensor:
        if aim.activation == "softmax":
            logits = logits.softmax(dim=1)
        elif aim.activation == "sigmoid":
            logits = logits.sigmoid()
        return logits.gather(1, classes)[:, 0]

    return share


Rgb = NDArray[np.uint8]
Change = Callable[[Rgb, np.random.Generator], Rgb]
"""A patch uint8 [h, w, 3] -> the patch changed."""

REPEATS = 5
NOISE_LEVELS = 5.0  # standard deviation in grey levels, of 255
STAIN_STRENGTH = 0.2
STAIN_SHIFT = 0.1  # in natural density, in which a nucleus has about 1 and eosin 0.5
JPEG_QUALITY = 50


@dataclass(frozen=True, eq=False)
class Moves:
    """The effects of a change of P patches, over several repeats; NaN if nothing can be said.

    Attributes:
        map_change: [P] largest relative change of the map, max |M(x') - M(x)| / |M(x)|, over the repeats in which the
            prediction stays the same. NaN if it never does, or if M(x) is 0.
        logit_change: [P] mean absolute change of the explained scalar.
        flips: [P] share of the repeats in which another class is predicted.
        other_patch: [P] the same relative change, to the map of the previous patch in the same call (for the first, the
            last): as far as a map can reasonably move. NaN if there is only one patch.
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
    """Return the effects of `change` on patches uint8 [P, h, w, 3], to which `aim` belongs; maps are raw.

    The largest change over small perturbations is the sensitivity of Yeh 2019 (arXiv 1901.09392).

    Args:
        repeats: how often to repeat the change, with different random numbers.
        seeds: one per patch, so that batches do not matter; by default, their numbers.
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
    """Return |after - before| / |before| [P] of maps [P, h, w], Euclidean; NaN if `before` is 0."""
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
    """Return the patch after JPEG compression, with a random quality from `quality` to 95."""
    file = io.BytesIO()
    Image.fromarray(patch).save(file, "JPEG", quality=int(random.integers(quality, 96)))
    return np.asarray(Image.open(file))


CHANGE_FUNCTIONS: Mapping[str, Change] = {"noise": noise, "stain": stain_jitter, "jpeg": jpeg}


def as_strong_noise(change: Change) -> Change:
    """Return noise that changes pixels as much as `change` does (root mean square), as a control."""

    def control(patch: Rgb, random: np.random.Generator) -> Rgb:
        moved = change(patch, random).astype(np.float64) - patch
        return _rounded(patch + random.normal(0, np.sqrt((moved**2).mean()), patch.shape))

    return control


def shift_change(
    subject: Subject, rgb: Rgb, target_of: Callable[[Tensor], Aim], offset: tuple[int, int], method: str = "gradcam"
) -> NDArray[np.float64]:
    """Return the relative change [P] of the map if the patch grid begins `offset` (y, x) pixels later.

    Args:
        rgb: patches with a margin at the bottom and the right, uint8 [P, patch + margin, patch + margin, 3].
        target_of: images -> aim, such as `partial(subject.aim, target=...)`; called for the unshifted patches.
        offset: not negative, at most the margin, in pixels of the patch.

    Maps are compared where both patches overlap, at the size of the image.
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
