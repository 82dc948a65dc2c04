"""The reader of tiled TIFF slides: each tile is decoded once, whereas OpenSlide decodes it for every patch."""

from __future__ import annotations

import math
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import SlideReadError, one_line
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.slides.base import Level, fill_background
from wsi_gradcam.slides.tiff_levels import SPARE_BYTES, TOP_LEFT, TiffLevel, orient, shown_region, stored_region
from wsi_gradcam.slides.tiff_samples import reduced_jpeg2000
from wsi_gradcam.slides.tiff_streams import turns_into_rgb
from wsi_gradcam.system.processes import keep_freed_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides.base import ByteRange, SlideFile, SlideInfo

    Tile = NDArray[np.uint8]
    Key = tuple[int, int, int]  # level, row, column

CACHE_BYTES = 32 << 20  # a row of 256 px tiles as wide as a block of patches, plus what is read of the next row
# The most tiles that are read in one go; these too are held until the region is put together.
MAX_READ_PX = 1 << 22
REDUCTIONS = (2, 4, 8)
NEARLY = 1.01
# What a JPEG 2000 wavelet leaves of two pixels is centred on the first, not between them.
WAVELET_PX = 0.5
# Damaged tiles that take long to be recognised: how many are remembered, and from which size on.
MAX_DAMAGED, LARGE_PX = 1 << 12, 1 << 20


class TiffSlide:
    """A `Slide` in a tiled TIFF file, read by tifffile's decoders. It owns the file."""

    def __init__(self, file: SlideFile, levels: list[TiffLevel], info: SlideInfo) -> None:
        keep_freed_memory()
        self._file = file
        self._levels = levels
        self._info = replace(info, levels=tuple(map(_with_data, levels, info.levels)))
        largest = 3 * max(height * width for height, width in (level.tile_px for level in levels))
        self._cache: Cache[Key, Tile] = Cache(max(CACHE_BYTES, largest), attrgetter("nbytes"))
        self._damaged: Cache[Key, str] = Cache(MAX_DAMAGED)

    @property
    def info(self) -> SlideInfo:
        """The slide's metadata."""
        return self._info

    def read_level(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the pixels of `region` of `level` as RGB uint8 [height, width, 3]; outside the slide: background.

        Raises:
            SlideReadError: a tile cannot be decoded or is missing; the slide stays usable.
            SlideAccessError: a remote file can no longer be reached.
        """
        out = np.empty((region.height, region.width, 3), np.uint8)
        self.read_into(level, region, out)
        return out

    def read_into(self, level: int, region: Region, out: NDArray[np.uint8]) -> None:
        """Fill `out`, which may be part of a larger array, with what `read_level` returns.

        Raises:
            SlideError: as for `read_level`.
        """
        inside, place = fill_background(region, self._info.levels[level], self._info.background, out)
        stored = self._levels[level]
        if not place.size:
            return
        if stored.orientation == TOP_LEFT:  # nearly always, and this runs for every patch
            self._fill(level, inside, place)
            return
        turned = stored_region(inside, stored.shown_px, stored.orientation)
        pixels = np.empty((turned.height, turned.width, 3), np.uint8)
        self._fill(level, turned, pixels)
        place[:] = orient(pixels, stored.orientation)

    def sample_tiles(self, level: int, count: int) -> list[Region]:
        """Return up to `count` tiles with data, spread evenly over the file, as regions of the level."""
        stored = self._levels[level]
        _, columns = stored.grid
        (full,) = np.nonzero((stored.offsets > 0) & (stored.counts > 0))
        full = full[: len(full) // stored.planes]
        chosen = full[np.unique(np.linspace(0, len(full) - 1, min(count, len(full))).astype(int))]
        return [shown_region(stored.tile_region(i // columns, i % columns), stored) for i in chosen.tolist()]

    def obeys_streams(self, level: int) -> bool:
        """Return whether a JPEG 2000 level is declared as YCbCr, although its stream says that it is RGB."""
        return says_rgb(self._file, self._levels[level])

    def is_scaled(self, level: int) -> bool:
        """Return whether a level says that it does not use all bits of its samples."""
        return self._levels[level].is_scaled

    def with_reductions(self) -> TiffSlide:
        """Return the slide with further levels, whose tiles are decoded at a size reduced by 2, 4 and 8.

        That takes a half to a seventh of the time. Their pixels differ from those of a downsampled level by a few grey
        levels. Only levels that are finer than the next one in the file are made.
        """
        own = self._info.levels
        levels: list[tuple[TiffLevel, Level, Level | None]] = [
            (stored, level, None) for stored, level in zip(self._levels, own, strict=True)
        ]
        steps = [level.downsample_y for level in own]
        for stored, level in zip(self._levels, own, strict=True):
            for by in REDUCTIONS:
                beyond = level.downsample_y * by * NEARLY
                if any(level.downsample_y < step <= beyond for step in steps) or not self._can_reduce(stored, by):
                    break
                size = ceil_div(level.height, by), ceil_div(level.width, by)
                downsamples = level.downsample_y * by, level.downsample_x * by
                shift = WAVELET_PX * (1 - 1 / by) if stored.decode_reduced is reduced_jpeg2000 else 0.0
                levels.append((stored.reduced(by), Level(*size, *downsamples, level.problem, shift), level))
        levels.sort(key=lambda made: made[1].downsample_y)
        at = {id(level): index for index, (_, level, _) in enumerate(levels)}
        shown = tuple(replace(level, made_of=at[id(source)] if source else None) for _, level, source in levels)
        return TiffSlide(self._file, [stored for stored, _, _ in levels], replace(self._info, levels=shown))

    def _can_reduce(self, stored: TiffLevel, by: int) -> bool:
        """Return whether the first existing tile comes out smaller."""
        if stored.decode_reduced is None or any(side % by for side in stored.tile_px) or not stored.counts.any():
            return False
        index = int(np.argmax(stored.counts > 0)) % (len(stored.counts) // stored.planes)
        row, column = divmod(index, stored.grid[1])
        smaller = stored.reduced(by)
        try:
            places = locate(smaller, row, column)
            found = list(self._file.read_many(places if isinstance(places, list) else []))
            tile = smaller.decode(smaller.pieces(row, column), check_complete(places, found))
        except Exception:  # decoders raise many kinds
            return False
        return tile.shape[:2] == smaller.tile_px

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _glass(self, stored: TiffLevel) -> NDArray[np.uint8]:
        return np.broadcast_to(np.array(self._info.background, np.uint8), (*stored.tile_px, 3))

    def _fill(self, level: int, region: Region, out: NDArray[np.uint8]) -> None:
        """Fill `out` with a region of the stored page from its tiles."""
        stored = self._levels[level]
        height, width = stored.tile_px
        wanted = [(level, row, column) for row, column in stored.tiles_of(region)]
        at_once = max(1, MAX_READ_PX // (height * width))
        for first in range(0, len(wanted), at_once):
            keys = wanted[first : first + at_once]
            for (_, row, column), tile in zip(keys, self._cache.get_many(keys, self._make), strict=True):
                y, x = row * height - region.y, column * width - region.x  # plain numbers: this runs for every tile
                top, bottom = max(y, 0), min(y + height, region.height)
                left, right = max(x, 0), min(x + width, region.width)
                out[top:bottom, left:right] = tile[top - y : bottom - y, left - x : right - x]

    def _make(self, keys: list[Key]) -> list[Tile | Exception]:
        """Return decoded tiles, read in one go, or the errors of those that cannot be decoded."""
        places = [locate(self._levels[level], row, column) for level, row, column in keys]
        data = iter(self._file.read_many([place for found in places if isinstance(found, list) for place in found]))
        made: list[Tile | Exception] = []
        for key, found in zip(keys, places, strict=True):
            try:
                made.append(self._decode(*key, found, [] if isinstance(found, str) else [next(data) for _ in found]))
            except SlideReadError as error:
                made.append(error)
        return made

    def _decode(
        self, level: int, row: int, column: int, places: list[ByteRange] | str, found: list[bytes | OSError]
    ) -> NDArray[np.uint8]:
        stored = self._levels[level]
        if not places:
            return self._glass(stored)
        if self._damaged.currsize and (known := self._damaged.peek((level, row, column))) is not None:
            raise SlideReadError(known)
        try:
            tile = stored.decode(stored.pieces(row, column), check_complete(places, found))
        except Exception as error:  # decoders raise many kinds of errors for damaged bytes
            region = stored.tile_region(row, column)
            said = (
                f"{self._file.name}: level {level}, x {region.x}, y {region.y}, {region.width} x {region.height} px "
                f"cannot be decoded: {one_line(error)}"
            )
            if math.prod(stored.tile_px) >= LARGE_PX and not any(isinstance(part, OSError) for part in found):
                self._damaged.put((level, row, column), said)
            raise SlideReadError(said) from error
        if tile.shape[:2] == stored.tile_px:
            return tile
        region = stored.tile_region(row, column)
        if tile.shape[0] < region.height or tile.shape[1] < region.width:
            raise SlideReadError(
                f"{self._file.name}: level {level}, x {region.x}, y {region.y}: the tile has {tile.shape[1]} x "
                f"{tile.shape[0]} px, expected {region.width} x {region.height}"
            )
        return tile


def says_rgb(file: SlideFile, stored: TiffLevel) -> bool:
    """Return whether a JPEG 2000 level is declared as YCbCr, although its first stream says that it is RGB."""
    if not stored.is_ycc:
        return False
    first = int(np.argmax(stored.counts > 0))
    (data,) = file.read_many([(int(stored.offsets[first]), min(int(stored.counts[first]), SPARE_BYTES))])
    return isinstance(data, bytes) and turns_into_rgb(data)


def _with_data(stored: TiffLevel, level: Level) -> Level:
    """Return a level, marked as doubtful if all its tiles were left out: that is more likely a failed write."""
    return level if stored.counts.any() else replace(level, problem=level.problem or "all of its tiles are missing")


def locate(stored: TiffLevel, row: int, column: int) -> list[ByteRange] | str:
    """Return the positions of a tile's pieces in the file, or the reason they cannot be read.

    None for a tile that its writer left out, marked by an offset and a count of 0: it is glass.
    """
    places = [(stored.offsets.item(index), stored.counts.item(index)) for index in stored.pieces(row, column)]
    if not any(offset or count for offset, count in places):
        return []
    for offset, count in places:
        if not (offset and count):
            return "no data: a tile is missing from the file"
        if offset < 0 or not 0 < count <= stored.most_bytes:
            return f"{count} bytes at {offset} are claimed for a tile"
    return places


def check_complete(places: list[ByteRange] | str, found: list[bytes | OSError]) -> list[bytes]:
    """Return the pieces of a tile.

    Raises:
        ValueError: one is incomplete.
        OSError: the disk fails.
    """
    if isinstance(places, str):
        raise ValueError(places)
    whole = []
    for (_, count), data in zip(places, found, strict=True):
        if isinstance(data, OSError):
            raise data
        if len(data) < count:
            raise ValueError(f"the file ends {count - len(data)} bytes before the tile does")
        whole.append(data)
    return whole
