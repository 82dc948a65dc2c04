"""Evidence of planted networks is told as it is: with one seed and few slides here, with fifty seeds in the proofs."""

from __future__ import annotations

import pytest

from tests.planted_evidence import TRUTHS, main


@pytest.mark.parametrize("truth", TRUTHS)
def test_evidence_is_told_as_it_is(truth: str) -> None:
    assert TRUTHS[truth](1, 100 if truth.startswith("marker") else 40)


@pytest.mark.slow
def test_evidence_is_told_as_it_is_with_fresh_seeds() -> None:
    assert main(["--seeds", "20", "--first", "3000"]) == 0
