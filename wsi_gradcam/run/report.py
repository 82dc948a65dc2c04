"""`run.html`: what a run did, on one page that needs no other file and no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wsi_gradcam.errors import ResultError
from wsi_gradcam.pages import render
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.run_files import folder_name
from wsi_gradcam.results.seals import COMMENT, sealed
from wsi_gradcam.run.progress import without_path
from wsi_gradcam.run.status import AUDIT, RunState, RunStatus, StageStatus, ThroughputStatus

LISTED = 1000  # slides with a line of their own
STATUSES: dict[str, str] = {
    SlideStatus.OK: "explained",  # of an audit: audited
    SlideStatus.NO_TISSUE: "without tissue",
    SlideStatus.FAILED: "failed",
}


@dataclass(frozen=True)
class ThroughputBars:
    """Patches per second over time.

    Attributes:
        heights: of the bars, in percent of the highest.
        highest: patches per second of the highest bar.
        bar_s: seconds that a bar stands for.
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
    """A slide that has ended; `picture` is the path of its overview from the page, "" where there is none."""

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
        status: of the run at its end.
        rows: the rows of `slides.csv` by slide id, or such as these.
        path_of: returns the path of a slide's folder from OUT.
    """
    listed = list(rows.items())[:LISTED]
    is_audit, numbers = status.facts.work == AUDIT, status.numbers
    done = "audited" if is_audit else "explained"
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
        is_audit=is_audit,
        throughput=_throughput(numbers.throughput, numbers.elapsed_s),
        stages=_stages(numbers.stages),
        slides=[_slide(name, row, statuses, "../" * is_audit + _folder(name, path_of)) for name, row in listed],
        ended=len(rows),
    )
    return sealed(f"{COMMENT}{page}".encode())


def _folder(name: str, path_of: Callable[[str], str]) -> str:
    try:
        return path_of(name)
    except ResultError:  # a name of no slide below OUT: of a table that is damaged
        return name


def _setting(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _throughput(throughput: ThroughputStatus, elapsed_s: float) -> ThroughputBars | None:
    """Return the bars; None where no patch was explained."""
    width_s, counts = throughput.width_s, throughput.patches
    if not any(counts):
        return None
    last_s = max(width_s / 2, min(width_s, elapsed_s - width_s * (len(counts) - 1)))  # the last bin is not full
    rates = [count / width_s for count in counts[:-1]] + [counts[-1] / last_s]
    return ThroughputBars([100 * rate / max(rates) for rate in rates], max(rates), width_s)


def _stages(stages: Mapping[str, StageStatus]) -> list[StageRow]:
    """Return the stages, that which took longest first."""
    total_s = sum(stage.seconds for stage in stages.values()) or 1e-9
    rows = [StageRow(name, s.tasks, s.seconds, s.seconds / total_s) for name, s in stages.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _slide(name: str, row: Mapping[str, str], statuses: Mapping[str, str], folder: str) -> SlideRow:
    picture = "" if row["status"] == SlideStatus.FAILED else f"{folder}/overview.png"
    status = statuses.get(row["status"], row["status"])
    return SlideRow(name, picture, status, row["patches"], without_path(row["error"], row["path"]))
