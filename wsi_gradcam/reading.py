"""Streams the patches of a span in batches, read by a few threads while the model works on the batch before."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import SlideReadError, one_line
from wsi_gradcam.slides import read_region

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides import Slide


@dataclass(frozen=True)
class Batch:
    """Consecutive patches.

    Attributes:
        start: index of the first in the span.
        rgb: uint8 [n, height, width, 3]; an unreadable patch is zeros and must not be used.
        causes: why a patch could not be read, by its index in the batch.
    """

    start: int
    rgb: NDArray[np.uint8]
    causes: dict[int, str]


def read_batches(
    slide: Slide,
    yx: NDArray[np.int64],
    patch_px: tuple[int, int],
    mpp: float,
    batch_size: int,
    threads: int,
) -> Iterator[Batch]:
    """The patches at level-0 `yx` [n, 2] in order, `batch_size` at a time; one batch is read ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def submit(start: int) -> list[Future[NDArray[np.uint8]]]:
        places = yx[start : start + batch_size].tolist()
        return [pool.submit(read_region, slide, y, x, *patch_px, mpp) for y, x in places]

    try:
        ahead = submit(0)
        for start in range(0, len(yx), batch_size):
            futures, ahead = ahead, submit(start + batch_size)
            yield _collect(start, futures, patch_px)
    finally:  # also where the caller stops early: what was read ahead is not waited for
        pool.shutdown(cancel_futures=True)


def _collect(start: int, futures: list[Future[NDArray[np.uint8]]], patch_px: tuple[int, int]) -> Batch:
    rgb = np.zeros((len(futures), *patch_px, 3), np.uint8)
    causes: dict[int, str] = {}
    for i, future in enumerate(futures):
        try:
            rgb[i] = future.result()
        except SlideReadError as error:
            causes[i] = one_line(error)
    return Batch(start, rgb, causes)
