"""A small run to look at, what an audit may add to it, and the viewer's server on loopback, for tests."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

import wsi_gradcam
from tests.runs import SMALL, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam.audit.plan import AUDIT, AuditFolder
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.results.heatmap import EXPLAINED, TISSUE, Channel, HeatmapStore
from wsi_gradcam.results.run import open_result
from wsi_gradcam.viewer.annotations import AnnotationFiles
from wsi_gradcam.viewer.app import make_app
from wsi_gradcam.viewer.archive import Archive
from wsi_gradcam.viewer.serve import Access, listen, make_server

MPP = 0.25
MARKER_PX = 96
# y, x of the centres: in the middle, and at the last rows and columns, where rounding shows.
MARKERS = {"a.tif": ((808, 1200), (1448, 2056)), "inner/b.tif": ((480, 320), (952, 1088))}
SIZES = {"a.tif": (1501, 2107), "inner/b.tif": (1003, 1141)}
DOWNSAMPLES = {"a.tif": (3, 7), "inner/b.tif": (2, 4)}
BROKEN = "c.tif"
BASE = "http://127.0.0.1:8765"


def make_run(folder: Path, **settings: Any) -> Path:
    """OUT of a run over two slides and a file that is none; the first has a pyramid of factors 3 and 7."""
    (folder / "slides" / "inner").mkdir(parents=True)
    for name, (height, width) in SIZES.items():
        write_marker_slide(
            folder / "slides" / name,
            height,
            width,
            mpp=MPP,
            markers=MARKERS[name],
            marker_px=MARKER_PX,
            downsamples=DOWNSAMPLES[name],
        )
    (folder / "slides" / BROKEN).write_bytes(b"no slide")
    settings = {**SMALL, "method": ("gradcam", "hirescam"), **settings}
    outcome = wsi_gradcam.explain(folder / "slides", toy_spec("marker"), folder / "out", **settings)
    assert sorted(record.status for record in outcome.records) == ["failed", "ok", "ok"]
    return folder / "out"


def plant(out: Path, slide_id: str, channel: int = 0) -> None:
    """Write into a channel, on all levels, the share of each pixel that a marker of the slide covers."""
    store = HeatmapStore(out / slide_id / "heatmap.ome.zarr")
    stride = SMALL["heatmap_stride"]
    for level, (height, width) in enumerate(store.shapes):
        step = stride * 2**level
        values = np.zeros((height, width), np.float32)
        for y, x in MARKERS[slide_id]:
            rows, columns = (_share(c - MARKER_PX // 2, MARKER_PX, step, n) for c, n in ((y, height), (x, width)))
            values += np.outer(rows, columns).astype(np.float32)
        whole = Region(0, 0, height, width)
        store.write(level, channel, whole, values)
        store.write_flags(level, whole, np.full((height, width), TISSUE | EXPLAINED, np.uint8))


def square(y: float, x: float, side: float, name: str) -> dict[str, Any]:
    """A square annotation around a place (y, x), as a feature of GeoJSON."""
    top, left, bottom, right = y - side / 2, x - side / 2, y + side / 2, x + side / 2
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}


def plant_annotations(folder: Path, slide_id: str, *more: dict[str, Any]) -> Path:
    """A folder with GeoJSON of a slide: its markers, as class "marker", and other features."""
    path = folder / f"{slide_id}.geojson"
    path.parent.mkdir(parents=True, exist_ok=True)
    features = [square(y, x, MARKER_PX, "marker") for y, x in MARKERS[slide_id]]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [*features, *more]}), encoding="utf-8")
    return folder


def plant_audit(out: Path, slide_id: str, spread: float = 1.0, **about: Any) -> AuditFolder:
    """Write pages of an audit, and a spread that grows to the right up to `spread`, known in the left half alone."""
    folder, plan = AuditFolder(LocalPath(out) / AUDIT), open_result(out)[slide_id].plan
    folder.plan.write(b"{}")
    up = "../" * (slide_id.count("/") + 1)
    folder.report.write(f'<h1>all audited</h1><a href="./{slide_id}/report.html">slide</a>'.encode())
    folder.slide_report(slide_id).write(f'<h1>audited</h1><a href="{up}report.html">all</a>'.encode())
    known = {"audit": "digest", "method": "gradcam", "run": plan.run_digest, "slide": plan.slide_digest, **about}
    channels = [Channel(f"spread: {name}", 0, spread, 0, spread) for name in ("other", "marker")]
    shape = known.pop("shape", plan.heatmap_px)
    store = HeatmapStore.create(folder.spread(slide_id), slide_id, shape, (2.0, 2.0), channels, known)
    for level, (height, width) in enumerate(store.shapes):
        whole, half = Region(0, 0, height, width), np.arange(width) < width // 2
        grown = np.broadcast_to(np.linspace(0, spread, width, dtype=np.float32), (height, width))
        for number in range(2):
            store.write(level, number, whole, (grown / (number + 1)).astype(np.float32))
        store.write_flags(level, whole, np.broadcast_to(half * np.uint8(EXPLAINED), (height, width)).astype(np.uint8))
    folder.spread_means(slide_id).write(json.dumps({"audit": "digest", "maps": {"marker": spread}}).encode())
    return folder


def _share(start: int, length: int, step: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The share of each of `count` pixels of `step` px that lies in [start, start + length)."""
    edges = np.arange(count + 1) * step
    return np.clip((np.minimum(edges[1:], start + length) - np.maximum(edges[:-1], start)) / step, 0, 1)


@contextmanager
def client(
    out: Path | str,
    access: Access | None = None,
    annotations: Path | None = None,
    second: Path | None = None,
    **given: Any,
) -> Iterator[TestClient]:
    """A client of the server, without a network."""
    archive = Archive(out, **given)
    other = None if second is None else Archive(second)
    access = access or Access.for_host("127.0.0.1", "")
    app = make_app(archive, access, AnnotationFiles(archive, annotations), second=other)
    with TestClient(app, base_url=BASE) as found:
        yield found


@dataclass(frozen=True)
class Served:
    """A server that listens on loopback."""

    url: str
    port: int


@contextmanager
def served(
    out: Path, access: Access | None = None, annotations: Path | None = None, second: Path | None = None, **given: Any
) -> Iterator[Served]:
    """The server on loopback, in a thread."""
    archive = Archive(out, **given)
    other = None if second is None else Archive(second)
    access = access or Access.for_host("127.0.0.1", "")
    app = make_app(archive, access, AnnotationFiles(archive, annotations), second=other)
    with listen("127.0.0.1", 0) as bound:
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            port = bound.getsockname()[1]
            yield Served(f"http://127.0.0.1:{port}", port)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def fetched(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers (by small names) of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), {k.lower(): v for k, v in error.headers.items()}


def facts_of(server: TestClient, slide_id: str) -> dict[str, Any]:
    """What the page is told of a slide."""
    answer = server.get("/api/slide", params={"id": slide_id})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = json.loads(answer.text)
    return found


def tiles_of(facts: dict[str, Any]) -> str:
    """How addresses of a slide's pictures begin."""
    return f"/tiles/{facts['key']}/{facts['version']}"
