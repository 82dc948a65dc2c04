"""Pictures resampled by the antialiasing triangle filter, byte for byte as Pillow's `resize` with BILINEAR does it.

Pillow works in fixed point: each axis has integer weights of 22 bits, and what the first axis gives is rounded to whole
gray levels before the second is summed. Three ways give these bytes, and each is taken where it is the fastest:

- PyTorch, where both axes shrink by the same power of two: its weights of 16 bits are exact there;
- two loops that numba compiles (extra `fast`), in any case: a third of Pillow's time;
- Pillow, where numba is not installed.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from wsi_gradcam.errors import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Passes = tuple[Callable[..., None], Callable[..., None]]

LOG = logging.getLogger("wsi_gradcam")

BITS = 22  # of Pillow's weights
POWERS = (2.0, 4.0, 8.0)
KEPT_WINDOWS = 64  # an archive has few factors, but patches lie at many fractions of a pixel


@dataclass(frozen=True)
class Span:
    """The part of one axis that is resampled.

    Attributes:
        length: px of the source.
        start, stop: of the part in the source, in px; fractions are allowed.
        size: px of the result.
    """

    length: int
    start: float
    stop: float
    size: int

    @property
    def power(self) -> int:
        """The power of two by which the axis shrinks, where windows are whole pixels; else 0."""
        factor = (self.stop - self.start) / self.size
        half = factor / 2
        whole = factor in POWERS and self.start == half and self.length == self.stop + half
        return int(factor) if whole else 0


def resample(pixels: Pixels, rows: Span, columns: Span) -> Pixels:
    """Return RGB uint8 [rows.size, columns.size, 3] of RGB uint8 [rows.length, columns.length, 3].

    Each pixel is the mean of those under a triangle of twice its width, at least of two of theirs; outside of the
    source there is nothing.
    """
    rows_first = _rows_first(rows, columns)
    if not rows_first and rows.power and rows.power == columns.power and "torch" in sys.modules:
        return _halved(pixels, rows.power)
    passes = _passes()
    if passes is None or min(rows.length - _taps(rows), columns.length - _taps(columns)) < 0:
        return _by_pillow(pixels, rows, columns)
    return _by_passes(pixels, rows, columns, passes, rows_first)


def _rows_first(rows: Span, columns: Span) -> bool:
    """Return True where Pillow, from version 13 on, begins with the rows, because that is less work."""
    return rows.length - rows.size > max(0, 2 * (columns.length - columns.size))


def _by_pillow(pixels: Pixels, rows: Span, columns: Span) -> Pixels:
    box = (columns.start, rows.start, columns.stop, rows.stop)
    size = (columns.size, rows.size)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=box))


def _halved(pixels: Pixels, power: int) -> Pixels:
    """Return the picture shrunk by a power of two, without the half window that surrounds it.

    PyTorch gives pixels at the border other weights. So the source gets another half window on each side, of anything,
    and what comes out there is dropped.
    """
    import torch

    height, width, _ = pixels.shape
    half = power // 2
    framed = np.empty((height + power, width + power, 3), np.uint8)
    framed[half : half + height, half : half + width] = pixels
    with torch.inference_mode():
        batch = torch.from_numpy(framed).permute(2, 0, 1)[None]
        size = (height // power + 1, width // power + 1)
        # What `interpolate` calls; but that leaves the colours in planes, and to join them takes as long again.
        shrunk = torch.empty((1, 3, *size), dtype=torch.uint8, memory_format=torch.channels_last)
        torch.ops.aten._upsample_bilinear2d_aa.out(batch, size, False, None, None, out=shrunk)
        return np.ascontiguousarray(shrunk[0].permute(1, 2, 0)[1:-1, 1:-1].numpy())


def _by_passes(pixels: Pixels, rows: Span, columns: Span, passes: Passes, rows_first: bool) -> Pixels:
    sum_columns, sum_rows = passes
    source = np.ascontiguousarray(pixels).reshape(rows.length, -1)
    out = np.empty((rows.size, 3 * columns.size), np.uint8)
    if rows_first:
        between = np.empty((rows.size, 3 * columns.length), np.uint8)
        sum_rows(source, *_windows(rows), between)
        sum_columns(between, *_windows(columns), out)
    else:
        between = np.empty((rows.length, 3 * columns.size), np.uint8)
        sum_columns(source, *_windows(columns), between)
        sum_rows(between, *_windows(rows), out)
    return out.reshape(rows.size, columns.size, 3)


def _taps(span: Span) -> int:
    """Return the number of source pixels in the widest window, at most."""
    return 2 * int(np.ceil(max(1.0, (span.stop - span.start) / span.size))) + 1


@lru_cache(KEPT_WINDOWS)
def _windows(span: Span) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the weights uint64 [size, taps] of each window, in 1 / 2**22, and where the windows begin, int64 [size].

    In Pillow's arithmetic, which takes the ends of the part in single precision.
    """
    start, stop = np.float32(span.start), np.float32(span.stop)
    step = float(stop - start) / span.size
    reach = max(1.0, step)
    centre = float(start) + (np.arange(span.size) + 0.5) * step
    first = np.maximum(0, (centre - reach + 0.5).astype(np.int64))
    count = np.minimum(span.length, (centre + reach + 0.5).astype(np.int64)) - first
    place = np.arange(count.max())
    shares = np.maximum(0.0, 1 - np.abs((place + first[:, None] - centre[:, None] + 0.5) * (1 / reach)))
    shares[place >= count[:, None]] = 0
    totals = np.zeros(span.size)
    for column in shares.T:  # one after the other, as Pillow rounds
        totals += column
    weights = (0.5 + shares / totals[:, None] * (1 << BITS)).astype(np.uint64)
    beyond = np.maximum(0, first + len(place) - span.length)  # windows of one length must not leave the source
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
        LOG.info("numba cannot be used, patches are resampled by Pillow: %s", one_line(error))
        return None
    compiled = []
    for function in (_sum_columns, _sum_rows):
        try:
            compiled.append(njit(nogil=True, cache=True)(function))
        except RuntimeError:  # no folder to keep it in: each process compiles anew
            compiled.append(njit(nogil=True)(function))
    return compiled[0], compiled[1]


def _sum_columns(source: Any, weights: Any, first: Any, out: Any) -> None:
    """Fill `out` uint8 [height, 3 * size] with weighted sums of the pixels in each row of uint8 [height, 3 * width].

    Two rows share a number of 64 bits, one in each half: a sum never exceeds its 32.
    """
    height, width = source.shape
    size, taps = weights.shape
    halves = np.uint64((1 << 21) | (1 << 53))
    pairs = np.empty(width, np.uint64)
    for y in range(0, height, 2):
        upper, lower = y, min(y + 1, height - 1)
        for x in range(width):
            pairs[x] = np.uint64(source[upper, x]) | (np.uint64(source[lower, x]) << np.uint64(32))
        for x in range(size):
            red = green = blue = halves
            place = 3 * first[x]
            for tap in range(taps):
                weight = weights[x, tap]
                red += pairs[place] * weight
                green += pairs[place + 1] * weight
                blue += pairs[place + 2] * weight
                place += 3
            for colour, total in enumerate((red, green, blue)):
                out[upper, 3 * x + colour] = np.uint8(np.uint32(total) >> np.uint32(22))
                out[lower, 3 * x + colour] = np.uint8(total >> np.uint64(54))


def _sum_rows(source: Any, weights: Any, first: Any, out: Any) -> None:
    """Fill `out` uint8 [size, width] with weighted sums of the rows of uint8 [height, width]."""
    size, taps = weights.shape
    width = source.shape[1]
    totals = np.empty(width, np.uint32)
    for y in range(size):
        totals[:] = np.uint32(1 << 21)
        for tap in range(taps):
            weight, row = np.uint32(weights[y, tap]), source[first[y] + tap]
            for x in range(width):
                totals[x] += np.uint32(row[x]) * weight
        for x in range(width):
            out[y, x] = np.uint8(totals[x] >> np.uint32(22))
