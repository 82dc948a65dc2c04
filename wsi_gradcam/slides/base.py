"""The interface of slide readers, `Slide` and `SlideInfo`, and of the files that they read, `SlideFile`."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeAlias, TypeVar

import numpy as np

from wsi_gradcam.errors import MppError, SlideContentError, SlideFormatError, SlideReadError, quoted
from wsi_gradcam.geometry import Region, ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    N = TypeVar("N", int, float)
    Pair: TypeAlias = tuple[N, N]  # y, x
    Stored = tuple[Pair[int], Pair[float] | None, Pair[int] | None]  # a level's size, spacing and tile


OURS = "wsi_gradcam"  # the name by which results say that they are ours
LOG = logging.getLogger(OURS)

# Scanners deliver 0.1 to 1 um per pixel, and slide thumbnails up to about 30. Values outside come from wrong tags: 72
# dpi, which image editors write by default, is 352.8 um.
SMALLEST_MPP, LARGEST_MPP = 0.01, 100.0
UM_AT_1X = 10.0
# By how many pixels the side of a level may differ from its factor through rounding, even repeated rounding; and by
# what share a factor of pixel sizes may differ from the integer that is meant.
ROUNDED_PX, WHOLE = 1.5, 0.002
MAX_SLIDE_PX, MAX_SIDE_PX = 1 << 40, 1 << 26  # a thousand gigapixels
DIFFERENT = "its height and width imply different downsamples"
Channels: TypeAlias = tuple[int, int, int]  # numbers of the channels that are shown as red, green and blue
COLOUR_NAME = re.compile(r"(?:channel|ch|c)?[ :_-]*(r|red|g|green|b|blue)[ :_-]*(?:channel)?", re.IGNORECASE)
NUMBER_NAME = re.compile(r"(?:(?:channel|ch|c)?[ :_-]*\d+(?:[ :_-]+\d+)*)?", re.IGNORECASE)
PURE = {(255, 0, 0): "r", (0, 255, 0): "g", (0, 0, 255): "b"}
# Files that make a folder a Zarr group, of either format.
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ZARR_FILES = ("zarr.json", ".zgroup")


@dataclass(frozen=True)
class Level:
    """One resolution of a slide: size in its own pixels and level-0 pixels per pixel, per axis.

    Attributes:
        height, width: without the padding of the last tiles, as far as it is known.
        problem: why the downsamples are uncertain; "" if they are not. Such a level is used only if its pixels prove
            them.
        shift: by how many of its own pixels its content is further down and to the right than in other levels.
        made_of: the index of the level whose tiles it is decoded from at a reduced size; None for a level of the file.
    """

    height: int
    width: int
    downsample_y: float
    downsample_x: float
    problem: str = field(default="", repr=False)
    shift: float = field(default=0.0, repr=False)
    made_of: int | None = field(default=None, repr=False)


@dataclass(frozen=True)
class SlideInfo:
    """The metadata of a slide.

    Attributes:
        path: where the slide was opened.
        levels: finest first; level 0 has downsample 1.
        mpp: micrometres per level-0 pixel as (y, x); None if the file states none, or an impossible value.
        mpp_problem: why `mpp` is None, with the property and how to fix it.
        vendor: the reader's name for the format.
        background: RGB of glass, 0 to 255.
        bounds: the part of level 0 that was scanned, if the format records it.
        digest: a short content digest, see `content_digest`.
        objective: magnification of the scanner's objective, such as 40; None if the file does not state it.
        images: descriptions of the images in the file, if it has several; the first is the slide.
    """

    path: str
    levels: tuple[Level, ...]
    mpp: tuple[float, float] | None
    mpp_problem: str
    vendor: str
    background: tuple[int, int, int]
    bounds: Region | None
    digest: str
    objective: float | None = None
    images: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        """Height of level 0 in px."""
        return self.levels[0].height

    @property
    def width(self) -> int:
        """Width of level 0 in px."""
        return self.levels[0].width

    @property
    def mpp_yx(self) -> tuple[float, float]:
        """Micrometres per level-0 pixel as (y, x).

        Raises:
            MppError: the file states none that can be used.
        """
        if self.mpp is None:
            raise MppError(f"{self.path}: {self.mpp_problem}")
        return self.mpp


class Slide(Protocol):
    """An open slide. Several threads can read it at once, but it cannot be pickled: open one in each process."""

    @property
    def info(self) -> SlideInfo:
        """The slide's metadata."""
        ...

    def read_level(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return `region` (in pixels of `level`) as RGB uint8 [height, width, 3]; outside the slide: background.

        Raises:
            SlideReadError: when a tile cannot be decoded. The slide stays usable.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


def pad_with_background(
    region: Region, size: Level, colour: tuple[int, int, int], read: Callable[[Region], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """Return `region` of a level as RGB uint8 [height, width, 3], by `read` inside the level, `colour` around it."""
    inside = region.intersect(Region(0, 0, size.height, size.width))
    if inside == region:
        return np.ascontiguousarray(read(region))
    canvas = np.empty((region.height, region.width, 3), np.uint8)
    inside, place = fill_background(region, size, colour, canvas)
    if place.size:
        place[:] = read(inside)
    return canvas


def fill_background(
    region: Region, size: Level, colour: tuple[int, int, int], out: NDArray[np.uint8]
) -> tuple[Region, NDArray[np.uint8]]:
    """Fill the part of `out`, an array of `region`, that lies outside the level; return the part inside, and its place.

    Both are empty if nothing lies inside.
    """
    inside = region.intersect(Region(0, 0, size.height, size.width))
    if inside == region:
        return region, out
    if not (inside.height and inside.width):
        out[:] = colour
        return inside, out[:0, :0]
    place = Region(inside.y - region.y, inside.x - region.x, inside.height, inside.width)
    for beside in (np.s_[: place.y], np.s_[place.bottom :], np.s_[:, : place.x], np.s_[:, place.right :]):
        out[beside] = colour  # only the part outside: writing a colour is slow
    return inside, out[place.slices]


def make_levels(
    sizes: Sequence[Pair[int]],
    spacings: Sequence[Pair[float] | None] = (),
    tiles: Sequence[Pair[int] | None] = (),
) -> tuple[Level, ...]:
    """Return levels of these (height, width), finest first, with the downsample of each axis.

    A writer that shrinks 2967 rows by 4 keeps 741 of 741.75, and 2967 / 741 = 4.004 would drift by 3 px towards the
    bottom: if an integer factor explains the sizes up to rounding, it is used. For small levels, several do: one that
    explains both axes is preferred and, among those, a power of two.

    A writer that pads the last tiles makes levels too large for their factor. If the file states the pixel size of its
    levels, the factor follows from that; otherwise the power of two that such padding would explain is a guess, and a
    `problem`.

    Args:
        sizes: the levels' (height, width) as they are stored.
        spacings: the pixel size of each level according to the file, (y, x) in any unit.
        tiles: (height, width) of each level's tiles.

    >>> make_levels([(2967, 2220), (741, 555)])[1]
    Level(height=741, width=555, downsample_y=4.0, downsample_x=4.0)
    >>> make_levels([(9216, 8192), (2560, 2048)], [(0.25, 0.25), (1.0, 1.0)], [(512, 512)] * 2)[1]
    Level(height=2304, width=2048, downsample_y=4.0, downsample_x=4.0)
    """
    if math.prod(sizes[0]) > MAX_SLIDE_PX or max(sizes[0]) > MAX_SIDE_PX:
        size = f"{sizes[0][1]:,} x {sizes[0][0]:,} px"
        raise SlideFormatError(f"an image of {size} is larger than any slide; copy the file again from its source")
    known = [*zip_longest(sizes, spacings, tiles)]
    return (Level(*sizes[0], 1.0, 1.0), *(_level(known[0], stored) for stored in known[1:]))


def _level(first: Stored, stored: Stored) -> Level:
    """Return a level from its size, spacing and tile, and those of the first level."""
    full, reduced = first[0], stored[0]
    by_size, agree = _downsamples(full, reduced), _one_factor(full, reduced)
    said, whole = _said(first, stored), agree and by_size[0].is_integer()
    if said is not None and whole and not (said[0].is_integer() and said[1].is_integer()):
        said = by_size  # a factor that is nearly an integer is stated loosely
    if said is not None and not all(map(_is_rounded, full, reduced, said)):
        return _cut(full, reduced, said)
    guess = None if whole else _padded_factor(first, stored)
    if guess is not None and not all(map(_is_rounded, full, reduced, (guess, guess))):
        return _cut(full, reduced, (guess, guess), "its size may be padded to whole tiles, with no stated downsample")
    return Level(*reduced, *by_size, "" if agree or said is not None else DIFFERENT)


def _cut(full: Pair[int], reduced: Pair[int], factors: Pair[float], problem: str = "") -> Level:
    """Return a level without the part that lies beyond the slide."""
    height, width = (min(r, math.ceil(f / by)) for f, r, by in zip(full, reduced, factors, strict=True))
    return Level(height, width, *factors, problem)


def _said(first: Stored, stored: Stored) -> Pair[float] | None:
    """Return the factors from the pixel sizes, if rounding or whole tiles then explain the level's size."""
    if first[1] is None or stored[1] is None or not all(value > 0 for value in (*first[1], *stored[1])):
        return None
    y, x = (_whole(b / a) for a, b in zip(first[1], stored[1], strict=True))
    return (y, x) if _fits(first, stored, (y, x)) else None


def _whole(factor: float) -> float:
    return float(round(factor)) if abs(factor - round(factor)) < WHOLE * factor else factor


def _padded_factor(first: Stored, stored: Stored) -> float | None:
    """Return the power of two with which padding to whole tiles explains the level's size; None if none does."""
    ratio = max(f / r for f, r in zip(first[0], stored[0], strict=True))
    factor = 2.0 ** max(0, math.ceil(math.log2(ratio) - WHOLE))
    return factor if _fits(first, stored, (factor, factor)) else None


def _fits(first: Stored, stored: Stored, factors: Pair[float]) -> bool:
    """Return whether the factors and padding to whole tiles, in either level or both, explain the level's size."""
    none = (None, None)
    values = zip(first[0], first[2] or none, stored[0], stored[2] or none, factors, strict=True)
    return all(_side_fits(*side) for side in values)


def _side_fits(full: int, full_tile: int | None, reduced: int, tile: int | None, factor: float) -> bool:
    spare = tile if tile and reduced % tile == 0 else 0
    missing = full_tile / factor if full_tile and full % full_tile == 0 else 0
    return factor > 1 and -missing - ROUNDED_PX < reduced - full / factor < spare + ROUNDED_PX


def _is_rounded(full: int, reduced: int, factor: float) -> bool:
    return abs(reduced - full / factor) < ROUNDED_PX


def _one_factor(full: Pair[int], reduced: Pair[int]) -> bool:
    """Return whether one factor explains both sides up to rounding."""
    low = max(f / (r + ROUNDED_PX) for f, r in zip(full, reduced, strict=True))
    high = min(f / max(1e-9, r - ROUNDED_PX) for f, r in zip(full, reduced, strict=True))
    return low <= high


def _downsamples(full: tuple[int, int], reduced: tuple[int, int]) -> tuple[float, float]:
    ratios = (full[0] / reduced[0], full[1] / reduced[1])
    ratio = ratios[0] if reduced[0] > reduced[1] else ratios[1]  # rounding matters least on the longer axis
    for whole in (2 ** max(0, round(math.log2(ratio))), max(1, round(ratio))):
        if all(_explains(whole, *sizes) for sizes in zip(full, reduced, strict=True)):
            return float(whole), float(whole)
    down_y, down_x = (_downsample(*sizes) for sizes in zip(full, reduced, strict=True))
    return down_y, down_x


def _downsample(full: int, reduced: int) -> float:
    whole = max(1, round(full / reduced))
    return float(whole) if _explains(whole, full, reduced) else full / reduced


def _explains(whole: int, full: int, reduced: int) -> bool:
    return reduced in (full // whole, ceil_div(full, whole))


@dataclass(frozen=True)
class Channel:
    """One of several grey channels of an image, as a file describes it.

    Attributes:
        name: "" if it has none.
        colour: RGB in which it should be shown.
        is_stain: whether the file declares it as fluorescence.
    """

    name: str = ""
    colour: tuple[int, int, int] | None = None
    is_stain: bool = False


def shown_channels(
    count: int, described: Sequence[Channel], chosen: Channels | None, *, plain: bool = False
) -> Channels:
    """Return the numbers of the channels that are shown as red, green and blue.

    These are the ones that a user chose, or else those whose names (or colours, if they have no names) say that they
    are the parts of a colour image. With `plain`, three channels that say nothing at all count too.

    Raises:
        SlideContentError: the channels are stains, or it is unknown what they are.

    >>> shown_channels(3, [Channel("Blue"), Channel("Green"), Channel("Red")], None)
    (2, 1, 0)
    """
    if chosen is not None:
        if max(chosen) < count:
            return chosen
        raise SlideContentError(f"channels {','.join(map(str, chosen))} were chosen; it has {count}, counted from 0")
    if count == len(described) == len(PURE) and not any(channel.is_stain for channel in described):
        for parts in ([_part_by_name(channel) for channel in described], [_part_by_colour(c) for c in described]):
            if sorted(parts) == ["b", "g", "r"]:
                return parts.index("r"), parts.index("g"), parts.index("b")
    if plain and count == len(PURE) and not any(c.is_stain or not NUMBER_NAME.fullmatch(c.name) for c in described):
        return 0, 1, 2
    names = ", ".join(quoted(channel.name) for channel in described[:8] if channel.name)
    raise SlideContentError(
        f"{count} separate channels{f' ({names})' if names else ''}, as in fluorescence; expected one image in colour "
        "or gray; to show three of them as red, green and blue, give their numbers, counted from 0: --channels 0,1,2"
    )


def _part_by_name(channel: Channel) -> str:
    found = COLOUR_NAME.fullmatch(channel.name.strip())
    return found[1][0].lower() if found else ""


def _part_by_colour(channel: Channel) -> str:
    return PURE.get(channel.colour or (0, 0, 0), "") if NUMBER_NAME.fullmatch(channel.name.strip()) else ""


def check_mpp(value: float, origin: str) -> str:
    """Return an empty string if `value` can be micrometres per pixel, else the problem and how to fix it."""
    if math.isfinite(value) and SMALLEST_MPP <= value <= LARGEST_MPP:
        return ""
    return (
        f"{origin} is {value:g}, expected {SMALLEST_MPP:g} to {LARGEST_MPP:g} um per pixel; "
        "give the true value with --mpp"
    )


def mpp_from_objective(info: SlideInfo) -> SlideInfo:
    """Return the metadata with the mpp derived from the objective's power if only that is known: 10 um at 1x.

    This is a guess: 40x is 0.25 on most scanners, but 0.22 to 0.26 on some.
    """
    if info.mpp is not None or info.objective is None:
        return info
    value = UM_AT_1X / info.objective
    problem = check_mpp(value, f"the pixel size derived from an objective of {info.objective:g}x")
    return replace(info, mpp=None if problem else (value, value), mpp_problem=problem)


def content_digest(path: Path, *extra: str) -> str:
    """Return a sha256 (first 32 hex digits) of size, head, tail and evenly spaced samples: cheap on any file size.

    It changes with the file's length, header, and most rewrites; a single changed byte between the samples of a large
    file goes unnoticed. Files up to 4 MiB are hashed whole. `extra` is hashed too.
    """
    size, block, samples = path.stat().st_size, 1 << 16, 64
    digest = hashlib.sha256(f"{size}".encode())
    with path.open("rb") as file:
        if size <= block * samples:
            digest.update(file.read())
        else:
            for i in range(samples):
                file.seek((size - block) * i // (samples - 1))
                digest.update(file.read(block))
    for text in extra:
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()[:32]


ByteRange = tuple[int, int]  # offset and count


class SlideFile(Protocol):
    """The bytes of one file. Several threads may read at once; a stream is for one thread only."""

    @property
    def name(self) -> str:
        """The name in messages: its path, or its URL without secrets."""
        ...

    @property
    def size(self) -> int:
        """The size in bytes."""
        ...

    def read_many(self, ranges: Sequence[ByteRange]) -> Sequence[bytes | OSError]:
        """Return the bytes of each (offset, count), fewer where the file ends before, or the error of the disk.

        Raises:
            SlideAccessError: a remote file cannot be reached.
        """
        ...

    def stream(self) -> BinaryIO:
        """Open the file from its beginning, for the many small reads of a parser."""
        ...

    def digest(self) -> str:
        """Return a short text that changes when the file does."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class LocalFile:
    """A `SlideFile` on a disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    @property
    def name(self) -> str:
        """Its path."""
        return str(self._path)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return os.fstat(self._descriptor).st_size

    def read_many(self, ranges: Sequence[ByteRange]) -> Sequence[bytes | OSError]:
        """Return the bytes of each (offset, count), fewer where the file ends before, or the error of the disk."""
        return [self._read(*place) for place in ranges]

    def stream(self) -> BinaryIO:
        """Open the file again, from its beginning."""
        return self._path.open("rb")

    def digest(self) -> str:
        """Return its `content_digest`."""
        return content_digest(self._path)

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)

    def _read(self, offset: int, count: int) -> bytes | OSError:
        try:
            return os.pread(self._descriptor, count, offset)
        except OSError as error:  # one bad sector is not the whole slide
            return error


def is_tiff(file: SlideFile) -> bool:
    """Return True for a file with the signature of TIFF."""
    with file.stream() as stream:
        return stream.read(4) in TIFF_SIGNATURES


DARK = 64  # of 255: no true 16-bit picture is darker everywhere, but a 12-bit one that is taken for 16 is


def check_not_dark(slide: Slide, places: Sequence[tuple[int, Region]], *, chosen: bool = False) -> None:
    """Check some places of a 16-bit slide that does not state how many of its bits are used.

    Raises:
        SlideContentError: all are dark. If channels were `chosen`, as for fluorescence, the log warns instead.
    """
    levels = set()
    for level, region in places:
        with suppress(SlideReadError):
            levels.add(int(slide.read_level(level, region).max(initial=0)))
        if levels and max(levels) >= DARK:
            return
    if not levels:
        return
    told = "16-bit samples that, where checked, are all below a quarter of the scale, as if fewer bits were used"
    if chosen:
        LOG.warning("%s: %s; they are shown at the full scale", slide.info.path, told)
        return
    raise SlideContentError(
        f"{told}, which the file does not state; add SignificantBits to its OME-XML, or convert it to 8-bit RGB"
    )
