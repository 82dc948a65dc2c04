"""`wsi-gradcam status`: what is said of a run, from the files that it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.cli_runs import Run, calling, only_error
from tests.runs import ROOT
from tests.test_run_report import status as told_by
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.run import status as module
from wsi_gradcam.run.claims import CLAIM, Holder, read_holder
from wsi_gradcam.run.status import (
    STATUS,
    WORKERS_NAMED,
    ObservedRun,
    RunState,
    observe,
    read_status,
    shown,
    write_status,
)
from wsi_gradcam.system.processes import this_process

HERE = this_process()
FAR = replace(HERE, host="node7", boot="another boot pid:[1]")
GONE = replace(HERE, start="1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PATIENCE_S": 0.4, "POLL_S": 0.02, "WATCHED_S": 0.02}.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return calling(capsys)


def leave(out: Path, process: Any = None, run_id: str = "mine", **changes: Any) -> Holder | None:
    """What a run has written, and its claim."""
    write_status(storage_path(out), told_by(run="mine", **changes))
    if process is None:
        return None
    holder = Holder(run_id, process, "2026-01-01T00:00:00Z", 3)
    (out / CLAIM).write_bytes(holder.to_bytes())
    return holder


def only(out: Path) -> ObservedRun:
    (state,) = observe(out)
    return state


def test_a_run_at_work_here(tmp_path: Path) -> None:
    leave(tmp_path, HERE, state=RunState.RUNNING, left_s=100.0, dashboard="http://host/status", failures=[])
    state = only(tmp_path)
    assert (state.state, state.is_well) == (RunState.RUNNING, True)
    text = shown(state)
    for part in (
        "running for 20 s (run mine on",
        "4.4 patches/s; time left about 1 min 40 s",
        "http://host/status",
        "node1:7: 4.4 patches/s, model busy 80%, waiting for pixels 10%, reading 45%",
    ):
        assert part in text
    assert "same command" not in text


def test_time_left_may_not_be_known(tmp_path: Path) -> None:
    leave(tmp_path, HERE, state=RunState.RUNNING, patches={"done": 0, "planned": 0, "expected": 0})
    assert "time left not known yet" in shown(only(tmp_path))
    assert "patches   0\n" in shown(only(tmp_path))


@pytest.mark.parametrize("process", [GONE, None])
def test_a_run_that_left_no_word_was_killed(tmp_path: Path, process: Any) -> None:
    leave(tmp_path, process, state=RunState.RUNNING)
    state = only(tmp_path)
    assert (state.state, state.is_well, state.holder) == (RunState.KILLED, False, None)
    assert "killed, or its machine was lost; after 20 s" in shown(state)
    assert "to continue, give the same command again: wsi-gradcam explain a --out b" in shown(state)


def test_a_run_elsewhere_lives_where_its_claim_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = leave(tmp_path, FAR, state=RunState.RUNNING)
    assert only(tmp_path).state == RunState.KILLED
    monkeypatch.setattr(module, "PATIENCE_S", 60.0)
    assert holder is not None
    changed = threading.Timer(0.1, lambda: (tmp_path / CLAIM).write_bytes(replace(holder, beat=4).to_bytes()))
    changed.start()
    assert only(tmp_path).state == RunState.RUNNING
    changed.join()
    removed = threading.Timer(0.1, (tmp_path / CLAIM).unlink)
    removed.start()
    assert only(tmp_path).state == RunState.KILLED  # it let go of its claim and has not said that it finished
    removed.join()


def test_a_run_that_starts_has_nothing_to_tell_yet(tmp_path: Path, run: Run) -> None:
    leave(tmp_path, HERE, run_id="another")
    state = only(tmp_path)
    assert (state.state, state.status, state.is_well) == (RunState.STARTING, None, True)
    assert shown(state).startswith(f"{tmp_path}: starting (run another on ")
    (tmp_path / STATUS).unlink()
    code, printed, _ = run("status", tmp_path, "--json")
    assert (code, json.loads(printed)["process"]["pid"]) == (0, HERE.pid)


def test_ends_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "run.html").touch()
    leave(tmp_path, state=RunState.STOPPED, cause="the disk is full")
    text = shown(only(tmp_path))
    assert "stopped: the disk is full; after 20 s" in text
    assert "to continue, give the same command again" in text
    assert "failed    7: no mpp; give --mpp 0.25 (c.svs ...)" in text
    assert "to retry failed slides: wsi-gradcam explain a --out b --retry-failed" in text
    assert f"report    {tmp_path}/run.html" in text
    leave(tmp_path, state=RunState.FINISHED, failures=[])
    assert only(tmp_path).is_well
    assert "again" not in shown(only(tmp_path))


def test_the_search_for_evidence_is_told_beside_the_run_and_alone(tmp_path: Path) -> None:
    leave(tmp_path, failures=[])
    (tmp_path / "evidence").mkdir()
    part = {"number": 2, "of": 3, "name": "sorting cells into clusters", "done": 120, "patches": 480}
    leave(tmp_path / "evidence", work="evidence", state=RunState.RUNNING, failures=[], part=part)
    holder = Holder("mine", HERE, "2026-01-01T00:00:00Z", 3, "evidence")
    (tmp_path / CLAIM).write_bytes(holder.to_bytes())
    both, alone = only(tmp_path), only(tmp_path / "evidence")
    assert both.evidence == alone
    assert (both.state, both.is_active, alone.state) == (RunState.FINISHED, True, RunState.RUNNING)
    line = "  pass      2 of 3, sorting cells into clusters: 120 of 480 patches"
    assert line in shown(both).split("\n")
    assert line in shown(alone).split("\n")
    assert both.to_json()["evidence"]["part"] == part
    (tmp_path / CLAIM).unlink()
    assert (only(tmp_path).is_well, only(tmp_path / "evidence").state) == (False, RunState.KILLED)


def test_many_workers_are_not_all_listed(tmp_path: Path) -> None:
    worker = asdict(told_by().numbers.workers["node1:7"])
    leave(tmp_path, HERE, state=RunState.RUNNING, workers={f"node{i}:1": worker for i in range(40)})
    lines = [line for line in shown(only(tmp_path)).splitlines() if "worker " in line]
    assert len(lines) == WORKERS_NAMED + 1
    assert lines[-1].endswith("and 24 more")


def test_watching_goes_on_until_the_end(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, HERE, state=RunState.RUNNING)
    steps = iter(
        [
            lambda: leave(tmp_path, HERE, state=RunState.RUNNING, patches_per_s=99.0),
            lambda: None,
            lambda: leave(tmp_path, state=RunState.FINISHED, failures=[]),
        ]
    )

    def sleep(_: float) -> None:
        step: Callable[[], Any] = next(steps)
        step()

    monkeypatch.setattr("wsi_gradcam.run.status.time.sleep", sleep)
    code, printed, _ = run("status", tmp_path, "--watch")
    assert code == 0
    assert printed.count("running for") == 2, "nothing new is not said again"
    assert "99.0 patches/s" in printed
    assert printed.count("finished after") == 1


@pytest.mark.parametrize("text", [None, "{", "[]", '{"run": "x"}'])
def test_where_no_run_has_been_nothing_is_invented(tmp_path: Path, run: Run, text: str | None) -> None:
    if text is not None:
        (tmp_path / STATUS).write_text(text)
    assert read_status(storage_path(tmp_path)) is None
    code, _, err = run("status", tmp_path)
    assert code == 2
    said = "does not exist or is empty" if text is None else "has no run.yaml, so it is not a result"
    assert only_error(err).startswith(f"{tmp_path}: {said}")
    assert read_holder(storage_path(tmp_path)) is None


def test_it_loads_nothing_heavy() -> None:
    """It is for login nodes."""
    code = (
        "import sys, wsi_gradcam.run.status;print([m for m in ('torch', 'zarr', 'numpy', 'dask') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
