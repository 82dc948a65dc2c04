"""The text of `wsi-gradcam status OUT`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from wsi_gradcam.errors import printable
from wsi_gradcam.run.status import AUDIT, ObservedRun, RunState, RunStatus, SlideCounts, WorkerStatus
from wsi_gradcam.system.processes import format_duration

WORKERS_NAMED = 16


def shown(seen: ObservedRun) -> str:
    """Return the state as lines of text, first the run's, then its audit's."""
    return "\n".join(map(printable, [*_lines(seen), *([] if seen.audit is None else _lines(seen.audit))]))


def _lines(seen: ObservedRun) -> Iterator[str]:
    yield f"{seen.out}: {_headline(seen)}"
    if (status := seen.status) is None:
        return
    facts, numbers = status.facts, status.numbers
    yield f"  model     {facts.model}, layer {facts.layer}, targets {', '.join(facts.targets)}"
    yield f"  slides    {_counts(numbers.slides)}"
    of = f" of about {numbers.patches.expected:,}" if numbers.patches.expected else ""
    yield f"  patches   {numbers.patches.done:,}{of}"
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
        RunState.KILLED: "killed, or its machine is gone;",
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
        yield f"  to go on, give the same command again: {command}"
    if status.numbers.failures and state != RunState.RUNNING:
        again = command if status.facts.work == AUDIT else f"{command} --retry-failed"
        yield f"  to try failed slides again: {again}"
