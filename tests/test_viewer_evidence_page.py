"""The clusters of the evidence in the viewer: from a finding to patches, to the place, and back."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from pyarrow import parquet
from starlette.testclient import TestClient

from tests.evidence_runs import explained, model_file, of_nuclei_and_marker, write_archive
from tests.test_viewer_gallery_page import check
from tests.test_viewer_tools_page import looks, resized
from tests.viewer_browser import browser, open_page, settled
from tests.viewer_runs import BASE, Served, client, facts_of, served
from wsi_gradcam import evidence_run
from wsi_gradcam.evidence.findings import Evidence
from wsi_gradcam.evidence.labels import open_clusters
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.run import open_result
from wsi_gradcam.viewer.app import make_app
from wsi_gradcam.viewer.archive import Archive
from wsi_gradcam.viewer.serve import Access

SLIDES, MARKED = 10, 3


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that looks at nuclei and at markers, which the slides of site south alone have; its evidence."""
    folder = tmp_path_factory.mktemp("evidence")
    listed = write_archive(folder, SLIDES, MARKED, seed=3)
    found = explained(listed, model_file(folder, of_nuclei_and_marker(0)), folder / "out")
    evidence_run(found, trust_code=True, places=480, seed=1)
    return found


@pytest.fixture(scope="module")
def evidence(out: Path) -> Evidence:
    return Evidence.model_validate_json((out / "evidence" / "evidence.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[Served]:
    with served(out) as found:
        yield found


def collected(server: TestClient) -> dict[str, Any]:
    """What the page is told of the evidence, once all slides are read."""
    for _ in range(600):
        facts: dict[str, Any] = server.get("/api/evidence").json()
        if facts.get("collected", 0) == SLIDES or facts["problem"]:
            return facts
        time.sleep(0.1)
    raise AssertionError("slides are not collected")


def marker(evidence: Evidence) -> int:
    (shortcut,) = evidence.shortcuts
    return shortcut.number


def test_clusters_and_their_patches_are_those_of_the_tables(out: Path, evidence: Evidence) -> None:
    with client(out) as server:
        facts = collected(server)
        assert [one["words"] for one in facts["findings"]] == [one.words for one in evidence.findings]
        assert [one["number"] for one in facts["clusters"]] == [kind.number for kind in evidence.kinds]
        assert [one["share"]["value"] for one in facts["clusters"]] == [kind.share.value for kind in evidence.kinds]
        assert len({one["colour"] for one in facts["clusters"]}) == len(evidence.kinds)
        assert (facts["sites"], facts["target"]) == (["north", "south"], "tumour")
        number = marker(evidence)
        expected: dict[tuple[str, int], float] = {}
        for table in (out / "evidence").rglob("patches.parquet"):  # all cells of each patch, not those that were drawn
            for row in parquet.read_table(table).to_pylist():
                if row[f"evidence_{number}"]:
                    expected[table.parent.name, row["patch"]] = row[f"evidence_{number}"]
        found = server.get(f"/api/evidence/{number}").json()
        assert found["found"] == len(expected)
        assert {(one["slide"], one["number"]): one["value"] for one in found["patches"]} == pytest.approx(expected)
        sizes = [abs(one["value"]) for one in found["patches"]]
        assert sizes == sorted(sizes, reverse=True)
        assert {one["site"] for one in found["patches"]} == {"south"}
        assert server.get(f"/api/evidence/{number}", params={"site": "north"}).json()["patches"] == []
        assert server.get("/api/evidence/99").status_code == 404
        first = found["patches"][0]
        patch = server.get(f"/api/slides/{first['key']}/patches/{first['number']}").json()
        assert {one["cluster"]: one["contribution"] for one in patch["clusters"]}[number] == first["value"]
        assert sum(one["share"] for one in patch["clusters"]) == pytest.approx(1)
        assert server.get("/files/evidence/report.html").status_code == 200


def test_without_tables_of_patches_the_places_tell(out: Path, evidence: Evidence, tmp_path: Path) -> None:
    """As after `evidence --skip-labels`."""
    copy = shutil.copytree(
        out, tmp_path / "copy", ignore=lambda _, names: [n for n in names if n == "clusters.ome.zarr"]
    )
    number = marker(evidence)
    expected: dict[tuple[str, int], float] = {}
    for table in (copy / "evidence").rglob("places.parquet"):
        table.with_name("patches.parquet").unlink()
        for row in parquet.read_table(table).to_pylist():
            if row["cluster"] == number:
                key = (table.parent.name, row["patch"])
                expected[key] = expected.get(key, 0.0) + row["contribution"]
    with client(copy) as server:
        collected(server)
        found = server.get(f"/api/evidence/{number}").json()["patches"]
        assert {(one["slide"], one["number"]): one["value"] for one in found} == pytest.approx(expected)


HERE = {"Origin": BASE, "Sec-Fetch-Site": "same-origin"}


def test_clusters_are_named_and_no_name_is_lost(out: Path, evidence: Evidence, tmp_path: Path) -> None:
    copy, number = shutil.copytree(out, tmp_path / "copy"), marker(evidence)
    place = copy / "evidence" / "names.yaml"
    others = [kind.number for kind in evidence.kinds if kind.number != number]
    before = f"# of the tumour board\n{others[0]}: stroma  # to be looked at\n"
    place.write_text(before, encoding="utf-8")

    def rename(server: TestClient, called: str, was: str, cluster: int = number, **more: Any) -> Any:
        given = {"cluster": cluster, "name": called, "was": was, "state": state} | more
        answer = server.post("/api/names", json=given, headers=HERE)
        return answer.json().get("error") or answer.json()["name"]

    with client(copy) as first, client(copy) as second:
        facts = collected(first)
        state = facts["state"]
        assert facts["can_name"]
        assert rename(first, " Green squares ", "") == "Green squares"
        assert rename(second, "ink", "") == "Green squares"  # as the first has called it by now
        assert rename(second, "nuclei", "", cluster=others[1]) == "nuclei"
        for wrong in ("two\nlines", "x" * 101):
            assert "one line" in rename(first, wrong, "Green squares")
        assert "found anew" in rename(first, "x", "Green squares", state="of before")
        assert "found anew" in rename(first, "x", "", cluster=99)
        assert "given to a cluster" in rename(first, "x", "", name=None)
        text = place.read_text(encoding="utf-8")
        assert text == f'{before}{number}: "Green squares"\n{others[1]}: "nuclei"\n'
        facts = second.get("/api/evidence").json()
        called = {one["number"]: one["label"] for one in facts["clusters"]}
        assert called[number] == "Green squares"
        words = next(one["words"] for one in facts["findings"] if one["cluster"] == number)
        assert words.startswith(f"“Green squares” (cluster {number}) looks like a shortcut: ")
        assert "Green squares" in facts_of(second, "000.tif")["clustered"]["classes"]
        assert rename(second, "", "Green squares") == ""
        assert place.read_text(encoding="utf-8") == text.replace(f'{number}: "Green squares"\n', "")
        place.write_text("nonsense\n", encoding="utf-8")
        assert "NUMBER: NAME" in rename(first, "x", "")
        assert first.get("/api/evidence").json()["clusters"]  # it hides nothing


def test_names_are_written_by_whom_marks_are(out: Path, evidence: Evidence, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    archive = Archive(copy)
    with TestClient(make_app(archive, Access.for_host("127.0.0.1", ""), read_only=True), base_url=BASE) as server:
        facts = server.get("/api/evidence").json()
        given = {"cluster": 1, "name": "nuclei", "was": "", "state": facts["state"]}
        assert not facts["can_name"]
        answer = server.post("/api/names", json=given, headers=HERE)
        assert (answer.status_code, "--read-only" in answer.json()["error"]) == (400, True)
    access = Access.for_host("0.0.0.0", "secret")
    with TestClient(make_app(archive, access), base_url=BASE) as server:
        bearer = {"Authorization": "Bearer secret"}
        assert server.post("/api/names", json=given, headers=HERE).status_code == 401
        assert server.post("/api/names", json=given, headers=bearer).status_code == 403  # no page of ours
        away = {**bearer, "Origin": "https://elsewhere.example"}
        assert server.post("/api/names", json=given, headers=away).status_code == 403
        assert server.put("/api/names", json=given, headers={**HERE, **bearer}).status_code == 405
        assert not (copy / "evidence" / "names.yaml").exists()
        assert server.post("/api/names", json=given, headers={**HERE, **bearer}).status_code == 200
    assert (copy / "evidence" / "names.yaml").read_text(encoding="utf-8") == '1: "nuclei"\n'


def test_the_highest_patches_are_filtered_by_cluster(out: Path, evidence: Evidence) -> None:
    with client(out) as server:
        collected(server)
        number = marker(evidence)
        found = server.get("/api/top", params={"class": "tumour", "cluster": number}).json()["patches"]
        assert found
        assert {one["site"] for one in found} == {"south"}
        for one in found:
            patch = server.get(f"/api/slides/{one['key']}/patches/{one['number']}").json()
            assert {one["cluster"]: one["share"] for one in patch["clusters"]}[number] >= 0.1
            assert patch["probability_tumour"] == one["value"]
        assert server.get("/api/top", params={"class": "none", "cluster": number}).json()["patches"] == []


def test_the_layer_shows_the_label_image(out: Path, evidence: Evidence) -> None:
    with client(out) as server:
        facts = facts_of(server, "000.tif")
        about = facts["clustered"]
        assert about["colours"][:-1] == [f"#{kind.colour}" for kind in evidence.kinds]
        assert about["classes"] == [*(f"cluster {kind.number}" for kind in evidence.kinds), "of no cluster"]
        level = facts["heat"]["finer"]  # the finest that is stored
        begin = f"/tiles/{facts['key']}/{facts['version']}/cells"
        tile = server.get(f"{begin}/{about['address']}/{level}/0_0.png")
        assert "immutable" in tile.headers["Cache-Control"]
        with Image.open(io.BytesIO(tile.content)) as image:
            pixels = np.asarray(image.convert("RGB")).astype(np.float64)
        low, high = about["scale"]
        numbers = np.floor(low + (256 * pixels[..., 0] + pixels[..., 1]) / 65535 * (high - low)) + 1
        slide = open_result(out)["000.tif"]
        labels = open_clusters(slide)
        assert labels is not None
        stored = labels.read(0, Region(0, 0, *labels.shapes[0]))
        expected = np.where(stored == 255, len(evidence.kinds) + 1, stored)
        assert marker(evidence) in stored
        np.testing.assert_array_equal(numbers[stored > 0], expected[stored > 0])
        np.testing.assert_array_equal(pixels[..., 2] > 0, stored > 0)
        y, x = ((np.argwhere(stored == marker(evidence))[0] + 0.5) * slide.stride_px).tolist()
        assert server.get(f"/api/slides/{facts['key']}/values", params={"y": y, "x": x}).json()["cluster"] == marker(
            evidence
        )
        assert server.get(f"{begin}/clusters-000000000000/0/{level}/0_0.png").status_code == 404


def test_without_evidence_nothing_is_said_of_it(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy", ignore=lambda _, names: [n for n in names if n == "evidence"])
    with client(copy) as server:
        assert server.get("/api/evidence").json() == {"there": False, "problem": None, "clusters": []}
        key = facts_of(server, "000.tif")["key"]
        assert server.get(f"/api/slides/{key}/patches/0").json()["clusters"] is None


@pytest.mark.parametrize("damage", ["no json", "other values", "another run", "a link", "places"])
def test_damaged_or_old_evidence_is_told_and_hides_nothing_else(out: Path, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    place = copy / "evidence" / "evidence.json"
    values = json.loads(place.read_text(encoding="utf-8"))
    if damage == "no json":
        place.write_text("[" * 100_000, encoding="utf-8")
    elif damage == "other values":
        values["kinds"][0]["share"] = "much"
        place.write_text(json.dumps(values), encoding="utf-8")
    elif damage == "another run":
        place.write_text(json.dumps({**values, "run": "0" * 64}), encoding="utf-8")
    elif damage == "a link":
        place.rename(tmp_path / "elsewhere.json")
        place.symlink_to(tmp_path / "elsewhere.json")
    else:
        (copy / "evidence" / "000.tif" / "patches.parquet").write_bytes(b"PAR1" * 50)
    with client(copy) as server:
        slide = facts_of(server, "000.tif")
        if damage == "places":
            answer = server.get(f"/api/slides/{slide['key']}/patches/0")
            assert answer.status_code == 200
            assert answer.json()["clusters"] is None
        else:
            assert server.get("/api/evidence").json()["problem"]
        assert slide["channels"]


@pytest.mark.parametrize("size", ["small", *(pytest.param(size, marks=pytest.mark.slow) for size in ("desk", "large"))])
def test_from_a_finding_to_the_place_and_back(open_page: Callable[..., Page], evidence: Evidence, size: str) -> None:
    page = resized(open_page(), size)
    expect(page.locator("#gallery-evidence")).to_be_visible()
    page.keyboard.press("E")
    expect(page.locator("#gallery-title")).to_have_text("Evidence")
    expect(page.locator(".cluster-card")).to_have_count(len(evidence.kinds))
    expect(page.locator("#findings li").first).to_contain_text("looks like a shortcut")
    expect(page.locator(".cluster-card .examples img").first).to_be_visible(timeout=60_000)
    check(page, f"{size}-evidence")
    page.locator("#findings a").first.focus()
    page.keyboard.press("Enter")
    number = marker(evidence)
    patches = page.locator("#cluster-patches a")
    expect(patches.first).to_contain_text("south")
    expect(page.locator(".cluster-title")).to_contain_text(f"cluster {number}")
    page.locator("#cluster-site").select_option("north")
    expect(patches).to_have_count(0)
    page.locator("#cluster-site").select_option("south")
    expect(patches.first).to_be_visible()
    page.keyboard.press("D")
    check(page, f"{size}-cluster-dark")
    title = patches.first.get_attribute("title") or ""
    patches.first.focus()
    page.keyboard.press("Enter")
    slide, _, patch = title.rpartition(", patch ")
    expect(page.locator("#title")).to_have_text(slide)
    expect(page.locator("#patch h2")).to_have_text(f"Patch {patch}")
    settled(page)
    legend = page.locator(".legend")
    expect(legend).to_contain_text("clusters of the evidence")
    expect(page.locator("#layer-0 [data-name=on]")).not_to_be_checked()  # the map
    shown = looks(page)
    box = page.locator(".frame").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#values")).to_contain_text("clusters of the evidence cluster ")
    page.locator("#layer-1 [data-name=class-2]").uncheck()  # that which covers most
    without = looks(page)
    expect(legend).not_to_contain_text("cluster 3")
    page.keyboard.press("k")
    assert len({shown, without, looks(page)}) == 3
    page.keyboard.press("k")
    page.wait_for_timeout(300)
    again = open_page(page.url[page.url.index("#") :])
    expect(again.locator(".legend")).not_to_contain_text("cluster 3")
    again.close()
    with page.expect_download() as download:
        page.keyboard.press("s")
    with Image.open(download.value.path()) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}
    assert tuple(bytes.fromhex(evidence.kinds[0].colour)) in colours  # in the list of clusters
    link = page.locator("#patch-evidence a", has_text=f"cluster {number}")
    expect(link).to_be_visible()
    check(page, f"{size}-evidence-patch-dark")
    link.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".cluster-title")).to_contain_text(f"cluster {number}")
    page.go_back()
    expect(page.locator("#patch h2")).to_have_text(f"Patch {patch}")
    page.keyboard.press("T")
    page.locator("#top-cluster").select_option(str(number))
    expect(page.locator("#top-patches a").first).to_contain_text("south")
    expect(page.locator("#top-patches a", has_text="north")).to_have_count(0)
    page.keyboard.press("T")
    expect(page.locator("#gallery-title")).to_have_text("Slides")


def test_a_cluster_is_named_in_two_windows(open_page: Callable[..., Page], out: Path, evidence: Evidence) -> None:
    place, number = out / "evidence" / "names.yaml", marker(evidence)
    try:
        page, other = (resized(open_page(f"#evidence={number}"), "small") for _ in range(2))
        page.keyboard.press("F2")
        expect(page.locator("#cluster-name")).to_be_focused()
        page.keyboard.type("Green squares")
        page.keyboard.press("Enter")
        expect(page.locator(".cluster-title")).to_contain_text("Green squares")
        check(page, "small-named")
        other.locator("#cluster-name").fill("ink")
        other.locator("#name-cluster").click()
        expect(other.locator("#name-problem")).to_contain_text("It is called “Green squares” now")
        check(other, "small-name-problem")
        other.locator("#name-cluster").click()  # knowing that
        expect(other.locator(".cluster-title")).to_contain_text("ink")
        assert place.read_text(encoding="utf-8") == f'{number}: "ink"\n'
        page.keyboard.press("E")
        expect(page.locator(f"[data-cluster='{number}']")).to_contain_text("ink")
        expect(page.locator("#findings")).to_contain_text("“ink”")
    finally:
        place.unlink(missing_ok=True)
