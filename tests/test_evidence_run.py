"""What a model looks at across an archive: found, tested, told, kept, and the same however it was worked out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from tests.evidence_runs import explained, model_file, of_nothing, of_nuclei, of_nuclei_and_marker, write_archive
from tests.runs import ROOT, flags
from wsi_gradcam import evidence_run, validate
from wsi_gradcam.errors import ConfigError, ResumeError
from wsi_gradcam.evidence.findings import Evidence

DOCS = ROOT / "docs"
SLIDES, MARKED = 30, 5
QUICK: dict[str, Any] = {"places": 1600, "seed": 1}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"), SLIDES, MARKED, seed=3)


@pytest.fixture(scope="module")
def out(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that looks at markers and nuclei, explained, with its evidence."""
    folder = tmp_path_factory.mktemp("out")
    found = explained(archive, model_file(folder, of_nuclei_and_marker(0)), folder / "out")
    evidence_run(found, trust_code=True, **QUICK)
    return found


def read(out: Path) -> Evidence:
    return Evidence.model_validate_json((out / "evidence" / "evidence.json").read_text(encoding="utf-8"))


def test_the_marker_of_a_site_is_the_first_finding(out: Path) -> None:
    found = read(out)
    assert found.worth_sorting
    assert found.findings[0].kind == "shortcut"
    (shortcut,) = found.shortcuts
    assert found.findings[0].cluster == shortcut.number
    (site,) = (one for one in shortcut.spread if one.by == "site")
    assert site.groups["south"] == [MARKED, MARKED]
    assert "site south" in found.findings[0].words
    assert shortcut.covering is not None
    assert shortcut.covering.difference.high is not None
    assert shortcut.covering.difference.high < 0


def test_shares_of_each_side_and_of_the_area_are_at_most_one(out: Path) -> None:
    found = read(out)
    for side in ("for", "against"):
        share = sum(kind.share.value or 0.0 for kind in found.kinds if kind.side == side)
        assert 0.9 < share <= 1.0 + 1e-9
    assert sum(kind.area.value or 0.0 for kind in found.kinds) <= 1.0 + 1e-9


def test_tables_name_the_kind_of_each_place(out: Path) -> None:
    found = read(out)
    clusters = parquet.read_table(out / "evidence" / "clusters.parquet").to_pylist()
    assert [row["cluster"] for row in clusters] == [kind.number for kind in found.kinds]
    places = sum(parquet.read_table(path).num_rows for path in (out / "evidence").rglob("places.parquet"))
    assert places == found.places
    table = parquet.read_table(out / "evidence" / "000.tif" / "places.parquet").to_pandas()
    assert set(table["cluster"]) <= {0, *(kind.number for kind in found.kinds)}
    assert (table["y"].between(0, 96) & table["x"].between(0, 128)).all()


def test_the_report_shows_findings_and_examples(out: Path) -> None:
    page = (out / "evidence" / "report.html").read_text(encoding="utf-8")
    found = read(out)
    assert "looks like a shortcut" in page
    assert page.count("<figure>") >= 6 * len(found.kinds)
    assert "<script" not in page


def test_validate_knows_the_files_and_finds_what_was_changed(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "evidence" / "names.yaml").write_text("1: nuclei\n", encoding="utf-8")
    assert validate(copy) == []
    (copy / "evidence" / "clusters.parquet").write_bytes(b"")
    assert any("evidence/clusters.parquet" in finding.problem for finding in validate(copy))


def test_names_that_are_given_are_used(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "evidence" / "names.yaml").write_text("1: dark nuclei\n", encoding="utf-8")
    found = evidence_run(copy, trust_code=True, **QUICK).evidence
    assert found.kinds[0].name == "dark nuclei"
    assert any("“dark nuclei” (cluster 1)" in finding.words for finding in found.findings)
    (copy / "evidence" / "names.yaml").write_text("one\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="NUMBER: NAME"):
        evidence_run(copy, trust_code=True, **QUICK)


@pytest.mark.slow
def test_other_settings_are_refused_and_replaced_on_request(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    with pytest.raises(ResumeError, match="places: 1600 there, 400 now"):
        evidence_run(copy, trust_code=True, places=400, seed=1)
    assert evidence_run(copy, trust_code=True, places=400, seed=1, overwrite=True).evidence.places < 600


def test_what_was_measured_is_not_measured_again_and_ends_the_same(out: Path, tmp_path: Path) -> None:
    """Half of the pieces are gone, as after a kill, and the other half is kept."""
    copy = shutil.copytree(out, tmp_path / "copy")
    pieces = sorted((copy / "evidence").rglob("*.npz"))
    for piece in pieces[::2]:
        piece.unlink()
    before = {piece: piece.stat().st_mtime_ns for piece in pieces[1::2]}
    evidence_run(copy, trust_code=True, **QUICK)
    assert {piece: piece.stat().st_mtime_ns for piece in before} == before
    assert read(copy) == read(out)


@pytest.mark.slow
def test_workers_find_the_same(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy", ignore=lambda _, names: [n for n in names if n == "evidence"])
    evidence_run(copy, trust_code=True, workers=1, **QUICK)
    assert read(copy) == read(out)


def test_the_command_fails_on_a_shortcut_where_it_is_asked_to(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wsi_gradcam.cli.main import main

    asked = ["evidence", str(out), "--trust-code", *flags(QUICK)]
    assert main(asked) == 0
    assert "looks like a shortcut" in capsys.readouterr().out
    assert main([*asked, "--fail-on", "shortcut", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed_on"] == [kind.number for kind in read(out).shortcuts]


@pytest.mark.slow
def test_an_untrained_model_has_no_evidence_worth_sorting(archive: Path, tmp_path: Path) -> None:
    out = explained(archive, model_file(tmp_path, of_nothing(5)), tmp_path / "out")
    found = evidence_run(out, trust_code=True, **QUICK).evidence
    assert not found.worth_sorting
    assert found.kinds == []
    assert "no evidence worth sorting" in (out / "evidence" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_model_that_does_not_look_at_the_marker_has_no_shortcut(archive: Path, tmp_path: Path) -> None:
    out = explained(archive, model_file(tmp_path, of_nuclei(0)), tmp_path / "out")
    found = evidence_run(out, trust_code=True, **QUICK).evidence
    assert found.worth_sorting
    assert found.shortcuts == []


def test_a_target_that_is_not_one_class_is_refused(out: Path) -> None:
    with pytest.raises(ConfigError, match="was not explained"):
        evidence_run(out, trust_code=True, target="other", overwrite=True)


def test_the_published_schema_is_the_schema() -> None:
    published = json.loads((DOCS / "evidence.schema.json").read_text(encoding="utf-8"))
    assert published == Evidence.model_json_schema()
