"""The cost of distributing: against one process, on two workers, on simulated clusters, and before the first patch.

| ratio | what |
|---|---|
| `dask_over_serial` | seconds a patch with one Dask worker over those of the serial executor, the same threads |
| `speedup_2_workers` | patches/s of two workers with one torch thread each over those of one |
| `busy_N_workers` | share of N simulated workers' time in tasks that explain, from the run's begin to the last span |
| `gpu_N_workers` | the same without what a GPU waits for there: an batch's first patches, and writing |
| `first_patch_100000_over_100` | seconds from `explain(...)` to the first explained span, 100,000 slides over 100 |
| `client_memory_100000_over_100` | the client's resident memory then, without what the list of slides itself takes |

The first two: real slides, ResNet-18 in eager float32, sides taking turns, medians; from the moment when a tenth of
the patches is done to the end of the run, so that starting processes and loading the model do not count.

The simulation: a scheduler as a process, the real executor, plugin, batches and answers; real Dask workers with GPU=1
and seven threads, many in a process, whose tasks sleep. A slide has 1,000 patches; GPUs explain 1,000 patches/s, which
is assumed; what all else takes is measured before, on a slide of 1 gigapixel with 5% tissue, which is as many patches.
8 workers get 250 slides, 64 get 2,000, 256 get 8,000: half a minute of work for each. Time is slowed down by the factor
`slowness`, so that two cores can be all those machines: sleeps and the sizes of batches are multiplied by it. The
scheduler has loaded the program before, as it has when `explain` has had a worker look at the model. `scheduler_load`
and `client_load` are their CPU seconds over the time that the run would take without it: below 1 they keep up.

    python benchmarks/scale.py [--only overhead,speedup,simulation,planning] [--rounds 3] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.simulated import FIRST_BATCH, PATCHES, RATE, SPAN, WRITING, report
from wsi_gradcam.executors import SerialExecutor
from wsi_gradcam.executors.dask import DaskExecutor, batching
from wsi_gradcam.executors.dask.plugins import TaskBatch, perform_batch
from wsi_gradcam.inputs.find import SlideEntry, find_slides
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.run.plan import RunPlan, plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.run.types import Performed, Planned, Processed, Task
from wsi_gradcam.run.workload import ExplainWorkload

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
MPP = 0.25
SECTIONS = ("overhead", "speedup", "simulation", "planning")
THREADS = 7  # of a simulated worker: four for the GPU, the others plan and stitch
WORKERS_A_PROCESS = 32
SIMULATIONS = ((8, 1.0), (64, 2.0), (256, 8.0))  # workers, slowness
SLIDES_A_WORKER = 31.25  # so that 64 have 2,000
COUNTS = (100, 10_000, 100_000)


@dataclass(frozen=True)
class Scale:
    """The size of a measurement."""

    rounds: int
    side_px: int
    slides: int
    slide_px: int
    simulations: tuple[tuple[int, float], ...]
    slides_a_worker: float
    counts: tuple[int, ...]


FULL = Scale(3, 6144, 3, 31_623, SIMULATIONS, SLIDES_A_WORKER, COUNTS)
QUICK = Scale(1, 900, 2, 1500, ((4, 1.0),), 3, (10, 300))


def spec(name: str = "resnet18") -> ModelSpec:
    """An untrained network, the same in every process."""
    return ModelSpec(
        name=name,
        source=f"torchvision:{name}",
        weights="random",
        classes=("other", "tumour"),
        patch_px=(224, 224),
        mpp=MPP,
    )


def write_slides(folder: Path, side_px: int, count: int) -> list[SlideEntry]:
    """Slides of tissue in JPEG, alike."""
    import numpy as np
    from skimage.data import immunohistochemistry

    from wsi_gradcam.demo.slide import write_slide

    micrograph = immunohistochemistry()
    repeats = -(-side_px // len(micrograph))
    folder.mkdir(parents=True)
    write_slide(folder / "0.tif", np.tile(micrograph, (repeats, repeats, 1))[:side_px, :side_px], mpp=MPP)
    for i in range(1, count):
        os.link(folder / "0.tif", folder / f"{i}.tif")
    return find_slides([folder])


def rate(executor: SerialExecutor | DaskExecutor, run: RunPlan, slides: Sequence[SlideEntry]) -> float:
    """Patches per second, from the moment when a tenth is done to the end."""
    moments: list[tuple[float, int]] = []

    def observe(task: Task, performed: Performed) -> None:
        if isinstance(performed.result, Processed):
            moments.append((time.perf_counter(), performed.result.patches + (moments[-1][1] if moments else 0)))

    records = list(executor.run(ExplainWorkload(run), slides, observe))
    end, total = time.perf_counter(), moments[-1][1]
    assert all(record.status == "ok" for record in records), records
    start, before = next(moment for moment in moments if moment[1] >= total / 10)
    return (total - before) / (end - start)


def alternate(sides: dict[str, Callable[[Path], float]], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Rates of each side, which take turns, every other round backwards."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            rates[name].append(sides[name](folder / f"{name}-{i}"))
    return rates


def overhead(folder: Path, scale: Scale, found: dict[str, Any]) -> None:
    """One Dask worker against this process."""
    slides = write_slides(folder / "slides", scale.side_px, scale.slides)
    settings = make_settings(engine="eager", precision="float32", min_tissue=0.0)
    serial = SerialExecutor()
    facts = serial.examine(spec(), settings, slides)
    with closing(DaskExecutor(workers=1)) as one:
        plan = plan_run(folder, spec(), facts, settings)
        rates = alternate(
            {
                "serial": lambda out: rate(serial, replace(plan, out=LocalPath(out)), slides),
                "dask": lambda out: rate(one, replace(plan, out=LocalPath(out)), slides),
            },
            scale.rounds,
            folder,
        )
    middle = {name: statistics.median(values) for name, values in rates.items()}
    found["ratios"]["dask_over_serial"] = middle["serial"] / middle["dask"]
    found["patches_per_s"] |= rates


def speedup(folder: Path, scale: Scale, found: dict[str, Any]) -> None:
    """Two workers against one, with a torch thread each."""
    slides = write_slides(folder / "slides", scale.side_px, scale.slides + 1)
    settings = make_settings(engine="eager", precision="float32", min_tissue=0.0, torch_threads=1, reader_threads=1)
    facts = SerialExecutor().examine(spec(), settings, slides)
    plan = plan_run(folder, spec(), facts, settings)

    def on(workers: int, out: Path) -> float:
        with closing(DaskExecutor(workers=workers, torch_threads=1)) as executor:
            return rate(executor, replace(plan, out=LocalPath(out)), slides)

    rates = alternate({"1_worker": lambda out: on(1, out), "2_workers": lambda out: on(2, out)}, scale.rounds, folder)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    found["ratios"]["speedup_2_workers"] = middle["2_workers"] / middle["1_worker"]
    found["patches_per_s"] |= rates


@contextmanager
def closing(executor: DaskExecutor) -> Iterator[DaskExecutor]:
    """The executor, closed at the end."""
    try:
        yield executor
    finally:
        executor.close()


@contextmanager
def process(*arguments: str) -> Iterator[psutil.Process]:
    """A Python process, killed at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield psutil.Process(started.pid)
    finally:
        started.kill()
        started.wait()


class Peak:
    """The largest resident size of a process while this lasts, MiB."""

    def __init__(self, watched: psutil.Process) -> None:
        self.mib = 0.0
        self._watched = watched
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.mib = max(self.mib, self._watched.memory_info().rss / MIB)
            if self._end.wait(0.2):
                return


def costs_of(folder: Path, side_px: int) -> dict[str, Any]:
    """The tasks of a slide with about PATCHES patches: mean seconds on this machine, the model apart, and blocks."""
    from tests.synthetic import write_gigapixel_slide

    slide = folder / "slide.tiff"
    tissue = min(1.0, PATCHES * 224**2 / side_px**2)
    write_gigapixel_slide(slide, side_px, side_px, mpp=MPP, tissue_fraction=tissue)
    settings = make_settings(engine="eager", precision="float32", span_patches=SPAN)
    executor, slides = SerialExecutor(), find_slides([slide])
    seconds: defaultdict[str, list[float]] = defaultdict(list)

    blocks: list[int] = []

    def observe(task: Task, performed: Performed) -> None:
        ended = performed.result
        if isinstance(ended, Planned):
            blocks.extend(len(level) for level in ended.blocks)
        if not isinstance(ended, Processed):
            seconds[task.stage.name].append(performed.seconds)
            return
        seconds[WRITING].append(performed.seconds - ended.model_s - ended.waited_s)
        if task.index == (0,):
            seconds[FIRST_BATCH].append(ended.waited_s)

    plan = plan_run(folder / "out", spec(), executor.examine(spec(), settings, slides), settings)
    assert [record.status for record in executor.run(ExplainWorkload(plan), slides, observe)] == ["ok"]
    return {"seconds": {name: statistics.fmean(values) for name, values in seconds.items()}, "blocks": blocks}


def simulate(folder: Path, workers: int, slowness: float, slides: int, costs: dict[str, Any]) -> dict[str, float]:
    """Figures of a run on simulated workers."""
    file = folder / "scheduler.json"
    with ExitStack() as stack:
        # As `dask scheduler` does it, on this machine alone.
        boss = stack.enter_context(
            process(
                "-m",
                "dask",
                "scheduler",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--scheduler-file",
                str(file),
                "--dashboard-address",
                "127.0.0.1:0",
            )
        )
        until = time.monotonic() + 60
        while not file.exists() or not file.read_text():
            assert time.monotonic() < until, "no scheduler"
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        for start in range(0, workers, WORKERS_A_PROCESS):
            count = min(WORKERS_A_PROCESS, workers - start)
            arguments = (
                "-m",
                "benchmarks.simulated",
                address,
                str(count),
                str(THREADS),
                str(slowness),
                json.dumps(costs),
            )
            stack.enter_context(process(*arguments))
        executor = stack.enter_context(closing(DaskExecutor(scheduler=address, device="cuda", wait_s=300)))
        while len(executor.workers().addresses) < workers:
            time.sleep(0.2)
        # As in `explain`, where a worker has looked at the model before: the scheduler has loaded the program.
        executor._client.submit(perform_batch, TaskBatch("no run", ()), pure=False).result()
        return _run_simulated(executor, boss, folder, slowness, slides, workers)


def _run_simulated(
    executor: DaskExecutor, boss: psutil.Process, folder: Path, slowness: float, slides: int, workers: int
) -> dict[str, float]:
    run = RunPlan(LocalPath(folder / "out"), None, None, make_settings(device="cuda"), ())  # type: ignore[arg-type]
    entries = [SlideEntry(f"site/{i:06d}.svs", f"/archive/site/{i:06d}.svs") for i in range(slides)]
    client, before = psutil.Process(), (_cpu_s(boss), _cpu_s(psutil.Process()))
    with Peak(boss) as peak, slowed(slowness):
        started = time.time()
        ended = [record.status for record in executor.run(ExplainWorkload(run), entries, lambda *_: None)]
    assert ended == ["ok"] * slides
    told = list({each["pid"]: each for each in executor._client.run(report).values()}.values())
    assert sum(each["patches"] for each in told) == slides * PATCHES
    first, last = min(each["first"] for each in told), max(each["last"] for each in told)
    within_s = sum(each["within_s"] for each in told)
    model_s = slowness * sum(each["spent_s"]["explain"] for each in told)
    real_s = (last - started) / slowness
    return {
        "busy": within_s / (workers * (last - started)),
        "gpu": model_s / (workers * (last - started)),
        "busy_after_first_span_began": within_s / (workers * (last - first)),
        "first_span_s": (first - started) / slowness,
        "real_s": real_s,
        "slowness": slowness,
        "slides": slides,
        "scheduler_mib": peak.mib,
        "scheduler_load": (_cpu_s(boss) - before[0]) / real_s,
        "client_load": (_cpu_s(client) - before[1]) / real_s,
    }


@contextmanager
def slowed(slowness: float) -> Iterator[None]:
    """Orders sized for tasks that take so many times longer."""
    known = {name: getattr(batching, name) for name in ("BATCH_S", "LEAST_S")}
    vars(batching).update({name: value * slowness for name, value in known.items()})
    try:
        yield
    finally:
        vars(batching).update(known)


def _cpu_s(watched: psutil.Process) -> float:
    times = watched.cpu_times()
    return float(times.user + times.system)


def simulation(folder: Path, scale: Scale, found: dict[str, Any]) -> None:
    """Clusters of several sizes."""
    folder.mkdir(parents=True)
    costs = costs_of(folder, scale.slide_px)
    found["simulation"] = {"patches_per_s": RATE, "span": SPAN, "patches_a_slide": PATCHES, "threads": THREADS, **costs}
    for workers, slowness in scale.simulations:
        place = folder / str(workers)
        place.mkdir()
        figures = simulate(place, workers, slowness, round(workers * scale.slides_a_worker), costs)
        found["simulation"][f"{workers}_workers"] = figures
        found["ratios"] |= {f"{name}_{workers}_workers": figures[name] for name in ("busy", "gpu")}


FIRST_PATCH = """
import json, sys, time
import psutil
from tests.runs import SMALL, toy_spec
from wsi_gradcam import api
from wsi_gradcam.api import RunListener, explain

def rss():
    return psutil.Process().memory_info().rss

class First(RunListener):
    def task_done(self, task, result):
        if task.stage.name == "explain":
            found["first_patch_s"] = time.perf_counter() - started
            found["client_bytes"] = rss() - found["list_bytes"]
            print(json.dumps(found), flush=True)
            raise SystemExit

if __name__ == "__main__":
    found = {}
    find = api.find_slides
    def measured(paths):
        before, began = rss(), time.perf_counter()
        slides = find(paths)
        found.update(list_bytes=rss() - before, list_s=time.perf_counter() - began)
        return slides
    api.find_slides = measured
    started = time.perf_counter()
    explain(sys.argv[1], toy_spec("pooled_linear"), sys.argv[2], workers=1, listener=First(), **SMALL)
"""


def planning(folder: Path, scale: Scale, found: dict[str, Any]) -> None:
    """A real run of each size with a local worker, up to the first span."""
    from tests.synthetic import write_marker_slide

    folder.mkdir(parents=True)
    script = folder / "first_patch.py"
    script.write_text(FIRST_PATCH)
    slide = folder / "slide.tif"
    write_marker_slide(slide, 390, 500, mpp=MPP, markers=[], marker_px=16)
    found["planning"] = {}
    for count in scale.counts:
        archive = folder / str(count)
        archive.mkdir()
        for i in range(count):
            os.link(_linkable(slide, i), archive / f"{i:06d}.tif")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, str(script), str(archive), str(folder / f"out-{count}")],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.stdout, done.stderr
        found["planning"][f"{count}_slides"] = json.loads(done.stdout)
    least, most = (found["planning"][f"{count}_slides"] for count in (scale.counts[0], scale.counts[-1]))
    name = f"{scale.counts[-1]}_over_{scale.counts[0]}"
    found["ratios"][f"first_patch_{name}"] = most["first_patch_s"] / least["first_patch_s"]
    found["ratios"][f"client_memory_{name}"] = most["client_bytes"] / least["client_bytes"]


def _linkable(slide: Path, number: int) -> Path:
    """A copy of the slide that can be linked to: file systems allow some 65,000 links (ext4) to a file."""
    copy = slide.with_name(f"{slide.stem}-{number // 30_000}{slide.suffix}")
    if not copy.exists():
        copy.write_bytes(slide.read_bytes())
    return copy


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, help="turns of each side (default 3)")
    parser.add_argument("--quick", action="store_true", help="small: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    scale = QUICK if arguments.quick else FULL
    if arguments.rounds:
        scale = replace(scale, rounds=arguments.rounds)
    found: dict[str, Any] = {"ratios": {}, "patches_per_s": {}}
    measures = {"overhead": overhead, "speedup": speedup, "simulation": simulation, "planning": planning}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only.split(","):
            measures[name](Path(folder) / name, scale, found)
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
