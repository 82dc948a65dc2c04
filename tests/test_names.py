"""Names of slides never meet names of ours, and what is deleted is ours alone."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.audits import QUICK, metrics_in
from tests.cli_runs import Run as Run
from tests.cli_runs import run as run
from tests.runs import SMALL, contents, flags, objects, toy_file, toy_spec
from tests.synthetic import write_marker_slide
from tests.viewer_runs import client
from wsi_gradcam import audit_run, open_result
from wsi_gradcam.api import explain
from wsi_gradcam.audit.plan import AuditFolder
from wsi_gradcam.errors import ResultError
from wsi_gradcam.export import _exported, export
from wsi_gradcam.export.job import Job, Journal, Options
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.run import find_result
from wsi_gradcam.results.run_files import MARK, RESERVED, RunFolder, folder_name, slide_id_of
from wsi_gradcam.results.validation import validate

OURS = ("audit", "Audit~", "exports", "run.yaml")
ASK: dict[str, Any] = {**QUICK, "patches": 8 * len(OURS), "only": ["saturation"]}


def write_slides(folder: Path, names: Iterator[str] | tuple[str, ...]) -> Path:
    """An archive with a slide in each of these folders."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        write_marker_slide(folder / name / "a.tif", 140, 140, mpp=0.25, markers=[(60, 60)], marker_px=16, seed=number)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides in folders that are called as what we write is."""
    return write_slides(tmp_path_factory.mktemp("archive"), OURS)


@pytest.fixture(scope="module")
def used(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, explained, audited and exported."""
    out = tmp_path_factory.mktemp("used") / "out"
    explain(archive, toy_spec("pooled_linear"), out, **SMALL)
    audit_run(out, **ASK)
    export(out, "geojson", out / "exports")
    export(out, "ome-zarr-0.4", out / "exports")
    return out


@pytest.fixture
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes most of the time of a small audit."""
    monkeypatch.setattr("wsi_gradcam.audit.running.write_reports", lambda *given: None)


@pytest.fixture
def copy(used: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(used, tmp_path / "copy"))


def hashes(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


FIRST = st.one_of(
    st.sampled_from(sorted(RESERVED)).flatmap(lambda name: st.sampled_from([name, name.upper(), name.title()])),
    st.text(st.characters(blacklist_characters="/\\\0"), min_size=1, max_size=6),
).flatmap(lambda name: st.sampled_from([name, f"{name}~", f"{name}~~", f"{name}. "]))
IDS = st.tuples(FIRST, st.sampled_from(["", "/a.svs", "/audit/a.svs"])).map("".join)


@given(first=IDS, second=IDS)
def test_no_two_slides_have_one_folder_and_none_has_ours(first: str, second: str) -> None:
    ids = [name for name in (first, second) if not {".", ".."} & set(name.split("/"))]
    for name in ids:
        folder = folder_name(name)
        assert folder.partition("/")[0].rstrip(". ").casefold() not in RESERVED
        assert slide_id_of(folder) == name
        assert folder.count("/") == name.count("/")
    assert len({folder_name(name) for name in ids}) == len(set(ids))


@pytest.mark.parametrize("name", ["", "..", "../a.svs", "a/../../b", "/a", "a//b", "a/"])
def test_a_name_that_leads_elsewhere_has_no_folder(name: str) -> None:
    with pytest.raises(ResultError, match="not the name of a slide below OUT"):
        folder_name(name)


def test_all_that_we_write_beside_slides_is_reserved(used: Path) -> None:
    slides = {folder_name(f"{name}/a.tif").partition("/")[0] for name in OURS}
    for folder in (used, used / "audit"):
        ours = {path.name for path in folder.iterdir()} - slides
        assert ours <= RESERVED
        assert len(ours) >= 5
        assert {path.name for path in folder.iterdir()} - ours == slides
    assert {path.name for path in (used / "exports").iterdir()} - slides == {".lock", "exports.json"}
    assert not [name for name in RESERVED if name.endswith(MARK) or name != name.casefold()]


def test_each_slide_is_found_under_its_name(used: Path) -> None:
    result = open_result(used)
    assert result.ids == sorted(f"{name}/a.tif" for name in OURS)
    assert {slide.status for slide in result} == {"ok"}
    for slide in result:
        for place in (slide.folder.place, slide.folder.overview):
            found = find_result(place)[1]
            assert found is not None
            assert (found.id, found.folder) == (slide.id, slide.folder)
    assert find_result(used / "audit" / "metrics.json")[1] is None
    assert validate(used) == []
    assert metrics_in(used)["sample"]["slides"] == len(OURS)


def test_without_slides_csv_they_are_found_too(copy: Path) -> None:
    (copy / "slides.csv").unlink()
    assert sorted(open_result(copy).ids) == sorted(f"{name}/a.tif" for name in OURS)


@pytest.mark.usefixtures("without_pages")
def test_an_audit_and_a_run_leave_each_other_alone(archive: Path, copy: Path) -> None:
    before = contents(copy)
    audit_run(copy, **{**ASK, "seed": 5}, overwrite=True)
    outcome = explain(archive, toy_spec("pooled_linear"), copy, **SMALL)
    assert all(record.skipped for record in outcome.records)
    assert {n: d for n, d in contents(copy).items() if not n.startswith("audit/")} == {
        n: d for n, d in before.items() if not n.startswith("audit/")
    }


def links(page: Path) -> list[Path]:
    from urllib.parse import unquote

    text = page.read_text(encoding="utf-8", errors="surrogateescape")
    return [page.parent / unquote(link) for link in re.findall(r'href="(\.[^"#]+)"', text)]


def test_links_of_pages_lead_to_files(used: Path) -> None:
    pages = [used / "run.html", used / "audit/run.html", *(used / "audit").rglob("report.html")]
    found = [link for page in pages for link in links(page)]
    assert len(found) >= 4 * len(OURS)
    assert [str(link) for link in found if not link.is_file()] == []


def test_the_viewer_shows_reports_and_pictures_of_each(used: Path) -> None:
    with client(used) as server:
        for page in ("run.html", "audit/report.html"):
            for link in links(used / page):
                name = os.path.relpath(link, used)
                answer = server.get(f"/files/{name}")
                assert (answer.status_code, answer.content) == (200, (used / name).read_bytes())
        for row in server.get("/api/slides", params={"limit": 100}).json()["slides"]:
            facts = server.get(f"/api/slides/{row['key']}").json()
            assert server.get(facts["audit"]).status_code == 200


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An archive and its results, as versions without `folder_name` left them; one slide is called as ours."""
    folder = tmp_path_factory.mktemp("older")
    write_slides(folder / "archive", ("audit", "exports", "LOGS"))
    explain(folder / "archive", toy_spec("pooled_linear"), folder / "out", **SMALL)
    for name in ("audit", "exports", "LOGS"):
        (folder / "out" / f"{name}{MARK}").rename(folder / "out" / name)
    return folder / "archive", folder / "out"


@pytest.fixture
def old(older: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return older[0], Path(shutil.copytree(older[1], tmp_path / "old"))


def test_old_results_are_read_validated_continued_viewed_and_exported(old: tuple[Path, Path]) -> None:
    archive, out = old
    before = hashes(out)
    result = open_result(out)
    assert [slide.is_finished for slide in result] == [True, True, True]
    found = find_result(out / "audit" / "a.tif")[1]
    assert found is not None
    assert found.id == "audit/a.tif"
    assert validate(out) == []
    assert [each.error for each in export(out, "png", out / "exports")] == ["", "", ""]
    outcome = explain(archive, toy_spec("pooled_linear"), out, **SMALL)
    assert [record.skipped for record in outcome.records] == [True, True, True]
    with client(out) as server:
        for link in links(out / "run.html"):
            assert server.get(f"/files/{os.path.relpath(link, out)}").status_code == 200
    after = hashes(out)
    assert [name for name, data in before.items() if "/a.tif/" in name and after[name] != data] == []
    (out / "slides.csv").unlink()
    assert sorted(open_result(out).ids) == ["LOGS/a.tif", "audit/a.tif", "exports/a.tif"]


@pytest.mark.usefixtures("without_pages")
def test_an_audit_of_old_results_is_refused_where_they_lie_and_goes_on_once_moved(old: tuple[Path, Path]) -> None:
    _, out = old
    before = hashes(out)
    for overwrite in (False, True):
        with pytest.raises(ResultError, match=r"results of 1 slide \(audit/a.tif, .* rename audit to audit~") as caught:
            audit_run(out, overwrite=overwrite, **ASK)
        assert "\n" not in str(caught.value)
    assert hashes(out) == before
    (out / "audit").rename(out / "audit~")
    assert audit_run(out, **ASK).failed == ()
    assert validate(out) == []


@pytest.mark.usefixtures("without_pages")
def test_old_results_that_are_made_anew_move(old: tuple[Path, Path]) -> None:
    archive, out = old
    (out / "audit" / "a.tif" / "notes.txt").write_text("mine")
    explain(archive, toy_spec("pooled_linear"), out, overwrite=True, **SMALL)
    assert sorted(path.name for path in (out / "audit" / "a.tif").iterdir()) == ["notes.txt"]
    assert [path for path in (out / "exports").rglob("*") if path.is_file()] == []
    assert validate(out) == []
    assert audit_run(out, **ASK).failed == ()


def test_an_old_slide_whose_name_ends_as_escaped_ones_do_is_no_other(tmp_path: Path) -> None:
    """Of two slides one lies where the other would: neither is taken for the other."""
    write_slides(tmp_path / "archive", ("audit", "audit~"))
    out = tmp_path / "out"
    explain(tmp_path / "archive", toy_spec("pooled_linear"), out, **SMALL)
    (out / "audit~").rename(out / "audit")
    (out / "audit~~").rename(out / "audit~")
    result = open_result(out)
    assert [str(slide.folder.place).removeprefix(f"{out}/") for slide in result] == ["audit/a.tif", "audit~/a.tif"]
    outcome = explain(tmp_path / "archive", toy_spec("pooled_linear"), out, **SMALL)
    assert [record.skipped for record in outcome.records] == [True, True]
    assert validate(out) == []


def test_an_old_audit_is_continued_where_it_lies(copy: Path) -> None:
    folder = copy / "audit"
    for name in ("audit", "exports"):
        (folder / f"{name}~").rename(folder / name)
    pieces = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    audit_run(copy, **ASK)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == pieces
    assert [str(link) for link in links(folder / "report.html") if not link.is_file()] == []
    with client(copy) as server:
        rows = server.get("/api/slides", params={"limit": 100}).json()["slides"]
        for row in rows:
            assert server.get(server.get(f"/api/slides/{row['key']}").json()["audit"]).status_code == 200


STRAYS = (
    "notes.txt",
    "Audit~~/a.tif/notes.txt",
    "exports~/a.tif/heatmap.ome.zarr/notes.txt",
    "exports~/a.tif/manifest/notes.txt",
    "mine/heatmap.ome.zarr/zarr.json",
    "audit/notes.txt",
    "audit/log/notes.txt",
    "audit/exports~/a.tif/notes.txt",
    "audit/exports~/a.tif/pieces/notes.txt",
    "audit/a slide/report.html",
    "audit/stray.tif/manifest/plan.json",
    "audit/stray.tif/heatmap.ome.zarr/0/c/0/0/0",
    "exports/notes.txt",
    "exports/audit~/a.tif.ome.zarr/notes.txt",
    "exports/audit~/a.tif.ome.zarr/0/notes.txt",
)


@pytest.mark.usefixtures("without_pages")
def test_files_of_others_survive_whatever_is_made_anew(archive: Path, copy: Path) -> None:
    for name in STRAYS:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(name)
    audit_run(copy, **ASK)
    audit_run(copy, **{**ASK, "seed": 5}, overwrite=True)
    (copy / "audit/plan.json").write_text("{")
    audit_run(copy, **{**ASK, "seed": 6}, overwrite=True)
    explain(archive, toy_spec("pooled_linear"), copy, overwrite=True, **SMALL)
    assert {each.error for each in export(copy, "ome-zarr-0.4", copy / "exports", overwrite=True)} == {""}
    assert [name for name in STRAYS if not (copy / name).is_file() or (copy / name).read_text() != name] == []
    assert audit_run(copy, **{**ASK, "seed": 6}).failed == ()


@pytest.mark.usefixtures("without_pages")
def test_what_an_audit_replaces_is_gone(copy: Path) -> None:
    old = set((copy / "audit").rglob("*.npz"))
    audit_run(copy, **{**ASK, "seed": 5}, overwrite=True)
    assert old
    assert not old & set((copy / "audit").rglob("*.npz"))


@pytest.mark.usefixtures("without_pages")
def test_a_plan_of_a_stranger_deletes_nothing_elsewhere(copy: Path) -> None:
    victim = copy.parent / "report.html"
    victim.write_text("mine")
    plan = json.loads((copy / "audit/plan.json").read_text())
    plan["samples"] = {name: {} for name in ("../..", "..", "/etc", str(copy.parent))}
    (copy / "audit/plan.json").write_text(json.dumps(plan))
    audit_run(copy, **{**ASK, "seed": 5}, overwrite=True)
    assert victim.read_text() == "mine"


@pytest.mark.slow
def test_an_object_store_keeps_them_apart_too(tmp_path: Path, s3_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**ASK, "patches": 8}
    explain(write_slides(tmp_path, ("audit",)), toy_spec("pooled_linear"), s3_out, **SMALL)
    before = objects(s3_out)
    out = storage_path(s3_out)
    (out / "audit/notes.txt").write(b"mine")
    with monkeypatch.context() as patch:
        patch.setattr("wsi_gradcam.audit.running.write_reports", lambda *given: None)  # as in `without_pages`
        audit_run(s3_out, **asked)
    audit_run(s3_out, **{**asked, "seed": 5}, overwrite=True)
    after = objects(s3_out)
    assert {name: after.get(name) for name in before} == before
    assert after["audit/notes.txt"] == b"mine"
    result = open_result(s3_out)
    assert AuditFolder(out / "audit").slide_report("audit/a.tif").is_file()
    assert RunFolder(out).slide("audit/a.tif") == result["audit/a.tif"].folder
    assert validate(s3_out) == []


@pytest.mark.usefixtures("without_pages")
def test_the_commands_keep_them_apart(tmp_path: Path, run: Run) -> None:
    """As a user meets it: explain, audit, audit again, validate."""
    write_slides(tmp_path / "archive", ("audit",))
    model, out = toy_file(tmp_path, "pooled_linear"), tmp_path / "out"
    code, _, err = run("explain", tmp_path / "archive", "--model", model, "--out", out, *flags(SMALL), "--trust-code")
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO((out / "slides.csv").read_text())))
    assert [row["id"] for row in rows] == ["audit/a.tif"]
    before = {name: data for name, data in hashes(out).items() if name.startswith("audit~/")}
    for more in ((), ("--seed", "4", "--overwrite")):
        assert run("audit", out, "--patches", "8", "--only", "saturation", "--trust-code", *more)[0] == 0
    assert len(before) > 10
    assert {name: data for name, data in hashes(out).items() if name.startswith("audit~/")} == before
    assert run("validate", out)[0] == 0


def test_a_name_that_a_disk_does_not_take_ends_no_export_of_many(
    used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_gradcam.export.job.MAX_NAME_BYTES", 10**6)
    long = tmp_path / ("d" * 250)
    slides = list(open_result(used))
    monkeypatch.setattr(slides[1], "id", "n" * 254)
    records = [
        _exported(s, Job(s, long / s.id, Options(), to="tiff", journal=Journal(long)), Journal(long)) for s in slides
    ]
    assert [bool(record.error) for record in records] == [False, True, False, False]
    assert "name too long" in records[1].error
