"""Images of slides and heatmaps for the page: encoded tiles, patches and thumbnails, with their caches.

Tiles belong to a pyramid, with a factor of 2 between levels, over an image of any size; they are encoded as JPEG, or as
values in a PNG.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from wsi_gradcam.errors import NotShownError, TileError
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.results.display import ChannelInfo
from wsi_gradcam.results.heatmap import CHUNK, EXPLAINED, TISSUE, UNREADABLE
from wsi_gradcam.slides import read_region, thumbnail
from wsi_gradcam.slides.resample import best_level

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.slides import Slide, SlideInfo
    from wsi_gradcam.viewer.archive import Archive, ServedSlide
    from wsi_gradcam.viewer.layers import (
        ClassMap,
        Clustered,
        ClusterMap,
        Compared,
        Difference,
        Predicted,
        Spread,
        SpreadImage,
    )

    Layer: TypeAlias = "ServedSlide | Spread | Compared | Predicted | Clustered"
    Stored: TypeAlias = "SlideResult | SpreadImage | Difference | ClassMap | ClusterMap"

TILE_PX = 256
JPEG_QUALITY = 88  # nuclei stay crisp; 75 shows blocks at 40x
# The most pixels read for one tile. Coarser levels of a slide whose own pyramid ends early are not served; the page
# then composes them from tiles of the coarsest level that is.
MAX_SOURCE_PX = 1 << 24
STEPS = (1 << 16) - 1
LARGEST = 1e38  # that float32 can hold, with room around a range
CHUNK_BYTES = 96 << 20
IMAGE_BYTES = 128 << 20
COVERAGE = -1  # in place of a channel's number
THUMBNAIL_PX = 384
PATCH_QUALITY = 92


class Images:
    """Encodes images; those used most recently are kept."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._heatmaps = HeatmapReader()
        self._cache: Cache[tuple[object, ...], bytes] = Cache(IMAGE_BYTES, len)

    def slide_tile(self, slide: ServedSlide, level: int, row: int, column: int) -> bytes:
        """Return a tile of the slide as JPEG."""

        def encode(opened: Slide) -> bytes:
            return slide_tile(opened, slide_pyramid(opened.info), level, row, column)

        return self._from_slide(slide, ("slide", level, row, column), encode)

    def heatmap_tile(self, layer: Layer, channel: int, level: int, row: int, column: int, smooth: bool) -> bytes:
        """Return a tile of a channel of a heatmap, or of its spread, as PNG; see `HeatmapReader.tile`."""

        def encode() -> bytes:
            return self._heatmaps.tile(layer, channel, level, row, column, smooth)

        if not layer.is_final:
            return encode()
        return self._cache.get((layer.key, layer.version, smooth, channel, level, row, column), encode)

    def patch(self, slide: ServedSlide, number: int) -> bytes:
        """Return a patch as the model saw it, before the model's own transform, as JPEG."""
        model = self._archive.result.record.model

        def encode(opened: Slide) -> bytes:
            if not 0 <= number < slide.result.plan.patches:
                raise NotShownError(f"no patch {number}; there are {slide.result.plan.patches}, counted from 0")
            (y, x), (height, width) = slide.result.patch_yx(number), model.patch_px
            return encode_jpeg(read_region(opened, y, x, height, width, slide.result.patch_mpp), PATCH_QUALITY)

        return self._from_slide(slide, ("patch", number), encode)

    def thumbnail(self, slide: ServedSlide) -> bytes:
        """Return the whole slide as JPEG, with no side longer than 384 px."""
        return self._from_slide(
            slide, ("thumbnail",), lambda opened: encode_jpeg(thumbnail(opened, 0.0, THUMBNAIL_PX).rgb)
        )

    def _from_slide(self, slide: ServedSlide, image: tuple[object, ...], encode: Callable[[Slide], bytes]) -> bytes:
        def read() -> bytes:
            with self._archive.borrow_slide(slide) as opened:
                return encode(opened)

        return self._cache.get((slide.key, slide.version, *image), read)


@dataclass(frozen=True)
class PointValues:
    """The values of a heatmap at a point: one per channel, None where it was not explained, and its coverage."""

    values: list[float | None] | None
    tissue: bool
    explained: bool
    unreadable: bool


class HeatmapReader:
    """Reads heatmaps and spreads of all slides; decoded chunks are kept up to `max_bytes`."""

    def __init__(self, max_bytes: int = CHUNK_BYTES) -> None:
        self._chunks: Cache[tuple[object, ...], NDArray[Any]] = Cache(max_bytes, lambda chunk: chunk.nbytes)

    def tile(self, layer: Layer, channel: int, level: int, row: int, column: int, smooth: bool = True) -> bytes:
        """Return a tile of a channel as PNG, see `encode_values`.

        Levels finer than the stored ones are interpolated if `smooth`; otherwise they repeat the stored pixels.

        Raises:
            TileError: there is no such tile or channel.
        """
        info, region = find_channel(layer.result, channel), heatmap_pyramid(layer.result).region(level, row, column)
        stored = level - finer_levels(layer.result)
        if stored < 0:
            return encode_values(*self._enlarge(layer, channel, region, 1 << -stored, smooth), channel_scale(info))
        values, flags = self.read(layer, channel, stored, region), self.read(layer, COVERAGE, stored, region)
        return encode_values(values, flags, channel_scale(info))

    def at(self, layer: Layer, y: float, x: float) -> PointValues | None:
        """Return all channels' values over level-0 (y, x); None outside the heatmap."""
        result = layer.result
        pixel = pixel_at(y, x, result.stride_px, result.levels[0])
        if pixel is None:
            return None
        region = Region(*pixel, 1, 1)
        bits = int(self.read(layer, COVERAGE, 0, region)[0, 0])
        values = [float(self.read(layer, channel.number, 0, region)[0, 0]) for channel in result.channels]
        return PointValues(
            values=[round(value, 6) if bits & EXPLAINED else None for value in values],
            tissue=bool(bits & TISSUE),
            explained=bool(bits & EXPLAINED),
            unreadable=bool(bits & UNREADABLE),
        )

    def read(self, layer: Layer, channel: int, level: int, region: Region) -> NDArray[Any]:
        """Return values of a channel, float32, or of the coverage, uint8, in a region of a level [h, w]."""
        parts = chunks_touching(region, CHUNK)
        if len(parts) == 1:
            return _crop(self._chunk(layer, channel, level, *parts[0]), *parts[0], region)
        out = np.zeros((region.height, region.width), np.uint8 if channel == COVERAGE else np.float32)
        for row, column in parts:
            inside = region.intersect(Region(row * CHUNK, column * CHUNK, CHUNK, CHUNK))
            target = Region(inside.y - region.y, inside.x - region.x, inside.height, inside.width)
            out[target.slices] = _crop(self._chunk(layer, channel, level, row, column), row, column, inside)
        return out

    def _enlarge(
        self, layer: Layer, channel: int, region: Region, factor: int, smooth: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return values and coverage of a region of the heatmap's level 0 enlarged by `factor`.

        Smooth values are interpolated from pixel centre to pixel centre, coverage is not; pixels that were not
        explained do not contribute to their neighbours' values.
        """
        source = _with_margin(region, factor, *layer.result.levels[0])
        values, flags = self.read(layer, channel, 0, source), self.read(layer, COVERAGE, 0, source)
        rows = np.arange(region.y, region.bottom) // factor - source.y
        columns = np.arange(region.x, region.right) // factor - source.x
        nearest = rows[:, None], columns
        if not smooth:
            return values[nearest], flags[nearest]
        return _interpolate(values, (flags & EXPLAINED) > 0, region, source, factor), flags[nearest]

    def _chunk(self, layer: Layer, channel: int, level: int, row: int, column: int) -> NDArray[Any]:
        result, key = layer.result, (layer.key, layer.version, channel, level, row, column)

        def read() -> NDArray[Any]:
            whole = Region(0, 0, *result.levels[level])
            region = Region(row * CHUNK, column * CHUNK, CHUNK, CHUNK).intersect(whole)
            if channel == COVERAGE:
                return result.read_coverage(level, region)
            return result.read(result.channels[channel], level, region)

        return self._chunks.get(key, read) if layer.is_final else read()


def finer_levels(result: Stored) -> int:
    """Return the number of levels finer than the stored ones, down to one pixel per level-0 pixel of the slide.

    Browsers enlarge each tile separately, which shows as seams between tiles when a pixel covers many screen pixels.
    """
    return result.stride_px.bit_length() - 1


def heatmap_pyramid(result: Stored) -> TilePyramid:
    """Return the tiles of a slide's heatmap: its own levels, below the finer ones."""
    height, width = result.levels[0]
    finer = finer_levels(result)
    return TilePyramid(height << finer, width << finer, len(result.levels) + finer)


def find_channel(result: Stored, number: int) -> ChannelInfo:
    """Return a channel by its number.

    Raises:
        TileError: there is no such channel.
    """
    if not 0 <= number < len(result.channels):
        raise TileError(f"no channel {number}; there are {len(result.channels)}, counted from 0")
    return result.channels[number]


def channel_scale(channel: ChannelInfo) -> ValueScale:
    """Return the scale used for a channel's values in tiles.

    Raises:
        NotShownError: the metadata do not state a range of float32 numbers.
    """
    if not (abs(channel.minimum) < LARGEST and abs(channel.maximum) < LARGEST):
        raise NotShownError(f"channel {channel.number}: its range is not a pair of numbers; try `validate`")
    return ValueScale.around(channel.minimum, channel.maximum)


def _crop(chunk: NDArray[Any], row: int, column: int, region: Region) -> NDArray[Any]:
    y, x = region.y - row * CHUNK, region.x - column * CHUNK
    return chunk[y : y + region.height, x : x + region.width]


def _with_margin(region: Region, factor: int, height: int, width: int) -> Region:
    """Return the pixels of a level needed for a region of the enlarged level, with a margin of one for smoothing."""
    y, x = max(0, region.y // factor - 1), max(0, region.x // factor - 1)
    bottom, right = min(height, ceil_div(region.bottom, factor) + 1), min(width, ceil_div(region.right, factor) + 1)
    return Region(y, x, bottom - y, right - x)


def _interpolate(
    values: NDArray[np.float32], known: NDArray[np.bool_], region: Region, source: Region, factor: int
) -> NDArray[np.float32]:
    """Return the values of `source`, enlarged by `factor`, in `region`: means weighted by what is known [h, w]."""
    y, x = region.y / factor - source.y, region.x / factor - source.x
    box = (x, y, region.right / factor - source.x, region.bottom / factor - source.y)

    def resize(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(image.resize((region.width, region.height), Image.Resampling.BILINEAR, box=box), np.float32)

    if known.all():
        return resize(values)
    weights = known.astype(np.float32)
    return np.asarray(
        resize(np.where(known, values, np.float32(0))) / np.maximum(resize(weights), np.float32(1e-6)), np.float32
    )


@dataclass(frozen=True)
class TilePyramid:
    """The tiles of an image of `height` x `width` px. Level 0 is the finest, each pixel of level n is 2**n of level 0.

    Attributes:
        levels: number of levels served.
    """

    height: int
    width: int
    levels: int
    tile_px: int = TILE_PX

    @classmethod
    def covering(cls, height: int, width: int, tile_px: int = TILE_PX) -> TilePyramid:
        """Return a pyramid with levels up to the one that fits in a single tile.

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
        """Return the region of a tile in pixels of its level; the last tiles of rows and columns are cropped.

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
    """Return the number of pixels read for a tile: never more than the slide's level has."""
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
        """Return values rounded to whole numbers; values beyond the ends become the ends, NaN becomes 0."""
        scaled = (values - np.float32(self.low)) * np.float32(STEPS / (self.high - self.low))
        steps: NDArray[np.uint16] = np.clip(np.nan_to_num(np.rint(scaled), nan=0.0), 0, STEPS).astype(np.uint16)
        return steps


def encode_values(values: NDArray[np.float32], flags: NDArray[np.uint8], scale: ValueScale) -> bytes:
    """Return a PNG whose red and green are the high and low bytes of a value, and whose blue is the coverage bits.

    The browser applies colours, thresholds and windows to it, so that a slider needs no request.
    """
    steps = scale.steps(values)
    rgb = np.stack([(steps >> 8).astype(np.uint8), (steps & 255).astype(np.uint8), flags], axis=-1)
    buffer = io.BytesIO()
    # A third faster than searching for repeated strings, which low bytes do not have, and a third larger.
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
