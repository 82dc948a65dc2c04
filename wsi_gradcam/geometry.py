"""Regions and pyramid arithmetic. Sizes are (height, width), positions (y, x), regions half-open."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """A half-open rectangle [y, y + height) x [x, x + width) in pixels of a level that the caller states.

    >>> Region(0, 0, 10, 10).intersect(Region(5, 8, 10, 10))
    Region(y=5, x=8, height=5, width=2)
    """

    y: int
    x: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """First row below the region."""
        return self.y + self.height

    @property
    def right(self) -> int:
        """First column right of the region."""
        return self.x + self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """The region as (row, column) slices of an array of its level."""
        return slice(self.y, self.bottom), slice(self.x, self.right)

    def intersect(self, other: Region) -> Region:
        """The common rectangle; of zero height or width if there is none."""
        y, x = max(self.y, other.y), max(self.x, other.x)
        height = max(0, min(self.bottom, other.bottom) - y)
        width = max(0, min(self.right, other.right) - x)
        return Region(y, x, height, width)


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up.

    >>> ceil_div(7, 2), ceil_div(8, 2)
    (4, 4)
    """
    return -(-a // b)


def pyramid_shapes(height: int, width: int, smallest: int = 64) -> list[tuple[int, int]]:
    """Shapes of all levels: each is ceil(half) of the one before, while no axis falls below `smallest`.

    Viewers take a last axis of 3 or 4 pixels for colour, so pyramids end early.

    >>> pyramid_shapes(186, 139)
    [(186, 139), (93, 70)]
    >>> pyramid_shapes(10, 10)
    [(10, 10)]
    """
    shapes = [(height, width)]
    while True:
        height, width = ceil_div(height, 2), ceil_div(width, 2)
        if min(height, width) < smallest or (height, width) == shapes[-1]:
            return shapes
        shapes.append((height, width))


def tiles(height: int, width: int, side: int) -> list[Region]:
    """The regions of a `side` x `side` tiling of a height x width image, row by row; the last ones are cut.

    >>> tiles(3, 5, 4)
    [Region(y=0, x=0, height=3, width=4), Region(y=0, x=4, height=3, width=1)]
    """
    return [
        Region(y, x, min(side, height - y), min(side, width - x))
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]
