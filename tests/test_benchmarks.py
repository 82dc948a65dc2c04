"""The benchmark of speed runs and reports what it promises; its figures are for quiet machines, not for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT

NET = "test_resnet"
LIBRARIES = {"captum": "captum", "gradcam": "pytorch_grad_cam", "torchcam": "torchcam", "openvino": "openvino"}

pytestmark = pytest.mark.slow  # those of feeding, the GPU and whole slides stay in CI


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: some of the rivals change global state when imported."""
    noise: Path = tmp_path_factory.mktemp("no-tiles")
    command = [sys.executable, "benchmarks/explain.py", "--quick", "--profile", "--json", "--tiles", str(noise)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # where tests run side by side, threads that wait cost minutes
    ended = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_ratios_are_of_the_medians_that_are_reported(figures: dict[str, Any]) -> None:
    rates, ratios = figures["patches_per_s"][NET], figures["ratios"]
    assert ratios[f"{NET}_over_forward"] == rates["ours"] / rates["forward"]
    assert ratios[f"{NET}_over_forward_same_engine"] == rates["ours"] / rates["forward_same_engine"]
    assert ratios[f"{NET}_float32_over_forward"] == rates["ours_float32"] / rates["forward"]
    if "openvino_latency" in rates:  # against the faster of its two modes
        fastest = max(rates["openvino_latency"], rates["openvino_throughput"])
        assert ratios[f"{NET}_over_openvino"] == rates["ours"] / fastest


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_that_is_installed_is_measured(figures: dict[str, Any], library: str) -> None:
    installed = find_spec(LIBRARIES[library]) is not None
    assert (f"{NET}_over_{library}" in figures["ratios"]) == installed, figures["notes"]
    assert any(f"{library} left out" in note for note in figures["notes"]) != installed


def test_memory_held_for_backward_is_the_heads_alone(figures: dict[str, Any]) -> None:
    kept = figures["saved_mib_per_patch"][NET]
    assert 0 < kept["ours"] < 0.1
    assert all(kept[name] > 10 * kept["ours"] for name in ("captum", "gradcam", "torchcam") if name in kept)


def test_figures_say_what_they_were_measured_with(figures: dict[str, Any]) -> None:
    assert figures["settings"]["patches"] == "noise"
    assert figures["machine"]["torch_threads"] >= 1
    assert figures["versions"]["torch"]
    assert figures["fidelity"][NET]["engine"] in ("eager", "openvino")
    assert figures["auto"][NET]["trials"][0]["precision"] == "float32"
    assert figures["fidelity"][NET]["patches"] == figures["settings"]["batch_size"]
    assert sum(figures["profile"][NET]["share"].values()) == pytest.approx(1)


def test_auto_keeps_the_maps_of_a_trained_network(figures: dict[str, Any]) -> None:
    auto = figures["fidelity_trained"]["oral-tumour"]["auto"]
    assert auto["pearson_min"] >= 0.999
    assert auto["same_peak"] == 1
