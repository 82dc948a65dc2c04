"""Logits become probabilities by the plain formulas, also where exp overflows."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wsi_gradcam.models.spec import probabilities

Logits = npt.NDArray[np.float32]
LOGITS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.floats(-20, 20, width=32)
)


@given(LOGITS)
def test_softmax_is_the_formula(logits: Logits) -> None:
    found = probabilities(logits, "softmax")
    for row, shares in zip(logits.tolist(), found.tolist(), strict=True):
        total = sum(math.exp(v) for v in row)
        assert shares == pytest.approx([math.exp(v) / total for v in row], rel=1e-4)


@given(LOGITS)
def test_sigmoid_is_the_formula(logits: Logits) -> None:
    found = probabilities(logits, "sigmoid")
    expected = [[1 / (1 + math.exp(-v)) for v in row] for row in logits.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@given(LOGITS)
def test_none_changes_nothing(logits: Logits) -> None:
    assert np.array_equal(probabilities(logits, "none"), logits)


@pytest.mark.parametrize(("activation", "expected"), [("softmax", [1, 0]), ("sigmoid", [1, 0])])
def test_huge_logits_do_not_overflow(activation: str, expected: list[float]) -> None:
    found = probabilities(np.array([[1e30, -1e30]], np.float32), activation)  # type: ignore[arg-type]
    assert found.dtype == np.float32
    assert found.tolist() == [expected]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_no_patches_have_no_probabilities(activation: str) -> None:
    assert probabilities(np.zeros((0, 3), np.float32), activation).shape == (0, 3)  # type: ignore[arg-type]
