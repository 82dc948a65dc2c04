"""The benchmark of feeding runs with the processes that `--device cuda` starts; its device can be true."""

from __future__ import annotations

import argparse
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import feeding
from benchmarks.feeding import Case, Device, Simulation


def test_a_device_is_fed_through_the_real_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "CASES", {"small": Case(2_000, 3, 8, 64)})
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    given = argparse.Namespace(quick=True, readers=4, cores=6, slowness=4.0, only="")
    found = feeding.run(given, tmp_path)
    ratios, costs = found["ratios"], found["small"]["costs_ms"]
    assert 0.01 < ratios["utilisation_small"] <= 1
    assert ratios["longest_wait_ms_small"] > 0
    assert ratios["lock_share_small"] > 0
    assert set(costs) == {"plan", "stitch", "finish", feeding.READ, feeding.LOCKED}
    assert all(value > 0 for value in costs.values())
    assert costs[feeding.LOCKED] < costs[feeding.READ]
    assert (os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get(feeding.FILE)) == (before, None)


def test_the_device_works_on_one_batch_after_the_other_and_is_waited_for() -> None:
    facts = SimpleNamespace(batch_size=10, classes=("a", "b"), cam_shape=(2, 2))
    run: Any = SimpleNamespace(facts=facts, maps=("one",))
    device = Device(Simulation({}, {}, 0, run, rate=400.0, slowness=2.0))
    rgb = np.zeros((10, 4, 4, 3), np.uint8)
    started = time.perf_counter()
    first, second = device.begin(rgb), device.begin(rgb[:3])
    assert time.perf_counter() - started < 0.05  # nobody waits to give it work
    logits, maps = second()
    assert (logits.shape, maps.shape) == ((3, 2), (3, 1, 2, 2))
    assert time.perf_counter() - started >= 2 * 10 / 200
    first()
    (a, b), (c, d) = device.busy
    assert (b - a, d - c) == pytest.approx((0.05, 0.05))
    assert c == b


def test_what_workers_are_told_can_travel() -> None:
    told = pickle.loads(pickle.dumps(Simulation({"plan": 0.1}, {}, 3, SimpleNamespace(), 10.0)))  # type: ignore[arg-type]
    assert (told.costs, told.blocks, told.slowness) == ({"plan": 0.1}, 3, 1.0)
