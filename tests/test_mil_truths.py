"""Bag models whose truth is planted: which methods find it, over fifty seeds, and which must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.mil_toy import METHODS, PROBLEMS, auprc_2, draw, evidence, noisy_digits, repetition
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.mil.attribution import explain_bag
from wsi_gradcam.mil.networks import Aggregator, AttentionPool, Mlp, Opaque

SEEDS, COUNT, D = range(50), 40, 6
TARGET = [Target("1", 1)]
CHAINED = ("gradient_x_input", "integrated_gradients", "lrp")


def layer(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    made = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    made.load_state_dict({"weight": torch.tensor(weight), **({} if bias is None else {"bias": torch.tensor(bias)})})
    return made.requires_grad_(False)


def unit(k: int, scale: float = 1.0) -> list[float]:
    return [scale * float(k == j) for j in range(D)]


def pool(attended: int, used: int, sharp: float = 3.0) -> AttentionPool:
    """Return a bag model with attention to one feature, and a logit of the mean of another."""
    a, c = layer([unit(attended)]), layer([[sharp]])
    return AttentionPool(Mlp([], True), a, None, c, Mlp([layer([unit(used, -1.0), unit(used)])], False))


def bag(seed: int, *planted: int) -> NDArray[np.float32]:
    """Return small noise, in which patch k has the k-th planted feature."""
    found = np.random.default_rng(seed).normal(scale=0.05, size=(COUNT, D)).astype(np.float32)
    for patch, feature in enumerate(planted):
        found[patch, feature] += 1
    return found


def hits(network: Aggregator, method: str, *planted: int, steps: int = 8) -> float:
    """Return in how many of the bags the planted patches, and none else, come first."""
    right = 0
    for seed in SEEDS:
        told = explain_bag(network, bag(seed, *planted), TARGET, [method], steps=steps)
        relevance = told.attention["attention_weight"][:, 0] if method == "attention" else told.relevance[method][:, 0]
        ties = np.random.default_rng(seed).random(COUNT)
        right += set(np.lexsort((ties, -relevance))[: len(planted)]) == set(range(len(planted)))
    return right / len(SEEDS)


@pytest.mark.parametrize("method", [*CHAINED, "attention", "single", "one_removed", "shapley"])
def test_the_one_patch_that_a_model_looks_at_is_found(method: str) -> None:
    assert hits(pool(0, 0), method, 0) >= 0.95


@pytest.mark.parametrize("method", [*CHAINED, "single", "one_removed", "shapley"])
def test_all_patches_that_a_model_counts_are_found(method: str) -> None:
    """The mean of a feature over the bag, without attention, is a count."""
    assert hits(pool(5, 0, sharp=0.0), method, 0, 0, 0, 0, 0) >= 0.95


def test_attention_that_is_high_where_nothing_is_used_is_told_from_evidence() -> None:
    """Patch 0 is looked at, patch 1 decides: attention must lose, and all others must not."""
    network = pool(attended=1, used=0, sharp=1.5)
    found = dict.fromkeys((*CHAINED, "attention", "single", "one_removed", "shapley"), 0)
    for seed in SEEDS:
        told = explain_bag(network, bag(seed, 1, 0), TARGET, list(found), steps=8)
        for method in found:
            values = told.attention["attention"] if method == "attention" else told.relevance[method]
            found[method] += int(values[:, 0].argmax() == 1)
    assert found.pop("attention") <= 0.05 * len(SEEDS)
    assert min(found.values()) >= 0.95 * len(SEEDS), found


class Both(nn.Module):
    """A bag in which both kinds of patches are there: what the largest of two features have above 1.5 together."""

    def forward(self, x: Tensor) -> Tensor:
        both = (x[:, 0].amax() + x[:, 1].amax() - 1.5).relu()
        return torch.stack([-both, both])


def both() -> Aggregator:
    network = Opaque(Both(), D, False, None)
    network.class_count = 2
    return network


def test_two_kinds_that_are_needed_together_are_found_without_one_another_but_not_alone() -> None:
    """Where two patches decide only together, each alone answers nothing: Single must fail, one-removed must not."""
    assert hits(both(), "one_removed", 0, 1) >= 0.95
    assert hits(both(), "gradient_x_input", 0, 1) >= 0.95
    assert hits(both(), "integrated_gradients", 0, 1) >= 0.95
    assert hits(both(), "single", 0, 1) <= 0.05


def test_an_untrained_model_finds_nothing() -> None:
    """Over seeds of weights and bags the planted patch comes first no oftener than any."""
    right = dict.fromkeys((*CHAINED, "attention", "one_removed"), 0)
    for seed in SEEDS:
        torch.manual_seed(seed)
        a, c, head = nn.Linear(8, 4), nn.Linear(4, 1), Mlp([nn.Linear(8, 2)], False)
        network = AttentionPool(Mlp([nn.Linear(D, 8)], True), a, None, c, head).requires_grad_(False)
        plain = np.random.default_rng(seed).normal(size=(COUNT, D)).astype(np.float32)
        told = explain_bag(network, plain, TARGET, list(right), steps=8)
        for method in right:
            values = told.attention["attention"] if method == "attention" else told.relevance[method]
            right[method] += int(values[:, 0].argmax() == 0)
    assert max(right.values()) <= 0.15 * len(SEEDS), right  # 1 of 40 by chance


def test_the_toy_problems_are_those_of_the_paper() -> None:
    bag = np.array([8, 9, 1, 1])
    assert evidence("4-Bags", bag, 0).tolist() == [-1, -1, 0, 0]
    assert evidence("4-Bags", bag, 1).tolist() == [1, -1, 0, 0]
    assert evidence("4-Bags", bag, 3).tolist() == [1, 1, 0, 0]
    assert evidence("Pos-Neg", np.array([4, 5, 0]), 1).tolist() == [1, -1, 0]
    assert evidence("Adjacent", np.array([0, 1, 3, 4, 5]), 1).tolist() == [1, 1, 1, 1, 0]
    assert evidence("Adjacent", np.array([0, 2, 5, 6]), 0).tolist() == [0, 0, 0, 0]
    known = np.arange(10).repeat(3)
    for problem, classes in PROBLEMS.items():
        bags = draw(problem, 300, known, np.random.default_rng(0))
        assert set(bags.classes) == set(range(classes))
        np.testing.assert_array_equal(known[bags.rows], bags.digits)
    assert auprc_2(np.array([3.0, 1, 0, -1]), np.array([1, 0, 0, -1])) == 1
    assert auprc_2(np.array([3.0, 1, 0, -1]), np.zeros(4, int)) is None


def test_relevance_beats_attention_on_a_toy_problem() -> None:
    """A short form of benchmarks/mil_toy.py, on noisy vectors of digits."""
    features, known = noisy_digits(noise=0.2)
    scores, accuracy = repetition(features.astype(np.float32), known, "Pos-Neg", 0, epochs=4, tested=15)
    assert accuracy > 0.8
    assert set(scores) == set(METHODS)
    for method in ("integrated_gradients", "lrp", "gradient_x_input"):
        assert scores[method] > scores["attention"] + 0.2, scores
