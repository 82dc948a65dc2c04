"""Graceful stops by signals: executors finish work in flight within a grace period, and begin nothing new.

Only the command line installs the handlers. Code that does not poll `STOP` is interrupted as usual.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from wsi_gradcam.errors import StoppedError

GRACE_S = 30.0
SHOW_CURSOR = "\x1b[?25h"
POLL_S = 0.2
ECHO_S = 0.5  # a signal to a process group arrives twice: directly, and forwarded by the supervising process


class Stopping:
    """The request to stop this process, and the signal that made it."""

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
        """Return True when no new work shall begin."""
        return self.signal is not None

    def check(self) -> None:
        """Raise if a stop was requested.

        Raises:
            StoppedError: no new work shall begin.
        """
        if self.requested():
            raise self.error()

    def error(self) -> StoppedError:
        """Return the error that a stopped run ends with."""
        cause = "" if self.signal is None else f" by {self.signal.name}"
        return StoppedError(f"stopped{cause}; run the same command again to go on, nothing finished is lost")

    def wait(self, seconds: float) -> None:
        """Sleep, at most until a stop is requested."""
        until = time.monotonic() + seconds
        while not self.requested() and (left := until - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM in this context; to be entered in the main thread."""
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
        _tell(f"\n{self.signal.name}: finishing what is in work, at most {GRACE_S:g} s; again to end at once\n")
        self._deadline = threading.Timer(GRACE_S, self._interrupt)
        self._deadline.daemon = True
        self._deadline.start()

    def _interrupt(self) -> None:
        """Interrupt the main thread after the grace period."""
        self._interrupted = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _tell(text: str) -> None:
    """Write to standard error from a handler, which no stream of Python's may be in the way of, if anybody reads it."""
    with suppress(OSError):
        os.write(2, text.encode())


STOP = Stopping()
