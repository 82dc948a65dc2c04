"""Verdicts: each fires where it must and is silent where it must not, over seeds of patches with a known truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.planted import Patches, marker_only, patches, subject_of, trained, untrained, with_ink
from wsi_gradcam.audit.controls import control_maps, edge_maps, random_maps
from wsi_gradcam.audit.estimates import Comparison, Estimate, compare, estimate
from wsi_gradcam.audit.faithfulness import removal_curves
from wsi_gradcam.audit.plausibility import auroc
from wsi_gradcam.audit.removal import mean_colour, replace_by
from wsi_gradcam.audit.shortcuts import cover
from wsi_gradcam.audit.subject import Aim, Subject
from wsi_gradcam.audit.verdict import (
    ENOUGH,
    Verdict,
    depends_on_weights,
    faithful,
    free_of,
    plausible,
    promises_kept,
    quadrant,
    robust_to,
)
from wsi_gradcam.cam.targets import Target

TUMOUR = Target("tumour", 1)
Maps = Callable[[Subject, Tensor, Aim, Patches, int], Tensor]
SEEDS = [2, pytest.param(50, marks=pytest.mark.slow)]


def gradcam(subject: Subject, images: Tensor, aim: Aim, sample: Patches, seed: int) -> Tensor:
    return subject.maps(images, aim)


def edges(subject: Subject, images: Tensor, aim: Aim, sample: Patches, seed: int) -> Tensor:
    return edge_maps(images, (8, 8))


def chance(subject: Subject, images: Tensor, aim: Aim, sample: Patches, seed: int) -> Tensor:
    return random_maps((8, 8), range(10_000 * seed + 5000, 10_000 * seed + 5000 + len(images)))


def annotation(subject: Subject, images: Tensor, aim: Aim, sample: Patches, seed: int) -> Tensor:
    return torch.from_numpy(cover(sample.disc, (8, 8))).float()


def judged(subject: Subject, make: Maps, seed: int, marked: str) -> tuple[Verdict, Verdict]:
    """(faithful, plausible) of the maps of patches of class 1."""
    whole = patches(80, 500 + seed, marked)
    rows = whole.label == 1
    sample = Patches(whole.rgb[rows], whole.label[rows], whole.disc[rows], whole.marker[rows])
    if marked != "none":  # else an edge map would find the marker as well as the model does
        sample = with_ink(sample, seed)
    images = subject.images(sample.rgb)
    aim = subject.aim(images, TUMOUR)
    map_ = make(subject, images, aim, sample, seed)
    maps = {"map": map_} | control_maps(images, (8, 8), range(10_000 * seed, 10_000 * seed + len(images)))
    curves = removal_curves(
        subject, images, aim, maps, replace_by(images, mean_colour(images)), torch.linspace(0, 1, 9), seed
    )
    scores = {name: curve.score.numpy() for name, curve in curves.items()}
    slides = np.arange(len(images)) // 4
    truth = cover(sample.disc, (8, 8)) > 0.5
    return (
        faithful(scores.pop("map"), scores, slides, seed=seed),
        plausible(estimate(auroc(map_.numpy(), truth), slides, seed=seed)),
    )


def outcomes(subject: Subject, make: Maps, seeds: int, marked: str = "none") -> tuple[Counter[str], Counter[str]]:
    pairs = [judged(subject, make, seed, marked) for seed in range(seeds)]
    return Counter(one.outcome for one, _ in pairs), Counter(two.outcome for _, two in pairs)


@pytest.mark.parametrize("seeds", SEEDS)
def test_an_honest_map_is_faithful_and_plausible(seeds: int) -> None:
    is_faithful, is_plausible = outcomes(subject_of(trained()), gradcam, seeds)
    assert is_faithful["holds"] >= 0.95 * seeds
    assert is_plausible["holds"] >= 0.95 * seeds


@pytest.mark.parametrize("seeds", SEEDS)
def test_maps_that_ignore_the_model_are_not_faithful(seeds: int) -> None:
    """A random map, an edge map, and one in the shape of the annotation, of a model that reads the marker."""
    shortcut = subject_of(marker_only())
    for make in (chance, edges, annotation):
        is_faithful, _ = outcomes(shortcut, make, seeds, "tumour")
        assert is_faithful["holds"] <= 0.05 * seeds, make.__name__
    _, is_plausible = outcomes(shortcut, annotation, seeds, "tumour")
    assert is_plausible["holds"] == seeds  # it flatters


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_map_of_a_shortcut_is_faithful_and_implausible(seeds: int) -> None:
    is_faithful, is_plausible = outcomes(subject_of(marker_only()), gradcam, seeds, "tumour")
    assert is_faithful["holds"] >= 0.95 * seeds
    assert is_plausible["holds"] == 0


def test_an_untrained_model_is_not_plausible() -> None:
    """Its map may well tell what moves its answer: faithfulness is no praise of a model."""
    found = [judged(subject_of(untrained(seed)), gradcam, seed, "none")[1].outcome for seed in range(6)]
    assert found.count("holds") <= 4  # a random network finds discs dark or bright by chance
    assert found.count("fails") >= 1


def interval(low: float, high: float, patches: int = 100) -> Estimate:
    return Estimate((low + high) / 2, low, high, patches, patches, 0, "slide")


def pair(value: float, p: float, patches: int = 100) -> Comparison:
    return Comparison(interval(value, value, patches), p, value, 0.5)


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        (depends_on_weights(interval(0.6, 0.8)), "fails"),
        (depends_on_weights(interval(0.1, 0.3)), "holds"),
        (depends_on_weights(interval(0.4, 0.6)), "unclear"),
        (free_of("pen", pair(1, 0.01), pair(0.2, 0.01)), "fails"),
        (free_of("pen", pair(1, 0.01), pair(0.2, 0.3)), "unclear"),
        (free_of("pen", pair(1, 0.01), pair(-0.2, 0.01)), "unclear"),
        (free_of("pen", pair(0, 0.9), pair(0, 0.9)), "holds"),
        (free_of("pen", pair(0, 0.9, ENOUGH - 1), pair(0, 0.9)), "unclear"),
        (robust_to("JPEG", pair(0.1, 0.01), "noise"), "fails"),
        (robust_to("JPEG", pair(-0.1, 0.01), "noise"), "holds"),
        (robust_to("JPEG", pair(0, 0.9, ENOUGH - 1), "noise"), "unclear"),
        (promises_kept(interval(0.2, 0.9)), "holds"),
        (promises_kept(interval(-0.9, -0.2)), "fails"),
        (promises_kept(interval(-0.2, 0.2)), "unclear"),
        (plausible(interval(0.6, 0.9)), "holds"),
        (plausible(interval(0.2, 0.4)), "fails"),
        (plausible(interval(0.4, 0.6)), "unclear"),
    ],
)
def test_outcomes_follow_from_intervals_and_tests(verdict: Verdict, outcome: str) -> None:
    assert verdict.outcome == outcome
    assert verdict.question.endswith("?")
    assert verdict.words.endswith(".")
    assert verdict.evidence


def test_few_patches_prove_nothing_and_a_better_control_proves_failure() -> None:
    random = np.random.default_rng(0)
    score, slides = random.normal(0, 1, 100), np.arange(100)
    same = {"random": random.normal(0, 1, 100), "edges": random.normal(-3, 1, 100)}
    assert faithful(score, same, slides).outcome == "fails"
    few = {name: values[:20] for name, values in same.items()}
    assert faithful(score[:20], few, slides[:20]).outcome == "unclear"
    better = faithful(score, {"random": score - 3 + random.normal(0, 1, 100), "edges": score + 1}, slides)
    assert better.outcome == "fails"
    assert "edges" in better.words
    unsure = faithful(score, {"random": score - 3, "edges": score + random.normal(0, 1, 100)}, slides)
    assert unsure.outcome == "unclear"
    assert compare(score, score, slides).p == 1


def test_the_quadrants_differ_and_what_is_unclear_has_none() -> None:
    known = [Verdict("?", outcome, "") for outcome in ("holds", "fails")]
    words = {quadrant(a, b) for a in known for b in known}
    assert len(words) == 4
    assert quadrant(Verdict("?", "unclear", ""), known[0]) not in words
