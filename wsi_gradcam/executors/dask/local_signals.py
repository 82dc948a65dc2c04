"""Loaded into workers on this machine: a terminal's Ctrl-C reaches all processes of a command, and only one heeds it.

A worker would print a traceback and die with its work; the client has it finish that, and then ends it.
"""

from __future__ import annotations

import signal

from distributed import Worker


def dask_setup(worker: Worker) -> None:
    """Called by Dask in a new worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
