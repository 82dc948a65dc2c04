"""What a model looks at across an archive: found, tested, told, kept, and the same however it was worked out."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
import yaozarrs
from pyarrow import parquet

from tests.evidence_runs import explained, model_file, of_nothing, of_nuclei, of_nuclei_and_marker, write_archive
from tests.runs import ROOT, flags
from tests.test_export_dicom import errors as dicom_errors
from wsi_gradcam import evidence_run, open_result, validate
from wsi_gradcam.audit.archive import open_run
from wsi_gradcam.audit.report.page import evidence_words
from wsi_gradcam.errors import ConfigError, ResultError, ResumeError, StoreError
from wsi_gradcam.evidence import NOTHING, EvidenceSettings
from wsi_gradcam.evidence.findings import Evidence
from wsi_gradcam.evidence.labels import open_clusters
from wsi_gradcam.evidence.page import interval
from wsi_gradcam.evidence.running import shares_of
from wsi_gradcam.export import export
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.marks import Marks, make_mark
from wsi_gradcam.run.status import observe

DOCS = ROOT / "docs"
SLIDES, MARKED = 30, 5
A_SLIDE_KIB = 12  # of memory, in the client
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
    assert (shortcut.patients, shortcut.of_patients) == (-(-MARKED // 2), SLIDES // 2)
    assert shortcut.largest_patient is not None
    assert 1 / MARKED < shortcut.largest_patient < 0.7
    assert shortcut.covering is not None
    assert shortcut.covering.difference.high is not None
    assert shortcut.covering.difference.high < 0


def test_its_status_counts_the_last_pass(out: Path) -> None:
    (seen,) = observe(out)
    assert seen.evidence is not None
    assert seen.evidence.status is not None
    numbers = seen.evidence.status.numbers
    assert numbers.part is not None
    assert (numbers.part.number, numbers.part.of, numbers.part.name) == (3, 3, "covering clusters")
    assert numbers.part.done == numbers.part.patches > 0
    assert numbers.patches.done == numbers.patches.expected == 2 * read(out).patches + numbers.part.patches
    page = (out / "evidence" / "run.html").read_text(encoding="utf-8")
    assert "patches looked at, in all passes" in page
    assert "../000.tif/overview.png" in page


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


def test_a_label_image_lies_on_the_heatmap_and_names_its_kinds(out: Path) -> None:
    """A pixel has the label of its cell in the patch in whose middle it lies, as the tables of places have it."""
    found, slide = read(out), open_result(out)["000.tif"]
    image = open_clusters(slide)
    assert image is not None
    assert [(k.number, k.side, k.colour) for k in image.kinds] == [(k.number, k.side, k.colour) for k in found.kinds]
    assert image.shapes == slide.levels
    labels = image.read(0, Region(0, 0, *image.shapes[0]))
    assert set(np.unique(labels)) <= {0, NOTHING, *(kind.number for kind in found.kinds)}
    assert (labels > 0).all()  # all patches of the slide are in the sample
    table = parquet.read_table(out / "evidence" / "000.tif" / "places.parquet").to_pandas()
    step = slide.stride_px  # two cells: the second one holds the pixel's centre
    table = table[(table["y"] % step > step / 2) & (table["x"] % step > step / 2)]
    at = labels[(table["y"] // step).astype(int), (table["x"] // step).astype(int)]
    assert len(table) > 5
    assert (np.where(at == NOTHING, 0, at) == table["cluster"]).all()
    pixels = np.stack([table["y"], table["x"]], axis=1) // step
    assert (image.at(np.concatenate([pixels, [[-1, 0], [0, 10**6]]])) == [*at, 0, 0]).all()
    yaozarrs.validate_zarr_store(str(out / "evidence" / "000.tif" / "clusters.ome.zarr"))  # its source is found, too


def test_each_patch_has_the_kind_that_contributes_most(out: Path) -> None:
    table = parquet.read_table(out / "evidence" / "000.tif" / "patches.parquet").to_pandas()
    sums = table[[name for name in table if name.startswith("evidence_")]].to_numpy()
    assert (table["cluster"] == np.abs(sums).argmax(axis=1) + 1).all()
    assert table["patch"].is_unique


def test_slides_without_clusters_say_so(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy", ignore=lambda _, names: [n for n in names if n == "evidence"])
    with pytest.raises(ConfigError, match="no slide has clusters"):
        export(copy, "clusters-geojson", tmp_path / "there")


def test_kinds_are_compared_with_regions_and_annotations_and_marks(out: Path, tmp_path: Path) -> None:
    """Markers are drawn as regions: the kind of markers lies on them. What is given changes without measuring anew."""
    copy = shutil.copytree(out, tmp_path / "copy")
    (marker,) = read(out).shortcuts
    table = parquet.read_table(out / "evidence" / "000.tif" / "places.parquet").to_pandas()
    own = table[table["cluster"] == marker.number]
    boxes = [
        [[x - 8, y - 8], [x + 8, y - 8], [x + 8, y + 8], [x - 8, y + 8], [x - 8, y - 8]]
        for y, x in own[["y", "x"]].to_numpy()
    ]
    (tmp_path / "given").mkdir()
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [box]},
            "properties": {"classification": {"name": "ruler"}},
        }
        for box in boxes
    ]
    (tmp_path / "given" / "000.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    slide = open_result(copy)["001.tif"]
    Marks(storage_path(copy)).add(
        make_mark("001.tif", slide.plan, {"kind": "artefact", "outline": [[0, 0], [0, 200], [200, 200], [200, 0]]})
    )
    pieces = {p: p.stat().st_mtime_ns for p in (copy / "evidence").rglob("*.npz")}
    found = evidence_run(
        copy, trust_code=True, regions=tmp_path / "given", annotations=tmp_path / "given", **QUICK
    ).evidence
    assert all(p.stat().st_mtime_ns == made for p, made in pieces.items())
    (again,) = found.shortcuts
    assert again.number == marker.number
    of_first = sum(own["contribution"].abs() * own["weight"])
    assert again.regions["ruler"] == again.annotations["ruler"] > 0.5 / MARKED * (of_first > 0)
    assert max(kind.regions["ruler"] for kind in found.kinds if kind.number != marker.number) < again.regions["ruler"]
    assert sum(kind.marks["artefact"] > 0 for kind in found.kinds) >= 1


def test_the_report_shows_findings_and_examples(out: Path) -> None:
    page = (out / "evidence" / "report.html").read_text(encoding="utf-8")
    found = read(out)
    assert "looks like a shortcut" in page
    assert page.count("<figure>") >= 6 * len(found.kinds)
    assert "<script" not in page
    assert all(f"background: #{kind.colour}" in page for kind in found.kinds)
    assert found.kinds[0].covering is not None
    assert interval(found.kinds[0].covering.difference) in page  # what the findings say, too


def test_the_audits_report_has_what_is_found(out: Path, tmp_path: Path) -> None:
    place, found = storage_path(out), read(out)
    assert evidence_words(place, found.run) == [finding.words for finding in found.findings]
    assert evidence_words(place, "of other results") == []
    assert evidence_words(storage_path(tmp_path), found.run) == []
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "evidence.json").write_text("[]", encoding="utf-8")
    with pytest.raises(StoreError, match="damaged"):
        evidence_words(storage_path(tmp_path), found.run)


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
    export(copy, "clusters-geojson", tmp_path / "there", ["000.tif"], simplify=0)
    features = json.loads((tmp_path / "there" / "000.tif.clusters.geojson").read_text(encoding="utf-8"))["features"]
    slide = open_result(copy)["000.tif"]
    image = open_clusters(slide)
    assert image is not None
    assert image.kinds[0].title == "dark nuclei"
    labels, um2 = image.read(0, Region(0, 0, *image.shapes[0])), (slide.mpp[0] * slide.stride_px) ** 2
    for kind in image.kinds:
        own = [f["properties"] for f in features if f["properties"]["classification"]["name"] == kind.title]
        assert sum(one["measurements"]["area µm²"] for one in own) == pytest.approx((labels == kind.number).sum() * um2)
    (done,) = export(copy, "dicom-clusters", tmp_path / "there", ["000.tif"])
    found_dicom = highdicom.seg.segread(done.paths[0] / "level-0.dcm")
    matrix = found_dicom.get_total_pixel_matrix(combine_segments=True)
    np.testing.assert_array_equal(matrix, np.where(labels == 255, len(image.kinds) + 1, labels))
    assert dicom_errors(done.paths[0] / "level-0.dcm") == []
    assert found_dicom.get_segment_description(1).segment_label == "evidence dark nuclei"
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


@pytest.mark.slow
def test_two_models_are_compared(out: Path, archive: Path, tmp_path: Path) -> None:
    """The new model looks at markers, which the old one does not know."""
    old = explained(archive, model_file(tmp_path, of_nuclei(0)), tmp_path / "old")
    evidence_run(old, trust_code=True, **QUICK)
    new = shutil.copytree(out, tmp_path / "new")
    found = evidence_run(new, trust_code=True, against=old, overwrite=True, **QUICK).evidence
    assert found.against is not None
    assert (found.against.slides, found.against.model) == (SLIDES, "network")
    (marker,) = found.shortcuts
    (row,) = (one for one in found.against.rows if one.cluster == marker.number)
    assert row.share.value is not None
    assert row.share_there.value is not None
    assert row.share.value > 3 * row.share_there.value
    assert f"the model of {old}" in found.against.words[0]
    assert found.against.words[0] in (new / "evidence" / "report.html").read_text(encoding="utf-8")
    assert read(new) == evidence_run(new, trust_code=True, against=old, **QUICK).evidence
    with pytest.raises(ConfigError, match="skip_labels"):
        evidence_run(new, trust_code=True, against=old, skip_labels=True)
    evidence_run(old, trust_code=True, skip_labels=True, **QUICK)
    with pytest.raises(ResultError, match="no label images"):
        evidence_run(new, trust_code=True, against=old, **QUICK)


def test_the_client_reads_no_table_of_a_slide_and_holds_no_patch(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    for name in ("patches.parquet", "cams.zarr"):
        for path in copy.glob(f"*/{name}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = open_run(open_result(copy), trust_code=True)
    plans = [shares_of(run, EvidenceSettings(places=places), None) for places in (1600, 10**9)]
    assert [len(shares) for shares in plans] == [SLIDES, SLIDES]
    few, many = (len(pickle.dumps(shares)) for shares in plans)
    assert many < few + 8 * SLIDES  # larger numbers, and no more of them


def scale(*arguments: object) -> dict[str, float]:
    """What `tests.evidence_scale` prints, in a process of its own."""
    command = [sys.executable, "-m", "tests.evidence_scale", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.disk
def test_a_slide_takes_the_client_a_few_kilobytes(tmp_path: Path) -> None:
    """All three passes, and what comes before them with a hundred thousand slides."""
    few, many = (scale("slides", count, tmp_path / str(count)) for count in (300, 3000))
    assert (many["done"] - few["done"]) * 1024 < 2700 * A_SLIDE_KIB
    few, many = (scale("slides", count, tmp_path / f"{count} planned", "--plan") for count in (300, 100_000))
    assert (many["planned"] - few["planned"]) * 1024 < 99_700 * A_SLIDE_KIB
    assert many["plan_bytes"] - few["plan_bytes"] < 99_700 * 200


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_places(tmp_path: Path) -> None:
    few, many = (scale("places", count, tmp_path / str(count)) for count in (10_000, 1_000_000))
    assert many["counted"] - few["counted"] < 60
    assert many["kinds_found"] == few["kinds_found"] == 5
