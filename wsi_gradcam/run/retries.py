"""Errors that may not come again: of networks, of file systems that many use, of memory that others had."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import TypeVar

from wsi_gradcam.errors import one_line
from wsi_gradcam.run.stages import Task
from wsi_gradcam.system.stopping import STOP

LOG = logging.getLogger("wsi_gradcam")
PAUSES_S = (1.0, 5.0)  # before the second attempt and the third, which is the last
PASSING_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN",
        "EBUSY",
        "ECONNABORTED",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "EINTR",
        "EIO",
        "EMFILE",
        "ENETDOWN",
        "ENETRESET",
        "ENETUNREACH",
        "ENFILE",
        "ENOBUFS",
        "ENOMEM",
        "ENOTCONN",
        "EREMOTEIO",
        "ESTALE",
        "ETIMEDOUT",
    )
    if hasattr(errno, name)
)

T = TypeVar("T")


def is_transient(error: BaseException) -> bool:
    """Whether the same work may succeed a moment later: by the error, or by what caused it.

    >>> is_transient(OSError(errno.ESTALE, "stale file handle")), is_transient(OSError(errno.ENOSPC, "disk full"))
    (True, False)
    """
    if isinstance(error, ConnectionError | TimeoutError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno in PASSING_ERRNOS:
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)


def say_again(task: Task, error: BaseException, attempt: int) -> None:
    """Log why a piece of work is tried again."""
    what = " ".join([task.stage, *map(str, task.index)])
    LOG.warning(
        "%s: %s: %s; trying again in %g s (%d of %d)",
        task.slide.id,
        what,
        one_line(error),
        PAUSES_S[attempt],
        attempt + 2,
        len(PAUSES_S) + 1,
    )


def retried(work: Callable[[], T], task: Task, tell: Callable[[Exception, bool], None]) -> T:
    """What `work` returns, which is tried again after errors that may not come again; `tell` is told of each."""
    for attempt, pause_s in enumerate(PAUSES_S):
        try:
            return work()
        except Exception as error:
            if not is_transient(error):
                raise
            say_again(task, error, attempt)
            tell(error, True)
            STOP.wait(pause_s)
            STOP.check()
    return work()
