"""Faithfulness: how the answer changes as pixels of a patch, or patches of a slide, are removed.

Hidden pixels are replaced by a colour, a blurred patch, or values from their neighbours, by the equations of ROAD's
imputation, solved exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor
from torch.nn import functional as F

from wsi_gradcam.audit.measures.subject import Aim, Subject, enlarge

# Weights of a pixel's neighbours, by their (y, x) offsets.
WEIGHTS = {(y, x): 1 / 6 if 0 in (y, x) else 1 / 12 for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)}


def impute(images: Tensor, hidden: Tensor) -> Tensor:
    """Return images [B, C, H, W] whose `hidden` bool [B, H, W] pixels are the weighted mean of their neighbours.

    Weights of the eight neighbours are 1/6 for the sides and 1/12 for the diagonals, made to sum to 1 at borders (Rong
    2022, arXiv 2202.00449). If everything is hidden, there is nothing to impute from, and the image's mean colour is
    used.

    At 224 px it takes 0.02 to 0.2 s per image, more if more is hidden: several forward passes of a ResNet-18.
    """
    filled = images.clone()
    for image, mask in zip(filled, hidden, strict=True):
        if bool(mask.all()):
            image[:] = image.mean(dim=(1, 2), keepdim=True)
        elif bool(mask.any()):
            values = _solved(image.cpu().double().numpy(), mask.cpu().numpy())
            image[:, mask] = torch.from_numpy(values).to(image.dtype).to(image.device)
    return filled


def _solved(known: NDArray[np.float64], hidden: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the hidden pixels [C, n] of an image [C, H, W]."""
    number = np.full(hidden.shape, -1)
    number[hidden] = np.arange(hidden.sum())
    y, x = np.nonzero(hidden)
    own = np.arange(len(y))
    total, right = np.zeros(len(y)), np.zeros((len(y), len(known)))
    entries = []
    for (dy, dx), weight in WEIGHTS.items():
        inside = (y + dy >= 0) & (y + dy < hidden.shape[0]) & (x + dx >= 0) & (x + dx < hidden.shape[1])
        at, ny, nx = own[inside], y[inside] + dy, x[inside] + dx
        total[at] += weight
        unknown = hidden[ny, nx]
        right[at[~unknown]] += weight * known[:, ny[~unknown], nx[~unknown]].T
        entries.append((at[unknown], number[ny[unknown], nx[unknown]], np.full(int(unknown.sum()), -weight)))
    rows, columns, values = (np.concatenate(parts) for parts in zip(*entries, (own, own, total), strict=True))
    system = sparse.csc_matrix((values, (rows, columns)), shape=(len(y), len(y)))
    # Symmetric and positive, so pivots can stay on the diagonal: half the time of an ordering for general matrices.
    # Conjugate gradients with a multigrid cycle were no faster to the same 1e-7.
    factors = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    solved: NDArray[np.float64] = np.asarray(factors.solve(right)).T
    return np.ascontiguousarray(solved)


Replace = Callable[[Tensor, Tensor], Tensor]
"""(rows int64 [B], hidden bool [B, H, W]) -> images [B, 3, H, W]: the patches `rows` with what is hidden replaced."""

STEPS = 28  # steps of the curves, unless other fractions are given
BLUR_PX, BLUR_SIGMA_PX, BLUR_SIDE_PX = 11, 5.0, 224  # as used by the authors of deletion and insertion at 224 px


def removal_ranks(maps: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """Return the rank of each pixel in its map enlarged to `size`, int32 [P, H, W], 0 for the most relevant.

    Signed maps are ranked as they are. Ties are broken at random: if most of a map is 0, the storage order would
    otherwise decide the score (one map scored 0.37, 0.50 or 0.63 depending on the order of ties alone).
    """
    values = enlarge(maps.float(), size).flatten(1)
    shuffled = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed)).to(values.device)
    order = shuffled[values[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(values.shape[1], device=values.device, dtype=torch.int32).expand_as(order)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places).reshape(len(maps), *size)


def replace_by(images: Tensor, others: Tensor) -> Replace:
    """Return a function that replaces pixels of images [P, 3, H, W] by those of `others`, which broadcast to them."""
    others = others.expand_as(images)

    def replace(rows: Tensor, hidden: Tensor) -> Tensor:
        made = images.new_empty(len(rows), *images.shape[1:])
        for row, part in runs(rows):  # a gathered copy of each patch would double the memory traffic
            torch.where(hidden[part, None], others[row], images[row], out=made[part])
        return made

    return replace


def blurred(images: Tensor) -> Tensor:
    """Return images [P, 3, H, W] blurred by a Gaussian of 5 px, cut off at 11 px, for 224 px a side.

    At other sizes, the Gaussian is in proportion. Borders are mirrored, so that they do not darken.
    """
    scale = min(images.shape[2:]) / BLUR_SIDE_PX
    half = max(1, round(BLUR_PX // 2 * scale))
    offsets = torch.arange(-half, half + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * max(BLUR_SIGMA_PX * scale, 0.5) ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def mean_colour(images: Tensor) -> Tensor:
    """Return each image's mean colour, [P, 3, 1, 1]."""
    return images.mean(dim=(2, 3), keepdim=True)


def replace_by_neighbours(images: Tensor, noise: Tensor | float = 0.0, seed: int = 0) -> Replace:
    """Return noisy linear imputation: hidden pixels are weighted means of their eight neighbours, hidden ones too.

    This is what ROAD does (Rong 2022, arXiv 2202.00449), see the module. Because the weights sum to 1, it is the same
    before and after normalisation. `noise` is the standard deviation of the Gaussian that is added, for each colour [3,
    1, 1] of a normalised image: the authors' 0.01 in 0..1 is 0.01 / std. Every patch gets the same noise.
    """
    generator = torch.Generator().manual_seed(seed)
    grain = torch.randn(images.shape[1:], generator=generator).to(images) * noise

    def replace(rows: Tensor, hidden: Tensor) -> Tensor:
        return impute(images[rows], hidden) + grain * hidden[:, None]

    return replace


def runs(rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Return (row, the slice of its positions) for each run of equal `rows` [B].

    >>> list(runs(torch.tensor([4, 4, 2])))
    [(4, slice(0, 2, None)), (2, slice(2, 3, None))]
    """
    start = 0
    for row, same in groupby(rows.tolist()):
        end = start + len(list(same))
        yield row, slice(start, end)
        start = end


def removal_curves(
    subject: Subject,
    images: Tensor,
    aim: Aim,
    maps: Mapping[str, Tensor],
    replace: Replace,
    fractions: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Curves]:
    """Return the curves of each of `maps` ([P, h, w] by name: methods and controls) for images [P, 3, H, W].

    The whole patch and the fully replaced one are the same for all maps and both ways, and are evaluated once. With M
    maps and S steps, a patch costs 2 M (S - 1) + 1 forward passes, plus the one that `aim` already had.

    Args:
        replace: what is put in place of pixels.
        fractions: [Q] of the pixels, ascending in 0 to 1; None for those of `STEPS` equal steps.
        seed: for ties.
    """
    pixels = images.shape[2] * images.shape[3]
    wanted = [i / STEPS for i in range(STEPS + 1)] if fractions is None else fractions
    counts = (torch.tensor(wanted).double() * pixels).round().long().tolist()
    inner = [i for i, count in enumerate(counts) if 0 < count < pixels]
    whole = torch.ones(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
    empty = aim.logits if len(inner) == len(counts) else answers_without(subject, replace, whole)
    found = {}
    for name, map_ in maps.items():
        answers = _ends(counts, pixels, aim.logits, empty)
        if inner:
            ranks = removal_ranks(map_, (images.shape[2], images.shape[3]), seed)
            answers[:, :, inner] = _answers(subject, replace, ranks, [counts[i] for i in inner])
        answers[~torch.isfinite(map_).flatten(1).all(dim=1)] = torch.nan
        logits, probabilities = aim.logit(answers).cpu().numpy(), aim.probability(answers)
        found[name] = Curves(logits[:, 0], logits[:, 1])
        if probabilities is not None:
            deletion, insertion = probabilities.cpu().numpy().swapaxes(0, 1)
            found[name] = Curves(logits[:, 0], logits[:, 1], deletion, insertion)
    return found


def _ends(counts: list[int], pixels: int, whole: Tensor, empty: Tensor) -> Tensor:
    """Return the known answers [P, 2, Q, K] of deletion and insertion: with nothing hidden, and with everything."""
    answers = whole.new_full((len(whole), 2, len(counts), whole.shape[1]), torch.nan)
    for i, count in enumerate(counts):
        if count in (0, pixels):
            answers[:, 0, i], answers[:, 1, i] = (empty, whole) if count else (whole, empty)
    return answers


def _answers(subject: Subject, replace: Replace, ranks: Tensor, counts: list[int]) -> Tensor:
    """Return logits [P, 2, Q, K] with the top of `ranks` [P, H, W] replaced, and with all but the top, for Q counts.

    Both ways of all patches fill the batches together, patch by patch, so that few batches are smaller.
    """
    patches = len(ranks)
    rows = torch.arange(patches, device=ranks.device).repeat_interleave(2 * len(counts))
    tops = torch.tensor(counts, device=ranks.device, dtype=ranks.dtype).repeat(2 * patches)
    inserts = torch.tensor([False, True], device=ranks.device).repeat_interleave(len(counts)).repeat(patches)
    found = []
    for some, top, insert in zip(
        *(torch.split(part, subject.batch_size) for part in (rows, tops, inserts)), strict=True
    ):
        hidden = torch.empty(len(some), *ranks.shape[1:], dtype=torch.bool, device=ranks.device)
        for row, part in runs(some):
            torch.lt(ranks[row], top[part, None, None], out=hidden[part])
        hidden ^= insert[:, None, None]
        found.append(subject.program.predict(replace(some, hidden)).detach())
    return torch.cat(found).reshape(patches, 2, len(counts), -1)


def answers_without(subject: Subject, replace: Replace, hidden: Tensor) -> Tensor:
    """Return logits [P, K] of the patches with `hidden` pixels, bool [P, H, W], replaced."""
    rows = torch.arange(len(hidden), device=hidden.device)
    parts = zip(torch.split(rows, subject.batch_size), torch.split(hidden, subject.batch_size), strict=True)
    return torch.cat([subject.program.predict(replace(some, mask)).detach() for some, mask in parts])


Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curves:
    """Answers to N patches as pixels are removed and restored; NaN for a patch whose map is not finite.

    Attributes:
        deletion, insertion: [N, Q] explained scalar (a logit), by the share of the pixels deleted, or inserted.
        deletion_probability, insertion_probability: [N, Q]; None if no class is explained.
    """

    deletion: Floats
    insertion: Floats
    deletion_probability: Floats | None = None
    insertion_probability: Floats | None = None

    def score(self, fractions: Sequence[float]) -> Floats:
        """Return half of insertion minus deletion, [N], in logits: the value of the map's order; 0 for chance.

        `fractions` [Q] are where the curves were measured, ascending.
        """
        return (mean_height(self.insertion, fractions) - mean_height(self.deletion, fractions)) / 2

    def probability_score(self, fractions: Sequence[float]) -> Floats | None:
        """Return the same in probability; None if no class is explained."""
        if self.deletion_probability is None or self.insertion_probability is None:
            return None
        kept, gone = (mean_height(part, fractions) for part in (self.insertion_probability, self.deletion_probability))
        return (kept - gone) / 2

    @property
    def road(self) -> Floats:
        """Return half of the mean of (least minus most relevant first) over the fractions, [N], in logits.

        The score of the ROAD paper; the fractions must be the same from both ends.
        """
        height: Floats = (self.insertion.mean(axis=1) - self.deletion.mean(axis=1)) / 2
        return height


def mean_height(curves: Floats, fractions: Sequence[float]) -> Floats:
    """Return the mean height [N] of curves [N, Q] by the trapezoid rule over `fractions` [Q]."""
    at = np.array(fractions)
    height: Floats = ((curves[:, 1:] + curves[:, :-1]) / 2 * np.diff(at)).sum(axis=1) / (at[-1] - at[0])
    return height


def slide_removal(
    relevance: NDArray[np.float32],
    scores: NDArray[np.float32],
    slide_score: Callable[[NDArray[np.float32]], float],
    fractions: Floats,
    random_orders: int = 20,
    seed: int = 0,
) -> dict[str, Floats]:
    """Return a slide's score as its patches are removed, [Q]: `most` relevant first, `least` first, at `random`.

    The model answers patch by patch, so it need not be run again. If the map is that of a linear head after global
    average pooling, a patch's mean relevance *is* its logit minus the bias, and most relevant first is most probable
    first by construction: in that case, this tests the slide's score, not the map.

    Args:
        relevance: [N] of the patches, such as the mean of each one's map.
        scores: [N] of the patches, such as probabilities.
        slide_score: scores of the remaining patches -> score of the slide.
        fractions: [Q] of the patches that are removed, below 1.
        random_orders: how many are averaged.
        seed: for ties and for the random orders.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(scores))
    most = shuffled[np.argsort(-relevance[shuffled], kind="stable")]
    chance = [_left(scores, generator.permutation(len(scores)), slide_score, fractions) for _ in range(random_orders)]
    return {
        "most": _left(scores, most, slide_score, fractions),
        "least": _left(scores, most[::-1], slide_score, fractions),
        "random": np.mean(chance, axis=0),
    }


def _left(
    scores: NDArray[np.float32],
    order: NDArray[np.int64],
    slide_score: Callable[[NDArray[np.float32]], float],
    fractions: Floats,
) -> Floats:
    gone = [round(fraction * len(scores)) for fraction in fractions.tolist()]
    return np.array([slide_score(scores[order[count:]]) for count in gone])
