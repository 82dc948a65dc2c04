"""Peak memory of the whole process tree while explaining slides of 1 and 10 gigapixels of equal patch density.

Memory must depend only on batch, workers and block size. Prints one JSON object with `--json`: `ratios` (10 gigapixels
over 1, for the serial executor and for one worker) and the peaks in MiB. With `--mpp-ratio 2` patches are resampled, as
they usually are. `--modes serial --tissue 0.005` takes minutes.

    python benchmarks/memory.py [--modes serial one_worker] [--mpp-ratio 1] [--tissue 0.05] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.synthetic import write_gigapixel_slide

MODEL = """
name: resnet18
source: torchvision:resnet18
weights: random
classes: [other, tumour]
patch_px: 224
mpp: {mpp}
"""
MPP = 0.25
MODES = {"serial": [], "one_worker": ["--workers", "1"]}
SIDES = {"1_gigapixel": 31_116, "10_gigapixel": 98_400}
QUICK_SIDES = {"0.1_gigapixel": 9_840, "1_gigapixel": 31_116}


def peak_rss_mib(command: list[str]) -> float:
    """Largest sum of the resident sizes of a command and all its children, sampled 20 times a second."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = 0
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, sum(_rss(p) for p in [root, *_children(root)]))
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
    return peak / 2**20


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def measure(
    folder: Path, sides: dict[str, int], tissue: float, ratio: float, modes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Peaks in MiB by mode and slide."""
    model = folder / "resnet18.yaml"
    model.write_text(MODEL.format(mpp=MPP * ratio))
    peaks: dict[str, dict[str, float]] = {mode: {} for mode in modes}
    for name, side in sides.items():
        slide = folder / f"{name}.tiff"
        write_gigapixel_slide(slide, side, side, mpp=MPP, tissue_fraction=tissue)
        for mode in modes:
            out = folder / f"{name}-{mode}"
            command = [sys.executable, "-m", "wsi_gradcam.cli", "explain", str(slide), "--model", str(model)]
            started = time.monotonic()
            peaks[mode][name] = peak_rss_mib([*command, "--out", str(out), "--batch-size", "32", *MODES[mode]])
            seconds = time.monotonic() - started
            print(f"{mode:>10} {name:>14} {peaks[mode][name]:8.0f} MiB {seconds:6.0f} s", file=sys.stderr)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="slides a tenth as large")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="executors (default both)")
    parser.add_argument("--mpp-ratio", type=float, default=1.0, help="pixels of the model over the slide's (default 1)")
    parser.add_argument("--tissue", type=float, default=0.05, help="share of tissue (default 0.05)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    sides = QUICK_SIDES if arguments.quick else SIDES
    small, large = sides
    with tempfile.TemporaryDirectory() as folder:
        peaks = measure(Path(folder), sides, arguments.tissue, arguments.mpp_ratio, arguments.modes)
    ratios = {f"{large}_over_{small}_{mode}": values[large] / values[small] for mode, values in peaks.items()}
    print(json.dumps({"ratios": ratios, "peak_mib": peaks}, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
