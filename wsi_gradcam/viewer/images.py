"""Images of slides and heatmaps as the page gets them: encoded tiles, patches and thumbnails, with their caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from wsi_gradcam.errors import NotShownError, TileError
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.results.heatmap import CHUNK, EXPLAINED, TISSUE, UNREADABLE
from wsi_gradcam.slides import read_region, thumbnail
from wsi_gradcam.viewer.tiles import (
    TilePyramid,
    ValueScale,
    chunks_touching,
    encode_jpeg,
    encode_values,
    pixel_at,
    slide_pyramid,
    slide_tile,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.results.channels import ChannelInfo
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.viewer.archive import Archive, ServedSlide
    from wsi_gradcam.viewer.spread import Spread, SpreadImage

    Layer = ServedSlide | Spread
    Stored = SlideResult | SpreadImage

LARGEST = 1e38  # that float32 holds, with room for what is around a range
CHUNK_BYTES = 96 << 20
IMAGE_BYTES = 128 << 20
COVERAGE = -1  # in place of a channel's number
THUMBNAIL_PX = 384
PATCH_QUALITY = 92


class Images:
    """Encodes images; those used last are kept."""

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
            return encode_jpeg(read_region(opened, y, x, height, width, model.mpp), PATCH_QUALITY)

        return self._from_slide(slide, ("patch", number), encode)

    def thumbnail(self, slide: ServedSlide) -> bytes:
        """Return the whole slide, no side longer than 384 px, as JPEG."""
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
    """The values of a heatmap at a point: a value a channel, None where it was not explained, and its coverage."""

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

        Levels finer than the stored ones are interpolated if `smooth`, else they repeat the stored pixels.

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

    Browsers enlarge each tile by itself, which shows as seams between tiles where a pixel covers many of the screen.
    """
    return result.stride_px.bit_length() - 1


def heatmap_pyramid(result: Stored) -> TilePyramid:
    """Return the tiles of a slide's heatmap: its own levels below the finer ones."""
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
    """Return the scale in which tiles hold the values of a channel.

    Raises:
        NotShownError: the metadata say no range of float32 numbers.
    """
    if not (abs(channel.minimum) < LARGEST and abs(channel.maximum) < LARGEST):
        raise NotShownError(f"channel {channel.number}: its range is no pair of numbers; try `validate`")
    return ValueScale.around(channel.minimum, channel.maximum)


def _crop(chunk: NDArray[Any], row: int, column: int, region: Region) -> NDArray[Any]:
    y, x = region.y - row * CHUNK, region.x - column * CHUNK
    return chunk[y : y + region.height, x : x + region.width]


def _with_margin(region: Region, factor: int, height: int, width: int) -> Region:
    """Return the pixels of a level that a region of the enlarged level needs, with a margin of one for smoothing."""
    y, x = max(0, region.y // factor - 1), max(0, region.x // factor - 1)
    bottom, right = min(height, ceil_div(region.bottom, factor) + 1), min(width, ceil_div(region.right, factor) + 1)
    return Region(y, x, bottom - y, right - x)


def _interpolate(
    values: NDArray[np.float32], known: NDArray[np.bool_], region: Region, source: Region, factor: int
) -> NDArray[np.float32]:
    """Return the values in `source`, enlarged by `factor`, in `region`: means weighted by what is known [h, w]."""
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
