"""Being told to stop: executors finish what is in flight, within a bound, and begin nothing new.

The command line installs the handlers; a library never does. Whoever does not look at `STOP` is interrupted as ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from wsi_gradcam.errors import StoppedError

GRACE_S = 30.0
SHOW_CURSOR = "\x1b[?25h"
LOOK_S = 0.2  # how often those who wait look
ECHO_S = 0.5  # a signal to all of a group comes twice: by itself, and passed on by the process that guards this one


class Stopping:
    """Whether this process was told to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._heeded = 0
        self._asked_at = 0.0
        self._overdue: threading.Timer | None = None
        self._over = False

    @property
    def exit_code(self) -> int:
        """Of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """While this lasts somebody looks at `asked` often: the first signal does not interrupt."""
        self._heeded += 1
        try:
            yield
        finally:
            self._heeded -= 1

    def asked(self) -> bool:
        """Whether no new work shall begin."""
        return self.signal is not None

    def check(self) -> None:
        """Go on, unless no new work shall begin.

        Raises:
            StoppedError: it shall not.
        """
        if self.asked():
            raise self.error()

    def error(self) -> StoppedError:
        """What a run that was stopped ends with."""
        cause = "" if self.signal is None else f" by {self.signal.name}"
        return StoppedError(f"stopped{cause}; run the same command again to go on, nothing finished is lost")

    def wait(self, seconds: float) -> None:
        """Sleep, but not when no new work shall begin."""
        until = time.monotonic() + seconds
        while not self.asked() and (left := until - time.monotonic()) > 0:
            time.sleep(min(LOOK_S, left))

    @contextmanager
    def at_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM while this lasts; to be called in the main thread."""
        before = {number: signal.signal(number, self._told) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            if self._overdue is not None:
                self._overdue.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks, or interrupts where nobody looks; the second ends this process at once."""
        if self._over:
            raise KeyboardInterrupt
        if self.signal is not None:
            if time.monotonic() - self._asked_at < ECHO_S:
                return
            if sys.stderr.isatty():
                os.write(2, SHOW_CURSOR.encode())  # progress bars had hidden it
            os._exit(self.exit_code)
        self.signal, self._asked_at = signal.Signals(number), time.monotonic()
        if not self._heeded:
            raise KeyboardInterrupt
        os.write(
            2,
            f"\n{self.signal.name}: finishing what is in work, at most {GRACE_S:g} s; again to end at once\n".encode(),
        )
        self._overdue = threading.Timer(GRACE_S, self._interrupt)
        self._overdue.daemon = True
        self._overdue.start()

    def _interrupt(self) -> None:
        """What is in work takes too long."""
        self._over = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


STOP = Stopping()
