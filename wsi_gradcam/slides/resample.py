"""Regions of slides at any mpp, from the best level, antialiased."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wsi_gradcam.errors import ConfigError, SlideReadError
from wsi_gradcam.geometry import Region, tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides.base import Slide, SlideInfo

# A level up to 1 % coarser than asked for is taken: the enlargement cannot be seen, the next finer level would
# cost four times the pixels or more.
COARSER = 1.01
# Larger reads are cut, so that a thumbnail of a slide without a pyramid needs no more memory than this.
MAX_SOURCE_PX = 1 << 21
MOST_READ_PX = 1 << 25
# Of a pixel, the rounding error of its position.
TINY = 1e-6
# Side of the smallest part of a thumbnail that is given up when it cannot be decoded.
UNREADABLE_PX = 16


def read_region(
    slide: Slide, y: float, x: float, height: int, width: int, mpp: float | tuple[float, float]
) -> NDArray[np.uint8]:
    """Return RGB uint8 [height, width, 3] of the slide at `mpp`, with the top left corner at level-0 (y, x).

    The result covers exactly height * mpp by width * mpp micrometres, also for anisotropic slides. Pixels come
    from the coarsest level that is fine enough and are reduced by an antialiasing triangle filter that also sees
    pixels just outside the region, so that neighbouring regions fit without a seam. Outside the slide there
    is background. Where `mpp` is the slide's own and (y, x) are whole, pixels are passed through unchanged.

    Raises:
        MppError: the slide's mpp is not known.
        SlideReadError: a tile cannot be decoded.
    """
    mpp_y, mpp_x = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    slide_y, slide_x = slide.info.mpp_yx
    step_y, step_x = mpp_y / slide_y, mpp_x / slide_x
    if min(height, width) < 1 or not all(0 < step < math.inf for step in (step_y, step_x)):
        raise ConfigError(f"cannot read {height} x {width} px at mpp {mpp}: expected positive, finite sizes")
    level = best_level(slide.info, step_y, step_x)
    down_y, down_x = slide.info.levels[level].downsample_y, slide.info.levels[level].downsample_x
    source_per_px = (step_y / down_y) * (step_x / down_x)
    if height * width * source_per_px <= MAX_SOURCE_PX:
        return _read(
            slide, level, _Axis(y / down_y, step_y / down_y, height), _Axis(x / down_x, step_x / down_x, width)
        )
    out = np.empty((height, width, 3), np.uint8)
    for part in tiles(height, width, max(1, math.isqrt(int(MAX_SOURCE_PX / source_per_px)))):
        rows = _Axis((y + part.y * step_y) / down_y, step_y / down_y, part.height)
        columns = _Axis((x + part.x * step_x) / down_x, step_x / down_x, part.width)
        out[part.slices] = _read(slide, level, rows, columns)
    return out


def best_level(info: SlideInfo, step_y: float, step_x: float) -> int:
    """Return the coarsest level with at most `step_y` and `step_x` level-0 pixels per pixel."""
    fine_enough = [
        i
        for i, level in enumerate(info.levels)
        if level.downsample_y <= step_y * COARSER and level.downsample_x <= step_x * COARSER
    ]
    return max(fine_enough, key=lambda i: info.levels[i].downsample_y, default=0)


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
    """Read a part of a thumbnail; what fails is halved until only the unreadable is left out."""
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
            self.first, self.length, self.box = round(start), size, (0.0, float(size))
            return
        # The pixels that the filter weighs and no more: a damaged tile beside them is none of the region's business.
        end, margin = start + scale * size, max(1.0, scale) - scale / 2 - 0.5
        self.first = math.floor(min(start, start - margin + TINY))
        self.length = math.ceil(max(end, end + margin - TINY)) - self.first
        self.box = (start - self.first, end - self.first)


def _read(slide: Slide, level: int, rows: _Axis, columns: _Axis) -> NDArray[np.uint8]:
    if rows.length * columns.length > MOST_READ_PX:
        raise SlideReadError(
            f"{slide.info.path}: level {level}, y {rows.first}, x {columns.first}: {rows.length} x {columns.length} px "
            "would have to be read at once, because no level is coarse enough; write the slide anew with a pyramid"
        )
    pixels = slide.read_level(level, Region(rows.first, columns.first, rows.length, columns.length))
    if rows.exact and columns.exact:
        return pixels
    box = (columns.box[0], rows.box[0], columns.box[1], rows.box[1])
    size = (columns.size, rows.size)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=box))
