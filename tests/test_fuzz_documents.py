"""Documents changed in many ways are read or refused: the short form of `python -m tests.fuzz --kind all`."""

from __future__ import annotations

import pytest

from tests.fuzz_documents import KINDS, fuzz

CASES = {"results": 15, "hf": 40, "wsinfer": 40}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_changed_in_many_ways_are_read_or_refused(kind: str) -> None:
    assert fuzz(kind, CASES.get(kind, 150), seed=3) == []
