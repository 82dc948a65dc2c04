"""The driver: the loop that explains or audits slides, claims OUT, and keeps the log, status and report there."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from wsi_gradcam.cam.facts import EXACT, NO_METHOD
from wsi_gradcam.errors import StoreError, WsiGradcamError, as_text, counted, one_line
from wsi_gradcam.io.urls import allowing, command_line
from wsi_gradcam.results.manifest import Manifest, SlideStatus
from wsi_gradcam.results.run_files import (
    RunFolder,
    check_same_run,
    is_encoded,
    read_run,
    stored_choice,
    write_run,
)
from wsi_gradcam.results.slide_tables import ANSWERS, SlideTable, answer_shares, read_slides, record_slides
from wsi_gradcam.run.bags import mean_feature, plan_encoding
from wsi_gradcam.run.claims import AUDIT, CLAIM, EXPLAIN, Claim, new_run_id
from wsi_gradcam.run.examining import SLIDES_TRIED
from wsi_gradcam.run.failures import attempt_digest, forget_unreadable, split_failed
from wsi_gradcam.run.progress import Progress
from wsi_gradcam.run.report import EventLog, logged_warnings, run_page
from wsi_gradcam.run.status import REPORT, RunFacts, RunState, RunStatus, now, write_status
from wsi_gradcam.run.types import FatalError, Part, Performed, Processed, RunListener, SlideRecord, Task
from wsi_gradcam.run.workload import EncodeWorkload, ExplainWorkload
from wsi_gradcam.system.processes import PeriodicTimer

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import Choice
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.results.run_files import SlideFolder
    from wsi_gradcam.run.plan import RunPlan
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.run.types import Executor, Workload

RENEWED_S = 3.0
SlideRows = Callable[[], Mapping[str, Mapping[str, str]]]


class RunSession:
    """An active run on OUT, as a context; it ends with the report.

    Args:
        out: the folder that is claimed.
        listener: is notified of what happens.
        slide_rows: a function that returns the slides that have ended, for the report: rows as in slides.csv, by slide
            id.
        log_tasks: whether each task has a line in the log.
        place: where the log, status and report are kept: for an audit a folder in `out`, else `out` itself.
        work: the kind of work.
    """

    def __init__(
        self,
        out: StoragePath,
        listener: RunListener,
        slide_rows: SlideRows,
        log_tasks: bool = False,
        place: StoragePath | None = None,
        work: str = AUDIT,
    ) -> None:
        self.run_id = new_run_id()
        self._results, self._listener, self._slide_rows = RunFolder(out), listener, slide_rows
        self._out = out if place is None else place
        self._log = EventLog(self._out, self.run_id, log_tasks)
        self._progress = Progress()
        self._lock = threading.Lock()
        self._facts: RunFacts | None = None
        self._claim = Claim(out, self.run_id, self.message, EXPLAIN if place is None else work)
        # Audits of older versions claimed their own folder.
        self._older = None if place is None or work != AUDIT else Claim(place, self.run_id, self.message, AUDIT)
        self._claimed, self._working = ExitStack(), ExitStack()
        self._status_failed = False

    def __enter__(self) -> Self:
        """Make sure that no other run is active on OUT; nothing is written yet.

        Raises:
            ResumeError: one is.
        """
        for claim in filter(None, (self._claim, self._older)):
            claim.look_first()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._claimed:
            self._working.close()  # first, because no status of an active run may be written after that of its end
            if self._facts is not None:
                self._end(self._facts, error)

    def claim(self) -> None:
        """Claim OUT until the end of the context.

        Raises:
            ResumeError: another run is at work there.
            StoreError: it cannot be written.
        """
        self._claimed.enter_context(self._claim)
        if self._older is not None:
            (self._out / CLAIM).remove()

    def begin(
        self, workload: Workload, slides: Sequence[SlideEntry], dashboard: str, remarks: Sequence[str] = ()
    ) -> None:
        """Begin the log and the status; `slides` are all slides of the run.

        `remarks` say what the search for slides left out, one line each.
        """
        self._progress.begin(len(slides), workload.run.settings.readers, workload.patches)
        self._facts = facts_of(workload, self._out, self.run_id, dashboard, remarks)
        self._log.begin(self._facts, workload.run.digest(), len(slides))
        self._renew()
        self._working.enter_context(PeriodicTimer(RENEWED_S, self._renew, "status"))
        self._working.enter_context(logged_warnings(self._log))
        self._listener.run_started(workload, slides, dashboard)
        for note in workload.run.facts.notes:
            self.message(f"model {workload.run.facts.name}: {note}")
        for remark in remarks:
            self.message(remark)

    def process(
        self,
        executor: Executor,
        workload: Workload,
        slides: Iterable[SlideEntry],
        keep: Callable[[SlideRecord], None],
        again: bool = False,
        part: Part | None = None,
    ) -> None:
        """Run a workload on slides; each slide's record is passed to `keep` when it is finished.

        With `again` it is another pass over slides that were counted already: only those that fail in it are reported.
        `part` says which pass it is, where there are several.

        Raises:
            WsiGradcamError: the run cannot go on.
        """
        if part is not None:
            slides = list(slides)
            with self._lock:
                self._progress.begin_part(part, len(slides), workload.patches)
            self._log.message(str(part))
            self._listener.part_began(part, len(slides), workload.patches)
        try:
            for record in executor.run(workload, slides, self._task_ended):
                keep(record)
                if not again or record.status == SlideStatus.FAILED:
                    self.slide_done(record)
        except FatalError as error:
            raise error.cause from error.cause.__cause__

    def slide_done(self, record: SlideRecord) -> None:
        """Count a slide that has ended, now or before, log it and tell the listener."""
        with self._lock:
            self._progress.slide_done(record)
        self._log.slide_done(record)
        self._listener.slide_done(record)

    def message(self, text: str) -> None:
        """Log a line and pass it on to the listener."""
        self._log.message(text)
        self._listener.message(text)

    def _task_ended(self, task: Task, performed: Performed) -> None:
        """Count an attempt at a task, log it and tell the listener.

        Raises:
            FatalError: another run has taken the claim on OUT.
        """
        try:
            self._claim.check()
        except WsiGradcamError as error:
            raise FatalError(error) from error
        with self._lock:
            before = self._progress.workers.get(performed.worker)
            at_once = 0 if before is None else before.at_once
            self._progress.task_done(task, performed)
        if performed.error:
            self._log.task_failed(task, performed)
            self._listener.task_failed(task, performed)
            return
        if before is None and performed.worker:
            self._log.worker_joined(performed.worker)
        if isinstance(performed.result, Processed) and performed.result.at_once not in (0, at_once):
            self.message(
                f"{performed.worker} has too little memory for a whole batch; from now on it explains "
                f"{performed.result.at_once} patches at once"
            )
        self._log.task_done(task, performed)
        self._listener.task_done(task, performed)

    def _renew(self) -> None:
        """Write the log and the status; if that fails, the listener is told once, and it is tried again."""
        assert self._facts is not None
        try:
            self._write(self._facts, RunState.RUNNING)
        except WsiGradcamError as error:
            if not self._status_failed:
                self._status_failed = True
                self._listener.message(f"the status of the run cannot be written: {one_line(error)}")
        else:
            self._status_failed = False

    def _write(self, facts: RunFacts, state: RunState, cause: str = "") -> RunStatus:
        with self._lock:
            numbers = self._progress.numbers()
        status = RunStatus(facts, state, cause, now(), numbers)
        self._log.flush()
        if not self._claim.lost:  # status and report belong to another run now
            write_status(self._out, status)
        return status

    def _end(self, facts: RunFacts, error: BaseException | None) -> None:
        """Write the last line, status and report; an error here never hides the one that ended the run."""
        state, cause = (RunState.FINISHED, "") if error is None else (RunState.STOPPED, _cause(error))
        with self._lock:
            numbers = self._progress.numbers()
        self._log.end(state, cause, numbers)
        try:
            status = self._write(facts, state, cause)
            if not self._claim.lost:
                (self._out / REPORT).write(run_page(status, self._slide_rows(), self._results.path_of))
        except WsiGradcamError as trouble:
            self._listener.message(f"the run's report cannot be written: {one_line(trouble)}")


def facts_of(
    workload: Workload, out: StoragePath, run_id: str, dashboard: str, remarks: Sequence[str] = ()
) -> RunFacts:
    """Return the facts of a run that begins now."""
    run = workload.run
    return RunFacts(
        run=run_id,
        begun=now(),
        command=as_text(command_line(sys.argv)),
        out=as_text(str(out)),
        model=run.facts.name,
        model_digest=run.facts.digest,
        layer=run.facts.layer,
        engine=f"{run.facts.choice.engine} {run.facts.choice.precision}",
        targets=[target.label for target in run.targets],
        settings=run.settings.model_dump(mode="json"),
        dashboard=dashboard,
        work=workload.name,
        notes=list(run.facts.notes),
        remarks=[as_text(remark) for remark in remarks],
    )


def _cause(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)


MEAN = "mean"  # of the settings' `bag_baseline`
Planning = Callable[["Executor", "Choice | None"], "RunPlan"]


@dataclass(frozen=True)
class Command:
    """A command that processes slides into OUT.

    Attributes:
        folder: OUT.
        entries: the slides, with their ids.
        remarks: lines on what the search for slides left out.
        settings: of the run.
        listener: is notified of what happens.
        overwrite, retry_failed, log_tasks: as for `wsi_gradcam.api.explain`.
        executor: opens the executor.
    """

    folder: RunFolder
    entries: list[SlideEntry]
    remarks: tuple[str, ...]
    settings: Settings
    listener: RunListener
    overwrite: bool
    retry_failed: bool
    log_tasks: bool
    executor: Callable[[], AbstractContextManager[Executor]]

    def run(
        self, planning: Planning, workload_of: type[ExplainWorkload] | type[EncodeWorkload]
    ) -> tuple[SlideRecord, ...]:
        """Plan the run, do what is left of it, and return a record per slide, in the order in which they end."""
        folder, rows_of = self.folder, partial(read_slides, self.folder.slides)
        records: list[SlideRecord] = []
        session = RunSession(folder.place, self.listener, rows_of, self.log_tasks)
        with allowing(self.settings.allow_hosts), session, self.executor() as executor:
            run = planning(executor, None if self.overwrite else _choice_before(folder.run, self.settings))
            session.claim()
            rows: dict[str, dict[str, Any]] = dict(read_slides(folder.slides))
            if not self.overwrite and not _nothing_but_failures(rows):
                check_same_run(folder.run, run)
            folder.place.remove_partial_files(recursive=False)
            write_run(folder.run, run)
            entries = record_slides(folder.record, self.entries)
            workload = workload_of(run, self.overwrite)
            session.begin(workload, entries, executor.dashboard, self.remarks)
            wanted, known = split_failed(entries, rows, run, anew=self.overwrite or self.retry_failed)
            if self.retry_failed:
                forget_unreadable(wanted, rows, folder)
            if known:
                session.message(
                    f"not retried: {counted(len(known), 'slide')} failed before; use --retry-failed to retry"
                )
            for record in known:
                records.append(record)
                session.slide_done(record)
            table = SlideTable(folder.slides)

            def keep(record: SlideRecord) -> None:
                table.add(_row(record, folder, run, rows.get(record.slide.id)))
                records.append(record)

            try:
                session.process(executor, workload, wanted, keep)
            finally:
                table.flush()
        return tuple(records)

    def encode(self, spec: ModelSpec) -> tuple[SlideRecord, ...]:
        """Compute the features of all slides."""

        def plan(executor: Executor, choice: Choice | None) -> RunPlan:
            facts = executor.examine(spec, self.settings, self.entries[:SLIDES_TRIED], choice)
            return plan_encoding(self.folder.place, spec, facts, self.settings)

        return self.run(plan, EncodeWorkload)

    def encode_first(self, spec: ModelSpec) -> None:
        """Compute the features whose mean is the baseline of a run, unless that run has begun."""
        stored = None if self.overwrite else read_run(self.folder.run)
        if stored is None or is_encoded(stored):
            without = self.settings.model_copy(update={"method": (NO_METHOD,)})
            replace(self, settings=without, listener=RunListener()).encode(spec)

    def mean_feature(self, run: RunPlan) -> tuple[float, ...]:
        """Return the mean feature vector of all patches of all slides, whatever their order."""
        stored = None if self.overwrite else read_run(self.folder.run)
        if run.settings.features is None and stored is not None and not is_encoded(stored):
            return tuple(map(float, stored.get("baseline", ())))
        return mean_feature(self.folder, self.entries, run)


def _choice_before(place: StoragePath, settings: Settings) -> Choice | None:
    """Return the engine and precision chosen earlier by a run that is continued, if the same ones were requested."""
    try:
        stored = read_run(place)
    except StoreError:  # reported when it is compared with this run
        return None
    asked = ("engine", "precision", "layer", "device", "decode")
    now, default = settings.model_dump(mode="json"), {"decode": EXACT}  # from older versions
    if stored is None or any({**default, **stored.get("settings", {})}.get(key) != now[key] for key in asked):
        return None
    return stored_choice(stored)


def _row(record: SlideRecord, folder: RunFolder, run: RunPlan, before: dict[str, Any] | None) -> dict[str, Any]:
    """A row of slides.csv; a slide that was finished before keeps its seconds."""
    seconds = before["seconds"] if record.skipped and before is not None else f"{record.seconds:.2f}"
    plan = (
        None
        if record.status == SlideStatus.FAILED and not record.patches
        else Manifest(folder.slide(record.slide.id).manifest).plan()
    )
    mpp_y, mpp_x = plan.slide_mpp if plan else ("", "")
    return {
        "id": record.slide.id,
        "path": as_text(record.slide.path),
        "status": record.status,
        "error": record.error,
        "patches": record.patches,
        "unreadable": record.unreadable,
        "seconds": seconds,
        "mpp_y": mpp_y,
        "mpp_x": mpp_x,
        "slide_digest": plan.slide_digest if plan else "",
        "model_digest": run.facts.digest,
        "label": record.slide.label,
        "site": record.slide.site,
        "scanner": record.slide.scanner,
        "tried": attempt_digest(record.slide, run) if record.lasting else "",
        **({} if run.facts.bag is None else _answer(folder.slide(record.slide.id), run)),
    }


def _answer(folder: SlideFolder, run: RunPlan) -> dict[str, str]:
    """Return the columns with a slide-level model's answer, if there is one."""
    done = Manifest(folder.manifest).done()
    if done is None or not done.answer:
        return {}
    both = (done.answer, answer_shares(done.answer, run.facts.activation))
    return {f"{kind}{name}": f"{v:.6g}" for kind, each in zip(ANSWERS, both, strict=True) for name, v in each.items()}


def _nothing_but_failures(rows: dict[str, dict[str, Any]]) -> bool:
    """Return whether no slide has begun: such an `out` may be used with other settings, such as a missing --mpp."""
    return bool(rows) and all(row["status"] == SlideStatus.FAILED and row["patches"] == "0" for row in rows.values())
