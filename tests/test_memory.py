"""Memory does not grow with the slide: the short form of benchmarks/memory.py, with a small model."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.memory import peak_rss_mib
from tests.synthetic import write_gigapixel_slide

SIDES = (31_116, 98_400)  # 1 and 10 gigapixels


def test_ten_times_the_slide_takes_no_more_memory(tmp_path: Path) -> None:
    """1 and 10 gigapixels of equal patch density; a heatmap canvas of the larger alone would be 150 MiB a channel.

    Peaks of equal runs differ by up to 85 MiB, upwards alone (threads and processes come and go), so the least of up to
    three runs counts on either side.
    """
    for side in SIDES:
        write_gigapixel_slide(tmp_path / f"{side}.tiff", side, side, mpp=0.25, tissue_fraction=0.05)
    runs: list[list[float]] = []
    while len(runs) < 3:
        runs.append([peak_of(tmp_path, side, len(runs)) for side in SIDES])
        least = [min(peaks) for peaks in zip(*runs, strict=True)]
        if least[1] < 1.1 * least[0]:
            return
    raise AssertionError(runs)


def peak_of(folder: Path, side: int, attempt: int) -> float:
    """MiB of a run on one slide."""
    options = {
        "--model": "ihc-dab",
        "--engine": "eager",
        "--precision": "float32",
        "--patch-mpp": "3.5",
        "--out": str(folder / f"out-{side}-{attempt}"),
    }
    flags = [word for option in options.items() for word in option]
    return peak_rss_mib([sys.executable, "-m", "wsi_gradcam.cli", "explain", str(folder / f"{side}.tiff"), *flags])
