"""Memory that was freed, shared between threads and given back to the system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

# Of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
ARENAS = 2
MIB = 1 << 20


def share_arenas() -> None:
    """Let threads take memory from the same few arenas, where the allocator has such (glibc); call before they start.

    Else each of the threads that read, decode and calculate keeps what it freed for itself alone (15 MiB of 1240,
    ResNet-18).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def keep_freed() -> None:
    """Have the allocator keep up to 64 MiB that were freed, as glibc itself does from the first freed 32 MiB on.

    Until then it returns every tile to the system, and each new one costs as much again as its decoding (JPEG of
    256 px: 490 against 300 us).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
            library.mallopt(M_TRIM_THRESHOLD, 64 * MIB)


def give_back() -> None:
    """Let the system have what this process no longer uses, where its allocator can (glibc).

    Of one stage's large arrays it keeps much for later ones, whose sizes differ: without this a run's peak is that
    of all stages together (ResNet-18: a tenth more).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)
