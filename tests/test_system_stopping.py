"""Being told to stop; and what is tried again."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.runs import ROOT
from wsi_gradcam.errors import SlideAccessError, SlideNotFoundError, StoppedError, StoreError
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.run import failures
from wsi_gradcam.run.failures import is_transient, retried
from wsi_gradcam.run.types import Task
from wsi_gradcam.run.workload import EXPLAIN
from wsi_gradcam.system.isolation import Stopping

TASK = Task(EXPLAIN, SlideEntry("a.svs", "/a.svs"), (3,))


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: a signal that comes late would end the one that runs the tests."""
    prelude = (
        "import os, signal, time\n"
        "from wsi_gradcam.errors import StoppedError\n"
        "from wsi_gradcam.system import isolation as stopping\n"
        "stop = stopping.Stopping()\n"
    )
    command = [sys.executable, "-c", prelude + textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)


def test_the_first_signal_asks_those_who_look() -> None:
    done = run_alone("""
        before = signal.getsignal(signal.SIGTERM)
        with stop.handle_signals(), stop.graceful():
            os.kill(os.getpid(), signal.SIGTERM)
            began = time.monotonic()
            stop.wait(60)
            assert time.monotonic() - began < 30
            assert stop.requested()
            try:
                stop.check()
            except StoppedError as error:
                print(error)
        assert signal.getsignal(signal.SIGTERM) == before
        raise SystemExit(stop.exit_code)
    """)
    expected = "stopped by SIGTERM; run the same command again to continue; nothing finished is lost\n"
    assert (done.returncode, done.stdout) == (143, expected), done.stderr


@pytest.mark.parametrize(
    ("grace", "context"),
    [("stopping.GRACE_S", "stop.handle_signals()"), ("0.1", "stop.handle_signals(), stop.graceful()")],
)
def test_where_nobody_looks_or_it_takes_too_long_it_interrupts(grace: str, context: str) -> None:
    done = run_alone(f"""
        stopping.GRACE_S = {grace}
        try:
            with {context}:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(20)
        except KeyboardInterrupt:
            print("interrupted")
            raise SystemExit(stop.exit_code)
    """)
    assert (done.returncode, done.stdout) == (130, "interrupted\n"), done.stderr


def test_the_second_signal_ends_the_process_at_once() -> None:
    done = run_alone("""
        with stop.handle_signals(), stop.graceful():
            os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)  # one and its echo
            time.sleep(0.6); print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGINT); time.sleep(60)
    """)
    assert (done.returncode, done.stdout) == (143, "still here\n")
    assert "SIGTERM: finishing current tasks, at most 30 s; repeat to stop at once" in done.stderr


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (MemoryError(), True),
        (OSError(errno.EIO, "input/output error"), True),
        (OSError(errno.ESTALE, "stale file handle"), True),
        (SlideAccessError("503"), True),
        (caused(StoreError("cannot write"), OSError(errno.EIO, "")), True),
        (caused(StoreError("the disk is full"), OSError(errno.ENOSPC, "")), False),
        (SlideNotFoundError("gone"), False),
        (PermissionError(errno.EACCES, ""), False),
        (ValueError("bad"), False),
    ],
)
def test_what_may_pass_is_known_by_its_cause(error: Exception, expected: bool) -> None:
    assert is_transient(error) == expected


def test_work_is_tried_again_with_its_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(failures, "PAUSES_S", (0.0, 0.0))
    answers: list[Exception | int] = [ConnectionResetError("away"), TimeoutError("late"), 7]

    def work() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retried(work, TASK, lambda error, again: None) == 7
    assert caplog.messages == [
        "a.svs: explain 3: ConnectionResetError: away; trying again in 0 s (2 of 3)",
        "a.svs: explain 3: TimeoutError: late; trying again in 0 s (3 of 3)",
    ]
    answers += [ConnectionResetError("away")] * 3
    with pytest.raises(ConnectionResetError):
        retried(work, TASK, lambda error, again: None)
    answers += [ValueError("bad"), 8]
    with pytest.raises(ValueError, match="bad"):
        retried(work, TASK, lambda error, again: None)


def test_nothing_is_tried_again_once_told_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stop = Stopping()
    stop.signal = signal.SIGINT
    monkeypatch.setattr(failures, "STOP", stop)

    def work() -> None:
        raise ConnectionResetError

    with pytest.raises(StoppedError):
        retried(work, TASK, lambda error, again: None)
