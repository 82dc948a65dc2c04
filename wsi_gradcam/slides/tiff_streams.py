"""The size that compressed tiles claim, read from their own headers before any decoder sees them.

Files are untrusted: 126 KB of JPEG can be a picture of 12 GB, whatever the TIFF around it says about the size of its
tiles. A decoder allocates what the stream claims, so the stream's header is read first, and the stream is refused if it
is larger than its tile. Byte codecs (deflate, LZW, Zstandard, PackBits) are given a buffer of the tile's size by
tifffile, and stop at its end. No other codec is allowed.

Streams that say where they end must end there: some decoders fill in what is missing. (JPEG is checked by its decoder,
see `tiff_samples`; deflate, Zstandard, PNG and JPEG XL by theirs.)
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tifffile import COMPRESSION

from wsi_gradcam.errors import SlideFormatError
from wsi_gradcam.geometry import ceil_div

if TYPE_CHECKING:
    from tifffile import TiffPage

    Check = Callable[[bytes], None]

BLOCK = 16  # px, at most a JPEG block: writers may pad a tile to whole blocks
# Samples of a colour picture with alpha.
MOST_SAMPLES = 4
# A usual progressive JPEG has 10 scans. Each takes time for the whole tile, however few bytes it has.
MAX_SCANS = 64
MAX_SCANNED_PX = 10 << 26  # pixels of all scans: 10 scans of the largest picture that is read
# In JPEG 2000; a usual tile has some hundreds. An empty packet or block takes one bit in the file, and 100 bytes or
# more in memory.
MAX_PACKETS, MAX_BLOCKS, MAX_PARTS = 1 << 17, 1 << 20, 1 << 10
ANY_TILE_PX = 1 << 27
MAX_TEXTS = 8  # text chunks in a PNG: each unpacks to up to 8 MB
LZMA_BYTES = 128 << 20  # its dictionary
# Zeros at the end of the data are what a failed copy leaves. Sound data ends in zeros only if a WebP, which codes ever
# smaller fractions, ends in one flat colour: one byte for 10,000 px, as measured.
FEW_ZEROS, PX_PER_ZERO = 16, 1 << 12


@dataclass(frozen=True)
class Stream:
    """The size of the picture that a stream contains.

    Attributes:
        height, width: in px; the height is 0 if the decoder is given it.
        samples: the most samples that a pixel can have.
        header: number of bytes that determine all this: another stream that begins with them claims the same. 0 if
            there is no such number.
    """

    height: int
    width: int
    samples: int = MOST_SAMPLES
    header: int = 0


def stream_check(page: TiffPage, tile_px: tuple[int, int], samples: int) -> Check | None:
    """Return a function that raises a ValueError for the bytes of a tile that would unpack to more than `tile_px`.

    None if the codec itself stops at the end of the tile. `samples` is the number that a tile has for each pixel.

    Raises:
        SlideFormatError: the tiles use a codec whose memory cannot be limited.
    """
    if page.compression == COMPRESSION.LZW:
        return lambda data: _check_zeros(data, FEW_ZEROS)
    if page.compression in (COMPRESSION.ZSTD, COMPRESSION.ZSTD_DEPRECATED):
        return _check_zstd
    if page.compression in BOUNDED:
        return None
    if page.compression == COMPRESSION.LZMA:
        size = tile_px[0] * tile_px[1] * samples * (page.dtype.itemsize if page.dtype is not None else 1)
        return lambda data: _check_lzma(data, size)
    if page.compression not in READERS:
        name = COMPRESSION(page.compression).name if page.compression in list(COMPRESSION) else page.compression
        raise SlideFormatError(
            f"tiles are compressed with {name}, which does not state its size in memory; convert it to JPEG, JPEG 2000 "
            "or deflate"
        )
    read = READERS[page.compression]
    if read is check_jpeg and page.jpegtables and any(_is_frame(code) for code, _ in _jpeg_segments(page.jpegtables)):
        raise SlideFormatError("damaged TIFF: its JPEG tables contain an image; copy the file again from its source")
    height, width = (ceil_div(size, BLOCK) * BLOCK for size in tile_px)
    most = max(MOST_SAMPLES, samples)
    most_zeros = FEW_ZEROS + tile_px[0] * tile_px[1] // PX_PER_ZERO

    known = b""  # usually all tiles begin alike

    def check(data: bytes) -> None:
        nonlocal known
        if known and data.startswith(known):
            return
        found = read(data)
        pixels = (found.height or tile_px[0]) * found.width
        if found.samples > most or pixels * found.samples > height * width * most:
            raise ValueError(
                f"the compressed image has {found.width} x {found.height} px of {found.samples} samples, its tile "
                f"{tile_px[1]} x {tile_px[0]} px"
            )
        if read is check_jpeg and found.samples != samples:
            raise ValueError(f"the compressed image has {found.samples} samples, its tile {samples}")
        if read in (_webp, _jpeg_xr):
            _check_zeros(data, most_zeros)
        known = data[: found.header]

    return check


def _check_zeros(data: bytes, most: int) -> None:
    """Raise a ValueError for data that ends in more zeros than sound data does."""
    if len(data) > most and not any(data[-most - 1 :]):
        raise ValueError(f"its data ends with {len(data) - len(data.rstrip(bytes(1))):,} zeros")


def check_jpeg(data: bytes) -> Stream:
    """Return the size in the frame header of a JPEG (ITU-T T.81, B.2.2).

    Raises:
        ValueError: there is no frame, or several, or more scans than any camera or scanner makes.
    """
    frame, scan = None, None
    for code, place in _jpeg_segments(data):
        if code == SCAN:
            scan = place
        elif _is_frame(code):
            if frame is not None:
                raise ValueError("a JPEG of several frames, expected one")
            frame = code, place
    if frame is None:
        raise ValueError("a JPEG without a frame")
    height, width, samples = FRAME.unpack_from(data, frame[1] + 3)
    # Decoders look for further scans only if the first is not complete; counting takes half as long as decoding.
    is_whole = scan is not None and frame[0] not in PROGRESSIVE and data[scan + 2] == samples
    if not is_whole and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, expected at most {MAX_SCANS}")
    if not is_whole and data.count(b"\xff\xda") * height * width > MAX_SCANNED_PX:
        raise ValueError(f"a JPEG of {width} x {height} px in too many scans for its size")
    return Stream(height, width, samples, scan + 3 if is_whole and scan is not None else 0)


SCAN, END, PROGRESSIVE = 0xDA, 0xD9, (0xC2, 0xC6, 0xCA, 0xCE)
FRAME = struct.Struct(">HHB")


def _is_frame(code: int) -> bool:
    return 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the code, and the position of the length, of each segment up to the first scan, as libjpeg finds them."""
    place, size = 2, len(data)
    while (place := data.find(b"\xff", place)) >= 0:
        while place < size and data[place] == 0xFF:
            place += 1
        if place + 3 > size:
            return
        code = data[place]
        place += 1
        if code == END:
            return
        if code > 1 and not 0xD0 <= code <= 0xD8:  # those stand alone
            yield code, place
            if code == SCAN:
                return
            place += data[place] << 8 | data[place + 1]


J2K_START, JP2_START = b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"
SIZ, COD, COC, SOT, SOD, EOC = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9


def _jpeg2000(data: bytes) -> Stream:
    """Return the size in the marker SIZ (ITU-T T.800, A.5.1), after checking how finely the picture is divided."""
    start = 0
    if data.startswith(JP2_START):
        boxes = list(_boxes(data))
        start = next((place for kind, place, _ in boxes if kind == b"jp2c"), len(data))
        if b"pclr" in data[:start]:  # a palette, with up to 255 samples per pixel
            raise ValueError("a JPEG 2000 with a palette, which no slide has")
    if data[start : start + 4] != J2K_START:
        raise ValueError("not a JPEG 2000 stream")
    right, bottom, left, top, part_width, part_height, from_x, from_y, samples = struct.unpack_from(
        ">8IH", data, start + 8
    )
    size = (bottom - top, right - left)
    if min(size) < 1 or min(part_width, part_height) < 1 or from_x > left or from_y > top:
        raise ValueError(f"a JPEG 2000 of {size[1]} x {size[0]} px in tiles of {part_width} x {part_height}")
    parts = (ceil_div(bottom - from_y, part_height), ceil_div(right - from_x, part_width))
    found = Stream(*size, samples)
    if size[0] * size[1] <= ANY_TILE_PX:  # otherwise it is refused for its size
        _check_fine(data, start, found, parts)
        _check_ends(data, start)
    return found


def turns_into_rgb(data: bytes) -> bool:
    """Return whether a JPEG 2000 stream's decoder turns its components into RGB (ITU-T T.800, G.2 and G.3)."""
    start = max(0, data.find(J2K_START))
    return next((data[place + 6] == 1 for code, place in _j2k_segments(data, start) if code == COD), False)


def _check_fine(data: bytes, start: int, found: Stream, parts: tuple[int, int]) -> None:
    """Raise a ValueError if a picture is divided into so many pieces that they cost more than its pixels."""
    layers, precincts, blocks = 1, 0, 0
    wide = found.samples > 256  # numbers of components take two bytes
    for code, place in _j2k_segments(data, start):
        if code == COD:
            layers = max(layers, int.from_bytes(data[place + 4 : place + 6], "big"))
            own, style = data[place + 2] & 1, place + 7
        else:
            own, style = data[place + 3 + wide] & 1, place + 4 + wide
        levels, block_width, block_height = data[style], data[style + 1], data[style + 2]
        sizes = data[style + 5 : style + 6 + levels] if own else b""
        precincts = max(precincts, sum(_precincts(found, parts, levels, sizes)))
        area = 1 << (block_width + block_height + 4)
        blocks = max(blocks, found.height * found.width // area)
    count = parts[0] * parts[1]
    if count > MAX_PARTS or layers * precincts * found.samples > MAX_PACKETS or blocks * found.samples > MAX_BLOCKS:
        raise ValueError(
            f"a JPEG 2000 of {count:,} tiles, {layers:,} layers, {precincts:,} precincts and {blocks:,} blocks, more "
            "than a tile of a slide has"
        )


def _check_ends(data: bytes, start: int) -> None:
    """Raise a ValueError if a picture's tiles are not followed by its end, or by the end of the data."""
    place = start + 2
    while place + 12 <= len(data):
        code, length = struct.unpack_from(">HH", data, place)
        (part,) = struct.unpack_from(">I", data, place + 6) if code == SOT else (2 + length,)
        if code == EOC or (code == SOT and not part):
            break
        if not 0xFF01 <= code <= 0xFFFE:
            raise ValueError(f"a JPEG 2000 with {code:04x} where a tile or the end was expected")
        place += part
    if place != len(data) and data.find(EOC.to_bytes(2, "big"), place) < 0:
        raise ValueError("a JPEG 2000 without its end")


def _precincts(found: Stream, parts: tuple[int, int], levels: int, sizes: bytes) -> Iterator[int]:
    """Yield an upper bound of the precincts in each resolution of one component (ITU-T T.800, B.6)."""
    for number in range(levels + 1):
        size = sizes[number] if number < len(sizes) else 0xFF
        down = levels - number
        rows, columns = (
            ceil_div(ceil_div(px, 1 << down), 1 << power) + count
            for px, power, count in zip((found.height, found.width), (size >> 4, size & 15), parts, strict=True)
        )
        yield rows * columns


def _j2k_segments(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yield the code, and the position of the length, of COD and COC in the main header and in the tiles' headers."""
    place, part_ends = start + 2, len(data)
    while place + 4 <= len(data):
        code, length = struct.unpack_from(">HH", data, place)
        if code == SOD:
            place = max(place + 2, part_ends)
            continue
        if code == SOT:
            (part,) = struct.unpack_from(">I", data, place + 6)
            part_ends = place + part if part else len(data)
            if part and part < length + 2:
                raise ValueError("a JPEG 2000 whose tiles overlap")
        if code in (COD, COC) and place + length <= len(data):
            yield code, place + 2
        place += 2 + max(2, length)


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, start and end of each box's content (ITU-T T.800, I.4; JPEG XL has the same boxes)."""
    place = 0
    while place + 8 <= len(data):
        length, kind, inside = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8], place + 8
        if length == 1:
            length, inside = int.from_bytes(data[inside : inside + 8], "big"), place + 16
        end = len(data) if length == 0 else place + length
        if end < inside:
            raise ValueError("a box that ends before it begins")
        yield kind, inside, min(end, len(data))
        place = end


class _Bits:
    """Reader of the fields of a JPEG XL header, lowest bit first (ISO/IEC 18181-1, B.2)."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        """Return the next number of `count` bits."""
        self._left -= count
        if self._left < 0:
            raise ValueError("a JPEG XL that ends in its header")
        found = self._value & ((1 << count) - 1)
        self._value >>= count
        return found

    def choose(self, *choices: tuple[int, int]) -> int:
        """Return a number coded in one of four ways, (least, bits)."""
        least, count = choices[self.take(2)]
        return least + self.take(count)


JXL_START, JXL_BOXES = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
JXL_HEADER = 64  # bytes, more than are read
COLOURS = 3
RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def _jpeg_xl(data: bytes) -> Stream:
    """Return the size in the size and image headers (ISO/IEC 18181-1, D.2 and D.3)."""
    head = data[:JXL_HEADER]
    if data.startswith(JXL_BOXES):
        boxes = ((kind, data[begin : min(end, begin + JXL_HEADER)]) for kind, begin, end in _boxes(data))
        parts = (found[4 * (kind == b"jxlp") :] for kind, found in boxes if kind in (b"jxlc", b"jxlp"))
        head = b"".join(parts)[:JXL_HEADER]
    if not head.startswith(JXL_START):
        raise ValueError("not a JPEG XL stream")
    bits = _Bits(head[2:])
    height, width = _jxl_size(bits)
    return Stream(height, width, COLOURS if bits.take(1) else COLOURS + _jxl_extra(bits))


def _jxl_size(bits: _Bits) -> tuple[int, int]:
    """Return (height, width) from a size header."""
    sides = ((1, 9), (1, 13), (1, 18), (1, 30))
    small = bits.take(1)
    height = 8 * (bits.take(5) + 1) if small else bits.choose(*sides)
    if ratio := bits.take(3):
        more, less = RATIOS[ratio - 1]
        return height, height * more // less
    return height, 8 * (bits.take(5) + 1) if small else bits.choose(*sides)


def _jxl_extra(bits: _Bits) -> int:
    """Return the number of channels besides colour; raises a ValueError for animations."""
    if bits.take(1):
        bits.take(3)  # orientation
        if bits.take(1):
            _jxl_size(bits)  # the size at which it should be shown
        if bits.take(1) or bits.take(1):
            raise ValueError("a JPEG XL with a preview or several images, expected one")
    depths = ((32, 0), (16, 0), (24, 0), (1, 6)) if bits.take(1) else ((8, 0), (10, 0), (12, 0), (1, 6))
    if bits.choose(*depths) and depths[0][0] == 32:
        bits.take(4)  # of the exponent
    bits.take(1)
    return bits.choose((0, 0), (1, 0), (2, 4), (1, 12))


def _webp(data: bytes) -> Stream:
    """Return the size in the chunks (RFC 9649)."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("not a WebP")
    sizes = [size for size in _webp_sizes(data) if size]
    if not sizes:
        raise ValueError("a WebP without an image")
    return Stream(max(height for height, _ in sizes), max(width for _, width in sizes))


def _webp_sizes(data: bytes) -> Iterator[tuple[int, int] | None]:
    place = 12
    while place + 18 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        inside = data[place + 8 : place + 18]
        if kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", inside, 6)
            yield height & 0x3FFF, width & 0x3FFF
        elif kind == b"VP8L":
            packed = int.from_bytes(inside[1:5], "little")
            yield (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1
        elif kind == b"VP8X":
            yield int.from_bytes(inside[7:10], "little") + 1, int.from_bytes(inside[4:7], "little") + 1
        elif kind in (b"ANIM", b"ANMF"):
            raise ValueError("a WebP of several images, expected one")
        place += 8 + length + length % 2


def _png(data: bytes) -> Stream:
    """Return the size in IHDR (PNG, 11.2.1)."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise ValueError("not a PNG")
    if data.count(b"zTXt") + data.count(b"iTXt") > MAX_TEXTS:
        raise ValueError("a PNG with more text than a tile has")
    width, height = struct.unpack_from(">II", data, 16)
    return Stream(height, width)


def _jpeg_xr(data: bytes) -> Stream:
    """Return the larger of the sizes in the file (ITU-T T.832, Annex A) and in its stream (8.3)."""
    stream = data.find(b"WMPHOTO\0")
    if stream < 0 or data.count(b"WMPHOTO\0") > 2 or len(data) < stream + 20:  # two: colour and alpha
        raise ValueError("not a JPEG XR")
    sizes = []
    while stream >= 0:
        short = data[stream + 10] & 0x80
        width, height = struct.unpack_from(">HH" if short else ">II", data, stream + 12)
        sizes.append((height + 1, width + 1))
        stream = data.find(b"WMPHOTO\0", stream + 8)
    _check_xr_ends(data)
    return Stream(max(height for height, _ in sizes), max(width for _, width in sizes))


XR_START, XR_ENTRY = b"II\xbc", struct.Struct("<HHII")
XR_OFFSET, XR_COUNT, XR_ALPHA = 0xBCC0, 0xBCC1, 0xBCC2  # the last: offset of alpha, whose count may be too large


def _check_xr_ends(data: bytes) -> None:
    """Raise a ValueError if a picture ends, or its alpha begins, beyond the data (ITU-T T.832, A.7)."""
    if not data.startswith(XR_START):
        return
    (place,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, place)
    entries = (XR_ENTRY.unpack_from(data, place + 2 + XR_ENTRY.size * number) for number in range(count))
    said = {tag: value for tag, _, _, value in entries}
    end = max(said.get(XR_OFFSET, 0) + said.get(XR_COUNT, 0), said.get(XR_ALPHA, 0))
    if end > len(data):
        raise ValueError(f"a JPEG XR that ends {end - len(data):,} bytes before its stated end")


ZSTD_BLOCK, ZSTD_PACKED = 3, 2  # bytes of a block's header, and the type of blocks that are compressed
ZSTD_DICTIONARY, ZSTD_SIZE = (0, 1, 2, 4), (0, 2, 4, 8)  # bytes of the fields in the frame's header, by its first byte


def _check_zstd(data: bytes) -> None:
    """Raise a ValueError for data whose last block is compressed and ends in zeros (RFC 8878, 3.1.1).

    Compressed blocks end in a stream that is read backwards from its last 1 bit.
    """
    if len(data) < FEW_ZEROS or any(data[-FEW_ZEROS - 1 :]):
        return
    first = data[4]
    single = first >> 5 & 1
    place = 6 - single + ZSTD_DICTIONARY[first & 3] + (ZSTD_SIZE[first >> 6] or single)
    kind, is_last = -1, False
    while not is_last and place + ZSTD_BLOCK <= len(data):
        header = int.from_bytes(data[place : place + ZSTD_BLOCK], "little")
        is_last, kind = bool(header & 1), header >> 1 & 3
        place += ZSTD_BLOCK + (1 if kind == 1 else header >> 3)
    if kind == ZSTD_PACKED:
        _check_zeros(data, FEW_ZEROS)


def _check_lzma(data: bytes, size: int) -> None:
    """Raise a ValueError if data unpacks to more than `size` bytes, or needs a larger dictionary than any tile."""
    try:
        decoder = lzma.LZMADecompressor(memlimit=LZMA_BYTES)
        found = len(decoder.decompress(data, max_length=size + 1))
    except lzma.LZMAError as error:
        raise ValueError(f"not LZMA data ({error})") from error
    if found <= size and not decoder.eof:
        raise ValueError("LZMA data without an end")
    if found > size:
        raise ValueError(f"more than {size:,} bytes in the tile")


C = COMPRESSION
# Codecs that tifffile unpacks into a buffer of the tile's size.
BOUNDED = frozenset({C.NONE, C.LZW, C.ADOBE_DEFLATE, C.DEFLATE, C.PACKBITS, C.ZSTD, C.ZSTD_DEPRECATED})
READERS: dict[int, Callable[[bytes], Stream]] = {
    **dict.fromkeys((C.OJPEG, C.JPEG, C.ALT_JPEG, C.JPEG_LOSSY), check_jpeg),
    **dict.fromkeys((C.APERIO_JP2000_YCBC, C.JPEG_2000_LOSSY, C.APERIO_JP2000_RGB, C.JPEG2000), _jpeg2000),
    **dict.fromkeys((C.JPEGXL, C.JPEGXL_DNG), _jpeg_xl),
    **dict.fromkeys((C.WEBP, C.WEBP_DEPRECATED), _webp),
    **dict.fromkeys((C.JPEGXR, C.JPEGXR_NDPI), _jpeg_xr),
    C.PNG: _png,
}
