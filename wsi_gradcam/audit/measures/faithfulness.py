"""Faithfulness: how the answer changes as pixels of a patch, or patches of a slide, are taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curves:
    """Answers to N patches as pixels go and come; NaN for a patch whose map is not finite.

    Attributes:
        deletion, insertion: [N, Q] explained scalar (a logit), by the share of the pixels deleted, or inserted.
        deletion_probability, insertion_probability: [N, Q]; None where no class is explained.
    """

    deletion: Floats
    insertion: Floats
    deletion_probability: Floats | None = None
    insertion_probability: Floats | None = None

    def score(self, fractions: Sequence[float]) -> Floats:
        """Return half of insertion less deletion, [N], in logits: what the order of the map is worth; 0 for chance.

        `fractions` [Q] are where the curves were measured, ascending.
        """
        return (mean_height(self.insertion, fractions) - mean_height(self.deletion, fractions)) / 2

    def probability_score(self, fractions: Sequence[float]) -> Floats | None:
        """Return the same in probability; None where no class is explained."""
        if self.deletion_probability is None or self.insertion_probability is None:
            return None
        kept, gone = (mean_height(part, fractions) for part in (self.insertion_probability, self.deletion_probability))
        return (kept - gone) / 2

    @property
    def road(self) -> Floats:
        """Half of the mean of (least relevant first less most relevant first) over the fractions, [N], in logits.

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
    """Return a slide's score as its patches are taken away, [Q]: `most` relevant first, `least` first, at `random`.

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
    fractions: Floats,
) -> Floats:
    gone = [round(fraction * len(scores)) for fraction in fractions.tolist()]
    return np.array([slide_score(scores[order[count:]]) for count in gone])
