"""Tiled TIFF slides read tile by tile: each tile is decoded once, where OpenSlide decodes it for every patch."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import SlideReadError, one_line
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides.base import on_background
from wsi_gradcam.slides.tiff_levels import TiffLevel, as_shown, shown_region, stored_region
from wsi_gradcam.slides.tile_cache import TileCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides.base import SlideInfo

CACHE_BYTES = 32 << 20  # a row of tiles of 256 px as wide as a block of patches, and what is read of the next
# A tile cannot need more than its pixels and some header: what claims more is not read.
SPARE_BYTES = 1 << 16


class TiffSlide:
    """A `Slide` in a tiled TIFF file, read by tifffile's decoders."""

    def __init__(self, path: Path, levels: list[TiffLevel], info: SlideInfo) -> None:
        self._path = path
        self._levels = levels
        self._info = info
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._cache = TileCache(CACHE_BYTES)

    @property
    def info(self) -> SlideInfo:
        """What is known of the slide."""
        return self._info

    def read_level(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Pixels of `region` of `level` as RGB uint8 [height, width, 3]; outside the slide: background.

        Raises:
            SlideReadError: a tile cannot be decoded or is missing; the slide stays usable.
        """
        return on_background(region, self._info.levels[level], self._info.background, partial(self._shown, level))

    def some_tiles(self, level: int, count: int) -> list[Region]:
        """Up to `count` tiles of a level that have data, evenly over the file, as regions of the level."""
        stored = self._levels[level]
        _, columns = stored.grid
        (full,) = np.nonzero((stored.offsets > 0) & (stored.counts > 0))
        full = full[: len(full) // stored.planes]
        chosen = full[np.unique(np.linspace(0, len(full) - 1, min(count, len(full))).astype(int))]
        return [shown_region(stored.tile_region(i // columns, i % columns), stored) for i in chosen.tolist()]

    def close(self) -> None:
        """Release the file."""
        os.close(self._file)

    def _shown(self, level: int, region: Region) -> NDArray[np.uint8]:
        """A region of the page as it is to be seen."""
        stored = self._levels[level]
        pixels = self._assembled(level, stored_region(region, stored.shown_px, stored.orientation))
        return as_shown(pixels, stored.orientation)

    def _assembled(self, level: int, region: Region) -> NDArray[np.uint8]:
        """A region of the page as stored, from its tiles."""
        stored = self._levels[level]
        height, width = stored.tile_px
        out = np.empty((region.height, region.width, 3), np.uint8)
        for row, column in stored.tiles_of(region):
            key = level, row, column
            tile = self._cache.get(key, partial(self._decoded, *key))
            y, x = row * height, column * width  # plain numbers: this runs several times a patch
            top, bottom = max(y, region.y), min(y + height, region.bottom)
            left, right = max(x, region.x), min(x + width, region.right)
            out[top - region.y : bottom - region.y, left - region.x : right - region.x] = tile[
                top - y : bottom - y, left - x : right - x
            ]
        return out

    def _decoded(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        stored = self._levels[level]
        place = stored.tile_region(row, column)
        pieces = stored.pieces(row, column)
        try:
            tile = stored.decode(pieces, [self._bytes(stored, index) for index in pieces])
        except Exception as error:  # decoders of damaged bytes raise many kinds
            raise SlideReadError(
                f"{self._path}: level {level}, y {place.y}, x {place.x}, {place.height} x {place.width} px cannot be "
                f"decoded: {one_line(error)}"
            ) from error
        if tile.shape[0] < place.height or tile.shape[1] < place.width:
            raise SlideReadError(
                f"{self._path}: level {level}, y {place.y}, x {place.x}: the tile has {tile.shape[0]} x "
                f"{tile.shape[1]} px, expected {place.height} x {place.width}"
            )
        return tile

    def _bytes(self, stored: TiffLevel, index: int) -> bytes:
        offset, count = int(stored.offsets[index]), int(stored.counts[index])
        if not (offset and count):
            raise ValueError("no data: a tile is missing in the file")
        largest = 4 * stored.tile_px[0] * stored.tile_px[1] * stored.samples + SPARE_BYTES
        if offset < 0 or not 0 < count <= largest:
            raise ValueError(f"{count} bytes at {offset} are claimed for a tile")
        data = os.pread(self._file, count, offset)
        if len(data) < count:
            raise ValueError(f"the file ends {count - len(data)} bytes before the tile does")
        return data
