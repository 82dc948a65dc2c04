"""Regions of slides: annotation files and label pictures (PNG, TIFF), read and turned into masks."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from wsi_gradcam.errors import AnnotationError, canonical, one_line
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.io.local import check_regular
from wsi_gradcam.tissue.annotations.areas import (
    BACKGROUND,
    MAX_BYTES,
    WRITE_ANEW,
    Annotations,
    LabelPicture,
    Shapes,
    covers,
)
from wsi_gradcam.tissue.annotations.formats import PngPixels, colour_name, packed, read_geojson, read_xml, values_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides import SlideInfo
    from wsi_gradcam.tissue.annotations.areas import Block, Box, Drawn

READERS: dict[str, Callable[[Path, bytes], Annotations]] = {
    ".geojson": read_geojson,
    ".json": read_geojson,
    ".xml": read_xml,
}
PNG, TIFF = ".png", (".tif", ".tiff")
ENDINGS = (PNG, *TIFF, *READERS)
# These change no pixels. JPEG and its like leave greys along every border.
LOSSLESS = frozenset(
    ("NONE", "CCITTRLE", "CCITTFAX3", "CCITTFAX4", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "LZMA", "ZSTD")
)
MAX_TILE_PX, MAX_TILES = 1 << 26, 1 << 24
MOST_FINER = 2.0  # pixels of a mask per pixel of the slide, along an axis
SAME_BYTES, KEPT = 4096, 8  # tiles with a single label are small, identical and many: they are decoded once
WHITE_IS_ZERO, BLACK_IS_ZERO, COLOURS, PALETTE, UPRIGHT = 0, 1, 2, 3, 1
MISPLACED, PLACED = 0.1, 0.5  # share of a drawing on tissue: at most in a wrong frame, at least in the right one


def read_annotations(path: Path) -> Annotations:
    """Return the areas that were drawn on a slide: QuPath's GeoJSON, XML from ASAP or Aperio ImageScope.

    Raises:
        AnnotationError: there is no such file, or it has another format, is damaged, or has no area.
    """
    return parse(path, read_bytes(path))


def parse(path: Path, data: bytes) -> Annotations:
    """Return the areas in the file's bytes; errors as for `read_annotations`."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise AnnotationError(f"{path}: not an annotation file; expected {' '.join((*READERS, PNG, *TIFF))}")
    return reader(path, data)


def read_bytes(path: Path) -> bytes:
    """Return the file's content; nothing for a TIFF, which may be large and is read tile by tile.

    Raises:
        AnnotationError: it cannot be read, or is larger than anything that a person would draw.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            data = b"" if path.suffix.lower() in TIFF else file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    if len(data) > MAX_BYTES:
        raise AnnotationError(
            f"{path}: larger than {MAX_BYTES >> 20} MiB, more than anyone draws by hand; export the annotations "
            "without detected cells"
        )
    return data


@dataclass(frozen=True)
class _MaskLevel:
    """A page of a TIFF mask as a grid of tiles; strips are tiles as wide as the page."""

    size: tuple[int, int]
    tile_px: tuple[int, int]
    offsets: Sequence[int]
    counts: Sequence[int]
    decode: Callable[..., Any]
    to_labels: Callable[[NDArray[Any]], NDArray[Any]]

    @property
    def columns(self) -> int:
        """The number of tiles in a row."""
        return ceil_div(self.size[1], self.tile_px[1])

    def region(self, number: int) -> Region:
        """Return the part of the page that a tile shows."""
        y, x = number // self.columns * self.tile_px[0], number % self.columns * self.tile_px[1]
        return Region(y, x, min(self.tile_px[0], self.size[0] - y), min(self.tile_px[1], self.size[1] - x))


class TiffPixels:
    """The pixels of a TIFF, read tile by tile, since a file may have millions of tiles.

    Raises:
        AnnotationError: it is not a TIFF, is damaged, or has several pictures, or pixels that are not labels.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._same: dict[tuple[int, int, int, bytes], tuple[NDArray[Any], frozenset[int]]] = {}
        try:
            with tifffile.TiffFile(path, _multifile=False) as file:
                pages = _levels_of(file)
                deep = 8 * pages[0].dtype.itemsize
                self.name: Callable[[int], str] = colour_name(deep) if pages[0].photometric == COLOURS else str
                self._levels = [_mask_level(page) for page in pages]
        except AnnotationError as error:
            raise AnnotationError(f"{path}: {error}") from error
        except Exception as error:  # parsing a damaged file may raise any error
            raise AnnotationError(f"{path}: not a TIFF, or damaged: {one_line(error)[:200]}; write it again") from error
        self.sizes = [level.size for level in self._levels]

    def blocks(self, level: int) -> Iterator[Block]:
        """Yield tiles, or parts of long strips."""
        found = self._levels[level]
        with self._path.open("rb") as file:
            for number in range(len(found.offsets)):
                labels, values = self._tile(file.fileno(), level, number)
                region = found.region(number)
                if labels.shape != (region.height, region.width):
                    labels = labels[: region.height, : region.width]
                    values = values_of(labels)
                yield region, labels, values

    def read(self, level: int, region: Region) -> NDArray[Any]:
        """Return the labels in a region that lies on the level."""
        found = self._levels[level]
        (tall, wide), out = found.tile_px, None
        with self._path.open("rb") as file:
            for row in range(region.y // tall, ceil_div(region.bottom, tall)):
                for column in range(region.x // wide, ceil_div(region.right, wide)):
                    number = row * found.columns + column
                    labels, _ = self._tile(file.fileno(), level, number)
                    whole = found.region(number)
                    part = whole.intersect(region)
                    if out is None:
                        out = np.zeros((region.height, region.width), labels.dtype)
                    to = Region(part.y - region.y, part.x - region.x, part.height, part.width)
                    of = Region(part.y - whole.y, part.x - whole.x, part.height, part.width)
                    out[to.slices] = labels[of.slices]
        assert out is not None
        return out

    def _tile(self, file: int, level: int, number: int) -> tuple[NDArray[Any], frozenset[int]]:
        """Return a tile's labels and the set of them; a tile that was left out is background."""
        found = self._levels[level]
        region = found.region(number)
        offset, count = int(found.offsets[number]), int(found.counts[number])
        if not count:
            return np.zeros((region.height, region.width), np.uint8), frozenset({BACKGROUND})
        data = os.pread(file, count, offset)
        key = (level, region.height, region.width, data)
        if key in self._same:
            return self._same[key]
        try:
            if len(data) < count:
                raise ValueError(f"the file ends {count - len(data)} bytes before the tile does")
            array, _, _ = found.decode(data, number)
            labels = found.to_labels(array[0])
            if labels.shape[0] < region.height or labels.shape[1] < region.width:
                raise ValueError(f"{labels.shape[1]} x {labels.shape[0]} px, expected {region.width} x {region.height}")
        except Exception as error:  # decoders raise many kinds of errors for damaged bytes
            raise AnnotationError(
                f"{self._path}: damaged at x {region.x}, y {region.y}: {one_line(error)[:200]}; write it again"
            ) from error
        made = labels, values_of(labels[: region.height, : region.width])
        if count <= SAME_BYTES:
            with self._lock:
                if len(self._same) > KEPT:
                    self._same.clear()
                self._same[key] = made
        return made


def _levels_of(file: tifffile.TiffFile) -> list[Any]:
    """Return the first page and its reduced versions, finest first.

    Raises:
        AnnotationError: there are other pictures of its size.
    """
    pages: list[Any] = list(file.pages)
    first = pages[0]
    size = (int(first.imagelength), int(first.imagewidth))
    if any((page.imagelength, page.imagewidth) == size for page in pages[1:]):
        raise AnnotationError("several images of one size; expected one, with a value for each class")
    marked = [page for page in (*pages[1:], *(first.pages or [])) if page.is_reduced or page in (first.pages or [])]
    kind = (first.photometric, first.bitspersample, first.samplesperpixel)
    levels = [
        page
        for page in marked
        if covers((page.imagelength, page.imagewidth), size)
        and (page.photometric, page.bitspersample, page.samplesperpixel) == kind
    ]
    return [first, *sorted(levels, key=lambda page: -page.imagelength)]


def _mask_level(page: Any) -> _MaskLevel:
    """Return a page as a grid of tiles.

    Raises:
        AnnotationError: its pixels are not labels, or its form is not supported.
    """
    size, offsets, counts = (int(page.imagelength), int(page.imagewidth)), page.dataoffsets, page.databytecounts
    tile = (
        (int(page.tilelength), int(page.tilewidth))
        if page.is_tiled
        else (min(int(page.rowsperstrip), size[0]), size[1])
    )
    if min(*size, *tile) < 1:
        raise AnnotationError(f"damaged: {size[0]} x {size[1]} px; write it again")
    compression = tifffile.COMPRESSION(page.compression).name
    if compression not in LOSSLESS:
        raise AnnotationError(f"compressed as {compression}, which may change values; {WRITE_ANEW}")
    turned = page.tags.valueof("Orientation", default=UPRIGHT) not in (0, UPRIGHT)
    if page.imagedepth != 1 or (page.planarconfig != 1 and page.samplesperpixel > 1) or turned:
        raise AnnotationError(f"stored in planes, or rotated by a tag; {WRITE_ANEW}")
    number = ceil_div(size[0], tile[0]) * ceil_div(size[1], tile[1])
    if not number == len(offsets) == len(counts) or number > MAX_TILES:
        raise AnnotationError(f"damaged: {len(offsets)} of {number} tiles are listed; write it again")
    if compression == "NONE" and not page.is_tiled and page.predictor == 1 and page.bitspersample % 8 == 0:
        return _in_rows(page, size, offsets, tile[0])
    if math.prod(tile) > MAX_TILE_PX:
        raise AnnotationError(
            f"in tiles or strips of {tile[0]} x {tile[1]} px, expected at most {MAX_TILE_PX:,} px; {WRITE_ANEW}"
        )
    return _MaskLevel(size, tile, offsets, counts, page.decode, _labeller(page))


def _in_rows(page: Any, size: tuple[int, int], offsets: Sequence[int], rows: int) -> _MaskLevel:
    """Return an uncompressed page row by row: many programs write it as one strip, however large."""
    dtype, samples = page.dtype.newbyteorder(page.parent.byteorder), int(page.samplesperpixel)
    length = size[1] * samples * page.dtype.itemsize
    places = [offsets[row // rows] + row % rows * length for row in range(size[0])]

    def decode(data: bytes, _: int) -> tuple[NDArray[Any], None, None]:
        return np.frombuffer(data, dtype).reshape(1, 1, size[1], samples).astype(page.dtype), None, None

    return _MaskLevel(size, (1, size[1]), places, [length] * size[0], decode, _labeller(page))


def _labeller(page: Any) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Return the function that turns decoded samples [h, w, n] into labels [h, w].

    Raises:
        AnnotationError: they are not labels.
    """
    kind, samples, photometric = page.dtype.kind, int(page.samplesperpixel), int(page.photometric)
    alpha = len(page.extrasamples) > 0
    colours = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, PALETTE: 1, COLOURS: 3}.get(photometric)
    deep = colours == 3 and page.dtype not in ("u1", "u2")
    if colours is None or samples != colours + alpha or kind not in "buif" or deep:
        name = getattr(page.photometric, "name", page.photometric)
        raise AnnotationError(
            f"{samples} samples of {page.dtype} as {name} are not labels; expected gray, a palette or RGB; {WRITE_ANEW}"
        )
    top = (1 << int(page.bitspersample)) - 1 if photometric == WHITE_IS_ZERO and kind in "bu" else 0

    def to_labels(array: NDArray[Any]) -> NDArray[Any]:
        if kind == "f":
            whole = np.rint(array).astype(np.int64)
            if not (whole == array).all():
                raise ValueError("has fractions, expected whole numbers")
            array = whole
        labels = packed(array.astype(np.uint8) if kind == "b" else array, alpha)
        return labels.dtype.type(top) - labels if top else labels

    return to_labels


def png_picture(path: Path, data: bytes, slide_px: tuple[int, int]) -> LabelPicture:
    """Return the labels in a PNG."""
    return LabelPicture(path, PngPixels(path, data), slide_px)


@lru_cache(4)
def _tiff_picture(path: Path, slide_px: tuple[int, int], changed: tuple[int, int]) -> LabelPicture:
    """Return the labels in a TIFF; a different `changed` (time and size) means a different file."""
    pixels = TiffPixels(path)
    if max(side / whole for side, whole in zip(pixels.sizes[0], slide_px, strict=True)) > MOST_FINER:
        height, width = pixels.sizes[0]
        raise AnnotationError(
            f"{path}: {width} x {height} px (width x height) over a slide of {slide_px[1]} x {slide_px[0]} px; a mask "
            "cannot be finer than its slide: save it smaller"
        )
    return LabelPicture(path, pixels, slide_px)


@dataclass(frozen=True)
class Moved:
    """A drawing on a part of a slide, in the part's own pixels, moved to its place on the slide of `slide_px`."""

    drawn: Drawn
    part: Region
    slide_px: tuple[int, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.drawn.names

    @property
    def known(self) -> tuple[str, ...]:
        """The names that can be chosen."""
        return self.drawn.known

    def listed(self) -> str:
        """Return the known names, for a message."""
        return self.drawn.listed()

    def mask(self, names: Collection[str], shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return where classes are, bool [h, w] over the whole slide."""
        top, bottom, left, right = (
            round(at * shape[axis] / self.slide_px[axis])
            for at, axis in ((self.part.y, 0), (self.part.bottom, 0), (self.part.x, 1), (self.part.right, 1))
        )
        mask = np.zeros(shape, np.bool_)
        mask[top:bottom, left:right] = self.drawn.mask(names, (max(1, bottom - top), max(1, right - left)))
        return mask

    def cut(self, names: Collection[str], box: Box, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return where classes are in a box (y, x, height, width) of level 0, bool `shape`."""
        return self.drawn.cut(names, (box[0] - self.part.y, box[1] - self.part.x, box[2], box[3]), shape)


@dataclass(frozen=True)
class Regions:
    """A slide's mask file, not yet parsed.

    Attributes:
        path: the path of the file.
        data: its content; empty for a TIFF, which is read tile by tile.
        include: names of the classes to use; none: all that are not excluded.
        exclude: names of the classes to leave out.
        shared: True for a file in a folder, where not every class occurs on every slide.
        part: the part of the slide on which it was drawn, and in whose pixels it is; None: the whole slide.
    """

    path: Path
    data: bytes
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    shared: bool = False
    part: Region | None = None

    def __post_init__(self) -> None:
        for key in ("include", "exclude"):
            object.__setattr__(self, key, tuple(map(canonical, getattr(self, key))))

    @property
    def digest(self) -> str:
        """sha256 of the content."""
        if not self._is_tiff:
            return hashlib.sha256(self.data).hexdigest()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def _is_tiff(self) -> bool:
        return self.path.suffix.lower() in TIFF

    def drawn(self, slide_px: tuple[int, int]) -> Drawn:
        """Return what is drawn in the file, on a slide of `slide_px` (height, width).

        Raises:
            AnnotationError: it cannot be understood, lies outside the slide, or has other proportions.
        """
        if self.part is not None:
            return Moved(replace(self, part=None).drawn((self.part.height, self.part.width)), self.part, slide_px)
        if self._is_tiff:
            about = self.path.stat()
            return _tiff_picture(self.path, slide_px, (about.st_mtime_ns, about.st_size))
        if self.path.suffix.lower() == PNG:
            return png_picture(self.path, self.data, slide_px)
        return Shapes(self.path, parse(self.path, self.data), slide_px)

    def mask(self, slide_px: tuple[int, int], shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return the part to be explained, bool [h, w] over the whole slide of `slide_px` (height, width).

        These are the included classes without what excluded ones cover. If only classes to exclude were drawn, it is
        the rest of the slide.

        Raises:
            AnnotationError: as for `drawn`; or a class is not in it, or a picture has several and none is chosen.
        """
        drawn = self.drawn(slide_px)
        wanted = self.wanted(drawn)
        whole = not wanted and bool(self.exclude) and not self.include
        mask = np.ones(shape, np.bool_) if whole else drawn.mask(wanted, shape)
        return mask & ~drawn.mask(self.exclude, shape) if self.exclude else mask

    def wanted(self, drawn: Drawn) -> frozenset[str]:
        """Return the names of the classes to use.

        Raises:
            AnnotationError: one is not in the file, none of a picture's several is chosen, or all lie outside.
        """
        drawn = drawn.drawn if isinstance(drawn, Moved) else drawn
        self._check(drawn)
        wanted = frozenset(self.include or drawn.names) - set(self.exclude)
        if isinstance(drawn, Shapes):
            wanted &= frozenset(self.include) or drawn.names_without(self.exclude)
            drawn.check(wanted)
        elif len(wanted) > 1 and not self.include and not self.exclude:
            raise AnnotationError(
                f"{self.path}: has the values {drawn.listed()}, so it shows several classes; choose with --include, "
                f"such as --include {min(drawn.names, key=len)}, or give a mask of 0 and one other value"
            )
        return wanted

    def _check(self, drawn: Drawn) -> None:
        """Refuse unknown classes: a misspelt one would be left out, or explained, without a warning."""
        if not (self.include or self.exclude):
            return
        known = set(drawn.known)
        missing = sorted({*self.include, *self.exclude} - known)
        if self.shared:
            missing = [] if not self.include or set(self.include) & known else sorted(self.include)
        if missing:
            what = (
                f"no annotation is called {missing[0]!r}" if isinstance(drawn, Shapes) else f"no pixel is {missing[0]}"
            )
            raise AnnotationError(f"{self.path}: {what}; there are {drawn.listed()}")


def tissue_within(regions: Regions, tissue: NDArray[np.bool_], info: SlideInfo) -> NDArray[np.bool_]:
    """Return the tissue that lies in the regions, bool [h, w], a mask over the whole slide like `tissue`.

    Raises:
        AnnotationError: as for `Regions.mask`; or no tissue lies there, or hardly any although much would if the
            coordinates were micrometres or pixels of another level.
    """
    slide_px = (info.height, info.width)
    mask = regions.mask(slide_px, (tissue.shape[0], tissue.shape[1]))
    found: NDArray[np.bool_] = mask & tissue
    if not mask.any() or not tissue.any() or found.sum() > MISPLACED * mask.sum():
        return found
    frame = _better_frame(regions, tissue, info)
    if found.any() and not frame:
        return found
    raise AnnotationError(
        f"{regions.path}: {'hardly any' if found.any() else 'no'} tissue lies in it: it covers "
        f"{_extent(mask, slide_px)}, tissue is at {_extent(tissue, slide_px)} of {info.width} x {info.height}{frame}; "
        "expected level-0 pixels of this slide; to explain what was not detected as tissue as well, give --tissue "
        "everything"
    )


def _better_frame(regions: Regions, tissue: NDArray[np.bool_], info: SlideInfo) -> str:
    """Return words about the unit in which most of a drawing would lie on tissue; "" if there is none."""
    drawn = regions.drawn((info.height, info.width))
    if not isinstance(drawn, Shapes):
        return ""
    wanted = regions.wanted(drawn)
    frames = [(f"pixels of level {i}", level.downsample_y) for i, level in enumerate(info.levels) if i]
    if info.mpp is not None:
        frames.insert(0, ("micrometres", 1 / info.mpp[0]))
    for name, times in frames:
        mask = drawn.mask(wanted, (tissue.shape[0], tissue.shape[1]), times)
        if mask.any() and (mask & tissue).sum() >= PLACED * mask.sum():
            return f", and in {name} it would lie on tissue"
    return ""


def _extent(mask: NDArray[np.bool_], slide_px: tuple[int, int]) -> str:
    """Return where the mask is, level-0 px, in words."""
    words = []
    for axis, name in ((1, "x"), (0, "y")):
        places = np.flatnonzero(mask.any(axis=1 - axis))
        scale = slide_px[axis] / mask.shape[axis]
        words.append(f"{name} {round(places[0] * scale)} to {round((places[-1] + 1) * scale)}")
    return ", ".join(words)
