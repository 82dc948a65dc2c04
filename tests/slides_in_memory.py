"""`ArraySlide`: a slide held in memory, for tests of what stands above the readers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt

from wsi_gradcam.errors import SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import Slide, SlideInfo
from wsi_gradcam.slides.base import make_levels
from wsi_gradcam.slides.patch_reader import Batch, PatchReader

Rgb = npt.NDArray[np.uint8]
BACKGROUND = (250, 240, 230)


class ArraySlide:
    """A `Slide` of arrays [h, w, 3], finest first. Keeps what was read; regions that touch `bad` raise."""

    def __init__(
        self,
        levels: Sequence[Rgb],
        mpp: tuple[float, float] | None = (0.5, 0.5),
        bad: Region | None = None,
    ) -> None:
        self.levels = levels
        self.bad = bad
        self.reads: list[tuple[int, Region]] = []
        self.closed = False
        self._lock = threading.Lock()
        sizes = [(level.shape[0], level.shape[1]) for level in levels]
        self._info = SlideInfo(
            "memory", make_levels(sizes), mpp, "no mpp; give it with --mpp", "memory", BACKGROUND, None, "0"
        )

    @property
    def info(self) -> SlideInfo:
        return self._info

    def read_level(self, level: int, region: Region) -> Rgb:
        with self._lock:
            self.reads.append((level, region))
        overlap = self.bad.intersect(region) if self.bad else None
        if overlap and overlap.height and overlap.width:
            raise SlideReadError(f"memory: level {level}, {region} cannot be decoded")
        pixels = self.levels[level]
        canvas = np.empty((region.height, region.width, 3), np.uint8)
        canvas[:] = BACKGROUND
        inside = region.intersect(Region(0, 0, pixels.shape[0], pixels.shape[1]))
        if inside.height and inside.width:
            rows = slice(inside.y - region.y, inside.bottom - region.y)
            columns = slice(inside.x - region.x, inside.right - region.x)
            canvas[rows, columns] = pixels[inside.slices]
        return canvas

    def close(self) -> None:
        self.closed = True


def read_batches(
    slide: Slide, yx: npt.NDArray[np.int64], patch_px: tuple[int, int], mpp: float, batch_size: int, threads: int
) -> Iterator[Batch]:
    """Yield the patches at level-0 `yx` by a reader of their own."""
    with closing(PatchReader(slide, patch_px, mpp, batch_size, threads)) as reader:
        yield from reader.batches(yx)
