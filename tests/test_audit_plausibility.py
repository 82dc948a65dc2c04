"""Plausibility: every measure against its definition in words, and no answer where there is none."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score

from tests.planted import patches, trained
from tests.subjects import subject_of
from wsi_gradcam.audit.measurements import compare
from wsi_gradcam.audit.measures.subject import enlarge
from wsi_gradcam.audit.questions.plausibility import (
    PLAUSIBILITY,
    auroc,
    chance,
    iou,
    pointing_game,
    relevance_mass,
    relevance_rank,
)
from wsi_gradcam.cam.targets import Target

SMALL = hnp.arrays(np.float32, (2, 2, 3), elements=st.integers(-3, 3).map(float))
MASKS = hnp.arrays(np.bool_, (2, 2, 3))


def by_definition(name: str, values: list[float], mask: list[bool]) -> float:
    """With ties in every possible order, averaged."""
    if not any(mask) or all(mask) or len(set(values)) == 1:
        return float("nan")
    inside = [v for v, m in zip(values, mask, strict=True) if m]
    outside = [v for v, m in zip(values, mask, strict=True) if not m]
    if name == "relevance_mass":
        positive = sum(max(v, 0) for v in values)
        return sum(max(v, 0) for v in inside) / positive if positive else float("nan")
    if name == "auroc":
        wins = [Fraction(int(a > b) * 2 + int(a == b), 2) for a in inside for b in outside]
        return float(sum(wins) / len(wins))
    if name == "iou":
        both = sum(v > 0 and m for v, m in zip(values, mask, strict=True))
        return both / max(1, sum(v > 0 or m for v, m in zip(values, mask, strict=True)))
    top = 1 if name == "pointing_game" else len(inside)
    hits = []
    for order in permutations(range(len(values))):
        first = sorted(order, key=lambda i: -values[i])[:top]
        hits.append(Fraction(sum(mask[i] for i in first), top))
    return float(sum(hits) / len(hits))


@pytest.mark.parametrize("name", PLAUSIBILITY)
@given(maps=SMALL, masks=MASKS)
def test_measures_are_what_they_say(name: str, maps: np.ndarray, masks: np.ndarray) -> None:
    found = PLAUSIBILITY[name](maps, masks)
    expected = [by_definition(name, a.ravel().tolist(), m.ravel().tolist()) for a, m in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_auroc_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    maps, masks = random.normal(0, 1, (10, 7, 7)).astype(np.float32).round(1), random.random((10, 7, 7)) < 0.3
    expected = [roc_auc_score(m.ravel(), a.ravel()) for a, m in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(auroc(maps, masks), expected, atol=1e-12)


@pytest.mark.parametrize("name", PLAUSIBILITY)
def test_empty_masks_constant_maps_and_nan_are_no_hits(name: str) -> None:
    maps = np.random.default_rng(0).normal(0, 1, (5, 4, 4)).astype(np.float32)
    masks = maps > 0
    masks[0], masks[1], maps[2], maps[3, 0, 0] = False, True, 0, np.nan
    assert np.isnan(PLAUSIBILITY[name](maps, masks)).tolist() == [True, True, True, True, False]


def test_random_maps_score_as_chance_does() -> None:
    random = np.random.default_rng(0)
    masks = np.zeros((4000, 6, 6), bool)
    masks[:, 1:4, 2:5] = True
    maps = random.normal(0, 1, masks.shape).astype(np.float32)
    assert chance(masks)[0] == 0.25
    for measure in (pointing_game, relevance_mass, relevance_rank):
        assert measure(maps, masks).mean() == pytest.approx(0.25, abs=0.03)
    assert auroc(maps, masks).mean() == pytest.approx(0.5, abs=0.02)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="expected bool masks of equal shape"):
        iou(np.zeros((1, 2, 2), np.float32), np.zeros((1, 2, 2), np.int64))


def test_a_model_that_looks_at_the_disc_is_told_from_one_that_looks_at_the_marker() -> None:
    """With a marker beside every disc in training, the map of the shortcut is less plausible than the honest one's."""
    sample = patches(40, 7, "tumour")
    rows = sample.label == 1
    found = {}
    for marked in ("random", "tumour"):
        subject = subject_of(trained(marked))
        images = subject.images(sample.rgb[rows])
        maps = subject.maps(images, subject.aim(images, Target("tumour", 1)))
        found[marked] = auroc(enlarge(maps, (32, 32)).numpy(), sample.disc[rows])
    assert found["random"].mean() > 0.8
    assert compare(found["random"], found["tumour"], range(20)).p < 0.01
