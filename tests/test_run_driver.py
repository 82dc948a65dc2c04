"""What a run leaves of itself: its log, its status, its report; and how its end is told."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cli_runs import Run, calling, write_inputs
from tests.runs import SMALL, flags, toy_spec
from tests.synthetic import strip_mpp
from wsi_gradcam.api import RunListener, explain
from wsi_gradcam.errors import SlideAccessError, SlideReadError, StoreError
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.run import driver
from wsi_gradcam.run.claims import CLAIM
from wsi_gradcam.run.examining import examine_model
from wsi_gradcam.run.failures import attempt_digest
from wsi_gradcam.run.plan import plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.run.status import REPORT, observe, shown
from wsi_gradcam.run.types import Performed, SlideRecord, Task
from wsi_gradcam.run.workload import STITCH
from wsi_gradcam.system.isolation import CRASHES

MODEL = toy_spec("pooled_linear")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of 56 and 20 patches, and one that is none."""
    folder = write_inputs(tmp_path_factory.mktemp("made"))
    (folder / "slides" / "c.tif").write_text("no slide", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(made: Path) -> Path:
    out = made / "out"
    explain(made / "slides", MODEL, out, **SMALL)
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return calling(capsys)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted((out / "log").iterdir()) for line in part.read_bytes().splitlines()]


def test_the_log_tells_a_run_from_beginning_to_end(made: Path, finished: Path) -> None:
    lines = log_of(finished)
    assert len({line["run"] for line in lines}) == 1
    assert [line["event"] for line in lines] == [
        "run begun",
        "worker joined",
        "slide planned",
        "slide finished",
        "slide planned",
        "slide finished",
        "task failed",
        "slide failed",
        "run ended",
    ]
    first, last = lines[0], lines[-1]
    assert first["slides"] == 3
    assert first["versions"]["torch"]
    assert first["settings"]["batch_size"] == 4
    a = next(line for line in lines if line["event"] == "slide finished")
    assert (a["slide"], a["status"], a["patches"], a["tasks"]) == ("a.tif", "ok", 56, 1 + 5 + 1 + 1)
    assert set(a["seconds_by_stage"]) == {"plan", "explain", "stitch", "finish"}
    assert 0 < sum(a["seconds_by_stage"].values()) <= a["seconds"] * 1.05 + 0.05
    failed = [line for line in lines if line["level"] == "error"]
    assert [(line["event"], line["slide"]) for line in failed] == [("task failed", "c.tif"), ("slide failed", "c.tif")]
    assert (failed[0]["stage"], failed[0]["index"]) == ("plan", [])
    assert failed[0]["cause"] == failed[1]["cause"]
    assert failed[0]["cause"].startswith(str(made / "slides" / "c.tif"))
    assert (last["state"], last["slides"]["ok"], last["slides"]["failed"]) == ("finished", 2, 1)
    assert last["patches"]["done"] == 76
    assert not (finished / CLAIM).exists()


def test_all_tasks_are_told_when_asked(made: Path, tmp_path: Path) -> None:
    explain(made / "slides" / "b.tif", MODEL, tmp_path, **SMALL, log_tasks=True)
    tasks = [line for line in log_of(tmp_path) if line["event"] == "task done"]
    assert [(line["stage"], line["index"]) for line in tasks] == [
        ("explain", [0]),
        ("explain", [1]),
        ("stitch", [0]),
        ("finish", []),
    ]
    assert [line["patches"] for line in tasks[:2]] == [12, 8]
    for line in tasks[:2]:
        assert 0 < line["model_s"] + line["waited_s"] <= line["seconds"]
        assert line["read_s"] > 0


def test_slides_that_had_ended_are_counted_and_not_listed(made: Path, finished: Path, tmp_path: Path) -> None:
    explain(made / "slides" / "b.tif", MODEL, tmp_path, **SMALL)
    before = len(log_of(tmp_path))
    explain(made / "slides" / "b.tif", MODEL, tmp_path, **SMALL)
    lines = log_of(tmp_path)[before:]
    assert [line["event"] for line in lines] == ["run begun", "worker joined", "run ended"]
    assert lines[-1]["slides"] == {"total": 1, "done": 1, "skipped": 1, "ok": 1}


def test_the_status_of_an_end(finished: Path, run: Run) -> None:
    code, printed, _ = run("status", finished)
    assert code == 1  # a slide has failed
    for part in (
        "finished after",
        "3 of 3 ended",
        "2 ok",
        "1 failed",
        "76 of about",
        "c.tif",
        "--retry-failed",
        REPORT,
    ):
        assert part in printed
    code, printed, _ = run("status", finished, "--json", "--watch")
    told = json.loads(printed)
    assert told["state"] == "finished"
    assert told["patches"] == {"done": 76, "planned": 76, "expected": 76, "encoded": 0}
    assert told["left_s"] == 0
    assert sum(told["throughput"]["patches"]) == 76
    assert set(told["stages"]) == {"plan", "explain", "stitch", "finish"}
    (worker,) = told["workers"].values()
    assert 0 < worker["model"] <= 1


def test_there_is_a_report(finished: Path) -> None:
    page = (finished / REPORT).read_text(encoding="utf-8")
    assert 'href="./a.tif/overview.png"' in page
    assert (finished / "a.tif" / "overview.png").exists()


@pytest.mark.parametrize(
    ("error", "cause"), [(KeyboardInterrupt(), "interrupted"), (StoreError("the disk is full"), "the disk is full")]
)
def test_a_run_that_stops_says_why(made: Path, tmp_path: Path, error: BaseException, cause: str) -> None:
    class Stops(RunListener):
        def slide_done(self, record: SlideRecord) -> None:
            raise error

    with pytest.raises(type(error)):
        explain(made / "slides", MODEL, tmp_path, **SMALL, listener=Stops())
    (state,) = observe(tmp_path)
    assert state.status is not None
    assert (state.state, state.status.cause, state.is_well) == ("stopped", cause, False)
    assert f"stopped: {cause}; after" in shown(state)
    assert "give the same command again" in shown(state)
    last = log_of(tmp_path)[-1]
    assert (last["event"], last["state"], last["level"]) == ("run ended", "stopped", "error")
    assert f"stopped: {cause}" in (tmp_path / REPORT).read_text(encoding="utf-8")
    assert not (tmp_path / CLAIM).exists()


def test_trouble_with_what_a_run_tells_stops_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remarks: list[str] = []
    real = LocalPath.write

    def refuse(place: LocalPath, data: bytes) -> None:
        if place.name in ("status.json", "run.html") or place.path.parent.name == "log":
            raise StoreError("no")
        real(place, data)

    class Told(RunListener):
        def task_done(self, task: Task, performed: Performed) -> None:
            session._renew()

        def message(self, text: str) -> None:
            remarks.append(text)

    session: driver.RunSession
    begin = driver.RunSession.begin

    def noted(self: driver.RunSession, *arguments: Any) -> None:
        nonlocal session
        session = self
        begin(self, *arguments)

    monkeypatch.setattr(driver.RunSession, "begin", noted)
    monkeypatch.setattr(LocalPath, "write", refuse)
    outcome = explain(made / "slides" / "b.tif", MODEL, tmp_path, **SMALL, listener=Told())
    assert [record.status for record in outcome.records] == ["ok"]
    assert remarks == ["the status of the run cannot be written: no", "the run's report cannot be written: no"]


def test_warnings_are_in_the_log_and_seen_as_before(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Warns(RunListener):
        def slide_done(self, record: SlideRecord) -> None:
            logging.getLogger("wsi_gradcam").warning("mind the %s", "gap")

    seen: list[str] = []
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of the tests
    monkeypatch.setattr(logging.lastResort, "handle", lambda record: seen.append(record.getMessage()))
    explain(made / "slides" / "b.tif", MODEL, tmp_path, **SMALL, listener=Warns())
    assert [(line["level"], line["text"]) for line in log_of(tmp_path) if line["event"] == "warned"] == [
        ("warning", "mind the gap")
    ]
    assert seen == ["mind the gap"]
    assert logging.getLogger("wsi_gradcam").handlers == []


def test_attempts_that_failed_are_told(tmp_path: Path) -> None:
    """As a cluster makes them; here by hand."""
    heard: list[bool] = []

    class Told(RunListener):
        def task_failed(self, task: Task, performed: Performed) -> None:
            heard.append(performed.again)

    told = driver.RunSession(storage_path(tmp_path), Told(), dict)
    task = Task(STITCH, SlideEntry("a.svs", "/a.svs"), (3,))
    told._task_ended(task, Performed(None, 0.5, "w"))
    told._task_ended(task, Performed(None, worker="w", error="died", again=True))
    told._task_ended(task, Performed(None, worker="w", error="died"))
    told.slide_done(SlideRecord(task.slide, SlideStatus.FAILED, "died", 0, 0, 1.0))
    told._log.flush()
    lines = log_of(tmp_path)
    assert Counter(line["event"] for line in lines) == Counter(
        ["worker joined", "task retried", "task failed", "slide failed"]
    )
    assert next(line for line in lines if line["event"] == "slide failed")["retries"] == 1
    assert heard == [True, False]


# --- what failed before ----------------------------------------------------------------------------------------------


class Planned(RunListener):
    """Which slides were worked on, and what was remarked."""

    def __init__(self) -> None:
        self.slides: list[str] = []
        self.remarks: list[str] = []

    def task_done(self, task: Task, performed: Performed) -> None:
        self.slides += [task.slide.id] * (task.stage.name == "plan")

    def task_failed(self, task: Task, performed: Performed) -> None:
        self.slides.append(task.slide.id)

    def message(self, text: str) -> None:
        self.remarks.append(text)


def tried(slides: Path, out: Path, **options: Any) -> tuple[list[str], list[str]]:
    """Slides that a run works on, and those that have failed at its end."""
    listener = Planned()
    outcome = explain(slides, MODEL, out, **{**SMALL, **options}, listener=listener)
    if len(listener.slides) < len(outcome.records):
        assert any("--retry-failed" in remark for remark in listener.remarks)
    return sorted(listener.slides), sorted(record.slide.id for record in outcome.failed)


def test_what_failed_for_its_own_reason_is_not_tried_again_unless_asked(made: Path, tmp_path: Path, run: Run) -> None:
    slides, out = made / "slides", tmp_path / "out"
    every = ["a.tif", "b.tif", "c.tif"]
    assert tried(slides, out) == (every, ["c.tif"])
    before = (out / "slides.csv").read_bytes()
    assert tried(slides, out) == (["a.tif", "b.tif"], ["c.tif"])
    assert (out / "slides.csv").read_bytes() == before
    assert tried(slides, out, reader_threads=3) == (["a.tif", "b.tif"], ["c.tif"])
    assert tried(slides, out, retry_failed=True) == (every, ["c.tif"])
    assert tried(slides, out, max_unreadable=0.5) == (every, ["c.tif"])
    arguments = ("explain", slides, "--model", made / "pooled_linear.yaml", "--out", out, "--max-unreadable", "0.5")
    code, _, err = run(*arguments, *flags(SMALL))
    assert code == 1
    assert "1 of them failed before and were not retried; use --retry-failed to retry them" in err
    assert "not retried: 1 slide failed before; use --retry-failed to retry" in err
    assert "[3/3] c.tif" not in err
    code, _, err = run(*arguments, *flags(SMALL), "--retry-failed")
    assert (code, "not retried" in err) == (1, False)
    assert "[3/3] c.tif: failed" in err
    assert tried(slides, out, overwrite=True) == (every, ["c.tif"])


def test_a_file_that_was_mended_is_tried_again(made: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    slide = tmp_path / "slides" / "b.tif"
    slide.write_text("no slide", encoding="utf-8")
    for _ in range(2):
        _, failed = tried(tmp_path / "slides", tmp_path / "out")
        assert failed == ["b.tif"]
    slide.write_bytes((made / "slides" / "b.tif").read_bytes())
    assert tried(tmp_path / "slides", tmp_path / "out") == (["b.tif"], [])


def test_a_missing_mpp_is_mended_by_a_setting(made: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    strip_mpp(made / "slides" / "b.tif", tmp_path / "slides" / "b.tif")
    assert tried(tmp_path / "slides", tmp_path / "out") == (["b.tif"], ["b.tif"])
    assert tried(tmp_path / "slides", tmp_path / "out") == ([], ["b.tif"])
    assert tried(tmp_path / "slides", tmp_path / "out", mpp=(0.25, 0.25)) == (["b.tif"], [])


def test_unreadable_patches_are_read_again_when_asked(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise SlideReadError("the disk stumbles")

    slide = made / "slides" / "b.tif"
    with monkeypatch.context() as patch:
        patch.setattr("wsi_gradcam.slides.patch_reader.read_region", broken)
        assert tried(slide, tmp_path) == (["b.tif"], ["b.tif"])
    assert tried(slide, tmp_path) == ([], ["b.tif"])
    assert tried(slide, tmp_path, retry_failed=True) == (["b.tif"], [])
    assert tried(slide, tmp_path, retry_failed=True) == (["b.tif"], [])  # nothing is left to retry


def test_causes_that_pass_by_themselves_are_tried_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise SlideAccessError("the server does not answer")

    with monkeypatch.context() as patch:
        patch.setattr("wsi_gradcam.run.failures.PAUSES_S", ())  # within a run it is tried again as well
        patch.setattr("wsi_gradcam.slides.patch_reader.open_slide", away)
        assert tried(made / "slides" / "b.tif", tmp_path) == (["b.tif"], ["b.tif"])
    assert tried(made / "slides" / "b.tif", tmp_path) == (["b.tif"], [])


def test_what_a_process_has_tried_before_it_died_is_not_retried_by_the_next(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = made / "slides"
    assert tried(slides, tmp_path, retry_failed=True)[1] == ["c.tif"]
    monkeypatch.setattr(CRASHES, "finished_before", {str(slides / "c.tif")})
    assert tried(slides, tmp_path, retry_failed=True) == (["a.tif", "b.tif"], ["c.tif"])


def test_validate_tells_of_slides_that_failed(finished: Path, run: Run) -> None:
    code, printed, err = run("validate", finished)
    assert code == 0
    assert printed.splitlines() == [
        f"{finished}: valid",
        "1 slide of the run failed and left no results to check: c.tif; slides.csv says why",
    ]
    code, printed, err = run("validate", finished, "--json")
    assert (code, json.loads(printed)) == (0, [])
    assert "1 slide of the run failed" in err


def test_an_attempt_depends_on_the_file_and_on_what_is_told_of_it(made: Path) -> None:
    run = plan_run(
        storage_path(made), MODEL, examine_model(MODEL, make_settings(**SMALL), []).facts, make_settings(**SMALL)
    )
    local = SlideEntry("b.tif", str(made / "slides" / "b.tif"))
    told = [
        local,
        replace(local, mpp=(0.3, 0.3)),
        replace(local, path=str(made / "slides" / "a.tif")),
        replace(local, path=str(made / "gone.tif")),
        replace(local, path="https://host/b.tif"),
        replace(local, path="https://host/b.tif", url="https://host/b.tif?signature=new"),
    ]
    digests = [attempt_digest(entry, run) for entry in told]
    assert digests == [attempt_digest(entry, run) for entry in told]
    assert len(set(digests)) == len(told)
