"""Workers whose tasks are sleeps, many in a process: `python -m benchmarks.simulated ADDRESS COUNT THREADS SLOWNESS S`.

They are real Dask workers with the run's real plugin; only `perform` is replaced. For `scale.py`, which measures S
(JSON): seconds of the stages, what a span takes beside the model, and how many blocks a slide has.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import dask
from distributed import Worker, get_worker

from wsi_gradcam.executors.dask import plugins
from wsi_gradcam.results.manifest import SlideOutcome, SlideStatus
from wsi_gradcam.run.types import Performed, Planned, Processed, Task, TaskResult

PATCHES, SPAN = 1000, 256  # of a slide
RATE = 1000.0  # patches/s of a GPU, as of ResNet-50 at 224 px in half precision; assumed, no GPU was at hand
# Seconds beside the stages': to read the first batch of an batch, while which the GPU waits, and to write a span.
FIRST_BATCH, WRITING = "first batch", "writing"
# What belongs to a worker of its own machine is not to slow down its neighbours here.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.interval": "30s",
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
}


class Clock:
    """A record of the tasks that the workers of this process ran, and when."""

    def __init__(self, slowness: float) -> None:
        self.slowness = slowness
        self.seconds: dict[str, float] = {}
        self.blocks: list[int] = []  # of a slide, by level
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self.patches = 0
        self.within_s = 0.0  # while tasks that explain are at work, one or two in a worker
        self._at_work: defaultdict[str, int] = defaultdict(int)
        self._since: dict[str, float] = {}
        self._devices: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self.first, self.last = float("inf"), 0.0
        self._lock = threading.Lock()
        self._next = threading.local()  # what this thread reads meanwhile

    def perform(self, context: Any, task: Task, upcoming: Task | None = None) -> Performed:
        """Replace `run.context.perform`."""
        start, worker = time.time(), get_worker().address
        explains = task.stage.name == "explain"
        with self._lock:
            self._at_work[worker] += explains
            if explains and self._at_work[worker] == 1:
                self._since[worker] = start
        patches = min(SPAN, PATCHES - SPAN * task.index[0]) if task.stage.name == "explain" else 0
        for name, seconds in self._parts(task, patches):
            with self._devices[worker] if name == "explain" else nullcontext():  # two share a GPU, which does one thing
                time.sleep(self.slowness * seconds)
            with self._lock:
                self.spent_s[name] += seconds
        self._next.task = upcoming
        end = time.time()
        if explains:
            with self._lock:
                self.patches += patches
                self._at_work[worker] -= 1
                if not self._at_work[worker]:
                    self.within_s += end - self._since[worker]
                self.first, self.last = min(self.first, start), max(self.last, end)
        return Performed(self._result_of(task, patches), end - start, str(os.getpid()))

    def _parts(self, task: Task, patches: int) -> Iterator[tuple[str, float]]:
        """The tasks that run one after the other, and their seconds."""
        if task.stage.name != "explain":
            yield task.stage.name, self.seconds[task.stage.name]
            return
        if getattr(self._next, "task", None) != task:
            yield FIRST_BATCH, self.seconds[FIRST_BATCH]
        yield task.stage.name, patches / RATE
        yield WRITING, self.seconds[WRITING]

    def _result_of(self, task: Task, patches: int) -> TaskResult:
        """Return a result like that of the stage."""
        if task.stage.name == "plan":
            spans = list(range(-(-PATCHES // SPAN)))
            return Planned(PATCHES, PATCHES, spans, [list(range(count)) for count in self.blocks])
        if task.stage.name == "finish":
            return SlideOutcome(SlideStatus.OK, PATCHES, 0, "")
        return Processed(patches)

    def report(self) -> dict[str, Any]:
        """Return the record, once for each process."""
        return {
            "pid": os.getpid(),
            "spent_s": dict(self.spent_s),
            "within_s": self.within_s,
            "patches": self.patches,
            "first": self.first,
            "last": self.last,
        }


def report() -> dict[str, Any]:
    """On a worker."""
    return CLOCK.report()


async def work(address: str, count: int, threads: int) -> None:
    """Workers of a GPU each, until the scheduler ends them."""
    workers = [
        Worker(
            address,
            nthreads=threads,
            resources={"GPU": 1, "CPU": threads - 4},
            memory_limit=0,
            dashboard=False,
            silence_logs=50,
        )
        for _ in range(count)
    ]
    for start in range(0, count, 16):
        await asyncio.gather(*workers[start : start + 16])
    await asyncio.gather(*(worker.finished() for worker in workers))


CLOCK = Clock(1.0)

if __name__ == "__main__":
    from benchmarks import simulated  # by the name that tasks know it by

    costs = json.loads(sys.argv[5])
    simulated.CLOCK.slowness = float(sys.argv[4])
    simulated.CLOCK.seconds, simulated.CLOCK.blocks = costs["seconds"], costs["blocks"]
    changes: dict[str, Any] = {"perform": simulated.CLOCK.perform, "check_device": lambda *_: None}
    vars(plugins).update(changes)
    with dask.config.set(QUIET):
        asyncio.run(work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
