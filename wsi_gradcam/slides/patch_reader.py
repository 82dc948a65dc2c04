"""Patches of a slide in batches, read by a few threads while the model works on the previous batch."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import SlideReadError, one_line
from wsi_gradcam.io.urls import allowing_for_run, is_url
from wsi_gradcam.slides import open_slide, read_region, with_reductions
from wsi_gradcam.system.isolation import CRASHES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.slides import Slide

    Treat = Callable[[NDArray[np.uint8]], tuple[NDArray[np.uint8], float]]
    Empty = Callable[[tuple[int, ...]], NDArray[np.uint8]]

LOG = logging.getLogger("wsi_gradcam")


# Of a remote slide, the number of patches that are read at the same time.
WAITING_THREADS = 16
# Batches that are read ahead of the one that the model works on: a few, so that a slow one does not hold up the model;
# only one if they are large.
MAX_AHEAD, MAX_AHEAD_BYTES = 3, 64 << 20
# Patches that a thread is handed at a time, if a batch has enough for all: each hand-over holds Python's lock.
MOST_AT_ONCE = 8
MAX_KEPT = 4  # first batches of what may be wanted next: as many as there are tasks that may read one slide
# The relative difference between the mpp of scanners of one kind.
MPP_TOLERANCE = 0.02

_WARNED: set[tuple[float, ...]] = set()


def open_entry(entry: SlideEntry, settings: Settings, scaled: bool = False) -> Slide:
    """Return an opened slide of a run, by the run's settings; if `scaled`, with levels made by reduced decoding.

    Its mpp is the file's; else, if that is trusted, the one that follows from the objective's power; else the one in a
    list or the settings, which take precedence with `replace_mpp`.

    Raises:
        SlideError: as for `open_slide`, or the slide has crashed a process before.
    """
    with allowing_for_run(settings.allow_hosts):
        slide = _open_entry(entry, settings)
    return with_reductions(slide) if scaled else slide


def _open_entry(entry: SlideEntry, settings: Settings) -> Slide:
    CRASHES.opening(entry.path)
    given = entry.mpp or settings.mpp
    opened = partial(
        open_slide,
        entry.address,
        reader=settings.reader,
        trust_objective=settings.trust_objective,
        channels=settings.channels,
        isolate=settings.isolation,
    )
    if settings.replace_mpp or given is None:
        return opened(given)
    slide = opened()
    if slide.info.mpp is None:
        slide.close()
        return opened(given)
    _warn_of_unused(entry.path, slide.info.mpp, given)
    return slide


def _warn_of_unused(path: str, said: tuple[float, float], given: tuple[float, float]) -> None:
    """Warn, once for each kind of slide, that the given mpp is not used."""
    kind = (*(round(value, 2) for value in said), *given)
    if kind not in _WARNED and not np.allclose(said, given, rtol=MPP_TOLERANCE, atol=0):
        _WARNED.add(kind)
        LOG.warning(
            "%s: the mpp in the file (%g, %g) is used and not the given one (%g, %g), as for all slides whose files "
            "state it; if the files are wrong, use --replace-mpp",
            path,
            *said,
            *given,
        )


@dataclass(frozen=True)
class Batch:
    """Consecutive patches.

    Attributes:
        start: index of the first in the span.
        rgb: uint8 [n, height, width, 3], as treated; an unreadable patch is zeros and must not be used.
        measures: float32 [n], what the treatment measured; NaN for an unreadable patch.
        causes: error messages of unreadable patches, by their index in the batch.
        read_s: seconds that threads spent on the readable patches.
    """

    start: int
    rgb: NDArray[np.uint8]
    measures: NDArray[np.float32]
    causes: dict[int, str]
    read_s: float = 0.0


def untreated(patch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """Return a patch as it is, with nothing measured."""
    return patch, float("nan")


def empty_array(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return an array with arbitrary values."""
    return np.empty(shape, np.uint8)


def reading_threads(count: int) -> ThreadPoolExecutor:
    """Return threads that read the patches of one or more slides."""
    return ThreadPoolExecutor(count, thread_name_prefix="read")


class _Coming:
    """A batch that threads are reading: each puts its patches where they belong."""

    def __init__(self, places: list[list[int]], empty: Empty) -> None:
        self.places = places
        self.reads: list[Future[float]] = []
        self.causes: dict[int, str] = {}
        self._empty, self._lock = empty, threading.Lock()
        self._rgb: NDArray[np.uint8] | None = None
        self._measures = np.full(len(places), np.nan, np.float32)

    def put(self, number: int, patch: NDArray[np.uint8], measure: float) -> None:
        """Keep a treated patch; all have the same size, which the first one determines."""
        with self._lock:
            if self._rgb is None:
                self._rgb = self._empty((len(self.places), *patch.shape))
        self._rgb[number], self._measures[number] = patch, measure

    def batch(self, start: int, nothing: Callable[[], NDArray[np.uint8]]) -> Batch:
        """Return the batch once it is complete; `nothing` is a treated patch, used if none of the batch can be read.

        Raises:
            SlideError: something is wrong with the whole slide.
        """
        read_s = sum(read.result() for read in self.reads)
        if self._rgb is None:
            self.put(0, nothing(), np.nan)
        assert self._rgb is not None
        self._rgb[list(self.causes)] = 0
        return Batch(start, self._rgb, self._measures, dict(sorted(self.causes.items())), read_s)


class PatchReader:
    """Reads the patches of a slide with a few threads, some batches ahead of the consumer.

    Args:
        patch_px: (height, width) of the patches that are read.
        batch_size: patches in a batch.
        treat: turns pixels as read into what a batch holds, uint8 of one size, and measures them; called by the reading
            threads.
        pool: threads that read several slides; None: threads of its own, which a remote slide always gets.
        empty: makes the array for a batch, given its shape.
    """

    def __init__(
        self,
        slide: Slide,
        patch_px: tuple[int, int],
        mpp: float,
        batch_size: int,
        threads: int,
        treat: Treat = untreated,
        pool: ThreadPoolExecutor | None = None,
        empty: Empty = empty_array,
    ) -> None:
        self._slide = slide
        self._patch_px = patch_px
        self._mpp = mpp
        self._batch_size = batch_size
        self._treat = treat
        self._empty = empty
        if is_url(slide.info.path):  # threads wait more than they compute
            threads, pool = max(threads, WAITING_THREADS), None
        self._ahead = max(1, min(MAX_AHEAD, MAX_AHEAD_BYTES // (3 * math.prod(patch_px) * batch_size)))
        self._threads = threads
        self._pool = pool or reading_threads(threads)
        self._own = None if pool else self._pool
        self._begun: set[Future[float]] = set()
        self._kept: deque[_Coming] = deque()
        self._lock = threading.Lock()

    def batches(self, yx: NDArray[np.int64], then: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """Yield the patches at level-0 `yx` [n, 2] in order, a batch at a time.

        While the last batches are consumed, the first batch of `then` is read, and kept for the call that wants it.
        """
        places = yx.tolist()
        starts = range(0, len(places), self._batch_size)
        coming: deque[_Coming] = deque()
        for start in starts:
            while len(coming) <= self._ahead and len(coming) < len(starts) - start // self._batch_size:
                first = start + len(coming) * self._batch_size
                wanted = places[first : first + self._batch_size]
                coming.append(self._first(wanted) if first == 0 else self._begin(wanted))
                if then is not None and first == starts[-1]:
                    self.read_ahead(then)
            yield coming.popleft().batch(start, self._nothing)

    def read_ahead(self, yx: NDArray[np.int64]) -> None:
        """Begin to read the first batch of the patches at `yx`, and keep it for the call that asks for them."""
        with self._lock:
            self._kept.append(self._begin(yx[: self._batch_size].tolist()))
            unwanted = [self._kept.popleft() for _ in range(len(self._kept) - MAX_KEPT)]
        for coming in unwanted:
            for read in coming.reads:
                read.cancel()

    def close(self) -> None:
        """Wait for the reads that have begun, so that the slide can be closed, and drop those ahead."""
        if self._own is not None:
            self._own.shutdown(cancel_futures=True)
        wait([read for read in list(self._begun) if not read.cancel()])

    def _begin(self, places: list[list[int]]) -> _Coming:
        coming = _Coming(places, self._empty)
        step = max(1, min(MOST_AT_ONCE, len(places) // (2 * self._threads)))
        some = [range(i, min(i + step, len(places))) for i in range(0, len(places), step)]
        coming.reads = [self._pool.submit(self._read, coming, numbers) for numbers in some]
        self._begun.update(coming.reads)
        for read in coming.reads:
            read.add_done_callback(self._begun.discard)
        return coming

    def _read(self, coming: _Coming, numbers: range) -> float:
        """Read and treat some patches of a batch; return the seconds spent on those that can be read."""
        read_s = 0.0
        for number in numbers:
            started = time.perf_counter()
            y, x = coming.places[number]
            try:
                coming.put(number, *self._treat(read_region(self._slide, y, x, *self._patch_px, self._mpp)))
            except SlideReadError as error:
                coming.causes[number] = one_line(error)
            else:
                read_s += time.perf_counter() - started
        return read_s

    def _first(self, places: list[list[int]]) -> _Coming:
        """Return a span's first batch, whose reading began earlier or begins now."""
        with self._lock:
            for number, coming in enumerate(self._kept):
                if coming.places == places:
                    del self._kept[number]
                    return coming
        return self._begin(places)

    def _nothing(self) -> NDArray[np.uint8]:
        """Return a treated patch of zeros."""
        return self._treat(np.zeros((*self._patch_px, 3), np.uint8))[0]
