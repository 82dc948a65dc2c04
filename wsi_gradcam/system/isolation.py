"""Supervision of the process that reads slides, which are untrusted: a decoder in C may crash the process.

`supervise` lets a child process do the work and waits for it. If the child is killed, another one continues without the
slide that was being processed. The waiting process imports nothing large.

It also handles graceful stops by signals: executors finish work in flight within a grace period, and begin nothing new.
Only the command line installs the handlers. Code that does not poll `STOP` is interrupted as usual.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

from wsi_gradcam.errors import SlideError, StoppedError, printable

# Otherwise, if a model or a machine crashes every process, slide after slide would be blamed for it.
MAX_CRASHES_IN_A_ROW = 10
MAX_OPEN = 2  # the current slide, and the next one while it is planned
PR_SET_PDEATHSIG = 1
SHOW_CURSOR = "\x1b[?25h"
GRACE_S = 30.0
POLL_S = 0.2
ECHO_S = 0.5  # a signal to a process group arrives twice: directly, and forwarded by the supervisor


@dataclass
class CrashLog:
    """The slides being processed here, and what is known from earlier processes of the same command that crashed.

    Slides are identified by their paths.

    Attributes:
        causes: for each slide that has crashed a process, the error message.
        finished_before: the slides that earlier processes have finished.
        one_at_a_time: whether only one slide may be open, so that another crash shows which one is to blame.
        descriptor: the file that this process logs to; None without a supervisor.
    """

    causes: dict[str, str] = field(default_factory=dict)
    finished_before: set[str] = field(default_factory=set)
    one_at_a_time: bool = False
    descriptor: int | None = None

    def opening(self, path: str) -> None:
        """Log that a slide is about to be opened.

        Raises:
            SlideError: it has crashed a process before.
        """
        if path in self.causes:
            raise SlideError(self.causes[path])
        self._log("opened", path)

    def finished(self, path: str) -> None:
        """Log that a slide is finished."""
        self._log("finished", path)

    def record_crash(self, events: Iterable[tuple[str, str]], cause: str) -> str:
        """Find the culprit from what a process logged before it crashed with `cause`; return a message to the user.

        The message is empty if no slide was being processed.
        """
        opened: dict[str, None] = {}  # a set, in the order in which slides were last opened
        for event, path in events:
            opened.pop(path, None)
            if event == "opened":
                opened[path] = None
            else:
                self.finished_before.add(path)
        suspects = list(opened)[-1 if self.one_at_a_time else -MAX_OPEN :]
        self.one_at_a_time = len(suspects) > 1
        if self.one_at_a_time:
            return (
                f"{cause} ended the process while {' and '.join(suspects)} were open; continuing with one slide at a "
                "time"
            )
        for path in suspects:
            self.causes[path] = (
                f"{path}: {cause} ended the process that worked on it; the file is damaged in a way that crashes a "
                "decoder, or memory ran out; try another --reader, or a smaller --batch-size"
            )
            return f"{self.causes[path]}; continuing without it"
        return ""

    def _log(self, event: str, path: str) -> None:
        if self.descriptor is not None:
            os.write(self.descriptor, f"{json.dumps([event, path])}\n".encode())


CRASHES = CrashLog()


def supervise(crashes: CrashLog = CRASHES) -> None:
    """Fork and return in the child, which does the work; the parent waits, and exits with its last child's status.

    Call this before there are threads. On systems without `fork`, or without waiting for signals, such as Windows and
    macOS, it returns at once, without supervision.
    """
    if sys.platform != "linux":
        return
    handled = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, the status of a child is lost
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    in_a_row = 0
    while True:
        with os.fdopen(os.memfd_create("crashes"), "rb") as log:
            parent, child = os.getpid(), os.fork()
            if not child:
                crashes.descriptor = os.dup(log.fileno())
                die_with(parent)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                return
            status = _wait_for(child, handled)
            log.seek(0)
            events = [tuple(json.loads(line)) for line in log]
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        if number is None or number in handled:  # it exited, or was told to
            _exit_as(status)
        in_a_row = 1 if any(event == "finished" for event, _ in events) else in_a_row + 1
        message = crashes.record_crash(events, signal.Signals(number).name)
        _print(message or f"{signal.Signals(number).name} ended the process while no slide was open")
        if not message or in_a_row > MAX_CRASHES_IN_A_ROW:
            _print("stopped; run the same command again to continue; nothing finished is lost")
            sys.exit(1)


def _wait_for(child: int, signals: set[signal.Signals]) -> int:
    """Return the exit status of a child; signals from other processes are forwarded to it."""
    while True:
        caught = signal.sigwaitinfo(signals)
        if caught.si_signo == signal.SIGCHLD:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
        elif caught.si_code <= 0:  # those from a terminal reach the child, too
            os.kill(child, caught.si_signo)


def die_with(parent: int) -> None:
    """Arrange for this process to be killed when its parent dies, so that two never do the same work."""
    import ctypes  # not for the waiting process

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # already
        os._exit(1)


def _exit_as(status: int) -> NoReturn:
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    sys.exit(128 + number)  # not reached if the signal can end a process


def _print(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)  # progress bars hide it
    print(printable(text), file=sys.stderr)


class Stopping:
    """A request to stop this process, and the signal that made it."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._graceful = 0
        self._requested_at = 0.0
        self._deadline: threading.Timer | None = None
        self._interrupted = False

    @property
    def exit_code(self) -> int:
        """The exit code of a process ended by the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """Promise to poll `requested` in this context, so that the first signal does not interrupt."""
        self._graceful += 1
        try:
            yield
        finally:
            self._graceful -= 1

    def requested(self) -> bool:
        """Return True if no new work should begin."""
        return self.signal is not None

    def check(self) -> None:
        """Raise if a stop was requested.

        Raises:
            StoppedError: no new work should begin.
        """
        if self.requested():
            raise self.error()

    def error(self) -> StoppedError:
        """Return the error that a stopped run ends with."""
        cause = "" if self.signal is None else f" by {self.signal.name}"
        return StoppedError(f"stopped{cause}; run the same command again to continue; nothing finished is lost")

    def wait(self, seconds: float) -> None:
        """Sleep, at most until a stop is requested."""
        until = time.monotonic() + seconds
        while not self.requested() and (left := until - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM in this context, which must be entered in the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            if self._deadline is not None:
                self._deadline.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Request a stop at the first signal, or interrupt code that does not poll; exit at once at the second."""
        if self._interrupted:
            raise KeyboardInterrupt
        if self.signal is not None:
            if time.monotonic() - self._requested_at < ECHO_S:
                return
            if sys.stderr.isatty():
                _tell(SHOW_CURSOR)  # progress bars had hidden it
            os._exit(self.exit_code)
        self.signal, self._requested_at = signal.Signals(number), time.monotonic()
        if not self._graceful:
            raise KeyboardInterrupt
        _tell(f"\n{self.signal.name}: finishing current tasks, at most {GRACE_S:g} s; repeat to stop at once\n")
        self._deadline = threading.Timer(GRACE_S, self._interrupt)
        self._deadline.daemon = True
        self._deadline.start()

    def _interrupt(self) -> None:
        """Interrupt the main thread after the grace period."""
        self._interrupted = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _tell(text: str) -> None:
    """Write to standard error from a signal handler, bypassing Python's streams, if anybody reads it."""
    with suppress(OSError):
        os.write(2, text.encode())


STOP = Stopping()
