"""Workers whose tasks are sleeps, many in one process: `python -m benchmarks.simulated ADDRESS COUNT THREADS SLOWNESS`.

They are real Dask workers with the run's real plugin; only `perform` is replaced. For `scale.py`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import defaultdict
from typing import Any

import dask
from distributed import Worker

from wsi_gradcam.executors.dask import plugin
from wsi_gradcam.stages import Explained, Pending, Performed, Task

PATCHES, SPAN = 1000, 256  # of a slide
BLOCKS = (12, 4, 1, 1, 1, 1, 1)  # by level: 100,000 x 80,000 px at the default stride
# Patches/s of a GPU: ResNet-50 at 224 px runs forward at 1,000 to 2,500 (T4 to A100, half precision, published
# figures); explaining the last layer costs a tenth more. The seconds of other stages are assumed, not measured.
RATE = 1000.0
SECONDS = {"plan": 0.5, "stitch": 0.1, "coarsen": 0.04, "finish": 0.4}
# What belongs to a worker of its own machine is not to slow down its neighbours here.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.interval": "30s",
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
}


class Clock:
    """What the workers of this process were at, and when."""

    def __init__(self, slowness: float) -> None:
        self.slowness = slowness
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self.patches = 0
        self.first, self.last = float("inf"), 0.0

    def perform(self, context: Any, task: Task, then: Task | None = None) -> Performed:
        """In place of `stages.perform`."""
        start = time.time()
        patches = min(SPAN, PATCHES - SPAN * task.index[0]) if task.stage == "explain" else 0
        time.sleep(self.slowness * (SECONDS[task.stage] if task.stage != "explain" else patches / RATE))
        end = time.time()
        self.spent_s[task.stage] += end - start
        if task.stage == "explain":
            self.patches += patches
            self.first, self.last = min(self.first, start), max(self.last, end)
        return Performed(result_of(task, patches), end - start, str(os.getpid()))

    def report(self) -> dict[str, Any]:
        """For the one who asks, once a process."""
        return {
            "pid": os.getpid(), "spent_s": dict(self.spent_s), "patches": self.patches, "first": self.first,
            "last": self.last,
        }  # fmt: skip


def result_of(task: Task, patches: int) -> Any:
    """What the stage would return."""
    if task.stage == "plan":
        spans = list(range(-(-PATCHES // SPAN)))
        return Pending(PATCHES, PATCHES, spans, [list(range(count)) for count in BLOCKS], None)
    if task.stage == "finish":
        return {"status": "ok", "patches": PATCHES, "unreadable": 0, "cause": ""}
    return Explained(patches)


def report() -> dict[str, Any]:
    """On a worker."""
    return CLOCK.report()


async def work(address: str, count: int, threads: int) -> None:
    """Workers of a GPU each, until the scheduler ends them."""
    workers = [
        Worker(address, nthreads=threads, resources={"GPU": 1}, memory_limit=0, dashboard=False, silence_logs=50)
        for _ in range(count)
    ]
    for start in range(0, count, 16):
        await asyncio.gather(*workers[start : start + 16])
    await asyncio.gather(*(worker.finished() for worker in workers))


CLOCK = Clock(1.0)

if __name__ == "__main__":
    from benchmarks import simulated  # by the name that tasks know it by

    simulated.CLOCK.slowness = float(sys.argv[4])
    changes: dict[str, Any] = {
        "perform": simulated.CLOCK.perform, "check_device": lambda *_: None,
    }  # fmt: skip
    vars(plugin).update(changes)
    with dask.config.set(QUIET):
        asyncio.run(work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
