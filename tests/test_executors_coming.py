"""Workers with GPUs come and go, all at once too: simulated ones, with a real scheduler and the real executor."""

from __future__ import annotations

import json
import random
import subprocess
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulated import FIRST_BATCH, PATCHES, SPAN, WRITING, report
from tests.clusters import process, scheduler
from tests.runs import ROOT
from wsi_gradcam.executors.dask import DaskExecutor
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.run.plan import RunPlan
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.run.types import Performed, Task
from wsi_gradcam.run.workload import ExplainWorkload

COSTS = {
    "seconds": dict.fromkeys(("plan", "stitch", "coarsen", "finish", FIRST_BATCH, WRITING), 0.01),
    "blocks": [1, 1],
}
SLOWNESS = 0.4  # a span takes 0.1 s
SPANS = -(-PATCHES // SPAN)


def gpus(address: str, count: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A process with so many workers that declare a GPU."""
    arguments = [address, str(count), "4", str(SLOWNESS), json.dumps(COSTS)]
    return process(ROOT, *arguments, module="benchmarks.simulated")


def spans_by_process(
    folder: Path, address: str, slides: int, happens: dict[int, Callable[[], Any]]
) -> tuple[list[str], dict[int, int]]:
    """Statuses of slides, and patches of each process that is there at the end; what `happens` does, by spans done."""
    seen = 0

    def observe(task: Task, performed: Performed) -> None:
        nonlocal seen
        seen += task.stage.name == "explain" and not performed.error
        if task.stage.name == "explain" and seen in happens:
            happens.pop(seen)()

    run = RunPlan(LocalPath(folder / "out"), None, None, make_settings(device="cuda"), ())  # type: ignore[arg-type]
    entries = [SlideEntry(f"{i}.svs", f"/archive/{i}.svs") for i in range(slides)]
    executor = DaskExecutor(scheduler=address, device="cuda", wait_s=30)
    try:
        ended: list[str] = [record.status for record in executor.run(ExplainWorkload(run), entries, observe)]
        told = executor._client.run(report).values()
    finally:
        executor.close()
    assert not happens
    return ended, {each["pid"]: each["patches"] for each in told}


def test_all_workers_are_preempted_at_once_and_others_come(tmp_path: Path) -> None:
    with ExitStack() as stack:
        _, address = stack.enter_context(scheduler(tmp_path))
        first = stack.enter_context(gpus(address, 2))
        later: list[subprocess.Popen[bytes]] = []

        def preempt() -> None:
            first.kill()
            first.wait(10)
            later.append(stack.enter_context(gpus(address, 2)))

        ended, patches = spans_by_process(tmp_path, address, 12, {6: preempt})
    assert ended == ["ok"] * 12
    assert list(patches) == [later[0].pid]
    assert patches[later[0].pid] > PATCHES


def test_workers_that_join_get_work_and_those_that_leave_cost_none(tmp_path: Path) -> None:
    with ExitStack() as stack:
        _, address = stack.enter_context(scheduler(tmp_path))
        first = stack.enter_context(gpus(address, 1))
        later: list[subprocess.Popen[bytes]] = []
        happens = {4: lambda: later.append(stack.enter_context(gpus(address, 2))), 100: first.kill}
        ended, patches = spans_by_process(tmp_path, address, 40, happens)
    assert ended == ["ok"] * 40
    assert list(patches) == [later[0].pid]
    # Of the spans before the first worker left, and of all that came after.
    assert patches[later[0].pid] > (40 * SPANS - 100) * SPAN / 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_workers_that_die_all_the_time_lose_no_slide(tmp_path: Path, seed: int) -> None:
    """One after the other, now and then all four at once; each comes back under another address."""
    dice, over, killed = random.Random(seed), threading.Event(), 0
    with ExitStack() as stack:
        _, address = stack.enter_context(scheduler(tmp_path))
        processes = [stack.enter_context(gpus(address, 1)) for _ in range(4)]

        def kill() -> None:
            nonlocal killed
            while killed < 25 and not over.wait(dice.uniform(0.3, 2.0)):
                for i in [dice.randrange(4)] if dice.random() < 0.75 else range(4):
                    processes[i].kill()
                    processes[i].wait(10)
                    processes[i] = stack.enter_context(gpus(address, 1))
                    killed += 1

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            ended, _ = spans_by_process(tmp_path, address, 200, {})
        finally:
            over.set()
            killer.join()
    assert ended == ["ok"] * 200
    assert killed >= 10
