"""Memory that was freed, shared between threads and given back to the system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_ARENA_MAX = -8  # of glibc's mallopt
ARENAS = 2


def share_arenas() -> None:
    """Let threads take memory from the same few arenas, where the allocator has such (glibc); call before they start.

    Else each of the threads that read, decode and calculate keeps what it freed for itself alone (15 MiB of 1240,
    ResNet-18).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Let the system have what this process no longer uses, where its allocator can (glibc).

    Of one stage's large arrays it keeps much for later ones, whose sizes differ: without this a run's peak is that
    of all stages together (ResNet-18: a tenth more).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)
