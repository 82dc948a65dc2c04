"""Tiles of the formats that OpenSlide reads, judged by our own decoders.

OpenSlide decodes leniently: where libjpeg only warns, it shows the tile, with grey or garbage for the rest. So before a
region is read, each compressed tile that it shows is decoded once by the strict decoders of our TIFF reader; JPEG at an
eighth of its size, which takes half the time and detects just as much.

Where OpenSlide 4 puts tiles: directories of TIFF are plain grids (Aperio, Philips, Huron, Argos, generic), grids with
overlaps (Trestle), parts of a larger slide (Leica) or areas of overlapping tiles (Ventana); the pieces of a Hamamatsu
NDPI lie between the restart markers of one JPEG; each frame of DICOM is a tile. The tiles of MIRAX, Sakura, Zeiss and
Hamamatsu's VMS are not checked.
"""

from __future__ import annotations

import logging
import math
import re
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BufferedReader, BytesIO, FileIO
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
import tifffile

from wsi_gradcam.errors import one_line
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.slides.base import LocalFile, is_tiff
from wsi_gradcam.slides.tiff_levels import MAX_TILES, MAX_XML, TiffLevel, open_tiff, page_level
from wsi_gradcam.slides.tiff_reader import check_complete, locate
from wsi_gradcam.slides.tiff_samples import EOI, JPEGS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides.base import SlideInfo

    Pair = tuple[float, float]
    Size = tuple[int, int]

LOG = logging.getLogger("wsi_gradcam")

SOUND, DAMAGED = 1, 2
EIGHTH = 8
SCALES = (1, 2, 4, 8)  # factors by which OpenSlide derives further levels from those of an NDPI
LENS, DEPTH = 65421, 65424  # Hamamatsu's tags: magnification, and position of the focal plane
ANY = "{*}"  # namespace
XMP = 700  # the tag that contains Ventana's XML
MAGNIFICATION = re.compile(r"level=\d+ mag=([\d.]+)")
DICOM_TAGS = (
    "ConcatenationFrameOffsetNumber",
    "DimensionOrganizationType",
    "ImageType",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SeriesInstanceUID",
    "TotalPixelMatrixRows",
    "TotalPixelMatrixColumns",
)
SYNTAXES = {
    "1.2.840.10008.1.2.4.50": "jpeg",
    "1.2.840.10008.1.2.4.90": "jpeg2000",
    "1.2.840.10008.1.2.4.91": "jpeg2000",
}
MAX_HEAD, MAX_FRAMES_BYTES = 1 << 22, 1 << 24  # bytes of a header, and of one that lists the position of each frame
DICOM_HEADER = struct.Struct("<HH4sI")  # group, element, representation, length
PIXEL_DATA = 0x7FE0, 0x0010


@dataclass(frozen=True, eq=False)
class Grid:
    """Compressed tiles, and the places on a level where OpenSlide shows them.

    Attributes:
        stored: the tiles and their decoder.
        step: (y, x) from one cell to the next, in px of the level.
        cell: (height, width) of a cell; cells overlap where it is larger than the step.
        count: (rows, columns) of cells.
        origin: (y, x) of the first cell.
        first: (row, column) of the first cell among those of the stored tiles.
        per_tile: number of cells into which a tile is divided along each axis.
        head: goes before the bytes of each tile, which end in a restart marker; empty if they are complete.
        verdicts: uint8 [tiles], 0 for a tile that has not been checked yet.
    """

    file: LocalFile
    stored: TiffLevel
    step: Pair
    cell: Pair
    count: Size
    origin: Pair = (0.0, 0.0)
    first: Size = (0, 0)
    per_tile: int = 1
    head: bytes = b""
    verdicts: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdicts", np.zeros(math.prod(self.stored.grid), np.uint8))

    def check(self, region: Region, slack: int) -> None:
        """Decode the tiles of a region of the level, with `slack` px around it, unless they are known to be sound.

        Raises:
            Exception: as raised by the decoder for the first damaged tile.
        """
        rows = self._tiles(0, region.y - slack, region.bottom + slack)
        for row, column in product(rows, self._tiles(1, region.x - slack, region.right + slack)):
            if self.verdicts[row * self.stored.grid[1] + column] != SOUND:
                self._judge(row, column)

    def _tiles(self, axis: int, low: int, high: int) -> list[int]:
        """Return the rows or columns of tiles that are shown between two positions along an axis."""
        step, origin, last = self.step[axis], self.origin[axis], self.stored.grid[axis] - 1
        begin = max(0, math.floor((low - origin - self.cell[axis]) / step) + 1)
        end = min(self.count[axis], math.ceil((high - origin) / step))
        if end <= begin:
            return []
        begin, end = ((self.first[axis] + number) // self.per_tile for number in (begin, end - 1))
        return list(range(begin, min(end, last) + 1))

    def _judge(self, row: int, column: int) -> None:
        stored, index = self.stored, row * self.stored.grid[1] + column
        pieces = stored.pieces(row, column)
        if stored.counts[pieces].any():  # others are shown as glass
            self.verdicts[index] = DAMAGED
            places = locate(stored, row, column)
            data = check_complete(places, [] if isinstance(places, str) else list(self.file.read_many(places)))
            region = stored.tile_region(row, column)
            tile = stored.decode(pieces, [self.head + part[:-1] + EOI[1:] for part in data] if self.head else data)
            if tile.shape[0] < region.height or tile.shape[1] < region.width:
                raise ValueError(f"the tile has only {tile.shape[1]} x {tile.shape[0]} px")
        self.verdicts[index] = SOUND


class TileJudge:
    """The tiles of one slide, by level. Several threads may check at once."""

    def __init__(self, path: Path, vendor: str, sizes: Sequence[Size]) -> None:
        self._path, self._vendor, self._sizes = path, vendor, sizes
        self._lock = threading.Lock()
        self._levels: list[list[Grid]] | None = None
        self._files: list[LocalFile] = []

    def check(self, level: int, region: Region, slack: int) -> None:
        """Raise the decoder's error for a damaged tile in a region of a level, or within `slack` px of it."""
        with self._lock:
            if self._levels is None:
                self._levels = self._find()
        for grid in self._levels[level]:
            grid.check(region, slack)

    def close(self) -> None:
        """Release the files."""
        with self._lock:
            self._levels = [[] for _ in self._sizes]
            for file in self._files:
                file.close()
            self._files = []

    def _find(self) -> list[list[Grid]]:
        try:
            grids = self._grids()
        except Exception as error:  # parsing may raise anything
            LOG.warning(
                "%s: its tiles are checked only by OpenSlide, which shows some damaged ones: %s",
                self._path,
                one_line(error),
            )
            grids = []
        return grids or [[] for _ in self._sizes]

    def _grids(self) -> list[list[Grid]]:
        """Return the tiles of each level; nothing for a format whose tiles are not checked."""
        if self._vendor == "dicom":
            return _of_dicom(self._path, self._sizes, self._open)
        if self._vendor not in BY_VENDOR:
            return []
        file = self._open(self._path)
        if not is_tiff(file):  # Hamamatsu's VMS
            return []
        with open_tiff(file) as parsed:
            return BY_VENDOR[self._vendor](file, list(parsed.pages), self._sizes)

    def _open(self, path: Path) -> LocalFile:
        self._files.append(LocalFile(path))
        return self._files[-1]


def _stored(page: Any) -> TiffLevel:
    """Return the tiles of a directory in the form in which they are checked."""
    return _cheapest(page_level([page], None), page.compression in JPEGS)


def _cheapest(stored: TiffLevel, is_jpeg: bool) -> TiffLevel:
    """Return JPEG tiles to be decoded at an eighth of their size, if possible."""
    can_shrink = is_jpeg and stored.decode_reduced is not None and not any(px % EIGHTH for px in stored.tile_px)
    return stored.reduced(EIGHTH) if can_shrink else stored


def _plain(file: LocalFile, stored: TiffLevel, origin: Pair = (0.0, 0.0), scale: int = 1, head: bytes = b"") -> Grid:
    """Return tiles that lie side by side, for a level that is `scale` times smaller than they are."""
    cell = stored.piece_px[0] / scale, stored.piece_px[1] / scale
    return Grid(file, stored, cell, cell, stored.grid, origin, head=head)


def _of_grids(file: LocalFile, pages: list[Any], sizes: Sequence[Size]) -> list[list[Grid]]:
    """Return the directories with each level's size; all of them, if there are several focal planes."""
    tiled = [page for page in pages if page.is_tiled]
    return [[_plain(file, _stored(page)) for page in _of_size(tiled, size)] for size in sizes]


def _of_size(pages: list[Any], size: Size) -> list[Any]:
    found = [page for page in pages if (page.imagelength, page.imagewidth) == size]
    if not found:
        raise ValueError(f"no directory has the {size[1]} x {size[0]} px of a level")
    return found


def _of_philips(file: LocalFile, pages: list[Any], sizes: Sequence[Size]) -> list[list[Grid]]:
    """Return the tiled directories, whose sizes are padded to whole tiles."""
    tiled = [page for page in pages if page.is_tiled]
    return [[_plain(file, _stored(page))] for page, _ in zip(tiled, sizes, strict=True)]


def _of_trestle(file: LocalFile, pages: list[Any], sizes: Sequence[Size]) -> list[list[Grid]]:
    """Return all directories; a level is smaller than its directory by the overlaps of its tiles."""
    levels = []
    for page, size in zip(pages, sizes, strict=True):
        stored = _stored(page)
        sides = zip(stored.piece_px, (page.imagelength, page.imagewidth), size, stored.grid, strict=True)
        y, x = (float(tile - (full - shown) / max(1, count - 1)) for tile, full, shown, count in sides)
        levels.append([Grid(file, stored, (y, x), stored.piece_px, stored.grid)])
    return levels


def _of_leica(file: LocalFile, pages: list[Any], sizes: Sequence[Size]) -> list[list[Grid]]:
    """Return the directories of all scanned parts, which the first directory's XML places in nanometres."""
    collection = next(_xml(pages[0].description).iterfind(f"{ANY}collection"))
    whole = _numbers(collection, "sizeY", "sizeX")
    levels: list[list[tuple[int, Pair, float]]] = [[] for _ in sizes]
    for image in collection.iterfind(f"{ANY}image"):
        view = next(image.iterfind(f"{ANY}view"))
        place, extent = _numbers(view, "offsetY", "offsetX"), _numbers(view, "sizeY", "sizeX")
        if (place, extent) == ((0, 0), whole):  # the macro image
            continue
        parts = [part for part in image.iterfind(f"{ANY}pixels/{ANY}dimension") if part.get("z", "0") == "0"]
        parts.sort(key=lambda part: -int(part.attrib["sizeX"]))
        for level, part in zip(levels, parts, strict=True):
            level.append((int(part.attrib["ifd"]), place, extent[1] / int(part.attrib["sizeX"])))
    found = []
    for size, level in zip(sizes, levels, strict=True):
        nm = min(nm for _, _, nm in level)
        if size != (math.ceil(whole[0] / nm), math.ceil(whole[1] / nm)):
            raise ValueError(f"its XML states other sizes than {size[1]} x {size[0]} px")
        at = [(number, (float(int(y / nm)), float(int(x / nm)))) for number, (y, x), _ in level]
        found.append([_plain(file, _stored(pages[number]), origin) for number, origin in at])
    return found


def _of_ventana(file: LocalFile, pages: list[Any], sizes: Sequence[Size]) -> list[list[Grid]]:
    """Return the directories called levels; with the XML of a first one, their tiles are moved and may overlap."""
    called = [(page, MAGNIFICATION.search(page.description)) for page in pages]
    levels = [(page, float(found[1])) for page, found in called if found]
    xml = levels[0][0].tags.valueof(XMP)
    if xml is None:
        return _of_grids(file, [page for page, _ in levels], sizes)
    tile = levels[0][0].tilelength, levels[0][0].tilewidth
    step, areas = _ventana_areas(_xml(xml), tile)
    found = []
    for page, magnification in levels[: len(sizes)]:
        by, stored = levels[0][1] / magnification, _stored(page)
        scaled, cell = (step[0] / by, step[1] / by), (tile[0] / by, tile[1] / by)
        found.append(
            [
                Grid(file, stored, scaled, cell, count, (y / by, x / by), first, int(by))
                for count, first, (y, x) in areas
            ]
        )
    return found


def _ventana_areas(xml: ElementTree.Element, tile: Size) -> tuple[Pair, list[tuple[Size, Size, Pair]]]:
    """Return the (y, x) step between tiles and, for each scanned area, its (rows, columns), first tile and position."""
    overlaps: dict[str, list[Pair]] = {"UP": [], "RIGHT": []}
    areas = []
    for info, origin in zip(xml.iterfind("SlideStitchInfo/ImageInfo"), xml.find("AoiOrigin") or (), strict=True):
        if int(info.attrib["AOIScanned"]):
            y, x = _numbers(origin, "OriginY", "OriginX")
            count = int(info.attrib["NumRows"]), int(info.attrib["NumCols"])
            areas.append((count, (int(y) // tile[0], int(x) // tile[1]), _numbers(info, "Pos-Y", "Pos-X")))
            for joint in info.iterfind("TileJointInfo"):
                direction = joint.attrib["Direction"]
                overlap, weight = _numbers(joint, "OverlapY" if direction == "UP" else "OverlapX", "Confidence")
                overlaps[direction].append((overlap, weight))
    y, x = (px - _mean(overlaps[direction]) for px, direction in zip(tile, overlaps, strict=True))
    heights = [int((rows - 1) * y + tile[0]) for (rows, _), _, _ in areas]
    top = max(int(place[0]) + height for (_, _, place), height in zip(areas, heights, strict=True))
    return (y, x), [
        (count, first, (float(top - int(place[0]) - height), float(int(place[1]))))
        for (count, first, place), height in zip(areas, heights, strict=True)
    ]


def _mean(weighted: list[Pair]) -> float:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else 0.0


def _of_ndpi(file: LocalFile, pages: list[Any], sizes: Sequence[Size]) -> list[list[Grid]]:
    """Return the directories in focus; for a level that OpenSlide makes by shrinking JPEG, the larger one."""
    shown = [
        page for page in pages if page.tags.valueof(LENS, default=0) > 0 and not page.tags.valueof(DEPTH, default=0)
    ]
    return [[_ndpi_grid(file, shown, size)] for size in sizes]


def _ndpi_grid(file: LocalFile, pages: list[Any], size: Size) -> Grid:
    for scale, page in product(SCALES, reversed(pages)):
        if (page.imagelength // scale, page.imagewidth // scale) == size:
            return _plain(file, _stored(page), scale=scale, head=page.jpegheader or b"")
    raise ValueError(f"no directory is that of a level of {size[1]} x {size[0]} px")


def _xml(text: str | bytes) -> ElementTree.Element:
    if len(text) > MAX_XML:
        raise ValueError(f"its XML of {len(text):,} characters is too long")
    return ElementTree.fromstring(text)


def _numbers(element: ElementTree.Element, *names: str) -> Pair:
    first, second = (float(element.attrib[name]) for name in names)
    return first, second


BY_VENDOR = {
    **dict.fromkeys(("aperio", "generic-tiff", "huron", "argos"), _of_grids),
    "philips": _of_philips,
    "trestle": _of_trestle,
    "leica": _of_leica,
    "ventana": _of_ventana,
    "hamamatsu": _of_ndpi,
}


class Bounded(BufferedReader):
    """A file from which only so many bytes are read in all: pydicom believes what a file claims about its parts."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(FileIO(path))
        self._left = most

    def read(self, size: int | None = -1, /) -> bytes:
        """Return some bytes; raises a ValueError for too many, or for a request to read them all (to be unpacked)."""
        if size is None or size < 0 or size > self._left:
            raise ValueError("a DICOM header that is longer than a slide's, or compressed")
        self._left -= size
        return super().read(size)


def _of_dicom(path: Path, sizes: Sequence[Size], open_file: Callable[[Path], LocalFile]) -> list[list[Grid]]:
    """Return the frames of a series' files (PS3.3, C.8.12.4) by the size of the whole picture."""
    import pydicom

    def read(file: Path) -> Any:
        with suppress(Exception), Bounded(file, MAX_HEAD) as stream:  # other files of the folder may be anything
            return pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(DICOM_TAGS))
        return None

    series = read(path).SeriesInstanceUID
    levels: dict[Size, list[Grid]] = {size: [] for size in sizes}
    for other in sorted(path.parent.iterdir()):
        head = read(other) if other.is_file() else None
        if head is None or head.get("SeriesInstanceUID") != series or "VOLUME" not in head.ImageType[2:3]:
            continue
        size = head.TotalPixelMatrixRows, head.TotalPixelMatrixColumns
        if (compression := SYNTAXES.get(head.file_meta.TransferSyntaxUID)) is not None:
            levels[size].append(_plain(open_file(other), _dicom_tiles(other, head, size, compression)))
    return list(levels.values())


def _dicom_tiles(path: Path, head: Any, size: Size, compression: str) -> TiffLevel:
    """Return frames as tiles; a frame that is not in the file has no bytes, like glass."""
    tile = head.Rows, head.Columns
    columns = ceil_div(size[1], tile[1])
    tiles = ceil_div(size[0], tile[0]) * columns
    if tiles > MAX_TILES:
        raise ValueError(f"{tiles:,} tiles, expected at most {MAX_TILES:,}")
    offsets, counts = (np.zeros(tiles, np.int64) for _ in range(2))
    with Bounded(path, MAX_FRAMES_BYTES) as file:
        places = _frames(file, int(head.NumberOfFrames))
    for number, (offset, count) in zip(_dicom_numbers(path, head, tile, columns), places, strict=True):
        offsets[number], counts[number] = offset, count
    made = BytesIO()
    options: Any = {"compression": compression, "photometric": "ycbcr" if compression == "jpeg" else "rgb"}
    tifffile.imwrite(
        made, iter([bytes(1)]), shape=(*tile, 3), dtype=np.uint8, rowsperstrip=tile[0], metadata=None, **options
    )
    made.seek(0)
    with tifffile.TiffFile(made) as parsed:
        known = page_level([parsed.pages[0]], None)
    decode = known.decode_piece  # all are like the only one of that page
    stored = replace(
        known,
        height=size[0],
        width=size[1],
        offsets=offsets,
        counts=counts,
        decode_piece=lambda data, _, **more: decode(data, 0, **more),
    )
    return _cheapest(stored, compression == "jpeg")


def _dicom_numbers(path: Path, head: Any, tile: Size, columns: int) -> list[int]:
    """Return the positions of a file's frames among the tiles of their picture."""
    if head.get("DimensionOrganizationType") == "TILED_FULL":
        first = int(head.get("ConcatenationFrameOffsetNumber", 0))
        return list(range(first, first + int(head.NumberOfFrames)))
    import pydicom

    with Bounded(path, MAX_FRAMES_BYTES) as file:
        full = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["PerFrameFunctionalGroupsSequence"])
    at = [frame.PlanePositionSlideSequence[0] for frame in full.PerFrameFunctionalGroupsSequence]
    rows = [(int(place.RowPositionInTotalImagePixelMatrix) - 1) // tile[0] for place in at]
    return [
        row * columns + (int(place.ColumnPositionInTotalImagePixelMatrix) - 1) // tile[1]
        for row, place in zip(rows, at, strict=True)
    ]


def _frames(file: BinaryIO, count: int) -> list[tuple[int, int]]:
    """Return the offset and the number of bytes of each frame of encapsulated data (PS3.5, A.4).

    Raises:
        ValueError: frames are in several parts.
    """
    import pydicom

    pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["Rows"])
    while (found := file.read(DICOM_HEADER.size)) and DICOM_HEADER.unpack(found)[:2] != PIXEL_DATA:
        file.seek(DICOM_HEADER.unpack(found)[3], 1)  # tables of offsets
    pydicom.encaps.parse_basic_offsets(file)
    _, items = pydicom.encaps.parse_fragments(file)
    if len(items) != count:
        raise ValueError(f"its {count:,} frames are in {len(items):,} parts")
    file.seek(items[-1] + 4)
    lengths = np.diff(items, append=items[-1] + 8 + int.from_bytes(file.read(4), "little")) - 8
    return [(item + 8, int(length)) for item, length in zip(items, lengths, strict=True)]


# OpenSlide's names for formats whose tiles cannot be found here.
UNJUDGED = frozenset({"mirax", "sakura", "zeiss"})


def judged_by_openslide_alone(info: SlideInfo) -> bool:
    """Return whether only OpenSlide checks the compressed tiles of a slide's format."""
    is_vms = info.vendor == "hamamatsu" and not info.path.lower().endswith(".ndpi")
    return info.vendor in UNJUDGED or is_vms
