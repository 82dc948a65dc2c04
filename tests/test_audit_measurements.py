"""Statistics: what they promise, over many samples of which the truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from wsi_gradcam.audit.measurements import across, compare, estimate, holm, stratified_sample
from wsi_gradcam.errors import ConfigError


def clustered(random: np.random.Generator, slides: int, each: int, mean: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Values whose slides differ as much as their patches, and the slides' numbers."""
    values = mean + random.normal(0, 1, (slides, 1)) + random.normal(0, 1, (slides, each))
    return values.ravel(), np.repeat(np.arange(slides), each)


def test_intervals_hold_the_truth_as_often_as_they_say_and_those_of_patches_do_not() -> None:
    inside, naive = 0, 0
    for seed in range(200):
        values, slides = clustered(np.random.default_rng(seed), 20, 10)
        found = estimate(values, slides, seed=seed)
        inside += found.low <= 0 <= found.high
        low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        naive += low <= 0 <= high
    assert 0.88 * 200 <= inside <= 0.98 * 200  # percentiles of 20 slides are a little narrow
    assert naive < 0.7 * 200  # the same values, taken for independent


@pytest.mark.parametrize("slides", [6, 7, 12])
def test_intervals_of_few_slides_hold_the_truth_too(slides: int) -> None:
    inside = 0
    for seed in range(300):
        values, names = clustered(np.random.default_rng(seed), slides, 10)
        found = estimate(values, names, seed=seed)
        inside += found.low <= 0 <= found.high
    assert 0.92 * 300 <= inside <= 0.99 * 300


def test_an_estimate_is_the_weighted_mean_of_what_is_there() -> None:
    values = np.array([1.0, np.nan, 3.0, 8.0])
    found = estimate(values, ["a", "a", "b", "b"], [1, 5, 2, 1])
    assert found.value == pytest.approx((1 + 6 + 8) / 4)
    assert (found.patches, found.slides, found.missing, found.unit) == (3, 2, 1, "patch")
    assert found.low <= found.value <= found.high
    assert estimate(values, ["a", "a", "b", "b"]) == estimate(values, ["a", "a", "b", "b"])
    nothing = estimate([np.nan], ["a"])
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()
    assert (nothing.patches, nothing.missing) == (0, 1)
    constant = estimate(np.full(30, 2.5), np.arange(30) // 3)
    assert (constant.value, constant.low, constant.high, constant.unit) == (2.5, 2.5, 2.5, "slide")


def test_a_test_raises_false_alarms_as_often_as_it_says_and_finds_what_is_there() -> None:
    alarms, found = 0, 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        noise, slides = clustered(random, 10, 5)
        alarms += compare(noise, np.zeros(50), slides, seed=seed).p < 0.05
        found += compare(noise + 2, np.zeros(50), slides, seed=seed).p < 0.05
    assert alarms <= 11  # of 100 at 5%: more than 11 come in less than 1 of 200
    assert found >= 95


def test_few_slides_can_find_something_among_many_verdicts_and_raise_no_alarms() -> None:
    """Signs of 7 slides can be flipped in 128 ways: p would never be below 0.0156."""
    alarms, found = {0.05: 0, 0.01: 0}, 0
    for seed in range(400):
        noise, slides = clustered(np.random.default_rng(seed), 7, 10)
        p = compare(noise, np.zeros(70), slides, seed=seed).p
        for level in alarms:
            alarms[level] += p < level
        found += compare(noise / 4 + 1, np.zeros(70), slides, seed=seed).p < 0.05 / 20
    assert alarms[0.05] <= 31  # of 400: more come in less than 1 of 100
    assert alarms[0.01] <= 10
    assert found >= 0.8 * 400
    gap = np.array([0.3, -0.1, 0.5, 0.2, 0.7, 0.4, 0.1])
    assert compare(gap, np.zeros(7), np.arange(7)).p == pytest.approx(stats.ttest_1samp(gap, 0).pvalue)
    assert compare(np.ones(7), np.zeros(7), np.arange(7)).p == 0
    assert compare(np.ones(7), np.ones(7), np.arange(7)).p == 1


def test_all_signs_are_tried_where_they_are_few() -> None:
    gap = np.array([0.3, -0.1, 0.5, 0.2, 0.7, 0.4, 0.1, 0.25, -0.3, 0.15])
    observed = gap.sum()
    sums = np.array([np.dot(signs, gap) for signs in itertools.product([-1, 1], repeat=10)])
    expected = 2 * min((sums >= observed - 1e-12).mean(), (sums <= observed + 1e-12).mean())
    found = compare(gap, np.zeros(10), np.arange(10))
    assert found.p == pytest.approx(expected)
    assert found.difference.unit == "slide"
    assert found.effect == pytest.approx(gap.mean() / gap.std(ddof=1))
    assert found.better == pytest.approx(8 / 10)


def test_pairs_without_a_difference() -> None:
    same = compare([1.0, 2.0], [1.0, 2.0], ["a", "b"])
    assert (same.difference.value, same.effect, same.better, same.p) == (0, 0, 0.5, 1)
    assert compare([2.0, 3.0], [1.0, 2.0], ["a", "b"]).effect == np.inf
    assert np.isnan(compare([np.nan], [1.0], ["a"]).p)
    assert compare([2.0], [1.0], ["a"]).p == 1


def test_holm_is_bonferroni_for_the_smallest_and_never_falls() -> None:
    p = [0.02, 0.5, 0.001, 0.02]
    found = holm(p)
    assert found[2] == pytest.approx(0.004)
    assert found == pytest.approx([0.06, 0.5, 0.004, 0.06])
    assert holm([]) == []


def test_samples_stand_for_all_rows() -> None:
    strata = np.array(["a"] * 900 + ["b"] * 95 + ["c"] * 5)
    indices, weights = stratified_sample(strata, 100, seed=1, fewest=4)
    chosen = strata[indices]
    assert [int((chosen == name).sum()) for name in "abc"] == [90, 10, 4]
    assert all(weights[chosen == name].sum() == pytest.approx((strata == name).sum()) for name in "abc")
    assert len(set(indices.tolist())) == len(indices)
    assert (np.diff(indices) > 0).all()
    again, _ = stratified_sample(strata, 100, seed=1, fewest=4)
    other, _ = stratified_sample(strata, 100, seed=2, fewest=4)
    assert np.array_equal(indices, again)
    assert not np.array_equal(indices, other)
    # Weighted means are unbiased although small strata are drawn more often.
    truth = np.where(strata == "c", 100.0, np.arange(1000) % 7)
    means = [np.average(truth[i], weights=w) for i, w in (stratified_sample(strata, 50, s, 4) for s in range(200))]
    assert np.mean(means) == pytest.approx(truth.mean(), abs=4 * np.std(means) / 200**0.5)
    with pytest.raises(ConfigError, match="a sample of 0 patches"):
        stratified_sample(strata, 0, 1)


def test_groups_are_compared_by_slide() -> None:
    alarms = []
    for seed in range(50):
        values, slides = clustered(np.random.default_rng(seed), 12, 8)
        alarms.append(across(values, slides % 2, slides) < 0.05)
        assert across(values + 10 * (slides % 2), slides % 2, slides) < 0.01
    assert sum(alarms) <= 7  # of 50 at 5%: more than 7 come in less than 1 of 200
    assert np.isnan(across([1.0, 2.0], ["a", "a"], ["s", "t"]))
    assert across([1.0, 1.0, 1.0], ["a", "b", "b"], ["s", "t", "u"]) == 1
