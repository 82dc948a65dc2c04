"""The benchmark for the day a GPU is there runs to its end without one, and tells each of its findings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out: Path = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--quick", "--out", str(out)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = (out / "gpu.jsonl").read_text().splitlines()
    assert lines == [line for line in ended.stdout.splitlines() if line.startswith("{")]
    assert (out / "profile-resnet18.txt").exists()
    return [json.loads(line) for line in lines]


def of_kind(told: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in told if line["kind"] == kind]


def test_nothing_fails_and_every_part_is_told(told: list[dict[str, Any]]) -> None:
    assert not of_kind(told, "failed")
    assert not of_kind(told, "skipped")
    for kind in ("machine", "fidelity", "rate", "copy", "run", "profile"):
        assert of_kind(told, kind), kind
    assert told[-1]["kind"] == "done"


def test_the_device_is_compared_with_the_cpu(told: list[dict[str, Any]]) -> None:
    """Here it is the CPU: nothing is off, and what is repeated is the same."""
    found = {line["precision"]: line for line in of_kind(told, "fidelity")}
    assert found["float32"]["repeats"]
    assert max(found["float32"]["maps"].values()) < 1e-6
    assert 1e-5 < found["bfloat16"]["maps"]["gradcam"] < 0.1
    both = of_kind(told, "run")[-1]
    assert both["bytes_equal"]
    assert both["pearson"] == pytest.approx(1)


def test_rates_stand_beside_the_forward_pass_and_other_libraries(told: list[dict[str, Any]]) -> None:
    rates = {line["side"]: line["patches_per_s"] for line in of_kind(told, "rate")}
    assert {"ours eager float32", "ours eager bfloat16", "forward float32", "forward bfloat16"} <= rates.keys()
    assert all(rate > 0 for rate in rates.values())
    named = {line["side"] for line in of_kind(told, "left out")}
    assert any("grad" in side for side in rates.keys() | named)
    assert any("captum" in side for side in rates.keys() | named)
