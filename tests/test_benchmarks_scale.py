"""The benchmark of distributing runs and reports what it promises; its figures are for quiet machines."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.simulated import PATCHES
from tests.runs import ROOT


def figures(*arguments: str) -> dict[str, Any]:
    """What the benchmark prints."""
    command = [sys.executable, "benchmarks/scale.py", "--quick", "--json", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
def test_a_simulated_cluster_does_all_its_work() -> None:
    found = figures("--only", "simulation")
    ran = found["simulation"]["4_workers"]
    assert found["ratios"] == {"busy_4_workers": ran["busy"], "gpu_4_workers": ran["gpu"]}
    assert 0 < ran["gpu"] <= ran["busy"] <= 1
    assert all(seconds > 0 for seconds in found["simulation"]["seconds"].values())
    least_s = ran["slides"] * PATCHES / found["simulation"]["patches_per_s"] / 4
    assert ran["real_s"] >= least_s  # sleeps were slept
    assert ran["scheduler_mib"] > 50
    assert ran["scheduler_load"] > 0


@pytest.mark.slow
def test_all_of_it_runs() -> None:
    found = figures()
    names = {"dask_over_serial", "speedup_2_workers", "busy_4_workers", "first_patch_300_over_10"}
    assert names | {"client_memory_300_over_10", "gpu_4_workers"} == set(found["ratios"])
    assert all(value > 0 for value in found["ratios"].values())
    assert found["planning"]["300_slides"]["first_patch_s"] > 0
