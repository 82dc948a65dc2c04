"""The benchmark of the audit runs and reports what it promises; its figures are for quiet machines, not for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.audit import ANSWERS
from tests.runs import ROOT
from wsi_gradcam.audit.measures.removal import STEPS


@pytest.mark.slow
def test_the_ratio_is_of_the_times_that_are_reported() -> None:
    ended = subprocess.run(
        [sys.executable, "benchmarks/audit.py", "--quick", "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    times = found["seconds_per_patch"]
    assert found["ratios"] == {"deletion_insertion_over_forwards": times["deletion_insertion"] / times["forwards"]}
    assert found["settings"]["steps"] == STEPS == 28
    assert ANSWERS == 56
