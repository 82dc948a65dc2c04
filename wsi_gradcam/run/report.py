"""A run's log in OUT, and `run.html`, a page that needs no other file and no script.

The log has a line of JSON for each event, in OUT/log/RUN-NUMBER.jsonl. Objects in a store cannot be appended to, so the
log comes in parts that are written as a whole, the last one again and again until it is long enough.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ResultError
from wsi_gradcam.pages import render
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.run_files import folder_name, versions
from wsi_gradcam.results.seals import COMMENT, sealed
from wsi_gradcam.run.claims import AUDIT, EVIDENCE
from wsi_gradcam.run.progress import without_path
from wsi_gradcam.run.status import RunState, RunStatus, StageStatus, ThroughputStatus
from wsi_gradcam.run.types import Performed, Planned, Processed, SlideRecord, Task

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.run.status import RunFacts, RunNumbers

LOG = "log"
PART_BYTES = 128 << 10
LONGEST = 2000  # characters of a text: errors may quote anything that a slide contains
PACKAGE = logging.getLogger("wsi_gradcam")


class RunLog:
    """Keeps the lines of a log until `flush` writes them."""

    def __init__(self, out: StoragePath, run_id: str) -> None:
        self._folder, self._run_id = out / LOG, run_id
        self._lines: list[bytes] = []
        self._number, self._written = 0, 0
        self._lock = threading.Lock()

    def remove_leftovers(self) -> None:
        """Delete files that killed runs left half-written."""
        self._folder.remove_partial_files()

    def add(self, event: str, level: str = "info", **values: Any) -> None:
        """Add a line with the time, the level (info, warning, error), the event, and plain values."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        values = {"time": time, "level": level, "event": event, "run": self._run_id, **values}
        line = json.dumps({key: _shortened(value) for key, value in values.items()}).encode() + b"\n"
        with self._lock:
            self._lines.append(line)

    def flush(self) -> None:
        """Write the lines added since the last time.

        Raises:
            StoreError: OUT cannot be written; nothing is lost, and the next attempt may succeed.
        """
        with self._lock:
            while self._written < len(self._lines):
                count = self._part_length()
                (self._folder / f"{self._run_id}-{self._number:05d}.jsonl").write(b"".join(self._lines[:count]))
                self._written = count
                if count < len(self._lines) or sum(map(len, self._lines)) >= PART_BYTES:
                    self._lines, self._written, self._number = self._lines[count:], 0, self._number + 1

    def _part_length(self) -> int:
        """Return how many of the lines belong to this part."""
        size = 0
        for count, line in enumerate(self._lines, 1):
            size += len(line)
            if size >= PART_BYTES:
                return count
        return len(self._lines)


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > LONGEST:
        return value[:LONGEST] + "..."
    return value


@dataclass
class _SlideSums:
    """Sums over the tasks of an unfinished slide."""

    tasks: int = 0
    seconds_by_stage: dict[str, float] = field(default_factory=dict)
    retries: int = 0


class EventLog(RunLog):
    """A log whose lines are the events of a run; tasks that succeed have lines only with `log_tasks`."""

    def __init__(self, out: StoragePath, run_id: str, log_tasks: bool = False) -> None:
        super().__init__(out, run_id)
        self._log_tasks = log_tasks
        self._slides: dict[str, _SlideSums] = {}

    def begin(self, facts: RunFacts, run_digest: str, slides: int) -> None:
        """Add the first line."""
        self.remove_leftovers()
        self.add("run begun", slides=slides, **asdict(facts), versions=versions(), run_digest=run_digest)

    def worker_joined(self, worker: str) -> None:
        """Add a line for a process that has done its first task."""
        self.add("worker joined", worker=worker)

    def task_done(self, task: Task, performed: Performed) -> None:
        """Add to the slide's sums; add a line if the task planned it, or if each task has one."""
        result = performed.result
        if isinstance(result, Planned) and result.outcome is not None:
            return
        sums = self._slides.setdefault(task.slide.id, _SlideSums())
        sums.tasks += 1
        name = task.stage.name
        sums.seconds_by_stage[name] = round(sums.seconds_by_stage.get(name, 0.0) + performed.seconds, 3)
        if isinstance(result, Planned):
            self.add(
                "slide planned",
                slide=task.slide.id,
                patches=result.patches,
                left=result.left,
                seconds=round(performed.seconds, 3),
                worker=performed.worker,
            )
        elif self._log_tasks:
            more = asdict(result) if isinstance(result, Processed) else {}
            self.add("task done", **_names(task), seconds=performed.seconds, worker=performed.worker, **more)

    def task_failed(self, task: Task, performed: Performed) -> None:
        """Add a line for an attempt that failed."""
        if performed.again and task.slide.id in self._slides:
            self._slides[task.slide.id].retries += 1
        event, level = ("task retried", "warning") if performed.again else ("task failed", "error")
        self.add(event, level, **_names(task), worker=performed.worker, cause=performed.error)

    def slide_done(self, record: SlideRecord) -> None:
        """Add a line for a slide that was worked on."""
        sums = self._slides.pop(record.slide.id, None)
        if record.skipped:
            return
        failed = record.status == SlideStatus.FAILED
        self.add(
            "slide failed" if failed else "slide finished",
            "error" if failed else "info",
            slide=record.slide.id,
            status=record.status,
            patches=record.patches,
            unreadable=record.unreadable,
            seconds=round(record.seconds, 3),
            **({} if sums is None else asdict(sums)),
            **({"cause": record.error} if record.error else {}),
        )

    def message(self, text: str) -> None:
        """Add a line of text."""
        self.add("remark", "warning", text=text)

    def end(self, state: RunState, cause: str, numbers: RunNumbers) -> None:
        """Add the last line."""
        values = numbers.to_json()
        kept = {key: values[key] for key in ("elapsed_s", "slides", "patches", "retries", "stages", "workers")}
        self.add("run ended", "info" if state == RunState.FINISHED else "error", state=state, cause=cause, **kept)


class _WarningHandler(logging.Handler):
    """Adds warnings of this process to the run's log."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Add a line; if no other handler shows warnings, they go where they would go without this one."""
        self._log.add("warned", record.levelname.lower(), text=record.getMessage())
        others = [handler for handler in (*PACKAGE.handlers, *logging.getLogger().handlers) if handler is not self]
        if not others and logging.lastResort is not None:
            logging.lastResort.handle(record)


@contextmanager
def logged_warnings(log: RunLog) -> Iterator[None]:
    """Add warnings of this process to a run's log, as a context."""
    handler = _WarningHandler(log)
    PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)


def _names(task: Task) -> dict[str, Any]:
    return {"slide": task.slide.id, "stage": task.stage.name, "index": list(task.index)}


LISTED = 1000  # slides with a line of their own
DONE = {AUDIT: "audited", EVIDENCE: "looked at"}  # of slides and patches, by work; else they are explained
STATUSES: dict[str, str] = {
    SlideStatus.OK: "explained",  # or as `DONE` says
    SlideStatus.NO_TISSUE: "without tissue",
    SlideStatus.FAILED: "failed",
}


@dataclass(frozen=True)
class ThroughputBars:
    """Patches per second over time.

    Attributes:
        heights: heights of the bars, in per cent of the highest.
        highest: patches per second of the highest bar.
        bar_s: seconds that a bar represents.
    """

    heights: Sequence[float]
    highest: float
    bar_s: float


@dataclass(frozen=True)
class StageRow:
    """A stage with its share (0 to 1) of the time that all workers spent."""

    name: str
    tasks: int
    seconds: float
    share: float


@dataclass(frozen=True)
class SlideRow:
    """A slide that has ended; `picture` is the path of its overview from the page, "" if there is none."""

    name: str
    picture: str
    status: str
    patches: str
    note: str


def run_page(
    status: RunStatus, rows: Mapping[str, Mapping[str, str]], path_of: Callable[[str], str] = folder_name
) -> bytes:
    """Return the page of a run, as UTF-8.

    Args:
        status: the run's status at its end.
        rows: the rows of `slides.csv` by slide id, or similar ones.
        path_of: returns the path of a slide's folder, relative to OUT.
    """
    listed = list(rows.items())[:LISTED]
    is_explain, numbers = status.facts.work not in DONE, status.numbers
    done = DONE.get(status.facts.work, "explained")
    statuses: dict[str, str] = {**STATUSES, SlideStatus.OK: done}
    page = render(
        "run/report.html",
        title=f"Run {status.facts.run}",
        status=status.to_json(),
        finished=status.state == RunState.FINISHED,
        done=done,
        statuses=statuses,
        settings=[(name, _setting(value)) for name, value in status.facts.settings.items()],
        failures=numbers.failures,
        is_explain=is_explain,
        throughput=_throughput(numbers.throughput, numbers.elapsed_s),
        stages=_stages(numbers.stages),
        slides=[_slide(name, row, statuses, "../" * (not is_explain) + _folder(name, path_of)) for name, row in listed],
        ended=len(rows),
    )
    return sealed(f"{COMMENT}{page}".encode())


def _folder(name: str, path_of: Callable[[str], str]) -> str:
    try:
        return path_of(name)
    except ResultError:  # not the name of a slide below OUT: the table is damaged
        return name


def _setting(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _throughput(throughput: ThroughputStatus, elapsed_s: float) -> ThroughputBars | None:
    """Return the bars; None if no patch was explained."""
    width_s, counts = throughput.width_s, throughput.patches
    if not any(counts):
        return None
    last_s = max(width_s / 2, min(width_s, elapsed_s - width_s * (len(counts) - 1)))  # the last bin is not full
    rates = [count / width_s for count in counts[:-1]] + [counts[-1] / last_s]
    return ThroughputBars([100 * rate / max(rates) for rate in rates], max(rates), width_s)


def _stages(stages: Mapping[str, StageStatus]) -> list[StageRow]:
    """Return the stages, longest first."""
    total_s = sum(stage.seconds for stage in stages.values()) or 1e-9
    rows = [StageRow(name, s.tasks, s.seconds, s.seconds / total_s) for name, s in stages.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _slide(name: str, row: Mapping[str, str], statuses: Mapping[str, str], folder: str) -> SlideRow:
    picture = "" if row["status"] == SlideStatus.FAILED else f"{folder}/overview.png"
    status = statuses.get(row["status"], row["status"])
    return SlideRow(name, picture, status, row["patches"], without_path(row["error"], row["path"]))
