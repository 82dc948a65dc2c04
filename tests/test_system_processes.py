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


def test_a_process_that_never_was_has_no_start() -> None:
    assert processes._start(2**22 + 1) == ""  # beyond the largest id of Linux


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_starts_are_those_of_claims_by_earlier_versions() -> None:
    """These wrote the 22nd field of proc_pid_stat(5)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert this_process().start == fields[19]


def test_systems_without_proc_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert this_process().boot == ""
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert this_process().alive() is None
