"""The benchmark of whole slides resamples, can have a model that only waits, and compares checkouts by turns."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from benchmarks import slide
from tests.runs import ROOT
from wsi_gradcam.cam.explainer import Explainer


def figures(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    slide.main(["--quick", "--json", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
def test_a_slide_at_half_of_its_resolution_against_a_device_of_a_known_rate(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--mpp-ratio", "2", "--rate", "20")
    assert found["patches"] == 9  # 1024 px in steps of 448
    assert 9 / 20 <= found["seconds"]["model_only"] < found["seconds"]["wall"]
    bound = max(found["seconds"]["decode_only"], found["seconds"]["model_only"])
    assert found["ratios"]["wall_over_bound"] == pytest.approx(found["seconds"]["wall"] / bound)


def test_a_model_that_waits_returns_what_it_did_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def explain(self: object, rgb: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        calls.append(len(rgb))
        return rgb, -rgb

    monkeypatch.setattr(Explainer, "explain", explain)
    call: Any
    with slide.waiting_model(100):
        call = Explainer.explain
        first, rgb = call(None, np.arange(10)), np.arange(10, 14)
        started = time.perf_counter()
        again = call(None, rgb)
        assert time.perf_counter() - started >= 0.04
    assert calls == [10]
    np.testing.assert_array_equal(again[1], first[1][:4])
    call = Explainer.explain
    assert call is explain


@pytest.mark.slow
def test_two_checkouts_by_turns(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--rate", "100", "--against", str(ROOT))
    assert found["patches_per_s"]["own"] / found["patches_per_s"]["other"] == pytest.approx(
        found["ratios"]["patches_per_s_over_other"]
    )
