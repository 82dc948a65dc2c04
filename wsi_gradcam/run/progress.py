"""How far a run is, in numbers: counts, rates, who was busy with what, and how long it will still take."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.run.types import Performed, Planned, Processed, SlideRecord, Task

BINS = 120  # of throughput over time, at least half of which are in use in a long run
RECENT_S = 120.0
CAUSES, NAMED, SLOWEST = 50, 5, 10  # told: causes of failures, slides of each, slides that took longest


@dataclass
class Throughput:
    """Patches over time, in a bounded number of bins that become wider as time goes by."""

    width_s: float = 1.0
    patches: list[int] = field(default_factory=list)

    def add(self, at_s: float, count: int) -> None:
        """Count patches that were done `at_s` seconds after the start."""
        while at_s >= BINS * self.width_s:
            self.width_s *= 2
            self.patches = [sum(self.patches[i : i + 2]) for i in range(0, len(self.patches), 2)]
        number = int(at_s / self.width_s)
        self.patches += [0] * (number + 1 - len(self.patches))
        self.patches[number] += count

    def since(self, from_s: float) -> int:
        """Patches in the bins that begin at `from_s` or later."""
        return sum(self.patches[math.ceil(from_s / self.width_s) :])


@dataclass
class StageSum:
    """Tasks of a stage, and their seconds in sum over all workers."""

    tasks: int = 0
    seconds: float = 0.0


@dataclass
class WorkerSum:
    """What a worker has done since its first task began, `since_s` seconds after the run's start."""

    since_s: float
    tasks: int = 0
    patches: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    model_s: float = 0.0
    read_s: float = 0.0

    def shares(self, now_s: float, readers: int) -> dict[str, float]:
        """Patches per second; shares of the time: the model worked, it waited for pixels, reading threads read."""
        wall_s = max(1e-9, now_s - self.since_s)
        times = {"model": self.model_s, "waiting": self.waited_s, "reading": self.read_s / readers}
        return {"patches_per_s": self.patches / wall_s, **{k: min(1.0, s / wall_s) for k, s in times.items()}}


@dataclass
class _Cause:
    """Slides that failed for the same reason."""

    count: int = 0
    slides: list[str] = field(default_factory=list)


class Progress:
    """Counts what a run tells.

    Attributes:
        slides: how many there are.
        ended: slides by how they ended.
        skipped: of these, those that had ended before this run.
        patches: to be done, of the slides planned so far; `patches_done` of them are.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self.slides = self.skipped = self.planned = self.retries = 0
        self.readers = 1
        self.ended: Counter[str] = Counter()
        self.patches = self.patches_done = 0
        self.stages: dict[str, StageSum] = {}
        self.workers: dict[str, WorkerSum] = {}
        self.throughput = Throughput()
        self._in_work: set[str] = set()
        self._never_planned = 0
        self._causes: dict[str, _Cause] = {}
        self._slowest: list[tuple[float, str, int]] = []

    def begin(self, slides: int, readers: int = 1) -> None:
        """The work begins now, on so many slides; a worker reads with so many threads."""
        self._started = self._clock()
        self.slides, self.readers = slides, readers

    def task_done(self, task: Task, performed: Performed) -> None:
        """Count an attempt at a task."""
        if performed.error:
            self.retries += performed.again
            return
        now_s, result = self.elapsed_s(), performed.result
        stage = self.stages.setdefault(task.stage.name, StageSum())
        stage.tasks, stage.seconds = stage.tasks + 1, stage.seconds + performed.seconds
        began_s = max(0.0, now_s - performed.seconds)
        worker = self.workers.setdefault(performed.worker, WorkerSum(began_s))
        worker.tasks, worker.seconds = worker.tasks + 1, worker.seconds + performed.seconds
        if isinstance(result, Planned):
            self.planned += 1
            self.patches += result.left
            self._in_work.add(task.slide.id)
        elif isinstance(result, Processed):
            self.patches_done += result.patches
            self.throughput.add(now_s, result.patches)
            worker.patches += result.patches
            worker.waited_s += result.waited_s
            worker.model_s += result.model_s
            worker.read_s += result.read_s

    def slide_done(self, record: SlideRecord) -> None:
        """Count a slide that has ended."""
        self.ended[record.status] += 1
        self.skipped += record.skipped
        self._never_planned += record.slide.id not in self._in_work
        self._in_work.discard(record.slide.id)
        if record.status == SlideStatus.FAILED:
            self._count_cause(record)
        if not record.skipped:
            item = (record.seconds, record.slide.id, record.patches)
            (heapq.heappush if len(self._slowest) < SLOWEST else heapq.heappushpop)(self._slowest, item)

    def elapsed_s(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self._started

    @property
    def slides_done(self) -> int:
        """Slides that have ended, however."""
        return self.ended.total()

    @property
    def patches_expected(self) -> int:
        """Patches to be done in all, with the mean of the slides planned so far for the others."""
        unplanned = max(0, self.slides - self.planned - self._never_planned)
        return self.patches + round(unplanned * self.patches / self.planned) if self.planned else 0

    def rate(self) -> float:
        """Patches per second over the last minutes."""
        now_s = self.elapsed_s()
        width_s = self.throughput.width_s
        from_s = math.ceil(max(0.0, now_s - max(RECENT_S, 2 * width_s)) / width_s) * width_s  # whole bins
        return self.throughput.since(from_s) / max(1e-9, now_s - from_s)

    def left_s(self) -> float | None:
        """Seconds that the rest will take if all goes on as lately; None where that cannot be told yet."""
        left = max(0, self.patches_expected - self.patches_done)
        if self.slides_done == self.slides:
            return 0.0
        rate = self.rate()
        return left / rate if rate and left else None

    def causes(self) -> list[dict[str, Any]]:
        """Why slides failed, the most frequent cause first, with some of the slides."""
        ordered = sorted(self._causes.items(), key=lambda item: -item[1].count)
        return [{"cause": text, **asdict(cause)} for text, cause in ordered]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        now_s = self.elapsed_s()
        left_s = self.left_s()
        return {
            "elapsed_s": round(now_s, 1),
            "slides": {"total": self.slides, "done": self.slides_done, "skipped": self.skipped, **self.ended},
            "patches": {"done": self.patches_done, "planned": self.patches, "expected": self.patches_expected},
            "patches_per_s": round(self.rate(), 2),
            "left_s": None if left_s is None else round(left_s, 1),
            "retries": self.retries,
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "workers": {
                name: {**asdict(worker), **worker.shares(now_s, self.readers)} for name, worker in self.workers.items()
            },
            "throughput": asdict(self.throughput),
            "failures": self.causes(),
            "slowest": [
                {"slide": slide, "seconds": round(seconds, 2), "patches": patches}
                for seconds, slide, patches in sorted(self._slowest, reverse=True)
            ],
        }

    def _count_cause(self, record: SlideRecord) -> None:
        text = cause_of(record)
        if text not in self._causes and len(self._causes) >= CAUSES:
            text = "other causes: see slides.csv"
        cause = self._causes.setdefault(text, _Cause())
        cause.count += 1
        if len(cause.slides) < NAMED:
            cause.slides.append(record.slide.id)


def cause_of(record: SlideRecord) -> str:
    """Why a slide failed, without its name: a folder of wrong files has one cause a thousand times."""
    return without_path(record.error, record.slide.path)


def without_path(error: str, path: str) -> str:
    """An error that does not name the slide, where it stands beside it."""
    return error.replace(f"{path}: ", "").replace(path, "the file") if path else error
