"""`status.json`: the progress of a run, and what the files in OUT alone show about a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from os import PathLike
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ConfigError, printable
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.seals import sealed_json
from wsi_gradcam.run.claims import AUDIT as AUDIT
from wsi_gradcam.run.claims import EVIDENCE, HEARTBEAT_S, Holder, read_holder
from wsi_gradcam.system.processes import format_duration

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath

STATUS, REPORT = "status.json", "run.html"
PATIENCE_S = 3 * HEARTBEAT_S  # how long to wait for a sign of life if the run's process cannot be looked up
POLL_S = 0.25
WATCHED_S = 2.0
WORKERS_NAMED = 16  # in the text


class RunState(StrEnum):
    """The state of a run; RUNNING, FINISHED and STOPPED are what status.json says."""

    STARTING = "starting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    KILLED = "killed"


@dataclass(frozen=True)
class RunFacts:
    """The facts that stay the same all through a run.

    Attributes:
        run: its id.
        begun: when it began, UTC.
        command: the command line, URLs without secrets.
        engine: what runs the network, and its precision.
        settings: the run's settings, as plain values.
        dashboard: address of a page that shows the work; "" if there is none.
        work: explain, audit or evidence.
        notes: what was done to explain the model.
        remarks: what the search for slides left out.
    """

    run: str
    begun: str
    command: str
    out: str
    model: str
    model_digest: str
    layer: str
    engine: str
    targets: list[str]
    settings: dict[str, Any]
    dashboard: str
    work: str = "explain"
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SlideCounts:
    """Numbers of slides: in all, ended, ended before this run, and ended by status."""

    total: int
    done: int
    skipped: int
    by_status: dict[str, int]

    def to_json(self) -> dict[str, int]:
        """Return the counts, with those by status among the others."""
        return {"total": self.total, "done": self.done, "skipped": self.skipped, **self.by_status}

    @classmethod
    def from_json(cls, values: dict[str, int]) -> SlideCounts:
        """Return the counts that `to_json` gave."""
        by_status = {key: count for key, count in values.items() if key not in ("total", "done", "skipped")}
        return cls(values["total"], values["done"], values["skipped"], by_status)


@dataclass(frozen=True)
class PatchCounts:
    """Numbers of patches: done, in the slides planned so far, and expected in all.

    Attributes:
        encoded: those whose features were computed first, for slide-level models.
    """

    done: int
    planned: int
    expected: int
    encoded: int = 0


@dataclass(frozen=True)
class Part:
    """A pass over the slides, where the work takes several: its number from 1 on, of how many, and what it does.

    Attributes:
        done: how many of its `patches` are done, where that is told.
    """

    number: int
    of: int
    name: str
    done: int = 0
    patches: int = 0

    def __str__(self) -> str:
        return f"pass {self.number} of {self.of}, {self.name}"


@dataclass(frozen=True)
class StageStatus:
    """Tasks of a stage that are done, and their seconds in sum over all workers."""

    tasks: int
    seconds: float


@dataclass(frozen=True)
class WorkerStatus:
    """The work of a process since its first task began, `since_s` seconds after the run's start.

    Attributes:
        tasks, patches, seconds: sums of the tasks done.
        waited_s, model_s, read_s: seconds that the model waited for pixels and worked, and that threads read slides.
        patches_per_s: the mean rate.
        model, waiting, reading: the same times as shares of the time since then, 0 to 1.
        at_once: the most patches in a forward pass, if memory did not hold a batch; 0 if it did.
    """

    since_s: float
    tasks: int
    patches: int
    seconds: float
    waited_s: float
    model_s: float
    read_s: float
    patches_per_s: float
    model: float
    waiting: float
    reading: float
    at_once: int = 0


@dataclass(frozen=True)
class ThroughputStatus:
    """Patches done in consecutive spans of time, `width_s` seconds long."""

    width_s: float
    patches: list[int]


@dataclass(frozen=True)
class FailureCause:
    """A reason why slides failed: how many, and some of them."""

    cause: str
    count: int
    slides: list[str]


@dataclass(frozen=True)
class SlowSlide:
    """A slide that took long."""

    slide: str
    seconds: float
    patches: int


@dataclass(frozen=True)
class RunNumbers:
    """The progress of a run in numbers.

    Attributes:
        patches_per_s: over the last minutes.
        left_s: seconds that the rest will take; None if that is not known yet.
        retries: failed attempts at tasks that were repeated.
        part: the present pass, if the work takes several; `patches` are then those of all passes so far.
    """

    elapsed_s: float
    slides: SlideCounts
    patches: PatchCounts
    patches_per_s: float
    left_s: float | None
    retries: int
    stages: dict[str, StageStatus]
    workers: dict[str, WorkerStatus]
    throughput: ThroughputStatus
    failures: list[FailureCause]
    slowest: list[SlowSlide]
    part: Part | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain values."""
        return {**asdict(self), "slides": self.slides.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunNumbers:
        """Return the numbers that `to_json` gave; other values raise KeyError or TypeError."""
        return cls(
            values["elapsed_s"],
            SlideCounts.from_json(values["slides"]),
            PatchCounts(**values["patches"]),
            values["patches_per_s"],
            values["left_s"],
            values["retries"],
            {name: StageStatus(**stage) for name, stage in values["stages"].items()},
            {name: WorkerStatus(**worker) for name, worker in values["workers"].items()},
            ThroughputStatus(**values["throughput"]),
            [FailureCause(**cause) for cause in values["failures"]],
            [SlowSlide(**slide) for slide in values["slowest"]],
            Part(**part) if (part := values.get("part")) else None,
        )


@dataclass(frozen=True)
class RunStatus:
    """The content of status.json: the run, its state, when that was written (UTC), and the progress.

    Attributes:
        cause: why it was stopped; "" if it was not.
    """

    facts: RunFacts
    state: RunState
    cause: str
    updated: str
    numbers: RunNumbers

    def to_json(self) -> dict[str, Any]:
        """Return the status as plain values."""
        state = {"state": self.state, "cause": self.cause, "updated": self.updated}
        return {**asdict(self.facts), **state, **self.numbers.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunStatus:
        """Return the status that `to_json` gave; other values raise KeyError, TypeError or ValueError."""
        facts = RunFacts(**{key: values[key] for key in RunFacts.__dataclass_fields__ if key in values})
        numbers = RunNumbers.from_json(values)
        return cls(facts, RunState(values["state"]), values["cause"], values["updated"], numbers)


def now() -> str:
    """Return the time, UTC, to the second."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def write_status(out: StoragePath, status: RunStatus) -> None:
    """Write status.json.

    Raises:
        StoreError: OUT cannot be written.
    """
    (out / STATUS).write(sealed_json(status.to_json(), indent=1))


def read_status(out: StoragePath) -> RunStatus | None:
    """Return what the last run on OUT wrote; None if there is nothing, or nothing of ours."""
    try:
        return RunStatus.from_json(read_json((out / STATUS).read(SMALL_BYTES)))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class ObservedRun:
    """A run as seen from outside.

    Attributes:
        out: the folder that it works on.
        state: as seen now: a run that does not say that it has ended, but is no longer alive, was killed.
        status: what it wrote last; None if it has not written yet.
        holder: who holds the claim; None if nobody does.
        report: where its report is; "" if there is none.
        audit, evidence: of the run, if there are any.
    """

    out: str
    state: RunState
    status: RunStatus | None
    holder: Holder | None
    report: str
    audit: ObservedRun | None = None
    evidence: ObservedRun | None = None

    @property
    def beside(self) -> dict[str, ObservedRun]:
        """Return what works on the run's results, by its name."""
        return {name: one for name, one in ((AUDIT, self.audit), (EVIDENCE, self.evidence)) if one is not None}

    @property
    def is_active(self) -> bool:
        """True while the run, its audit or the search for its evidence is at work."""
        return self.state in (RunState.STARTING, RunState.RUNNING) or any(one.is_active for one in self.beside.values())

    @property
    def is_well(self) -> bool:
        """True where nothing has gone wrong up to now, neither in the run nor in its audit and evidence."""
        failed = self.status is not None and bool(self.status.numbers.failures)
        ended_badly = self.state in (RunState.STOPPED, RunState.KILLED)
        return not (failed or ended_badly) and all(one.is_well for one in self.beside.values())

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain values; those of audit and evidence beside the run's, as `audit`, `evidence`."""
        process = None if self.holder is None else {"host": self.holder.process.host, "pid": self.holder.process.pid}
        status = {} if self.status is None else self.status.to_json()
        beside = {name: one.to_json() for name, one in self.beside.items()}
        return {**status, "out": self.out, "state": self.state, "process": process, "report": self.report, **beside}


def observe(out: str | PathLike[str], watch: bool = False) -> Iterator[ObservedRun]:
    """Yield the state of the run on OUT, its audit and its evidence; with `watch` again and again until all have ended.

    Raises:
        ConfigError: there is none of them.
        StoreError: OUT cannot be read.
    """
    place = storage_path(out)
    while True:
        seen = _observed(place)
        yield seen
        if not watch or not seen.is_active:
            return
        time.sleep(WATCHED_S)


def _observed(out: StoragePath) -> ObservedRun:
    run, audit, evidence = (_state(place) for place in (out, out / AUDIT, out / EVIDENCE))
    if run is not None:
        return replace(run, audit=audit, evidence=evidence)
    if audit is not None:
        return replace(audit, evidence=evidence)
    if evidence is not None:
        return evidence
    from wsi_gradcam.results.run import no_result  # not above: it needs much that a status does not

    raise ConfigError(no_result(out))


def _state(out: StoragePath) -> ObservedRun | None:
    """Return the state of the run on OUT itself; None if there is none."""
    found = _claimed(out)
    holder = None if found is None else found[1]
    alive = found is not None and _is_alive(*found)
    status = read_status(out)
    if status is None and not alive:
        return None
    report = str(out / REPORT) if (out / REPORT).exists() else ""
    if holder is not None and alive and (status is None or status.facts.run != holder.run_id):
        return ObservedRun(str(out), RunState.STARTING, None, holder, report)
    assert status is not None
    state = status.state if status.state != RunState.RUNNING or alive else RunState.KILLED
    return ObservedRun(str(out), state, status, holder if alive else None, report)


def _claimed(out: StoragePath) -> tuple[StoragePath, Holder] | None:
    """Return the holder of the claim on OUT itself, and the claim's place: an audit's is above OUT/audit."""
    own = read_holder(out)  # an audit's too, if an older version wrote it
    if own is not None and own.work not in (AUDIT, EVIDENCE):
        return out, own
    above = read_holder(out.parent) if out.name in (AUDIT, EVIDENCE) else None
    return (out.parent, above) if above is not None and above.work == out.name else None


def _is_alive(out: StoragePath, holder: Holder) -> bool:
    """Return whether the run is active: by its process if that can be looked up, else by a change of its claim."""
    alive = holder.process.alive()
    if alive is not None:
        return alive
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        time.sleep(POLL_S)
        latest = read_holder(out)
        if latest != holder:
            return latest is not None
    return False


def shown(seen: ObservedRun) -> str:
    """Return the state as lines of text, first the run's, then those of its audit and its evidence."""
    return "\n".join(map(printable, (line for one in (seen, *seen.beside.values()) for line in _lines(one))))


def _lines(seen: ObservedRun) -> Iterator[str]:
    yield f"{seen.out}: {_headline(seen)}"
    if (status := seen.status) is None:
        return
    facts, numbers = status.facts, status.numbers
    yield f"  model     {facts.model}, layer {facts.layer}, targets {', '.join(facts.targets)}"
    yield f"  slides    {_counts(numbers.slides)}"
    of = f" of about {numbers.patches.expected:,}" if numbers.patches.expected else ""
    first = f"; {numbers.patches.encoded:,} encoded" if numbers.patches.encoded else ""
    if (part := numbers.part) is None:
        yield f"  patches   {numbers.patches.done:,}{of}{first}"
    else:
        yield f"  pass      {part.number} of {part.of}, {part.name}: {part.done:,} of {part.patches:,} patches"
    if seen.state == RunState.RUNNING:
        left = "not known yet" if numbers.left_s is None else f"about {format_duration(numbers.left_s)}"
        yield f"  pace      {numbers.patches_per_s:.1f} patches/s; time left {left}"
    yield from _workers(numbers.workers)
    if seen.state == RunState.RUNNING and facts.dashboard:
        yield f"  dashboard {facts.dashboard}"
    for cause in numbers.failures:
        more = " ..." if cause.count > len(cause.slides) else ""
        yield f"  failed    {cause.count}: {cause.cause} ({', '.join(cause.slides)}{more})"
    if seen.report and seen.state not in (RunState.RUNNING, RunState.KILLED):
        yield f"  report    {seen.report}"
    yield from _advice(seen.state, status)


def _headline(seen: ObservedRun) -> str:
    where = f" ({seen.holder})" if seen.holder else ""
    if seen.status is None:
        return f"starting{where}"
    status, took = seen.status, format_duration(seen.status.numbers.elapsed_s)
    if seen.state == RunState.RUNNING:
        return f"running for {took}{where}"
    end = {
        RunState.FINISHED: "finished",
        RunState.STOPPED: f"stopped: {status.cause};",
        RunState.KILLED: "killed, or its machine was lost;",
    }
    return f"{end[seen.state]} after {took}, at {status.updated} (run {status.facts.run})"


def _counts(slides: SlideCounts) -> str:
    ends = [f"{slides.skipped} skipped", *(f"{n} {name.replace('_', ' ')}" for name, n in slides.by_status.items())]
    return f"{slides.done} of {slides.total} ended ({', '.join(ends)})"


def _workers(workers: Mapping[str, WorkerStatus]) -> Iterator[str]:
    for name, worker in list(workers.items())[:WORKERS_NAMED]:
        yield (
            f"  worker    {name}: {worker.patches_per_s:.1f} patches/s, model busy {worker.model:.0%}, waiting "
            f"for pixels {worker.waiting:.0%}, reading {worker.reading:.0%}"
        )
    if len(workers) > WORKERS_NAMED:
        yield f"  worker    and {len(workers) - WORKERS_NAMED} more"


def _advice(state: RunState, status: RunStatus) -> Iterator[str]:
    command = status.facts.command
    if state in (RunState.STOPPED, RunState.KILLED):
        yield f"  to continue, give the same command again: {command}"
    if status.numbers.failures and state != RunState.RUNNING:
        again = command if status.facts.work in (AUDIT, EVIDENCE) else f"{command} --retry-failed"
        yield f"  to retry failed slides: {again}"
