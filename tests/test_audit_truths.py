"""Every verdict is right where the truth is known: with a few seeds here, with 50 in the proofs."""

from __future__ import annotations

import json

import pytest
import torch

from tests.planted_rates import main, rate
from tests.planted_truths import TRUTHS, Truth

FRESH = range(1000, 1050)
"""No measure or threshold was chosen with these seeds in sight."""


def name_of(truth: Truth) -> str:
    return f"{truth.verdict}: {truth.case}"


@pytest.mark.parametrize("truth", TRUTHS, ids=name_of)
def test_truths_are_told(truth: Truth) -> None:
    """Two seeds: nothing false, and not both missed."""
    found = rate(truth, range(2))
    assert not found.wrong, found.counts
    assert found.right, found.counts


@pytest.mark.slow
@pytest.mark.parametrize("truth", TRUTHS, ids=name_of)
def test_truths_are_told_with_fifty_fresh_seeds(truth: Truth) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = rate(truth, FRESH)
    finally:
        torch.set_num_threads(threads)
    assert found.right >= 0.95 * len(FRESH), found.counts
    assert found.wrong <= 0.05 * len(FRESH), found.counts


def test_rates_are_printed_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2", "--first", "5", "--only", "cliff"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "| `promises_kept` | cliff ahead | fails | 0 / 0 / 2 | 100 % | 0 % |"
    assert main(["--seeds", "1", "--only", "straight on", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["first"], found["seeds"]) == (1000, 1)
    assert found["rates"][0]["outcomes"] == {"holds": 1, "unclear": 0, "fails": 0}
