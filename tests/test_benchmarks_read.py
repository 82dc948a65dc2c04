"""The benchmark of reading runs, reports ratios of what it measured, and its sides see the same pixels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT

pytestmark = pytest.mark.slow  # those of feeding, the GPU and whole slides stay in CI


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return measured()


def measured(*arguments: str | Path) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/read.py", "--quick", "--json", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_ratios_are_of_the_rates_that_are_reported(figures: dict[str, Any]) -> None:
    for name, rates in figures["patches_per_s"].items():
        assert {"fast", "openslide", "bare_decode"} <= rates.keys()
        assert ("aszarr" in rates) == ("_by_" not in name) == ("scaled" not in rates)
        for side in rates.keys() - {"fast", "scaled"}:
            assert figures["ratios"][f"fast_over_{side}_{name}"] == rates["fast"] / rates[side]
            if "scaled" in rates:
                assert figures["ratios"][f"fast_over_{side}_{name}_scaled"] == rates["scaled"] / rates[side]


def test_the_parts_of_a_patch_make_up_its_time(figures: dict[str, Any]) -> None:
    for parts in figures["ms_per_patch"].values():
        assert parts["disk"] + parts["decode"] + parts.get("filter", 0) + parts["python"] == pytest.approx(
            parts["total"]
        )
        assert 0 < parts["share_with_lock"] < 1


def test_every_codec_grid_and_scale_is_measured(figures: dict[str, Any]) -> None:
    names = {
        f"{c}_{g}{s}" for c in ("jpeg", "jpeg2000") for g in ("aligned", "unaligned") for s in ("", "_by_2", "_by_1.37")
    }
    assert figures["patches_per_s"].keys() == names


def test_pixels_are_openslides(figures: dict[str, Any]) -> None:
    assert all(figures["identical_to_openslide"].values())
    assert len(figures["identical_to_openslide"]) == 4


def test_a_slide_of_ones_own_is_measured_in_patches_of_its_tiles(shared_data: Path) -> None:
    found = measured("--slide", shared_data / "slides/aperio/CMU-1-Small-Region.svs")
    assert found["patches_per_s"].keys() == {
        f"slide_{grid}{scale}" for grid in ("aligned", "unaligned") for scale in ("", "_by_2", "_by_1.37")
    }
    assert found["identical_to_openslide"] == {"slide_aligned": True, "slide_unaligned": True}
