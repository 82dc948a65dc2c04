"""The kinds of evidence: directions of contributions, sorted by k-means, as many as keep when drawn again.

Contributions [n, C] are unit vectors, so that places are alike in what they consist of and not in how strong they are.
They are brought to their few main axes, in pieces and weighed by the size of the contribution, and sorted there: what
speaks for the target and what speaks against it, each for itself. Of the numbers of kinds that stay the same on other
halves of the places with other seeds (adjusted Rand index, Hubert and Arabie 1985) the one is taken whose kinds lie
farthest apart (silhouette, Rousseeuw 1987); where none stays, or none lies apart, that is said. Bare glass and ink are
kinds by what they are, not by what the model makes of them: to a network glass may be what lymphocytes are, neither
being tumour, and nobody would call the two one morphology. Places are read once, and memory depends on the number of
channels and not on that of places.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wsi_gradcam.audit.schema import GLASS, PEN
from wsi_gradcam.errors import from_extra

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Shown = NDArray[np.int8]

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
STEPS = 64  # of contributions, for each doubling, in which their distribution is kept
NO_TISSUE = ("bare glass", "ink")  # kinds of what is there, so named unless they are given other names
# What places show in the order of `NO_TISSUE`, with the share of a place from which it is that; ink should be nowhere.
SHOWN = {GLASS: 0.5, PEN: 0.2}
APART_SHARE = 0.01  # of a side's evidence, from which glass or ink is a kind of its own; tissue must have as much
SPARE = 1.25  # times as many places are kept as are needed: some lie below the floor


@dataclass(frozen=True, eq=False)
class Kinds:
    """Kinds of evidence.

    Attributes:
        axes: [C, R] the main axes of contributions.
        centres: [k, R] unit vectors; what speaks for the target first, and of each side the largest first.
        sides: of each kind.
        floors: of each side; places that contribute less to it are of no kind.
        middles: [k] half of a kind lies on places that contribute more than this.
        shows: of kinds that are bare glass or ink, by their numbers: what of `NO_TISSUE`, from 1 on.
    """

    axes: NDArray[np.float32]
    centres: NDArray[np.float32]
    sides: tuple[Side, ...]
    floors: tuple[float, float]
    middles: tuple[float, ...] = ()
    shows: Mapping[int, int] = field(default_factory=dict)

    def digest(self) -> str:
        """Return the sha256 of all that sorts."""
        found = hashlib.sha256(repr((self.sides, self.floors, self.middles, self.shows)).encode())
        for array in (self.axes, self.centres):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    def __len__(self) -> int:
        return len(self.centres)

    def sort(self, features: NDArray[Any], values: Floats, shown: Shown | None = None) -> NDArray[np.int64]:
        """Return the kind [n] of places with these contributions [n, C] of this sum [n]; -1 for none.

        Args:
            shown: [n] what each place shows: 0 tissue, else of `NO_TISSUE`; None: tissue everywhere.
        """
        found: NDArray[np.int64] = np.full(len(values), -1)
        likeness = self.likeness(features)
        for side, floor in zip(SIDES, self.floors, strict=True):
            speaking = _speaking(values, side) >= floor
            own = [i for i, of in enumerate(self.sides) if of == side and i not in self.shows]
            rows = np.flatnonzero(speaking)
            if own and len(rows):
                found[rows] = np.array(own)[likeness[rows][:, own].argmax(axis=1)]
            for kind, what in self.shows.items():
                if self.sides[kind] == side and shown is not None:
                    found[speaking & (shown == what)] = kind
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
        """Return the trial of the number of kinds that a side has of tissue; None where it has none."""
        count = sum(of == side and i not in self.kinds.shows for i, of in enumerate(self.kinds.sides))
        return next((one for one in self.tried[side] if one.kinds == count), None)

    def is_sure(self, side: Side) -> bool:
        """Return whether the number of kinds of a side keeps, and they lie apart."""
        one = self.chosen(side)
        return one is None or one.kinds == 1 or (one.stability >= STABLE and one.silhouette >= APART)


Piece = tuple["NDArray[Any]", "Floats", "Floats", "Shown"]
"""Contributions [n, C], their sums [n], weights [n] of places, and what they show [n], see `Kinds.sort`."""


def find_kinds(pieces: Iterable[Piece], seed: int) -> Choice | None:
    """Return the kinds of the places that `pieces` yields; None where nothing contributes."""
    moment, drawn = _Moment(), {side: _Drawn(side, seed) for side in SIDES}
    for features, values, weights, shown in pieces:
        moment.add(features, np.abs(values) * weights)
        for one in drawn.values():
            one.add(features, values, weights, shown)
    floors = (drawn["for"].floor(), drawn["against"].floor())
    if not any(np.isfinite(floors)):
        return None
    axes = moment.axes()
    found: dict[Side, _OfSide] = {}
    samples = {side: drawn[side].above(floor) for side, floor in zip(SIDES, floors, strict=True)}
    for side, (features, _, shown) in samples.items():
        if len(features):
            found[side] = _of_side(_on(axes, features), shown, seed)
    centres = np.concatenate([one.centres for one in found.values()])
    sides = tuple(side for side, one in found.items() for _ in one.centres)
    shows = {sides.index(side) + i: what for side, one in found.items() for i, what in one.shows.items()}
    kinds = Kinds(axes, centres, sides, floors, shows=shows)
    return Choice(
        replace(kinds, middles=_middles(kinds, samples)), {s: found[s].tried if s in found else () for s in SIDES}
    )


@dataclass(frozen=True, eq=False)
class _OfSide:
    """The centres [k, R] of the kinds of a side, the largest first, which show no tissue, and all trials."""

    centres: NDArray[np.float32]
    shows: dict[int, int]
    tried: tuple[Trial, ...]


def _of_side(sample: NDArray[np.float32], shown: Shown, seed: int) -> _OfSide:
    """Return the kinds of places [n, R] on the main axes; those on glass are one, where there are enough, as is ink."""
    apart = [what for what in range(1, 1 + len(NO_TISSUE)) if (shown == what).mean() >= APART_SHARE]
    tissue = ~np.isin(shown, apart)
    if tissue.mean() < APART_SHARE:
        apart, tissue = [], np.ones(len(sample), np.bool_)
    centres, tried = _sorted(sample[tissue], seed)
    sizes = np.bincount((sample[tissue] @ centres.T).argmax(axis=1), minlength=len(centres)).tolist()
    middles = [sample[shown == what].mean(axis=0) for what in apart]
    unit = [middle / max(float(np.linalg.norm(middle)), 1e-12) for middle in middles]
    sizes += [int((shown == what).sum()) for what in apart]
    order = np.argsort(-np.array(sizes), kind="stable").tolist()
    whats = [0] * len(centres) + apart
    shows = {place: whats[i] for place, i in enumerate(order) if whats[i]}
    return _OfSide(np.stack([*centres, *unit])[order].astype(np.float32), shows, tried)


def _middles(kinds: Kinds, samples: Mapping[Side, tuple[NDArray[Any], Floats, Shown]]) -> tuple[float, ...]:
    """Return for each kind the median contribution of places that are drawn in proportion to it."""
    middles = [0.0] * len(kinds)
    for features, values, shown in samples.values():
        sorted_as = kinds.sort(features, values, shown)
        for kind in np.unique(sorted_as[sorted_as >= 0]).tolist():
            middles[kind] = float(np.median(np.abs(values[sorted_as == kind])))
    return tuple(middles)


def _sorted(sample: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], tuple[Trial, ...]]:
    """Return the centres [k, R] of the kinds of places [n, R] on the main axes, the largest first, and all trials."""
    different = len(np.unique(sample.round(3), axis=0))
    tried = [Trial(1, 1.0, 0.0)]
    if different > 2 and len(sample) >= 4 * MOST:
        tried = _trials(sample, range(2, min(MOST, different - 1) + 1), seed)
    count = chosen_number(tried)
    centres = sample.mean(axis=0, keepdims=True)
    if count > 1:
        centres = _Half(sample, seed, None).fitted(count)[0].cluster_centers_
    centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    sizes = np.bincount((sample @ centres.T).argmax(axis=1), minlength=count)
    return centres[np.argsort(-sizes, kind="stable")].astype(np.float32), tuple(tried)


def chosen_number(tried: Sequence[Trial]) -> int:
    """Return the number of kinds that keep and lie farthest apart; where none keeps, the one that keeps best."""
    stable = [one for one in tried if one.stability >= STABLE]
    if stable:
        return max(stable, key=lambda one: one.silhouette).kinds
    return max(tried, key=lambda one: one.stability).kinds


def shown_of(arrays: Mapping[str, NDArray[Any]]) -> Shown:
    """Return what each place of a piece shows, see `Kinds.sort`; tissue where pixels were not looked at."""
    nothing = np.zeros(len(arrays["place/value"]))
    return shown_by({name: arrays.get(f"suspect/{name}", nothing) for name in SHOWN})


def shown_by(shares: Mapping[str, NDArray[Any]]) -> Shown:
    """Return what places show, given the shares [n] of each that are glass and ink."""
    found = np.zeros(len(shares[GLASS]), np.int8)
    for what, (name, least) in enumerate(SHOWN.items(), 1):
        found[shares[name] >= least] = what
    return found


class _Moment:
    """The weighted second moment of contributions."""

    def __init__(self) -> None:
        self._sum: Floats | None = None

    def add(self, features: NDArray[Any], weights: Floats) -> None:
        """Add contributions [n, C] of these weights [n]."""
        whole = features.astype(np.float64)
        own = (whole * weights[:, None]).T @ whole
        self._sum = own if self._sum is None else self._sum + own

    def axes(self) -> NDArray[np.float32]:
        """Return the main axes [C, R], the largest first: eigenvectors of the moment."""
        assert self._sum is not None
        _, vectors = np.linalg.eigh(self._sum)
        axes = vectors[:, ::-1][:, :AXES]
        signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # LAPACK leaves them open
        return np.asarray(axes * signs, np.float32)


class _Drawn:
    """Places of a side, drawn in proportion to what they contribute, and the distribution of all contributions.

    Each place has an exponential waiting time of its rate, and the first ones stay (Efraimidis and Spirakis 2006): what
    is drawn does not depend on how places are cut into pieces.
    """

    def __init__(self, side: Side, seed: int) -> None:
        self._side, self._random = side, np.random.default_rng(seed)
        self._below: dict[int, float] = {}  # what places contribute, by steps of their size
        self._times, self._values = np.zeros(0), np.zeros(0)
        self._shown: Shown = np.zeros(0, np.int8)
        self._features: NDArray[Any] | None = None

    def add(self, features: NDArray[Any], values: Floats, weights: Floats, shown: Shown) -> None:
        """Add places: contributions [n, C], their sums [n], weights [n], and what they show [n]."""
        waiting = self._random.exponential(size=len(values))
        size = _speaking(values, self._side)
        rows = np.flatnonzero((size > 0) & (weights > 0))
        mass = size[rows] * weights[rows]
        steps, member = np.unique(np.floor(np.log2(size[rows]) * STEPS).astype(np.int64), return_inverse=True)
        for step, more in zip(steps.tolist(), np.bincount(member, mass, len(steps)).tolist(), strict=True):
            self._below[step] = self._below.get(step, 0.0) + more
        new = waiting[rows] / mass
        if len(self._times) == int(SPARE * FITTED):
            soon = new < self._times.max()
            rows, new = rows[soon], new[soon]
        times, kept = np.concatenate([self._times, new]), features[rows]
        if self._features is not None:
            kept = np.concatenate([self._features, kept])
        first = np.sort(np.argsort(times, kind="stable")[: int(SPARE * FITTED)])
        self._times, self._features = times[first], kept[first]
        self._values = np.concatenate([self._values, values[rows]])[first]
        self._shown = np.concatenate([self._shown, shown[rows]])[first]

    def floor(self) -> float:
        """Return the contribution below which places hold less than `REST` of all; infinite where there is none."""
        if not self._below:
            return float("inf")
        steps = sorted(self._below)
        below = np.cumsum([self._below[step] for step in steps])
        return float(2.0 ** (steps[int(np.searchsorted(below, REST * below[-1]))] / STEPS))

    def above(self, floor: float) -> tuple[NDArray[Any], Floats, Shown]:
        """Return contributions [n, C], sums [n], and what is shown [n], of places drawn that reach the floor."""
        if self._features is None:
            return np.zeros((0, 0)), np.zeros(0), self._shown
        rows = np.flatnonzero(_speaking(self._values, self._side) >= floor)
        first = np.sort(rows[np.argsort(self._times[rows], kind="stable")[:FITTED]])
        return self._features[first], self._values[first], self._shown[first]


def _speaking(values: Floats, side: Side) -> Floats:
    """Return the contribution of places to a side; negative for those of the other."""
    return values if side == "for" else -values


class _Half:
    """A half of the places, drawn by chance, and the distances of some of it."""

    def __init__(self, sample: NDArray[np.float32], seed: int, draw: int | None) -> None:
        _, metrics = need_library()
        self.seed = seed if draw is None else seed + draw
        self.places = sample
        if draw is not None:
            self.places = sample[np.random.default_rng([seed, draw]).permutation(len(sample))[: -(-len(sample) // 2)]]
        some = np.random.default_rng(self.seed).permutation(len(self.places))[:COMPARED]
        self._some = self.places[some]
        self._distances = metrics.pairwise_distances(self._some)
        np.fill_diagonal(self._distances, 0)

    def fitted(self, count: int) -> tuple[Any, float]:
        """Return the k-means of several starts whose kinds lie farthest apart, and its mean silhouette."""
        cluster, metrics = need_library()
        best: tuple[Any, float] | None = None
        for start in range(RESTARTS):
            model = cluster.KMeans(count, n_init=1, random_state=(1000 * self.seed + start) % 2**32, max_iter=50)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of places that are alike, and so fewer kinds than asked for
                model.fit(self.places)
            labels, apart = model.predict(self._some), -1.0
            if 1 < len(np.unique(labels)) < len(self._some):
                apart = float(metrics.silhouette_score(self._distances, labels, metric="precomputed"))
            if best is None or apart > best[1]:
                best = model, apart
        assert best is not None
        return best


def _trials(sample: NDArray[np.float32], counts: Sequence[int], seed: int) -> list[Trial]:
    """Return how well each number of kinds keeps and how far they lie apart, of fits that see a half of the places."""
    _, metrics = need_library()
    halves, found = [_Half(sample, seed, draw) for draw in range(SEEDS)], []
    for count in counts:
        fits = [half.fitted(count) for half in halves]
        labels = [model.predict(sample) for model, _ in fits]
        pairs = [metrics.adjusted_rand_score(a, b) for a, b in combinations(labels, 2)]
        found.append(Trial(count, float(np.mean(pairs)), float(np.mean([apart for _, apart in fits]))))
    return found


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
