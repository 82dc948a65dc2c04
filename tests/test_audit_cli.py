"""`wsi-gradcam audit`: exit codes, what is printed, comparisons with another run, annotations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.audits import explained, metrics_in, write_archive
from tests.cli_runs import Run, calling
from tests.runs import toy_spec
from wsi_gradcam.audit.schema import Metrics

ASK = ("--patches", "16", "--only", "faithfulness,saturation")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return calling(capsys)


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes most of the time of a small audit, and no test here looks at them."""
    monkeypatch.setattr("wsi_gradcam.audit.running.write_reports", lambda *given: None)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def made(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a model that sees markers, and of an untrained one; each explains all classes."""
    folder = tmp_path_factory.mktemp("made")
    explained(archive, folder / "marker", "marker")
    explained(archive, folder / "untrained", "pooled_linear", method="gradcam,hirescam")
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "marker", tmp_path / "marker"))


def test_verdicts_are_printed_and_the_report_is_named(run: Run, out: Path) -> None:
    code, printed, _ = run("audit", out, *ASK)
    assert code == 0
    assert "faithfulness (gradcam): " in printed
    assert "saturation (model): " in printed
    assert f"{out}/audit/report.html" in printed
    code, printed, _ = run("audit", out, *ASK, "--json")
    told = json.loads(printed)
    assert code == 0
    assert {verdict["question"] for verdict in told["verdicts"]} == {"faithfulness", "saturation"}
    assert {row["what"] for row in told["not_audited"]} == {"glass.tif", "cut.tif"}


def test_fail_on_ends_with_1_where_a_verdict_fails(run: Run, out: Path) -> None:
    """The constant logit of class `other` has no gradient: nothing can be shown where it is predicted."""
    ask = ("--patches", "16", "--only", "saturation", "--target", "other")
    code, printed, told = run("audit", out, *ask, "--fail-on", "saturation")
    assert "fails  saturation (model)" in printed
    assert code == 1
    assert "--fail-on: saturation (model) fails" in told
    assert run("audit", out, *ask, "--fail-on", "faithfulness")[0] == 0
    assert run("audit", out, *ask, "--fail-on", "any")[0] == 1
    code, _, told = run("audit", out, *ask, "--fail-on", "truth")
    assert code == 2
    assert "'truth' is not one of the audit's questions" in told


def test_mistakes_end_with_2(run: Run, out: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "none",), "does not exist or is empty"),
        ((out, "--only", "truth"), "not one of the audit's questions"),
        ((out, "--target", "liver"), "was not explained"),
        ((out, "--against", tmp_path / "none"), "does not exist"),
        ((out, "--against", out), "has no finished audit"),
    ):
        code, _, told = run("audit", *arguments)
        assert code == 2
        assert message in told


def test_two_runs_are_compared_on_the_same_patches(run: Run, out: Path, made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made / "untrained", tmp_path / "untrained"))
    ask = ("--patches", "24", "--only", "faithfulness,saturation", "--target", "marker")
    assert run("audit", out, *ask)[0] == 0
    assert run("audit", other, *ask, "--against", out)[0] == 0
    metrics = Metrics.model_validate_json((other / "audit" / "metrics.json").read_bytes())
    assert metrics.against is not None
    assert metrics.against.model == "marker"
    assert (metrics.against.patches, metrics.against.only_there) == (metrics.sample.patches, 0)
    (score,) = [row for row in metrics.against.comparisons if row.what == "score, mean"]
    assert (score.of, score.against) == ("gradcam, here", "gradcam, there")
    means = [
        next(
            row["value"]
            for row in metrics_in(folder)["estimates"]
            if (row["of"], row["what"]) == ("gradcam", "score, mean")
        )
        for folder in (other, out)
    ]
    assert score.difference == pytest.approx(means[0] - means[1], abs=1e-6)
    within = [row for row in metrics.comparisons if (row.of, row.against) == ("gradcam", "hirescam")]
    assert len(within) == 1


def test_runs_without_a_common_patch_cannot_be_compared(run: Run, out: Path, archive: Path, tmp_path: Path) -> None:
    assert run("audit", out, *ASK)[0] == 0
    other = explained(archive, tmp_path / "other", toy_spec("pooled_linear", mpp=0.4))
    code, _, told = run("audit", other, *ASK, "--against", out)
    assert code == 2
    assert "this run has none of the patches audited there" in told


def draw(folder: Path, squares: dict[str, list[tuple[int, int]]]) -> Path:
    """A folder with squares of a.tif by their class, each of 24 px round (y, x)."""
    features = [
        {
            "type": "Feature",
            "properties": {"classification": {"name": name}},
            "geometry": {
                "type": "Polygon",
                "coordinates": [[(x + dx, y + dy) for dy, dx in ((-12, -12), (-12, 12), (12, 12), (12, -12))]],
            },
        }
        for name, places in squares.items()
        for y, x in places
    ]
    folder.mkdir()
    (folder / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return folder


MARKERS = [(100, 100), (230, 230)]


def test_annotations_make_it_plausible(run: Run, out: Path, tmp_path: Path) -> None:
    """The markers of a.tif, drawn where they are: the marker model looks there, and its answer depends on them."""
    draw(tmp_path / "drawn", {"marker": MARKERS})
    ask = ("--patches", "60", "--only", "faithfulness,plausibility", "--target", "marker")
    assert run("audit", out, *ask, "--annotations", tmp_path / "drawn")[0] == 0
    metrics = Metrics.model_validate_json((out / "audit" / "metrics.json").read_bytes())
    assert any("partly annotated" in name for name in metrics.sample.strata)
    values = {(row.of, row.what): row.value for row in metrics.estimates if row.question == "plausibility"}
    assert values["gradcam", "auroc"] == pytest.approx(1.0)
    assert values["gradcam", "pointing_game"] == 1.0
    assert 0.2 < (values["random", "auroc"] or 0) < 0.8
    assert [verdict.outcome for verdict in metrics.verdicts if verdict.question == "plausibility"] == ["holds"]
    (square,) = metrics.quadrants
    assert square.plausible == "holds"
    assert square.faithful in ("holds", "unclear")  # the marker is what edges find, too
    assert 2 <= square.patches <= 10
    assert run("audit", out, *ask, "--annotations", tmp_path / "drawn", "--include", "liver", "--overwrite")[0] == 0
    metrics = Metrics.model_validate_json((out / "audit" / "metrics.json").read_bytes())
    assert "plausibility" in {row.what for row in metrics.not_tested}
    one = tmp_path / "drawn" / "a.geojson"
    code, _, told = run("audit", out, *ask, "--annotations", one, "--include", "liver", "--overwrite")
    assert code == 2
    assert "no annotation is called 'liver'" in told


def test_a_model_that_sees_a_part_of_the_patch(run: Run, archive: Path, tmp_path: Path) -> None:
    """Annotations are cut as the patch is: what lies beside the crop is not seen."""
    spec = toy_spec("marker", transform={"crop": 24})
    out = explained(archive, tmp_path / "cropped", spec)
    draw(tmp_path / "drawn", {"marker": MARKERS})
    ask = ("--patches", "60", "--only", "plausibility", "--target", "marker")
    assert run("audit", out, *ask, "--annotations", tmp_path / "drawn")[0] == 0
    values = {(row["of"], row["what"]): row["value"] for row in metrics_in(out)["estimates"]}
    assert values["gradcam", "auroc"] == pytest.approx(1.0)


def test_given_regions_are_suspects(run: Run, out: Path, tmp_path: Path) -> None:
    """Hiding the markers changes this model's answers; hiding plain tissue that was called a fold does not."""
    draw(tmp_path / "suspects", {"stamp/ruler": MARKERS, "fold": [(60, 280), (300, 60)]})
    ask = ("--patches", "200", "--only", "shortcuts", "--target", "marker", "--regions", tmp_path / "suspects")
    assert run("audit", out, *ask)[0] == 0
    metrics = Metrics.model_validate_json((out / "audit" / "metrics.json").read_bytes())
    moved = {row.of: row for row in metrics.comparisons if row.what == "change of the logit"}
    assert (moved["stamp-ruler (given)"].difference or 0) > 1
    assert abs(moved["fold (given)"].difference or 0) < 0.1
    assert metrics.run.regions == str(tmp_path / "suspects")
    draw(tmp_path / "others", {"fold": MARKERS})
    code, _, told = run("audit", out, *ask[:-1], tmp_path / "others")
    assert code == 2
    assert "other settings (regions: " in told
