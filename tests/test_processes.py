"""Telling from outside whether a process is still there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from wsi_gradcam.system import processes
from wsi_gradcam.system.processes import Process, this_process


def of(pid: int) -> Process:
    """The process with an id, as it would tell of itself."""
    return replace(this_process(), pid=pid, start=processes._start(pid))


def test_this_process_is_there() -> None:
    mine = this_process()
    assert mine.pid == os.getpid()
    assert mine.alive() is True


def test_a_killed_process_is_gone_even_where_nobody_has_waited_for_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        told = of(child.pid)
        assert told.alive() is True
        child.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while told.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert told.alive() is False  # a zombie, until the next line
    finally:
        child.communicate()
    assert told.alive() is False


def test_an_id_that_is_used_again_is_another_process() -> None:
    assert replace(this_process(), start="1").alive() is False


def test_a_stopped_process_is_there() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        child.send_signal(signal.SIGSTOP)
        assert of(child.pid).alive() is True
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("boot", ["", "another boot pid:[1]"])
def test_processes_of_other_machines_and_boots_cannot_be_told(boot: str) -> None:
    assert replace(this_process(), boot=boot).alive() is None


def test_a_name_with_brackets_and_spaces_is_read_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [str(i) for i in range(4, 53)]  # as proc_pid_stat(5) counts them; 22 is the start
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(f"7 (a) S (b c) R {' '.join(fields)}\n")
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert processes._start(7) == "22"
    assert processes._start(8) == ""


def test_systems_without_proc_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert this_process().boot == ""
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert this_process().alive() is None
