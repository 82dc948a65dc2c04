"""Exports need no more memory for larger slides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.made_results import Flags, Made, Values, make
from tests.runs import ROOT
from wsi_gradcam.export import ALL, OF_HEATMAPS, export
from wsi_gradcam.geometry import Region

CHILD = """
import json, sys
from pathlib import Path
from wsi_gradcam.export import export
(done,) = export(sys.argv[1], sys.argv[2], sys.argv[3], threshold=0.6, window=(0.0, 2.0))
lines = Path("/proc/self/status").read_text().splitlines()  # getrusage counts what the parent had before exec
(peak,) = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
print(json.dumps([done.error, peak]))
"""


def hills(region: Region) -> tuple[Values, Flags]:
    """Hot spots of all sizes, some 20 heatmap pixels apart, on two thirds of the slide."""
    y, x = np.ogrid[region.y : region.bottom, region.x : region.right]
    first = np.sin(y / 7.3) * np.sin(x / 5.9) + np.sin(y / 91.7 + x / 57.1)
    flags = np.where((np.sin(y / 803.0) + np.sin(x / 611.0)) > -0.6, 3, 0).astype(np.uint8)
    values = np.stack([first, first / 2, first / 4 + 0.5]).astype(np.float32) * (flags > 0)
    return values.astype(np.float32), flags


def peak_mib(out: Path, to: str, dest: Path) -> float:
    """Peak resident memory of a process that exports `out`."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(out), to, str(dest)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3000,
        check=True,
    )
    error, peak = json.loads(done.stdout.splitlines()[-1])
    assert error == ""
    return float(peak)


@pytest.mark.parametrize("to", ["tiff", "ome-tiff"])
def test_four_times_the_pixels_need_no_more_memory(tmp_path: Path, to: str) -> None:
    """The smaller heatmap has 2 million pixels, the larger 8: their values alone would differ by 72 MB."""
    peaks = []
    for name, side in (("small", 23_000), ("large", 46_000)):
        out = make(tmp_path / name, {"a.svs": Made((side, side), hills)})
        peaks.append(peak_mib(out, to, tmp_path / f"{name}-dest"))
    assert peaks[1] - peaks[0] < 40


@pytest.mark.slow
def test_ten_gigapixels_take_less_than_a_gigabyte(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"a.svs": Made((100_000, 100_000), hills, patches=100_000)})
    peaks = {to: peak_mib(out, to, tmp_path / to) for to in OF_HEATMAPS}
    print(json.dumps(peaks))
    assert max(peaks.values()) < 1000


@pytest.mark.slow
def test_all_formats_take_no_more_space_than_the_docs_say(tmp_path: Path) -> None:
    """Ten times the heatmaps, and 10 MB a slide: what has a fixed size, such as a figure, counts on small slides."""
    out = make(tmp_path / "out", {"a.svs": Made((12_000, 12_000), hills, patches=2_800)})
    done = export(out, ALL, tmp_path / "dest")
    assert [each.error for each in done if each.error] == []
    (heatmap,) = out.rglob("heatmap.ome.zarr")
    taken, given = size(tmp_path / "dest"), size(heatmap)
    print(f"{taken / 1e6:.0f} MB of {given / 1e6:.0f} MB")
    assert taken < 10 * given + 10e6


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
