"""TIFF files and pictures that claim more directories, tiles and scans than any slide has, or unpack to gigabytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from tests.bombs import BOMBS, Make, Random, bomb, side

Tag = tuple[int, int, Sequence[int]]  # number, type, values
SHORT, LONG = 3, 4
SIZES = {1: "B", SHORT: "H", LONG: "I", 16: "Q", 18: "Q", 13: "I"}


def picture_tags(height: int, width: int, tile: tuple[int, int] | None, offset: int, count: int) -> list[Tag]:
    """Return the tags of an RGB page of deflated tiles, or of one strip, all of which are at one place."""
    tags: list[Tag] = [
        (256, LONG, [width]),
        (257, LONG, [height]),
        (258, SHORT, [8, 8, 8]),
        (259, SHORT, [8]),
        (262, SHORT, [2]),
        (277, SHORT, [3]),
    ]
    if tile is None:
        return [*tags, (273, LONG, [offset]), (278, LONG, [height]), (279, LONG, [count])]
    number = -(-height // tile[0]) * -(-width // tile[1])
    places: list[Tag] = [(324, LONG, [offset] * number), (325, LONG, [count] * number)]
    return sorted([*tags, (322, LONG, [tile[1]]), (323, LONG, [tile[0]]), *places])


def directory(tags: Sequence[Tag], at: int, following: int) -> bytes:
    """Return a directory of a classic TIFF that lies `at` a place, with its values behind it."""
    values_at = at + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for number, kind, items in tags:
        packed = struct.pack(f"<{len(items)}{SIZES[kind]}", *items)
        if len(packed) > 4:
            field = struct.pack("<I", values_at + len(values))
            values += packed + b"\0" * (len(packed) % 2)
        else:
            field = packed.ljust(4, b"\0")
        entries += struct.pack("<HHI", number, kind, len(items)) + field
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following) + values


def write(path: Path, tags: list[Tag], tile: bytes, more: Callable[[int], tuple[int, bytes]] | None = None) -> Path:
    """Write a TIFF of one directory at byte 8, a tile behind it, and what `more` makes of the place behind that.

    `more` returns the place of the next directory, too. Offsets of 0 in the tags become the tile's.
    """
    length = len(directory(tags, 8, 0))
    placed = [
        (number, kind, [8 + length] * len(items) if number in (273, 324) else items) for number, kind, items in tags
    ]
    following, rest = (0, b"") if more is None else more(8 + length + len(tile))
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory(placed, 8, following) + tile + rest)
    return path


TILE = zlib.compress(bytes([180, 90, 160]) * 256 * 256)


def sound_tags(more: Sequence[Tag] = ()) -> list[Tag]:
    """Return the tags of a picture of four tiles, and others."""
    return sorted([*picture_tags(512, 512, (256, 256), 0, len(TILE)), *more])


def chained(count: int, closing: bool, tags: Sequence[Tag]) -> Callable[[int], tuple[int, bytes]]:
    """Return what makes a chain of directories; a closing one leads back to its first."""

    def make(at: int) -> tuple[int, bytes]:
        at += at % 2
        length = len(directory(tags, 0, 0))
        parts = [directory(tags, at + i * length, at + (i + 1) * length) for i in range(count - 1)]
        parts.append(directory(tags, at + (count - 1) * length, at if closing else 0))
        return at, b"\0" * (at % 2) + b"".join(parts)

    return make


NAME: list[Tag] = [(254, LONG, [1])]


@bomb("tiff: many directories")
def many_directories(folder: Path, rng: Random) -> Path:
    return write(folder / "a.tif", sound_tags(), TILE, chained(side(rng, 5, 5.7), False, NAME))


@bomb("tiff: directories up to the bound")
def most_directories(folder: Path, rng: Random) -> Path:
    tags = picture_tags(64, 64, (64, 64), 8, 100)
    return write(folder / "a.tif", sound_tags(), TILE, chained(int(rng.integers(900, 1020)), False, tags))


@bomb("tiff: directories in a circle")
def circle(folder: Path, rng: Random) -> Path:
    tags = picture_tags(64, 64, (64, 64), 8, 100)
    return write(folder / "a.tif", sound_tags(), TILE, chained(int(rng.integers(2, 200)), True, tags))


def sub_directories(count: int, distinct: bool) -> Make:
    """Return a maker of a picture with so many SubIFDs."""

    def make(folder: Path, rng: Random) -> Path:
        some = int(count * rng.uniform(0.5, 1.5))
        sub = directory(picture_tags(64, 64, (64, 64), 8, 100), 0, 0)
        first = 8 + len(directory(sound_tags([(330, LONG, [0] * some)]), 8, 0)) + len(TILE)
        first += first % 2
        places = [first + i * len(sub) * distinct for i in range(some)]
        subs = b"".join(directory(picture_tags(64, 64, (64, 64), 8, 100), at, 0) for at in sorted(set(places)))
        return write(
            folder / "a.tif", sound_tags([(330, LONG, places)]), TILE, lambda at: (0, b"\0" * (first - at) + subs)
        )

    return make


BOMBS["tiff: many SubIFDs at one place"] = sub_directories(1_000_000, distinct=False)
BOMBS["tiff: many SubIFDs"] = sub_directories(50_000, distinct=True)


@bomb("tiff: SubIFDs in SubIFDs")
def nested(folder: Path, rng: Random) -> Path:
    depth = int(rng.integers(1000, 9000))

    def more(at: int) -> tuple[int, bytes]:
        at += at % 2
        tags: list[Tag] = sorted([*picture_tags(64, 64, (64, 64), 8, 100), (330, LONG, [0])])
        length = len(directory(tags, 0, 0))
        parts = []
        for number in range(depth):
            here = at + number * length
            inner = [(t, k, [here + length] if t == 330 else v) for t, k, v in tags]
            parts.append(directory(inner, here, 0))
        return at, b"".join(parts)

    return write(folder / "a.tif", sound_tags(), TILE, more)


@bomb("tiff: a strip of terabytes")
def strip(folder: Path, rng: Random) -> Path:
    data = zlib.compress(bytes(1 << 22))
    return write(folder / "a.tif", picture_tags(side(rng, 5.5, 9), side(rng, 5.5, 9), None, 0, len(data)), data)


@bomb("tiff: a tile of terabytes")
def tile(folder: Path, rng: Random) -> Path:
    data, edge = zlib.compress(bytes(1 << 22)), (side(rng, 5.5, 9) // 16 * 16, side(rng, 5.5, 9) // 16 * 16)
    return write(folder / "a.tif", picture_tags(edge[0] - 5, edge[1] - 5, edge, 0, len(data)), data)


@bomb("tiff: few pixels in a tile of terabytes")
def small_in_tile(folder: Path, rng: Random) -> Path:
    data, edge = zlib.compress(bytes(1 << 22)), (side(rng, 5, 9) // 16 * 16, side(rng, 5, 9) // 16 * 16)
    return write(folder / "a.tif", picture_tags(300, 300, edge, 0, len(data)), data)


@bomb("tiff: a tile of terabytes in a SubIFD")
def tile_below(folder: Path, rng: Random) -> Path:
    edge = (side(rng, 5, 9) // 16 * 16, side(rng, 5, 9) // 16 * 16)
    first = 8 + len(directory(sound_tags([(330, LONG, [0])]), 8, 0)) + len(TILE)
    first += first % 2
    sub = directory(picture_tags(256, 256, edge, 8, len(TILE)), first, 0)
    return write(folder / "a.tif", sound_tags([(330, LONG, [first])]), TILE, lambda at: (0, b"\0" * (first - at) + sub))


@bomb("tiff: one tile shown a million times")
def repeated(folder: Path, rng: Random) -> Path:
    edge, across = 4096, int(rng.integers(500, 1000))
    data = zlib.compress(bytes([180, 90, 160]) * edge * edge, 9)
    return write(folder / "a.tif", picture_tags(edge * across, edge * across, (edge, edge), 0, len(data)), data)


@bomb("tiff: RGBA of 16 bits in large tiles")
def rgba16(folder: Path, rng: Random) -> Path:
    edge = int(rng.integers(280, 360)) * 16
    data = np.full((edge, edge, 4), 40_000, np.uint16)
    tifffile.imwrite(
        folder / "a.tif", data, photometric="rgb", extrasamples=["unassalpha"], tile=(edge, edge), compression="zlib"
    )
    return folder / "a.tif"


def many_scans(edge: int, scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is there many times."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (edge // 8, edge // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((edge, edge), Image.Resampling.NEAREST).save(
        buffer, "JPEG", progressive=True, quality=40
    )
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + b"\xff\xd9"


@bomb("picture: JPEG of many scans")
def jpeg_scans(folder: Path, rng: Random) -> Path:
    (folder / "a.jpg").write_bytes(many_scans(2048, int(rng.integers(500, 2000))))
    return folder / "a.jpg"


@bomb("picture: large JPEG of some scans")
def large_jpeg_scans(folder: Path, rng: Random) -> Path:
    (folder / "a.jpg").write_bytes(many_scans(int(rng.integers(7000, 8000)), int(rng.integers(30, 53))))
    return folder / "a.jpg"


@bomb("tiff: tiles of JPEG of many scans")
def tiff_scans(folder: Path, rng: Random) -> Path:
    edge = int(rng.integers(200, 320)) * 16
    tags = [
        (n, k, [7] if n == 259 else [6] if n == 262 else v) for n, k, v in picture_tags(edge, edge, (edge, edge), 0, 0)
    ]
    data = many_scans(edge, int(rng.integers(40, 53)))
    return write(folder / "a.tif", [(n, k, [len(data)] if n == 325 else v) for n, k, v in tags], data)


def png(height: int, width: int, depth: int, colour: int) -> bytes:
    """Return a PNG of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    line = bytes(1 + width * samples * depth // 8)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


for _depth, _colour, _name in (
    (8, 6, "RGBA"),
    (16, 6, "RGBA of 16 bits"),
    (16, 0, "gray of 16 bits"),
    (16, 2, "RGB of 16 bits"),
):

    def _made(folder: Path, rng: Random, depth: int = _depth, colour: int = _colour) -> Path:
        edge = int(rng.integers(7700, 8192))
        (folder / "a.png").write_bytes(png(edge, edge, depth, colour))
        return folder / "a.png"

    BOMBS[f"picture: PNG of {_name}"] = _made


@bomb("picture: PNG beyond the bound")
def large_png(folder: Path, rng: Random) -> Path:
    (folder / "a.png").write_bytes(png(int(rng.integers(9000, 30_000)), 20_000, 8, 6))
    return folder / "a.png"


@bomb("picture: turned JPEG")
def turned(folder: Path, rng: Random) -> Path:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(2, 9))
    edge = int(rng.integers(7700, 8192))
    Image.new("RGB", (edge, edge), (200, 100, 150)).save(folder / "a.jpg", exif=exif)
    return folder / "a.jpg"


def described(count: int, packed: int, kind: int = 2) -> Callable[[Path, Random], Path]:
    """Return a maker of a picture with a tag of so many values, and bytes behind it that take no room on the disk."""

    def make(folder: Path, rng: Random) -> Path:
        path = write(folder / "a.tif", sound_tags([(305 if kind != 2 else 270, LONG, [8])]), TILE)
        data = bytearray(path.read_bytes())
        entries = struct.unpack_from("<H", data, 8)[0]
        for at in range(10, 10 + 12 * entries, 12):
            if struct.unpack_from("<H", data, at)[0] in (270, 305):
                struct.pack_into("<HII", data, at + 2, kind, count - int(rng.integers(1, 1000)), len(data))
        path.write_bytes(data)
        with path.open("r+b") as file:
            file.truncate(len(data) + packed)
        return path

    return make


BOMBS["tiff: a description of gigabytes"] = described(1 << 31, 1 << 31)
BOMBS["tiff: a description as long as is read"] = described(64 << 20, 1 << 31)
BOMBS["tiff: a description of more than the file"] = described((1 << 32) - 1, 0)
BOMBS["tiff: a tag of 2^32 doubles"] = described((1 << 32) - 1, 1 << 33, kind=12)


@bomb("tiff: SubIFDs in a circle")
def sub_circle(folder: Path, rng: Random) -> Path:
    return write(folder / "a.tif", sound_tags([(330, LONG, [8] * int(rng.integers(1, 250)))]), TILE)


@bomb("tiff: a JPEG that claims 65,500 px in a tile")
def wide_jpeg(folder: Path, rng: Random) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (256, 256), (180, 90, 160)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 65_500, int(rng.integers(60_000, 65_500)))
    tags = [(n, k, [7] if n == 259 else [6] if n == 262 else v) for n, k, v in picture_tags(512, 512, (256, 256), 0, 0)]
    return write(folder / "a.tif", [(n, k, [len(data)] * 4 if n == 325 else v) for n, k, v in tags], bytes(data))


def jp2_bomb(components: int, tile: int) -> Make:
    """Return a maker of a picture in JPEG 2000 that claims components, or tiles of so many pixels a side."""

    def make(folder: Path, rng: Random) -> Path:
        buffer = io.BytesIO()
        Image.new("RGB", (256, 256), (180, 90, 160)).save(buffer, "JPEG2000", no_jp2=True)
        data = bytearray(buffer.getvalue())
        at = data.index(b"\xff\x51")
        if tile:
            struct.pack_into(">II", data, at + 22, tile, tile)
            struct.pack_into(">II", data, at + 6, 1 << int(rng.integers(16, 20)), 1 << int(rng.integers(16, 20)))
        if components:
            siz = bytes(data[at : at + 40]) + b"\x07\x01\x01" * components
            old = struct.unpack_from(">H", data, at + 2)[0]
            siz = siz[:2] + struct.pack(">H", min(38 + 3 * components, 65_535)) + siz[4:38]
            siz += struct.pack(">H", components) + b"\x07\x01\x01" * components
            data[at : at + 2 + old] = siz
        tags = [(n, k, [33_005] if n == 259 else v) for n, k, v in picture_tags(512, 512, (256, 256), 0, 0)]
        return write(folder / "a.tif", [(n, k, [len(data)] * 4 if n == 325 else v) for n, k, v in tags], bytes(data))

    return make


BOMBS["tiff: JPEG 2000 of 16,000 components"] = jp2_bomb(16_000, 0)
BOMBS["tiff: JPEG 2000 of a million tiles"] = jp2_bomb(0, 1 << 8)
BOMBS["tiff: JPEG 2000 of tiles of one pixel"] = jp2_bomb(0, 1)


def png_with(kind: bytes, head: bytes, count: int) -> Make:
    """Return a maker of a small PNG with chunks that unpack to gigabytes."""

    def make(folder: Path, rng: Random) -> Path:
        data = png(300, 300, 8, 2)
        packed = head + zlib.compress(bytes(1 << 26), 9)
        chunk = struct.pack(">I", len(packed)) + kind + packed + struct.pack(">I", zlib.crc32(kind + packed))
        (folder / "a.png").write_bytes(data[:33] + chunk * count + data[33:])
        return folder / "a.png"

    return make


BOMBS["picture: PNG of a packed text"] = png_with(b"zTXt", b"a\0\0", 60)
BOMBS["picture: PNG of a packed profile"] = png_with(b"iCCP", b"a\0\0", 1)
BOMBS["picture: PNG of an international text"] = png_with(b"iTXt", b"a\0\1\0\0\0", 60)
