"""The part that recipes for clusters share: `wsi-gradcam explain` in a separate process, beside the scheduler."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ENDING_S = 60  # how long `explain` may take to end when told to: it gives workers 30 s
TENDED_S = 0.5  # how often a recipe checks what it started


class Stops:
    """The handling of Ctrl-C, SIGTERM and a closed terminal, from the beginning of a recipe to its end.

    Before `explain` runs, they end the recipe, with 128 + the number of the signal. While it is running, they are
    passed on to it, so that it ends in its own time. Afterwards, while jobs are being cancelled, they are ignored.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.signal = 0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals in this context, in the main thread."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as after nohup
        before = {number: signal.signal(number, self._take) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def passed_on_to(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Pass signals on to a process in this context."""
        self._process = process
        if self.signal:
            process.send_signal(self.signal)
        yield

    def _take(self, number: int, frame: FrameType | None) -> None:
        passed = signal.SIGTERM if number == signal.SIGHUP else number
        self.signal = self.signal or passed
        if self._process is None:
            raise SystemExit(128 + number)
        self._process.send_signal(passed)  # Popen ignores it for a process that has ended


STOPS = Stops()


class NothingBegunError(Exception):
    """No worker has come and none will, so `explain`, which is waiting for one, has nothing to finish."""


def explain(
    arguments: Sequence[str],
    scheduler: str,
    wait_s: int | None = None,
    tend: Callable[[], object] = lambda: None,
) -> int:
    """Run it on the scheduler at this address, and return its exit status, after Ctrl-C or SIGTERM too.

    It waits `wait_s` for missing workers, unless the arguments say otherwise. Meanwhile `tend` is called again and
    again; an error from it ends `explain`, and is raised; after a `NothingBegunError`, `explain` is killed without a
    last word.

    It runs in a session of its own, so that a terminal's Ctrl-C reaches it only through this process, once each time.
    """
    waiting = [] if wait_s is None else ["--wait-for-workers", str(wait_s)]
    command = [sys.executable, "-m", "wsi_gradcam.cli", "explain", *waiting, *arguments, "--scheduler", scheduler]
    with (
        STOPS.handled(),
        subprocess.Popen(command, start_new_session=True) as process,
        STOPS.passed_on_to(process),
    ):
        try:
            while (status := _ended(process)) is None:
                tend()
        except NothingBegunError:
            process.kill()
            raise
        except BaseException:
            end(process)
            raise
    return status if status >= 0 else 128 - status


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit status of a process, or None after a moment."""
    try:
        return process.wait(TENDED_S)
    except subprocess.TimeoutExpired:
        return None


def end(process: subprocess.Popen[bytes]) -> None:
    """End `explain` in its own time, but do not wait for ever."""
    process.terminate()
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
