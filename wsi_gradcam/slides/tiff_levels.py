"""The pyramid in a TIFF file: the pages that are the slide's levels, and the positions of their tiles."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from tifffile import PHOTOMETRIC, RESUNIT, TiffFile

from wsi_gradcam.errors import SlideContentError, SlideError, SlideFormatError, one_line
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.slides.base import DIFFERENT, Channel, make_levels, shown_channels
from wsi_gradcam.slides.tiff_samples import (
    ALPHA,
    GIVING_RGB,
    JPEGS_2000,
    full_of,
    is_ycc,
    jpeg_decoder,
    reduced_jpeg2000,
    rgb_converter,
    ycc_to_rgb,
)
from wsi_gradcam.slides.tiff_streams import stream_check, turns_into_rgb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from tifffile import TiffPage

    from wsi_gradcam.slides.base import Channels, SlideFile
    from wsi_gradcam.slides.tiff_samples import Decode, ToRGB
    from wsi_gradcam.slides.tiff_streams import Check

# Limits on what a file may claim: a slide of a thousand gigapixels has 16 million tiles of 256 px.
MAX_TILES = 1 << 24
MAX_TILE_PX = 1 << 25  # 100 MB decoded: a picture in a single strip is not a slide
MAX_TILE_BYTES = 1 << 28  # of samples, which may have 16 bits, with alpha
SPARE_BYTES = 1 << 16  # bytes of a tile's header
CONVERTED_PX = 1 << 20  # at once: some conversions to RGB need 40 bytes per pixel
AGAIN = "copy the file again from its source"
MAX_BEYOND = 0.01  # the share of unreadable patches that a slide may have by default
CONTIGUOUS = 1
TOP_LEFT = 1
MAX_XML = 1 << 24
STAIN = ("EmissionWavelength", "ExcitationWavelength", "Fluor")  # attributes that a fluorescence channel has
SWAPPED = 4  # orientations above this one exchange rows and columns
UM_PER_UNIT = {
    RESUNIT.INCH: 25_400.0,
    RESUNIT.CENTIMETER: 10_000.0,
    RESUNIT.MILLIMETER: 1_000.0,
    RESUNIT.MICROMETER: 1.0,
}

# Its messages about damaged files go to logs that a user sets up, not to the terminal: the slide's error has them.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class TiffLevel:
    """A page as a grid of tiles; strips are tiles as wide as the page.

    Attributes:
        height, width: of the page as stored, before its orientation is applied.
        tile_px: (height, width) of a tile; those at the bottom and right edges may be stored shorter.
        planes: 1, or the number of samples if each has tiles of its own.
        is_joined: whether the planes are separate pictures in the file, of one channel each.
        offsets, counts: int64 [planes * rows * columns], bytes in the file.
        orientation: the TIFF tag, 1 to 8.
        samples: numbers per pixel, stored in each tile or plane by plane.
        jpegtables: the tables that the tiles share, if they are JPEG.
        check: raises a ValueError for the bytes of a piece that would unpack to more than its tile; None if the decoder
            itself stops there.
        decode_piece: tifffile's decoder for this page.
        decode_jpeg: a faster and stricter decoder for JPEG; None for other codecs.
        decode_reduced: decodes pieces at a reduced size; None if that is not possible.
        to_rgb: turns decoded samples [h, w, samples] into uint8 [h, w, 3].
        is_ycc: whether they are YCbCr in JPEG 2000, unless the stream says that it turns them into RGB itself.
        spacing: (y, x) micrometres per stored pixel from the page's resolution tags; None if they do not say.
        full: value of the brightest sample; 0 for a page of 16 bits that does not say how many are used.
        is_chosen: whether its channels were chosen by a user.
        reduction: the page is this many times larger than the level, see `reduced`.
    """

    height: int
    width: int
    tile_px: tuple[int, int]
    planes: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    orientation: int
    samples: int
    jpegtables: bytes | None
    check: Check | None
    decode_piece: Callable[..., Any]
    decode_jpeg: Decode | None
    decode_reduced: Decode | None
    to_rgb: ToRGB
    is_ycc: bool
    is_joined: bool = False
    spacing: tuple[float, float] | None = None
    full: int = 255
    is_chosen: bool = False
    reduction: int = 1

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        return ceil_div(self.height, self.tile_px[0]), ceil_div(self.width, self.tile_px[1])

    @property
    def shown_px(self) -> tuple[int, int]:
        """(height, width) of the page with its orientation applied."""
        return (self.width, self.height) if self.orientation > SWAPPED else (self.height, self.width)

    @property
    def stored(self) -> tuple[tuple[int, int], tuple[float, float] | None, tuple[int, int]]:
        """Size, spacing and tile of the page with its orientation applied, (y, x), as `make_levels` takes them."""
        if self.orientation <= SWAPPED:
            return self.shown_px, self.spacing, self.tile_px
        return self.shown_px, None if self.spacing is None else self.spacing[::-1], self.tile_px[::-1]

    @property
    def is_scaled(self) -> bool:
        """Whether the page says that it does not use all bits of its samples."""
        return self.full not in (0, 255, 65535)

    @property
    def piece_px(self) -> tuple[int, int]:
        """(height, width) of a tile as stored."""
        return self.tile_px[0] * self.reduction, self.tile_px[1] * self.reduction

    @cached_property
    def most_bytes(self) -> int:
        """The most bytes that a piece of a tile can need: its pixels and a header."""
        height, width = self.piece_px
        return 4 * height * width * self.samples + SPARE_BYTES

    def reduced(self, by: int) -> TiffLevel:
        """Return the page as a level that is decoded at a size reduced by 2, 4 or 8: fast, but less exact."""
        return replace(
            self,
            height=ceil_div(self.height, by),
            width=ceil_div(self.width, by),
            tile_px=(self.tile_px[0] // by, self.tile_px[1] // by),
            spacing=None,
            reduction=by,
        )

    def tile_region(self, row: int, column: int) -> Region:
        """Return the part of the page that a tile shows."""
        y, x = row * self.tile_px[0], column * self.tile_px[1]
        return Region(y, x, min(self.tile_px[0], self.height - y), min(self.tile_px[1], self.width - x))

    def tiles_of(self, region: Region) -> Iterator[tuple[int, int]]:
        """Yield (row, column) of the tiles that a region of the page touches, in the order of the file."""
        rows = range(region.y // self.tile_px[0], ceil_div(region.bottom, self.tile_px[0]))
        columns = range(region.x // self.tile_px[1], ceil_div(region.right, self.tile_px[1]))
        return ((row, column) for row in rows for column in columns)

    def pieces(self, row: int, column: int) -> list[int]:
        """Return the indices of a tile's data: one, or one per plane."""
        rows, columns = self.grid
        return [plane * rows * columns + row * columns + column for plane in range(self.planes)]

    def decode(self, pieces: list[int], data: list[bytes]) -> NDArray[np.uint8]:
        """Return RGB uint8 [h, w, 3] of a tile from the bytes of its pieces.

        All tiles of our reader, from local and from remote files, are decoded here. The memory needed is bounded by the
        size that the TIFF gives its tiles, at most `MAX_TILE_PX` and `MAX_TILE_BYTES`, whatever the compressed stream
        claims: `check` reads the stream's own header before a decoder does, see `tiff_streams`.

        Raises:
            ValueError: they are damaged, or unpack to more than a tile. (Decoders raise other errors too.)
        """
        if self.check is not None:
            for encoded in data:
                self.check(encoded)
        parts = [self._samples(*piece) for piece in zip(pieces, data, strict=True)]
        samples = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        return self._coloured(samples, self.is_ycc and not turns_into_rgb(data[0]))

    def _samples(self, index: int, encoded: bytes) -> NDArray[np.generic]:
        """Return the samples [h, w, samples] of a piece of a tile."""
        fast = self.decode_jpeg if self.reduction == 1 else self.decode_reduced
        if fast is not None and (found := fast(encoded, self.reduction)) is not None:
            return found
        if self.reduction > 1:
            raise ValueError(f"cannot be decoded {self.reduction} times smaller")
        array, _, shape = self.decode_piece(encoded, index, jpegtables=self.jpegtables)
        if array is None or array.ndim != 4 or len(array) != 1:
            raise ValueError(f"did not decode to a tile: {None if array is None else array.shape}")
        samples: NDArray[np.generic] = array[0, : shape[1], : shape[2]]
        return samples

    def _coloured(self, samples: NDArray[np.generic], from_ycc: bool) -> NDArray[np.uint8]:
        """Return RGB from a tile's samples; for a large one, some rows at a time."""
        convert = self.to_rgb if not from_ycc else lambda part: ycc_to_rgb(self.to_rgb(part))
        height, width = samples.shape[:2]
        if height * width <= CONVERTED_PX:
            return convert(samples)
        rgb = np.empty((height, width, 3), np.uint8)
        step = max(1, CONVERTED_PX // width)
        for top in range(0, height, step):
            rgb[top : top + step] = convert(samples[top : top + step])
        return rgb


@contextmanager
def open_tiff(file: SlideFile) -> Iterator[TiffFile]:
    """Open the file for parsing; other files that an OME-TIFF refers to are not opened."""
    with file.stream() as stream, TiffFile(stream, _multifile=False) as parsed:
        yield parsed


def tiff_levels(file: TiffFile, channels: Channels | None = None) -> list[TiffLevel]:
    """Return the levels of the slide in `file`, finest first.

    Of grey pictures that belong together, `channels` are shown as red, green and blue.

    Raises:
        SlideFormatError: it contains no image that can be read; the message says why.
    """
    try:
        bits = significant_bits(file.ome_metadata or "") if file.is_ome else 0
        levels = [page_level(pages, _shown(file, pages, channels), bits, channels) for pages in _pyramid(file)]
    except SlideError:
        raise
    except Exception as error:  # parsing a damaged file may raise anything
        raise SlideFormatError(f"damaged TIFF: {one_line(error)[:200]}; {AGAIN}") from error
    _check_whole(file, levels)
    if not levels[0].counts.any():
        raise SlideContentError(f"none of its {len(levels[0].counts):,} tiles has data; {AGAIN}")
    turned = {level.orientation for level in levels}
    if len(turned) > 1:
        raise SlideFormatError(f"levels have different orientations: {sorted(turned)}")
    return levels


def _check_whole(file: TiffFile, levels: list[TiffLevel]) -> None:
    """Refuse a truncated file; a few lost tiles only make their patches unreadable."""
    file.filehandle.seek(file.pages.next_page_offset or 0)
    following = file.filehandle.read(file.tiff.offsetsize)
    beyond = sum(int((level.offsets + level.counts > file.filehandle.size).sum()) for level in levels)
    total = sum(len(level.offsets) for level in levels)
    if any(following) or beyond > MAX_BEYOND * total:
        what = f"{beyond:,} of {total:,} tiles are beyond the end of the file" if beyond else "pages are missing"
        kind = SlideContentError if beyond else SlideFormatError  # OpenSlide would open it nevertheless
        raise kind(f"truncated or damaged: {what}; {AGAIN}")


def _pyramid(file: TiffFile) -> list[list[Any]]:
    """Return the pages of each of the first series' levels, of decreasing size; one for each channel."""
    alone: Any = file.pages[0] if len(file.pages) == 1 else None
    if alone is not None and not alone.subifds:  # whatever it says about planes in other files
        return [[alone]]
    if not file.series:
        raise SlideFormatError(f"no image in the file, which may be truncated; {AGAIN}")
    first = file.series[0]
    if len(first.pages) != 1:
        if "".join(axis for axis, size in zip(first.axes, first.shape, strict=True) if size > 1) != "CYX":
            what = f"axes {first.axes} with sizes {tuple(first.shape)}"
            raise SlideContentError(
                f"{len(first.pages)} separate images ({what}), such as focal planes or time points; expected one in "
                "colour or gray"
            )
        return [list(level.pages) for level in first.levels]
    pages: list[Any] = [s.keyframe if s.keyframe is not None else s.pages[0] for s in first.levels]
    marked = [] if file.is_ome else _marked(file)
    return [[page] for page in max(_shrinking(pages), _shrinking(marked), key=len)]


def _shown(file: TiffFile, pages: list[Any], channels: Channels | None) -> Channels | None:
    """Return the channels that are shown, of several pages or of one page's samples; None for a single picture.

    Raises:
        SlideContentError: it is unknown which they are.
    """
    page, described = pages[0].keyframe, ome_channels(file)
    samples, extra = int(page.samplesperpixel), page.extrasamples
    count = len(pages) if samples == 1 else samples if len(pages) == 1 else 0
    if count < 2 or page.photometric != PHOTOMETRIC.MINISBLACK or (len(extra) == 1 and extra[0] in ALPHA):
        return None
    return shown_channels(count, described if len(described) == count else [], channels)


def _marked(file: TiffFile) -> list[Any]:
    """Return the tiled pages that are marked as reduced versions of the first one, or Aperio's.

    Tifffile's series are pyramids only if each level is smaller than the one before by the same factor.
    """
    pages: Any = list(file.pages)
    return [pages[0], *(p for p in pages[1:] if p.is_tiled and (p.is_reduced or pages[0].is_svs))]


def _shrinking(pages: list[Any]) -> list[Any]:
    """Return the pages from the first on that shrink while keeping their shape, up to the next image."""
    found = pages[:1]
    for page in pages[1:]:
        sizes = (page.imagelength, page.imagewidth)
        if sizes[0] > found[-1].imagelength or sizes[1] > found[-1].imagewidth or not _alike(found[0], page):
            break
        found.append(page)
    return found


def _alike(first: Any, page: Any) -> bool:
    """Return whether a page has the same aspect ratio as the first, up to whole pixels or whole tiles."""
    factor = first.imagelength / max(1, page.imagelength)
    if abs(first.imagewidth / factor - page.imagewidth) < 1 + page.imagewidth / max(1, page.imagelength):
        return True
    both = [(int(p.imagelength), int(p.imagewidth)) for p in (first, page)]
    tiles = [(int(p.tilelength), int(p.tilewidth)) if p.is_tiled else None for p in (first, page)]
    return make_levels(both, [spacing_of(p) for p in (first, page)], tiles)[1].problem != DIFFERENT


def page_level(pages: list[Any], shown: Channels | None, bits: int = 0, chosen: Channels | None = None) -> TiffLevel:
    """Return the level in a page, or in several pages of one channel each, some of which are shown.

    `bits` of its samples' bits are used; 0: unknown.
    """
    page = pages[0].keyframe
    height, width = int(page.imagelength), int(page.imagewidth)
    if min(height, width) < 1 or page.imagedepth != 1:
        raise SlideFormatError(f"damaged TIFF: an image of {width} x {height} x {page.imagedepth} px; {AGAIN}")
    joined = [pages[number] for number in shown] if shown is not None and len(pages) > 1 else []
    if len(pages) > 1 and not joined:
        raise SlideContentError(
            f"{len(pages)} separate channels of {page.samplesperpixel} samples each; expected one in colour or gray"
        )
    tile, samples = _tile_size(page), len(joined) or int(page.samplesperpixel)
    planes = len(joined) or (1 if page.planarconfig == CONTIGUOUS else samples)
    offsets, counts = _places(joined or [page], planes * ceil_div(height, tile[0]) * ceil_div(width, tile[1]))
    orientation = int(page.tags.valueof("Orientation", default=TOP_LEFT)) or TOP_LEFT  # some writers put 0
    if orientation not in range(1, 9):
        raise SlideFormatError(f"damaged TIFF: orientation {orientation}, expected 1 to 8; {AGAIN}")
    # First, because it says more about a page that is not a picture.
    full = full_of(page, bits)
    to_rgb = rgb_converter(page, (0, 1, 2) if joined else shown, full)
    if page.compression in GIVING_RGB:
        page.subsampling = (1, 1)  # a tag about JPEG, which decoders of other codecs do not need
    jpeg = jpeg_decoder(page, tile)
    return TiffLevel(
        height,
        width,
        tile,
        planes,
        offsets,
        counts,
        orientation,
        samples,
        page.jpegtables,
        stream_check(page, tile, samples // planes),
        page.decode,  # made now, because it looks into the file
        jpeg,
        reduced_jpeg2000 if page.compression in JPEGS_2000 else jpeg,
        to_rgb,
        is_ycc(page),
        bool(joined),
        spacing_of(page),
        full,
        chosen is not None and shown is not None,
    )


def significant_bits(xml: str | bytes, number: int = 0) -> int:
    """Return how many bits of its samples an image uses (OME-XML 2016-06); 0 if it does not say."""
    try:
        root = ElementTree.fromstring(xml if len(xml) <= MAX_XML else "")
        pixels = [element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"]
        return int(pixels[number].get("SignificantBits", 0))
    except (ElementTree.ParseError, ValueError, IndexError):
        return 0


def _places(pages: list[Any], expected: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the offsets and byte counts of the tiles of a page, or of several pages one after another.

    Raises:
        SlideFormatError: there are more than a slide has, or not as many as `expected`.
    """
    size = f"{pages[0].keyframe.imagewidth} x {pages[0].keyframe.imagelength} px"
    if expected > MAX_TILES:
        raise SlideFormatError(f"{size} in {expected:,} tiles, expected at most {MAX_TILES:,}")
    if len({page.jpegtables for page in pages}) > 1:
        raise SlideFormatError("its channels have different JPEG tables, expected the same for all")
    offsets, counts = (
        np.concatenate([np.asarray(values, np.int64) for values in parts])
        for parts in zip(*((page.dataoffsets, page.databytecounts) for page in pages), strict=True)
    )
    if not expected == len(offsets) == len(counts):
        raise SlideFormatError(f"damaged TIFF: {len(offsets)} tiles are listed, but {size} have {expected}; {AGAIN}")
    return offsets, counts


def ome_channels(file: TiffFile) -> list[Channel]:
    """Return what the first picture of an OME-TIFF says about its channels (OME-XML 2016-06); nothing if it is none."""
    xml = (file.ome_metadata or "") if file.is_ome else ""
    if not 0 < len(xml) <= MAX_XML:
        return []
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return []
    pixels = next((e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"), ())
    return [_channel(element.attrib) for element in pixels if element.tag.rpartition("}")[2] == "Channel"]


def _channel(values: dict[str, str]) -> Channel:
    stain = any(key in values for key in STAIN) or values.get("ContrastMethod") == "Fluorescence"
    try:
        red, green, blue, _ = (int(values["Color"]) & 0xFFFFFFFF).to_bytes(4, "big")  # written with a sign
    except (KeyError, ValueError):
        return Channel(values.get("Name", ""), None, stain)
    return Channel(values.get("Name", ""), (red, green, blue), stain)


def _tile_size(page: TiffPage) -> tuple[int, int]:
    """Return (height, width) of a page's tiles or strips.

    Raises:
        SlideFormatError: they are too large.
    """
    rows = min(int(page.rowsperstrip), int(page.imagelength))
    height, width = (int(page.tilelength), int(page.tilewidth)) if page.is_tiled else (rows, int(page.imagewidth))
    if min(height, width) < 1 or height * width > MAX_TILE_PX:
        raise SlideFormatError(
            f"tiles or strips of {width} x {height} px, expected at most {MAX_TILE_PX:,} px; convert it to tiles"
        )
    size = page.samplesperpixel * (page.dtype.itemsize if page.dtype is not None else 1)
    if height * width * size > MAX_TILE_BYTES:
        raise SlideFormatError(
            f"tiles or strips of {width} x {height} px of {size} bytes, expected at most {MAX_TILE_BYTES:,} bytes; "
            "convert it to smaller tiles"
        )
    return height, width


def spacing_of(page: TiffPage) -> tuple[float, float] | None:
    """Return micrometres per stored pixel, (y, x), from a page's resolution tags; None if they do not say."""
    y, x = um_per_px(page, "YResolution"), um_per_px(page, "XResolution")
    return (y, x) if y and x else None


def um_per_px(page: TiffPage, name: str) -> float | None:
    """Return micrometres per pixel from a TIFF resolution tag; None if it or its unit is missing."""
    value = page.tags.valueof(name)
    unit = page.tags.valueof("ResolutionUnit", default=RESUNIT.INCH)  # the default of TIFF 6.0
    if unit not in UM_PER_UNIT or not isinstance(value, tuple) or len(value) != 2:
        return None
    pixels, units = value
    return UM_PER_UNIT[unit] / (pixels / units) if pixels and units else 0.0  # digit for digit as in OpenSlide


def stored_region(region: Region, shown_px: tuple[int, int], orientation: int) -> Region:
    """Return the region of the stored page that is displayed as `region`.

    >>> stored_region(Region(0, 0, 2, 3), (10, 20), 3)
    Region(y=8, x=17, height=2, width=3)
    >>> stored_region(Region(1, 0, 2, 3), (10, 20), 6)
    Region(y=17, x=1, height=3, width=2)
    """
    (height, width), (y, x) = shown_px, (region.y, region.x)
    from_bottom, from_right = height - region.bottom, width - region.right
    upright = {1: (y, x), 2: (y, from_right), 3: (from_bottom, from_right), 4: (from_bottom, x)}
    if orientation in upright:
        return Region(*upright[orientation], region.height, region.width)
    turned = {5: (x, y), 6: (from_right, y), 7: (from_right, from_bottom), 8: (x, from_bottom)}
    return Region(*turned[orientation], region.width, region.height)


def shown_region(region: Region, level: TiffLevel) -> Region:
    """Return the displayed region for a region of the stored page: the inverse of `stored_region`."""
    back = {6: 8, 8: 6}.get(level.orientation, level.orientation)
    return stored_region(region, (level.height, level.width), back)


def orient(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return stored pixels rotated and mirrored according to the TIFF tag Orientation."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    flip_y, flip_x = {
        1: (False, False),
        2: (False, True),
        3: (True, True),
        4: (True, False),
        5: (False, False),
        6: (False, True),
        7: (True, True),
        8: (True, False),
    }[orientation]
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
