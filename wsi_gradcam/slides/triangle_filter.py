"""Pictures resampled by the antialiasing triangle filter, byte for byte like Pillow's `resize` with BILINEAR.

Pillow works in fixed point: each axis has integer weights of 22 bits, and the first axis's result is rounded to whole
grey levels before the second is summed. Three ways give these bytes, and each is used where it is the fastest:

- PyTorch, if both axes shrink by the same power of two: its weights of 16 bits are exact then;
- two loops that numba compiles (extra `fast`), in all cases: a seventh of Pillow's time. They take a half to two thirds
  of PyTorch's, too, but numba needs 120 MB and seconds to load, so it is loaded only for many pictures, with other
  factors or in a process that feeds a GPU;
- otherwise Pillow.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from wsi_gradcam.errors import one_line
from wsi_gradcam.geometry import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Passes = tuple[Callable[..., None], Callable[..., None]]

LOG = logging.getLogger("wsi_gradcam")

BITS = 22  # bits of Pillow's weights
POWERS = (2.0, 4.0, 8.0)
FEW = 64  # pictures for which numba is not loaded: thumbnails, masks, what the viewer shows first
_COUNT = itertools.count()
TAPS, ROWS = 4, 16  # pixels of a window, and rows, that the compiled passes process at once
KEPT_WINDOWS = 64  # an archive has few factors, but patches lie at many fractions of a pixel


@dataclass(frozen=True)
class Span:
    """The part of one axis that is resampled.

    Attributes:
        length: px of the source.
        start, stop: the ends of the part in the source, in px; fractions are allowed.
        size: px of the result.
    """

    length: int
    start: float
    stop: float
    size: int

    @property
    def power(self) -> int:
        """The power of two by which the axis shrinks, if windows are whole pixels; else 0."""
        factor = (self.stop - self.start) / self.size
        half = factor / 2
        whole = factor in POWERS and self.start == half and self.length == self.stop + half
        return int(factor) if whole else 0


def resample(pixels: Pixels, rows: Span, columns: Span) -> Pixels:
    """Return RGB uint8 [rows.size, columns.size, 3] of RGB uint8 [rows.length, columns.length, 3].

    Each pixel is the weighted mean of those under a triangle twice its width, or at least two source pixels wide;
    nothing outside the source counts.
    """
    if frame := frame_px(rows, columns):
        framed = np.empty((rows.length + 2 * frame, columns.length + 2 * frame, 3), np.uint8)
        framed[frame:-frame, frame:-frame] = pixels
        return shrink_framed(framed, frame)
    passes = None if min(rows.length - _taps(rows), columns.length - _taps(columns)) < 0 else _passes_for_many()
    if passes is None:
        return _by_pillow(pixels, rows, columns)
    return _by_passes(pixels, rows, columns, passes, _rows_first(rows, columns))


def frame_px(rows: Span, columns: Span) -> int:
    """Return the width in px of the frame that `shrink_framed` needs around the source; 0 if `resample` must be used.

    `resample` must be used for other spans, and when the compiled passes are worth their memory.
    """
    same = rows.power and rows.power == columns.power and not _rows_first(rows, columns)
    if not same or "torch" not in sys.modules:
        return 0
    return 0 if _feeds_gpu() and _passes_for_many() is not None else rows.power // 2


def _feeds_gpu() -> bool:
    """Return whether this process computes on a GPU, which waits for pixels and has memory to spare."""
    cuda = sys.modules.get("torch.cuda")
    return bool(getattr(cuda, "is_initialized", bool)())  # another thread may be loading it


def _passes_for_many() -> Passes | None:
    """Return the compiled passes after more than a few pictures; before that, or without numba, None."""
    return None if next(_COUNT) < FEW else _passes()


def _rows_first(rows: Span, columns: Span) -> bool:
    """Return whether Pillow, from version 13 on, begins with the rows, because that is less work."""
    return rows.length - rows.size > max(0, 2 * (columns.length - columns.size))


def _by_pillow(pixels: Pixels, rows: Span, columns: Span) -> Pixels:
    box = (columns.start, rows.start, columns.stop, rows.stop)
    size = (columns.size, rows.size)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=box))


def shrink_framed(framed: Pixels, frame: int) -> Pixels:
    """Return the picture inside a frame of `frame` px, reduced by twice as much, without its own half windows.

    PyTorch gives pixels at the border different weights. So the source has another half window of arbitrary pixels on
    each side, and what comes out there is dropped.
    """
    import torch

    height, width, _ = framed.shape
    with torch.inference_mode():
        batch = torch.from_numpy(framed).permute(2, 0, 1)[None]
        size = (height // (2 * frame), width // (2 * frame))
        # The function that `interpolate` calls; `interpolate` leaves colours in planes, and joining them takes as long
        # again.
        shrunk = torch.empty((1, 3, *size), dtype=torch.uint8, memory_format=torch.channels_last)
        torch.ops.aten._upsample_bilinear2d_aa.out(batch, size, False, None, None, out=shrunk)
        return np.ascontiguousarray(shrunk[0].permute(1, 2, 0)[1:-1, 1:-1].numpy())


def _by_passes(pixels: Pixels, rows: Span, columns: Span, passes: Passes, rows_first: bool) -> Pixels:
    sum_columns, sum_rows = passes
    source = np.ascontiguousarray(pixels).reshape(rows.length, -1)
    out = np.empty((rows.size + ROWS - 1, 3 * columns.size), np.uint8)
    if rows_first:
        between = np.empty((rows.size, 3 * columns.length), np.uint8)
        sum_rows(source, *_windows(rows), between)
        sum_columns(between, *_windows(columns), out)
    else:
        between = np.empty((rows.length + ROWS - 1, 3 * columns.size), np.uint8)
        sum_columns(source, *_windows(columns), between)
        sum_rows(between, *_windows(rows), out[: rows.size])
    return out[: rows.size].reshape(rows.size, columns.size, 3)


def _taps(span: Span) -> int:
    """Return the number of source pixels in each window, some of them with a weight of 0."""
    widest = 2 * math.ceil(max(1.0, (span.stop - span.start) / span.size)) + 1
    return ceil_div(widest, TAPS) * TAPS


@lru_cache(KEPT_WINDOWS)
def _windows(span: Span) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return each window's weights uint32 [size, taps], in 1 / 2**22, and the windows' starts, int64 [size].

    This follows Pillow's arithmetic, which takes the ends of the part in single precision.
    """
    start, stop = np.float32(span.start), np.float32(span.stop)
    step = float(stop - start) / span.size
    reach = max(1.0, step)
    centre = float(start) + (np.arange(span.size) + 0.5) * step
    first = np.maximum(0, (centre - reach + 0.5).astype(np.int64))
    count = np.minimum(span.length, (centre + reach + 0.5).astype(np.int64)) - first
    place = np.arange(ceil_div(int(count.max()), TAPS) * TAPS)
    shares = np.maximum(0.0, 1 - np.abs((place + first[:, None] - centre[:, None] + 0.5) * (1 / reach)))
    shares[place >= count[:, None]] = 0
    totals = np.zeros(span.size)
    for column in shares.T:  # one after another, with Pillow's rounding
        totals += column
    weights = (0.5 + shares / totals[:, None] * (1 << BITS)).astype(np.uint32)
    beyond = np.maximum(0, first + len(place) - span.length)  # windows of the same length must not leave the source
    for index in np.flatnonzero(beyond):
        weights[index] = np.roll(weights[index], beyond[index])
    return np.ascontiguousarray(weights), first - beyond


@cache
def _passes() -> Passes | None:
    """Return the passes over columns and over rows, compiled; None without numba."""
    try:
        from numba import njit
    except ImportError:
        return None
    except Exception as error:  # versions of numba that do not know this numpy
        LOG.info("numba cannot be used, so patches are resampled with Pillow: %s", one_line(error))
        return None
    compiled = []
    for function in (_sum_columns, _sum_rows):
        try:
            compiled.append(njit(nogil=True, cache=True)(function))
        except RuntimeError:  # no folder to cache it in: each process compiles it again
            compiled.append(njit(nogil=True)(function))
    return compiled[0], compiled[1]


def _sum_columns(source: Any, weights: Any, first: Any, out: Any) -> None:
    """Fill `out` uint8 [height, 3 * size] with weighted sums of the pixels in each row of uint8 [height, 3 * width].

    `out` has up to `ROWS - 1` additional rows, whose content is arbitrary afterwards. The samples of 16 rows are laid
    side by side, so that a pixel's 48 samples are multiplied by one weight in a few instructions, and the sums are laid
    back into rows.
    """
    height, width = source.shape
    size, taps = weights.shape
    last, half, turned = height - 1, np.uint32(1 << 21), np.empty(4 * width, np.uint32)
    samples, summed, totals = turned.view(np.uint8), np.empty(12 * size, np.uint32), np.empty(48, np.uint32)
    sums = summed.view(np.uint8)
    for top in range(0, height, 16):
        s0, s1, s2, s3 = source[top], source[min(top + 1, last)], source[min(top + 2, last)], source[min(top + 3, last)]
        at = min(top + 4, last), min(top + 5, last), min(top + 6, last), min(top + 7, last)
        s4, s5, s6, s7 = source[at[0]], source[at[1]], source[at[2]], source[at[3]]
        at = min(top + 8, last), min(top + 9, last), min(top + 10, last), min(top + 11, last)
        s8, s9, s10, s11 = source[at[0]], source[at[1]], source[at[2]], source[at[3]]
        at = min(top + 12, last), min(top + 13, last), min(top + 14, last), min(top + 15, last)
        s12, s13, s14, s15 = source[at[0]], source[at[1]], source[at[2]], source[at[3]]
        for x in range(width):
            turned[4 * x] = s0[x] | np.uint32(s1[x]) << 8 | np.uint32(s2[x]) << 16 | np.uint32(s3[x]) << 24
            turned[4 * x + 1] = s4[x] | np.uint32(s5[x]) << 8 | np.uint32(s6[x]) << 16 | np.uint32(s7[x]) << 24
            turned[4 * x + 2] = s8[x] | np.uint32(s9[x]) << 8 | np.uint32(s10[x]) << 16 | np.uint32(s11[x]) << 24
            turned[4 * x + 3] = s12[x] | np.uint32(s13[x]) << 8 | np.uint32(s14[x]) << 16 | np.uint32(s15[x]) << 24
        for x in range(size):
            here = sums[48 * x : 48 * x + 48]
            for tap in range(0, taps, 4):
                w0, w1, w2, w3 = weights[x, tap], weights[x, tap + 1], weights[x, tap + 2], weights[x, tap + 3]
                start = 48 * (first[x] + tap)
                p0, p1 = samples[start : start + 48], samples[start + 48 : start + 96]
                p2, p3 = samples[start + 96 : start + 144], samples[start + 144 : start + 192]
                if taps == 4:
                    for k in range(48):
                        here[k] = np.uint32(half + p0[k] * w0 + p1[k] * w1 + p2[k] * w2 + p3[k] * w3) >> 22
                elif tap == 0:
                    for k in range(48):
                        totals[k] = half + p0[k] * w0 + p1[k] * w1 + p2[k] * w2 + p3[k] * w3
                else:
                    for k in range(48):
                        totals[k] += p0[k] * w0 + p1[k] * w1 + p2[k] * w2 + p3[k] * w3
            if taps > 4:
                for k in range(48):
                    here[k] = totals[k] >> 22
        for part in range(4):
            y = top + 4 * part
            r0, r1, r2, r3 = out[y], out[y + 1], out[y + 2], out[y + 3]
            for x in range(3 * size):
                four = summed[4 * x + part]
                r0[x], r1[x], r2[x], r3[x] = four, four >> 8, four >> 16, four >> 24


def _sum_rows(source: Any, weights: Any, first: Any, out: Any) -> None:
    """Fill `out` uint8 [size, width] with weighted sums of the rows of uint8 [height, width]."""
    size, taps = weights.shape
    width = source.shape[1]
    totals = np.empty(width, np.uint32)
    for y in range(size):
        totals[:] = np.uint32(1 << 21)
        for tap in range(taps):
            weight, row = weights[y, tap], source[first[y] + tap]
            if weight:
                for x in range(width):
                    totals[x] += np.uint32(row[x]) * weight
        for x in range(width):
            out[y, x] = np.uint8(totals[x] >> np.uint32(22))
