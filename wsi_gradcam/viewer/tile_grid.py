"""The tiles that the page asks for: a pyramid of halves over a picture of any size."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_gradcam.errors import TileError
from wsi_gradcam.geometry import Region, ceil_div

TILE_PX = 256


@dataclass(frozen=True)
class TileGrid:
    """Tiles of a picture of `height` x `width` px. Level 0 is the finest, each pixel of level n is 2**n of level 0.

    Attributes:
        levels: number of levels that are served.
    """

    height: int
    width: int
    levels: int
    tile_px: int = TILE_PX

    @classmethod
    def covering(cls, height: int, width: int, tile_px: int = TILE_PX) -> TileGrid:
        """With levels up to the one that is a single tile.

        >>> TileGrid.covering(2967, 2220).levels
        5
        """
        levels = 1
        while max(height, width) > tile_px << (levels - 1):
            levels += 1
        return cls(height, width, levels, tile_px)

    def shape(self, level: int) -> tuple[int, int]:
        """(height, width) of a level, rounded up: the last pixels may reach beyond the picture.

        >>> TileGrid(2967, 2220, 5).shape(2)
        (742, 555)
        """
        return ceil_div(self.height, 1 << level), ceil_div(self.width, 1 << level)

    def region(self, level: int, row: int, column: int) -> Region:
        """Where a tile lies, in pixels of its level; the last ones of a row and column are cut.

        Raises:
            TileError: there is no such tile.

        >>> TileGrid(2967, 2220, 5).region(2, 2, 2)
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
