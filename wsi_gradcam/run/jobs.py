"""What is done for a slide, in which order; executors decide where and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from wsi_gradcam.errors import (
    AnnotationError,
    ResumeError,
    SlideMemoryError,
    StoppedError,
    StoreError,
    WorkerError,
    one_line,
)
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.results.manifest import SlideOutcome, SlideStatus
from wsi_gradcam.run.stages import Pending, Performed, Task

# Told after each attempt at a task: executors call it, the command line draws progress from it.
Observer = Callable[[Task, Performed], None]

# What may be otherwise the next time, or is found out at no cost; all else lasts as long as slide and settings do.
PASSING = (AnnotationError, ConnectionError, MemoryError, ResumeError, SlideMemoryError, TimeoutError)


class FatalError(Exception):
    """Wraps an error that concerns the whole run, such as a full disk: no other slide is tried."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True)
class SlideRecord:
    """How a slide ended: a row of slides.csv.

    Attributes:
        skipped: nothing was done, it had ended before.
        lasting: it has failed, and the same command would fail again.
    """

    slide: SlideEntry
    status: SlideStatus
    error: str
    patches: int
    unreadable: int
    seconds: float
    skipped: bool = False
    lasting: bool = False


Phases = list[list[Task]]
SlideJob = Generator[Phases, list[Any], SlideRecord]
Job = Callable[[SlideEntry], SlideJob]


def slide_job(slide: SlideEntry, max_unreadable: float) -> SlideJob:
    """The phases of a slide: yields the tasks of several, wants all their results, ends with the slide's record.

    All tasks of a phase may run at once; a phase begins when the one before is whole. An error of this slide
    ends this job alone; an error of the store or of the cluster is raised as `FatalError`.
    """
    started = time.monotonic()
    try:
        (pending,) = yield [[Task("plan", slide)]]
        assert isinstance(pending, Pending)
        record, skipped = pending.done, pending.done is not None
        if record is None:
            *_, record = yield [
                [Task("explain", slide, (i,)) for i in pending.spans],
                *(_blocks(slide, level, numbers) for level, numbers in enumerate(pending.blocks)),
                [Task("finish", slide)],
            ]
    except Exception as error:
        return _failed(slide, error, time.monotonic() - started)
    return _record(slide, record, max_unreadable, time.monotonic() - started, skipped)


def audit_job(slide: SlideEntry, pieces: int, spread: bool) -> SlideJob:
    """As `slide_job`, for the pieces of a slide's audit, and for where its patches disagree."""
    started = time.monotonic()
    try:
        measured = [Task("audit", slide, (i,)) for i in range(pieces)]
        results = yield [measured, [Task("spread", slide)] if spread else []]
    except Exception as error:
        return _failed(slide, error, time.monotonic() - started)
    patches = sum(piece.patches for piece in results[:pieces])
    unreadable = sum(piece.unreadable for piece in results[:pieces])
    return SlideRecord(slide, SlideStatus.OK, "", patches, unreadable, time.monotonic() - started)


def drive(job: SlideJob, perform: Callable[[Task, Task | None], Any]) -> SlideRecord:
    """Run a job to its end, one task after the other; `perform` is told the next one too."""
    try:
        phases = next(job)
        while True:
            tasks = [task for phase in phases for task in phase]
            try:
                results = [perform(task, then) for task, then in zip_longest(tasks, tasks[1:])]
            except Exception as error:
                phases = job.throw(error)
            else:
                phases = job.send(results)
    except StopIteration as end:
        record: SlideRecord = end.value
        return record


def _failed(slide: SlideEntry, error: Exception, seconds: float) -> SlideRecord:
    """How the slide ended.

    Raises:
        FatalError: it is not the slide's fault.
    """
    if isinstance(error, FatalError):  # of whoever was told of the task
        raise error
    if isinstance(error, StoppedError | StoreError | WorkerError):
        raise FatalError(error) from error
    return SlideRecord(
        slide, SlideStatus.FAILED, one_line(error), 0, 0, seconds, lasting=not isinstance(error, PASSING)
    )


def _blocks(slide: SlideEntry, level: int, numbers: list[int]) -> list[Task]:
    """The tasks that make blocks of a level."""
    return [Task("coarsen", slide, (level, i)) if level else Task("stitch", slide, (i,)) for i in numbers]


def _record(slide: SlideEntry, done: SlideOutcome, max_unreadable: float, seconds: float, skipped: bool) -> SlideRecord:
    patches, unreadable = done.patches, done.unreadable
    status, error = done.status, ""
    if unreadable:
        error = f"{unreadable} of {patches} patches unreadable: {done.cause}"
        if unreadable > max_unreadable * patches:
            status = SlideStatus.FAILED
            error += f"; more than --max-unreadable {max_unreadable:g}"
    return SlideRecord(
        slide, status, error, patches, unreadable, seconds, skipped, lasting=status == SlideStatus.FAILED
    )
