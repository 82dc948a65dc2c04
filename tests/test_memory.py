"""Memory does not grow with the slide: the short form of benchmarks/memory.py, with a small model."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.memory import peak_rss_mib
from tests.synthetic import write_gigapixel_slide


def test_ten_times_the_slide_takes_no_more_memory(tmp_path: Path) -> None:
    """1 and 10 gigapixels of equal patch density; a heatmap canvas of the larger alone would be 150 MiB a channel."""
    peaks = []
    for side in (31_116, 98_400):
        slide = tmp_path / f"{side}.tiff"
        write_gigapixel_slide(slide, side, side, mpp=0.25, tissue_fraction=0.05)
        arguments = ["--model", "ihc-dab", "--patch-mpp", "3.5", "--out", str(tmp_path / f"out-{side}")]
        peaks.append(peak_rss_mib([sys.executable, "-m", "wsi_gradcam.cli", "explain", str(slide), *arguments]))
    assert peaks[1] < 1.1 * peaks[0], peaks
