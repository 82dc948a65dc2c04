"""Slides made for tests and benchmarks: gigapixels in a few megabytes, markers at known places, damage.

Axis order is y, x; sizes are (height, width); regions are half-open; pixels are those of level 0 unless a
name says otherwise. All slides open in OpenSlide as `generic-tiff`.

What openslide-bin 4.0.1.2 makes of damage, as measured here; test_demo_slide.py holds most of it.

Tiles (`corrupt_tile`):

- "unreadable": `OpenSlideError` ("Not a JPEG file", or "ZIPDecode: Decoding error") for every region that
  touches the tile. From then on the handle raises for every other region too and has to be reopened.
- "silent": JPEG has no checksum, so flipped bits in the scan decode to wrong pixels, without a word from
  OpenSlide or imagecodecs. Deflate has one and raises.
- "missing": transparent black (0, 0, 0, 0), no error, whatever its offset; tifffile fills in zeros.

Files (`truncate`): cut before the last directory, `OpenSlideUnsupportedFormatError` as for no slide at all;
cut in the coarsest level, `OpenSlideError` on opening, which hashes that level.

mpp (`set_resolution`, `strip_mpp`): 72 per inch gives 352.78; no unit counts as inch (20000 gives 1.27);
unit 1 (none), an unknown unit or a resolution of 0 gives no mpp; a negative SRATIONAL gives a negative mpp; a
denominator of 0 gives no mpp in a classic TIFF and makes a BigTIFF unsupported. Any other number is passed
on, however absurd.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal, cast

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from wsi_gradcam.demo.slide import Compression, shrink, write_slide

PINK, PURPLE, GLASS = (231, 160, 196), (118, 66, 142), (243, 242, 245)
INCHES, CENTIMETRES = 2, 3

Rgb = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Field = tuple[int, int, int, bytes]  # tag, type, count, and the value or a long value's offset
Damage = Literal["unreadable", "silent", "missing"]
Ratio = float | tuple[int, int]  # a number, or numerator and denominator as they shall stand in the file


@dataclass(frozen=True, eq=False)
class GigapixelSlide:
    """A slide of `write_gigapixel_slide`.

    Attributes:
        downsamples: of each level against level 0, starting with 1.
        tissue: [ceil(height / tile_px), ceil(width / tile_px)] bool, which level-0 tiles are tissue.
    """

    path: Path
    height: int
    width: int
    mpp: float | None
    tile_px: int
    downsamples: tuple[int, ...]
    tissue: Mask


@dataclass(frozen=True, eq=False)
class MarkerSlide:
    """A slide of `write_marker_slide`; `level0` is its truth, [height, width, 3] uint8."""

    path: Path
    level0: Rgb
    mpp: float | tuple[float, float]
    markers: tuple[tuple[int, int], ...]
    marker_px: int
    colour: tuple[int, int, int]

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """The markers as half-open (top, left, bottom, right) in level-0 px, in the order given."""
        return [_box(centre, self.marker_px) for centre in self.markers]


def write_gigapixel_slide(
    path: Path,
    height: int,
    width: int,
    *,
    mpp: float | None,
    tile_px: int = 256,
    tissue_fraction: float = 0.05,
    blobs: int = 5,
    seed: int = 0,
    downsamples: Sequence[int] = (4, 16, 64),
    tissue_rgb: Rgb | None = None,
    quality: int = 85,
) -> GigapixelSlide:
    """Write a JPEG BigTIFF pyramid in which equal tiles are stored once, so that any size is a small file.

    A level-0 tile is wholly tissue or wholly glass. Coarser levels are exact means of level 0 before JPEG.

    Args:
        mpp: micrometres per pixel; None writes no resolution.
        tissue_fraction: of the level-0 tiles, met to the nearest tile.
        blobs: how many connected pieces of tissue are grown; they may touch.
        downsamples: of the levels above level 0, each a divisor of `tile_px`.
        tissue_rgb: [n * tile_px, m * tile_px, 3] uint8, repeated over the slide; None makes a pink texture
            of 2 x 2 tiles. Other n and m than powers of two cost file size.
    """
    if any(tile_px % factor for factor in downsamples):
        raise ValueError(f"downsamples {tuple(downsamples)} must divide tile_px {tile_px}, such as 4, 16, 64")
    rng = np.random.default_rng(seed)
    texture = tissue_texture(2 * tile_px, rng) if tissue_rgb is None else tissue_rgb
    if texture.shape[0] % tile_px or texture.shape[1] % tile_px:
        raise ValueError(f"tissue_rgb is {texture.shape}; expected whole tiles of {tile_px} px")
    tissue = tissue_blobs(-(-height // tile_px), -(-width // tile_px), tissue_fraction, blobs, rng)
    glass = _noisy(GLASS, (tile_px, tile_px), 1.5, rng)
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        link = 8
        for factor in (1, *downsamples):
            tiles = _write_tiles(file, tissue, shrink(texture, factor), shrink(glass, factor), tile_px, quality)
            size = (-(-height // factor), -(-width // factor))
            link = _write_directory(file, link, _jpeg_fields(size, tile_px, factor, mpp, tiles), big=True)
    return GigapixelSlide(path, height, width, mpp, tile_px, (1, *downsamples), tissue)


def write_marker_slide(
    path: Path,
    height: int,
    width: int,
    *,
    mpp: float | tuple[float, float],
    markers: Sequence[tuple[int, int]],
    marker_px: int,
    colour: tuple[int, int, int] = (0, 255, 0),
    downsamples: Sequence[int] = (2, 4),
    tile_px: int = 256,
    glass_px: int = 0,
    compression: Compression | None = "deflate",
    seed: int = 0,
) -> MarkerSlide:
    """Write a slide of pink tissue with plain square markers at known places, lossless unless told otherwise.

    Args:
        markers: (y, x) level-0 px of the centres; a marker starts at y - marker_px // 2, x - marker_px // 2.
        downsamples: of the levels above level 0, such as (2, 4) or (3, 7).
        glass_px: width of a frame of empty glass round the tissue.
    """
    rng = np.random.default_rng(seed)
    texture = tissue_texture(512, rng)
    level0 = np.tile(texture, (-(-height // 512), -(-width // 512), 1))[:height, :width]
    if glass_px:
        frame = np.ones((height, width), np.bool_)
        frame[glass_px : height - glass_px, glass_px : width - glass_px] = False
        level0[frame] = _noisy(GLASS, (int(frame.sum()),), 1.5, rng)
    for centre in markers:
        top, left, bottom, right = _box(centre, marker_px)
        if top < 0 or left < 0 or bottom > height or right > width:
            raise ValueError(f"a marker of {marker_px} px at {centre} leaves the slide of {height} x {width} px")
        level0[top:bottom, left:right] = colour
    write_slide(path, level0, mpp=mpp, tile_px=tile_px, downsample=tuple(downsamples), compression=compression)
    return MarkerSlide(path, level0, mpp, tuple(markers), marker_px, colour)


def corrupt_tile(src: Path, dst: Path, level: int, row: int, col: int, *, damage: Damage = "unreadable") -> None:
    """Copy a tiled TIFF with exactly one encoded tile damaged.

    The damaged bytes are appended and the tile's offset points there: tiles that share its bytes stay whole.

    Args:
        level: page of the TIFF; row and col count its tiles.
        damage: "unreadable" complements every byte, so that no JPEG marker or zlib header is left; "silent"
            flips a bit of the bytes in the second half that neither are nor become part of a JPEG marker;
            "missing" leaves no bytes at all, but an offset: without one too, it would be told to be glass. What
            OpenSlide makes of each is told above.
    """
    with tifffile.TiffFile(src) as tiff:
        page, order = cast(tifffile.TiffPage, tiff.pages[level]), tiff.byteorder
        if page.compression == 1:
            raise ValueError(f"{src} is not compressed, so any bytes decode; write it with 'jpeg' or 'deflate'")
        rows, cols = -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
        if not (0 <= row < rows and 0 <= col < cols):
            raise ValueError(f"{src} level {level} has {rows} x {cols} tiles, so none at {(row, col)}")
        index = row * cols + col
        start, count = page.dataoffsets[index], page.databytecounts[index]
        slots = [_slot(page, name, index) for name in ("TileOffsets", "TileByteCounts")]
    shutil.copyfile(src, dst)
    with dst.open("r+b") as file:
        file.seek(start)
        tile = file.read(count)
        moved = file.seek(0, 2)
        if damage == "missing":
            count = 0
        else:
            file.write(_flip_scan(tile) if damage == "silent" else bytes(255 - byte for byte in tile))
        for (place, kind), value in zip(slots, (moved, count), strict=True):
            file.seek(place)
            file.write(struct.pack(order + kind, value))


def truncate(src: Path, dst: Path, fraction: float) -> None:
    """Copy the first `fraction` (0..1) of a file's bytes, as a broken transfer leaves them."""
    content = src.read_bytes()
    dst.write_bytes(content[: round(len(content) * fraction)])


def set_resolution(src: Path, dst: Path, x: Ratio, y: Ratio, unit: int | None = CENTIMETRES) -> None:
    """Copy a little-endian TIFF with other resolution tags on every page.

    Args:
        x, y: pixels per unit, a number or (numerator, denominator) for ratios such as 0/0; negative ones
            are written as SRATIONAL, which TIFF does not allow for this tag.
        unit: 1 none, 2 inch, 3 centimetre, any other as a broken writer leaves it; None writes no tag.
    """
    fields = [_ratio_field(282, x), _ratio_field(283, y)]
    _rewrite(src, dst, fields + ([] if unit is None else [(296, 3, 1, struct.pack("<H", unit))]))


def strip_mpp(src: Path, dst: Path) -> None:
    """Copy a little-endian TIFF without resolution tags, so that OpenSlide knows no mpp."""
    _rewrite(src, dst, [])


def tissue_texture(side_px: int, rng: np.random.Generator) -> Rgb:
    """Pink stroma with purple nuclei, [side_px, side_px, 3] uint8, seamless when repeated."""
    nuclei = _smooth_noise(side_px, 4, rng)
    stroma = _smooth_noise(side_px, 24, rng)
    weight = np.clip(1.5 * nuclei - 0.8, 0, 1)[..., None]
    colour = np.array(PINK) + 10 * stroma[..., None] + (np.array(PURPLE) - np.array(PINK)) * weight
    rgb: Rgb = np.clip(colour + rng.normal(0, 5, colour.shape), 0, 255).astype(np.uint8)
    return rgb


def tissue_blobs(rows: int, cols: int, fraction: float, blobs: int, rng: np.random.Generator) -> Mask:
    """[rows, cols] bool with round(fraction * rows * cols) True, in `blobs` star-shaped pieces."""
    y, x = np.mgrid[:rows, :cols]
    reach = np.full((rows, cols), np.inf)
    for _ in range(blobs):
        centre_y, centre_x = rng.uniform(0.15, 0.85, 2) * (rows, cols)
        angle = np.arctan2(y - centre_y, x - centre_x)
        waves = zip(range(2, 6), rng.uniform(0, 0.12, 4), rng.uniform(0, 2 * np.pi, 4), strict=True)
        radius = 1 + sum(height * np.cos(k * angle + phase) for k, height, phase in waves)
        reach = np.minimum(reach, np.hypot(y - centre_y, x - centre_x) / radius)
    mask = np.zeros(rows * cols, np.bool_)
    mask[np.argsort(reach, axis=None, kind="stable")[: round(fraction * rows * cols)]] = True
    return mask.reshape(rows, cols)


def _smooth_noise(side_px: int, sigma_px: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Periodic noise with mean 0 and standard deviation 1."""
    frequency = np.fft.fftfreq(side_px)
    gaussian = np.exp(-2 * (np.pi * sigma_px) ** 2 * (frequency[:, None] ** 2 + frequency**2))
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((side_px, side_px))) * gaussian).real
    scaled: npt.NDArray[np.float64] = (noise - noise.mean()) / noise.std()
    return scaled


def _noisy(colour: tuple[int, int, int], shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> Rgb:
    noise = np.rint(rng.normal(colour, sigma, (*shape, 3)))
    return np.clip(noise, 0, 255).astype(np.uint8)


def _box(centre: tuple[int, int], side_px: int) -> tuple[int, int, int, int]:
    top, left = centre[0] - side_px // 2, centre[1] - side_px // 2
    return top, left, top + side_px, left + side_px


def _flip_scan(tile: bytes) -> bytes:
    flipped = bytearray(tile)
    for at in range(len(tile) // 2, len(tile) - 2):
        if 255 not in (tile[at - 1], tile[at], tile[at] ^ 64):
            flipped[at] ^= 64
    return bytes(flipped)


def _slot(page: tifffile.TiffPage, name: str, index: int) -> tuple[int, str]:
    """Where in the file item `index` of a tag's array stands, and its struct type."""
    tag = page.tags[name]
    kind = {3: "H", 4: "I", 16: "Q"}[int(tag.dtype)]
    return tag.valueoffset + index * struct.calcsize(kind), kind


# --- TIFF 6.0 and BigTIFF directories -----------------------------------------------------------------


def _write_tiles(
    file: BinaryIO, tissue: Mask, texture: Rgb, glass: Rgb, tile_px: int, quality: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
    """Append a level's distinct tiles; return the offset and byte count of each tile in row order.

    A level's tile is a mosaic of cells, one for each level-0 tile under it. Two tiles are equal when their
    cells are tissue in the same places and the repeated texture starts at the same cell.
    """
    cell_px = len(glass)
    factor = tile_px // cell_px
    period = (texture.shape[0] // cell_px, texture.shape[1] // cell_px)
    canvas = np.tile(texture, (-(-tile_px // len(texture)) + 1, -(-tile_px // texture.shape[1]) + 1, 1))
    empty = np.tile(glass, (factor, factor, 1))
    known: dict[tuple[int, int, bytes], tuple[int, int]] = {}
    placed = []
    for top in range(0, tissue.shape[0], factor):
        for left in range(0, tissue.shape[1], factor):
            cells = np.zeros((factor, factor), np.bool_)
            under = tissue[top : top + factor, left : left + factor]
            cells[: under.shape[0], : under.shape[1]] = under
            phase = (top % period[0], left % period[1]) if under.any() else (0, 0)
            key = (*phase, cells.tobytes())
            if key not in known:
                y, x = phase[0] * cell_px, phase[1] * cell_px
                where = cells.repeat(cell_px, 0).repeat(cell_px, 1)[..., None]
                rgb = np.where(where, canvas[y : y + tile_px, x : x + tile_px], empty)
                encoded = imagecodecs.jpeg8_encode(rgb, level=quality, colorspace="RGB", outcolorspace="YCBCR")
                known[key] = (file.tell(), file.write(encoded))
            placed.append(known[key])
    offsets, counts = zip(*placed, strict=True)
    return np.array(offsets, "<u8"), np.array(counts, "<u4")


def _jpeg_fields(
    size: tuple[int, int],
    tile_px: int,
    factor: int,
    mpp: float | None,
    tiles: tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]],
) -> list[Field]:
    """The directory of one level of `size` (height, width) px in a BigTIFF."""
    offsets, counts = tiles
    fields = [
        (254, 4, 1, struct.pack("<I", int(factor > 1))),  # NewSubfileType: reduced
        (256, 4, 1, struct.pack("<I", size[1])),
        (257, 4, 1, struct.pack("<I", size[0])),
        (258, 3, 3, struct.pack("<3H", 8, 8, 8)),
        (259, 3, 1, struct.pack("<H", 7)),  # JPEG
        (262, 3, 1, struct.pack("<H", 6)),  # YCbCr
        (277, 3, 1, struct.pack("<H", 3)),
        (284, 3, 1, struct.pack("<H", 1)),
        (322, 4, 1, struct.pack("<I", tile_px)),
        (323, 4, 1, struct.pack("<I", tile_px)),
        (324, 16, len(offsets), offsets.tobytes()),
        (325, 4, len(counts), counts.tobytes()),
        (530, 3, 2, struct.pack("<2H", 2, 2)),  # chroma subsampling
    ]
    if mpp is not None:
        ratio = 1e4 / (mpp * factor)
        fields += [
            _ratio_field(282, ratio),
            _ratio_field(283, ratio),
            (296, 3, 1, struct.pack("<H", CENTIMETRES)),
        ]
    return fields


def _ratio_field(tag: int, ratio: Ratio) -> Field:
    """A RATIONAL, or an SRATIONAL when a part of it is negative."""
    if isinstance(ratio, tuple):
        top, bottom = ratio
    else:
        finest = max(1, 2**31 // (int(abs(ratio)) + 1))  # both parts fit into 32 bits
        top, bottom = Fraction(ratio).limit_denominator(finest).as_integer_ratio()
    kind, layout = (10, "<2i") if top < 0 or bottom < 0 else (5, "<2I")
    return tag, kind, 1, struct.pack(layout, top, bottom)


def _write_directory(file: BinaryIO, link: int, fields: Sequence[Field], *, big: bool) -> int:
    """Append a directory, make the one before point at it, and return where its pointer to the next is.

    Args:
        link: place in the file of the pointer to this directory.
        fields: entries in any order; values which do not fit into an entry are appended.
    """
    number, entry, pointer = ("<Q", "<HHQ", "<Q") if big else ("<H", "<HHI", "<I")
    room = struct.calcsize(pointer)
    body = b""
    for tag, kind, count, value in sorted(fields):
        if len(value) > room:
            place = _align(file)
            file.write(value)
            value = struct.pack(pointer, place)
        body += struct.pack(entry, tag, kind, count) + value.ljust(room, b"\0")
    start = _align(file)
    file.write(struct.pack(number, len(fields)) + body)
    next_link = file.tell()
    file.write(bytes(room))
    file.seek(link)
    file.write(struct.pack(pointer, start))
    file.seek(0, 2)
    return next_link


def _rewrite(src: Path, dst: Path, resolution: Sequence[Field]) -> None:
    """Copy a little-endian TIFF with these entries in place of every directory's resolution tags."""
    shutil.copyfile(src, dst)
    with dst.open("r+b") as file:
        order, version = struct.unpack("<2sH", file.read(4))
        if order != b"II":
            raise ValueError(f"{src} is no little-endian TIFF; its first bytes are {order!r}")
        big = version == 43
        link = 8 if big else 4
        directory = _read_pointer(file, link, big)
        while directory:
            fields, next_link = _read_directory(file, directory, big)
            directory = _read_pointer(file, next_link, big)
            file.seek(0, 2)
            kept = [field for field in fields if field[0] not in (282, 283, 296)]
            link = _write_directory(file, link, [*kept, *resolution], big=big)


def _read_directory(file: BinaryIO, start: int, big: bool) -> tuple[list[Field], int]:
    """A directory's entries, with offsets for long values, and where its pointer to the next is."""
    number, entry = ("<Q", "<HHQ8s") if big else ("<H", "<HHI4s")
    file.seek(start)
    (count,) = struct.unpack(number, file.read(struct.calcsize(number)))
    fields: list[Field] = [struct.unpack(entry, file.read(struct.calcsize(entry))) for _ in range(count)]
    return fields, file.tell()


def _read_pointer(file: BinaryIO, place: int, big: bool) -> int:
    file.seek(place)
    return int.from_bytes(file.read(8 if big else 4), "little")


def _align(file: BinaryIO) -> int:
    """Pad the end of the file to a multiple of 8 bytes and return its place."""
    file.write(bytes(-file.seek(0, 2) % 8))
    return file.tell()


def write_marked_pair(folder: Path, height: int, width: int) -> None:
    """Write `a.tif` and `b.tif`, slides with a marker and a border of glass that differ in their noise."""
    folder.mkdir()
    for seed, name in enumerate(("a.tif", "b.tif")):
        write_marker_slide(
            folder / name, height, width, mpp=0.25, markers=[(70, 90)], marker_px=16, glass_px=20, seed=seed
        )
