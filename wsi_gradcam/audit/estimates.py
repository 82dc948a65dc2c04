"""From numbers of patches to statements: samples, intervals, tests and effects, by slide.

Patches of a slide are alike, so a slide is what is resampled. Where there are fewer than `FEWEST_SLIDES`, patches are,
and the statement is about these slides alone: `unit` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from wsi_gradcam.errors import ConfigError

Floats = NDArray[np.float64]
Unit = Literal["slide", "patch"]

FEWEST_SLIDES = 6  # below, nothing can be said of other slides
# Of a test that flips signs: with 9, p cannot fall below 2 / 2**9, which is nothing found among a dozen verdicts.
FEWEST_FLIPS = 10
LEVEL = 0.95
RESAMPLES = 2000
KEPT_UNITS = 500  # whose draws are kept: 8 MB


@dataclass(frozen=True)
class Estimate:
    """A weighted mean with its 95 % interval.

    Attributes:
        value: NaN where no patch counts.
        low, high: percentiles of the bootstrap, widened for few units as Student's t is.
        patches, slides: that count.
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
        difference: of the first less the second.
        p: two-sided, of the test that flips the signs of the units' differences; of 6 to 9 slides Student's paired t.
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
    """Return (indices ascending, weights) of about `count` rows: each stratum in proportion, at least `fewest` of it.

    A row's weight is the number of rows that it stands for, so that weighted means are those of all rows whatever the
    proportions. The same for the same seed, and a stratum's rows do not depend on the others'.
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

    Other things that make values alike may stand for slides, such as draws of random weights. NaN are left out, and
    counted.
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


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values made larger for being many, so that the chance of any false alarm stays (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for i, index in enumerate(np.argsort(p, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p) - i) * p[index]))
        adjusted[index] = largest
    return adjusted


def across(values: ArrayLike, groups: ArrayLike, slides: ArrayLike) -> float:
    """Return the p of Kruskal and Wallis' test that `values` [N] are alike in all groups, such as sites or scanners.

    Of the slides' means; of patches where there are too few slides. NaN with one group alone.
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
    """Return the ends of an interval of a bootstrap of so many units: plain percentiles leave the truth out too often.

    Hesterberg's expanded percentiles (2015, doi 10.1080/00031305.2015.1089789).
    """
    if units < 2:
        return 0.0, 1.0
    reach = np.sqrt(units / (units - 1)) * stats.t.ppf((1 + LEVEL) / 2, units - 1)
    low = float(stats.norm.sf(reach))
    return low, 1 - low


def _resampled(count: int, seed: int) -> Floats:
    """Return the number of times that each of `count` units is drawn, [RESAMPLES, count]; not to be changed.

    Those of a few units, such as slides, are kept: an audit asks for them again and again.
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
    """Return the p of Student's test that the mean of `sums` is 0."""
    if np.ptp(sums) == 0:
        return 1.0 if not sums[0] else 0.0
    return float(stats.ttest_1samp(sums, 0.0).pvalue)


def _flipped(sums: Floats, seed: int) -> float:
    """Return the p of the mean of `sums` when their signs are flipped; all 2**U ways where those are few."""
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
