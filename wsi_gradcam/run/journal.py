"""What a run leaves behind of itself: its claim on OUT, its log, how far it is, and at the end its report."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from wsi_gradcam.errors import WsiGradcamError, one_line
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.run_files import versions
from wsi_gradcam.results.slide_tables import read_slides
from wsi_gradcam.run.claims import Claim, new_run_id
from wsi_gradcam.run.events import Listener
from wsi_gradcam.run.log import RunLog, facts_of, now
from wsi_gradcam.run.progress import Progress
from wsi_gradcam.run.report import run_page
from wsi_gradcam.run.status import FINISHED, REPORT, RUNNING, STOPPED, write_status
from wsi_gradcam.run.types import FatalError, Performed, Planned, Processed, SlideRecord, Task
from wsi_gradcam.system.timer import PeriodicTimer

if TYPE_CHECKING:
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.run_files import RunFolder
    from wsi_gradcam.run.plan import RunPlan

RENEWED_S = 3.0
PACKAGE = logging.getLogger("wsi_gradcam")


class Journal(Listener):
    """A listener that keeps all of this, and hands on what it hears; the context of a run."""

    def __init__(self, folder: RunFolder, listener: Listener, every_task: bool = False) -> None:
        self.run_id = new_run_id()
        self._folder, self._out, self._listener, self._every_task = folder, folder.place, listener, every_task
        self._log = RunLog(self._out, self.run_id)
        self._progress = Progress()
        self._lock = threading.Lock()
        self._facts: dict[str, Any] = {}
        self._slides: dict[str, dict[str, Any]] = {}  # sums of the slides in work
        self._claim = Claim(self._out, self.run_id, self.remarked)
        self._claimed, self._working = ExitStack(), ExitStack()
        self._troubled = False

    def __enter__(self) -> Self:
        """See that no other run is at work on OUT, where nothing is written yet.

        Raises:
            ResumeError: one is.
        """
        self._claim.look_first()
        return self

    def claim(self) -> None:
        """Claim OUT, until the end of the context.

        Raises:
            ResumeError: another run is at work there.
            StoreError: it cannot be written.
        """
        self._claimed.enter_context(self._claim)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._claimed:
            self._working.close()  # first: what is renewed must not come after the end
            if self._facts:
                self._end(error)

    def begun(self, run: RunPlan, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """The work starts: from now on there is a log, and how far it is can be read."""
        self._progress.begin(len(slides), run.settings.reader_threads)
        self._facts = facts_of(run, self.run_id, dashboard)
        self._log.remove_leftovers()
        self._log.add("run begun", slides=len(slides), **self._facts, versions=versions(), run_digest=run.digest())
        self._renew()
        self._working.enter_context(PeriodicTimer(RENEWED_S, self._renew, "journal"))
        self._working.enter_context(_noting(self._log))
        self._listener.begun(run, slides, dashboard)

    def attempted(self, task: Task, performed: Performed) -> None:
        """An attempt at a task has ended.

        Raises:
            FatalError: another run has taken the claim on OUT.
        """
        try:
            self._claim.check()
        except WsiGradcamError as error:
            raise FatalError(error) from error
        with self._lock:
            new = performed.worker not in self._progress.workers
            self._progress.task_done(task, performed)
        if new and performed.worker and not performed.error:
            self._log.add("worker joined", worker=performed.worker)
        if performed.error:
            self.task_failed(task, performed)
        else:
            self.task_done(task, performed)

    def task_done(self, task: Task, performed: Performed) -> None:
        """Sum up for the slide; a line only where it was planned, or where all are wanted."""
        result = performed.result
        if isinstance(result, Planned) and result.outcome is not None:
            self._listener.task_done(task, performed)
            return
        sums = self._slides.setdefault(task.slide.id, {"tasks": 0, "seconds_by_stage": {}, "retries": 0})
        sums["tasks"] += 1
        stages = sums["seconds_by_stage"]
        stages[task.stage.name] = round(stages.get(task.stage.name, 0.0) + performed.seconds, 3)
        if isinstance(result, Planned):
            self._log.add(
                "slide planned",
                slide=task.slide.id,
                patches=result.patches,
                left=result.left,
                seconds=round(performed.seconds, 3),
                worker=performed.worker,
            )
        elif self._every_task:
            more = asdict(result) if isinstance(result, Processed) else {}
            self._log.add("task done", **_named(task), seconds=performed.seconds, worker=performed.worker, **more)
        self._listener.task_done(task, performed)

    def task_failed(self, task: Task, performed: Performed) -> None:
        """A line for each attempt that failed."""
        if performed.again and task.slide.id in self._slides:
            self._slides[task.slide.id]["retries"] += 1
        event, level = ("task retried", "warning") if performed.again else ("task failed", "error")
        self._log.add(event, level, **_named(task), worker=performed.worker, cause=performed.error)
        self._listener.task_failed(task, performed)

    def slide_done(self, record: SlideRecord) -> None:
        """A line for each slide that was worked on."""
        with self._lock:
            self._progress.slide_done(record)
        sums = self._slides.pop(record.slide.id, {})
        if not record.skipped:
            failed = record.status == SlideStatus.FAILED
            cause = {"cause": record.error} if record.error else {}
            self._log.add(
                "slide failed" if failed else "slide finished",
                "error" if failed else "info",
                slide=record.slide.id,
                status=record.status,
                patches=record.patches,
                unreadable=record.unreadable,
                seconds=round(record.seconds, 3),
                **sums,
                **cause,
            )
        self._listener.slide_done(record)

    def remarked(self, text: str) -> None:
        """A line in the log, and for whoever listens."""
        self._log.add("remark", "warning", text=text)
        self._listener.remarked(text)

    def _renew(self) -> None:
        """Write the log and how far the run is; where that fails it is said once, and tried again."""
        try:
            self._write(RUNNING)
        except WsiGradcamError as error:
            if not self._troubled:
                self._troubled = True
                self._listener.remarked(f"how far the run is cannot be written: {one_line(error)}")
        else:
            self._troubled = False

    def _write(self, state: str, cause: str = "") -> dict[str, Any]:
        with self._lock:
            numbers = self._progress.to_json()
        status = {**self._facts, "state": state, "cause": cause, "updated": now(), **numbers}
        self._log.flush()
        if not self._claim.lost:  # the rest belongs to another run now
            write_status(self._out, status)
        return status

    def _end(self, error: BaseException | None) -> None:
        """The last line, the last numbers, the report. What ended the run is never hidden by trouble here."""
        state, cause = (FINISHED, "") if error is None else (STOPPED, _cause(error))
        with self._lock:
            numbers = self._progress.to_json()
        told = {key: numbers[key] for key in ("elapsed_s", "slides", "patches", "retries", "stages", "workers")}
        self._log.add("run ended", "info" if error is None else "error", state=state, cause=cause, **told)
        try:
            status = self._write(state, cause)
            if not self._claim.lost:
                (self._out / REPORT).write(run_page(status, read_slides(self._folder.slides)))
        except WsiGradcamError as trouble:
            self._listener.remarked(f"the run's report cannot be written: {one_line(trouble)}")


class _Noting(logging.Handler):
    """Has warnings of this process in the run's log too."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """A line; where nobody else shows warnings, they go where they would go without this one."""
        self._log.add("warned", record.levelname.lower(), text=record.getMessage())
        others = [handler for handler in (*PACKAGE.handlers, *logging.getLogger().handlers) if handler is not self]
        if not others and logging.lastResort is not None:
            logging.lastResort.handle(record)


@contextmanager
def _noting(log: RunLog) -> Iterator[None]:
    handler = _Noting(log)
    PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)


def _named(task: Task) -> dict[str, Any]:
    return {"slide": task.slide.id, "stage": task.stage.name, "index": list(task.index)}


def _cause(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
