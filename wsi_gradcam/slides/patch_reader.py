"""Patches of a slide in batches, read by a few threads while the model works on the batch before."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import SlideReadError, one_line
from wsi_gradcam.io.urls import is_url
from wsi_gradcam.slides import open_slide, read_region
from wsi_gradcam.system.isolation import CRASHES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.slides import Slide

    Reads = list[Future[tuple[NDArray[np.uint8], float]]]

LOG = logging.getLogger("wsi_gradcam")


# Of a remote slide, the number of patches that are read at the same time.
WAITING_THREADS = 16
# The relative difference between mpp of scanners of one kind.
MPP_TOLERANCE = 0.02

_WARNED: set[tuple[float, ...]] = set()


def open_entry(entry: SlideEntry, settings: Settings) -> Slide:
    """Return an opened slide of a run, by its settings.

    Its mpp is the file's; else, where that is trusted, the one by the power of the objective; else the one of a list
    or the settings, which take precedence with `replace_mpp`.

    Raises:
        SlideError: as of `open_slide`, or it has crashed a process before.
    """
    CRASHES.opening(entry.path)
    given = entry.mpp or settings.mpp
    opened = partial(
        open_slide,
        entry.address,
        reader=settings.reader,
        trust_objective=settings.trust_objective,
        channels=settings.channels,
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
        rgb: uint8 [n, height, width, 3]; an unreadable patch is zeros and must not be used.
        causes: error messages of unreadable patches, by their index in the batch.
        read_s: seconds that threads spent on the readable patches.
    """

    start: int
    rgb: NDArray[np.uint8]
    causes: dict[int, str]
    read_s: float = 0.0


class PatchReader:
    """Reads the patches of a slide with a few threads, a batch ahead of the consumer."""

    def __init__(self, slide: Slide, patch_px: tuple[int, int], mpp: float, batch_size: int, threads: int) -> None:
        self._slide = slide
        self._patch_px = patch_px
        self._mpp = mpp
        self._batch_size = batch_size
        if is_url(slide.info.path):  # threads wait more than they compute
            threads = max(threads, WAITING_THREADS)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._kept: tuple[list[list[int]], Reads] = ([], [])
        self._lock = threading.Lock()

    def batches(self, yx: NDArray[np.int64], then: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """Yield the patches at level-0 `yx` [n, 2] in order, a batch at a time.

        While the last one is consumed, the first batch of `then` is read, and kept for the call that wants it.
        """
        size, places = self._batch_size, yx.tolist()
        ahead = self._first(places[:size])
        for start in range(0, len(places), size):
            reads, following = ahead, places[start + size : start + 2 * size]
            if following:
                ahead = self._submit(following)
            elif then is not None:
                self.read_ahead(then)
            yield _collect(start, reads, self._patch_px)

    def read_ahead(self, yx: NDArray[np.int64]) -> None:
        """Begin to read the first batch of the patches at `yx`, and keep it for the call that wants them."""
        places = yx[: self._batch_size].tolist()
        with self._lock:
            self._kept = (places, self._submit(places))

    def close(self) -> None:
        """Stop the threads without waiting for reads ahead."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, places: list[list[int]]) -> Reads:
        return [self._pool.submit(_read, self._slide, y, x, *self._patch_px, self._mpp) for y, x in places]

    def _first(self, places: list[list[int]]) -> Reads:
        """Return the reads of a span's first batch, begun before or now."""
        with self._lock:
            (known, reads), self._kept = self._kept, ([], [])
        if known == places:
            return reads
        for read in reads:
            read.cancel()
        return self._submit(places)


def _read(slide: Slide, *place: Any) -> tuple[NDArray[np.uint8], float]:
    """Return a patch, and the seconds that reading it took."""
    started = time.perf_counter()
    return read_region(slide, *place), time.perf_counter() - started


def _collect(start: int, futures: Reads, patch_px: tuple[int, int]) -> Batch:
    rgb = np.zeros((len(futures), *patch_px, 3), np.uint8)
    causes: dict[int, str] = {}
    read_s = 0.0
    for i, future in enumerate(futures):
        try:
            rgb[i], seconds = future.result()
            read_s += seconds
        except SlideReadError as error:
            causes[i] = one_line(error)
    return Batch(start, rgb, causes, read_s)
