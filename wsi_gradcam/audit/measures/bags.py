"""Slide-level models under audit: how the answer changes as patches leave the bag, and how similar relevances are.

Patches are removed in the order of their relevance, most relevant first (MoRF) or least relevant first (LeRF), as in
Hense 2024 (arXiv 2406.04280) and Bluecher 2024 (arXiv 2401.06654). With a map that shows what decides, the answer falls
early in the first order, and late in the second:

    AUPC = mean_q s(X without the q most relevant),    SRG = mean_q [s(without the q least) - s(without the q most)].

Networks that pool by attention run once for all steps of all orders: patches that leave together are pooled together,
and pools are joined.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wsi_gradcam.audit.measures.sanity import layers_in_order, randomise
from wsi_gradcam.audit.schema import ATTENTION
from wsi_gradcam.cam.targets import score_of_bag
from wsi_gradcam.mil.attribution import explain_bag
from wsi_gradcam.mil.networks import AttentionPool, Opaque, Pooled
from wsi_gradcam.mil.spec import slide_probabilities

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.cam.targets import Target
    from wsi_gradcam.mil.networks import Aggregator
    from wsi_gradcam.mil.spec import SlideActivation

    Floats = NDArray[np.float64]
    Rows = NDArray[np.int64]
    Masks = NDArray[np.bool_]

CHUNK_ROWS = 2048
STEPS, FEWER_STEPS = 100, 20  # steps of a curve: for networks that run once for all steps, and for others
HEAD = "top"  # layer names in the networks of `mil.networks`
TRIED_LAYERS = 8  # patches used to find the order of a network's layers


@dataclass(frozen=True, eq=False)
class BagSubject:
    """A bag under audit, and the network that answers for it.

    Attributes:
        network: in double precision.
        features: [N, D], an array or an object that returns one for a slice of rows.
        target: what is explained; `predicted` is replaced by the class predicted for the whole bag.
        activation: how logits become probabilities.
        logits: [K] of the whole bag.
    """

    network: Aggregator
    features: Any
    target: Target
    activation: SlideActivation
    logits: Floats

    @classmethod
    def of(cls, network: Aggregator, features: Any, target: Target, activation: SlideActivation) -> BagSubject:
        """Return the subject; the network answers once for the whole bag."""
        logits = whole_answer(network, features)
        return cls(network, features, fixed(target, logits), activation, logits)

    @property
    def in_one_go(self) -> bool:
        """Whether all steps of all orders are answered in one pass over the features."""
        return isinstance(self.network, Pooled) and not self.network.critical_count

    def scalar(self, logits: Floats) -> Floats:
        """Return the explained scalar [...] from logits [..., K]."""
        flat = torch.from_numpy(np.ascontiguousarray(logits.reshape(-1, logits.shape[-1])))
        found: Floats = score_of_bag(self.target, torch.from_numpy(self.logits))(flat).double().numpy()
        return found.reshape(logits.shape[:-1])

    def probability(self, logits: Floats) -> Floats | None:
        """Return the probability [...] of the explained class; None if there is none."""
        if not self.target.is_class or self.target.index is None or self.activation == "none":
            return None
        found: Floats = slide_probabilities(logits, self.activation)[..., self.target.index]
        return found

    def says_so(self, logits: Floats) -> Masks | None:
        """Return whether the answer is the explained class [...]; None if the answer is not a class.

        With softmax, it is if no other logit is larger; otherwise, if its own is above 0.
        """
        if not self.target.is_class or self.target.index is None or self.activation in ("none", "hazard"):
            return None
        if self.activation == "softmax" and logits.shape[-1] > 1:
            called = (logits.argmax(axis=-1) == self.target.index) & ~np.isnan(logits).any(axis=-1)
            return np.asarray(called, np.bool_)
        return np.asarray(logits[..., self.target.index] > 0, np.bool_)

    def without(self, masks: Masks) -> Floats:
        """Return logits [M, K] of the bag without the patches in each mask [M, N]; NaN if none is left."""
        left, _ = answers_without(self.network, self.features, (~masks).astype(np.int64), 2)
        return left[:, 1]

    def relevance(self, methods: Sequence[str]) -> dict[str, Floats]:
        """Return the relevance [N] of the patches by method; for attention, its weight."""
        return relevance_of(self.network, self.features, self.target, methods)

    def part(self, rows: Rows) -> BagSubject:
        """Return the bag with some of its patches, for which the same target is explained."""
        return self.of(self.network, rows_of(self.features, rows), self.target, self.activation)


def fixed(target: Target, logits: Floats) -> Target:
    """Return a target with the class predicted for the bag in place of `predicted`."""
    if target.index is not None or target.function is not None:
        return target
    return replace(target, index=int(np.argmax(logits)))


def relevance_of(network: Aggregator, features: Any, target: Target, methods: Sequence[str]) -> dict[str, Floats]:
    """Return the relevance [N] by method; with several attention heads, that of the class, else their mean."""
    told = explain_bag(network, features, [target], methods)
    found = {name: values[:, 0] for name, values in told.relevance.items()}
    if ATTENTION in methods:
        found[ATTENTION] = of_heads(told.attention["attention_weight"], target, len(told.logits))
    return {name: found[name] for name in methods}


def of_heads(weights: Floats, target: Target, classes: int) -> Floats:
    """Return attention [N] from heads [N, H]: that of the explained class if each class has one, else their mean."""
    heads = weights.shape[1]
    if heads == classes and heads > 1 and target.index is not None:
        return np.asarray(weights[:, target.index], np.float64)
    mean: Floats = np.asarray(weights, np.float64).mean(axis=1)
    return mean


def rows_of(features: Any, rows: Rows) -> NDArray[np.floating]:
    """Return some rows of features in memory, read in blocks."""
    parts = []
    for start in range(0, len(features), CHUNK_ROWS):
        inside = rows[(rows >= start) & (rows < start + CHUNK_ROWS)] - start
        if len(inside):
            parts.append(np.asarray(features[start : start + CHUNK_ROWS])[inside])
    return np.concatenate(parts)


def whole_answer(network: Aggregator, features: Any) -> Floats:
    """Return logits [K] of the whole bag."""
    logits: Floats = answers_without(network, features, np.zeros((1, len(features)), np.int64), 1)[0][0, 0]
    return logits


def answers_without(network: Aggregator, features: Any, leaves: Rows, steps: int) -> tuple[Floats, Floats]:
    """Return logits ([O, S, K], [O, S, K]) of what remains before each step, and of what has left by its end.

    Args:
        leaves: [O, N], the step from 0 to S - 1 in which a patch leaves, by order: at [o, s], the first result is the
            answer to the patches with steps of s or later, the second to those with steps up to s. NaN for empty bags.
        steps: S.
    """
    with torch.no_grad():
        if isinstance(network, Pooled):
            return _pooled_answers(network, features, leaves, steps)
        return _whole_answers(network, features, leaves, steps)


def _whole_answers(network: Aggregator, features: Any, leaves: Rows, steps: int) -> tuple[Floats, Floats]:
    bag = _block(network, features, 0, len(features))
    left, gone = np.full((2, len(leaves), steps, network.class_count), np.nan)
    known: dict[bytes, Floats] = {}

    def answer(mask: Masks) -> Floats:
        key = np.packbits(mask).tobytes()
        if key not in known:
            logits: Floats = network(bag[torch.from_numpy(mask).to(bag.device)]).logits.double().cpu().numpy()
            known[key] = logits
        return known[key]

    for o, order in enumerate(leaves):
        for s in range(steps):
            for values, mask in ((left, order >= s), (gone, order <= s)):
                if mask.any():
                    values[o, s] = answer(mask)
    return left, gone


def _pooled_answers(network: Pooled, features: Any, leaves: Rows, steps: int) -> tuple[Floats, Floats]:
    answers = np.full((2, len(leaves), steps, network.class_count), np.nan)
    for rows, wanted in _by_critical(network, features, leaves, steps).items():
        critical = torch.stack([_block(network, features, row, row + 1)[0] for row in rows]) if rows else None
        given = _block(network, features, 0, 1)[:0] if critical is None else critical
        pools = {o: _StepPools(steps) for o in dict.fromkeys(o for _, o, _ in wanted)}
        for start in range(0, len(features), CHUNK_ROWS):
            scores, values = network.instances(_block(network, features, start, start + CHUNK_ROWS), given)
            for o, pool in pools.items():
                pool.add(torch.from_numpy(leaves[o, start : start + CHUNK_ROWS]).to(scores.device), scores, values)
        means = {o: pool.joined() for o, pool in pools.items()}
        pooled = torch.stack([means[o][side, s] for side, o, s in wanted])
        logits = network.head(pooled, given.expand(len(wanted), *given.shape)).double().cpu().numpy()
        for (side, o, s), answer in zip(wanted, logits, strict=True):
            answers[side, o, s] = answer
    return answers[0], answers[1]


def _by_critical(
    network: Pooled, features: Any, leaves: Rows, steps: int
) -> dict[tuple[int, ...], list[tuple[int, int, int]]]:
    """Return the bags (side, order, step) that have patches, by the rows of their critical patches."""
    found: dict[tuple[int, ...], list[tuple[int, int, int]]] = defaultdict(list)
    scores = np.empty((len(features), network.critical_count))
    for start in range(0, len(features), CHUNK_ROWS) if network.critical_count else ():
        block = network.critical_scores(_block(network, features, start, start + CHUNK_ROWS))
        scores[start : start + len(block)] = block.double().cpu().numpy()
    for o, order in enumerate(leaves):
        first, last = int(order.min()), int(order.max())
        best = [_best(scores, np.flatnonzero(order == s)) for s in range(steps)] if network.critical_count else []
        for side, walk in ((0, range(last, -1, -1)), (1, range(first, steps))):
            chosen: Rows | None = None
            for s in walk:
                if network.critical_count:
                    chosen = _better(scores, chosen, best[s])
                found[tuple(chosen.tolist()) if chosen is not None else ()].append((side, o, s))
    return found


def _best(scores: Floats, rows: Rows) -> Rows | None:
    return rows[scores[rows].argmax(axis=0)] if len(rows) else None


def _better(scores: Floats, first: Rows | None, second: Rows | None) -> Rows | None:
    """Return, for each kind of critical patch, the row with the larger score, or the earlier one if equal."""
    if first is None or second is None:
        return second if first is None else first
    kinds = np.arange(scores.shape[1])
    a, b = scores[first, kinds], scores[second, kinds]
    return np.where((b > a) | ((b == a) & (second < first)), second, first)


class _StepPools:
    """The means of values, weighted by the softmax of scores, of each step's patches, joined from either end."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.top = self.total = self.value = torch.empty(0)

    def add(self, leaves: Tensor, scores: Tensor, values: Tensor) -> None:
        """Add scores [n, H] and values [n, V] of patches that leave in steps `leaves` [n]."""
        scores, values = scores.double(), values.double()
        heads, width = scores.shape[1], values.shape[1]
        if not self.top.numel():
            self.top = scores.new_full((self.steps, heads), -torch.inf)
            self.total = scores.new_zeros(self.steps, heads)
            self.value = scores.new_zeros(self.steps, heads, width)
        top = self.top.scatter_reduce(0, leaves[:, None].expand(-1, heads), scores, "amax")
        shift = torch.where(top.isfinite(), top, 0)
        kept, weights = (self.top - shift).exp(), (scores - shift[leaves]).exp()
        self.total = (self.total * kept).index_add_(0, leaves, weights)
        self.value = self.value * kept[..., None]
        for h in range(heads):
            self.value[:, h].index_add_(0, leaves, weights[:, h, None] * values)
        self.top = top

    def joined(self) -> Tensor:
        """Return the means [2, S, H, V] of what leaves in each step or later, and in it or earlier.

        Sums begin at the end that is left last, so that small terms are added before large ones.
        """
        share = (self.top - self.top.amax(dim=0)).exp()
        total, value = self.total * share, self.value * share[..., None]
        sums = [(part.flip(0).cumsum(0).flip(0), part.cumsum(0)) for part in (total, value)]
        return torch.stack([values / totals[..., None] for totals, values in zip(*sums, strict=True)])


def _block(network: Aggregator, features: Any, start: int, stop: int) -> Tensor:
    parameter = next(iter(network.parameters()), torch.zeros((), dtype=torch.float64))
    block = np.asarray(features[start:stop])
    return torch.from_numpy(np.array(block, np.float64)).to(parameter.device, parameter.dtype)


def is_constant(relevance: Floats) -> bool:
    """Return whether all patches [N] have the same relevance, up to float32 rounding.

    >>> is_constant(np.array([0.2, 0.2 + 1e-9])), is_constant(np.array([0.2, 0.3]))
    (True, False)
    """
    known = relevance[np.isfinite(relevance)]
    return not len(known) or bool(np.ptp(known) <= 1e-6 * np.abs(known).max())


def leaving_order(relevance: Floats, seed: int) -> Rows:
    """Return the position of each patch [N] in the order in which the most relevant leaves first; ties at random.

    Patches with NaN leave last.
    """
    ties = np.random.default_rng(seed).random(len(relevance))
    known = np.where(np.isfinite(relevance), relevance, -np.inf)
    place = np.empty(len(relevance), np.int64)
    place[np.lexsort((ties, -known))] = np.arange(len(relevance))
    return place


@dataclass(frozen=True, eq=False)
class Flipping:
    """A bag's logits as patches leave it in an order, and as they come back, in Q steps.

    Attributes:
        fractions: [Q] of the patches that have left.
        most, least: [Q, K] without the most, or the least relevant patches.
        counts: [C] numbers of patches, ascending.
        kept, removed: [C, K] for that many most relevant patches alone, and for all but them; NaN for none.
    """

    fractions: Floats
    most: Floats
    least: Floats
    counts: Rows
    kept: Floats
    removed: Floats


def fractions_of(steps: int) -> Floats:
    """Return the fractions of a curve's steps: 0 and up to, but not, 1."""
    found: Floats = np.arange(steps) / steps
    return found


def flipping(subject: BagSubject, orders: Sequence[Rows]) -> list[Flipping]:
    """Return how the answer changes as patches leave, by order: positions [N] as from `leaving_order`."""
    count, fine = len(subject.features), subject.in_one_go
    fractions = fractions_of(STEPS if fine else FEWER_STEPS)
    gone = np.minimum(np.round(fractions * count).astype(np.int64), count - 1)
    counts = counts_of(count) if fine else np.unique(np.clip(gone, 1, count))
    counts = np.union1d(counts, [count])
    cuts = np.unique(np.concatenate([gone, count - gone, counts, count - counts]))
    cuts = cuts[cuts < count]  # a step begins at each of these
    leaves = np.stack([np.searchsorted(cuts, place, side="right") - 1 for place in orders])
    left, has_left = answers_without(subject.network, subject.features, leaves, len(cuts))
    ends = np.append(cuts[1:], count)
    found = []
    for o in range(len(orders)):
        without = {int(n): left[o, s] for s, n in enumerate(cuts)} | {count: np.full(left.shape[-1], np.nan)}
        alone = {int(n): has_left[o, s] for s, n in enumerate(ends)}
        found.append(
            Flipping(
                fractions,
                np.stack([without[int(n)] for n in gone]),
                np.stack([alone[int(count - n)] for n in gone]),
                counts,
                np.stack([alone[int(n)] for n in counts]),
                np.stack([without[int(n)] for n in counts]),
            )
        )
    return found


def counts_of(count: int) -> Rows:
    """Return numbers of patches from 1 to `count`, each larger than the previous one by a fifth.

    >>> counts_of(20).tolist()
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20]
    """
    found, at = [], 1
    while at < count:
        found.append(at)
        at = max(at + 1, round(at * 1.2))
    return np.array([*found, count], np.int64)


def aupc(curve: Floats) -> float:
    """Return the area under a curve of flipped patches: its mean height (Hense 2024)."""
    return float(np.mean(curve))


def srg(most: Floats, least: Floats) -> float:
    """Return the symmetric relevance gain: mean(LeRF - MoRF); 0 for chance (Bluecher 2024, arXiv 2401.06654)."""
    return float(np.mean(least - most))


def fewest_that_keep(counts: Rows, says_so: Masks) -> float:
    """Return the smallest number of most relevant patches from which on the answer stays the same.

    `says_so` [C] says whether it is the same for each number in `counts` [C]; the last is the whole bag itself.
    """
    kept = np.logical_and.accumulate(says_so[::-1])[::-1]
    return float(counts[kept.argmax()]) if kept.any() else float("nan")


def fewest_that_change(counts: Rows, says_so: Masks) -> float:
    """Return the smallest number of most relevant patches whose removal changes the answer; all if none does."""
    changed = ~says_so[:-1]
    return float(counts[:-1][changed.argmax()]) if changed.any() else float(counts[-1])


def overlap_of_top(first: Floats, second: Floats, count: int, seed: int) -> float:
    """Return the share of the `count` most relevant patches that two relevances [N] have in common; ties at random."""
    a, b = (leaving_order(values, seed + i) < count for i, values in enumerate((first, second)))
    return float((a & b).sum() / count)


def randomised_pairs(
    network: Aggregator, features: Any, draws: int, seed: int
) -> Iterator[tuple[Aggregator, Aggregator, Aggregator]]:
    """Yield the network with random weights, and the same with the last layer's, and its attention's, sign flipped.

    As in `measures.sanity.staying_maps`, what follows the evidence flips in one and stays in the other, and cancels
    out. If no layer belongs to attention alone, the random network itself takes the place of the one with flipped
    attention.
    """
    for changed, last in _random_copies(network, features, draws, seed):
        turned, looking = copy.deepcopy(changed), copy.deepcopy(changed)
        _turn(turned.get_submodule(last))
        if isinstance(looking, AttentionPool):
            _turn(looking.c)
        yield changed, turned, looking


def _random_copies(network: Aggregator, features: Any, draws: int, seed: int) -> Iterator[tuple[Aggregator, str]]:
    """Yield the network with random weights, and the name of its last layer; nothing for one without weights."""
    names = [name for name, part in network.named_modules() if any(True for _ in part.parameters(recurse=False))]
    if not names:
        return
    last = _last_layer(network, features, names)
    for draw in range(draws):
        changed = copy.deepcopy(network)
        for number, name in enumerate(names):
            randomise(changed.get_submodule(name), seed + 10_000 * draw + number)
        yield changed, last


def _last_layer(network: Aggregator, features: Any, names: Sequence[str]) -> str:
    """Return the layer that produces the logits: in our own networks the head's, in others the one that runs last."""
    if not isinstance(network, Opaque):
        return [name for name in names if name.split(".")[0] == HEAD][-1]
    run = layers_in_order(network, _block(network, features, 0, TRIED_LAYERS))
    return run[-1] if run else names[-1]


@torch.no_grad()
def _turn(layer: torch.nn.Module) -> None:
    for parameter in layer.parameters(recurse=False):
        if parameter.ndim > 1:
            parameter.neg_()


def random_answers(network: Aggregator, features: Any, draws: int, seed: int) -> Floats:
    """Return logits [draws, K] of copies of the network with random weights; the same copies for the same seed."""
    copies = _random_copies(network, features, draws, seed)
    found = [whole_answer(changed, features) for changed, _ in copies]
    return np.stack(found) if found else np.empty((0, network.class_count))


def perturbed(features: NDArray[np.floating], change: str, random: np.random.Generator) -> Floats:
    """Return features [N, D] with noise of a tenth of each one's deviation over the bag, or rounded to float16."""
    values = np.asarray(features, np.float64)
    if change == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float64)
    moved: Floats = values + 0.1 * values.std(axis=0) * random.standard_normal(values.shape)
    return moved
