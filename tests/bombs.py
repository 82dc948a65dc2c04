"""Files of strangers that claim or hold far more than they weigh, made from parameters, and what opening them takes.

    python -m tests.bombs [--seed 0] [--only PART_OF_A_NAME]

Makes each bomb in turn, opens it in a process of its own, and prints seconds, peak MiB above the idle process, and
what became of it. Sizes are drawn by the seed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tests.runs import ROOT

MOST_S, MOST_MIB = 5.0, 700.0  # what a bomb may cost
LIMIT_S, LIMIT_BYTES = 100, 8 << 30  # where its process is ended
GIB = 1 << 30
KINDS = ("zarr", "tiff", "annotations", "documents", "features")  # modules

Random = np.random.Generator
RANDOM = np.random.default_rng(0)
Make = Callable[[Path, Random], Path]
BOMBS: dict[str, Make] = {}  # by names that begin with their kind


def bomb(name: str) -> Callable[[Make], Make]:
    """Return a decorator that enters a maker of bombs under a name."""

    def enter(make: Make) -> Make:
        BOMBS[name] = make
        return make

    return enter


def kind_of(name: str) -> str:
    """Return what a bomb is opened as."""
    return name.partition(" ")[0].rstrip(":")


def side(rng: Random, low: float, high: float) -> int:
    """Return a number between two powers of ten."""
    return int(10 ** rng.uniform(low, high))


def all_bombs() -> dict[str, Make]:
    """Return the makers of all kinds."""
    for kind in KINDS:
        importlib.import_module(f"tests.bombs_{kind}")
    return BOMBS


@dataclass(frozen=True)
class Cost:
    """What a bomb cost: seconds of all threads, MiB above the idle process, and an outcome in a line."""

    seconds: float
    mib: float
    outcome: str

    @property
    def bearable(self) -> bool:
        """True where it was opened or refused in time, in bounds, and without a traceback."""
        return self.seconds <= MOST_S and self.mib <= MOST_MIB and not self.outcome.startswith("!")


def cost_of(path: Path, name: str, limit_s: float = LIMIT_S) -> Cost:
    """Return what opening a file as what `name` says costs in a process of its own."""
    command = [sys.executable, "-m", "tests.bombs", "--open", str(path), kind_of(name)]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit_s + 20)
    except subprocess.TimeoutExpired:
        return Cost(limit_s, 0, f"! no end in {limit_s:.0f} s")
    if ended.returncode or not ended.stdout.strip():
        return Cost(0, 0, f"! ended with {ended.returncode}: {ended.stderr.strip()[-200:]}")
    return Cost(**json.loads(ended.stdout.splitlines()[-1]))


def costs_of(kinds: Sequence[str], seed: int, every: int = 1, limit_s: float = 600) -> dict[str, Cost]:
    """Return what the bombs of some kinds cost, or each so-manieth of them, by name, in one process."""
    command = [sys.executable, "-m", "tests.bombs", "--only", ",".join(kinds), "--here", "--seed", str(seed)]
    command += ["--every", str(every)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit_s)
    costs = {}
    for line in ended.stdout.splitlines():
        name, values = json.loads(line)
        costs[name] = Cost(**values)
    if ended.returncode:
        costs["process"] = Cost(0, 0, f"! ended with {ended.returncode}: {ended.stderr.strip()[-300:]}")
    return costs


def open_here(path: Path, kind: str) -> Cost:
    """Return what opening a file costs in this process."""
    look = LOOKS[kind]
    look(None)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = peak_mib(), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    from wsi_gradcam.errors import WsiGradcamError, one_line

    try:
        outcome = look(path)
    except WsiGradcamError as error:
        outcome = f"refused: {one_line(error)}"
    except BaseException as error:
        outcome = f"! {type(error).__name__}: {one_line(error)}"[:300]
    return Cost(round(time.process_time() - started, 2), round(peak_mib() - before, 1), outcome)


def peak_mib() -> float:
    """Return the most memory that this process has had, since it was last asked to forget."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _look_at_slide(path: Path | None) -> str:
    from tests.synthetic import write_marker_slide
    from wsi_gradcam.slides import open_slide, read_region, thumbnail

    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            write_marker_slide(Path(folder) / "a.tif", 600, 600, mpp=0.5, markers=[], marker_px=9, tile_px=256)
            _look_at_slide(Path(folder) / "a.tif")
        return ""
    slide = open_slide(path, 0.5)
    thumb = thumbnail(slide, 8.0, 2048)
    info = slide.info
    for y, x in ((0, 0), (info.height // 2, info.width // 2), (info.height - 256, 0)):
        read_region(slide, y, x, 512, 512, 0.5)
    slide.close()
    return f"read: {info.height} x {info.width} px, {thumb.unreadable.mean():.0%} of them not readable"


def _look_at_annotations(path: Path | None) -> str:
    from wsi_gradcam.tissue.annotations.areas import rasterise
    from wsi_gradcam.tissue.annotations.regions import read_annotations

    if path is None:
        return ""
    found = read_annotations(path)
    mask = rasterise(found.areas, (1e5, 1e5), (2048, 2048), str(path))
    return f"read: {len(found.areas):,} areas, {mask.mean():.0%} of the slide"


def _look_at_list(path: Path | None) -> str:
    from wsi_gradcam.inputs.find import find_slides

    return "" if path is None else f"read: {len(find_slides([path])):,} slides"


def _look_at_config(path: Path | None) -> str:
    from wsi_gradcam.run.settings import make_settings, read_config

    return "" if path is None else f"read: {make_settings(**read_config(path)).overlap}"


def _look_at_model(path: Path | None) -> str:
    from tests import fuzz_documents
    from wsi_gradcam.models.load import load_model

    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            fuzz_documents.make_model(fuzz_documents.TIMM, fuzz_documents.trained, change=False)(Path(folder), RANDOM)
            load_model(f"hf:{folder}")
        return ""
    return f"read: {len(load_model(f'hf:{path}').classes):,} classes"


def _look_at_results(path: Path | None) -> str:
    from tests import fuzz_documents

    if path is None:
        fuzz_documents.read_results(fuzz_documents.sound_results())
        return ""
    fuzz_documents.read_results(path)
    return "read"


def _look_at_features(path: Path | None) -> str:
    from wsi_gradcam.mil.feature_files import open_features
    from wsi_gradcam.mil.features import SlideFrame

    if path is None:
        import h5py  # noqa: F401 - what is imported is no cost of a bomb
        import torch  # noqa: F401

        return ""
    found = open_features(path, SlideFrame("a.svs", (1_100_000, 1_100_000), (0.25, 0.25)))
    try:
        some = found.features[0:64]
        return f"read: {found.features.shape}, {some.dtype}"
    finally:
        found.features.close()


def _look_at_weights(path: Path | None) -> str:
    from wsi_gradcam.models.sources import states_in

    return "" if path is None else f"read: {sum(len(state) for _, state in states_in(path)):,} tensors"


def _look_at_aggregator(path: Path | None) -> str:
    from wsi_gradcam.mil.aggregators import load_aggregator
    from wsi_gradcam.mil.spec import read_slide_model

    return "" if path is None else f"read: {load_aggregator(read_slide_model(str(path))).classes}"


def _look_at_mask(path: Path | None) -> str:
    from wsi_gradcam.tissue.annotations import read_regions

    if path is None:
        return ""
    found = read_regions(path, "a", own="a.svs")
    assert found is not None
    return f"read: {found.mask((100_000, 100_000), (2048, 2048)).mean():.0%} of the slide"


LOOKS: dict[str, Callable[[Path | None], str]] = {
    "features": _look_at_features,
    "weights": _look_at_weights,
    "aggregator": _look_at_aggregator,
    "mask": _look_at_mask,
    "list": _look_at_list,
    "config": _look_at_config,
    "model": _look_at_model,
    "results": _look_at_results,
    **dict.fromkeys(("zarr", "tiff", "picture", "mrxs", "dicom"), _look_at_slide),
    "annotations": _look_at_annotations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", type=int, default=0, help="this number of bombs")
    parser.add_argument("--limit", type=float, default=LIMIT_S)
    parser.add_argument("--every", type=int, default=1, help="so-manieth bomb of those that are made")
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help="in this process, as lines of JSON")
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(asdict(open_here(Path(arguments.open[0]), arguments.open[1]))))
        return
    wrong = 0
    left, only = iter(range(sys.maxsize)), arguments.only.split(",")
    for number, (name, make) in enumerate(all_bombs().items()):
        wanted = any(kind_of(name) == kind or f" {kind}" in f" {name} " * (not arguments.here) for kind in only)
        if not wanted or number < arguments.skip or next(left) % arguments.every:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = make(Path(folder), np.random.default_rng([arguments.seed, number]))
            if arguments.here:
                print(json.dumps([name, asdict(open_here(path, kind_of(name)))]), flush=True)
                continue
            cost = cost_of(path, name, arguments.limit)
            wrong += not cost.bearable
            outcome = cost.outcome.replace(folder, "")
            print(f"{name:45} {cost.seconds:7.2f} s {cost.mib:8.1f} MiB  {outcome[:150]}", flush=True)
    if arguments.here:
        return
    print(f"{wrong} cost more than {MOST_S:g} s or {MOST_MIB:g} MiB, or ended with a traceback")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    from tests import bombs

    bombs.main()
