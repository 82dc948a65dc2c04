"""Tiles: a pyramid of halves over an image of any size, and their encoding, as JPEG or as values in a PNG."""

from __future__ import annotations

import io
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wsi_gradcam.errors import TileError
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.slides import read_region
from wsi_gradcam.slides.resample import best_level

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides import Slide, SlideInfo

TILE_PX = 256
JPEG_QUALITY = 88  # nuclei stay crisp; 75 shows blocks at 40x
# The most pixels that are read for one tile. Coarser levels of a slide whose own pyramid ends early are not served; the
# page then composes them of the tiles of the coarsest level that is.
MAX_SOURCE_PX = 1 << 24
STEPS = (1 << 16) - 1


@dataclass(frozen=True)
class TilePyramid:
    """The tiles of an image of `height` x `width` px. Level 0 is the finest, each pixel of level n is 2**n of level 0.

    Attributes:
        levels: number of levels that are served.
    """

    height: int
    width: int
    levels: int
    tile_px: int = TILE_PX

    @classmethod
    def covering(cls, height: int, width: int, tile_px: int = TILE_PX) -> TilePyramid:
        """Return a pyramid with levels up to the one that is a single tile.

        >>> TilePyramid.covering(2967, 2220).levels
        5
        """
        levels = 1
        while max(height, width) > tile_px << (levels - 1):
            levels += 1
        return cls(height, width, levels, tile_px)

    def shape(self, level: int) -> tuple[int, int]:
        """Return (height, width) of a level, rounded up: the last pixels may reach beyond the image.

        >>> TilePyramid(2967, 2220, 5).shape(2)
        (742, 555)
        """
        return ceil_div(self.height, 1 << level), ceil_div(self.width, 1 << level)

    def region(self, level: int, row: int, column: int) -> Region:
        """Return the region of a tile in pixels of its level; the last tiles of rows and columns are cut.

        Raises:
            TileError: there is no such tile.

        >>> TilePyramid(2967, 2220, 5).region(2, 2, 2)
        Region(y=512, x=512, height=230, width=43)
        """
        if not 0 <= level < self.levels:
            raise TileError(f"no level {level}; there are {self.levels}, counted from 0")
        height, width = self.shape(level)
        y, x = row * self.tile_px, column * self.tile_px
        if not (0 <= y < height and 0 <= x < width):
            rows, columns = ceil_div(height, self.tile_px), ceil_div(width, self.tile_px)
            raise TileError(f"no tile {row}, {column}; level {level} has {rows} rows and {columns} columns")
        return Region(y, x, min(self.tile_px, height - y), min(self.tile_px, width - x))


def slide_pyramid(info: SlideInfo) -> TilePyramid:
    """Return the tiles of a slide, without the levels whose tiles would be too expensive to read."""
    whole = TilePyramid.covering(info.height, info.width)
    cheap = [level for level in range(whole.levels) if _source_px(info, level, whole.tile_px) <= MAX_SOURCE_PX]
    return TilePyramid(whole.height, whole.width, len(cheap), whole.tile_px)


def _source_px(info: SlideInfo, level: int, tile_px: int) -> float:
    """Return the number of pixels that are read for a tile: never more than the slide's level has."""
    step = float(1 << level)
    source = info.levels[best_level(info, step, step)]
    height, width = tile_px * step / source.downsample_y, tile_px * step / source.downsample_x
    return min(height, source.height) * min(width, source.width)


def slide_tile(slide: Slide, pyramid: TilePyramid, level: int, row: int, column: int) -> bytes:
    """Return a tile of the slide as JPEG.

    Raises:
        TileError: there is no such tile.
        SlideReadError: it cannot be decoded.
    """
    region, step = pyramid.region(level, row, column), 1 << level
    mpp_y, mpp_x = slide.info.mpp_yx
    rgb = read_region(
        slide, region.y * step, region.x * step, region.height, region.width, (mpp_y * step, mpp_x * step)
    )
    return encode_jpeg(rgb)


def encode_jpeg(rgb: NDArray[np.uint8], quality: int = JPEG_QUALITY) -> bytes:
    """Return an RGB image, uint8 [h, w, 3], as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


@dataclass(frozen=True)
class ValueScale:
    """The 16-bit scale of a channel's values in tiles: `low` is 0 and `high` 65535."""

    low: float
    high: float

    @classmethod
    def around(cls, minimum: float, maximum: float) -> ValueScale:
        """Return a scale with room beyond the known range of the channel, which is measured on a coarser level."""
        room = max(maximum - minimum, 1e-6) / 2
        return cls(minimum - room, maximum + room)

    def steps(self, values: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Return values as whole numbers, to the nearest; values beyond the ends become the ends, NaN becomes 0."""
        scaled = (values - np.float32(self.low)) * np.float32(STEPS / (self.high - self.low))
        steps: NDArray[np.uint16] = np.clip(np.nan_to_num(np.rint(scaled), nan=0.0), 0, STEPS).astype(np.uint16)
        return steps


def encode_values(values: NDArray[np.float32], flags: NDArray[np.uint8], scale: ValueScale) -> bytes:
    """Return a PNG whose red and green are the high and the low byte of a value, and whose blue is the coverage's bits.

    The browser applies colours, thresholds and windows to it, so that a slider needs no request.
    """
    steps = scale.steps(values)
    rgb = np.stack([(steps >> 8).astype(np.uint8), (steps & 255).astype(np.uint8), flags], axis=-1)
    buffer = io.BytesIO()
    # A third faster than searching for repeated strings, of which low bytes have none, and a third larger.
    Image.fromarray(rgb).save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def pixel_at(y: float, x: float, stride: int, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Return the heatmap's pixel (row, column) over level-0 (y, x); None outside the heatmap.

    >>> pixel_at(31.9, 32, 16, (10, 10))
    (1, 2)
    """
    if not (math.isfinite(y) and math.isfinite(x)):
        return None
    row, column = math.floor(y / stride), math.floor(x / stride)
    return (row, column) if 0 <= row < shape[0] and 0 <= column < shape[1] else None


def chunks_touching(region: Region, side: int) -> list[tuple[int, int]]:
    """Return (row, column) of the `side` x `side` chunks that a region touches."""
    rows = range(region.y // side, -(-region.bottom // side))
    columns = range(region.x // side, -(-region.right // side))
    return [(row, column) for row in rows for column in columns]
