"""The benchmark of feeding runs with the real scheduling, and what it says of the device can be true."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import feeding
from benchmarks.feeding import Case


def test_a_device_is_fed_through_the_real_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "CASES", {"small": Case(2_000, 3, 8, 64)})
    found = feeding.run(argparse.Namespace(quick=True, readers=4), tmp_path)
    assert 0.02 < found["ratios"]["utilisation_small"] <= 1
    assert found["ratios"]["longest_wait_ms_small"] > 0
    costs = found["small"]["costs_ms"]
    assert set(costs) == {"plan", "stitch", "finish", "read"}
    assert all(value > 0 for value in costs.values())
