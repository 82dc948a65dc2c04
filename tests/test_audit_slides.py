"""`audit` of slide-level models: the slides of a run are asked, from the features that it has stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.feature_formats import MPP, trident
from tests.runs import contents
from tests.synthetic import MarkerSlide, write_gigapixel_slide, write_marker_slide
from tests.test_mil_given_features import ON_FEATURES, frame_of, write_aggregator
from tests.test_mil_runs import BAG, write_model
from wsi_gradcam import audit_run
from wsi_gradcam.api import explain, validate
from wsi_gradcam.audit.comparing import open_audit
from wsi_gradcam.audit.questions.bag_orders import BagFaithfulness
from wsi_gradcam.audit.schema import BAG_QUESTIONS
from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import ConfigError, ResumeError

NAMES = ("a.tif", "b.tif", "c.tif")
QUICK = ["faithfulness", "shortcuts", "plausibility"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[MarkerSlide]:
    """Three slides, all tissue, of 6 x 8 patches each."""
    folder = tmp_path_factory.mktemp("slides")
    places = [(60, 80), (100, 200), (200, 300)]
    return [
        write_marker_slide(folder / name, 360, 500, mpp=0.25, markers=[place], marker_px=16)
        for name, place in zip(NAMES, places, strict=True)
    ]


@pytest.fixture(scope="module")
def out(slides: list[MarkerSlide], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is audited."""
    folder = tmp_path_factory.mktemp("run")
    explain(slides[0].path.parent, write_model(folder / "model"), folder / "out", trust_code=True, **BAG)
    return folder / "out"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An annotation of the upper left of each slide."""
    folder = tmp_path_factory.mktemp("drawn")
    square = [[[0, 0], [200, 0], [200, 150], [0, 150], [0, 0]]]
    shape = {"type": "Feature", "properties": {"name": "fold"}, "geometry": {"type": "Polygon", "coordinates": square}}
    for name in NAMES:
        text = json.dumps({"type": "FeatureCollection", "features": [shape]})
        (folder / f"{Path(name).stem}.geojson").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def audited(out: Path, drawn: Path) -> dict[str, bytes]:
    """All files of the audit."""
    outcome = audit_run(
        out,
        trust_code=True,
        only=QUICK,
        target="tumour",
        annotations=drawn,
        regions=drawn,
        include=["fold"],
        overwrite=True,
    )
    assert not outcome.failed
    return contents(out / "audit")


def test_slides_are_asked_all_questions(out: Path, tmp_path: Path) -> None:
    """Without pixels but for the encoder's; nothing but annotations and ink is missing."""
    outcome = audit_run(out, trust_code=True, overwrite=True)
    metrics = outcome.metrics
    assert metrics.run.unit == "slide"
    assert metrics.run.methods == ["gradient_x_input", "one_removed", "single", "attention"]
    assert metrics.sample.slides == 3
    assert {row.question for row in metrics.estimates} == set(BAG_QUESTIONS) - {"shortcuts", "plausibility"}
    assert {row.method for row in metrics.estimates if row.measure == "staying_maps_encoder"} == set(
        metrics.run.methods
    )
    assert validate(out) == []
    for name in NAMES:
        assert "symmetric relevance gain" in (out / "audit" / name / "report.html").read_text(encoding="utf-8")


def test_regions_and_annotations_are_removed_from_bags(out: Path, audited: dict[str, bytes]) -> None:
    metrics = json.loads(audited["metrics.json"])
    assert metrics["run"]["unit"] == "slide"
    assert {row["suspect"] for row in metrics["verdicts"] if row["question"] == "shortcuts"} == {"fold (given)"}
    (area,) = (row for row in metrics["estimates"] if row["measure"] == "suspect_area")
    assert 0.05 < area["value"] < 0.4
    assert [row["of"] for row in metrics["verdicts"] if row["question"] == "plausibility"][-1] == "annotation"
    (drop,) = (row for row in metrics["comparisons"] if row["measure"] == "annotated_drop")
    (change,) = (row for row in metrics["comparisons"] if row["measure"] == "removal_change")
    assert drop["patches"] == change["patches"] == 3


def test_what_is_done_is_not_done_again_and_what_is_lost_is(out: Path, drawn: Path, audited: dict[str, bytes]) -> None:
    (piece,) = (out / "audit" / "b.tif" / "pieces").glob("*.npz")
    piece.unlink()
    (out / "audit" / "metrics.json").unlink()
    given = {"only": QUICK, "target": "tumour", "annotations": drawn, "regions": drawn, "include": ["fold"]}
    audit_run(out, trust_code=True, **given)  # type: ignore[arg-type]
    assert contents(out / "audit") == audited
    with pytest.raises(ResumeError, match="--overwrite"):
        audit_run(out, trust_code=True, seed=3, **given)  # type: ignore[arg-type]


@pytest.mark.slow
def test_workers_measure_the_same(out: Path, drawn: Path, audited: dict[str, bytes]) -> None:
    given = {"only": QUICK, "target": "tumour", "annotations": drawn, "regions": drawn, "include": ["fold"]}
    audit_run(out, trust_code=True, workers=2, overwrite=True, **given)  # type: ignore[arg-type]
    assert contents(out / "audit") == audited


def test_questions_of_patches_are_refused(out: Path) -> None:
    with pytest.raises(ConfigError, match="'locality' is not one of the audit's questions of slide-level models"):
        audit_run(out, trust_code=True, only=["locality"])


def test_the_command_says_what_was_found(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["audit", str(out), "--trust-code", "--only", "sufficiency,agreement", "--slides", "2", "--overwrite"]
    assert main([*asked, "--fail-on", "any"]) == 0
    text = capsys.readouterr().out
    assert "sufficiency (gradient_x_input)" in text
    metrics = json.loads((out / "audit" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["sample"]["slides"] == 2


def test_two_slide_level_models_are_compared_slide_by_slide(
    slides: list[MarkerSlide], out: Path, tmp_path: Path
) -> None:
    """One whose answers are the other's with the classes exchanged; the third slide is in one audit only."""
    asked: dict[str, Any] = {"trust_code": True, "only": ["faithfulness"], "target": "tumour"}
    here = audit_run(out, overwrite=True, **asked).metrics
    model = write_model(tmp_path / "model")
    layers = torch.load(tmp_path / "model" / "abmil.pt", weights_only=True)
    for name in ("classifier.weight", "classifier.bias"):
        layers[name] = layers[name].flip(0)
    torch.save(layers, tmp_path / "model" / "abmil.pt")
    explain([slide.path for slide in slides[:2]], model, tmp_path / "out", trust_code=True, **BAG)
    found = audit_run(tmp_path / "out", against=out, **asked).metrics
    assert found.against is not None
    assert (found.against.out, found.against.patches, found.against.only_there) == (str(out), 2, 1)
    assert found.sample.slides == 2
    rows = {row.method: row for row in found.against.comparisons if row.measure == "srg"}
    assert set(rows) == set(found.run.methods)
    largest = 0.0
    for method, row in rows.items():
        assert method is not None
        assert row.difference is not None
        largest = max(largest, abs(row.difference))
        now, before = _gains(tmp_path / "out", method), _gains(out, method)
        expected = np.mean([now[slide.path.name] - before[slide.path.name] for slide in slides[:2]])
        assert row.difference == pytest.approx(expected, abs=1e-9)
        assert (row.of, row.against, row.patches) == (f"{method}, here", f"{method}, there", 2)
    assert here.run.methods == found.run.methods
    assert largest > 1e-5


def _gains(out: Path, method: str) -> dict[str, float]:
    """The symmetric relevance gain of each slide, as it was measured."""
    data = open_audit(out).measurements(0)
    flips = data.of(BagFaithfulness)
    assert flips is not None
    return dict(zip(data.slides.tolist(), flips.srg(method).tolist(), strict=True))


def test_features_made_elsewhere_are_audited_without_a_pixel(tmp_path: Path) -> None:
    """By an aggregator alone, also where the model is given again and has an encoder."""
    write_gigapixel_slide(tmp_path / "a.tif", 9_000, 14_000, mpp=MPP, tissue_fraction=1.0, blobs=1)
    trident(tmp_path / "features", frame_of(tmp_path / "a.tif"))
    model = write_aggregator(tmp_path / "model")
    explain(tmp_path / "a.tif", model, tmp_path / "out", features=tmp_path / "features", **ON_FEATURES)
    outcome = audit_run(tmp_path / "out", only=["faithfulness", "sanity"], target="tumour", model=model)
    assert not outcome.failed
    (gain,) = (
        row
        for row in outcome.metrics.estimates
        if (row.measure, row.method) == ("srg", "gradient_x_input") and row.value is not None
    )
    assert gain.value is not None
    assert gain.value > 0
    assert "random weights of the encoder" in {row.what for row in outcome.metrics.not_tested}
