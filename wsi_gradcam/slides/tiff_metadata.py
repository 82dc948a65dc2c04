"""Metadata of TIFF slides and OME-XML: pixel sizes, vendor, properties when OpenSlide cannot be used, and checks.

C libraries trust a file that claims more than it can hold, and crash for lack of memory, so `check_tiff` comes first.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
from tifffile import TiffFile

from wsi_gradcam.errors import SlideFormatError, one_line
from wsi_gradcam.geometry import ceil_div
from wsi_gradcam.slides.base import OURS, SlideInfo, check_mpp, make_levels, mpp_from_objective
from wsi_gradcam.slides.tiff_levels import AGAIN, MAX_TILE_PX, MAX_XML, SWAPPED, TOP_LEFT, um_per_px

if TYPE_CHECKING:
    from wsi_gradcam.slides.base import SlideFile
    from wsi_gradcam.slides.tiff_levels import TiffLevel

    Mpp = tuple[float, float] | None


WHITE = (255, 255, 255)
# Length units that OME-XML allows, as far as microscopes use them; µ comes in two encodings.
UM_PER_OME_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}


def describe_tiff(
    source: SlideFile, file: TiffFile, levels: list[TiffLevel], mpp: tuple[float, float] | None
) -> SlideInfo:
    """Return the metadata of the slide in `source`, parsed as `file`, with `levels`; `mpp` (y, x) replaces its own."""
    found, problem = (mpp, "") if mpp is not None else tiff_mpp(file)
    if mpp is None and found is not None and levels[0].orientation > SWAPPED:
        found = (found[1], found[0])
    return SlideInfo(
        path=source.name,
        levels=make_levels(*zip(*(level.stored for level in levels), strict=True)),
        mpp=found,
        mpp_problem=problem,
        vendor="ome-tiff" if file.is_ome else "tiff",
        background=WHITE,
        bounds=None,
        digest=source.digest(),
    )


def tiff_mpp(file: TiffFile) -> tuple[tuple[float, float] | None, str]:
    """Return micrometres per stored pixel (y, x) and an empty string, or None and the problem with its remedy."""
    if file.is_ome:
        return ome_mpp(file.ome_metadata or "")
    return page_mpp(file.pages[0])


def page_mpp(page: Any) -> tuple[tuple[float, float] | None, str]:
    """Return the same as `tiff_mpp`, from a page's resolution tags."""
    values = [um_per_px(page, axis) for axis in ("YResolution", "XResolution")]
    if None in values:
        return None, "the file does not state its resolution; give the micrometres per pixel, such as --mpp 0.25"
    for axis, value in zip("YX", values, strict=True):
        if problem := check_mpp(float(value or 0), f"the pixel size from tag {axis}Resolution"):
            return None, problem
    return (float(values[0] or 0), float(values[1] or 0)), ""


def ome_mpp(xml: str | bytes, number: int = 0) -> tuple[tuple[float, float] | None, str]:
    """Return PhysicalSizeY and PhysicalSizeX of an image (OME-XML 2016-06), as `tiff_mpp` does."""
    if len(xml) > MAX_XML:
        return (
            None,
            f"its OME-XML of {len(xml):,} characters is too long; give the micrometres per pixel, such as --mpp 0.25",
        )
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        return (
            None,
            f"its OME-XML cannot be read ({one_line(error)}); give the micrometres per pixel, such as --mpp 0.25",
        )
    pixels = next(islice((e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"), number, None), None)
    values = []
    for axis in "YX":
        text = None if pixels is None else pixels.get(f"PhysicalSize{axis}")
        if text is None or pixels is None:
            return None, f"the file has no PhysicalSize{axis}; give the micrometres per pixel, such as --mpp 0.25"
        unit = pixels.get(f"PhysicalSize{axis}Unit", "µm")
        try:
            value = float(text) * UM_PER_OME_UNIT[unit]
        except (ValueError, KeyError):
            return None, f"PhysicalSize{axis} is {text!r} {unit!r}, expected a length; give the true value with --mpp"
        if problem := check_mpp(value, f"PhysicalSize{axis}"):
            return None, problem
        values.append(value)
    return (values[0], values[1]), ""


def ome_names(xml: bytes) -> list[str]:
    """Return the names of the images in OME-XML; none if it cannot be read."""
    try:
        root = ElementTree.fromstring(xml if len(xml) <= MAX_XML else b"")
    except ElementTree.ParseError:
        return []
    return [e.get("Name", "") for e in root.iter() if e.tag.rpartition("}")[2] == "Image"]


# An image is not a second slide if it has such a name, or at most this share of the first one's pixels, or at most the
# larger share and another pixel size.
EXTRA = re.compile(r"label|macro|thumbnail|overview|preview", re.IGNORECASE)
SMALL, SMALLER = 1 / 16, 1 / 4
LISTED = 8


@dataclass(frozen=True)
class OneOfSeveral:
    """One image in a file or folder that has several.

    Attributes:
        path: its path in the file or folder.
        name: its name in the OME-XML or its own metadata.
        size: (height, width); None if unknown.
        spacing: (height, width) of its pixels in some unit; None if not stated.
    """

    path: str
    name: str
    size: tuple[int, int] | None
    spacing: tuple[float, float] | None

    def __str__(self) -> str:
        size = "of unknown size" if self.size is None else f"{self.size[1]} x {self.size[0]} px"
        return f"{self.path} ({self.name + ', ' if self.name else ''}{size})"

    def is_extra(self, first: OneOfSeveral) -> bool:
        """Return whether an image is not a slide, compared with the first: a label, a macro, a thumbnail."""
        if self.size is None or first.size is None:
            return False
        share = math.prod(self.size) / math.prod(first.size)
        same = first.spacing is not None and self.spacing is not None and self.spacing[0] < 1.5 * first.spacing[0]
        named = bool(EXTRA.search(self.name)) and share < 1
        return named or share <= SMALL or (share <= SMALLER and not same)


def slide_of(series: Sequence[OneOfSeveral], place: str) -> str:
    """Return the path of the first image, if it is the only one that can be the slide.

    Raises:
        SlideFormatError: others may be the slide as well.
    """
    first, *others = series
    if all(other.is_extra(first) for other in others):
        return first.path
    more = f" and {len(series) - LISTED} more" if len(series) > LISTED else ""
    raise SlideFormatError(
        f"holds {len(series)} images, several of which may be the slide: {', '.join(map(str, series[:LISTED]))}{more}; "
        f"give the intended one, such as {place.rstrip('/')}/{first.path}"
    )


APERIO, GENERIC = "aperio", "generic-tiff"
# OpenSlide's names for formats that are plain pyramids of tiles. In others, tiles overlap, are elsewhere, or are left
# out where there is glass.
PLAIN = frozenset({APERIO, GENERIC})
NO_MPP = "its ImageDescription contains no MPP; give the micrometres per pixel, such as --mpp 0.25"


def tiff_vendor(file: TiffFile) -> str | None:
    """Return OpenSlide's name for a TIFF file's format; None if it does not know it."""
    first: Any = file.pages[0]
    software = first.software
    marks = {
        "hamamatsu": file.is_ndpi,
        "leica": file.is_scn,
        "ventana": file.is_bif,
        "philips": file.is_philips,
        "trestle": software.startswith("MedScan"),
    }
    if found := next((vendor for vendor, mark in marks.items() if mark), None):
        return found
    if not first.is_tiled:
        return None
    return APERIO if first.description.startswith("Aperio") else GENERIC


def describe_plain(
    source: SlideFile, file: TiffFile, levels: list[TiffLevel], mpp: Mpp, trust_objective: bool
) -> SlideInfo:
    """Return the metadata of a plain pyramid, as OpenSlide and our reader together give it for a local file."""
    info, vendor = describe_tiff(source, file, levels, mpp), tiff_vendor(file)
    first: Any = file.pages[0]
    in_subifds = file.is_ome and bool(first.subifds)  # levels that OpenSlide does not see
    if vendor is None or in_subifds or levels[0].orientation != TOP_LEFT:
        return info
    info = replace(info, vendor=vendor)
    if vendor == APERIO:
        known = aperio_properties(first.description)
        found, problem = (mpp, "") if mpp is not None else aperio_mpp(known)
        info = replace(info, mpp=found, mpp_problem=problem, objective=_objective(known))
    elif mpp is None and (tagged := page_mpp(first))[0] is not None:  # before OME-XML's
        info = replace(info, mpp=tagged[0], mpp_problem="")
    return mpp_from_objective(info) if trust_objective else info


def aperio_properties(description: str) -> dict[str, str]:
    """Return the properties that Aperio's software writes after its own name, separated by bars.

    >>> aperio_properties("Aperio Image Library v11\\n46x32 (240x240) Q=30|AppMag = 20|MPP = 0.4990")
    {'AppMag': '20', 'MPP': '0.4990'}
    """
    pairs = (part.partition("=") for part in description.split("|")[1:])
    return {key.strip(): value.strip() for key, sign, value in pairs if sign}


def aperio_mpp(properties: dict[str, str]) -> tuple[Mpp, str]:
    """Return micrometres per pixel (y, x) and an empty string, or None and the problem with its remedy."""
    if "MPP" not in properties:
        return None, NO_MPP
    value = _number(properties["MPP"])
    if value is None:
        return None, f"MPP is {properties['MPP']!r}, expected a number; give the true value with --mpp"
    if problem := check_mpp(value, "MPP"):
        return None, problem
    return (value, value), ""


def _objective(properties: dict[str, str]) -> float | None:
    power = _number(properties.get("AppMag", ""))
    return power if power is not None and 0 < power < float("inf") else None


def _number(text: str) -> float | None:
    """Return a number, which may have a decimal comma, as some scanners write."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None


ORDERS = {b"II": "<", b"MM": ">"}
CLASSIC, BIG = 42, 43
# Bytes per value, by type (TIFF 6.0, section 2, and BigTIFF).
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGER_TYPES = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}
IMAGE_WIDTH, IMAGE_LENGTH, TILE_WIDTH, TILE_LENGTH = SIZES = (256, 257, 322, 323)
TILE_OFFSETS = 324
BYTE_COUNTS = (279, 325)  # of strips, of tiles
ASCII, MAX_TEXT = 2, 256
MAX_TAG_TEXT = 64 << 20  # bytes; parsers hold several copies
SUB_DIRECTORIES = 330
PLACES = {4: "u4", 13: "u4", 16: "u8", 18: "u8"}
MAX_DIRECTORIES, MAX_ENTRIES, MAX_BELOW = 4096, 4096, 256

Entry = tuple[int, int, int, bytes]  # tag, type, count, the field that contains the value or its offset


def check_tiff(file: SlideFile) -> None:
    """Check the directories of a TIFF, as far as they can be read.

    Raises:
        SlideFormatError: one claims more data than the file or its tiles can contain, or tiles that are too large.
        SlideAccessError: a remote file cannot be reached.
    """
    try:
        with file.stream() as stream:
            for number, (order, entries) in enumerate(_directories(stream, file.size)):
                _check_directory(file, number, order, entries)
    except _TooManyError as error:
        raise SlideFormatError(f"{file.name}: damaged TIFF: {error}; {AGAIN}") from error


def _check_directory(file: SlideFile, number: int, order: str, entries: list[Entry]) -> None:
    size = file.size
    for tag, kind, count, field in entries:
        if TYPE_BYTES.get(kind, 0) * count > size:
            raise SlideFormatError(
                f"{file.name}: damaged TIFF: tag {tag} of directory {number} claims {count:,} values, more "
                f"than the file's {size:,} bytes can hold; {AGAIN}"
            )
        if kind == ASCII and count > MAX_TAG_TEXT:
            raise SlideFormatError(
                f"{file.name}: a text of {count:,} bytes in tag {tag} of directory {number}, expected at most "
                f"{MAX_TAG_TEXT:,}; save the slide without it"
            )
        if tag in BYTE_COUNTS and (largest := _largest(file, order, (tag, kind, count, field))) > size:
            raise SlideFormatError(
                f"{file.name}: damaged TIFF: a tile of {largest:,} bytes in directory {number}, more than "
                f"the file's {size:,}; {AGAIN}"
            )
    sizes = {entry[0]: _largest(file, order, entry) for entry in entries if entry[0] in SIZES}
    listed = next((count for tag, _, count, _ in entries if tag == TILE_OFFSETS), None)
    if problem := _tile_problem(sizes, listed):
        raise SlideFormatError(f"{file.name}: damaged TIFF: {problem} in directory {number}; {AGAIN}")


def _tile_problem(sizes: dict[int, int], listed: int | None) -> str:
    """Return the problem with a directory's tiles, `listed` of which are listed; empty if there is none."""
    width, length = sizes.get(TILE_WIDTH, 0), sizes.get(TILE_LENGTH, 0)
    if width * length > MAX_TILE_PX:
        return f"tiles of {width} x {length} px, expected at most {MAX_TILE_PX:,} px,"
    if not width * length or listed is None:
        return ""
    needed = ceil_div(sizes.get(IMAGE_WIDTH, 0), width) * ceil_div(sizes.get(IMAGE_LENGTH, 0), length)
    return f"{listed:,} tiles, expected {needed:,} for its size," if listed < needed else ""


def _directories(file: BinaryIO, size: int) -> Iterator[tuple[str, list[Entry]]]:
    """Yield the byte order and entries of each directory, up to the end of the chain or to where it leaves the file.

    Directories that SubIFDs point to come after the chain.

    Raises:
        _TooManyError: there are more than in any slide, or the chain leads back to itself.
    """
    head = file.read(16)
    order = ORDERS.get(head[:2])
    if order is None or len(head) < 16:
        return
    (version,) = struct.unpack(order + "H", head[2:4])
    if version not in (CLASSIC, BIG):
        return
    word, number, shape = ("Q", "Q", "HHQ8s") if version == BIG else ("I", "H", "HHI4s")
    is_large_ndpi = version == CLASSIC and size > CLASSIC_BYTES  # any other file of that many bytes is a BigTIFF
    word = "Q" if is_large_ndpi else word
    starts = list(struct.unpack_from(order + word, head, 8 if version == BIG else 4))
    seen: set[int] = set()
    for start in starts:  # it grows
        place = start
        while 0 < place < size and place not in seen:
            seen.add(place)
            if len(seen) > MAX_DIRECTORIES:
                raise _TooManyError(f"more than {MAX_DIRECTORIES:,} directories")
            file.seek(place)
            count = _unpacked(file, order + number)
            if count is None or count > MAX_ENTRIES:
                return
            length = struct.calcsize(order + shape)
            raw = file.read(count * length)
            whole = len(raw) - len(raw) % length
            entries = [struct.unpack_from(order + shape, raw, at) for at in range(0, whole, length)]
            if is_large_ndpi:  # the upper halves of the offsets of values are elsewhere
                entries = []
            yield order, entries
            place = _unpacked(file, order + word) or 0
            starts += _places_below(file, order, entries)
        if start == starts[0] and place in seen:
            raise _TooManyError(f"directory {len(seen) - 1} points back to an earlier one")


CLASSIC_BYTES = 1 << 32


class _TooManyError(Exception):
    """A file with more directories than are examined."""


def _places_below(file: BinaryIO, order: str, entries: list[Entry]) -> list[int]:
    """Return the offsets of a directory's SubIFDs."""
    found: list[int] = []
    for _, kind, count, field in (entry for entry in entries if entry[0] == SUB_DIRECTORIES and entry[1] in PLACES):
        if count > MAX_BELOW:
            raise _TooManyError(f"{count:,} subdirectories in one directory, expected at most {MAX_BELOW}")
        data, length = field, count * TYPE_BYTES[kind]
        if length > len(field):
            file.seek(int.from_bytes(field, "little" if order == "<" else "big"))
            data = file.read(length)
        dtype = np.dtype(order + PLACES[kind])
        found += np.frombuffer(data, dtype, min(count, len(data) // dtype.itemsize)).tolist()
    return found


def first_texts(file: BinaryIO, size: int) -> dict[int, str]:
    """Return the short texts in a TIFF's first directory by their tags, in a few small reads.

    The result is empty for a file that is not a TIFF.
    """
    order, entries = next(_directories(file, size), ("<", []))
    texts = {}
    for tag, kind, count, data in entries:
        if kind == ASCII and count > len(data):
            file.seek(int.from_bytes(data, "little" if order == "<" else "big"))
            data = file.read(min(count, MAX_TEXT))
        if kind == ASCII:
            texts[tag] = data[:count].rstrip(b"\0").decode("ascii", "replace")
    return texts


DESCRIPTION, SOFTWARE = 270, 305


def is_export(texts: Mapping[int, str]) -> bool:
    """Return whether the texts are those of a TIFF made by an export; the demo's slide does not describe itself."""
    return texts.get(SOFTWARE) == OURS and DESCRIPTION in texts


def _unpacked(file: BinaryIO, layout: str) -> int | None:
    data = file.read(struct.calcsize(layout))
    return struct.unpack(layout, data)[0] if len(data) == struct.calcsize(layout) else None


def _largest(file: SlideFile, order: str, entry: Entry) -> int:
    """Return the largest of an entry's values; 0 if they are not integers or lie outside the file."""
    _, kind, count, field = entry
    if kind not in INTEGER_TYPES or not count:
        return 0
    dtype = np.dtype(order + INTEGER_TYPES[kind])
    if dtype.itemsize * count <= len(field):
        return int(np.frombuffer(field, dtype, count).max())
    place = int.from_bytes(field, "little" if order == "<" else "big")
    if place > file.size:
        return 0
    with file.stream() as stream:
        stream.seek(place)
        data = stream.read(dtype.itemsize * count)
    return int(np.frombuffer(data, dtype, len(data) // dtype.itemsize).max(initial=0))
