"""Names as people, disks and programs make them: every command holds them, whatever is in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.audits import QUICK
from tests.runs import SMALL, toy_spec
from tests.synthetic import write_marker_slide
from tests.viewer_runs import client
from wsi_gradcam import audit_run, open_result
from wsi_gradcam.api import explain
from wsi_gradcam.errors import as_path, as_text
from wsi_gradcam.export import OF_HEATMAPS, export
from wsi_gradcam.results.slide_tables import COLUMNS, encode_rows, parse_rows, row_problems
from wsi_gradcam.results.validation import validate


@pytest.fixture
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes most of the time of a small audit."""
    monkeypatch.setattr("wsi_gradcam.audit.running.write_reports", lambda *given: None)


NASTY = (
    "dir\\a.tif",
    b"caf\xe9.tif".decode("utf-8", "surrogateescape"),
    "caf\ufffde9.tif",  # what the one before is called in our results
    "Gewebe-\N{LATIN SMALL LETTER A WITH DIAERESIS}.tif",
    "Gewebe-a\N{COMBINING DIAERESIS}.tif",
    "\u80bf\u7624 \N{MICROSCOPE}.tif",
    "two\nlines\r.tif",
    "-rf.tif",
    " .tif",
    "a.tif ",
    "CON.tif",
    "a%2Fb #1?x&y.tif",
    'it\'s "so" <b>.tif',
    "\N{RIGHT-TO-LEFT OVERRIDE}fit.tif",
    "a.TIF",
    "A.tif",
    "L" * 251 + ".tif",
    "\N{LATIN SMALL LETTER E WITH ACUTE}" * 110 + ".tif",
)
CLASSES = ["normal", 'Tumor-\N{LATIN SMALL LETTER E WITH ACUTE} \u764c/\\:"<&>']


def copied(slide: Path, folder: Path, names: Iterable[str]) -> Path:
    """A folder with one slide under these names."""
    folder.mkdir()
    for name in names:
        shutil.copy(slide, folder / name)
    return folder


def lone(data: bytes) -> bool:
    """Whether a text holds half a pair of surrogates, written out or as JSON escapes it, or is no UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return (
        re.search(r"(?<!\\ud8..)(?<!\\ud[9ab]..)\\ud[c-f]..", re.sub(r"\\ud[89ab]..\\ud[c-f]..", "", text)) is not None
    )


TEXTS = {".json", ".jsonl", ".csv", ".html", ".yaml", ".xml", ".geojson", ".tmap", ".dzi", ".groovy"}


def held_by_every_command(archive: Path, out: Path, names: Sequence[str], formats: Iterable[str], pages: bool) -> None:
    """Explain, validate, audit, export and view slides of these names; each is there, under its own name."""
    spec = toy_spec("pooled_linear", classes=CLASSES)
    outcome = explain([archive / name for name in names], spec, out, **{**SMALL, "target": CLASSES[1:]})
    assert [record.error for record in outcome.records if record.error] == []
    result = open_result(out)
    assert sorted(result.ids) == sorted(map(as_text, names))
    assert {os.fsencode(slide.path) for slide in result} == {os.fsencode(archive / name) for name in names}
    assert validate(out) == []
    again = explain([archive / name for name in names], spec, out, **{**SMALL, "target": CLASSES[1:]})
    assert all(record.skipped for record in again.records)
    assert audit_run(out, **{**QUICK, "patches": 8 * len(names), "only": ["saturation"]}).failed == ()
    assert validate(out) == []
    for to in formats:
        done = export(out, to, out.parent / to, window="slide", size=64)
        assert [each.error for each in done] == [""] * len(names), to
        paths = [path for each in done for path in each.paths]
        assert len(set(paths)) == len(paths)
        assert len(paths) >= len(names) or to == "dicom-annotations"  # there are none where nothing is hot
        assert [path for path in paths if not path.exists()] == []
    made = [
        path
        for path in out.parent.rglob("*")
        if path.suffix in TEXTS and path.is_file() and archive not in path.parents
    ]
    assert [path for path in made if lone(path.read_bytes())] == []
    with client(out) as server:
        rows = server.get("/api/slides", params={"limit": 100}).json()["slides"]
        assert sorted(row["id"] for row in rows) == sorted(result.ids)
        for row in rows:
            facts = server.get(f"/api/slides/{row['key']}").json()
            assert facts["id"] == row["id"]
            assert pages == (facts["audit"] is not None and server.get(facts["audit"]).status_code == 200)
            assert server.get("/api/slide", params={"id": row["id"]}).json()["key"] == row["key"]


@pytest.fixture(scope="module")
def one_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "a.tif"
    write_marker_slide(path, 140, 140, mpp=0.25, markers=[(60, 60)], marker_px=16)
    return path


@pytest.mark.usefixtures("without_pages")
def test_every_command_holds_every_name(one_slide: Path, tmp_path: Path) -> None:
    archive = copied(one_slide, tmp_path / "s", NASTY)
    held_by_every_command(archive, tmp_path / "made" / "out", NASTY, list(OF_HEATMAPS), pages=False)


@pytest.mark.parametrize("name", [NASTY[0], NASTY[1], NASTY[6], NASTY[12]])  # the client of tests decodes %2F twice
def test_pages_hold_every_name(one_slide: Path, tmp_path: Path, name: str) -> None:
    archive = copied(one_slide, tmp_path / "s", [name])
    held_by_every_command(archive, tmp_path / "made" / "out", [name], [], pages=True)


LETTERS = st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
BYTES = st.binary(min_size=1, max_size=8).map(
    lambda data: data.translate(None, b"/\0").decode("utf-8", "surrogateescape")
)
FILES = st.one_of(
    st.text(LETTERS, min_size=1, max_size=20), BYTES, st.text(LETTERS, min_size=1).map(lambda t: t * 9)
).map(lambda text: os.fsdecode(os.fsencode(text)[:240]) + "x.tif")


@pytest.mark.parametrize("examples", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_every_command_holds_any_name(one_slide: Path, tmp_path_factory: pytest.TempPathFactory, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(names=st.lists(FILES, min_size=5, max_size=5, unique_by=os.fsencode))
    def check(names: list[str]) -> None:
        hold_any(one_slide, tmp_path_factory.mktemp("any"), names)

    check()


def hold_any(one_slide: Path, folder: Path, names: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wsi_gradcam.audit.running.write_reports", lambda *given: None)
        try:
            archive = copied(one_slide, folder / "s", names)
        except shutil.SameFileError:
            return
        held_by_every_command(archive, folder / "made" / "out", names, ("tiff", "ome-tiff"), pages=False)


@given(first=BYTES, second=st.one_of(BYTES, st.text(LETTERS)))
def test_names_and_their_texts_belong_together(first: str, second: str) -> None:
    for name in (first, second, os.fsdecode(os.fsencode(first + second)), f"{first}\ufffd{second}"):
        as_text(name).encode()
        assert as_path(as_text(name)) == name
    assert (as_text(first) == as_text(second)) == (first == second)


@given(cells=st.lists(st.text(LETTERS, max_size=9), min_size=2, max_size=2))
def test_rows_of_any_text_are_read_as_they_were_written(cells: list[str]) -> None:
    rows = {cells[0]: {**dict.fromkeys(COLUMNS, ""), "id": cells[0], "error": cells[1]}}
    data = encode_rows(rows)
    read = parse_rows("slides.csv", data)
    assert {name: row["error"] for name, row in read.items()} == {cells[0]: cells[1]}
    assert list(row_problems(data, read)) == []


def test_results_of_older_versions_that_hold_such_bytes_are_read_and_gone_on_with(
    one_slide: Path, tmp_path: Path
) -> None:
    name = b"caf\xe9.tif".decode("utf-8", "surrogateescape")
    archive, out = copied(one_slide, tmp_path / "s", [name]), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        for module in ("inputs.find", "results.slide_tables", "run.driver"):
            patch.setattr(f"wsi_gradcam.{module}.as_text", str)
        explain(archive, toy_spec("pooled_linear"), out, **SMALL)
    assert open_result(out).ids == [name]
    assert explain(archive, toy_spec("pooled_linear"), out, **SMALL).records[0].skipped
    assert export(out, "tiff", out / "exports")[0].error == ""


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_either_normal_form_are_found(one_slide: Path, tmp_path: Path, form: Literal["NFC", "NFD"]) -> None:
    def written(text: str) -> str:
        return unicodedata.normalize(form, text)

    def other(text: str) -> str:
        return unicodedata.normalize("NFD" if form == "NFC" else "NFC", text)

    archive, out = copied(one_slide, tmp_path / "s", [written("Lé.tif")]), tmp_path / "out"
    masks = tmp_path / other("Maské")
    masks.mkdir()
    ring = [[0, 0], [0, 140], [140, 140], [140, 0], [0, 0]]
    kind = {"classification": {"name": other("Gewebé")}}
    area = {"type": "Feature", "properties": kind, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (masks / other("Lé.geojson")).write_text(json.dumps({"type": "FeatureCollection", "features": [area]}))
    listed = tmp_path / "list.csv"
    listed.write_text(f"slide,mask\ns/{other('Lé.tif')},{written('Maské')}/{written('Lé.geojson')}\n", encoding="utf-8")
    spec = toy_spec("pooled_linear", classes=["normal", written("Tumör")])
    chosen = {**SMALL, "target": [other("Tumör")], "include": [written("Gewebé")]}
    explain(archive, spec, out, mask=masks, only=other("Lé*"), **chosen)
    assert [slide.status for slide in explain(listed, spec, tmp_path / "listed", **chosen).records] == ["ok"]
    result = open_result(out)
    assert result[other("Lé.tif")].channel(other("Tumör")).target == written("Tumör")
    assert export(out, "png", tmp_path / "png", [other("Lé.tif")], channel=(other("Tumör"),))[0].error == ""
    asked = {**QUICK, "patches": 8, "only": ["saturation"], "target": other("Tumör")}
    assert audit_run(out, annotations=masks, include=[written("Gewebé")], **asked).failed == ()
