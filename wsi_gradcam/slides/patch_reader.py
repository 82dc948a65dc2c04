"""Patches of a slide in batches, read by a few threads while the model works on the batch before."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
    Reads = list[Future[tuple[NDArray[np.uint8], float, float]]]

LOG = logging.getLogger("wsi_gradcam")


# Of a remote slide, the number of patches that are read at the same time.
WAITING_THREADS = 16
# Batches that are read ahead of the one that the model works on: a few, so that one that takes long to read is not
# waited for; only one where they are large.
MAX_AHEAD, MAX_AHEAD_BYTES = 3, 64 << 20
# The relative difference between mpp of scanners of one kind.
MPP_TOLERANCE = 0.02

_WARNED: set[tuple[float, ...]] = set()


def open_entry(entry: SlideEntry, settings: Settings, scaled: bool = False) -> Slide:
    """Return an opened slide of a run, by its settings; `scaled` with levels that are made while tiles are decoded.

    Its mpp is the file's; else, where that is trusted, the one by the power of the objective; else the one of a list
    or the settings, which take precedence with `replace_mpp`.

    Raises:
        SlideError: as of `open_slide`, or it has crashed a process before.
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
            "%s: its own mpp %g, %g is used, not the given %g, %g, as for all slides that tell theirs; if the files "
            "are wrong, use --replace-mpp",
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
        measures: float32 [n], what the treatment measured; NaN of an unreadable patch.
        causes: error messages of unreadable patches, by their index in the batch.
        read_s: seconds that threads spent on the readable patches.
    """

    start: int
    rgb: NDArray[np.uint8]
    measures: NDArray[np.float32]
    causes: dict[int, str]
    read_s: float = 0.0


def untreated(patch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """Return a patch as it is, and nothing measured."""
    return patch, float("nan")


class PatchReader:
    """Reads the patches of a slide with a few threads, some batches ahead of the consumer.

    Args:
        patch_px: (height, width) that is read.
        batch_size: patches in a batch.
        treat: turns what was read into what a batch holds, uint8 of one size, and measures it; done by the threads
            that read.
    """

    def __init__(
        self,
        slide: Slide,
        patch_px: tuple[int, int],
        mpp: float,
        batch_size: int,
        threads: int,
        treat: Treat = untreated,
    ) -> None:
        self._slide = slide
        self._patch_px = patch_px
        self._mpp = mpp
        self._batch_size = batch_size
        self._treat = treat
        if is_url(slide.info.path):  # threads wait more than they compute
            threads = max(threads, WAITING_THREADS)
        self._ahead = max(1, min(MAX_AHEAD, MAX_AHEAD_BYTES // (3 * math.prod(patch_px) * batch_size)))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._kept: tuple[list[list[int]], Reads] = ([], [])
        self._lock = threading.Lock()

    def batches(self, yx: NDArray[np.int64], then: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """Yield the patches at level-0 `yx` [n, 2] in order, a batch at a time.

        While the last ones are consumed, the first batch of `then` is read, and kept for the call that wants it.
        """
        places = yx.tolist()
        starts = range(0, len(places), self._batch_size)
        reads: deque[Reads] = deque()
        for start in starts:
            while len(reads) <= self._ahead and len(reads) < len(starts) - start // self._batch_size:
                first = start + len(reads) * self._batch_size
                wanted = places[first : first + self._batch_size]
                reads.append(self._first(wanted) if first == 0 else self._submit(wanted))
                if then is not None and first == starts[-1]:
                    self.read_ahead(then)
            yield self._collect(start, reads.popleft())

    def read_ahead(self, yx: NDArray[np.int64]) -> None:
        """Begin to read the first batch of the patches at `yx`, and keep it for the call that wants them."""
        places = yx[: self._batch_size].tolist()
        with self._lock:
            self._kept = (places, self._submit(places))

    def close(self) -> None:
        """Stop the threads without waiting for reads ahead."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, places: list[list[int]]) -> Reads:
        return [self._pool.submit(self._read, y, x) for y, x in places]

    def _read(self, y: int, x: int) -> tuple[NDArray[np.uint8], float, float]:
        """Return a treated patch, what was measured, and the seconds that both took."""
        started = time.perf_counter()
        patch, measure = self._treat(read_region(self._slide, y, x, *self._patch_px, self._mpp))
        return patch, measure, time.perf_counter() - started

    def _first(self, places: list[list[int]]) -> Reads:
        """Return the reads of a span's first batch, begun before or now."""
        with self._lock:
            (known, reads), self._kept = self._kept, ([], [])
        if known == places:
            return reads
        for read in reads:
            read.cancel()
        return self._submit(places)

    def _collect(self, start: int, futures: Reads) -> Batch:
        rgb: NDArray[np.uint8] | None = None
        measures = np.full(len(futures), np.nan, np.float32)
        causes: dict[int, str] = {}
        read_s = 0.0
        for i, future in enumerate(futures):
            try:
                patch, measures[i], seconds = future.result()
            except SlideReadError as error:
                causes[i] = one_line(error)
                continue
            if rgb is None:
                rgb = np.zeros((len(futures), *patch.shape), np.uint8)
            rgb[i] = patch
            read_s += seconds
        if rgb is None:
            nothing, _ = self._treat(np.zeros((*self._patch_px, 3), np.uint8))
            rgb = np.zeros((len(futures), *nothing.shape), np.uint8)
        return Batch(start, rgb, measures, causes, read_s)
