"""A command that outlives its process: slides are untrusted, and a decoder in C may end the process it runs in.

`guard` lets a child process do the work and waits for it. Where the child is killed, another goes on without the
slide that it had in hand. The process that waits imports nothing that is large.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from wsi_gradcam.errors import SlideError

# A model or a machine that ends every process would have slide after slide blamed for it.
MOST_DEATHS_IN_A_ROW = 10
OPEN_AT_ONCE = 2  # the slide in work, and the next one while it is planned
PR_SET_PDEATHSIG = 1
SHOW_CURSOR = "\x1b[?25h"


@dataclass
class Watch:
    """What this process tells of its slides, and what is known of processes that died at the same work before.

    Slides go by their paths.

    Attributes:
        deaths: why no process should open a slide again.
        finished_before: what those processes have finished.
        one_at_a_time: whether only one slide may be open, so that another death tells which it was.
    """

    deaths: dict[str, str] = field(default_factory=dict)
    finished_before: set[str] = field(default_factory=set)
    one_at_a_time: bool = False
    notes: int | None = None

    def opening(self, path: str) -> None:
        """Tell that a slide is opened now.

        Raises:
            SlideError: it has ended a process before.
        """
        if path in self.deaths:
            raise SlideError(self.deaths[path])
        self._tell("opened", path)

    def finished(self, path: str) -> None:
        """Tell that a slide is done with."""
        self._tell("finished", path)

    def learn(self, told: Iterable[tuple[str, str]], cause: str) -> str:
        """Make use of what a process told before it died of `cause`; returns what comes of it, for the user.

        Nothing comes of it where no slide was in work.
        """
        opened: dict[str, None] = {}  # a set in the order of the last time
        for what, path in told:
            opened.pop(path, None)
            if what == "opened":
                opened[path] = None
            else:
                self.finished_before.add(path)
        suspects = list(opened)[-1 if self.one_at_a_time else -OPEN_AT_ONCE :]
        self.one_at_a_time = len(suspects) > 1
        if self.one_at_a_time:
            return f"{cause} ended the process while {' and '.join(suspects)} were open; going on with one at a time"
        for path in suspects:
            self.deaths[path] = (
                f"{path}: {cause} ended the process that worked on it; the file is damaged in a way that a decoder "
                "does not survive, or there was not enough memory: try another --reader, or a smaller --batch-size"
            )
            return f"{self.deaths[path]}; going on without it"
        return ""

    def _tell(self, what: str, path: str) -> None:
        if self.notes is not None:
            os.write(self.notes, f"{json.dumps([what, path])}\n".encode())


WATCH = Watch()


def guard(watch: Watch = WATCH) -> None:
    """Return in a child process, which does the work; this one waits, and ends as the last child does.

    To be called before there are threads. Where there is no `fork`, or no waiting for signals, as on Windows and
    macOS, it returns at once, and nothing is guarded.
    """
    if sys.platform != "linux":
        return
    waited_for = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, nobody learns how a child ends
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    deaths = 0
    while True:
        with os.fdopen(os.memfd_create("notes"), "rb") as notes:
            parent, child = os.getpid(), os.fork()
            if not child:
                watch.notes = os.dup(notes.fileno())
                _die_with(parent)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                return
            status = _wait_for(child, waited_for)
            notes.seek(0)
            told = [tuple(json.loads(line)) for line in notes]
        signed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        if signed is None or signed in waited_for:  # it ended by itself, or was told to
            _end_as(status)
        deaths = 1 if any(what == "finished" for what, _ in told) else deaths + 1
        remark = watch.learn(told, signal.Signals(signed).name)
        _say(remark or f"{signal.Signals(signed).name} ended the process while no slide was open")
        if not remark or deaths > MOST_DEATHS_IN_A_ROW:
            _say("stopped; run the same command again to go on, nothing finished is lost")
            sys.exit(1)


def _wait_for(child: int, signals: set[signal.Signals]) -> int:
    """The status with which a child ended; what other processes signal to this one is passed on to it."""
    while True:
        caught = signal.sigwaitinfo(signals)
        if caught.si_signo == signal.SIGCHLD:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
        elif caught.si_code <= 0:  # a terminal's reach the child by themselves
            os.kill(child, caught.si_signo)


def _die_with(parent: int) -> None:
    """Have this process killed when its parent is, so that two never do the same work."""
    import ctypes  # not for the process that waits

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # already
        os._exit(1)


def _end_as(status: int) -> NoReturn:
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    signed = os.WTERMSIG(status)
    signal.signal(signed, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signed})
    os.kill(os.getpid(), signed)
    sys.exit(128 + signed)  # not reached, where the signal can end a process


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)  # progress bars had hidden it
    print(text, file=sys.stderr)
