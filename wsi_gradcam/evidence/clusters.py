"""The kinds of evidence: directions of contributions, sorted by k-means, as many as keep when drawn again.

Contributions [n, C] are unit vectors, so that places are alike in what they consist of and not in how strong they are.
They are brought to their few main axes, in pieces and weighed by the size of the contribution, and sorted there: what
speaks for the target and what speaks against it, each for itself. Of the numbers of kinds that stay the same on other
halves of the places with other seeds (adjusted Rand index, Hubert and Arabie 1985) the one is taken whose kinds lie
farthest apart (silhouette, Rousseeuw 1987); where none stays, or none lies apart, that is said. Memory depends on the
number of channels and not on that of places, but for two numbers a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wsi_gradcam.errors import from_extra

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Side = Literal["for", "against"]
SIDES: tuple[Side, ...] = ("for", "against")
AXES = 32
FITTED = 2000  # places of a side that kinds are found on, drawn in proportion to what they contribute
COMPARED = 600  # of them, for the silhouette
MOST = 8  # kinds of a side: more than a reader keeps apart
SEEDS = 4
RESTARTS = 5  # of k-means: the one whose kinds lie farthest apart, lest a rare kind be lost in a large one
STABLE = 0.8  # mean adjusted Rand index over pairs of seeds from which a number of kinds is said to keep
APART = 0.25  # mean silhouette below which there is no structure to speak of (Kaufman and Rousseeuw 1990)
REST = 0.05  # of all contributions, in the places that contribute least, are of no kind


@dataclass(frozen=True, eq=False)
class Kinds:
    """Kinds of evidence.

    Attributes:
        axes: [C, R] the main axes of contributions.
        centres: [k, R] unit vectors; what speaks for the target first, and of each side the largest first.
        sides: of each kind.
        floors: of each side; places that contribute less to it are of no kind.
    """

    axes: NDArray[np.float32]
    centres: NDArray[np.float32]
    sides: tuple[Side, ...]
    floors: tuple[float, float]

    def __len__(self) -> int:
        return len(self.centres)

    def sort(self, features: NDArray[Any], values: Floats) -> NDArray[np.int64]:
        """Return the kind [n] of places with these contributions [n, C] of this sum [n]; -1 for none."""
        found: NDArray[np.int64] = np.full(len(values), -1)
        likeness = self.likeness(features)
        for side, floor in zip(SIDES, self.floors, strict=True):
            own = [i for i, of in enumerate(self.sides) if of == side]
            rows = np.flatnonzero(_speaking(values, side) >= floor)
            if own and len(rows):
                found[rows] = np.array(own)[likeness[rows][:, own].argmax(axis=1)]
        return found

    def likeness(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """Return the cosine [n, k] of places and the centres of kinds."""
        found: NDArray[np.float32] = _on(self.axes, features) @ self.centres.T
        return found


@dataclass(frozen=True)
class Trial:
    """So many kinds: the mean adjusted Rand index over pairs of seeds, and the mean silhouette."""

    kinds: int
    stability: float
    silhouette: float


@dataclass(frozen=True, eq=False)
class Choice:
    """The kinds that were found, and how each number of them did, by side."""

    kinds: Kinds
    tried: dict[Side, tuple[Trial, ...]]

    def chosen(self, side: Side) -> Trial | None:
        """Return the trial of the number of kinds that a side has; None where it has none."""
        count = self.kinds.sides.count(side)
        return next((one for one in self.tried[side] if one.kinds == count), None)

    def is_sure(self, side: Side) -> bool:
        """Return whether the number of kinds of a side keeps, and they lie apart."""
        one = self.chosen(side)
        return one is None or one.kinds == 1 or (one.stability >= STABLE and one.silhouette >= APART)


Piece = tuple["NDArray[Any]", "Floats", "Floats"]
"""Contributions [n, C], their sums [n], and weights [n] of places."""


def find_kinds(pieces: Callable[[], Iterable[Piece]], seed: int) -> Choice | None:
    """Return the kinds of the places that `pieces` yields, as often as it is called; None where nothing contributes."""
    floors = _floors_of(pieces())
    if not any(np.isfinite(floors)):
        return None
    axes = main_axes(pieces())
    found: dict[Side, tuple[NDArray[np.float32], tuple[Trial, ...]]] = {}
    for side, floor in zip(SIDES, floors, strict=True):
        sample = _sample(pieces(), axes, floor, side, seed)
        if len(sample):
            found[side] = _sorted(sample, seed)
    centres = np.concatenate([one for one, _ in found.values()])
    sides = tuple(side for side, (one, _) in found.items() for _ in one)
    tried = {side: found[side][1] if side in found else () for side in SIDES}
    return Choice(Kinds(axes, centres, sides, floors), tried)


def _sorted(sample: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], tuple[Trial, ...]]:
    """Return the centres [k, R] of the kinds of places [n, R] on the main axes, the largest first, and all trials."""
    different = len(np.unique(sample.round(3), axis=0))
    tried = [Trial(1, 1.0, 0.0)]
    if different > 2 and len(sample) >= 4 * MOST:
        tried = [_trial(sample, count, seed) for count in range(2, min(MOST, different - 1) + 1)]
    count = chosen_number(tried)
    centres = sample.mean(axis=0, keepdims=True) if count == 1 else _fitted(sample, count, seed)[0].cluster_centers_
    centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    sizes = np.bincount((sample @ centres.T).argmax(axis=1), minlength=count)
    return centres[np.argsort(-sizes, kind="stable")].astype(np.float32), tuple(tried)


def chosen_number(tried: Sequence[Trial]) -> int:
    """Return the number of kinds that keep and lie farthest apart; where none keeps, the one that keeps best."""
    stable = [one for one in tried if one.stability >= STABLE]
    if stable:
        return max(stable, key=lambda one: one.silhouette).kinds
    return max(tried, key=lambda one: one.stability).kinds


def main_axes(pieces: Iterable[Piece]) -> NDArray[np.float32]:
    """Return the main axes [C, R] of contributions, the largest first: eigenvectors of their weighted second moment."""
    moment: Floats | None = None
    for features, values, weights in pieces:
        weighed = features.astype(np.float64)
        own = (weighed * (weights * np.abs(values))[:, None]).T @ weighed
        moment = own if moment is None else moment + own
    assert moment is not None
    _, vectors = np.linalg.eigh(moment)
    axes = vectors[:, ::-1][:, :AXES]
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # LAPACK leaves them open
    return np.asarray(axes * signs, np.float32)


def _floors_of(pieces: Iterable[Piece]) -> tuple[float, float]:
    """Return, for each side, the contribution below which places hold `REST` of it; infinite where there is none."""
    values, weights = [], []
    for _, value, weight in pieces:
        values.append(value)
        weights.append(weight)
    value, weight = np.concatenate(values), np.concatenate(weights)
    first, second = (_floor(np.maximum(_speaking(value, side), 0), weight) for side in SIDES)
    return first, second


def _floor(size: Floats, weights: Floats) -> float:
    order = np.argsort(size, kind="stable")
    below = np.cumsum((size * weights)[order])
    return float(size[order[np.searchsorted(below, REST * below[-1])]]) if below[-1] > 0 else float("inf")


def _sample(
    pieces: Iterable[Piece], axes: NDArray[np.float32], floor: float, side: Side, seed: int
) -> NDArray[np.float32]:
    """Return places [n, R] of a side on the main axes, drawn in proportion to what they contribute.

    Each place has an exponential waiting time of its rate, and the first ones stay (Efraimidis and Spirakis 2006): what
    is drawn does not depend on how places are cut into pieces.
    """
    random = np.random.default_rng(seed)
    kept, times = np.zeros((0, axes.shape[1]), np.float32), np.zeros(0)
    for features, values, weights in pieces:
        size = _speaking(values, side)
        waiting = random.exponential(size=len(values))
        rows = np.flatnonzero((size >= floor) & (size > 0) & (weights > 0))
        times = np.concatenate([times, waiting[rows] / (size[rows] * weights[rows])])
        kept = np.concatenate([kept, _on(axes, features[rows])])
        if len(times) > FITTED:
            first = np.sort(np.argpartition(times, FITTED)[:FITTED])
            times, kept = times[first], kept[first]
    return kept


def _speaking(values: Floats, side: Side) -> Floats:
    """Return the contribution of places to a side; negative for those of the other."""
    return values if side == "for" else -values


def _trial(sample: NDArray[np.float32], count: int, seed: int) -> Trial:
    """Return how well so many kinds keep and how far they lie apart, of fits that see a half of the places each."""
    _, metrics = need_library()
    labels, apart = [], []
    for draw in range(SEEDS):
        half = np.random.default_rng([seed, draw]).permutation(len(sample))[: -(-len(sample) // 2)]
        model, silhouette = _fitted(sample[half], count, seed + draw)
        labels.append(model.predict(sample))
        apart.append(silhouette)
    pairs = [metrics.adjusted_rand_score(a, b) for a, b in combinations(labels, 2)]
    return Trial(count, float(np.mean(pairs)), float(np.mean(apart)))


def _fitted(sample: NDArray[np.float32], count: int, seed: int) -> tuple[Any, float]:
    """Return the k-means of several starts whose kinds lie farthest apart, and its mean silhouette."""
    cluster, metrics = need_library()
    some = sample[np.random.default_rng(seed).permutation(len(sample))[:COMPARED]]
    best: tuple[Any, float] | None = None
    for start in range(RESTARTS):
        model = cluster.KMeans(count, n_init=1, random_state=(1000 * seed + start) % 2**32, max_iter=50).fit(sample)
        labels = model.predict(some)
        apart = float(metrics.silhouette_score(some, labels)) if 1 < len(np.unique(labels)) < len(some) else -1.0
        if best is None or apart > best[1]:
            best = model, apart
    assert best is not None
    return best


def need_library() -> tuple[Any, Any]:
    """Return scikit-learn's modules `cluster` and `metrics`.

    Raises:
        MissingExtraError: it is not installed.
    """
    with from_extra("evidence", "evidence"):
        from sklearn import cluster, metrics
    return cluster, metrics


def _on(axes: NDArray[np.float32], features: NDArray[Any]) -> NDArray[np.float32]:
    """Return contributions [n, C] as unit vectors [n, R] on the main axes."""
    found = features.astype(np.float32) @ axes
    length = np.linalg.norm(found, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(found, length, out=np.zeros_like(found), where=length > 0)
    return unit


def pieces_of(features: NDArray[Any], values: Floats, weights: Floats, size: int = 4096) -> Iterator[Piece]:
    """Yield places that are in memory in pieces."""
    for start in range(0, len(values), size):
        rows = slice(start, start + size)
        yield features[rows], values[rows], weights[rows]
