"""A terminal's Ctrl-C reaches all processes of a command: the client shall heed it, its workers not."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_interrupted() -> Iterator[None]:
    """Threads and processes that are started while this lasts, and those they start, never get SIGINT.

    A worker would print a traceback and die with its work; the client has it finish that, and then ends it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
