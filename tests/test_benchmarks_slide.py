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
    """In the order in which patches were given to it: one batch after the other."""
    calls: list[int] = []

    def begin(self: object, rgb: np.ndarray[Any, Any]) -> Any:
        calls.append(len(rgb))
        return lambda: (rgb, -rgb)

    monkeypatch.setattr(Explainer, "begin", begin)
    call: Any
    with slide.waiting_model(100):
        call = Explainer.begin
        first = call(None, np.arange(10))()
        started = time.perf_counter()
        begun = [call(None, np.arange(10, 14)) for _ in range(3)]
        assert time.perf_counter() - started < 0.04
        again = begun[2]()
        assert time.perf_counter() - started >= 0.12
    assert calls == [10]
    np.testing.assert_array_equal(again[1], first[1][:4])
    call = Explainer.begin
    assert call is begin


def test_the_times_of_the_model_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: object) -> Any:
        time.sleep(0.02)
        return lambda: time.sleep(0.03)

    monkeypatch.setattr(Explainer, "begin", begin)
    call: Any
    with slide.watched() as line:
        call = Explainer.begin
        call(None)()
    assert line.summary()["model_busy_s"] >= 0.05
    assert len(line.model) == 2


@pytest.mark.slow
def test_two_checkouts_by_turns(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--rate", "100", "--against", str(ROOT))
    assert found["patches_per_s"]["own"] / found["patches_per_s"]["other"] == pytest.approx(
        found["ratios"]["patches_per_s_over_other"]
    )
