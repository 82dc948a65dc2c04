"""A whole slide from beginning to end, against its reading alone and its model alone: which waits for the other?

One process, sides alternating, the same patches (ResNet-18, 224 px, batches of 32) of a slide of tissue in JPEG. The
model is loaded and chosen before the clock runs, for every side. `wall_over_bound` is the run's time, with planning,
stitching, table and overview, over the longer of reading alone and model alone: 1 is perfect overlap on a machine
with cores to spare. Where the model computes on all cores, reading cannot be hidden behind it: `wall_over_cores` takes
for the bound what both compute, over the cores, where that is longer. `cpu_over_both` is all that the run computes over
what both compute, and says what planning, stitching, table and overview cost, also on a machine that others use.

`--mpp-ratio 2` explains the slide, of 0.25 um per pixel, at 0.5, as most slides are. With `--rate R` the model only
waits, for as long as a device takes that explains R patches a second. `--against CHECKOUT` does the same whole slides
by the package in another checkout, in a process of its own, by turns: `patches_per_s_over_other`, and
`cpu_s_of_other_over_own`, which depends less on what else the machine does.

    python benchmarks/slide.py [--side 16384] [--mpp-ratio 1] [--rate R] [--against CHECKOUT] [--rounds 3]
                               [--engine auto] [--precision auto] [--decode exact] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from skimage.data import immunohistochemistry

sys.path.insert(0, os.environ.get("WSI_GRADCAM_BENCHMARKED", str(Path(__file__).parents[1])))
from tests.synthetic import write_gigapixel_slide
from wsi_gradcam.cam.explainer import Explainer
from wsi_gradcam.inputs.find import SlideEntry, find_slides
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.results.patch_store import PatchStore
from wsi_gradcam.results.run_files import RunFolder
from wsi_gradcam.run.context import Context, perform
from wsi_gradcam.run.plan import RunPlan, plan_run
from wsi_gradcam.run.settings import Settings, make_settings
from wsi_gradcam.run.types import Task
from wsi_gradcam.run.workload import PLAN, ExplainWorkload
from wsi_gradcam.slides import patch_reader as reading
from wsi_gradcam.slides import read_region
from wsi_gradcam.slides.patch_reader import PatchReader, open_entry

try:
    from wsi_gradcam.executors import SerialExecutor
    from wsi_gradcam.slides import triangle_filter
except ImportError:  # an older checkout
    SerialExecutor = import_module("wsi_gradcam.executors.serial").SerialExecutor  # type: ignore[misc]
    triangle_filter = None  # type: ignore[assignment]

MPP = 0.25
PACKAGE = "WSI_GRADCAM_BENCHMARKED"  # environment: the checkout whose package is measured, this one by default


@dataclass
class TimeLine:
    """The times at which the model and the reading threads were busy, in seconds from the start."""

    began: float = field(default_factory=time.perf_counter)
    model: list[tuple[float, float]] = field(default_factory=list)
    read: list[tuple[float, float]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def told(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose times are noted."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                with self._lock:
                    getattr(self, what).append((start - self.began, time.perf_counter() - self.began))

        return timed

    def summary(self) -> dict[str, Any]:
        """Busy seconds, the seconds that the model waited between its first and last batch, and both lines."""
        model = sorted(self.model)
        waited = sum(max(0.0, later[0] - earlier[1]) for earlier, later in itertools.pairwise(model))
        return {
            "model_busy_s": sum(end - start for start, end in model),
            "model_waited_s": waited,
            "read_busy_s": sum(end - start for start, end in self.read),
            "model": [[round(t, 4) for t in span] for span in model],
            "read": [[round(t, 4) for t in span] for span in _joined(sorted(self.read))],
        }


def _joined(spans: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Spans that touch or overlap, as one."""
    at: tuple[float, float] | None = None
    for start, end in spans:
        if at is None or start > at[1] + 1e-3:
            if at is not None:
                yield at
            at = (start, end)
        else:
            at = (at[0], max(at[1], end))
    if at is not None:
        yield at


ENTRY = "begin" if hasattr(Explainer, "begin") else "explain"  # older checkouts begin nothing that they do not end


@contextmanager
def replaced(entry: Callable[..., Any]) -> Iterator[None]:
    """Have models begin to explain by another function."""
    before = getattr(Explainer, ENTRY)
    setattr(Explainer, ENTRY, entry)
    try:
        yield
    finally:
        setattr(Explainer, ENTRY, before)


@contextmanager
def watched() -> Iterator[TimeLine]:
    """Notes when models explain and patches are read."""
    line, read = TimeLine(), read_region
    explain = line.told("model", getattr(Explainer, ENTRY))

    def begin(*arguments: Any, **options: Any) -> Any:
        begun = explain(*arguments, **options)
        return line.told("model", begun) if callable(begun) else begun

    reading.read_region = line.told("read", read)  # type: ignore[attr-defined]
    try:
        with replaced(begin):
            yield line
    finally:
        reading.read_region = read  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Work:
    """A slide, and the model that is loaded and chosen for it."""

    executor: SerialExecutor
    run: RunPlan
    entry: SlideEntry

    def end_to_end(self, out: Path) -> float:
        """Seconds of the whole slide."""
        run = self._to(out)
        started = time.perf_counter()
        (record,) = self.executor.run(ExplainWorkload(run), [self.entry], lambda *_: None)
        seconds = time.perf_counter() - started
        assert record.status == "ok", record
        return seconds

    def places(self, out: Path) -> Any:
        """The positions of the run's patches, in working order."""
        context = Context(ExplainWorkload(self._to(out)))
        perform(context, Task(PLAN, self.entry))
        context.close()
        return PatchStore(RunFolder(storage_path(out)).slide(self.entry.id).cams).yx()

    def decode_only(self, yx: Any) -> float:
        """Seconds to read all patches."""
        slide = open_entry(self.entry, self.run.settings)
        settings: Any = self.run.settings
        size = self.run.facts.batch_size
        threads = settings.readers if hasattr(settings, "readers") else settings.reader_threads  # older checkouts
        started = time.perf_counter()
        with closing(PatchReader(slide, self.run.patch_px, self.run.mpp, size, threads)) as reader:
            count = sum(len(batch.rgb) for batch in reader.batches(yx))
        seconds = time.perf_counter() - started
        slide.close()
        assert count == len(yx)
        return seconds

    def model_only(self, count: int) -> float:
        """Seconds to explain as many patches that are in memory."""
        explainer, size = self.executor._explainer, self.run.facts.batch_size
        assert isinstance(explainer, Explainer)
        rgb = np.random.default_rng(0).integers(0, 256, (size, *self.run.patch_px, 3), np.uint8)
        started = time.perf_counter()
        for start in range(0, count, size):
            explainer.explain(rgb[: count - start], self.run.targets, self.run.settings.method)
        return time.perf_counter() - started

    def _to(self, out: Path) -> RunPlan:
        return plan_run(out, self.run.spec, self.run.facts, self.run.settings)


@contextmanager
def waiting_model(rate: float | None) -> Iterator[None]:
    """Have models wait for as long as a device takes that explains `rate` patches a second; None: they compute.

    Their first call is a real one, and what it returns is returned ever after. Patches are resampled as in a process
    that feeds a GPU.
    """
    explain: Any = getattr(Explainer, ENTRY)
    known: list[Any] = []
    lock = threading.Lock()
    free_at = 0.0

    def begin(self: Any, rgb: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal free_at
        with lock:
            if not known or len(known[0][0]) < len(rgb):
                found = explain(self, rgb, *arguments, **options)
                known[:] = [found() if callable(found) else found]
            free_at = done_at = max(free_at, time.perf_counter()) + len(rgb) / (rate or math.inf)

        def wait() -> Any:
            time.sleep(max(0.0, done_at - time.perf_counter()))
            return tuple(part[: len(rgb)] for part in known[0])

        return wait if ENTRY == "begin" else wait()

    if rate is None:
        yield
        return
    feeds = getattr(triangle_filter, "_feeds_gpu", None)  # older checkouts resample alike in all processes
    with replaced(begin), patch.object(triangle_filter, "_feeds_gpu", lambda: True) if feeds else nullcontext():
        yield


def prepare(folder: Path, side: int, ratio: float, settings: Settings) -> Work:
    """A slide of `side` px and its model, which sees pixels `ratio` times as large."""
    micrograph = immunohistochemistry()
    pair = np.concatenate([micrograph, micrograph[:, ::-1]], axis=1)
    four = np.concatenate([pair, pair[::-1]])
    # Each level is a quarter of the one before, as those of scanners: pixels of twice the size are in none.
    write_gigapixel_slide(folder / "slide.tif", side, side, mpp=MPP, tissue_fraction=1.0, tissue_rgb=four)
    entries = find_slides([folder / "slide.tif"])
    spec = ModelSpec(
        name="resnet18",
        source="torchvision:resnet18",
        weights="random",
        classes=("other", "tumour"),
        patch_px=(224, 224),
        mpp=MPP * ratio,
    )
    executor = SerialExecutor()
    facts = executor.examine(spec, settings, entries)
    return Work(executor, plan_run(folder / "out", spec, facts, settings), entries[0])


def begin(arguments: argparse.Namespace, folder: Path) -> tuple[Work, Any]:
    """The slide with its model, and the positions of the patches."""
    chosen = {"decode": arguments.decode} if "decode" in Settings.model_fields else {}  # older checkouts have no choice
    settings = make_settings(engine=arguments.engine, precision=arguments.precision, min_tissue=0.0, **chosen)
    work = prepare(folder, arguments.side, arguments.mpp_ratio, settings)
    return work, work.places(folder / "plan")


def serve(arguments: argparse.Namespace, folder: Path) -> None:
    """Explain the whole slide for each line that comes in, and answer with patches, seconds and seconds computed."""
    work, yx = begin(arguments, folder)
    print(sys.modules["wsi_gradcam"].__file__, flush=True)
    for number, _ in enumerate(sys.stdin):
        computed = time.process_time()
        seconds = work.end_to_end(folder / f"run{number}")
        print(json.dumps([len(yx), seconds, time.process_time() - computed]), flush=True)


class Other:
    """Another process that serves, with the package of a checkout."""

    def __init__(self, checkout: Path, argv: Sequence[str]) -> None:
        found = {**os.environ, PACKAGE: str(checkout.resolve()), "PYTHONPATH": str(checkout.resolve())}
        command = [sys.executable, str(Path(__file__).resolve()), *argv, "--serve"]
        self._process = subprocess.Popen(
            command, env=found, cwd=checkout, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        package = Path(self._process.stdout.readline().strip())
        assert package.is_relative_to(checkout.resolve()), f"{package} was measured, not {checkout}"

    def turn(self) -> tuple[int, float, float]:
        """Patches of a whole slide, its seconds, and the seconds that were computed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        patches, seconds, computed = json.loads(self._process.stdout.readline())
        return patches, seconds, computed

    def close(self) -> None:
        """End the process."""
        with self._process:  # closes its pipes, and waits
            pass


def compare(arguments: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """This checkout and another, whole slides by turns."""
    sides = {"own": Other(Path(__file__).parents[1], argv), "other": Other(arguments.against, argv)}
    turns: dict[str, list[tuple[int, float, float]]] = {name: [] for name in sides}
    for i in range(arguments.rounds + 1):
        for name, side in list(sides.items())[:: 1 if i % 2 else -1]:
            turn = side.turn()
            if i:  # the first round warms up
                turns[name].append(turn)
    for side in sides.values():
        side.close()
    patches = {name: {turn[0] for turn in found} for name, found in turns.items()}
    assert patches["own"] == patches["other"], patches
    rate = {name: statistics.median(turn[0] / turn[1] for turn in found) for name, found in turns.items()}
    computed = {name: statistics.median(turn[2] for turn in found) for name, found in turns.items()}
    return {
        "ratios": {
            "patches_per_s_over_other": rate["own"] / rate["other"],
            "cpu_s_of_other_over_own": computed["other"] / computed["own"],
        },
        "patches_per_s": rate,
        "cpu_s": computed,
        "patches": max(patches["own"]),
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    work, yx = begin(arguments, folder)
    times: dict[str, list[tuple[float, float]]] = {"wall": [], "decode": [], "model": []}
    for i in range(arguments.rounds + 1):
        sides: list[tuple[str, Callable[[], float]]] = [
            ("decode", lambda: work.decode_only(yx)),
            ("model", lambda: work.model_only(len(yx))),
            ("wall", lambda i=i: work.end_to_end(folder / f"run{i}")),  # type: ignore[misc]
        ]
        for name, side in sides if i % 2 == 0 else sides[::-1]:
            computed = time.process_time()
            seconds = side()
            if i:  # the first round warms up
                times[name].append((seconds, time.process_time() - computed))
    with watched() as line:
        work.end_to_end(folder / "watched")
    (wall, decode, model), (whole, reading, computing) = (
        [statistics.median(turn[clock] for turn in times[name]) for name in ("wall", "decode", "model")]
        for clock in (0, 1)
    )
    return {
        "ratios": {
            "wall_over_bound": wall / max(decode, model),
            "wall_over_sum": wall / (decode + model),
            "wall_over_cores": wall / max(decode, model, (reading + computing) / len(os.sched_getaffinity(0))),
            "cpu_over_both": whole / (reading + computing),
        },
        "seconds": {"wall": wall, "decode_only": decode, "model_only": model},
        "cpu_s": {"wall": whole, "decode_only": reading, "model_only": computing},
        "patches": len(yx),
        "patches_per_s": len(yx) / wall,
        "load": os.getloadavg()[0],
        "engine": work.run.facts.choice.engine,
        "precision": work.run.facts.choice.precision,
        "time_line": line.summary(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, help="of the slide in px (default 8192 of the model's: 1,300 patches)")
    parser.add_argument("--mpp-ratio", type=float, default=1.0, help="pixels of the model over the slide's (default 1)")
    parser.add_argument("--rate", type=float, help="patches/s of a device that is waited for; no model then computes")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, to compare with by turns")
    parser.add_argument("--decode", default="exact", help="as for explain, where a checkout knows it (default exact)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--engine", default="auto", help="as for explain")
    parser.add_argument("--precision", default="auto", help="as for explain")
    parser.add_argument("--quick", action="store_true", help="a small slide, one round: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    arguments.side = arguments.side or round(8192 * arguments.mpp_ratio)
    if arguments.quick:
        arguments.side, arguments.rounds, arguments.engine, arguments.precision = 1024, 1, "eager", "float32"
    with tempfile.TemporaryDirectory() as folder, waiting_model(arguments.rate):
        if arguments.serve:
            serve(arguments, Path(folder))
            return
        given = sys.argv[1:] if argv is None else argv
        found = compare(arguments, given) if arguments.against else run(arguments, Path(folder))
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
