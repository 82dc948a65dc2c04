"""The benchmark of scaled decoding measures differences, and compares maps as `--decode auto` does."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import decoding
from wsi_gradcam.models.load import load_model


def test_differences_are_counted_by_their_size() -> None:
    exact = np.full((1, 10, 10, 3), 100, np.uint8)
    scaled = exact.copy()
    scaled[0, 0, :, :] = 97
    found = decoding.gray_levels(exact, scaled)
    assert found["mean"] == pytest.approx(0.3)
    assert found["largest"] == found["p99"] == 3
    assert [found[f"up_to_{most}"] for most in decoding.UP_TO] == pytest.approx([0.9, 0.9, 1, 1])


def test_maps_of_other_pixels_are_less_alike() -> None:
    model = load_model("oral-tumour")
    exact = np.random.default_rng(0).integers(0, 256, (16, *model.patch_px, 3), np.uint8)
    same = decoding.maps(model.module, model.prepare, exact, exact)
    other = decoding.maps(model.module, model.prepare, exact, exact[::-1].copy())
    assert same["pearson"] == pytest.approx(1)
    assert same["is_enough"]
    assert other["pearson"] < 0.9
    assert not other["is_enough"]


@pytest.mark.slow
def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    decoding.main(["--quick", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {f"{codec}_by_{by}" for codec in ("jpeg", "jpeg2000") for by in (2, 4)}
