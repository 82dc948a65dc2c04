"""Marks: what is confirmed is never lost, whoever writes at once and whoever is killed; exports, and who may write."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.viewer_runs import BASE, client, facts_of, make_run
from wsi_gradcam.audit.archive import annotated_slide
from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import ConfigError, MarkError, StoreError
from wsi_gradcam.export import export
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.results.marks import KINDS, Marks, make_mark
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.run_files import RESERVED, folder_name
from wsi_gradcam.results.validation import validate
from wsi_gradcam.viewer.app import make_app
from wsi_gradcam.viewer.archive import Archive
from wsi_gradcam.viewer.serve import Access

SLIDE = "a.tif"
BOX = [[100, 200], [100, 300], [180, 300], [180, 200]]
HERE = {"Origin": BASE, "Sec-Fetch-Site": "same-origin"}
# Writes marks until it has made so many or is killed, and says each number once its mark is confirmed.
WRITER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.results.marks import Marks, make_mark
marks, plan = Marks(LocalPath(Path(sys.argv[1]))), SimpleNamespace(patches=9)
for number in range(int(sys.argv[3])):
    given = {"kind": "note", "text": f"{sys.argv[2]} {number} " + "x" * 700, "outline": [[0, 0], [0, 9], [9, 9]]}
    marks.add(make_mark("a.tif", plan, given))
    print(number, flush=True)
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("marks"))


@pytest.fixture
def server(out: Path) -> Iterator[TestClient]:
    (out / "marks.jsonl").unlink(missing_ok=True)
    with client(out) as found:
        yield found


def writer(folder: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said_in(folder: Path) -> list[str]:
    return [" ".join(mark.text.split()[:2]) for mark in Marks(LocalPath(folder)).all()]


def test_two_processes_lose_none_of_500_marks(tmp_path: Path) -> None:
    writers = [writer(tmp_path, name, 250) for name in "ab"]
    for process in writers:
        process.communicate(timeout=120)
    assert [process.returncode for process in writers] == [0, 0]
    assert sorted(said_in(tmp_path)) == sorted(f"{name} {number}" for name in "ab" for number in range(250))


def test_what_was_confirmed_outlives_a_kill(tmp_path: Path) -> None:
    """One of two writers is killed at any moment; the other goes on."""
    victim, other = writer(tmp_path, "a", 100_000), writer(tmp_path, "b", 60)
    assert victim.stdout is not None
    confirmed = [int(victim.stdout.readline()) for _ in range(40)]
    victim.send_signal(signal.SIGKILL)
    rest, _ = victim.communicate(timeout=120)
    confirmed += [int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    other.communicate(timeout=120)
    assert (victim.returncode, other.returncode) == (-signal.SIGKILL, 0)
    said = set(said_in(tmp_path))
    assert {f"a {number}" for number in confirmed} <= said
    assert {f"b {number}" for number in range(60)} <= said


def test_a_line_that_was_cut_short_costs_no_other(tmp_path: Path) -> None:
    marks, plan = Marks(LocalPath(tmp_path)), open_plan()
    first, second = (make_mark(SLIDE, plan, {"kind": "artefact", "outline": BOX}) for _ in range(2))
    marks.add(first)
    with (tmp_path / "marks.jsonl").open("ab") as file:
        file.write(b'{"id": "half')
    marks.add(second)
    assert marks.all() == [first, second]
    marks.delete(first.id)
    assert marks.all() == [second]
    for line in (b"[]", b"{}", b"\xff", b'{"id": 7}', json.dumps({"id": "0" * 32, "kind": "x"}).encode()):
        with (tmp_path / "marks.jsonl").open("ab") as file:
            file.write(line + b"\n")
    assert marks.all() == [second]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks, plan = Marks(LocalPath(tmp_path)), open_plan()
    marks.add(make_mark(SLIDE, plan, {"kind": "expected", "outline": BOX}))
    before = (tmp_path / "marks.jsonl").read_bytes()
    real = os.write

    def short(file: int, data: Any) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return real(file, bytes(data)[:-50])

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(StoreError, match="disk is full"):
        marks.add(make_mark(SLIDE, plan, {"kind": "expected", "outline": BOX}))
    assert (tmp_path / "marks.jsonl").read_bytes() == before


def open_plan() -> Any:
    class Plan:
        patches = 9

    return Plan()


@pytest.mark.parametrize(
    "given",
    [
        None,
        {"kind": "other", "outline": BOX},
        {"kind": "note", "outline": BOX},
        {"kind": "artefact"},
        {"kind": "artefact", "outline": BOX[:2]},
        {"kind": "artefact", "outline": [[0, 0]] * 4},
        {"kind": "artefact", "outline": [[0, float("nan")], *BOX]},
        {"kind": "artefact", "outline": [[0, 1e300], *BOX]},
        {"kind": "artefact", "outline": BOX, "patch": 9},
        {"kind": "artefact", "outline": BOX, "patch": True},
        {"kind": "artefact", "outline": BOX, "text": "x" * 2001},
        {"kind": "artefact", "outline": BOX, "by": 7},
    ],
)
def test_what_is_no_mark_is_refused(given: Any) -> None:
    with pytest.raises(MarkError):
        make_mark(SLIDE, open_plan(), given)


def test_marks_of_the_page_are_kept_listed_and_taken_back(out: Path, server: TestClient) -> None:
    key = facts_of(server, SLIDE)["key"]
    empty = server.get(f"/api/slides/{key}/marks").json()
    assert empty == {"can_write": True, "kinds": list(KINDS), "marks": []}
    given = {"slide": key, "kind": "artefact", "outline": BOX, "patch": 3, "text": " a fold ", "by": "N. N."}
    made = server.post("/api/marks", json=given, headers=HERE)
    assert made.status_code == 200, made.text
    (mark,) = server.get(f"/api/slides/{key}/marks").json()["marks"]
    assert mark == made.json()
    assert (mark["kind"], mark["patch"], mark["text"], mark["by"]) == ("artefact", 3, "a fold", "N. N.")
    assert mark["outline"] == [value for point in BOX for value in point]
    assert server.get(f"/api/slides/{facts_of(server, 'inner/b.tif')['key']}/marks").json()["marks"] == []
    assert validate(out) == []
    assert "marks.jsonl" in RESERVED
    assert folder_name("marks.jsonl") == "marks.jsonl~"
    assert server.post("/api/marks", json={"delete": mark["id"]}, headers=HERE).status_code == 200
    assert server.get(f"/api/slides/{key}/marks").json()["marks"] == []


def test_only_the_own_page_writes(out: Path, server: TestClient) -> None:
    given = {"slide": facts_of(server, SLIDE)["key"], "kind": "artefact", "outline": BOX}

    def status(path: str = "/api/marks", content: str = "", kind: str = "application/json", **headers: str) -> int:
        sent = {"Content-Type": kind, **headers}
        return server.post(path, content=content or json.dumps(given), headers=sent).status_code

    assert status() == 403  # no browser sends a POST without its origin
    assert status(Origin="https://evil.example") == 403
    assert status(Origin="null") == 403
    assert status(Origin=BASE, **{"Sec-Fetch-Site": "same-site"}) == 403
    assert status(Origin=BASE, **{"Sec-Fetch-Site": "cross-site"}) == 403
    assert status(Origin=BASE, Host="evil.example") == 421
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert status(kind=kind, Origin=BASE) == 415
    assert status("/api/run", Origin=BASE) == 405
    assert status("/api/marks/", Origin=BASE) == 405
    assert server.put("/api/marks", json=given, headers=HERE).status_code == 405
    assert server.delete("/api/marks", headers=HERE).status_code == 405
    assert server.get("/api/marks").status_code == 405
    for content in ("[", "[]", '"x"', '{"slide": 7}', "x" * (1 << 17 | 1), "[" * 5000):
        assert status(content=content, Origin=BASE) in (400, 404)
    assert not (out / "marks.jsonl").exists()
    assert status(Origin=BASE) == 200


def test_elsewhere_writing_needs_the_token(out: Path) -> None:
    (out / "marks.jsonl").unlink(missing_ok=True)
    access = Access.for_host("192.0.2.7", "secret")
    with TestClient(make_app(Archive(out), access), base_url="http://192.0.2.7") as server:
        bearer, origin = {"Authorization": "Bearer secret"}, {"Origin": "http://192.0.2.7"}
        key = server.get("/api/slide", params={"id": SLIDE}, headers=bearer).json()["key"]
        given = {"slide": key, "kind": "artefact", "outline": BOX}
        assert server.post("/api/marks", json=given, headers=origin).status_code == 401
        wrong = {**origin, "Authorization": "Bearer other"}
        assert server.post("/api/marks", json=given, headers=wrong).status_code == 401
        assert not (out / "marks.jsonl").exists()
        assert server.post("/api/marks", json=given, headers={**origin, **bearer}).status_code == 200


def test_a_viewer_that_only_reads_keeps_none(out: Path) -> None:
    (out / "marks.jsonl").unlink(missing_ok=True)
    access = Access.for_host("127.0.0.1", "")
    with TestClient(make_app(Archive(out), access, read_only=True), base_url=BASE) as server:
        key = facts_of(server, SLIDE)["key"]
        assert server.get(f"/api/slides/{key}/marks").json()["can_write"] is False
        answer = server.post("/api/marks", json={"slide": key, "kind": "artefact", "outline": BOX}, headers=HERE)
        assert (answer.status_code, "--read-only" in answer.text) == (400, True)
    assert not (out / "marks.jsonl").exists()


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "marks.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError):
        Marks(LocalPath(tmp_path)).add(make_mark(SLIDE, open_plan(), {"kind": "artefact", "outline": BOX}))
    assert (tmp_path / "elsewhere").read_text() == ""


def test_exports_are_tables_and_regions_of_an_audit(out: Path, tmp_path: Path) -> None:
    (out / "marks.jsonl").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="no slide has marks"):
        export(out, "marks-csv", tmp_path / "none")
    slide = open_result(out)[SLIDE]
    for kind, text in (("artefact", "=1+1"), ("unexpected", "")):
        mark = make_mark(SLIDE, slide.plan, {"kind": kind, "outline": BOX, "text": text})
        Marks(LocalPath(out)).add(mark)
    assert [mark.kind for mark in slide.marks()] == ["artefact", "unexpected"]
    (table,) = export(out, "marks-csv", tmp_path / "marks")
    assert (table.slide, table.error) == (SLIDE, "")
    with table.paths[0].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["artefact", "unexpected"]
    assert rows[0]["text"] == "'=1+1"  # no formula
    assert [rows[0][name] for name in ("x", "y", "width", "height")] == ["200", "100", "100", "80"]
    (drawn,) = export(out, "marks-geojson", tmp_path / "regions")
    assert drawn.error == ""
    found = annotated_slide(tmp_path / "regions", SLIDE, (), slide.size_px)
    assert found is not None
    assert set(found.regions.drawn(slide.size_px).names) == {"artefact", "unexpected"}
    mask = found.regions.drawn(slide.size_px).mask({"artefact"}, slide.size_px)
    assert (int(mask.sum()), bool(mask[140, 250])) == (80 * 100, True)
    (none,) = export(out, "marks-csv", tmp_path / "other", ["inner/b.tif"])
    assert none.error == "inner/b.tif: has no marks"


def test_marks_that_are_exported_are_regions_of_an_audit(out: Path, tmp_path: Path) -> None:
    """Marked artefacts are asked for by their kind, and outlined in the report's example patches."""
    (out / "marks.jsonl").unlink(missing_ok=True)
    slide = open_result(out)[SLIDE]
    height, width = slide.plan.footprint
    for number in range(slide.plan.patches):
        y, x = slide.patch_yx(number)
        outline = [[y, x], [y, x + width], [y + height / 3, x + width], [y + height / 3, x]]
        given = {"kind": "artefact", "outline": outline, "patch": number}
        Marks(LocalPath(out)).add(make_mark(SLIDE, slide.plan, given))
    export(out, "marks-geojson", tmp_path / "marks")
    command = ["audit", str(out), "--regions", str(tmp_path / "marks"), "--only", "shortcuts", "--patches", "24"]
    assert main([*command, "--trust-code", "--seed", "1"]) == 0
    metrics = json.loads((out / "audit" / "metrics.json").read_text(encoding="utf-8"))
    assert "artefact (given)" in {row["suspect"] for row in metrics["verdicts"] if row["question"] == "shortcuts"}
    page = (out / "audit" / SLIDE / "report.html").read_text(encoding="utf-8")
    assert "Outlines: annotated classes, and regions that should not decide." in page
    assert page.count("region: artefact</li>") == 2  # of the slide, and of the examples
    assert f'alt="{SLIDE}: outlines of region: artefact"' in page
    shutil.rmtree(out / "audit")
