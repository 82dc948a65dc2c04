"""Values of heatmaps by region and by point, through a cache of decoded chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from wsi_gradcam.errors import TileError
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.results.heatmap import CHUNK, EXPLAINED, TISSUE, UNREADABLE
from wsi_gradcam.viewer.memo import Memo
from wsi_gradcam.viewer.tiles import Scale, TileGrid, chunks_of, heat_tile, pixel_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.results.channels import ChannelInfo
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.viewer.archive import Shown
    from wsi_gradcam.viewer.spread import Spread, SpreadImage

    Layered = Shown | Spread
    Stored = SlideResult | SpreadImage

COVERAGE = -1  # instead of a channel's number


class Heat:
    """Reads heatmaps and spreads of all slides; decoded chunks are kept up to `most_bytes`."""

    def __init__(self, most_bytes: int = 96 << 20) -> None:
        self._chunks = Memo(most_bytes)

    def tile(self, shown: Layered, channel: int, level: int, row: int, column: int, smooth: bool = True) -> bytes:
        """A tile of a channel, see `heat_tile`; levels finer than the stored are interpolated, or repeat its pixels.

        Raises:
            TileError: there is no such tile or channel.
        """
        found, region = channel_of(shown.result, channel), heat_grid(shown.result).region(level, row, column)
        stored = level - finer_levels(shown.result)
        if stored < 0:
            return heat_tile(*self._enlarged(shown, channel, region, 1 << -stored, smooth), scale_of(found))
        values, flags = self.read(shown, channel, stored, region), self.read(shown, COVERAGE, stored, region)
        return heat_tile(values, flags, scale_of(found))

    def at(self, shown: Layered, y: float, x: float) -> dict[str, Any] | None:
        """All channels' values over level-0 (y, x), None for those without; None outside the heatmap."""
        result = shown.result
        pixel = pixel_of(y, x, result.stride_px, result.levels[0])
        if pixel is None:
            return None
        region = Region(*pixel, 1, 1)
        bits = int(self.read(shown, COVERAGE, 0, region)[0, 0])
        values = [float(self.read(shown, channel.number, 0, region)[0, 0]) for channel in result.channels]
        return {
            "values": [round(value, 6) if bits & EXPLAINED else None for value in values],
            "tissue": bool(bits & TISSUE),
            "explained": bool(bits & EXPLAINED),
            "unreadable": bool(bits & UNREADABLE),
        }

    def read(self, shown: Layered, channel: int, level: int, region: Region) -> NDArray[Any]:
        """Values of a channel, or of the coverage, in a region of a level [h, w]."""
        parts = chunks_of(region, CHUNK)
        if len(parts) == 1:
            return _part(self._chunk(shown, channel, level, *parts[0]), *parts[0], region)
        out = np.zeros((region.height, region.width), np.uint8 if channel == COVERAGE else np.float32)
        for row, column in parts:
            inside = region.intersect(Region(row * CHUNK, column * CHUNK, CHUNK, CHUNK))
            place = Region(inside.y - region.y, inside.x - region.x, inside.height, inside.width)
            out[place.slices] = _part(self._chunk(shown, channel, level, row, column), row, column, inside)
        return out

    def _enlarged(
        self, shown: Layered, channel: int, region: Region, factor: int, smooth: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Values and coverage of a region of the heatmap's level 0 enlarged by `factor`.

        Smooth values are interpolated from pixel centre to pixel centre, coverage is not; what was not explained has
        no part in its neighbours' values.
        """
        height, width = shown.result.levels[0]
        y, x = max(0, region.y // factor - 1), max(0, region.x // factor - 1)
        bottom, right = min(height, ceil_div(region.bottom, factor) + 1), min(width, ceil_div(region.right, factor) + 1)
        source = Region(y, x, bottom - y, right - x)
        values, flags = self.read(shown, channel, 0, source), self.read(shown, COVERAGE, 0, source)
        rows, columns = (
            np.arange(start, stop) // factor - first
            for start, stop, first in ((region.y, region.bottom, y), (region.x, region.right, x))
        )
        if not smooth:
            return values[rows[:, None], columns], flags[rows[:, None], columns]
        box = (region.x / factor - x, region.y / factor - y, region.right / factor - x, region.bottom / factor - y)

        def resized(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            image = Image.fromarray(np.ascontiguousarray(pixels))
            return np.asarray(
                image.resize((region.width, region.height), Image.Resampling.BILINEAR, box=box), np.float32
            )

        known = ((flags & EXPLAINED) > 0).astype(np.float32)
        if known.all():
            return resized(values), flags[rows[:, None], columns]
        weights = resized(known)
        means = np.asarray(resized(values * known) / np.maximum(weights, np.float32(1e-6)), np.float32)
        return means, flags[rows[:, None], columns]

    def _chunk(self, shown: Layered, channel: int, level: int, row: int, column: int) -> NDArray[Any]:
        result, key = shown.result, (shown.key, shown.version, channel, level, row, column)

        def read() -> NDArray[Any]:
            whole = Region(0, 0, *result.levels[level])
            region = Region(row * CHUNK, column * CHUNK, CHUNK, CHUNK).intersect(whole)
            if channel == COVERAGE:
                return result.read_coverage(level, region)
            return result.read(result.channels[channel], level, region)

        return self._chunks.get(key, read, lambda chunk: int(chunk.nbytes)) if shown.is_kept else read()


def finer_levels(result: Stored) -> int:
    """Levels finer than what is stored, down to one pixel per level-0 pixel of the slide.

    A browser enlarges each tile by itself, which shows as seams between them where a pixel is many of the screen.
    """
    return result.stride_px.bit_length() - 1


def heat_grid(result: Stored) -> TileGrid:
    """The tiles of a slide's heatmap: its own levels below the finer ones."""
    height, width = result.levels[0]
    finer = finer_levels(result)
    return TileGrid(height << finer, width << finer, len(result.levels) + finer)


def channel_of(result: Stored, number: int) -> ChannelInfo:
    """A channel by its number.

    Raises:
        TileError: there is none.
    """
    if not 0 <= number < len(result.channels):
        raise TileError(f"no channel {number}; there are {len(result.channels)}, counted from 0")
    return result.channels[number]


def scale_of(channel: ChannelInfo) -> Scale:
    """How the values of a channel are written in tiles."""
    return Scale.around(channel.minimum, channel.maximum)


def _part(chunk: NDArray[Any], row: int, column: int, region: Region) -> NDArray[Any]:
    y, x = region.y - row * CHUNK, region.x - column * CHUNK
    return chunk[y : y + region.height, x : x + region.width]
