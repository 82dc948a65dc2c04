"""The part that recipes for clusters share: `wsi-gradcam explain` in a process of its own, beside the scheduler."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ENDING_S = 60  # what `explain` may take to end when it is told to: it gives workers 30 s
TENDED_S = 0.5  # how often a recipe looks after what it started


class Stops:
    """What becomes of Ctrl-C, SIGTERM and a closed terminal, from the beginning of a recipe to its end.

    Before `explain` runs they end the recipe, with 128 + the number of the signal. While it runs they are passed on to
    it, so that it ends in its own time. Afterwards, while jobs are cancelled, they are ignored.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.signal = 0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals in this context, of the main thread."""
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
        self._process.send_signal(passed)  # of a process that has ended Popen takes no notice


STOPS = Stops()


class NothingBegunError(Exception):
    """No worker has come and none will, so that `explain`, which waits for one, has nothing to end in order."""


def explain(
    arguments: Sequence[str],
    scheduler: str,
    wait_s: int | None = None,
    tend: Callable[[], object] = lambda: None,
) -> int:
    """Run it on the scheduler at this address; returns its exit status, after Ctrl-C or SIGTERM too.

    For workers that are missing it waits `wait_s`, unless the arguments say otherwise. Meanwhile `tend` is called
    again and again; what it raises ends `explain`, and is raised; after a `NothingBegunError` without a last word.

    It is in a session of its own, where a terminal's Ctrl-C reaches it through this process alone, once each time.
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
    """End `explain` in its own time, and not for ever."""
    process.terminate()
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
