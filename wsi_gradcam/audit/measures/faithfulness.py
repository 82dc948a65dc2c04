"""Faithfulness: does the model's answer hang on what the map calls relevant?

Deletion takes the most relevant pixels away first, insertion gives them back first (Petsiuk 2018, arXiv 1806.07421).
With linear imputation in place of the pixels taken away, at fractions other than 0 and 1, it is ROAD (Rong 2022,
arXiv 2202.00449): inserting the top share q is removing the least relevant 1 - q first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_gradcam.audit.measures.removal import Replace, removal_ranks, runs
from wsi_gradcam.audit.measures.subject import Aim, Subject

STEPS = 28
ROAD_FRACTIONS = tuple(i / 10 for i in range(1, 10))


@dataclass(frozen=True, eq=False)
class Curves:
    """How the answer to P patches changes as pixels go and come; NaN for a patch whose map is not finite.

    Attributes:
        fractions: [Q] of the pixels that are deleted, or inserted, ascending.
        deletion, insertion: [P, Q] explained scalar (a logit).
        deletion_probability, insertion_probability: [P, Q]; None where no class is explained.
    """

    fractions: Tensor
    deletion: Tensor
    insertion: Tensor
    deletion_probability: Tensor | None
    insertion_probability: Tensor | None

    @property
    def deletion_area(self) -> Tensor:
        """Mean height [P] of the deletion curve, in logits; low is faithful."""
        return area(self.deletion, self.fractions)

    @property
    def insertion_area(self) -> Tensor:
        """Mean height [P] of the insertion curve, in logits; high is faithful."""
        return area(self.insertion, self.fractions)

    @property
    def score(self) -> Tensor:
        """Half of insertion less deletion, [P], in logits: what the order of the map is worth; 0 for chance."""
        return (self.insertion_area - self.deletion_area) / 2

    @property
    def road(self) -> Tensor:
        """Half of the mean of (least relevant first less most relevant first) over the fractions, [P], in logits.

        The score of the ROAD paper; the fractions must be the same from both ends.
        """
        return (self.insertion.mean(dim=1) - self.deletion.mean(dim=1)) / 2


def area(curve: Tensor, fractions: Tensor) -> Tensor:
    """The mean height [P] of curves [P, Q] by the trapezoid rule over `fractions` [Q]."""
    return torch.trapezoid(curve, fractions, dim=1) / (fractions[-1] - fractions[0])


def removal_curves(
    subject: Subject,
    images: Tensor,
    aim: Aim,
    maps: Mapping[str, Tensor],
    replace: Replace,
    fractions: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Curves]:
    """The curves of each of `maps` ([P, h, w] by name: methods and controls) for images [P, 3, H, W].

    The whole patch and the one that is replaced altogether are the same for all maps, both ways, and asked once.
    With M maps and S steps a patch costs 2 M (S - 1) + 1 forward passes, and the one that `aim` already had.

    Args:
        replace: what is put in place of pixels, see `wsi_gradcam.audit.measures.removal`.
        fractions: [Q] ascending in 0 to 1; `STEPS` equal steps unless told.
        seed: for ties.
    """
    pixels = images.shape[2] * images.shape[3]
    wanted = torch.linspace(0, 1, STEPS + 1) if fractions is None else fractions
    counts = (wanted.double() * pixels).round().long().tolist()
    inner = [i for i, count in enumerate(counts) if 0 < count < pixels]
    empty = aim.logits if len(inner) == len(counts) else _without_all(subject, images, replace)
    found = {}
    for name, map_ in maps.items():
        answers = _ends(counts, pixels, aim.logits, empty)
        if inner:
            ranks = removal_ranks(map_, (images.shape[2], images.shape[3]), seed)
            answers[:, :, inner] = _answers(subject, replace, ranks, [counts[i] for i in inner])
        answers[~torch.isfinite(map_).flatten(1).all(dim=1)] = torch.nan
        logits, probabilities = aim.logit(answers).cpu(), _cpu(aim.probability(answers))
        found[name] = Curves(
            torch.tensor(counts) / pixels,
            *logits.unbind(dim=1),
            *((None, None) if probabilities is None else probabilities.unbind(dim=1)),
        )
    return found


def slide_removal(
    relevance: NDArray[np.float32],
    scores: NDArray[np.float32],
    slide_score: Callable[[NDArray[np.float32]], float],
    fractions: NDArray[np.float64],
    random_orders: int = 20,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """A slide's score as its patches are taken away, [Q] each: `most` relevant first, `least` first, at `random`.

    Patches are answered one by one, so none has to be asked again. Where the map is that of a linear head behind
    global average pooling, a patch's mean relevance *is* its logit less the bias, and most relevant first is most
    probable first by construction: there it tests the slide's score, not the map.

    Args:
        relevance: [N] of the patches, such as the mean of each one's map.
        scores: [N] of the patches, such as probabilities.
        slide_score: scores of the patches that are left -> score of the slide.
        fractions: [Q] of the patches that are taken away, below 1.
        random_orders: how many are averaged.
        seed: of ties and of the random orders.
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
    fractions: NDArray[np.float64],
) -> NDArray[np.float64]:
    gone = [round(fraction * len(scores)) for fraction in fractions.tolist()]
    return np.array([slide_score(scores[order[count:]]) for count in gone])


def _without_all(subject: Subject, images: Tensor, replace: Replace) -> Tensor:
    """Logits [P, K] of what is left where every pixel is replaced."""
    found = []
    for rows in torch.split(torch.arange(len(images), device=images.device), subject.batch_size):
        every = torch.ones(len(rows), *images.shape[2:], dtype=torch.bool, device=images.device)
        found.append(subject.program.predict(replace(rows, every)).detach())
    return torch.cat(found)


def _ends(counts: list[int], pixels: int, whole: Tensor, empty: Tensor) -> Tensor:
    """Answers [P, 2, Q, K] of deletion and insertion that are known: nothing hidden, and everything."""
    answers = whole.new_full((len(whole), 2, len(counts), whole.shape[1]), torch.nan)
    for i, count in enumerate(counts):
        if count in (0, pixels):
            answers[:, 0, i], answers[:, 1, i] = (empty, whole) if count else (whole, empty)
    return answers


def _answers(subject: Subject, replace: Replace, ranks: Tensor, counts: list[int]) -> Tensor:
    """Logits [P, 2, Q, K] with the top of `ranks` [P, H, W] replaced, and with all but the top, for Q counts.

    Both ways of all patches fill the batches together, patch by patch, so that few of them are smaller.
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


def _cpu(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.cpu()
