"""Two runs on one OUT, real processes: one is refused or goes on where the other was killed; seen from outside."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli_runs import SMALL_FLAGS, Run, calling, only_error
from tests.runs import SMALL, differing, start, toy_file, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam.api import RunListener, explain
from wsi_gradcam.errors import ResumeError
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.validation import validate
from wsi_gradcam.run import claims
from wsi_gradcam.run.claims import CLAIM, read_holder
from wsi_gradcam.run.status import RunState, observe, shown
from wsi_gradcam.run.types import Performed, Task

PATIENCE_S = 120


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return calling(capsys)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A slide of 88 patches, 8 spans, 22 batches."""
    folder = tmp_path_factory.mktemp("slides")
    toy_file(folder, "slow_linear")
    return [write_marker_slide(folder / "a.tif", 500, 700, mpp=0.25, markers=[], marker_px=16).path]


@pytest.fixture(scope="module")
def undisturbed(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    explain(slides, toy_spec("slow_linear"), out, **SMALL)
    return out


def until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def spans(out: Path) -> list[Path]:
    return list(out.glob("a.tif/manifest/spans/*.json"))


def test_a_second_command_is_refused_while_the_first_works_and_sees_how_it_does(
    slides: list[Path], undisturbed: Path, tmp_path: Path, run: Run
) -> None:
    process = start(slides, "slow_linear", tmp_path, slowness_s=0.3)
    try:
        until(lambda: spans(tmp_path))
        code, _, err = run(
            "explain", *slides, "--model", slides[0].parent / "slow_linear.yaml", "--out", tmp_path, *SMALL_FLAGS
        )
        assert code == 2
        assert f"(process {process.pid}), since 20" in only_error(err)
        (state,) = observe(tmp_path)
        assert (state.state, state.is_well) == (RunState.RUNNING, True)
        assert state.to_json()["process"]["pid"] == process.pid
        code, printed, _ = run("status", tmp_path, "--json")
        told = json.loads(printed)
        assert (code, told["state"], told["slides"]["total"]) == (0, RunState.RUNNING, 1)
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
    assert differing(tmp_path, undisturbed) == []
    assert not (tmp_path / CLAIM).exists()
    assert [state.state for state in observe(tmp_path)] == [RunState.FINISHED]


def test_a_killed_run_is_followed_at_once(slides: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    process = start(slides, "slow_linear", tmp_path, slowness_s=0.3)
    until(lambda: spans(tmp_path))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (state,) = observe(tmp_path)
    assert (state.state, state.is_well) == (RunState.KILLED, False)
    assert "to continue, give the same command again" in shown(state)
    said: list[str] = []

    class Told(RunListener):
        def message(self, text: str) -> None:
            said.append(text)

    done = {path.stem for path in spans(tmp_path)}
    started = time.monotonic()
    explain(slides, toy_spec("slow_linear"), tmp_path, **SMALL, listener=Told())
    assert time.monotonic() - started < claims.SILENT_S
    assert done
    assert "ended without finishing" in said[0]
    assert f"process {process.pid}" in said[0]
    assert differing(tmp_path, undisturbed) == []
    assert validate(tmp_path) == []


def test_two_that_start_at_once_never_both_work(slides: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    processes = [start(slides, "slow_linear", tmp_path, slowness_s=0.2) for _ in range(2)]
    for process in processes:
        process.join(PATIENCE_S)
    # One is refused, unless the other was done before it began.
    codes = sorted(process.exitcode for process in processes)
    assert codes in ([0, 1], [0, 0])
    planned = [
        line
        for part in (tmp_path / "log").iterdir()
        for line in part.read_text().splitlines()
        if "slide planned" in line
    ]
    assert len(planned) == 1
    assert differing(tmp_path, undisturbed) == []


@pytest.mark.parametrize("workers", [None, 1])
def test_a_run_that_loses_its_claim_stops(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    out = storage_path(tmp_path)

    class Robbed(RunListener):
        spans = 0

        def task_done(self, task: Task, performed: Performed) -> None:
            if task.stage.name == "explain":
                self.spans += 1
                holder = read_holder(out)
                assert holder is not None
                data = holder.to_bytes().replace(holder.run_id.encode(), b"theirs")
                (out / CLAIM).write(data)
                time.sleep(0.5)

    listener = Robbed()
    with pytest.raises(ResumeError, match=r"taken over by run theirs on .*; this run stops, and the other continues"):
        explain(slides, toy_spec("slow_linear"), tmp_path, **SMALL, workers=workers, listener=listener)
    assert listener.spans == 1
    holder = read_holder(out)
    assert holder is not None
    assert holder.run_id == "theirs"
    told = json.loads((tmp_path / "status.json").read_bytes())
    assert told["state"] == RunState.RUNNING, "what stands there belongs to the other"
    assert not (tmp_path / "run.html").exists()
    log = "".join(part.read_text() for part in (tmp_path / "log").iterdir())
    assert '"event": "run ended"' in log
