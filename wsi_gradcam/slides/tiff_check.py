"""A check of TIFF files that claim more than they can hold: C libraries trust that, and crash for lack of memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from wsi_gradcam.errors import SlideFormatError
from wsi_gradcam.geometry import ceil_div
from wsi_gradcam.slides.tiff_levels import AGAIN, MAX_TILE_PX

if TYPE_CHECKING:
    from wsi_gradcam.slides.base import SlideFile

ORDERS = {b"II": "<", b"MM": ">"}
CLASSIC, BIG = 42, 43
# Bytes of a value by its type (TIFF 6.0, section 2, and BigTIFF).
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGER_TYPES = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}
IMAGE_WIDTH, IMAGE_LENGTH, TILE_WIDTH, TILE_LENGTH = SIZES = (256, 257, 322, 323)
TILE_OFFSETS = 324
BYTE_COUNTS = (279, 325)  # of strips, of tiles
MAX_DIRECTORIES, MAX_ENTRIES = 4096, 4096

Entry = tuple[int, int, int, bytes]  # tag, type, count, the field that holds the value or its place


def check_tiff(file: SlideFile) -> None:
    """Check the directories of a TIFF as far as they can be read.

    Raises:
        SlideFormatError: one claims more data than the file or its tiles can hold, or tiles that are too large.
        SlideAccessError: a remote file cannot be reached.
    """
    size = file.size
    with file.stream() as stream:
        for number, (order, entries) in enumerate(_directories(stream, size)):
            for tag, kind, count, field in entries:
                if TYPE_BYTES.get(kind, 0) * count > size:
                    raise SlideFormatError(
                        f"{file.name}: damaged TIFF: tag {tag} of directory {number} claims {count:,} values, more "
                        f"than the file's {size:,} bytes can hold; {AGAIN}"
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
    """Return the problem with the tiles of a directory, of which `listed` are listed; empty where there is none."""
    width, length = sizes.get(TILE_WIDTH, 0), sizes.get(TILE_LENGTH, 0)
    if width * length > MAX_TILE_PX:
        return f"tiles of {length} x {width} px, expected up to {MAX_TILE_PX:,} px,"
    if not width * length or listed is None:
        return ""
    needed = ceil_div(sizes.get(IMAGE_WIDTH, 0), width) * ceil_div(sizes.get(IMAGE_LENGTH, 0), length)
    return f"{listed:,} tiles, expected {needed:,} for its size," if listed < needed else ""


def _directories(file: BinaryIO, size: int) -> Iterator[tuple[str, list[Entry]]]:
    """Yield byte order and entries of each directory, to the end of the chain or to where it leaves the file."""
    head = file.read(16)
    order = ORDERS.get(head[:2])
    if order is None or len(head) < 16:
        return
    (version,) = struct.unpack(order + "H", head[2:4])
    if version not in (CLASSIC, BIG):
        return
    word, number, shape = ("Q", "Q", "HHQ8s") if version == BIG else ("I", "H", "HHI4s")
    (place,) = struct.unpack_from(order + word, head, 8 if version == BIG else 4)
    seen: set[int] = set()
    while 0 < place < size and place not in seen and len(seen) < MAX_DIRECTORIES:
        seen.add(place)
        file.seek(place)
        count = _unpacked(file, order + number)
        if count is None or count > MAX_ENTRIES:
            return
        length = struct.calcsize(order + shape)
        raw = file.read(count * length)
        whole = len(raw) - len(raw) % length
        yield order, [struct.unpack_from(order + shape, raw, at) for at in range(0, whole, length)]
        place = _unpacked(file, order + word) or 0


def _unpacked(file: BinaryIO, layout: str) -> int | None:
    data = file.read(struct.calcsize(layout))
    return struct.unpack(layout, data)[0] if len(data) == struct.calcsize(layout) else None


def _largest(file: SlideFile, order: str, entry: Entry) -> int:
    """Return the largest of an entry's values; 0 where they are not integers or lie outside the file."""
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
