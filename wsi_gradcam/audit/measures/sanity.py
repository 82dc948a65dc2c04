"""Sanity: does a map change if what the model has learned is taken away, and has it learned anything?

Weights are randomised layer by layer, in the order in which layers run (Adebayo 2018, arXiv 1810.03292), and the map of
the same class is compared with the original. This reveals failure; it cannot rank methods (Binder 2022, arXiv
2211.12486).

The model's answers are compared with those of random copies. Learned weights work together, so that the evidence of
different patches differs far more than with random weights of the same size. A model that was never trained, whose
weights did not load, or that knows nothing about such pictures is just another random copy.

The similarity of two maps of a patch is measured on the grid of the CAM itself. Enlarged maps are similar because they
are smooth: independent ones of 7 x 7 cells have an SSIM of 0.31 to 0.61 at 224 px. A constant map resembles nothing:
its rank correlation is not defined, and the SSIM of two of them is 1. It gives NaN here, and is counted separately.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from skimage.feature import hog
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from wsi_gradcam.audit.measures.subject import Aim, Subject, enlarge
from wsi_gradcam.audit.schema import RESEMBLING
from wsi_gradcam.cam.layers import evaluating

Order = Literal["top_down", "bottom_up", "independent"]
ORDERS: tuple[Order, ...] = ("top_down", "bottom_up", "independent")
STAGES = 8
ENCODED_AT_ONCE = 8
DRAWS = 12  # pairs of networks with random weights: one may look at the same things by chance
BINS = 100  # bins of a map's histogram, as in 2401.06465


@dataclass(frozen=True, eq=False)
class Stage:
    """Likeness of the maps of P patches to those of the trained model, with some layers random.

    Attributes:
        layers: the layers that became random in this stage.
        random_share: share of all layers with weights that are random now.
        likeness: [P] by the names in `LIKENESS`; NaN if a map is constant.
        resembles: 1 or 0 [P], see `resembles`.
        constant: whether the map is constant now, bool [P].
        complexity: [P] relative increase of the map's entropy, see `complexity_rise`.
    """

    layers: tuple[str, ...]
    random_share: float
    likeness: dict[str, NDArray[np.float64]]
    resembles: NDArray[np.float64]
    constant: NDArray[np.bool_]
    complexity: NDArray[np.float64]


def randomisation(
    subject: Subject,
    images: Tensor,
    aim: Aim,
    method: str = "gradcam",
    order: Order = "top_down",
    stages: int = STAGES,
    samples: int = 1,
    seed: int = 0,
) -> list[Stage]:
    """Return the stages for images [P, 3, H, W]; the untouched model is not one of them.

    Args:
        order: `top_down`: from the head on, and what was random stays random; `bottom_up`: from the first layer on;
            `independent`: each stage on its own.
        stages: at most this many; layers that run one after another share a stage.
        samples: 1, or the number of noisy copies of an image whose maps are averaged first (smooth MPRT, Hedstroem
            2024, arXiv 2401.06465), so that the noise of gradients is not taken for a change.
        seed: of the new weights and of the noise.
    """
    names = layers_in_order(subject.program.module, images[:1])
    grid = _grid(subject)
    before = _maps(subject, images, aim, method, grid, samples, seed)
    found, done = [], 0
    for group, module in _randomised(subject.program.module, names, order, stages, seed):
        after = _maps(subject.with_module(module), images, aim, method, grid, samples, seed)
        done = len(group) if order == "independent" else done + len(group)
        found.append(
            Stage(
                group,
                done / len(names),
                {name: alike(before, after) for name, alike in LIKENESS.items()},
                resembles(before, after, seed),
                is_constant(after),
                complexity_rise(before, after),
            )
        )
    return found


def staying_maps(
    subject: Subject, images: Tensor, aim: Aim, method: str = "gradcam", draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Return the maps that stay when all weights are random, minus those that flip, [draws, P], -1 to 1.

    A draw is a pair of random networks that differ only in the sign of the last layer, and are equally probable. What a
    map owes to the position of things in the picture stays in both; what follows the evidence stays in one and flips in
    the other, and their mean is 0, however similar two random networks may be by chance. NaN if a map is constant. The
    maps of a draw are alike, so the draw is the unit of what follows from them.
    """
    grid = _grid(subject)
    before = _maps(subject, images, aim, method, grid, 1, seed)
    found = []
    for draw, other in enumerate(random_copies(subject, images, draws, seed)):
        pair = []
        for _ in range(2):
            pair.append(stays_or_turns(before, _maps(other, images, aim, method, grid, 1, seed), _seed_of(seed, draw)))
            _turn(other.program.module, layers_in_order(other.program.module, images[:1])[-1])
        found.append(np.mean(pair, axis=0))
    return np.stack(found)


def random_copies(subject: Subject, images: Tensor, draws: int = DRAWS, seed: int = 0) -> Iterator[Subject]:
    """Yield the subject with all its weights random, `draws` times; the `images` only serve to find the layers."""
    module = subject.program.module
    names = layers_in_order(module, images[:1])
    for draw in range(draws):
        for _, changed in _randomised(module, names, "independent", 1, _seed_of(seed, draw)):
            yield subject.with_module(changed)


@torch.no_grad()
def _turn(module: nn.Module, name: str) -> None:
    """Change the sign of the weights of a layer, in place."""
    for parameter in module.get_submodule(name).parameters(recurse=False):
        if parameter.ndim > 1:
            parameter.neg_()


@torch.no_grad()
def layers_in_order(module: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the modules that have weights of their own, in the order in which they first run."""
    holders = {name: part for name, part in module.named_modules() if any(True for _ in part.parameters(recurse=False))}
    names: list[str] = []

    def note(part: nn.Module, args: object, *, name: str) -> None:
        if name not in names:
            names.append(name)

    handles = [part.register_forward_pre_hook(partial(note, name=name)) for name, part in holders.items()]
    try:
        with evaluating(module):
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    return names


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Give a module's own parameters new values of the same size, in place.

    Weights with two or more axes become Gaussian, with mean 0 and their previous root mean square, so that activations
    neither die nor explode. Vectors (biases, scales) are shuffled. Buffers stay.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters(recurse=False):
        if parameter.ndim < 2:
            parameter.copy_(
                parameter[torch.randperm(len(parameter), generator=generator)] if parameter.ndim else parameter
            )
        else:
            size = parameter.float().square().mean().sqrt()
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)


def complexity_rise(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return (H(after) - H(before)) / H(before) [P], where H is the entropy of a map's histogram.

    Efficient MPRT (Hedstroem 2024, arXiv 2401.06465): a map that depends on the model becomes more complex when the
    model is random. NaN if H(before) is 0.
    """
    first, second = (np.array([_entropy(map_) for map_ in maps]) for maps in (before, after))
    rise: NDArray[np.float64] = np.divide(second - first, first, out=np.full(len(first), np.nan), where=first > 0)
    return rise


def _entropy(map_: NDArray[np.float32]) -> float:
    if not np.isfinite(map_).all():
        return float("nan")
    if np.ptp(map_) <= BINS * np.spacing(np.abs(map_).max()):  # too narrow to be divided: a single value up to rounding
        return 0.0
    counts, _ = np.histogram(map_, bins=BINS)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _randomised(
    module: nn.Module, names: list[str], order: Order, stages: int, seed: int
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Yield the names that became random, and the network, which is changed further for the next."""
    ordered = names[::-1] if order == "top_down" else names
    changed = copy.deepcopy(module)
    for group in np.array_split(np.array(ordered), min(stages, len(ordered))):
        if order == "independent":
            changed = copy.deepcopy(module)
        for name in group.tolist():
            randomise(changed.get_submodule(name), seed + names.index(name))
        yield tuple(group.tolist()), changed


def _maps(
    subject: Subject, images: Tensor, aim: Aim, method: str, grid: tuple[int, int], samples: int, seed: int
) -> NDArray[np.float32]:
    if samples == 1:
        return _at(subject.maps(images, aim, method), grid)
    generator = torch.Generator().manual_seed(seed)
    deviation = 0.1 * (images.amax(dim=(1, 2, 3), keepdim=True) - images.amin(dim=(1, 2, 3), keepdim=True))
    total = np.zeros((len(images), *grid), np.float32)
    for _ in range(samples):
        noise = torch.randn(images.shape[1:], generator=generator).to(images)
        total += _at(subject.maps(images + deviation * noise, aim, method), grid)
    return total / np.float32(samples)


def _seed_of(seed: int, draw: int) -> int:
    return seed + 10_000 * draw


def _grid(subject: Subject) -> tuple[int, int]:
    layout = subject.program.layers[0].layout
    return layout.height, layout.width


def _at(maps: Tensor, grid: tuple[int, int]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = enlarge(maps.float(), grid).cpu().numpy()
    return found


RANDOM_COPIES = 49  # copies, none of which may differ as much: a false pass in 50


def random_answers(subject: Subject, images: Tensor, draws: int = RANDOM_COPIES, seed: int = 0) -> Tensor:
    """Return logits [draws, P, K] of images [P, 3, H, W] with all weights random; those of batches can be joined."""
    return torch.stack([copy.answers(images) for copy in random_copies(subject, images, draws, seed)])


Maps = NDArray[np.float32]
Numbers = NDArray[np.float64]

PERMUTATIONS = 199
SSIM_PX, HOG_CELLS, HOG_ANGLES = 3, 3, 9


def is_constant(maps: Maps) -> NDArray[np.bool_]:
    """Return which maps [P, h, w] have only one value, up to rounding, or are not finite, bool [P]."""
    flat = maps.reshape(len(maps), -1)
    with np.errstate(invalid="ignore"):
        spread, size = np.ptp(flat, axis=1), np.abs(flat).max(axis=1)
    constant: NDArray[np.bool_] = ~(spread > 1e-6 * size)
    return constant


def spearman(first: Maps, second: Maps) -> Numbers:
    """Return the rank correlation [P] of maps [P, h, w], with ties at their mean rank; NaN if one is constant."""
    a, b = _ranks(first), _ranks(second)
    return np.where(is_constant(first) | is_constant(second), np.nan, _correlation(a, b))


def spearman_absolute(first: Maps, second: Maps) -> Numbers:
    """Return the rank correlation [P] of the maps' absolute values: of places, whether for or against."""
    return spearman(np.abs(first), np.abs(second))


def ssim(first: Maps, second: Maps) -> Numbers:
    """Return the SSIM [P] (Wang 2004), in windows of 3 x 3 cells, of maps scaled by their largest value."""
    constant = is_constant(first) | is_constant(second)
    found = np.full(len(first), np.nan)
    for i in np.flatnonzero(~constant).tolist():
        a, b = (maps[i] / np.abs(maps[i]).max() for maps in (first, second))
        found[i] = structural_similarity(a, b, win_size=SSIM_PX, data_range=2.0)
    return found


def hog_similarity(first: Maps, second: Maps) -> Numbers:
    """Return Pearson correlation [P] of the maps' histograms of oriented gradients (Adebayo 2018), cells of 3 x 3."""
    constant = is_constant(first) | is_constant(second)
    found = np.full(len(first), np.nan)
    for i in np.flatnonzero(~constant).tolist():
        a, b = (_hog(maps[i])[None] for maps in (first, second))
        found[i] = _correlation(a, b)[0]
    return found


LIKENESS: dict[str, Callable[[Maps, Maps], Numbers]] = {
    "spearman": spearman,
    "spearman_absolute": spearman_absolute,
    "ssim": ssim,
    "hog": hog_similarity,
}


def resembles(first: Maps, second: Maps, seed: int = 0) -> Numbers:
    """Return 1 if `second` is more like `first` than 95% of permutations of its cells, else 0 [P]; NaN if constant.

    This uses `spearman`, with its sign: the opposite map is another map. Of unrelated maps, 5% resemble each other if
    cells are independent, and more if they are smooth.
    """
    found = stays_or_turns(first, second, seed)
    return np.where(np.isnan(found), np.nan, (found > 0).astype(np.float64))


def stays_or_turns(first: Maps, second: Maps, seed: int = 0) -> Numbers:
    """Return 1 if `second` resembles `first`, -1 if its opposite does, else 0 [P]; NaN if constant."""
    a, b = _ranks(first), _ranks(second)
    observed = _correlation(a, b)
    random = np.random.default_rng(seed)
    above, below = np.zeros((2, len(a)))
    for _ in range(PERMUTATIONS):
        by_chance = _correlation(a, b[:, random.permutation(a.shape[1])])
        above += by_chance >= observed - 1e-12
        below += by_chance <= observed + 1e-12
    stays, turns = ((reached + 1) / (PERMUTATIONS + 1) <= 1 - RESEMBLING + 1e-12 for reached in (above, below))
    found = stays.astype(np.float64) - turns
    return np.where(is_constant(first) | is_constant(second), np.nan, found)


def _ranks(maps: Maps) -> Numbers:
    ranks: Numbers = rankdata(maps.reshape(len(maps), -1), axis=1)
    return ranks


def _correlation(a: Numbers, b: Numbers) -> Numbers:
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    found: Numbers = np.divide((a * b).sum(axis=1), size, out=np.full(len(a), np.nan), where=size > 0)
    return found


def _hog(map_: NDArray[np.float32]) -> Numbers:
    cells = tuple(min(HOG_CELLS, side) for side in map_.shape)
    scaled = map_ / np.abs(map_).max()
    found: Numbers = hog(scaled, HOG_ANGLES, pixels_per_cell=cells, cells_per_block=(1, 1))
    return found


def rank_likeness(first: Numbers, second: Numbers) -> float:
    """Return the rank correlation of two relevances [N]; NaN if one is constant, or has fewer than 3 patches."""
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < 3:
        return float("nan")
    a, b = (values[known].astype(np.float32)[None, None] for values in (_ranked(first), _ranked(second)))
    return float(spearman(a, b)[0])


def _ranked(values: Numbers) -> Numbers:
    """Return average ranks, NaN for NaN; float32 can represent them, but not all differences of values."""
    ranks = np.full(len(values), np.nan)
    known = np.isfinite(values)
    ranks[known] = rankdata(values[known])
    return ranks


def stays(first: Numbers, second: Numbers) -> float:
    """Return 1 if a relevance [N] resembles the first, -1 if its opposite does, else 0; NaN if one is constant.

    It does if their rank correlation is larger than that of 95% of all permutations, whose standard deviation is 1 /
    sqrt(N - 1).
    """
    found = rank_likeness(first, second) * np.sqrt(len(first) - 1)
    return float("nan") if np.isnan(found) else float(np.sign(found) * (abs(found) > norm.ppf(RESEMBLING)))


@torch.no_grad()
def encoder_stays(
    module: nn.Module,
    images: Tensor,
    relevance: Callable[[Numbers], Mapping[str, Numbers]],
    before: Mapping[str, Numbers],
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return whether relevances stay, see `stays`, with random weights in the patch encoder, [draws] by method.

    Args:
        module: the encoder.
        images: [P, 3, H, W], a slide's patches.
        relevance: returns the relevance [P] of a bag of feature vectors [P, D], by method.
        before: the relevance of those that the encoder itself makes.
    """
    names = layers_in_order(module, images[:1])
    found: dict[str, list[float]] = {name: [] for name in before}
    for draw in range(draws):
        for _, changed in _randomised(module, names, "independent", 1, _seed_of(seed, draw)):
            with evaluating(changed):
                features = torch.cat([changed(part).flatten(1) for part in torch.split(images, ENCODED_AT_ONCE)])
            with torch.enable_grad():
                after = relevance(features.double().cpu().numpy())
            for name, values in found.items():
                values.append(stays(before[name], after[name]))
    return found
