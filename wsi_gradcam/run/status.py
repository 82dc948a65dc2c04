"""`wsi-gradcam status OUT`: how a run does, seen from outside, by the files in OUT alone.

`status.json`: how far the last run on OUT is, for whoever looks from outside; beside it lies the run's report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.run.claims import HEARTBEAT_S, Holder, read_holder
from wsi_gradcam.system.timer import format_duration

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath


STATUS, REPORT = "status.json", "run.html"
RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"


def write_status(out: StoragePath, status: dict[str, Any]) -> None:
    """Write it, whole.

    Raises:
        StoreError: OUT cannot be written.
    """
    (out / STATUS).write(json.dumps(status, indent=1).encode())


def read_status(out: StoragePath) -> dict[str, Any] | None:
    """What the last run wrote; None where there is nothing, or nothing of ours."""
    try:
        status = json.loads((out / STATUS).read())
    except (FileNotFoundError, ValueError):
        return None
    return status if isinstance(status, dict) and {"run", "state", "slides", "patches"} <= status.keys() else None


# A sign of life is waited for so long where the run's process cannot be looked up from here.
PATIENCE_S = 3 * HEARTBEAT_S
POLL_S = 0.25
WATCHED_S = 2.0
STARTING, KILLED = "starting", "killed"
WORKERS_NAMED = 16


@dataclass(frozen=True)
class State:
    """How a run does.

    Attributes:
        state: starting, running, finished, stopped, or killed.
        status: what the run wrote last; empty where it has not written yet.
        holder: who holds the claim.
        report: where its report is; "" where there is none.
    """

    out: str
    state: str
    status: dict[str, Any]
    holder: Holder | None
    report: str

    @property
    def well(self) -> bool:
        """Whether nothing has gone wrong up to now."""
        return self.state in (STARTING, RUNNING, FINISHED) and not self.status.get("failures")

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        process = None if self.holder is None else {"host": self.holder.process.host, "pid": self.holder.process.pid}
        return {**self.status, "out": self.out, "state": self.state, "process": process, "report": self.report}


def look(out: str | PathLike[str], watch: bool = False) -> Iterator[State]:
    """How the run on OUT does; where it is watched, again and again until it ends.

    Raises:
        ConfigError: there is no run.
        StoreError: OUT cannot be read.
    """
    place = storage_path(out)
    while True:
        state = _state(place)
        yield state
        if not watch or state.state not in (STARTING, RUNNING):
            return
        time.sleep(WATCHED_S)


def _state(out: StoragePath) -> State:
    holder = read_holder(out)
    lives = holder is not None and _lives(out, holder)
    status = read_status(out)
    if status is None and not lives:
        raise ConfigError(
            f"{out}: no run there that tells of itself, expected a folder that 'wsi-gradcam explain' uses"
        )
    report = str(out / REPORT) if (out / REPORT).exists() else ""
    if holder is not None and lives and (status is None or status["run"] != holder.run_id):
        return State(str(out), STARTING, {}, holder, report)
    assert status is not None
    state = status["state"] if status["state"] != RUNNING or lives else KILLED
    return State(str(out), state, status, holder if lives else None, report)


def _lives(out: StoragePath, holder: Holder) -> bool:
    """Whether the run is at work: by its process where that can be looked up, else by a change of its claim."""
    alive = holder.process.alive()
    if alive is not None:
        return alive
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        time.sleep(POLL_S)
        now = read_holder(out)
        if now != holder:
            return now is not None
    return False


def shown(state: State) -> str:
    """The state as lines of text."""
    return "\n".join(_lines(state))


def _lines(state: State) -> Iterator[str]:
    yield f"{state.out}: {_headline(state)}"
    status = state.status
    if not status:
        return
    yield f"  model     {status['model']}, layer {status['layer']}, targets {', '.join(status['targets'])}"
    yield f"  slides    {_counts(status['slides'])}"
    patches = status["patches"]
    of = f" of about {patches['expected']:,}" if patches["expected"] else ""
    yield f"  patches   {patches['done']:,}{of}"
    if state.state == RUNNING:
        left = "not known yet" if status["left_s"] is None else f"about {format_duration(status['left_s'])}"
        yield f"  pace      {status['patches_per_s']:.1f} patches/s; time left {left}"
    yield from _workers(status["workers"])
    if state.state == RUNNING and status["dashboard"]:
        yield f"  dashboard {status['dashboard']}"
    for cause in status["failures"]:
        more = " ..." if cause["count"] > len(cause["slides"]) else ""
        yield f"  failed    {cause['count']}: {cause['cause']} ({', '.join(cause['slides'])}{more})"
    if state.report and state.state not in (RUNNING, KILLED):
        yield f"  report    {state.report}"
    yield from _advice(state)


def _headline(state: State) -> str:
    status, where = state.status, f" ({state.holder})" if state.holder else ""
    if state.state == STARTING:
        return f"starting{where}"
    took = format_duration(status["elapsed_s"])
    if state.state == RUNNING:
        return f"running for {took}{where}"
    end = {FINISHED: "finished", STOPPED: f"stopped: {status['cause']};", KILLED: "killed, or its machine is gone;"}
    return f"{end[state.state]} after {took}, at {status['updated']} (run {status['run']})"


def _counts(slides: dict[str, int]) -> str:
    ends = [f"{count} {name.replace('_', ' ')}" for name, count in slides.items() if name not in ("total", "done")]
    return f"{slides['done']} of {slides['total']} ended" + (f" ({', '.join(ends)})" if ends else "")


def _workers(workers: dict[str, dict[str, float]]) -> Iterator[str]:
    for name, worker in list(workers.items())[:WORKERS_NAMED]:
        yield (
            f"  worker    {name}: {worker['patches_per_s']:.1f} patches/s, model busy {worker['model']:.0%}, waiting "
            f"for pixels {worker['waiting']:.0%}, reading {worker['reading']:.0%}"
        )
    if len(workers) > WORKERS_NAMED:
        yield f"  worker    and {len(workers) - WORKERS_NAMED} more"


def _advice(state: State) -> Iterator[str]:
    command = state.status["command"]
    if state.state in (STOPPED, KILLED):
        yield f"  to go on, give the same command again: {command}"
    if state.status["failures"] and state.state != RUNNING:
        yield f"  to try failed slides again: {command} --retry-failed"
