"""What the server answers: facts, values, patches, pictures, files; and what it says when there is nothing."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image
from starlette.testclient import TestClient

from tests.runs import ROOT, Heatmap
from tests.servers import BUCKET, CREDENTIALS, put_folder
from tests.viewer_runs import BROKEN, client, facts_of, fetched, make_run, plant_audit, served, tiles_of
from wsi_gradcam.errors import ConfigError, ResultError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.run import open_result
from wsi_gradcam.viewer import archive as archives
from wsi_gradcam.viewer.app import view
from wsi_gradcam.viewer.responses import page_routes
from wsi_gradcam.viewer.serve import listen

CLASSES = ["other", "marker"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[TestClient]:
    with client(out) as found:
        yield found


def listed(server: TestClient, **query: str) -> list[str]:
    found = server.get("/api/slides", params=query).json()
    return [slide["id"] for slide in found["slides"]]


def test_facts_of_the_run(server: TestClient) -> None:
    facts = server.get("/api/run").json()
    assert facts["classes"] == CLASSES
    assert facts["methods"] == ["gradcam", "hirescam"]
    assert (facts["patch_px"], facts["patch_mpp"], facts["audit"]) == ([32, 32], 0.5, None)
    assert facts["report"] == "/files/run.html"
    assert b"<h1" in server.get(facts["report"]).content
    assert server.get("/files/a.tif/overview.png").status_code == 200  # where the report's links lead


def test_the_list_is_searched_sorted_and_paged(server: TestClient) -> None:
    assert listed(server) == ["a.tif", BROKEN, "inner/b.tif"]
    assert listed(server, search="TIF inner") == ["inner/b.tif"]
    assert listed(server, status="failed") == [BROKEN]
    assert listed(server, sort="patches", order="down") == ["a.tif", "inner/b.tif", BROKEN]
    assert listed(server, offset="1", limit="1") == [BROKEN]
    assert server.get("/api/slides", params={"limit": "x"}).status_code == 404


def test_scores_are_found_and_sort(server: TestClient, out: Path) -> None:
    end = time.monotonic() + 30
    while (found := server.get("/api/slides").json())["scored"] < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    scores = {slide["id"]: slide["scores"] for slide in found["slides"]}
    assert scores[BROKEN] is None
    table = pq.read_table(out / "a.tif" / "patches.parquet").to_pandas()
    marker = table["probability_marker"]
    assert scores["a.tif"]["marker"]["top"] == pytest.approx(marker.nlargest(10).mean())
    assert scores["a.tif"]["marker"]["share"] == pytest.approx((marker > table["probability_other"]).mean())
    names = ["a.tif", "inner/b.tif"]
    names.sort(key=lambda name: -scores[name]["marker"]["share"])
    assert listed(server, sort="share:marker", order="down") == [*names, BROKEN]


def test_facts_of_a_slide(server: TestClient, out: Path) -> None:
    facts, result = facts_of(server, "a.tif"), open_result(out)["a.tif"]
    assert facts["size_px"] == [1501, 2107]
    assert facts["key"] == hashlib.sha256(b"a.tif").hexdigest()[:16]
    assert [channel["label"] for channel in facts["channels"]] == Heatmap(out / "a.tif").labels
    windows = open_result(out).windows()
    assert [tuple(channel["run_window"]) for channel in facts["channels"]] == [
        windows[c.label] for c in result.channels
    ]
    assert facts["heat"]["size_px"] == [side * 8 for side in result.levels[0]]
    assert facts["table"] is True
    assert server.get(f"/api/slides/{facts['key']}").json() == facts


def test_facts_of_a_slide_that_failed(server: TestClient) -> None:
    facts = facts_of(server, BROKEN)
    assert facts["status"] == "failed"
    assert facts["heat"] is None
    assert "c.tif" in facts["heat_problem"]
    assert "c.tif" in facts["slide"]["problem"]


def test_values_are_the_stored_ones(server: TestClient, out: Path) -> None:
    key, heatmap = facts_of(server, "a.tif")["key"], Heatmap(out / "a.tif")
    found = server.get(f"/api/slides/{key}/values", params={"y": "811.5", "x": "1203"}).json()
    stored = [heatmap.level(0, label)[811 // 8, 1203 // 8] for label in heatmap.labels]
    np.testing.assert_allclose(found["values"], stored, atol=1e-6)
    assert found["explained"] is True
    outside = server.get(f"/api/slides/{key}/values", params={"y": "-5", "x": "1203"}).json()
    assert outside["values"] is None
    for y in ("nan", "inf", "x", "", "1e999"):
        assert server.get(f"/api/slides/{key}/values", params={"y": y, "x": "1"}).status_code == 404


def test_a_patch_is_its_row_its_maps_and_its_neighbours(server: TestClient, out: Path) -> None:
    key, result = facts_of(server, "a.tif")["key"], open_result(out)["a.tif"]
    found = server.get(f"/api/slides/{key}/patches/at", params={"y": "800", "x": "1200"}).json()
    row = result.patches.iloc[found["number"]]
    assert row["y"] <= 800 < row["y"] + 64
    assert row["x"] <= 1200 < row["x"] + 64
    for name in ("logit_marker", "probability_other", "cam_max_marker", "tissue"):
        assert found[name] == pytest.approx(float(row[name]))
    maps = {shown["label"]: np.array(shown["values"]) for shown in found["maps"]}
    np.testing.assert_allclose(maps["hirescam: marker"], result.cam(found["number"], "hirescam: marker"), atol=1e-5)
    beside = {other["direction"]: other["number"] for other in found["neighbours"]}
    assert sorted(beside) == ["E", "N", "NE", "NW", "S", "SE", "SW", "W"]
    north, east = result.patches.iloc[beside["N"]], result.patches.iloc[beside["E"]]
    assert (north["y"], north["x"]) == (row["y"] - 64, row["x"])
    assert (east["y"], east["x"]) == (row["y"], row["x"] + 64)
    assert server.get(f"/api/slides/{key}/patches/{found['number']}").json() == found
    assert server.get(f"/api/slides/{key}/patches/at", params={"y": "-9", "x": "0"}).json() == {"number": None}
    assert server.get(f"/api/slides/{key}/patches/999999").status_code == 404


def test_the_highest_patches(server: TestClient, out: Path) -> None:
    key, table = facts_of(server, "a.tif")["key"], open_result(out)["a.tif"].patches
    found = server.get(f"/api/slides/{key}/patches/top", params={"by": "cam_max_marker", "count": "5"}).json()
    values = [patch["value"] for patch in found["patches"]]
    np.testing.assert_allclose(values, table["cam_max_marker"].nlargest(5))
    lowest = server.get(f"/api/slides/{key}/patches/top", params={"by": "blur", "count": "3", "order": "up"}).json()
    assert [p["value"] for p in lowest["patches"]] == pytest.approx(sorted(table["blur"].dropna())[:3])
    assert server.get(f"/api/slides/{key}/patches/top", params={"by": "nonsense"}).status_code == 404


def test_pictures_may_be_kept_for_ever_under_their_version(server: TestClient) -> None:
    facts = facts_of(server, "a.tif")
    for name, kind in (
        ("slide/0/2_3.jpg", "jpeg"),
        ("heat/1/3/0_0.png", "png"),
        ("cells/1/0/0_0.png", "png"),
        ("patch/7.jpg", "jpeg"),
        ("thumb.jpg", "jpeg"),
    ):
        answer = server.get(f"{tiles_of(facts)}/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["content-type"] == f"image/{kind}"
        assert "immutable" in answer.headers["cache-control"]
        assert Image.open(io.BytesIO(answer.content)).format == kind.upper()
        other = server.get(f"/tiles/{facts['key']}/another/{name}")
        assert other.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "name",
    [
        "slide/9/0_0.jpg",
        "slide/0/99999_0.jpg",
        "slide/0/0_999999999999999999999.jpg",
        f"slide/0/{'9' * 3000}_0.jpg",
        "slide/-1/0_0.jpg",
        "slide/0/0_-1.jpg",
        "slide/0/٣_0.jpg",
        "slide/0/1e3_0.jpg",
        "heat/99/0/0_0.png",
        "heat/0/99/0_0.png",
        "cells/0/0/9999_9999.png",
        "patch/999999.jpg",
        "patch/x.jpg",
        "heat/0/0/0_0.jpg",
    ],
)
def test_absurd_tiles_are_refused(server: TestClient, name: str) -> None:
    answer = server.get(f"{tiles_of(facts_of(server, 'a.tif'))}/{name}")
    assert answer.status_code == 404
    assert len(answer.content) < 300


def test_zarr_is_read_by_ranges(server: TestClient, out: Path) -> None:
    address = "/zarr/inner/b.tif/heatmap.ome.zarr"
    data = (out / "inner/b.tif/heatmap.ome.zarr/0/c/1/0/0").read_bytes()
    whole = server.get(f"{address}/0/c/1/0/0")
    assert whole.content == data
    assert whole.headers["accept-ranges"] == "bytes"
    part = server.get(f"{address}/0/c/1/0/0", headers={"Range": "bytes=-100"})
    assert (part.status_code, part.content) == (206, data[-100:])
    assert part.headers["content-range"] == f"bytes {len(data) - 100}-{len(data) - 1}/{len(data)}"
    head = server.head(f"{address}/0/c/1/0/0")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(data)), b"")
    assert server.get(f"{address}/0/c/1/0/0", headers={"Range": "bytes=0-1,5-6"}).status_code == 416
    assert server.get(f"{address}/0/c/9/9/9").status_code == 404
    assert server.get(f"{address}/0/c").status_code == 404


def test_zarr_opens_over_http(out: Path) -> None:
    with served(out) as server:
        group = zarr.open_group(
            zarr.storage.ObjectStore(_http_store(f"{server.url}/zarr/a.tif/heatmap.ome.zarr"), read_only=True), mode="r"
        )
        array = group["0"]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(array[1], Heatmap(out / "a.tif").level(0, "gradcam: marker"))


def _http_store(url: str):  # type: ignore[no-untyped-def]
    from obstore.store import HTTPStore

    return HTTPStore.from_url(url, client_options={"allow_http": True})


def test_overview_and_audit_are_handed_out_and_run_nothing(server: TestClient, out: Path) -> None:
    picture = server.get("/files/inner/b.tif/overview.png")
    assert picture.content == (out / "inner/b.tif/overview.png").read_bytes()
    again = server.get("/files/inner/b.tif/overview.png", headers={"If-None-Match": picture.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    address = "/files/audit/inner/b.tif/report.html"
    assert server.get(address).status_code == 404
    folder = plant_audit(out, "inner/b.tif")
    folder.metrics.write(b'{"verdicts": []}')
    folder.slide_report("nothing").write(b"of no slide")
    try:
        assert facts_of(server, "inner/b.tif")["audit"] == address
        assert facts_of(server, "a.tif")["audit"] is None
        assert server.get("/api/run").json()["audit"] == "/files/audit/report.html"
        report = server.get("/files/audit/report.html")
        assert report.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in report.headers["content-security-policy"]
        assert "script-src" not in report.headers["content-security-policy"]
        assert server.get(address).text.startswith("<h1>audited")
        assert server.get("/files/audit/metrics.json").json() == {"verdicts": []}
        for other in (
            "run.yaml",
            "audit/plan.json",
            "audit/inner/b.tif/spread.json",
            "audit/nothing/report.html",
            "inner/b.tif/report.html",
            "audit",
            "report.html",
            "overview.png",
        ):
            assert server.get(f"/files/{other}").status_code == 404, other
    finally:
        shutil.rmtree(out / "audit")


def test_a_slide_that_has_moved_is_found_in_another_folder(out: Path, tmp_path: Path) -> None:
    slides = out.parent / "slides"
    slides.rename(slides.with_name("away"))
    try:
        with client(out) as server:
            facts = facts_of(server, "a.tif")
            assert "does not exist" in facts["slide"]["problem"]
            assert facts["heat"] is not None
            assert server.get(f"{tiles_of(facts)}/slide/0/0_0.jpg").status_code == 404
            assert server.get(f"{tiles_of(facts)}/heat/0/0/0_0.png").status_code == 200
        with client(out, slides_folder=slides.with_name("away")) as server:
            facts = facts_of(server, "a.tif")
            assert facts["slide"]["problem"] is None
            assert server.get(f"{tiles_of(facts)}/slide/0/0_0.jpg").status_code == 200
    finally:
        slides.with_name("away").rename(slides)


def test_another_file_at_the_slide_s_place_is_not_shown(out: Path) -> None:
    slide = out.parent / "slides" / "a.tif"
    slide.rename(slide.with_suffix(".kept"))
    shutil.copy(out.parent / "slides" / "inner" / "b.tif", slide)
    try:
        with client(out) as server:
            assert "not the file that was explained" in facts_of(server, "a.tif")["slide"]["problem"]
    finally:
        slide.with_suffix(".kept").rename(slide)


def test_a_run_that_goes_on_is_seen(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "REFRESH_S", 0.0)
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    rows = (copy / "slides.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "slides.csv").write_text("".join(rows[:2]), encoding="utf-8")
    with client(copy) as server:
        assert listed(server) == ["a.tif"]
        (copy / "slides.csv").write_text("".join(rows), encoding="utf-8")
        assert listed(server) == ["a.tif", BROKEN, "inner/b.tif"]
        assert server.get("/api/slides/0123456789abcdef").status_code == 404


def test_the_page_and_its_modules(server: TestClient) -> None:
    page = server.get("/")
    assert "<!doctype html>" in page.text
    for name in ("main.js", "style.css", "vendor/openseadragon.min.js"):
        file = server.get(f"/page/{name}")
        assert file.status_code == 200
        assert server.get(f"/page/{name}", headers={"If-None-Match": file.headers["etag"]}).status_code == 304
    assert server.get("/page/nothing.js").status_code == 404
    assert server.get("/page/../app.py").status_code == 404
    text = "".join((ROOT / "wsi_gradcam/viewer/page" / n).read_text("utf-8") for n in ("index.html", "style.css"))
    assert "//" not in text.replace("http://www.w3.org", "")  # nothing from elsewhere


def test_a_page_without_openseadragon_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"npm|hatch_build\.py"):
        page_routes(tmp_path)


def test_what_cannot_be_shown_is_said(tmp_path: Path, out: Path) -> None:
    with pytest.raises(ResultError, match="does not exist"):
        view(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="expected a folder"):
        view(str(out), slides=tmp_path / "nothing")
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConfigError, match="choose another --port"):
            view(str(out), port=port)
    with pytest.raises(ConfigError, match="check them"):
        listen("no such host.invalid", 0)


def test_the_command_says_where_the_page_is(out: Path) -> None:
    command = [sys.executable, "-m", "wsi_gradcam.cli", "view", str(out), "--port", "0", "--token"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        address = line.split()[0]
        plain, _, token = address.partition("?token=")
        assert fetched(f"{plain}api/run")[0] == 401
        status, body, headers = fetched(f"{plain}api/run", Authorization=f"Bearer {token}")
        assert (status, json.loads(body)["classes"], "server" in headers) == (200, CLASSES, False)
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def test_chunks_that_were_never_written_are_zero(server: TestClient, out: Path) -> None:
    """An all-zero shard is not stored."""
    facts = facts_of(server, "a.tif")
    result = open_result(out)["a.tif"]
    empty = [c.number for c in result.channels if not result.read(c, 0, Region(0, 0, 8, 8)).any()]
    assert server.get(f"{tiles_of(facts)}/heat/{(empty or [0])[0]}/3/0_0.png").status_code == 200


def test_out_in_an_object_store_shows_the_same(out: Path, s3_upstream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3_upstream}.items():
        monkeypatch.setenv(name, value)
    put_folder(s3_upstream, out, "viewer/out")
    with client(out) as here, client(f"s3://{BUCKET}/viewer/out") as there:
        facts = facts_of(here, "a.tif")
        assert facts_of(there, "a.tif") == facts
        key, tiles = facts["key"], tiles_of(facts)
        for address in (
            f"{tiles}/heat/1/3/0_0.png",
            f"{tiles}/slide/0/1_1.jpg",
            f"/api/slides/{key}/values?y=808&x=1200",
            f"/api/slides/{key}/patches/at?y=808&x=1200",
            "/files/a.tif/overview.png",
            "/zarr/a.tif/heatmap.ome.zarr/zarr.json",
            f"/api/slides/{key}/patches/top?by=blur&count=3",
        ):
            answers = [server.get(address) for server in (here, there)]
            assert [answer.status_code for answer in answers] == [200, 200], address
            assert answers[0].content == answers[1].content, address
        address = "/zarr/a.tif/heatmap.ome.zarr/0/c/1/0/0"
        parts = [server.get(address, headers={"Range": "bytes=5-40"}) for server in (here, there)]
        assert parts[0].content == parts[1].content
        assert there.get("/zarr/a.tif/heatmap.ome.zarr/0/c/9/9/9").status_code == 404
        assert there.get("/files/audit/report.html").status_code == 404
