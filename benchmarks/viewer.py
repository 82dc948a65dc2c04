"""The speed of the viewer's server, and its memory over time.

    python benchmarks/viewer.py [--json] [--quick]

A slide of 6144 px (JPEG, pyramid of 2 and 8) is explained with a tiny network; `wsi-gradcam view` serves it in a
process of its own. Eight clients then ask for each tile once (cold: nothing of it is kept): of the overlay, and of the
slide. After that, 20,000 requests of random tiles, patches and values while the server's memory is watched. With
Chromium on the machine, the page's first paint is timed too.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import wsi_gradcam  # noqa: E402
from tests.runs import SMALL, toy_spec  # noqa: E402
from tests.synthetic import write_marker_slide  # noqa: E402

CLIENTS = 8
OVERLAY_MS, SLIDE_MS, PAINT_S = 30.0, 60.0, 1.0  # what issue and README promise
LOCAL = threading.local()


def make_run(folder: Path, side_px: int) -> Path:
    """OUT of a run over one slide."""
    write_marker_slide(
        folder / "slide.tif",
        side_px,
        side_px,
        mpp=0.25,
        markers=[(900, 900)],
        marker_px=200,
        downsamples=(2, 8),
        compression="jpeg",
    )
    settings = {**SMALL, "heatmap_stride": 4, "batch_size": 64, "span_patches": 256}
    wsi_gradcam.explain(folder / "slide.tif", toy_spec("marker"), folder / "out", **settings)
    return folder / "out"


@contextmanager
def serving(out: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The server's address and process."""
    command = [sys.executable, "-m", "wsi_gradcam.cli", "view", str(out), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[0].rstrip("/"), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def ask(url: str, path: str) -> tuple[float, bytes]:
    """Milliseconds and body of a response, over this thread's own connection."""
    connection = getattr(LOCAL, "connection", None)
    if connection is None:
        connection = LOCAL.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    started = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, (path, answer.status, body[:200])
    return 1000 * (time.perf_counter() - started), body


def times_ms(url: str, paths: Sequence[str]) -> list[float]:
    """Milliseconds of each response, with eight clients."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        return [ms for ms, _ in pool.map(lambda path: ask(url, path), paths)]


def tiles(facts: dict[str, Any], kind: str) -> list[str]:
    """Addresses of all tiles of the slide, or of the heatmap's channels, in random order."""
    about = facts["slide"] if kind == "slide" else facts["heat"]
    height, width = facts["size_px"] if kind == "slide" else about["size_px"]
    start = f"/tiles/{facts['key']}/{facts['version']}"
    found = []
    for level in range(about["levels"]):
        rows, columns = (math.ceil(math.ceil(size / 2**level) / about["tile_px"]) for size in (height, width))
        for row, column in itertools.product(range(rows), range(columns)):
            if kind == "slide":
                found.append(f"{start}/slide/{level}/{row}_{column}.jpg")
            else:
                found += [f"{start}/heat/{c['address']}/{level}/{row}_{column}.png" for c in facts["channels"]]
    random.Random(0).shuffle(found)
    return found


def memory(url: str, process: psutil.Process, facts: dict[str, Any], count: int) -> list[float]:
    """MiB that are resident at ten points of `count` random requests."""
    chance = random.Random(1)
    choices = tiles(facts, "slide") + tiles(facts, "heat")[:2000]
    slide = f"/api/slides/{facts['key']}"
    height, width = facts["size_px"]
    found = []
    for _ in range(10):
        paths = chance.choices(choices, k=count // 10)
        for i in range(0, len(paths), 20):
            y, x = chance.uniform(0, height), chance.uniform(0, width)
            paths[i] = f"{slide}/values?y={y}&x={x}"
            paths[i + 1] = f"{slide}/patches/at?y={y}&x={x}"
        times_ms(url, paths)
        found.append(process.memory_info().rss / 2**20)
    return found


def first_paint_s(url: str) -> float | None:
    """Seconds to the page's first contentful paint, the middle of five; None without a browser."""
    path = shutil.which("chromium")
    if path is None:
        return None
    from playwright.sync_api import sync_playwright

    found: list[float] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(5):
            page = browser.new_page()
            page.goto(url)
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            found.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000)
            page.close()
        browser.close()
    return statistics.median(found)


def measure(out: Path, quick: bool) -> dict[str, Any]:
    """All figures of a run."""
    with serving(out) as (url, process):
        facts: dict[str, Any] = json.loads(ask(url, "/api/slide?id=slide.tif")[1])
        most = 100 if quick else 1500
        cold = {kind: times_ms(url, tiles(facts, kind)[:most]) for kind in ("heat", "slide")}
        p95 = {kind: statistics.quantiles(values, n=20)[-1] for kind, values in cold.items()}
        resident = memory(url, process, facts, 400 if quick else 20_000)
        paint = first_paint_s(url)
    ratios = {
        "overlay_p95_over_30_ms": p95["heat"] / OVERLAY_MS,
        "slide_p95_over_60_ms": p95["slide"] / SLIDE_MS,
        "resident_end_over_half": resident[-1] / resident[4],
    }
    if paint is not None:
        ratios["first_paint_over_1_s"] = paint / PAINT_S
    return {
        "tiles": {kind: len(values) for kind, values in cold.items()},
        "median_ms": {kind: statistics.median(values) for kind, values in cold.items()},
        "p95_ms": p95,
        "resident_mib": resident,
        "first_paint_s": paint,
        "ratios": ratios,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small slide and few requests: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(make_run(Path(folder), 1024 if arguments.quick else 6144), arguments.quick)
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
