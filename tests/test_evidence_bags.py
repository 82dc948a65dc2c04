"""What a slide-level model looks at: patches sorted by what their features contribute to the slide's answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pyarrow import parquet

from tests.evidence_runs import (
    BAG_COLUMNS,
    BAG_ROWS,
    FOCUS,
    of_nothing,
    of_nuclei,
    of_nuclei_and_marker,
    slide_model_file,
    write_bags,
)
from tests.planted import SIDE_PX
from tests.runs import SMALL, flags, rows_of
from wsi_gradcam import audit_run, evidence_run, explain, open_result, validate
from wsi_gradcam.evidence import NOTHING, Spread
from wsi_gradcam.evidence.findings import Evidence, adds
from wsi_gradcam.evidence.labels import open_clusters
from wsi_gradcam.geometry import Region

SLIDES, MARKED = 14, 6  # of the twelve with tumour the first six are of site south
BAGS: dict[str, Any] = {**SMALL, "bag_method": "gradient_x_input", "target": ("tumour",)}
QUICK: dict[str, Any] = {"places": 2000, "seed": 1}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bags(tmp_path_factory.mktemp("archive"), SLIDES, MARKED, seed=5)


@pytest.fixture(scope="module")
def out(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a slide-level model that looks at markers and nuclei, with its evidence."""
    folder = tmp_path_factory.mktemp("out")
    model = slide_model_file(folder, of_nuclei_and_marker(0))
    explain(archive, model, folder / "out", trust_code=True, **BAGS)
    evidence_run(folder / "out", trust_code=True, **QUICK)
    return folder / "out"


def read(out: Path) -> Evidence:
    return Evidence.model_validate_json((out / "evidence" / "evidence.json").read_text(encoding="utf-8"))


def table_of(out: Path, slide: str, name: str = "evidence") -> Any:
    folder = out / name / slide if name else out / slide
    return parquet.read_table(folder / "patches.parquet").to_pandas()


def has_marker(slide: str, yx: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which patches bear markers: half of the focus of the slides of site south."""
    row = yx[:, 0] // SIDE_PX * BAG_COLUMNS + yx[:, 1] // SIDE_PX
    return (row < FOCUS // 2) & (int(slide[:3]) < MARKED)


def test_the_marker_of_a_site_is_the_first_finding(out: Path) -> None:
    found = read(out)
    assert (found.level, found.bag_method, found.unit) == ("slide", "gradient_x_input", "slide")
    assert found.places == found.patches == SLIDES * BAG_ROWS * BAG_COLUMNS
    first = found.findings[0]
    (shortcut,) = found.shortcuts
    assert (first.kind, first.cluster) == ("shortcut", shortcut.number)
    assert "site south" in first.words
    assert "without it the slide's logit is" in first.words
    own = marked = 0.0
    for slide in rows_of(out):
        places = parquet.read_table(out / "evidence" / slide / "places.parquet").to_pandas()
        places = places[places["cluster"] == shortcut.number]
        corners = (places[["y", "x"]].to_numpy() - SIDE_PX / 2).astype(np.int64)
        size = places["contribution"].abs().to_numpy()
        own, marked = own + size.sum(), marked + size[has_marker(slide, corners)].sum()
    assert marked >= 0.9 * own > 0


def test_what_clusters_contribute_is_the_relevance_that_the_run_has_stored(out: Path) -> None:
    found = read(out)
    for slide in ("000.tif", "007.tif", "013.tif"):
        relevance = table_of(out, slide, "")["gradient_x_input_relevance_tumour"].to_numpy()
        sorted_as = table_of(out, slide)
        sums = sorted_as[[f"evidence_{kind.number}" for kind in found.kinds]].to_numpy()
        at = sorted_as["patch"].to_numpy()
        assert len(at) == BAG_ROWS * BAG_COLUMNS
        own = sorted_as["cluster"].to_numpy() > 0
        np.testing.assert_allclose(sums.sum(axis=1)[own], relevance[at][own], rtol=1e-4, atol=1e-9)
        assert (np.count_nonzero(sums, axis=1) == own).all()  # a patch is of one cluster, or of none
        places = parquet.read_table(out / "evidence" / slide / "places.parquet").to_pandas()
        np.testing.assert_allclose(places["contribution"], relevance[places["patch"]], rtol=1e-4, atol=1e-9)
    share = sum(kind.share.value or 0.0 for kind in found.kinds if kind.side == "for")
    assert 0.9 < share <= 1 + 1e-9


def test_removing_is_the_answer_of_the_smaller_bag(out: Path) -> None:
    """With attention that is the same for all, the slide's logit is the mean of what its patches say."""
    (kind,) = read(out).shortcuts
    assert kind.covering is not None
    assert (kind.covering.how, kind.covering.patches, kind.covering.slides) == ("removed", MARKED, MARKED)
    changes = []
    for number in range(MARKED):
        sorted_as, alone = table_of(out, f"{number:03d}.tif"), table_of(out, f"{number:03d}.tif", "")
        logit = alone["logit_tumour"].to_numpy()[sorted_as["patch"]]
        changes.append(logit[sorted_as["cluster"] != kind.number].mean() - logit.mean())
    assert kind.covering.change.value == pytest.approx(np.mean(changes), rel=1e-4)
    assert kind.covering.difference.high is not None
    assert kind.covering.difference.high < 0


def test_the_probability_is_that_of_the_slides(out: Path) -> None:
    (kind,) = read(out).shortcuts
    assert kind.probability is not None
    south = [float(rows_of(out)[f"{n:03d}.tif"]["slide_probability_tumour"]) for n in range(MARKED)]
    assert min(south) <= kind.probability <= max(south)


def test_label_image_and_report(out: Path) -> None:
    found, slide = read(out), open_result(out)["000.tif"]
    image = open_clusters(slide)
    assert image is not None
    labels = image.read(0, Region(0, 0, *image.shapes[0]))
    sorted_as = table_of(out, "000.tif")
    centres = (sorted_as[["y", "x"]].to_numpy() + SIDE_PX // 2) // slide.stride_px
    at = labels[centres[:, 0], centres[:, 1]].astype(int)
    assert (np.where(at == NOTHING, 0, at) == sorted_as["cluster"]).all()
    page = (out / "evidence" / "report.html").read_text(encoding="utf-8")
    assert "a slide-level model" in page
    assert "gradient x input" in page
    assert "the patch in its surroundings" in page
    assert page.count("<figure>") >= 6 * len(found.kinds)
    assert "covering" not in page
    assert validate(out) == []


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


def some_slides(archive: Path, folder: Path, count: int) -> Path:
    """A copy of an archive's last slides, which may be deleted."""
    folder.mkdir()
    head, *lines = archive.read_text(encoding="utf-8").splitlines()
    (folder / "list.csv").write_text("\n".join([head, *lines[-count:]]), encoding="utf-8")
    for line in lines[-count:]:
        shutil.copy(archive.parent / line.split(",")[0], folder)
    return folder / "list.csv"


def test_of_a_few_slides_that_are_gone_evidence_is_sorted(archive: Path, out: Path, tmp_path: Path) -> None:
    """Where no pixel is explained coefficients are computed anew; nothing is said of other slides, or drawn."""
    listed = some_slides(archive, tmp_path / "slides", 3)
    explain(listed, out.parent / "slides.yaml", tmp_path / "out", trust_code=True, method="none", **BAGS)
    for path in listed.parent.glob("*.tif"):
        path.unlink()
    found = evidence_run(tmp_path / "out", trust_code=True, **QUICK).evidence
    assert found.worth_sorting
    assert (found.unit, found.shortcuts) == ("patch", [])
    assert "fewer than 6 slides" in found.learned
    assert "<figure>" not in (tmp_path / "out" / "evidence" / "report.html").read_text(encoding="utf-8")
    relevance = table_of(tmp_path / "out", "011.tif", "")["gradient_x_input_relevance_tumour"].to_numpy()
    places = parquet.read_table(tmp_path / "out" / "evidence" / "011.tif" / "places.parquet").to_pandas()
    np.testing.assert_allclose(places["contribution"], relevance[places["patch"]], rtol=1e-4, atol=1e-9)


def test_an_untrained_aggregator_has_no_evidence_worth_sorting(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from wsi_gradcam.cli.main import main

    model, listed = slide_model_file(tmp_path, of_nothing(5)), some_slides(archive, tmp_path / "slides", 6)
    explain(listed, model, tmp_path / "out", trust_code=True, method="none", **BAGS)
    assert main(["evidence", str(tmp_path / "out"), "--trust-code", *flags(QUICK), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["worth_sorting"], told["findings"]) == (False, [])
    assert "slides" in read(tmp_path / "out").learned


def test_a_kind_that_takes_the_place_of_another_adds_nothing() -> None:
    """Of three sites one has a kind that the others do not have: it adds to the evidence, or stands for other kinds."""
    spread = Spread(
        by="site",
        groups={"a": [4, 4], "b": [0, 4], "c": [0, 2]},
        share={"a": 0.5, "b": 0.0, "c": 0.0},
        density={"a": 0.2, "b": 0.0, "c": 0.0},
        p=0.001,
        p_adjusted=0.001,
        total={"a": 0.4, "b": 0.2, "c": 0.2},
        p_total=0.001,
    )
    assert adds(spread)
    assert not adds(spread.model_copy(update={"p_total": 0.2}))
    assert not adds(spread.model_copy(update={"total": {"a": 0.24, "b": 0.2, "c": 0.2}}))
    assert adds(spread.model_copy(update={"total": {}, "p_total": None}))  # of patch-level models


@pytest.mark.slow
def test_a_sample_finds_the_same(out: Path, tmp_path: Path) -> None:
    """Less than half of the patches are measured, more of those that contribute much; shares are of all."""
    copy = shutil.copytree(out, tmp_path / "copy", ignore=lambda _, names: [n for n in names if n == "evidence"])
    found, known = evidence_run(copy, trust_code=True, places=120, seed=1).evidence, read(out)
    assert found.places < 0.5 * known.places
    ((few,), (all_,)) = found.shortcuts, known.shortcuts
    assert few.share.value == pytest.approx(all_.share.value, rel=1e-5)
    assert few.area.value == pytest.approx(all_.area.value, rel=1e-9)


@pytest.mark.slow
def test_workers_find_the_same(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy", ignore=lambda _, names: [n for n in names if n == "evidence"])
    evidence_run(copy, trust_code=True, workers=1, **QUICK)
    assert read(copy) == read(out)


@pytest.mark.slow
def test_two_slide_level_models_are_compared(archive: Path, out: Path, tmp_path: Path) -> None:
    """The new model looks at markers, to which the old one is blind: for that nuclei look different at site south."""
    explain(archive, slide_model_file(tmp_path, of_nuclei(0)), tmp_path / "old", trust_code=True, **BAGS)
    blind = evidence_run(tmp_path / "old", trust_code=True, **QUICK).evidence
    assert blind.shortcuts == []
    (words,) = (one.words for one in blind.findings if one.kind == "uneven")
    assert words.endswith("it may be tissue that looks different there.")
    new = shutil.copytree(out, tmp_path / "new")
    found = evidence_run(new, trust_code=True, against=tmp_path / "old", overwrite=True, **QUICK).evidence
    assert found.against is not None
    assert found.against.slides == SLIDES
    (marker,) = found.shortcuts
    (row,) = (one for one in found.against.rows if one.cluster == marker.number)
    assert row.share.value is not None
    assert row.share_there.value is not None
    assert row.share.value > row.share_there.value


@pytest.mark.slow
def test_a_run_from_a_mean_baseline_is_audited_and_sorted(archive: Path, out: Path, tmp_path: Path) -> None:
    """Contributions are from the baseline on, and add up to the relevance that was stored."""
    settings = {**BAGS, "bag_method": "integrated_gradients", "bag_baseline": "mean", "method": "none"}
    explain(archive, out.parent / "slides.yaml", tmp_path / "out", trust_code=True, **settings)
    audit_run(tmp_path / "out", trust_code=True, only=["agreement"])
    evidence_run(tmp_path / "out", trust_code=True, **QUICK)
    relevance = table_of(tmp_path / "out", "000.tif", "")["integrated_gradients_relevance_tumour"].to_numpy()
    places = parquet.read_table(tmp_path / "out" / "evidence" / "000.tif" / "places.parquet").to_pandas()
    np.testing.assert_allclose(places["contribution"], relevance[places["patch"]], rtol=1e-4, atol=1e-8)
