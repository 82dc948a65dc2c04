"""Explaining slides: the stages, their order for a slide, and the workload that executors run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, ClassVar

from wsi_gradcam.errors import MissingExtraError, StoppedError, StoreError, WorkerError, one_line
from wsi_gradcam.results.manifest import SlideOutcome, SlideStatus
from wsi_gradcam.run.bags import aggregate_bag, answer_span, encode_span, finish_encoding, import_span
from wsi_gradcam.run.failures import is_lasting
from wsi_gradcam.run.stages import explain_span, plan_slide
from wsi_gradcam.run.stitching import coarsen_block, finish_slide, stitch_block
from wsi_gradcam.run.types import FatalError, Planned, Processed, SlideJob, SlideRecord, Stage, Task, TaskResult

if TYPE_CHECKING:
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.plan import RunPlan

PLAN = Stage("plan", plan_slide)
ENCODE = Stage("encode", encode_span, needs_model=True, reads_ahead=True)
IMPORT = Stage("import", import_span)
AGGREGATE = Stage("aggregate", aggregate_bag)
EXPLAIN = Stage("explain", explain_span, needs_model=True, reads_ahead=True)
ANSWER = Stage("patches", answer_span)  # instead of EXPLAIN, if no pixel is explained
STITCH = Stage("stitch", stitch_block)
COARSEN = Stage("coarsen", coarsen_block)
FINISH = Stage("finish", finish_slide)
FINISH_ENCODING = Stage("finish", finish_encoding)


@dataclass(frozen=True)
class ExplainWorkload:
    """Explaining slides.

    Attributes:
        run: the plan of the run.
        overwrite: whether slides that have results are explained again.
    """

    run: RunPlan
    overwrite: bool = False
    name: ClassVar[str] = "explain"
    patches: ClassVar[None] = None

    def job(self, slide: SlideEntry) -> SlideJob:
        """Return the phases of a slide; see `Workload.job`."""
        return explain_job(slide, self.run.settings.max_unreadable)


@dataclass(frozen=True)
class EncodeWorkload:
    """Computing the features of slides' patches; attributes as for `ExplainWorkload`."""

    run: RunPlan
    overwrite: bool = False
    name: ClassVar[str] = "encode"
    patches: ClassVar[None] = None

    def job(self, slide: SlideEntry) -> SlideJob:
        """Return the phases of a slide; see `Workload.job`."""
        return _planned_job(slide, _encoding, self.run.settings.max_unreadable)


def explain_job(slide: SlideEntry, max_unreadable: float) -> SlideJob:
    """Plan a slide, explain its spans, blend and coarsen its blocks, finish it; see `Workload.job`."""
    return _planned_job(slide, _explaining, max_unreadable)


def _planned_job(
    slide: SlideEntry, phases: Callable[[SlideEntry, Planned], list[list[Task]]], max_unreadable: float
) -> SlideJob:
    started = time.monotonic()
    try:
        (planned,) = yield [[Task(PLAN, slide)]]
        assert isinstance(planned, Planned)
        outcome, skipped = planned.outcome, planned.outcome is not None
        if outcome is None:
            *_, finished = yield phases(slide, planned)
            assert isinstance(finished, SlideOutcome)
            outcome = finished
    except Exception as error:
        return failed_record(slide, error, time.monotonic() - started)
    return _record(slide, outcome, max_unreadable, time.monotonic() - started, skipped)


def _explaining(slide: SlideEntry, planned: Planned) -> list[list[Task]]:
    return [
        [Task(IMPORT if planned.given else ENCODE, slide, (i,)) for i in planned.encode],
        [Task(AGGREGATE, slide)] if planned.aggregate else [],
        [Task(EXPLAIN if planned.pixels else ANSWER, slide, (i,)) for i in planned.spans],
        *(_block_tasks(slide, level, numbers) for level, numbers in enumerate(planned.blocks)),
        [Task(FINISH, slide)],
    ]


def _encoding(slide: SlideEntry, planned: Planned) -> list[list[Task]]:
    return [[Task(ENCODE, slide, (i,)) for i in planned.encode], [Task(FINISH_ENCODING, slide)]]


def measuring_job(
    slide: SlideEntry, phases: list[list[Task]], then: Callable[[Planned], list[list[Task]]] | None = None
) -> SlideJob:
    """Perform phases whose tasks measure patches of a slide, as an audit does; see `Workload.job`.

    With `then` the phases are a single task that plans, and those which follow from what it says are performed.
    """
    started = time.monotonic()
    try:
        results = yield phases
        if then is not None:
            (planned,) = results
            assert isinstance(planned, Planned)
            results = yield then(planned)
    except Exception as error:
        return failed_record(slide, error, time.monotonic() - started)
    done = [result for result in results if isinstance(result, Processed)]
    patches, unreadable = sum(each.patches for each in done), sum(each.unreadable for each in done)
    return SlideRecord(slide, SlideStatus.OK, "", patches, unreadable, time.monotonic() - started)


def perform_job(job: SlideJob, perform: Callable[[Task, Task | None], TaskResult]) -> SlideRecord:
    """Run a job to its end, one task after another; `perform` is given each task and the next one."""
    try:
        phases = next(job)
        while True:
            tasks = [task for phase in phases for task in phase]
            try:
                results = [perform(task, upcoming) for task, upcoming in zip_longest(tasks, tasks[1:])]
            except Exception as error:
                phases = job.throw(error)
            else:
                phases = job.send(results)
    except StopIteration as end:
        record: SlideRecord = end.value
        return record


def failed_record(slide: SlideEntry, error: Exception, seconds: float) -> SlideRecord:
    """Return the record of a slide that failed with an error.

    Raises:
        FatalError: the error is not the slide's fault.
    """
    if isinstance(error, FatalError):  # raised by an observer
        raise error
    if isinstance(error, StoppedError | StoreError | WorkerError | MissingExtraError):
        raise FatalError(error) from error
    return SlideRecord(slide, SlideStatus.FAILED, one_line(error), 0, 0, seconds, lasting=is_lasting(error))


def _block_tasks(slide: SlideEntry, level: int, numbers: list[int]) -> list[Task]:
    return [Task(COARSEN, slide, (level, i)) if level else Task(STITCH, slide, (i,)) for i in numbers]


def _record(
    slide: SlideEntry, outcome: SlideOutcome, max_unreadable: float, seconds: float, skipped: bool
) -> SlideRecord:
    patches, unreadable, status, error = outcome.patches, outcome.unreadable, outcome.status, ""
    if unreadable:
        error = f"{unreadable} of {patches} patches are unreadable: {outcome.cause}"
        if unreadable > max_unreadable * patches:
            status = SlideStatus.FAILED
            error += f"; more than --max-unreadable {max_unreadable:g}"
    error = "; ".join(filter(None, (error, outcome.notes)))
    return SlideRecord(
        slide, status, error, patches, unreadable, seconds, skipped, lasting=status == SlideStatus.FAILED
    )
