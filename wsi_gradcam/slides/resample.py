"""Regions of slides at any mpp, read from the best level and antialiased."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import ConfigError, SlideReadError
from wsi_gradcam.geometry import Region, tiles
from wsi_gradcam.slides.triangle_filter import Span, frame_px, resample, shrink_framed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.slides.base import Slide, SlideInfo

LOG = logging.getLogger("wsi_gradcam")

# A level up to 1% coarser than requested is used: the enlargement cannot be seen, and the next finer level would cost
# at least four times as many pixels.
COARSER = 1.01
# Larger reads are split up, so that a thumbnail of a slide without a pyramid needs no more memory than this.
MAX_SOURCE_PX = 1 << 21
MOST_READ_PX = 1 << 25
# Fraction of a pixel: the rounding error of its position.
TINY = 1e-6
# Side of the smallest part of a thumbnail that is given up if it cannot be decoded.
UNREADABLE_PX = 16


def read_region(
    slide: Slide, y: float, x: float, height: int, width: int, mpp: float | tuple[float, float]
) -> NDArray[np.uint8]:
    """Return RGB uint8 [height, width, 3] of the slide at `mpp`, with the top left corner at level-0 (y, x).

    The result covers exactly height * mpp by width * mpp micrometres, for anisotropic slides too. Pixels come from the
    coarsest level that is fine enough and are reduced by an antialiasing triangle filter that also sees pixels just
    outside the region, so that neighbouring regions fit without a seam. Outside the slide there is background. If `mpp`
    is the slide's own and (y, x) are integers, pixels are passed through unchanged.

    Raises:
        MppError: the slide's mpp is not known.
        SlideReadError: a tile cannot be decoded.
    """
    mpp_y, mpp_x = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    slide_y, slide_x = slide.info.mpp_yx
    step_y, step_x = mpp_y / slide_y, mpp_x / slide_x
    if min(height, width) < 1 or not all(0 < step < math.inf for step in (step_y, step_x)):
        raise ConfigError(f"cannot read {width} x {height} px at mpp {mpp}: expected positive, finite sizes")
    level = _aligned_level(slide, step_y, step_x)
    taken = slide.info.levels[level]
    down_y, down_x, shift = taken.downsample_y, taken.downsample_x, taken.shift
    source_per_px = (step_y / down_y) * (step_x / down_x)
    if height * width * source_per_px <= MAX_SOURCE_PX:
        rows = _Axis(y / down_y + shift, step_y / down_y, height)
        return _read(slide, level, rows, _Axis(x / down_x + shift, step_x / down_x, width))
    out = np.empty((height, width, 3), np.uint8)
    for part in tiles(height, width, max(1, math.isqrt(int(MAX_SOURCE_PX / source_per_px)))):
        rows = _Axis((y + part.y * step_y) / down_y + shift, step_y / down_y, part.height)
        columns = _Axis((x + part.x * step_x) / down_x + shift, step_x / down_x, part.width)
        out[part.slices] = _read(slide, level, rows, columns)
    return out


def best_level(info: SlideInfo, step_y: float, step_x: float) -> int:
    """Return the coarsest level with at most `step_y` and `step_x` level-0 pixels per pixel."""
    return _levels_for(info, step_y, step_x)[0]


def _levels_for(info: SlideInfo, step_y: float, step_x: float) -> list[int]:
    """Return the levels that are fine enough for such steps, coarsest first, and in any case level 0."""
    fine_enough = [
        i
        for i, level in enumerate(info.levels)
        if level.downsample_y <= step_y * COARSER and level.downsample_x <= step_x * COARSER
    ]
    return sorted(fine_enough, key=lambda i: -info.levels[i].downsample_y) or [0]


def _aligned_level(slide: Slide, step_y: float, step_x: float) -> int:
    """Return the coarsest level that is fine enough and shows things in the same places as level 0."""
    with _LOCK:
        alignment = _ALIGNMENTS.setdefault(slide, LevelAlignment(slide))
    return next(level for level in [*_levels_for(slide.info, step_y, step_x), 0] if alignment.holds(level))


class LevelAlignment:
    """The levels of a slide whose content confirms that their pixels lie where their factors say. Each is tried once.

    The file's numbers may be wrong: levels are padded to whole tiles, or were enlarged to a rounder size. So a few
    places in a level, far apart and with structure, are registered with the next finer level. If one has moved by more
    than a pixel, the level is not used.
    """

    def __init__(self, slide: Slide) -> None:
        self._slide = weakref.proxy(slide)
        self._known: dict[int, bool] = {0: True}
        self._lock = threading.RLock()

    def holds(self, level: int) -> bool:
        """Return whether a level can be used: uncertain factors must be proved right, others not proved wrong.

        Raises:
            SlideAccessError: a remote slide cannot be reached.
        """
        if level in self._known:
            return self._known[level]
        with self._lock:
            if level not in self._known:
                info = self._slide.info
                if (source := info.levels[level].made_of) is not None:  # its pixels lie where its source level's do
                    self._known[level] = self.holds(source)
                    return self._known[level]
                moved = self._moved(level)
                self._known[level] = not moved if moved is not None else not info.levels[level].problem
                if not self._known[level]:
                    why = (
                        info.levels[level].problem
                        if moved is None
                        else (f"it is shifted by {moved:.1f} of its px against them")
                    )
                    LOG.warning("%s: level %d is replaced by finer ones: %s", info.path, level, why)
            return self._known[level]

    def _moved(self, level: int) -> float | None:
        """Return by how many pixels the level's content has moved, 0 for up to one; None if it does not show."""
        size = self._slide.info.levels[level]
        if max(size.height, size.width) <= WINDOW_PX and not size.problem:
            return 0.0  # with so few pixels, no factor is ever off by one, and all of a finer level would be read
        found = []
        for place in self._places(level):
            with suppress(SlideReadError):  # damage is found and reported where it matters
                if (moved := self._moved_at(level, place)) is not None:
                    found.append(moved)
            if len(found) == WINDOWS:
                break
        if not found:
            return None
        wrong = [moved for moved in found if moved > MAX_MOVED_PX]
        return max(wrong) if 2 * len(wrong) >= len(found) else 0.0

    def _places(self, level: int) -> list[Region]:
        """Return windows of the level, those far from the corner first: a wrong factor shows most there."""
        size = self._slide.info.levels[level]
        side = min(WINDOW_PX, size.height, size.width)
        spots = [(f * (size.height - side), g * (size.width - side)) for f, g in PLACES]
        return [Region(round(y), round(x), side, side) for y, x in dict.fromkeys(spots)]

    def _moved_at(self, level: int, place: Region) -> float | None:
        """Return by how many pixels a window has moved; None if it has no structure."""
        shown = _gray(self._slide.read_level(level, place))
        if shown.std() < STRUCTURE:
            return None
        finer = self._reference(level)
        info = self._slide.info
        here, there = info.levels[level], info.levels[finer]
        scale_y, scale_x = here.downsample_y / there.downsample_y, here.downsample_x / there.downsample_x
        rows = _Axis(place.y * scale_y, scale_y, place.height)
        columns = _Axis(place.x * scale_x, scale_x, place.width)
        return _moved(shown, _gray(_read(self._slide, finer, rows, columns)))

    def _reference(self, level: int) -> int:
        """Return a finer level that can be used: the finest one that is not much finer, so that little is read."""
        levels = self._slide.info.levels
        finer = [i for i in range(len(levels)) if levels[i].downsample_y < levels[level].downsample_y]
        near = [i for i in finer if levels[i].downsample_y * MAX_STEP >= levels[level].downsample_y]
        ordered = [*near, *sorted(set(finer) - set(near), reverse=True)]
        return next((i for i in ordered if self.holds(i)), 0)


# Windows are compared in grey. A factor that is off by 0.3% moves things by more than a pixel from 400 pixels on.
WINDOW_PX, WINDOWS = 128, 2
PLACES = tuple((f, g) for f, g in ((0.9, 0.9), (0.5, 0.9), (0.9, 0.5), (0.1, 0.7), (0.7, 0.1), (0.5, 0.5), (0.3, 0.3)))
STRUCTURE = 6.0  # gray levels
MAX_MOVED_PX, MAX_STEP = 1.0, 4.5
ALIKE, UNLIKE = 0.5, 0.3  # correlations of windows that show the same, and that do not
_LOCK = threading.Lock()
_ALIGNMENTS: weakref.WeakKeyDictionary[Slide, LevelAlignment] = weakref.WeakKeyDictionary()


def _gray(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the brightness, slightly smoothed, so that noise and the method of downsampling do not matter."""
    from scipy.ndimage import gaussian_filter  # not imported above: it takes time

    smooth: NDArray[np.float32] = gaussian_filter(rgb.mean(axis=2, dtype=np.float32), SMOOTHED_PX)
    return smooth


def _moved(shown: NDArray[np.float32], expected: NDArray[np.float32]) -> float | None:
    """Return by how many pixels `shown` is shifted against `expected`; infinity if it shows something else.

    None if neither is certain.
    """
    from skimage.registration import phase_cross_correlation

    fade = np.outer(*(np.hanning(size) for size in shown.shape))
    flat = [(image - image.mean()) * fade for image in (expected, shown)]
    shift, _, _ = phase_cross_correlation(*flat, upsample_factor=10, normalization=None)
    still, shifted = _likeness(shown, expected, (0, 0)), _likeness(shown, expected, shift)
    if max(still, shifted) < UNLIKE:
        return math.inf
    if max(still, shifted) < ALIKE:
        return None
    better = 1 - shifted < BETTER * (1 - still)  # otherwise a repetitive pattern
    return float(np.abs(shift).max()) if better else 0.0


SMOOTHED_PX, BETTER = 1.0, 0.6


def _likeness(shown: NDArray[np.float32], expected: NDArray[np.float32], shift: Sequence[float]) -> float:
    """Return the correlation of two images where they overlap, the first moved by the whole pixels of the shift."""
    parts = []
    for image, sign in ((shown, -1), (expected, 1)):
        starts = [max(0, sign * round(float(by))) for by in shift]
        ends = [size - max(0, -sign * round(float(by))) for size, by in zip(image.shape, shift, strict=True)]
        parts.append(image[starts[0] : ends[0], starts[1] : ends[1]])
    if min(parts[0].shape) < 16 or min(part.std() for part in parts) < 1:
        return 0.0
    return float(np.corrcoef(parts[0].ravel(), parts[1].ravel())[0, 1])


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail of a whole slide.

    Attributes:
        rgb: uint8 [h, w, 3]; each pixel is `slide height / h` by `slide width / w` level-0 pixels, exactly.
        unreadable: bool [h, w], where the file could not be decoded; `rgb` has background there.
    """

    rgb: NDArray[np.uint8]
    unreadable: NDArray[np.bool_]


def thumbnail(slide: Slide, mpp: float, max_px: int) -> Thumbnail:
    """Return the whole slide at `mpp`, or coarser so that no side exceeds `max_px`.

    Raises:
        MppError: the slide's mpp is not known.
        SlideReadError: most of it cannot be decoded.
    """
    mpp_y, mpp_x = slide.info.mpp_yx
    height_um, width_um = slide.info.height * mpp_y, slide.info.width * mpp_x
    mpp = max(mpp, height_um / max_px, width_um / max_px)
    h, w = max(1, round(height_um / mpp)), max(1, round(width_um / mpp))
    thumb = Thumbnail(np.empty((h, w, 3), np.uint8), np.zeros((h, w), np.bool_))
    _fill(slide, thumb, Region(0, 0, h, w))
    return thumb


def _fill(slide: Slide, thumb: Thumbnail, part: Region) -> None:
    """Read a part of a thumbnail; a part that fails is halved until only what is unreadable is left out."""
    h, w = thumb.unreadable.shape
    step_y, step_x = slide.info.height / h, slide.info.width / w
    mpp_y, mpp_x = slide.info.mpp_yx
    try:
        thumb.rgb[part.slices] = read_region(
            slide, part.y * step_y, part.x * step_x, part.height, part.width, (step_y * mpp_y, step_x * mpp_x)
        )
    except SlideReadError:
        if max(part.height, part.width) <= UNREADABLE_PX:
            thumb.rgb[part.slices] = slide.info.background
            thumb.unreadable[part.slices] = True
            if thumb.unreadable.mean() > 0.5:
                raise
            return
        for half in tiles(part.height, part.width, -(-max(part.height, part.width) // 2)):
            _fill(slide, thumb, Region(part.y + half.y, part.x + half.x, half.height, half.width))


class _Axis:
    """The position of `size` output pixels of `scale` level pixels each, from `start` on, along one axis."""

    def __init__(self, start: float, scale: float, size: int) -> None:
        # Within a hundredth of a pixel over the whole length there is nothing to resample.
        self.exact = abs(scale - 1) * size < 0.01 and abs(start - round(start)) < 0.01
        self.size = size
        if self.exact:
            self.first, self.length = round(start), size
            self.span = Span(size, 0.0, size, size)
            return
        # Only the pixels that the filter weighs: a damaged tile next to them must not affect the region.
        end, margin = start + scale * size, max(1.0, scale) - scale / 2 - 0.5
        self.first = math.floor(min(start, start - margin + TINY))
        self.length = math.ceil(max(end, end + margin - TINY)) - self.first
        self.span = Span(self.length, start - self.first, end - self.first, size)


def _read(slide: Slide, level: int, rows: _Axis, columns: _Axis) -> NDArray[np.uint8]:
    if rows.length * columns.length > MOST_READ_PX:
        raise SlideReadError(
            f"{slide.info.path}: level {level}, x {columns.first}, y {rows.first}: {columns.length} x {rows.length} px "
            "would have to be read at once, because no level is coarse enough; convert the slide to a pyramid"
        )
    region = Region(rows.first, columns.first, rows.length, columns.length)
    if rows.exact and columns.exact:
        return slide.read_level(level, region)
    frame = frame_px(rows.span, columns.span)
    if not frame:
        return resample(slide.read_level(level, region), rows.span, columns.span)
    framed = np.empty((rows.length + 2 * frame, columns.length + 2 * frame, 3), np.uint8)
    within = framed[frame:-frame, frame:-frame]
    if (read_into := getattr(slide, "read_into", None)) is not None:
        read_into(level, region, within)
    else:
        within[:] = slide.read_level(level, region)
    return shrink_framed(framed, frame)
