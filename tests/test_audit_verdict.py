"""Verdicts follow from intervals and tests; that they are right of planted truths is proven in test_audit_truths.py."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_gradcam.audit.findings import ENOUGH, Outcome, Verdict
from wsi_gradcam.audit.measurements import Comparison, Estimate, compare
from wsi_gradcam.audit.metrics import quadrant
from wsi_gradcam.audit.questions.faithfulness import faithful
from wsi_gradcam.audit.questions.gradients import gradient_predicts, not_saturated
from wsi_gradcam.audit.questions.plausibility import plausible
from wsi_gradcam.audit.questions.sanity import depends_on_weights, has_learned
from wsi_gradcam.audit.questions.shortcuts import free_of, quiet_on_glass
from wsi_gradcam.audit.questions.stability import robust_to


def interval(low: float, high: float, patches: int = 100) -> Estimate:
    return Estimate((low + high) / 2, low, high, patches, patches, 0, "slide")


def pair(value: float, p: float, patches: int = 100) -> Comparison:
    return Comparison(interval(value, value, patches), p, 1.0, value, 0.5)


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        (depends_on_weights(interval(0.6, 0.8)), "fails"),
        (depends_on_weights(interval(-0.1, 0.1)), "holds"),
        (depends_on_weights(interval(0.1, 0.6)), "unclear"),
        (free_of("pen", pair(1, 0.01), pair(0.2, 0.01)), "fails"),
        (free_of("pen", pair(1, 0.01), pair(0.2, 0.3)), "unclear"),
        (free_of("pen", pair(1, 0.01), pair(-0.2, 0.01)), "unclear"),
        (free_of("pen", pair(0, 0.9), pair(0, 0.9)), "holds"),
        (free_of("pen", pair(0, 0.9, ENOUGH - 1), pair(0, 0.9)), "unclear"),
        (robust_to("JPEG", pair(0.1, 0.01), "noise"), "fails"),
        (robust_to("JPEG", pair(-0.1, 0.01), "noise"), "holds"),
        (robust_to("JPEG", pair(0, 0.9, ENOUGH - 1), "noise"), "unclear"),
        (gradient_predicts(interval(0.2, 0.9)), "holds"),
        (gradient_predicts(interval(-0.9, -0.2)), "fails"),
        (gradient_predicts(interval(-0.2, 0.2)), "unclear"),
        (has_learned(2.0, np.linspace(0, 1, 49)), "holds"),
        (has_learned(2.0, np.linspace(0, 3, 49)), "fails"),
        (has_learned(2.0, np.linspace(0, 1, 48)), "unclear"),
        (has_learned(2.0, []), "unclear"),
        (not_saturated(interval(0.6, 0.9), interval(0, 0)), "fails"),
        (not_saturated(interval(0, 0.1), interval(0.6, 0.9)), "fails"),
        (not_saturated(interval(0.4, 0.6), interval(0, 0)), "unclear"),
        (not_saturated(interval(0, 0.1), interval(0.4, 0.6)), "unclear"),
        (not_saturated(interval(0, 0.1), interval(0, 0.1)), "holds"),
        (quiet_on_glass("tumour", interval(0.6, 1)), "fails"),
        (quiet_on_glass("tumour", interval(0.4, 0.6)), "unclear"),
        (quiet_on_glass("tumour", interval(0, 0.1)), "holds"),
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
    known: tuple[Outcome, ...] = ("holds", "fails")
    words = {quadrant(a, b) for a in known for b in known}
    assert len(words) == 4
    assert quadrant("unclear", "holds") not in words
