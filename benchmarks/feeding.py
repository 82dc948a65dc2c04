"""How busy a GPU would be kept: everything real but the device, and but the cores that read, plan and stitch.

The processes are those that `--device cuda` starts on a machine of `--cores` cores: the client with its scheduler, the
worker of the GPU, and helpers. Scheduling, messages, orders, threads, batches, spans, stores and records are the real
ones. Replaced are

- the model: batches take the time of an assumed rate, one after the other, and are given and asked for as on CUDA;
- reading a patch with its measures: it takes as long as it takes here in one thread (measured first), of which
  the share that holds Python's lock is computed while it is held, and the rest slept;
- planning, stitching and finishing, in the helpers: they are sleeps as long as they take here.

All that takes its time takes `--slowness` times as long, and figures are told in the time of the machine that is
simulated. So two cores can stand for sixteen and a GPU, if it is as many times slower (the default). What is real,
batches, spans, messages, is not slowed: its cost is told as `other_cpu`. It shows what Python, locks, writing and
waiting cost the GPU; it is no rate of any GPU: none was at hand.

| figure | what |
|---|---|
| `utilisation_NAME` | share of the time from the first batch to the last in which the model works |
| `longest_wait_ms_NAME` | the longest time between two batches, slides' ends among them |
| `lock_share_NAME` | share of that time in which a reading thread of the GPU's worker holds Python's lock; at most 1 |
| `other_cpu_NAME` | CPU seconds of that worker beside reading, per second: batches, spans, stores; most hold no lock |

NAME is `resnet50` (10,000 patches/s, assumed), `vit_l` (2,900), each of slides of 1,024 patches, or `small`: 30 slides
of 64 patches at 2,900. `cores_NAME` are the cores that all sleeps together stand for, in the mean over the run.

    python benchmarks/feeding.py [--readers 14] [--cores 16] [--slowness 8] [--only resnet50,vit_l,small] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Worker
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.read import timed
from benchmarks.scale import spec, write_slides
from wsi_gradcam.executors import SerialExecutor
from wsi_gradcam.executors.dask import DaskExecutor, batching, plugins
from wsi_gradcam.executors.dask import workers as dask_workers
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.results.manifest import SlideOutcome, SlideStatus
from wsi_gradcam.run import context as run_context
from wsi_gradcam.run.context import Context
from wsi_gradcam.run.plan import RunPlan, plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.run.types import Performed, Planned, Task, TaskResult
from wsi_gradcam.run.workload import EXPLAIN, FINISH, PLAN, ExplainWorkload, perform_job
from wsi_gradcam.slides import patch_reader, read_region
from wsi_gradcam.slides.base import LocalFile
from wsi_gradcam.slides.tiff_levels import TiffLevel

PATCH_PX = 224
READ, LOCKED = "read", "read with Python's lock"
IN_SECONDS = ("BATCH_S", "LEAST_S", "PLANNED_S")  # of batches; the scheduler's, which are in slow motion too
FILE = "FEEDING"  # environment variable: the file that tells workers what to simulate


@dataclass(frozen=True)
class Case:
    """A run: patches per second of the model, slides, and the side of each in patches."""

    rate: float
    slides: int
    side: int
    batch: int


CASES = {
    "resnet50": Case(10_000, 48, 32, 256),
    "vit_l": Case(2_900, 5, 32, 128),
    "small": Case(2_900, 30, 8, 64),
}


@dataclass(frozen=True)
class Simulation:
    """What workers are told: seconds by part, plans by slide, blocks of a slide, and what the device is."""

    costs: dict[str, float]
    planned: dict[str, Planned]
    blocks: int
    run: RunPlan
    rate: float
    slowness: float = 1.0


class Device:
    """A GPU that only takes its time, one batch after the other, and when it worked; the methods are `Explainer`'s."""

    in_flight = 2

    def __init__(self, simulation: Simulation) -> None:
        import torch

        from wsi_gradcam.cam.engine import Lane

        self._run, self._rate = simulation.run, simulation.rate / simulation.slowness
        self.facts = simulation.run.facts
        self.at_once = self.facts.batch_size
        self._lane, self._lock = Lane(torch.device("cpu")), threading.Lock()
        self.busy: list[tuple[float, float]] = []

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an array for patches."""
        return self._lane.empty(shape)

    def resized(self, patch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the patch: the network takes it as it is."""
        return patch

    def begin(self, rgb: NDArray[np.uint8], *_: Any) -> Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Begin a batch, which is done when those before it are, and the time for as many patches is over."""
        staged = self._lane.staged(rgb, self.at_once)
        with self._lock:
            start = max(time.perf_counter(), self.busy[-1][1] if self.busy else 0.0)
            end = start + len(staged) / self._rate
            self.busy.append((start, end))

        def found() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            time.sleep(max(0.0, end - time.perf_counter()))
            maps = (len(rgb), len(self._run.maps), *self.facts.cam_shape)
            return np.zeros((len(rgb), len(self.facts.classes)), np.float32), np.ones(maps, np.float32)

        return found


DEVICES: list[Device] = []
SPENT_S: defaultdict[str, float] = defaultdict(float)  # by the cores that sleeps stand for


def dask_setup(worker: Worker) -> None:
    """Called by Dask in a new worker's process: replace what is simulated."""
    dask_workers.dask_setup(worker)
    simulation: Simulation = pickle.loads(Path(os.environ[FILE]).read_bytes())
    costs = {part: simulation.slowness * seconds for part, seconds in simulation.costs.items()}
    patch = np.zeros((PATCH_PX, PATCH_PX, 3), np.uint8)
    perform = run_context.perform

    def performed(context: Context[Any], task: Task, upcoming: Task | None = None) -> Performed:
        if task.stage == EXPLAIN:
            return perform(context, task, upcoming)
        seconds = costs.get(task.stage.name, 0.0) / (1 if task.stage in (PLAN, FINISH) else simulation.blocks)
        time.sleep(seconds)
        SPENT_S[task.stage.name] += seconds
        found = simulation.planned[task.slide.id]
        result: Any = found if task.stage == PLAN else None
        if task.stage == FINISH:
            result = SlideOutcome(SlideStatus.OK, found.patches, 0, "")
        return Performed(result, seconds, "here")

    def read(*_: Any) -> NDArray[np.uint8]:
        locked = time.thread_time() + costs[LOCKED]
        while time.thread_time() < locked:  # as Python's own code does, it keeps others of the process from running
            pass
        time.sleep(costs[READ] - costs[LOCKED])
        SPENT_S[READ] += costs[READ]
        SPENT_S[LOCKED] += costs[LOCKED]
        return patch

    def model(_: Context[Any]) -> Device:
        if not DEVICES:
            DEVICES.append(Device(simulation))
        return DEVICES[0]

    changes: list[tuple[Any, str, Any]] = [
        (plugins, "perform", performed),
        (plugins, "check_device", lambda *_: None),
        (patch_reader, "read_region", read),
        (run_context, "_treat", lambda _, __, pixels: (pixels, 0.0)),
        (Context, "model", model),
    ]
    for where, name, value in changes:
        setattr(where, name, value)
    if worker.state.total_resources.get("GPU"):
        model(None)  # type: ignore[arg-type]  # torch is loaded before the run, as where a model is examined


def report() -> dict[str, Any]:
    """Return what a worker did, and its CPU seconds until now."""
    return {"busy": DEVICES[0].busy if DEVICES else [], "spent": dict(SPENT_S), "cpu": time.process_time()}


def measured(run: RunPlan, slides: Sequence[SlideEntry]) -> dict[str, float]:
    """CPU seconds of a read with its measures, and of the other stages of a slide, on this machine.

    Of two slides the second is taken: the first loads libraries. Maps are those of the device that only takes time.
    """
    apart = replace(run, out=LocalPath(Path(str(run.out)) / "measured"))
    workload, stages = ExplainWorkload(apart), defaultdict[str, float](float)
    device = Device(Simulation({}, {}, 0, apart, float("inf")))
    for slide in slides[:2]:
        stages.clear()
        context: Context[Any] = Context(workload, device)  # type: ignore[arg-type]

        def perform(task: Task, upcoming: Task | None, context: Context[Any] = context) -> TaskResult:
            started = time.process_time()
            performed = run_context.perform(context, task, upcoming)
            stages[task.stage.name] += time.process_time() - started
            return performed.result

        perform_job(workload.job(slide), perform)
        context.close()
    return {name: value for name, value in stages.items() if name != EXPLAIN.name} | read_costs(run, slides[0])


def read_costs(run: RunPlan, entry: SlideEntry) -> dict[str, float]:
    """CPU seconds of a read with its measures, and the part of them that holds Python's lock."""
    slide = patch_reader.open_entry(entry, run.settings)
    across = slide.info.width // PATCH_PX
    times, locked = [], []
    for i in range(200):
        spent: defaultdict[str, float] = defaultdict(float)
        with (
            timed(TiffLevel, "decode", spent, "decode", time.thread_time),
            timed(LocalFile, "read_many", spent, "disk", time.thread_time),
            timed(run_context, "measure_blur", spent, "blur", time.thread_time),
        ):
            y, x = divmod(i % across**2, across)
            started = time.thread_time()
            patch = read_region(slide, PATCH_PX * y, PATCH_PX * x, PATCH_PX, PATCH_PX, run.mpp)
            run_context._treat(None, lambda pixels: pixels, patch)
            times.append(time.thread_time() - started)
        locked.append(times[-1] - sum(spent.values()))
    slide.close()
    return {READ: statistics.mean(times), LOCKED: statistics.mean(locked)}


def plans(run: RunPlan, slides: Sequence[SlideEntry]) -> dict[str, Planned]:
    """Plan slides for real."""
    context, found = Context(ExplainWorkload(run)), {}
    for slide in slides:
        planned = run_context.perform(context, Task(PLAN, slide)).result
        assert isinstance(planned, Planned)
        found[slide.id] = planned
    context.close()
    return found


@contextmanager
def machine(simulation: Simulation, folder: Path, cores: int) -> Iterator[None]:
    """Let `--device cuda` find a GPU and so many cores, and its processes simulate, as a context."""
    (folder / "simulation").write_bytes(pickle.dumps(simulation))
    real, helpers = dask_workers.worker_options, dask_workers.helpers(cores)

    def options(*given: Any) -> Iterator[tuple[int | str, dict[str, Any]]]:
        for name, about in real(*given):
            yield name, {**about, "preload": ["benchmarks.feeding"]}

    kept = dask_workers.helpers, dict(os.environ)
    constants = {name: value for name, value in vars(batching).items() if name in IN_SECONDS}
    vars(batching).update({name: simulation.slowness * value for name, value in constants.items()})
    vars(dask_workers).update(worker_options=options, helpers=lambda: helpers)
    path = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    os.environ.update({FILE: str(folder / "simulation"), "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": path})
    try:
        yield
    finally:
        dask_workers.worker_options, dask_workers.helpers = real, kept[0]
        vars(batching).update(constants)
        os.environ.clear()
        os.environ.update(kept[1])


def simulated(simulation: Simulation, slides: Sequence[SlideEntry], folder: Path, cores: int) -> dict[str, float]:
    """The figures of a case."""
    with machine(simulation, folder, cores):
        executor = DaskExecutor(workers=1, device="cuda")
        try:
            before = executor._client.run(report)
            records = list(executor.run(ExplainWorkload(simulation.run), slides, lambda *_: None))
            after = executor._client.run(report)
        finally:
            executor.close()
    assert all(record.status == "ok" for record in records), records
    ((gpu, busy),) = [(name, told["busy"]) for name, told in after.items() if told["busy"]]
    waits = [later[0] - earlier[1] for earlier, later in pairwise(busy)]
    run_s = busy[-1][1] - busy[0][0]
    own_s = after[gpu]["cpu"] - before[gpu]["cpu"] - after[gpu]["spent"].get(LOCKED, 0.0)
    return {
        "utilisation": sum(end - start for start, end in busy) / run_s,
        "longest_wait_ms": 1000 * max(waits) / simulation.slowness,
        "lock_share": after[gpu]["spent"].get(LOCKED, 0.0) / run_s,
        "other_cpu": own_s * simulation.slowness / run_s,
        "cores": sum(seconds for told in after.values() for part, seconds in told["spent"].items() if part != LOCKED)
        / run_s,
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {
        "ratios": {},
        "settings": {
            **{name: getattr(arguments, name) for name in ("readers", "cores", "slowness")},
            "cores_here": os.cpu_count(),
        },
    }
    for name, case in CASES.items():
        if arguments.only and name not in arguments.only.split(","):
            continue
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
        facts = SerialExecutor().examine(spec(), settings.model_copy(update={"batch_size": 16}), slides)
        facts = replace(facts, batch_size=case.batch)  # trying the network itself on so many would take long here
        costs = measured(plan_run(folder / name / "out", spec(), facts, one), slides)
        plan = plan_run(folder / name / "out", spec(), facts, settings.model_copy(update={"device": "cuda"}))
        planned = plans(plan, slides)
        blocks = sum(len(level) for level in planned[slides[0].id].blocks)
        simulation = Simulation(costs, planned, blocks, plan, case.rate, arguments.slowness)
        figures = simulated(simulation, slides, folder / name, arguments.cores)
        found["ratios"] |= {f"{figure}_{name}": value for figure, value in figures.items()}
        found[name] = {"costs_ms": {part: 1000 * value for part, value in costs.items()}}
        print(name, {figure: round(value, 3) for figure, value in figures.items()}, file=sys.stderr, flush=True)
        print(name, {part: round(1000 * value, 3) for part, value in costs.items()}, file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=14, help="threads that read (default 14)")
    parser.add_argument("--cores", type=int, default=16, help="cores of the machine that is simulated (default 16)")
    parser.add_argument("--slowness", type=float, help="of all that is simulated (default: cores for one that is here)")
    parser.add_argument("--only", default="", help="cases, joined by commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="few slides: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    arguments.slowness = arguments.slowness or max(1.0, arguments.cores / (os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        found = run(arguments, Path(folder))
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    from benchmarks import feeding  # by the name that workers know it by

    feeding.main()
