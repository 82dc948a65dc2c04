"""The speed of the viewer's server, and its memory over time.

    python benchmarks/viewer.py [--json] [--quick]

A slide of 6144 px (JPEG, pyramid of 2 and 8) is explained with a tiny network; `wsi-gradcam view` serves it in a
separate process. Eight clients then request each tile of the overlay and of the slide once (cold: nothing is cached).
After that come 20,000 requests for random tiles, patches and values while the server's memory is watched. Then a run of
1,000 slides is served, one of them with annotations of 50,000 vertices: this gives the server's CPU time for the page's
first requests and, if Chromium is installed, the first paint of the gallery and of the annotated slide.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import os
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
from wsi_gradcam.results.slide_tables import (  # noqa: E402
    encode_rows,
    encode_slide_records,
    read_slide_records,
    read_slides,
)

CLIENTS = 8
OVERLAY_MS, SLIDE_MS, PAINT_S = 30.0, 60.0, 0.3  # what is promised
MANY, VERTICES = 1000, 50_000
BACKGROUND_S = 300.0
LOCAL = threading.local()


def make_run(folder: Path, side_px: int) -> Path:
    """The OUT of a run over one slide."""
    folder.mkdir(exist_ok=True)
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


def make_archive(folder: Path, slides: int, vertices: int) -> Path:
    """The OUT of a run over many slides, with the results of one, and beside it annotations with this many vertices."""
    out = make_run(folder, 1024)
    rows, record = read_slides(out / "slides.csv"), read_slide_records(out / "slides.jsonl")
    names = [f"slide-{number:04d}.tif" for number in range(slides - 1)]
    for name in names:
        shutil.copytree(out / "slide.tif", out / name, copy_function=os.link)
    row = {key: value for key, value in rows["slide.tif"].items() if key != "row_digest"}
    rows |= {name: {**row, "id": name} for name in names}
    (out / "slides.csv").write_bytes(encode_rows(rows))
    about = record["slide.tif"]
    lines = [about, *({**about, "id": name} for name in names)]
    (out / "slides.jsonl").write_bytes(encode_slide_records({line["id"]: line for line in lines}))
    rings = [ring(64 + 4 * (number % 96), 64 + 4 * (number // 96 % 96), vertices // 500) for number in range(500)]
    shapes = [
        {
            "type": "Feature",
            "properties": {"name": "abc"[number % 3]},
            "geometry": {"type": "Polygon", "coordinates": [one]},
        }
        for number, one in enumerate(rings)
    ]
    (folder / "drawn").mkdir()
    drawn = json.dumps({"type": "FeatureCollection", "features": shapes})
    (folder / "drawn" / "slide.tif.geojson").write_text(drawn, encoding="utf-8")
    return out


def ring(y: float, x: float, points: int) -> list[list[float]]:
    """A closed circle of so many points."""
    angles = [2 * math.pi * i / points for i in range(points)] + [0.0]
    return [[x + 40 * math.cos(angle), y + 40 * math.sin(angle)] for angle in angles]


def cpu_ms(url: str, process: psutil.Process, path: str, times: int = 5) -> list[float]:
    """Milliseconds of CPU time that the server takes for each of several identical requests."""
    found = []
    for _ in range(times):
        before = sum(process.cpu_times()[:2])
        ask(url, path)
        found.append(1000 * (sum(process.cpu_times()[:2]) - before))
    return found


def measure_many(folder: Path, quick: bool) -> dict[str, Any]:
    """CPU time and first paint of a run of many slides and an annotation of many vertices."""
    out = make_archive(folder, 30 if quick else MANY, 2000 if quick else VERTICES)
    with serving(out, "--annotations", str(folder / "drawn")) as (url, process):
        listed = "/api/slides?limit=24&sort=name"
        wanted, until = 5 if quick else MANY, time.monotonic() + BACKGROUND_S
        while json.loads(ask(url, listed)[1])["scored"] < wanted:  # background work ends
            assert time.monotonic() < until, "slides are not scored"
            time.sleep(0.2)
        time.sleep(1)
        key = json.loads(ask(url, "/api/slide?id=slide.tif")[1])["key"]
        asked = {"slides": listed, "slide": f"/api/slides/{key}", "annotations": f"/api/slides/{key}/annotations"}
        cpu = {name: cpu_ms(url, process, path) for name, path in asked.items()}
        paints = {
            name: first_paint_s(f"{url}/{view}") for name, view in (("gallery", ""), ("slide", "#slide=slide.tif"))
        }
    return {
        "cpu_ms_first": {name: times[0] for name, times in cpu.items()},
        "cpu_ms_again": {name: statistics.median(times[1:]) for name, times in cpu.items()},
        "first_paint_s": paints,
    }


@contextmanager
def serving(out: Path, *more: str) -> Iterator[tuple[str, psutil.Process]]:
    """The server's address and process."""
    command = [sys.executable, "-m", "wsi_gradcam.cli", "view", str(out), "--port", "0", *more]
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
    connections = LOCAL.__dict__.setdefault("connections", {})
    if url not in connections:
        connections[url] = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection = connections[url]
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


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """All figures."""
    out = make_run(folder / "one", 1024 if quick else 6144)
    many = measure_many(folder / "many", quick)
    with serving(out) as (url, process):
        facts: dict[str, Any] = json.loads(ask(url, "/api/slide?id=slide.tif")[1])
        most = 100 if quick else 1500
        cold = {kind: times_ms(url, tiles(facts, kind)[:most]) for kind in ("heat", "slide")}
        p95 = {kind: statistics.quantiles(values, n=20)[-1] for kind, values in cold.items()}
        resident = memory(url, process, facts, 400 if quick else 20_000)
    ratios = {
        "overlay_p95_over_30_ms": p95["heat"] / OVERLAY_MS,
        "slide_p95_over_60_ms": p95["slide"] / SLIDE_MS,
        "resident_end_over_half": resident[-1] / resident[4],
    }
    for name, paint in many["first_paint_s"].items():
        if paint is not None:
            ratios[f"first_paint_of_{name}_over_0.3_s"] = paint / PAINT_S
    return {
        "tiles": {kind: len(values) for kind, values in cold.items()},
        "median_ms": {kind: statistics.median(values) for kind, values in cold.items()},
        "p95_ms": p95,
        "resident_mib": resident,
        "many_slides": many,
        "ratios": ratios,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small slide and few requests: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.quick)
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
