"""Which process on which machine, so that another process can tell whether it is still there."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process.

    Attributes:
        boot: of the machine, which no other boot shares, and of the space that process ids are counted in; "" where
            the system does not tell.
        start: when the process began, in the boot's own time: ids are used again.
    """

    host: str
    pid: int
    boot: str
    start: str

    def alive(self) -> bool | None:
        """Whether it is there; None where that cannot be told from here, as on another machine."""
        if not self.boot or self.boot != _boot():
            return None
        return _start(self.pid) == self.start


def this_process() -> Process:
    """The process that calls."""
    pid = os.getpid()
    return Process(socket.gethostname(), pid, _boot(), _start(pid))


def _boot() -> str:
    """The machine's boot and the namespace of process ids: containers on one machine have their own."""
    if sys.platform != "linux":
        return ""
    try:
        return f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start(pid: int) -> str:
    """The start of a process in clock ticks since boot; "" where there is none, or it has ended."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything; proc_pid_stat(5)
    return "" if state in "ZX" else fields[18]
