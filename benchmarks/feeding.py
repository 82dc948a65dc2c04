"""How busy a GPU would be kept: everything real but the device, and but the cores that read.

A Dask worker as `--device cuda` starts it, in this process: scheduling, readers' threads, batches, spans, stores and
journals are the real ones. The model is a sleep, as long as a batch takes at an assumed rate; a read is a sleep as long
as reading and measuring a patch takes here in one thread (measured first); planning, stitching and finishing are sleeps
as long as they take here. So two cores can stand for a machine with sixteen and a GPU. What it shows is an upper bound
of what Python, locks and waiting cost, no rate of any GPU: none was at hand.

| figure | what |
|---|---|
| `utilisation_NAME` | share of the time from the first batch to the last in which the model works |
| `longest_wait_ms_NAME` | the longest time between two batches, slides' ends among them |

NAME is `resnet50` (10,000 patches/s, assumed), `vit_l` (2,900), each of slides of 1,024 patches, or `small`: 30 slides
of 64 patches at 2,900.

    python benchmarks/feeding.py [--readers 14] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from distributed import LocalCluster
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.scale import spec, write_slides
from wsi_gradcam.executors.dask import DaskExecutor, local, plugins
from wsi_gradcam.executors.serial import SerialExecutor
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.results.manifest import SlideOutcome, SlideStatus
from wsi_gradcam.run import context as run_context
from wsi_gradcam.run.context import Context
from wsi_gradcam.run.plan import RunPlan, plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.run.types import Performed, Planned, Task
from wsi_gradcam.run.workload import EXPLAIN, FINISH, PLAN, ExplainWorkload
from wsi_gradcam.slides import patch_reader, read_region

PATCH_PX = 224


@dataclass(frozen=True)
class Case:
    """A run: patches per second of the model, slides, and the side of each in patches."""

    rate: float
    slides: int
    side: int
    batch: int


CASES = {
    "resnet50": Case(10_000, 12, 32, 256),
    "vit_l": Case(2_900, 5, 32, 128),
    "small": Case(2_900, 30, 8, 64),
}


class Device:
    """A model that only takes its time, one batch after the other, and when it worked."""

    def __init__(self, run: RunPlan, rate: float) -> None:
        self._run, self._rate = run, rate
        self.facts = run.facts
        self._lock = threading.Lock()
        self.busy: list[tuple[float, float]] = []

    def explain(self, rgb: NDArray[np.uint8], *_: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return zeros when the time for as many patches is over."""
        facts = self._run.facts
        with self._lock:
            start = time.perf_counter()
            time.sleep(len(rgb) / self._rate)
            self.busy.append((start, time.perf_counter()))
        maps = (len(rgb), len(self._run.maps), *facts.cam_shape)
        return np.zeros((len(rgb), len(facts.classes)), np.float32), np.ones(maps, np.float32)

    @property
    def at_once(self) -> int:
        """The size of a batch."""
        return self._run.facts.batch_size


def measured(run: RunPlan, slides: Sequence[SlideEntry]) -> dict[str, float]:
    """Seconds of a read with its measures, and of the other stages of a slide, on this machine in one thread."""
    executor = SerialExecutor()
    executor.examine(run.spec, run.settings, slides)
    stages: dict[str, float] = {}

    def observe(task: Task, performed: Performed) -> None:
        if task.slide == slides[1]:  # the first one loads libraries
            stages[task.stage.name] = stages.get(task.stage.name, 0.0) + performed.seconds

    apart = replace(run, out=LocalPath(Path(str(run.out)) / "measured"))
    list(executor.run(ExplainWorkload(apart), slides[:2], observe))
    slide = patch_reader.open_entry(slides[0], run.settings)
    times = []
    for i in range(200):
        started = time.perf_counter()
        patch = read_region(slide, PATCH_PX * (i // 8), PATCH_PX * (i % 8), PATCH_PX, PATCH_PX, run.mpp)
        run_context._treat(None, patch)
        times.append(time.perf_counter() - started)
    slide.close()
    seconds = {name: value for name, value in stages.items() if name != EXPLAIN.name}
    return {**seconds, "read": statistics.median(times)}


def plan_of(context: Context[Any], slide: SlideEntry) -> Planned:
    """Plan a slide for real."""
    planned = run_context.perform(context, Task(PLAN, slide)).result
    assert isinstance(planned, Planned)
    return planned


def simulated(run: RunPlan, slides: Sequence[SlideEntry], case: Case, costs: dict[str, float]) -> dict[str, float]:
    """The figures of a case."""
    device, patch = Device(run, case.rate), np.zeros((PATCH_PX, PATCH_PX, 3), np.uint8)
    workload = ExplainWorkload(run)
    before = Context(workload)
    planned = {slide.id: plan_of(before, slide) for slide in slides}
    blocks = sum(len(level) for level in planned[slides[0].id].blocks)
    before.close()
    perform = run_context.perform

    def slept(context: Context[Any], task: Task, upcoming: Task | None = None) -> Performed:
        if task.stage == EXPLAIN:
            return perform(context, task, upcoming)
        parts = blocks if task.stage not in (PLAN, FINISH) else 1
        time.sleep(costs.get(task.stage.name, 0.0) / parts)
        found = planned[task.slide.id]
        result = found if task.stage == PLAN else None
        if task.stage == FINISH:
            return Performed(SlideOutcome(SlideStatus.OK, found.patches, 0, ""), 0.0, "here")
        return Performed(result, 0.0, "here")

    def read(*_: Any) -> NDArray[np.uint8]:
        time.sleep(costs["read"])
        return patch

    replaced = [
        (plugins, "perform", slept),
        (plugins, "check_device", lambda *_: None),
        (patch_reader, "read_region", read),
        (run_context, "_treat", lambda _, pixels: (pixels, 0.0)),
        (Context, "model", lambda _: device),
    ]
    kept = [(where, name, getattr(where, name)) for where, name, _ in replaced]
    for where, name, value in replaced:
        setattr(where, name, value)
    try:
        with LocalCluster(
            n_workers=1,
            threads_per_worker=local.GPU_THREADS,
            processes=False,
            resources=local.GPU_RESOURCES,
            dashboard_address="127.0.0.1:0",
            protocol="tcp://",
            memory_limit=0,
        ) as cluster:
            executor = DaskExecutor(scheduler=cluster.scheduler_address, device="cuda")
            records = list(executor.run(workload, slides, lambda *_: None))
            executor.close()
    finally:
        for where, name, value in kept:
            setattr(where, name, value)
    assert all(record.status == "ok" for record in records), records
    busy = sorted(device.busy)
    waits = [later[0] - earlier[1] for earlier, later in pairwise(busy)]
    return {
        "utilisation": sum(end - start for start, end in busy) / (busy[-1][1] - busy[0][0]),
        "longest_wait_ms": 1000 * max(waits),
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {"ratios": {}, "settings": {"readers": arguments.readers, "cores": os.cpu_count()}}
    for name, case in CASES.items():
        side, count = (8, 4) if arguments.quick else (case.side, case.slides)
        slides = write_slides(folder / name / "slides", side * PATCH_PX, count)
        settings = make_settings(
            engine="eager",
            precision="float32",
            tissue="everything",
            min_tissue=0.0,
            batch_size=case.batch,
            span_patches=case.batch * max(1, 256 // case.batch),
            reader_threads=arguments.readers,
        )
        one = settings.model_copy(update={"reader_threads": 1})
        facts = SerialExecutor().examine(spec(), settings, slides)
        plan = plan_run(folder / name / "out", spec(), facts, one)
        costs = measured(plan, slides)
        plan = plan_run(folder / name / "out", spec(), facts, settings.model_copy(update={"device": "cuda"}))
        figures = simulated(plan, slides, case, costs)
        found["ratios"] |= {f"{figure}_{name}": value for figure, value in figures.items()}
        found[name] = {"costs_ms": {part: 1000 * value for part, value in costs.items()}}
        print(name, {figure: round(value, 3) for figure, value in figures.items()}, file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=14, help="threads that read (default 14)")
    parser.add_argument("--quick", action="store_true", help="few slides: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = run(arguments, Path(folder))
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
