"""The benchmark of the viewer runs and reports ratios of what it measured."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.slow
def test_it_reports_ratios_of_its_figures() -> None:
    command = [sys.executable, "benchmarks/viewer.py", "--quick", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["ratios"]["overlay_p95_over_30_ms"] == pytest.approx(found["p95_ms"]["heat"] / 30)
    assert found["ratios"]["slide_p95_over_60_ms"] == pytest.approx(found["p95_ms"]["slide"] / 60)
    assert len(found["resident_mib"]) == 10
    assert 50 < found["tiles"]["heat"] <= 100
    many = found["many_slides"]
    assert many["cpu_ms_first"].keys() == many["cpu_ms_again"].keys() == {"slides", "slide", "annotations"}
    for name, paint in many["first_paint_s"].items():
        if paint is not None:
            assert found["ratios"][f"first_paint_of_{name}_over_0.3_s"] == pytest.approx(paint / 0.3)
