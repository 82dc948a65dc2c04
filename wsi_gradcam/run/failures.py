"""Failures: which are transient, tasks that are retried, and slides that failed before.

The same command does only what is missing. A slide that failed for a reason of its own, perhaps after minutes, would
fail again: it is skipped until something that it depends on changes, or --retry-failed is given.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wsi_gradcam.errors import (
    AnnotationError,
    BagSizeError,
    FeatureError,
    MissingPartError,
    ResumeError,
    SlideAccessError,
    SlideMemoryError,
    WsiGradcamError,
    is_out_of_memory,
    one_line,
)
from wsi_gradcam.io.urls import is_url
from wsi_gradcam.results.manifest import Manifest, SlideStatus
from wsi_gradcam.results.run_files import versions
from wsi_gradcam.run.types import SlideRecord, Task
from wsi_gradcam.system.isolation import CRASHES, STOP

if TYPE_CHECKING:
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.run_files import RunFolder
    from wsi_gradcam.run.plan import RunPlan

T = TypeVar("T")

LOG = logging.getLogger("wsi_gradcam")
PAUSES_S = (1.0, 5.0)  # seconds before the second attempt and the third, which is the last
# Errors of networks, of shared file systems, of resources that other processes were using.
TRANSIENT_ERRNOS = frozenset(
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
# These are found before any work is done, so that trying them again costs nothing.
FOUND_EARLY = (AnnotationError, BagSizeError, FeatureError, ResumeError)
# Settings on which no failure of a slide depends.
ONLY_SPEED = {"reader_threads", "torch_threads"}
DIGITS = 16


def is_transient(error: BaseException) -> bool:
    """Return whether the same work may succeed later, judging by the error or its cause.

    >>> is_transient(OSError(errno.ESTALE, "stale file handle")), is_transient(OSError(errno.ENOSPC, "disk full"))
    (True, False)
    """
    if isinstance(error, ConnectionError | TimeoutError | SlideMemoryError) or is_out_of_memory(error):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)


def may_succeed_soon(error: BaseException) -> bool:
    """Return whether work is worth another attempt in this run; requests to servers have been repeated already."""
    return is_transient(error) and not isinstance(error, SlideAccessError)


def is_lasting(error: BaseException) -> bool:
    """Return whether a slide that failed with this error would fail again, after some work."""
    ours = isinstance(error, WsiGradcamError) and not isinstance(error, MissingPartError)
    is_missing = isinstance(error, FileNotFoundError) and not ours  # a part of OUT
    return not (is_missing or is_transient(error) or isinstance(error, FOUND_EARLY))


def log_retry(task: Task, error: BaseException, attempt: int) -> None:
    """Log why a task is retried."""
    LOG.warning(
        "%s: %s: %s; trying again in %g s (%d of %d)",
        task.slide.id,
        task,
        one_line(error),
        PAUSES_S[attempt],
        attempt + 2,
        len(PAUSES_S) + 1,
    )


def retried(work: Callable[[], T], task: Task, on_error: Callable[[Exception, bool], None]) -> T:
    """Return the result of `work`, which is retried after transient errors; `on_error` is called with each error."""
    for attempt, pause_s in enumerate(PAUSES_S):
        try:
            return work()
        except Exception as error:
            if not may_succeed_soon(error):
                raise
            log_retry(task, error, attempt)
            on_error(error, True)
            STOP.wait(pause_s)
            STOP.check()
    return work()


def attempt_digest(entry: SlideEntry, run: RunPlan) -> str:
    """Return a digest of everything that an attempt at a slide depends on: file, list, settings, model and versions."""
    values = {
        "run": run.digest(),
        "settings": run.settings.model_dump(mode="json", exclude=ONLY_SPEED),
        "versions": versions(),
        "address": entry.address,
        "mpp": entry.mpp,
        "file": _file_state(entry.path),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:DIGITS]


def split_failed(
    entries: Sequence[SlideEntry], rows: Mapping[str, Mapping[str, str]], run: RunPlan, anew: bool
) -> tuple[list[SlideEntry], list[SlideRecord]]:
    """Return the slides to work on, and records of those that failed before and would fail again.

    Args:
        entries: all slides of the run.
        rows: slides.csv as it was before.
        run: the run's plan.
        again: whether slides that failed are retried, except those that this very command has tried in a process that
            died.
    """
    wanted, known = [], []
    for entry in entries:
        row = rows.get(entry.id)
        again = anew and entry.path not in CRASHES.finished_before
        if row is None or again or not _would_fail_again(row, entry, run):
            wanted.append(entry)
        else:
            known.append(_record(entry, row))
    return wanted, known


def forget_unreadable(entries: Sequence[SlideEntry], rows: Mapping[str, Mapping[str, str]], folder: RunFolder) -> None:
    """Delete the plans of slides that failed because of unreadable patches, so that these are read again.

    Raises:
        StoreError: a manifest cannot be removed.
    """
    for entry in entries:
        row = rows.get(entry.id)
        if (
            row
            and row["status"] == SlideStatus.FAILED
            and row["patches"] != "0"
            and entry.path not in CRASHES.finished_before
        ):
            Manifest(folder.slide(entry.id).manifest).clear()


def _would_fail_again(row: Mapping[str, str], entry: SlideEntry, run: RunPlan) -> bool:
    return row["status"] == SlideStatus.FAILED and bool(row["tried"]) and row["tried"] == attempt_digest(entry, run)


def _record(entry: SlideEntry, row: Mapping[str, str]) -> SlideRecord:
    return SlideRecord(
        entry,
        SlideStatus.FAILED,
        row["error"],
        int(row["patches"]),
        int(row["unreadable"]),
        float(row["seconds"]),
        skipped=True,
        lasting=True,
    )


def _file_state(path: str) -> list[Any] | None:
    """Return values that change when a local file is replaced, repaired, or made readable."""
    if is_url(path):
        return None
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
