"""Measurements of patches: typed records, the named arrays that hold them on disk, and those of a whole audit.

A record is a dataclass with keyword-only fields, whose arrays have patches as their first axis. `stored` gives the name
under which a field's arrays are stored; for a mapping it has a pair of braces for each level of keys:

    worth: Mapping[str, Floats] = stored("locality/{}/worth")

Then everything that leads from numbers of patches to statements: samples, intervals, tests and effects, by slide.
Patches of one slide are similar, so slides are resampled. If there are fewer than `FEWEST_SLIDES`, patches are, and
the statement is only about these slides: `unit` says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from wsi_gradcam.audit.plan import Arrays, read_arrays
from wsi_gradcam.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from wsi_gradcam.audit.plan import AuditFolder, SlideSample

Floats = NDArray[np.float64]
Unit = Literal["slide", "patch"]

FEWEST_SLIDES = 6  # with fewer, nothing can be said about other slides
# For a test that flips signs: with 9, p cannot fall below 2 / 2**9, which finds nothing among a dozen verdicts.
FEWEST_FLIPS = 10
LEVEL = 0.95
RESAMPLES = 2000
PERMUTATIONS = 4999
KEPT_UNITS = 500  # whose draws are kept: 8 MB


@dataclass(frozen=True)
class Estimate:
    """A weighted mean with its 95% interval.

    Attributes:
        value: NaN if no patch counts.
        low, high: percentiles of the bootstrap, widened for few units as in Student's t.
        patches, slides: numbers of those that count.
        missing: patches without a number.
        unit: what was resampled.
    """

    value: float
    low: float
    high: float
    patches: int
    slides: int
    missing: int
    unit: Unit


@dataclass(frozen=True)
class Comparison:
    """Two numbers for each patch, compared.

    Attributes:
        difference: the first minus the second.
        p: two-sided, of the test that flips the signs of the units' differences; for 6 to 9 slides, Student's paired t.
        spread: standard deviation of the patches' differences.
        effect: mean over standard deviation of the patches' differences (Cohen's d of pairs).
        better: share of the patches where the first is larger; ties count half.
    """

    difference: Estimate
    p: float
    spread: float
    effect: float
    better: float


def stratified_sample(
    strata: Sequence[str] | NDArray[np.str_], count: int, seed: int, fewest: int = 1
) -> tuple[NDArray[np.int64], Floats]:
    """Return (ascending indices, weights) of about `count` rows: each stratum in proportion, at least `fewest` of it.

    A row's weight is the number of rows that it stands for, so that weighted means are those of all rows whatever the
    proportions. The same seed gives the same rows, and a stratum's rows do not depend on other strata.
    """
    if count < 1 or fewest < 1:
        raise ConfigError(f"a sample of {count} patches, {fewest} of each stratum; expected 1 or more")
    names, member = np.unique(np.asarray(strata), return_inverse=True)
    sizes = np.bincount(member, minlength=len(names))
    chosen, weights = [], []
    for number, size in enumerate(sizes.tolist()):
        wanted = min(size, max(fewest, round(count * size / len(member))))
        rows = np.flatnonzero(member == number)
        random = np.random.default_rng([seed, *str(names[number]).encode()])
        chosen.append(random.choice(rows, wanted, replace=False))
        weights.append(np.full(wanted, size / wanted))
    indices, weight = np.concatenate(chosen), np.concatenate(weights)
    order = np.argsort(indices)
    return indices[order].astype(np.int64), weight[order]


def estimate(values: ArrayLike, slides: ArrayLike, weights: ArrayLike | None = None, seed: int = 0) -> Estimate:
    """Estimate the weighted mean of `values` [N], and its interval by bootstrap of slides (`slides` [N] are their ids).

    Other things that make values similar may take the place of slides, such as draws of random weights. NaNs are left
    out, and counted.
    """
    sums, heavy, unit, counted = _units(np.asarray(values, np.float64)[None], slides, weights)
    number = len(np.asarray(values))
    if not counted.any():
        return Estimate(np.nan, np.nan, np.nan, 0, 0, number, unit)
    means = _resampled(len(heavy), seed) @ np.stack([sums[0], heavy], axis=1)
    low, high = np.quantile(means[:, 0] / means[:, 1], _percentiles(len(heavy)))
    present = len(np.unique(np.asarray(slides)[counted]))
    patches = int(counted.sum())
    value = float(sums[0].sum() / heavy.sum())
    return Estimate(value, float(low), float(high), patches, present, number - patches, unit)


def compare(
    first: ArrayLike, second: ArrayLike, slides: ArrayLike, weights: ArrayLike | None = None, seed: int = 0
) -> Comparison:
    """Compare `first` [N] with `second` [N] of the same patches; a pair with a NaN is left out."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    gap = a - b
    interval = estimate(gap, slides, weights, seed)
    if not interval.patches:
        return Comparison(interval, np.nan, np.nan, np.nan, np.nan)
    known = gap[~np.isnan(gap)]
    spread = known.std(ddof=1) if len(known) > 1 else 0.0
    effect = float(known.mean() / spread) if spread else float(np.sign(known.mean())) * np.inf if known.any() else 0.0
    better = float((known > 0).mean() + (known == 0).mean() / 2)
    sums, _, unit, _ = _units(gap[None], slides, weights)
    few = unit == "slide" and len(sums[0]) < FEWEST_FLIPS
    p = _student(sums[0]) if few else _flipped(sums[0], seed)
    return Comparison(interval, p, float(spread), effect, better)


def permutation_p(
    values: Floats, groups: NDArray[np.str_], seed: int, strata: NDArray[np.str_] | None = None
) -> float | None:
    """Return the p of the sum of squares between groups when slides are permuted; None if there is only one group.

    `values` and `groups` [S] belong to slides; groups may be their sites. They are permuted within `strata` [S], such
    as labels: a different mix of cases is not an effect of the site.
    """
    names, member = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None
    sizes = np.bincount(member, minlength=len(names))
    random = np.random.default_rng(seed)
    rows = [np.arange(len(values))] if strata is None else [np.flatnonzero(strata == one) for one in np.unique(strata)]

    def between(of: Floats) -> float:
        return float((np.bincount(member, of, len(names)) ** 2 / sizes).sum())

    own, larger = between(values), 0
    for _ in range(PERMUTATIONS):
        moved = values.copy()
        for some in rows:
            moved[some] = values[random.permutation(some)]
        larger += between(moved) >= own * (1 - 1e-12)
    return (1 + larger) / (1 + PERMUTATIONS)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, so that the chance of any false alarm stays the same (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for i, index in enumerate(np.argsort(p, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p) - i) * p[index]))
        adjusted[index] = largest
    return adjusted


def across(values: ArrayLike, groups: ArrayLike, slides: ArrayLike) -> float:
    """Return the p of the Kruskal-Wallis test that `values` [N] are alike in all groups, such as sites or scanners.

    The test is on slides' means, or on patches if there are too few slides. NaN if there is only one group.
    """
    number, group = np.asarray(values, np.float64), np.asarray(groups)
    known = ~np.isnan(number)
    number, group, slide = number[known], group[known], np.asarray(slides)[known]
    if len(np.unique(slide)) >= FEWEST_SLIDES:
        _, first, member = np.unique(slide, return_index=True, return_inverse=True)
        number, group = np.bincount(member, number) / np.bincount(member), group[first]
    parts = [number[group == name] for name in np.unique(group)]
    if len(parts) < 2:
        return np.nan
    return 1.0 if np.ptp(number) == 0 else float(stats.kruskal(*parts).pvalue)


def _units(
    values: Floats, slides: ArrayLike, weights: ArrayLike | None
) -> tuple[Floats, Floats, Unit, NDArray[np.bool_]]:
    """Return weighted sums [V, U] of `values` [V, N] and weights [U] by unit; the unit; which rows count [N]."""
    counted: NDArray[np.bool_] = ~np.logical_or.reduce(np.isnan(values), axis=0)
    slide = np.asarray(slides)[counted]
    weight = np.ones(counted.sum()) if weights is None else np.asarray(weights, np.float64)[counted]
    names, member = np.unique(slide, return_inverse=True)
    unit: Unit = "slide" if len(names) >= FEWEST_SLIDES else "patch"
    if unit == "patch":
        member = np.arange(len(slide))
    count = int(member.max()) + 1 if len(member) else 0
    sums = np.stack([np.bincount(member, weight * row[counted], count) for row in values]).astype(np.float64)
    heavy: Floats = np.bincount(member, weight, count).astype(np.float64)
    return sums, heavy, unit, counted


@lru_cache(maxsize=256)
def _percentiles(units: int) -> tuple[float, float]:
    """Return the ends of an interval from a bootstrap of this many units: plain percentiles miss the truth too often.

    Hesterberg's expanded percentiles (2015, doi 10.1080/00031305.2015.1089789).
    """
    if units < 2:
        return 0.0, 1.0
    reach = np.sqrt(units / (units - 1)) * stats.t.ppf((1 + LEVEL) / 2, units - 1)
    low = float(stats.norm.sf(reach))
    return low, 1 - low


def _resampled(count: int, seed: int) -> Floats:
    """Return how often each of `count` units is drawn, [RESAMPLES, count]; must not be modified.

    Those for few units, such as slides, are cached: an audit needs them again and again.
    """
    return _kept(count, seed) if count <= KEPT_UNITS else _drawn(count, seed)


@lru_cache(maxsize=4)
def _kept(count: int, seed: int) -> Floats:
    return _drawn(count, seed)


def _drawn(count: int, seed: int) -> Floats:
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
    drawn.flags.writeable = False
    return drawn


def _student(sums: Floats) -> float:
    """Return the p of Student's t test that the mean of `sums` is 0."""
    if np.ptp(sums) == 0:
        return 1.0 if not sums[0] else 0.0
    return float(stats.ttest_1samp(sums, 0.0).pvalue)


def _flipped(sums: Floats, seed: int) -> float:
    """Return the p of the mean of `sums` when their signs are flipped; in all 2**U ways if those are few."""
    if len(sums) < 2:
        return 1.0
    tested = stats.permutation_test(
        (sums, np.zeros_like(sums)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(tested.pvalue)


Record = TypeVar("Record")
SLIDE, SHOWN = "slide/", "shown/"  # names of arrays about a whole slide, and of those that are only displayed


@dataclass(frozen=True)
class _Stored:
    path: str
    record: type | None
    keys: tuple[tuple[str, ...] | None, ...]

    @property
    def names(self) -> re.Pattern[str]:
        """Return a pattern for the names of the arrays, with a group for each key and one for the remainder."""
        groups = ["(.+)" if known is None else f"({'|'.join(map(re.escape, known))})" for known in self.keys]
        path = re.escape(self.path).replace(r"\{\}", "{}")
        rest = "" if self.record is None else f"/({'|'.join(f.name for f in fields(self.record))})"
        return re.compile(path.format(*groups) + rest)


def stored(path: str, record: type | None = None, keys: tuple[tuple[str, ...] | None, ...] = ()) -> Any:
    """Return a field of a record.

    Args:
        path: name of its array, with braces for the keys of a mapping.
        record: the dataclass of arrays at the bottom of a mapping; their names come after those of the mapping.
        keys: those allowed for each pair of braces; None for any.
    """
    levels = path.count("{}")
    what = _Stored(path, record, keys or (None,) * levels)
    return field(metadata={"stored": what}, default_factory=dict) if levels else field(metadata={"stored": what})


def optional(path: str) -> Any:
    """Return a field of a record that may be None; its array is at `path`."""
    return field(metadata={"stored": _Stored(path, None, ())}, default=None)


def arrays_of(record: object, dtype: DTypeLike | None = None) -> Arrays:
    """Return the arrays of a record by name, as another `dtype` if one is given."""
    return {name: np.asarray(values, dtype or values.dtype) for name, values in _arrays(record, "")}


def _arrays(record: Any, start: str) -> Iterator[tuple[str, NDArray[Any]]]:
    for part in fields(record):
        what = part.metadata.get("stored")
        yield from _leaves(getattr(record, part.name), start + (part.name if what is None else what.path), ())


def _leaves(value: Any, path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, path, (*keys, key))
    elif isinstance(value, np.ndarray):
        yield path.format(*keys), value
    elif value is not None:
        yield from _arrays(value, f"{path.format(*keys)}/")


def record_from(kind: type[Record], arrays: Arrays) -> Record | None:
    """Return the record of this kind from arrays by name; None if a required array is missing."""
    values: dict[str, Any] = {}
    for part in fields(kind):  # type: ignore[arg-type]
        what: _Stored = part.metadata.get("stored") or _Stored(part.name, None, ())
        found = _nested(what, arrays) if what.keys else arrays.get(what.path)
        if found is not None:
            values[part.name] = found
        elif part.default is not None:
            return None
    return kind(**values) if any(len(value) for value in values.values()) else None


def _nested(what: _Stored, arrays: Arrays) -> dict[str, Any]:
    """Return a mapping, in the order of its keys."""
    pattern, leaves = what.names, {}
    for name, values in arrays.items():
        if match := pattern.fullmatch(name):
            leaves[match.groups()] = values
    root: dict[str, Any] = {}
    for keys in sorted(leaves):
        place = root
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = leaves[keys]
    return root if what.record is None else _with_records(root, what.record, len(what.keys))


def _with_records(values: dict[str, Any], record: type, levels: int) -> Any:
    if levels:
        return {key: _with_records(value, record, levels - 1) for key, value in values.items()}
    return record(**values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Patches:
    """Facts about every patch: its place in the sample, the model's answer, and its maps.

    Attributes:
        number: in the slide's table.
        weight: the number of patches it stands for.
        readable: 1 or 0.
        in_depth: 1 or 0, whether it was measured in depth.
        logits: [N, K] of the model.
        logit: the one that is explained.
        explained_class, probability: if a class is explained.
        difference: between a method's maps and those of the run, relative to the run's.
        maps: [N, h, w] by method.
        shown: uint8 [N, h, w, 3], for a slide's first batch: small pictures for the report.
        drawn: [N, side, side], what is drawn on the same patches; see `stages.drawn_arrays`.
    """

    number: NDArray[np.int64] = stored("base/number")
    weight: Floats = stored("base/weight")
    readable: NDArray[np.uint8] = stored("base/readable")
    in_depth: NDArray[np.uint8] = stored("base/deep")
    logits: NDArray[np.float32] = stored("base/logits")
    logit: Floats = stored("base/logit")
    explained_class: NDArray[np.int64] | None = optional("base/class")
    probability: Floats | None = optional("base/probability")
    difference: Mapping[str, Floats] = stored("base/{}/differs")
    maps: Mapping[str, NDArray[np.float32]] = stored("map/{}")
    shown: NDArray[np.uint8] | None = optional("shown/rgb")
    drawn: NDArray[np.unsignedinteger] | None = optional("shown/drawn")


@dataclass(frozen=True, eq=False)
class Measurements:
    """The measurements of an audit; NaN where a patch was not measured.

    Attributes:
        arrays: by name, with patches as the first axis; see `of` for records of them.
        slides: the id of each patch's slide.
        slide_arrays: those about whole slides, by slide id and name.
        seed: of bootstraps and tests.
    """

    arrays: Arrays
    slides: NDArray[np.str_]
    slide_arrays: Mapping[str, Arrays]
    seed: int

    @cached_property
    def patches(self) -> Patches:
        """Facts about every patch: its place in the sample, the model's answer, and its maps."""
        found = self.of(Patches)
        assert found is not None
        return found

    def __len__(self) -> int:
        return len(self.slides)

    def of(self, kind: type[Record]) -> Record | None:
        """Return the record of a kind; None if it was not measured."""
        return record_from(kind, self.arrays)

    def of_slides(self, kind: type[Record]) -> dict[str, Record]:
        """Return the records of a kind that are about whole slides, by slide id."""
        found = {slide: record_from(kind, arrays) for slide, arrays in self.slide_arrays.items()}
        return {slide: one for slide, one in found.items() if one is not None}

    def only(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Measurements:
        """Return the measurements of some of the patches."""
        arrays = {name: values[rows] for name, values in self.arrays.items()}
        return replace(self, arrays=arrays, slides=self.slides[rows])

    def of_slide(self, slide_id: str) -> Measurements:
        """Return the measurements of the patches of a slide."""
        own = {slide_id: self.slide_arrays[slide_id]} if slide_id in self.slide_arrays else {}
        return replace(self.only(self.slides == slide_id), slide_arrays=own)

    @property
    def weights(self) -> Floats:
        """The number of patches that each patch stands for."""
        return np.asarray(self.arrays["base/weight"], np.float64)

    def estimate(self, values: NDArray[Any]) -> Estimate:
        """Estimate the weighted mean of a number of the patches; a NaN does not count."""
        return estimate(values, self.slides, self.weights, self.seed)

    def compare(self, first: NDArray[Any], second: NDArray[Any]) -> Comparison:
        """Compare two numbers of the patches."""
        return compare(first, second, self.slides, self.weights, self.seed)

    def mean(self, values: NDArray[Any]) -> Floats:
        """Return the weighted mean [Q] of values [N, Q], leaving out patches with a NaN."""
        known = ~np.isnan(values).reshape(len(values), -1).any(axis=1)
        if not known.any():
            return np.full(values.shape[1:], np.nan)
        mean: Floats = np.average(values[known], axis=0, weights=self.weights[known])
        return mean


def read_measurements(
    folder: AuditFolder, digest: str, samples: Mapping[str, SlideSample], seed: int, slides: Iterable[str]
) -> Measurements:
    """Read the measurements of some slides, in the order of the sample; without pictures.

    Raises:
        StoreError: a file is damaged.
        FileNotFoundError: a file does not exist.
    """
    places = ((slide, number) for slide in slides for number in range(samples[slide].batches))
    return joined(((slide, read_arrays(folder.batch(slide, digest, number))) for slide, number in places), seed)


def joined(batches: Iterable[tuple[str, Arrays]], seed: int) -> Measurements:
    """Return the measurements of batches, each given with its slide's id."""
    kept: list[tuple[str, Arrays]] = []
    of_slides: dict[str, Arrays] = {}
    for slide, arrays in batches:
        for name in (name for name in arrays if name.startswith(SLIDE)):
            of_slides.setdefault(slide, {})[name] = arrays[name][0]
        kept.append((slide, {name: v for name, v in arrays.items() if not name.startswith((SLIDE, SHOWN))}))
    names = sorted({name for _, arrays in kept for name in arrays})
    counts = [len(arrays["base/number"]) for _, arrays in kept]
    whole = {name: _joined(name, [arrays for _, arrays in kept], counts) for name in names}
    ids = np.repeat(np.array([slide for slide, _ in kept], object), counts).astype(np.str_)
    return Measurements(whole, ids, of_slides, seed)


def _joined(name: str, batches: list[Arrays], counts: list[int]) -> NDArray[Any]:
    """Return an array of all batches; NaN for one that does not have it."""
    shape = next(arrays[name].shape[1:] for arrays in batches if name in arrays)
    parts = [
        arrays[name] if name in arrays else np.full((count, *shape), np.nan)
        for arrays, count in zip(batches, counts, strict=True)
    ]
    return np.concatenate(parts)
