"""Audits of explained archives: the same numbers on any executor and after any end; nothing is silently left out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.audits import QUICK, explained, metrics_in, pieces_in, reports_in, write_archive
from tests.runs import ROOT, SMALL, objects, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam import audit_run
from wsi_gradcam.api import explain
from wsi_gradcam.audit import stages
from wsi_gradcam.audit.plan import BATCH_SIZE, read_arrays, write_arrays
from wsi_gradcam.audit.schema import QUESTIONS, Metrics
from wsi_gradcam.audit.stages import spread
from wsi_gradcam.errors import ConfigError, ResultError, ResumeError, StoreError
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.heatmap import Enlarger, HeatmapStore
from wsi_gradcam.results.patch_store import PatchStore
from wsi_gradcam.results.run import open_result
from wsi_gradcam.run.claims import CLAIM, Claim
from wsi_gradcam.run.status import REPORT, RunState, observe, shown


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def run(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, explained; not audited."""
    return explained(archive, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def audited(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, audited in this process."""
    out = tmp_path_factory.mktemp("audited") / "out"
    shutil.copytree(run, out)
    audit_run(out, **QUICK)
    return out


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes most of the time of a small audit, and no test here looks at them, but those of `audited`."""
    monkeypatch.setattr("wsi_gradcam.audit.running.write_reports", lambda *given: None)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, which is not audited."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_all_questions_are_answered_with_numbers(audited: Path) -> None:
    metrics = Metrics.model_validate_json((audited / "audit" / "metrics.json").read_bytes())
    assert metrics.sample.patches >= 16
    assert metrics.sample.deep == metrics.sample.patches
    assert (metrics.sample.slides, metrics.sample.slides_of_run) == (2, 2)
    assert {verdict.question for verdict in metrics.verdicts} == set(QUESTIONS) - {"plausibility"}
    assert [row.what for row in metrics.not_tested if row.what == "plausibility"] == ["plausibility"]
    assert {row.what for row in metrics.not_audited} == {"glass.tif", "cut.tif"}
    assert {row.by for row in metrics.strata} == {"site", "label"}
    curves = {(row.of, row.what): row for row in metrics.curves}
    whole = curves["gradcam", "deletion, mean"].y[0]
    assert {curves[of, "deletion, mean"].y[0] for of in ("gradcam", "random", "edges", "probability")} == {whole}
    assert {row.of for row in metrics.curves if row.what == "deletion, mean"} == {
        "gradcam",
        "random",
        "edges",
        "constant",
        "centre",
        "probability",
    }
    scores = {row.of: row for row in metrics.estimates if row.what == "score, mean"}
    assert all(row.low <= row.value <= row.high for row in scores.values() if row.low and row.value and row.high)


def test_an_audit_leaves_status_log_and_report_as_a_run_does(run: Path, audited: Path) -> None:
    (seen,) = observe(audited / "audit")
    assert (seen.state, seen.is_well, seen.report) == (RunState.FINISHED, True, str(audited / "audit" / REPORT))
    assert seen.status is not None
    facts, numbers = seen.status.facts, seen.status.numbers
    assert (facts.work, numbers.slides.by_status) == ("audit", {"ok": 2})
    assert numbers.patches.done == numbers.patches.expected == metrics_in(audited)["sample"]["patches"]
    (worker,) = numbers.workers.values()
    assert 0 < worker.model <= 1
    assert worker.read_s > 0
    assert set(numbers.stages) == {"audit"}
    (log,) = (audited / "audit" / "log").iterdir()
    events = [json.loads(line)["event"] for line in log.read_bytes().splitlines()]
    assert events == ["run begun", "worker joined", "slide finished", "slide finished", "run ended"]
    assert "audited" in (audited / "audit" / REPORT).read_text(encoding="utf-8")
    assert not (audited / "audit" / CLAIM).exists()
    (both,) = observe(audited)  # the run and its audit
    assert (both.audit, both.is_well) == (seen, False)  # a slide of the run has failed
    assert shown(both).count("finished after") == 2
    assert both.to_json()["audit"]["work"] == "audit"
    (alone,) = observe(run)
    assert alone.audit is None


def test_two_audits_of_a_run_at_once_are_refused(copy: Path) -> None:
    with Claim(storage_path(copy / "audit"), "another", print), pytest.raises(ResumeError, match="run another on"):
        audit_run(copy, **QUICK)
    assert sorted(path.name for path in (copy / "audit").iterdir()) == []


def test_the_maps_are_those_of_the_run(audited: Path) -> None:
    differences = [row for row in metrics_in(audited)["estimates"] if row["what"] == "difference from the run's map"]
    assert [row["value"] < 1e-5 for row in differences] == [True]


def test_weights_stand_for_all_patches(audited: Path) -> None:
    sample = metrics_in(audited)["sample"]
    weights = [read_arrays(storage_path(path))["base/weight"].sum() for path in (audited / "audit").rglob("*.npz")]
    np.testing.assert_allclose(sum(weights), sample["patches_of_run"])


def test_workers_find_the_same(audited: Path, copy: Path) -> None:
    audit_run(copy, workers=2, **QUICK)
    assert pieces_in(copy) == pieces_in(audited)
    assert metrics_in(copy) == metrics_in(audited)


def test_a_killed_audit_goes_on(run: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask: dict[str, Any] = {"patches": 24, "seed": 3, "only": ["stability"]}
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    audit_run(whole, **ask)
    script = (
        "import os, signal\n"
        "from wsi_gradcam.audit import stages\n"
        "from wsi_gradcam import audit_run\n"
        "write, done = stages.write_arrays, []\n"
        "def dying(place, numbers):\n"
        "    if len(done) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done.append(write(place, numbers))\n"
        "stages.write_arrays = dying\n"
        f"audit_run({str(copy)!r}, trust_code=True, **{ask!r})\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, check=False
    )
    assert killed.returncode == -9
    assert len(pieces_in(copy)) == 2
    written: list[str] = []
    write = write_arrays

    def counted(place: Any, numbers: Any) -> None:
        written.append(str(place))
        write(place, numbers)

    monkeypatch.setattr(stages, "write_arrays", counted)
    audit_run(copy, **ask)
    assert len(written) == len(pieces_in(whole)) - 2 > 0
    assert pieces_in(copy) == pieces_in(whole)
    assert metrics_in(copy) == metrics_in(whole)
    written.clear()
    audit_run(copy, **ask)
    assert written == []


def test_another_audit_is_refused_and_replaced_on_demand(copy: Path) -> None:
    audit_run(copy, only=["saturation"], **QUICK)
    with pytest.raises(ResumeError, match=r"seed: 3 there, 4 now\); --overwrite replaces it"):
        audit_run(copy, only=["saturation"], patches=16, seed=4)
    audit_run(copy, only=["saturation"], patches=16, seed=4, overwrite=True)
    assert metrics_in(copy)["sample"]["seed"] == 4


def test_only_some_questions(copy: Path) -> None:
    outcome = audit_run(copy, only=["shortcuts", "saturation"], **QUICK)
    assert {row.question for row in outcome.metrics.estimates} == {"shortcuts", "saturation"}
    assert {row.what for row in outcome.metrics.not_tested if row.why == "not requested, see --only"} == {
        "faithfulness",
        "sanity",
        "stability",
        "locality",
        "plausibility",
    }
    names = {
        name.partition("/")[0] for path in (copy / "audit").rglob("*.npz") for name in read_arrays(storage_path(path))
    }
    assert names == {"base", "map", "leaky", "shown", "shortcuts", "saturation", "slide"}


def test_settings_that_make_no_sense(copy: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"only": ["truth"]}, "'truth' is not one of the audit's questions; expected some of faithfulness"),
        ({"patches": 0}, "patches is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"annotations": tmp_path / "none"}, "does not exist"),
        ({"include": ["x"]}, "give their file or folder as well"),
        ({"target": "lymph"}, "target 'lymph' was not explained; expected one of other, marker, predicted"),
        ({"annotations": tmp_path}, "choose one with --target"),
        ({"workers": 0}, "workers is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            audit_run(copy, **options)
    with pytest.raises(ResultError):
        audit_run(tmp_path / "nothing")


def test_another_model_is_refused(copy: Path) -> None:
    with pytest.raises(ResumeError, match="its results come from another model"):
        audit_run(copy, model=toy_spec("other_linear"), **QUICK)
    yaml = (copy / "run.yaml").read_text(encoding="utf-8")
    (copy / "run.yaml").write_text(
        yaml.replace("toy_models:pooled_linear", "toy_models:other_linear"), encoding="utf-8"
    )
    with pytest.raises(ResumeError, match="give the model that made them with --model"):
        audit_run(copy, **QUICK)
    assert not (copy / "audit").exists()
    outcome = audit_run(copy, model=toy_spec("pooled_linear"), only=["saturation"], **QUICK)
    assert outcome.failed == ()


def test_a_run_that_cannot_load_its_model_says_so(copy: Path) -> None:
    yaml = (copy / "run.yaml").read_text(encoding="utf-8")
    (copy / "run.yaml").write_text(yaml.replace("  spec:\n", "  spex:\n"), encoding="utf-8")
    with pytest.raises(ResultError, match="does not say how to load its model; give the model with --model"):
        audit_run(copy, **QUICK)


def test_a_slide_that_is_another_now(tmp_path: Path) -> None:
    """It cannot be audited; the others are, and it is named."""
    write_marker_slide(tmp_path / "a.tif", 200, 200, mpp=0.25, markers=[(60, 60)], marker_px=16)
    write_marker_slide(tmp_path / "b.tif", 200, 200, mpp=0.25, markers=[], marker_px=16, seed=1)
    explain([tmp_path / "a.tif", tmp_path / "b.tif"], toy_spec("pooled_linear"), tmp_path / "out", **SMALL)
    write_marker_slide(tmp_path / "b.tif", 200, 200, mpp=0.25, markers=[], marker_px=16, seed=2)
    outcome = audit_run(tmp_path / "out", only=["saturation"], **QUICK)
    assert [record.slide.id for record in outcome.failed] == ["b.tif"]
    assert ("b.tif", "not the file that was explained") in [
        (row.what, row.why.partition("; ")[0].rpartition(": ")[2]) for row in outcome.metrics.not_audited
    ]
    (tmp_path / "a.tif").unlink()
    with pytest.raises(ResultError, match="no slide could be audited"):
        audit_run(tmp_path / "out", only=["saturation"], seed=5, overwrite=True)


def test_a_damaged_piece_is_told(copy: Path) -> None:
    audit_run(copy, only=["saturation"], **QUICK)
    piece = next((copy / "audit").rglob("*.npz"))
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(StoreError, match="damaged; delete it and run the same audit again"):
        audit_run(copy, only=["saturation"], **QUICK)
    piece.unlink()
    audit_run(copy, only=["saturation"], **QUICK)


def test_pages_need_nothing_else(audited: Path) -> None:
    pages = reports_in(audited)
    assert set(pages) == {"report.html", "a.tif/report.html", "more/b.tif/report.html"}
    for page in pages.values():
        assert "<script" not in page
        assert 'src="http' not in page
        assert "url(http" not in page
        for link in ("<link", "@import", "<iframe", "<object"):
            assert link not in page
    assert 'href="./more/b.tif/report.html"' in pages["report.html"]
    assert 'href="../../report.html"' in pages["more/b.tif/report.html"]


def test_pieces_are_of_one_size(audited: Path) -> None:
    counts = [len(read_arrays(storage_path(path))["base/number"]) for path in (audited / "audit").rglob("*.npz")]
    assert max(counts) == BATCH_SIZE
    assert min(counts) >= 1


def test_an_audit_leaves_the_results_alone(run: Path, audited: Path) -> None:
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    after = {p.relative_to(audited): p.read_bytes() for p in audited.rglob("*") if p.is_file()}
    assert {name: data for name, data in after.items() if name.parts[0] != "audit"} == before


def test_overlapping_patches_leave_an_image_of_where_they_disagree(archive: Path, tmp_path: Path) -> None:
    """The same as from all patches at once, in heatmap units; 0 and not marked where one patch alone sees."""
    out = explained(archive, tmp_path, overlap=0.5)
    outcome = audit_run(out, only=["stability"], **QUICK)
    image = HeatmapStore(out / "audit" / "a.tif" / "spread.ome.zarr", read_only=True)
    assert [channel.label for channel in image.channels] == ["spread: other", "spread: marker"]
    slide = open_result(out)["a.tif"]
    assert image.shapes == slide.levels
    plan, store = slide.plan, PatchStore(slide.folder.cams, read_only=True)
    whole = Region(0, 0, *image.shapes[0])
    enlarger = Enlarger(plan.view[2:], (4, 4), plan.stride)
    _, expected, several = spread(enlarger, whole, store.yx(), store.cams(0, plan.patches, 1) * np.float32(16))
    np.testing.assert_allclose(image.read(0, 1, whole), expected, rtol=1e-5)
    np.testing.assert_array_equal(image.read_flags(0, whole) > 0, several)
    assert 0 < several.mean() < 1
    assert expected.max() > 0
    (row,) = [
        r for r in outcome.metrics.estimates if r.of == "marker" and r.what.startswith("disagreement of overlapping")
    ]
    assert row.value is not None
    assert row.value > 0
    before = {path: path.stat().st_mtime_ns for path in (out / "audit").rglob("*") if "spread" in str(path)}
    audit_run(out, only=["stability"], **QUICK)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_audit_in_an_object_store(archive: Path, copy: Path, s3_out: str) -> None:
    """The same numbers as on a disk, written below the run."""
    explain(archive / "list.csv", toy_spec("pooled_linear"), s3_out, **SMALL)
    ask: dict[str, Any] = {"patches": 16, "seed": 3, "only": ["saturation"]}
    outcome = audit_run(s3_out, **ask)
    assert str(outcome.out) == f"{s3_out}/audit"
    audit_run(copy, **ask)
    files = objects(s3_out)
    found = {name.removeprefix("audit/"): data for name, data in files.items() if name.endswith(".npz")}
    assert found == pieces_in(copy)
    assert json.loads(files["audit/metrics.json"]) | {"run": 0} == metrics_in(copy) | {"run": 0}
