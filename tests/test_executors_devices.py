"""A GPU that fails ends its process and costs no slide; one with little memory explains less at once, and says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.runs import SMALL, command, differing, flags, rows_of, toy_file, toy_spec
from tests.synthetic import write_marker_slide
from tests.toy_models import FAILED, LOADS, POISON
from wsi_gradcam.api import RunListener, explain
from wsi_gradcam.cam.facts import Choice
from wsi_gradcam.errors import DeviceError, WorkerError
from wsi_gradcam.executors.dask.plugins import ExaminedModel
from wsi_gradcam.run.examining import examine_model
from wsi_gradcam.run.plan import plan_run
from wsi_gradcam.run.settings import make_settings


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides, one of them with green in it."""
    folder = tmp_path_factory.mktemp("slides")
    write_marker_slide(folder / "a.tif", 500, 640, mpp=0.25, markers=[(330, 330)], marker_px=16)
    write_marker_slide(folder / "b.tif", 390, 500, mpp=0.25, markers=[], marker_px=16, seed=1)
    return folder


@pytest.fixture(scope="module")
def expected(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their results, where no device fails."""
    out = tmp_path_factory.mktemp("expected")
    explain(slides, toy_spec("faulty"), out, **SMALL)
    return out


class Notes(RunListener):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def message(self, text: str) -> None:
        self.told.append(text)


def failed_rows(out: Path) -> list[dict[str, str]]:
    rows = rows_of(out) if (out / "slides.csv").exists() else {}
    return [row for row in rows.values() if row["status"] == "failed"]


def logged(out: Path) -> str:
    return "".join(part.read_text() for part in sorted((out / "log").glob("*.jsonl")))


def test_the_process_of_a_command_ends_and_the_same_command_goes_on(
    slides: Path, expected: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", toy_file(tmp_path, "faulty")
    arguments: list[str | Path] = ["explain", slides, "--model", model, "--out", out, *flags(SMALL)]
    failed = command(*arguments, **{POISON: str(tmp_path / "poison")})
    assert failed.returncode == 1
    assert "the GPU has failed, and this process can no longer use it" in failed.stderr
    assert "run the same command again; nothing finished is lost" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not failed_rows(out)
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    again = command(*arguments, **{POISON: str(tmp_path / "poison")})
    assert again.returncode == 0, again.stderr
    assert differing(out, expected, model_moved=True) == []


def test_python_code_gets_an_error_that_says_it(
    slides: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POISON, str(tmp_path / "poison"))
    with pytest.raises(DeviceError, match="illegal memory access"):
        explain(slides, toy_spec("faulty"), tmp_path / "out", **SMALL)
    FAILED.clear()  # as in another process
    outcome = explain(slides, toy_spec("faulty"), tmp_path / "out", **SMALL)
    assert not outcome.failed
    assert differing(tmp_path / "out", expected) == []


def test_a_worker_whose_gpu_fails_is_replaced_and_costs_no_slide(
    slides: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POISON, str(tmp_path / "poison"))
    outcome = explain(slides, toy_spec("faulty"), tmp_path / "out", **SMALL, workers=2)
    assert (tmp_path / "poison").exists()
    assert not outcome.failed
    assert differing(tmp_path / "out", expected) == []
    assert "the GPU of worker " in logged(tmp_path / "out")
    assert "an illegal memory access" in logged(tmp_path / "out")


@pytest.mark.slow
def test_a_gpu_that_fails_while_the_model_is_loaded_is_no_end(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POISON, str(tmp_path / "poison"))
    outcome = explain(slides, toy_spec("faulty_at_once"), tmp_path / "out", **SMALL, workers=2)
    assert (tmp_path / "poison").exists()
    assert not outcome.failed


def test_a_task_on_which_every_gpu_fails_ends_the_run(
    slides: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POISON, "always")
    with pytest.raises(WorkerError, match=r"a\.tif: the GPU failed in one worker after another on 'explain \d+' alone"):
        explain(slides, toy_spec("faulty"), tmp_path / "out", **SMALL, workers=2)
    assert not failed_rows(tmp_path / "out")
    monkeypatch.delenv(POISON)
    explain(slides, toy_spec("faulty"), tmp_path / "out", **SMALL)
    assert differing(tmp_path / "out", expected) == []


def test_a_small_memory_is_told_once_and_changes_no_result(slides: Path, expected: Path, tmp_path: Path) -> None:
    notes = Notes()
    outcome = explain(slides, toy_spec("cramped"), tmp_path, **SMALL, listener=notes)
    assert not outcome.failed
    (told,) = [text for text in notes.told if "has too little memory for a whole batch" in text]
    assert told.endswith("has too little memory for a whole batch; from now on it explains 2 patches at once")
    assert logged(tmp_path).count("has too little memory for a whole batch") == 1
    (worker,) = json.loads((tmp_path / "status.json").read_text())["workers"].values()
    assert worker["at_once"] == 2
    assert "2 patches were explained at once there" in (tmp_path / "run.html").read_text()
    for name in ("a.tif", "b.tif"):
        found, wanted = (zarr.open_group(out / name / "cams.zarr", mode="r") for out in (tmp_path, expected))
        for key in wanted:
            np.testing.assert_allclose(np.asarray(found[key]), np.asarray(wanted[key]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_worker_loads_the_model_once(
    workers: int, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them examines it before the run, and that is the one it explains with."""
    monkeypatch.setenv(LOADS, str(tmp_path / "loads"))
    outcome = explain(slides, toy_spec("counted"), tmp_path / "out", **SMALL, workers=workers)
    assert not outcome.failed
    processes = (tmp_path / "loads").read_text().split()
    assert len(processes) == len(set(processes)) <= workers


def test_another_model_than_the_runs_is_loaded_anew(slides: Path, tmp_path: Path) -> None:
    settings = make_settings(**SMALL)
    spec, other = toy_spec("pooled_linear"), toy_spec("other_linear")
    explainer = examine_model(spec, settings, [])
    plan = plan_run(tmp_path, spec, explainer.facts, settings)
    kept = ExaminedModel()
    assert kept.take(plan) is None
    kept.keep(explainer, "cpu")
    assert kept.take(plan) is explainer
    assert kept.take(plan) is None  # memory is not held for runs that do not come
    kept.keep(examine_model(other, settings, []), "cpu")
    assert kept.take(plan) is None
    kept.keep(explainer, "cuda:1")
    assert kept.take(plan) is None


def test_what_another_device_or_engine_made_is_never_mixed_in(tmp_path: Path) -> None:
    """Their last bits differ."""
    settings = make_settings(**SMALL)
    spec = toy_spec("pooled_linear")
    facts = examine_model(spec, settings, []).facts
    digests = {
        plan_run(
            tmp_path, spec, replace(facts, choice=Choice(engine, precision)), make_settings(**{**SMALL, **where})
        ).digest()
        for engine in ("eager", "compile", "cudagraphs", "openvino")
        for precision in ("float32", "tf32", "bfloat16", "float16")
        for where in ({"device": "cpu"}, {"device": "cuda"}, {"device": "mps"})
    }
    assert len(digests) == 4 * 4 * 3
    little = replace(facts, batch_size=2)
    assert plan_run(tmp_path, spec, little, settings).digest() not in digests
