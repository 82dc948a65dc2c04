"""The progress of a run: slides, patches, rates, busy shares of workers, and the remaining time."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from wsi_gradcam.errors import as_text
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.run.status import (
    FailureCause,
    PatchCounts,
    RunNumbers,
    SlideCounts,
    SlowSlide,
    StageStatus,
    ThroughputStatus,
    WorkerStatus,
)
from wsi_gradcam.run.types import Part, Performed, Planned, Processed, SlideRecord, Task

BINS = 120  # bins of throughput over time, at least half of which are in use in a long run
RECENT_S = 120.0
CAUSES, NAMED, SLOWEST = 50, 5, 10  # most causes of failures, slides for each, and slowest slides


@dataclass
class Throughput:
    """Patches over time, in a limited number of bins of `width_s` seconds, which become wider as time goes by."""

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
        """Return the patches in the bins that begin at `from_s` or later."""
        return sum(self.patches[math.ceil(from_s / self.width_s) :])


@dataclass
class StageSum:
    """Finished tasks of a stage, and their seconds summed over all workers."""

    tasks: int = 0
    seconds: float = 0.0


@dataclass
class WorkerSum:
    """The work of a process since its first task began, `since_s` seconds after the run's start; see `WorkerStatus`."""

    since_s: float
    tasks: int = 0
    patches: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    model_s: float = 0.0
    read_s: float = 0.0
    at_once: int = 0

    def status(self, now_s: float, readers: int) -> WorkerStatus:
        """Return the work with its rate and its shares of the time, given the number of reading threads."""
        wall_s = max(1e-9, now_s - self.since_s)
        return WorkerStatus(
            **asdict(self),
            patches_per_s=self.patches / wall_s,
            model=min(1.0, self.model_s / wall_s),
            waiting=min(1.0, self.waited_s / wall_s),
            reading=min(1.0, self.read_s / readers / wall_s),
        )


@dataclass
class _Cause:
    """Slides that failed for the same reason."""

    count: int = 0
    slides: list[str] = field(default_factory=list)


class Progress:
    """Counts the tasks and slides of a run.

    Attributes:
        slides: number of slides.
        ended: slides by how they ended.
        skipped: of these, those that had ended before this run.
        patches: patches to be done in the slides planned so far; `patches_done` of them are done.
        part: the present pass over the slides, if the work takes several.
        to_encode: patches that a slide-level model sees once more, before all else; `encoded` of them are done.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self.slides = self.skipped = self.planned = self.retries = 0
        self.readers = 1
        self.part: Part | None = None
        self._done_before = 0  # in other passes
        self.ended: Counter[str] = Counter()
        self.patches = self.patches_done = self.to_encode = self.encoded = 0
        self.stages: dict[str, StageSum] = {}
        self.workers: dict[str, WorkerSum] = {}
        self.throughput = Throughput()
        self._in_work: set[str] = set()
        self._never_planned = self._sizes = 0
        self._causes: dict[str, _Cause] = {}
        self._slowest: list[tuple[float, str, int]] = []

    def begin(self, slides: int, readers: int = 1, patches: int | None = None) -> None:
        """Begin now, with the number of slides, of reading threads per worker and, if known, of patches."""
        self._started = self._clock()
        self.slides, self.readers = slides, readers
        if patches is not None:
            self.patches, self.planned = patches, slides

    def begin_part(self, part: Part, slides: int, patches: int | None) -> None:
        """Begin a pass over so many slides and patches, if these are known: what is done is counted from here."""
        self.part, self._done_before = part, self.patches_done
        self.patches = self.patches_done + (patches or 0)
        self.planned = 0 if patches is None else slides

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
            self.to_encode += result.to_encode
            self._sizes += result.patches
            self._in_work.add(task.slide.id)
        elif isinstance(result, Processed):
            self.patches_done, self.encoded = self.patches_done + result.patches, self.encoded + result.encoded
            self.throughput.add(now_s, result.patches + result.encoded)
            worker.patches += result.patches + result.encoded
            worker.waited_s += result.waited_s
            worker.model_s += result.model_s
            worker.read_s += result.read_s
            worker.at_once = result.at_once or worker.at_once

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
        """Return the seconds since the work began."""
        return self._clock() - self._started

    @property
    def slides_done(self) -> int:
        """Slides that have ended, finished or failed."""
        return self.ended.total()

    @property
    def patches_expected(self) -> int:
        """The expected number of patches: a slide that is not planned yet counts as the mean of those that are.

        Among these, slides that an earlier command has finished count in full: that nothing is left of them says
        nothing about the others.
        """
        return self.patches + self._unplanned if self.planned else 0

    @property
    def _unplanned(self) -> int:
        unplanned = max(0, self.slides - self.planned - self._never_planned)
        return round(unplanned * self._sizes / self.planned) if self.planned else 0

    @property
    def passes(self) -> tuple[int, int]:
        """How often patches were, and will have been, shown to the model, of several passes in the present one.

        Slide-level models see each patch twice.
        """
        if self.part is not None:
            return self.patches_done - self._done_before, max(self.patches_expected, self.patches) - self._done_before
        encoding = self.to_encode + self._unplanned if self.to_encode else 0
        return self.patches_done + self.encoded, self.patches_expected + encoding

    def rate(self) -> float:
        """Return the patches per second over the last minutes."""
        now_s = self.elapsed_s()
        width_s = self.throughput.width_s
        from_s = math.ceil(max(0.0, now_s - max(RECENT_S, 2 * width_s)) / width_s) * width_s  # whole bins
        return self.throughput.since(from_s) / max(1e-9, now_s - from_s)

    def left_s(self) -> float | None:
        """Return the seconds that the rest of the run, or of its pass, takes at the current rate; None if unknown."""
        done, expected = self.passes
        left = max(0, expected - done)
        if self.slides_done == self.slides and self.part is None:
            return 0.0
        rate = self.rate()
        return left / rate if rate and left else None

    def causes(self) -> list[FailureCause]:
        """Return why slides failed, the most frequent cause first, with some of the slides."""
        ordered = sorted(self._causes.items(), key=lambda item: -item[1].count)
        return [FailureCause(text, cause.count, cause.slides) for text, cause in ordered]

    def numbers(self) -> RunNumbers:
        """Return all current numbers."""
        now_s, left_s = self.elapsed_s(), self.left_s()
        slowest = sorted(self._slowest, reverse=True)
        return RunNumbers(
            elapsed_s=round(now_s, 1),
            slides=SlideCounts(self.slides, self.slides_done, self.skipped, dict(self.ended)),
            patches=PatchCounts(self.patches_done, self.patches, self.patches_expected, self.encoded),
            patches_per_s=round(self.rate(), 2),
            left_s=None if left_s is None else round(left_s, 1),
            retries=self.retries,
            stages={name: StageStatus(stage.tasks, stage.seconds) for name, stage in self.stages.items()},
            workers={name: worker.status(now_s, self.readers) for name, worker in self.workers.items()},
            throughput=ThroughputStatus(self.throughput.width_s, list(self.throughput.patches)),
            failures=self.causes(),
            slowest=[SlowSlide(slide, round(seconds, 2), patches) for seconds, slide, patches in slowest],
            part=self.part and replace(self.part, done=self.passes[0], patches=self.passes[1]),
        )

    def _count_cause(self, record: SlideRecord) -> None:
        text = cause_of(record)
        if text not in self._causes and len(self._causes) >= CAUSES:
            text = "other causes: see slides.csv"
        cause = self._causes.setdefault(text, _Cause())
        cause.count += 1
        if len(cause.slides) < NAMED:
            cause.slides.append(record.slide.id)


def cause_of(record: SlideRecord) -> str:
    """Return why a slide failed, without its name: a folder of wrong files has the same cause a thousand times."""
    return without_path(record.error, as_text(record.slide.path))


def without_path(error: str, path: str) -> str:
    """Return an error without the path of its slide, beside which it is shown."""
    return error.replace(f"{path}: ", "").replace(path, "the file") if path else error
