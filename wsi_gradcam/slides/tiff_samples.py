"""Samples of a TIFF page as 8-bit RGB, by the rules of the TIFF 6.0 specification.

JPEG tiles are decoded strictly, into memory at the address where the decoder writes fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, SAMPLEFORMAT

from wsi_gradcam.errors import SlideContentError, SlideFormatError
from wsi_gradcam.geometry import ceil_div

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tifffile import TiffPage

    from wsi_gradcam.slides.base import Channels

    ToRGB = Callable[[NDArray[np.generic]], NDArray[np.uint8]]
    Decode = Callable[[bytes, int], NDArray[np.uint8] | None]


WHITE = 255
# Codecs whose decoder turns YCbCr into RGB; others would return the samples as they are.
CONVERTING = (COMPRESSION.JPEG, COMPRESSION.OJPEG, COMPRESSION.ALT_JPEG)
# Those whose decoders return RGB, or what the JPEG 2000 stream says.
JPEGS_2000 = (
    COMPRESSION.APERIO_JP2000_YCBC,
    COMPRESSION.APERIO_JP2000_RGB,
    COMPRESSION.JPEG2000,
    COMPRESSION.JPEG_2000_LOSSY,
)
GIVING_RGB = (
    *JPEGS_2000,
    COMPRESSION.WEBP,
    COMPRESSION.WEBP_DEPRECATED,
    COMPRESSION.JPEGXL,
    COMPRESSION.JPEGXL_DNG,
)
# Fax compression holds single bits: its decoder turns any other samples into noise.
FAX = (COMPRESSION.CCITTRLE, COMPRESSION.CCITT_T4, COMPRESSION.CCITT_T6)
ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
COLOURS = 3
CMYK_INKS = 1  # tag InkSet, the default
# Contributions of chroma by its value: red and blue in grey levels, green in 1/65536, rounded as in OpenSlide.
_CHROMA = np.arange(256) - 128
RED_OF_CR, BLUE_OF_CB = (np.rint(share * _CHROMA).astype(np.int32) for share in (1.402, 1.772))
GREEN_OF_CB = np.rint(65536 * (0.5 - 0.34414 * _CHROMA)).astype(np.int32)
GREEN_OF_CR = np.rint(65536 * -0.71414 * _CHROMA).astype(np.int32)


def rgb_converter(page: TiffPage, shown: Channels | None = None, full: int = 0) -> ToRGB:
    """Return a function that turns a decoded tile [h, w, samples] of `page` into RGB uint8 [h, w, 3].

    Of grey pictures that belong together, `shown` are the samples that are red, green and blue.

    Grey is repeated, white-is-zero inverted, palettes are looked up, 16 bits scaled to 8, CMYK is treated as ideal
    inks, and alpha is put on white. `full` is the brightest value of a sample; 0: the largest value of its type.

    Raises:
        SlideFormatError: the samples are not the colours of an image; the message describes them.
    """
    bits = page.dtype.itemsize * 8 if page.dtype is not None and page.dtype.kind == "u" else 0
    if bits not in (8, 16) or page.bitspersample != bits:
        raise SlideContentError(f"samples are {_kind(page)}, expected unsigned 8 or 16 bits; convert it to 8-bit RGB")
    if page.compression in FAX:
        raise SlideFormatError(
            f"{bits}-bit samples with fax compression ({COMPRESSION(page.compression).name}), which holds single bits: "
            "damaged, or not in colour or gray; copy it again from its source, or convert it to 8-bit RGB"
        )
    if shown is not None:
        order = list(shown)
        return lambda tile: eight_bits(tile[..., order], full)
    extra = len(page.extrasamples)
    colours = page.samplesperpixel - extra
    match page.photometric, colours:
        case (PHOTOMETRIC.MINISBLACK, 1):
            convert = _gray
        case (PHOTOMETRIC.MINISWHITE, 1):
            convert = _inverted
        case (PHOTOMETRIC.PALETTE, 1):
            return _palette(page)
        case (_, 3) if page.compression == COMPRESSION.APERIO_JP2000_YCBC:
            convert = _same
        case (PHOTOMETRIC.RGB, 3):
            convert = _same
        case (PHOTOMETRIC.YCBCR, 3) if page.compression in (*CONVERTING, *GIVING_RGB):
            convert = _same
        case (PHOTOMETRIC.YCBCR, 3):  # other readers may know how
            raise SlideFormatError("YCbCr samples that are not compressed as JPEG; convert it to 8-bit RGB")
        case (PHOTOMETRIC.SEPARATED, 4) if page.tags.valueof("InkSet", default=CMYK_INKS) == CMYK_INKS:
            convert = _cmyk
        case _:
            raise SlideContentError(
                f"{colours} samples of {_name(page.photometric)} are not a supported colour space; expected gray, RGB, "
                "a palette or CMYK; convert it to 8-bit RGB"
            )
    if extra > (colours > 1) and not (extra == 1 and page.extrasamples[0] in ALPHA):
        raise SlideContentError(
            f"{page.samplesperpixel} samples per pixel, {extra} of which are neither colour nor transparency, as in "
            "fluorescence; expected gray, RGB, a palette or CMYK; convert it to 8-bit RGB"
        )
    alpha = colours if extra and page.extrasamples[0] in ALPHA else None
    associated = extra > 0 and page.extrasamples[0] == EXTRASAMPLE.ASSOCALPHA

    def to_rgb(tile: NDArray[np.generic]) -> NDArray[np.uint8]:
        eight = eight_bits(tile, full)
        rgb = convert(eight[..., :colours])
        return rgb if alpha is None else _on_white(rgb, eight[..., alpha], associated)

    return to_rgb


def eight_bits(values: NDArray[Any], full: int) -> NDArray[np.uint8]:
    """Return samples of 8 or 16 bits as 8 bits, with `full` as white; 0: their type's largest value.

    Raises:
        ValueError: one is larger.
    """
    full = full or int(np.iinfo(values.dtype).max)
    if values.dtype == np.uint8 and full == 255:
        return values
    if full == 65535:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if (most := int(values.max(initial=0))) > full:
        raise ValueError(f"a sample of {most:,}, above the {full.bit_length()} bits that the file declares")
    return ((values.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)


def full_of(page: TiffPage, bits: int) -> int:
    """Return a page's brightest sample value from OME-XML's bits or the tag MaxSampleValue; 0: not stated."""
    most = page.tags.valueof("MaxSampleValue", default=0)
    most = most[0] if isinstance(most, tuple) and len(set(most)) == 1 else most
    said = bits or (int(most).bit_length() if isinstance(most, int) and most & (most + 1) == 0 else 0)
    return full_scale(page.bitspersample, said)


def full_scale(bits: int, used: int) -> int:
    """Return the brightest sample value from the number of bits and of those in use; 0: not stated."""
    return (1 << used) - 1 if 0 < used <= bits else 255 * (bits == 8)


def _kind(page: TiffPage) -> str:
    return f"{page.bitspersample} bits, {_name(SAMPLEFORMAT(page.sampleformat))}"


def _name(photometric: object) -> str:
    return str(getattr(photometric, "name", photometric))


def _same(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return tile


def _gray(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rgb: NDArray[np.uint8] = np.repeat(tile, 3, axis=2)
    return rgb


def _inverted(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return _gray(WHITE - tile)


def _cmyk(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert CMYK by ideal inks: each absorbs its share of one colour, black of all (TIFF 6.0 section 16)."""
    inks = WHITE - tile.astype(np.uint16)
    rgb: NDArray[np.uint8] = ((inks[..., :3] * inks[..., 3:] + 127) // WHITE).astype(np.uint8)
    return rgb


def is_ycc(page: TiffPage) -> bool:
    """Return whether a JPEG 2000 page is declared as YCbCr, by Aperio's codec or by TIFF."""
    if page.compression == COMPRESSION.APERIO_JP2000_YCBC:
        return page.samplesperpixel == COLOURS
    return page.photometric == PHOTOMETRIC.YCBCR and page.compression in (
        COMPRESSION.JPEG2000,
        COMPRESSION.JPEG_2000_LOSSY,
    )


def ycc_to_rgb(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert ITU-R BT.601 at full scale, as in JFIF, with OpenSlide's integer arithmetic."""
    y, cb, cr = (tile[..., i].astype(np.int32) for i in range(3))
    rgb = np.stack([y + RED_OF_CR[cr], y + ((GREEN_OF_CB[cb] + GREEN_OF_CR[cr]) >> 16), y + BLUE_OF_CB[cb]], axis=-1)
    eight: NDArray[np.uint8] = rgb.clip(0, WHITE).astype(np.uint8)
    return eight


def _palette(page: TiffPage) -> ToRGB:
    table = np.asarray(page.colormap)
    if table.ndim != 2 or len(table) != 3 or table.shape[1] < 256 or page.bitspersample != 8:
        raise SlideFormatError("a palette without its table of 256 colours; convert it to 8-bit RGB")
    colours = np.ascontiguousarray((table[:, :256] >> 8).T.astype(np.uint8))

    def look_up(tile: NDArray[np.generic]) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = colours[tile[..., 0]]
        return found

    return look_up


def _on_white(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8], associated: bool) -> NDArray[np.uint8]:
    cover = alpha[..., None].astype(np.uint32)
    tinted = rgb * (np.uint32(WHITE) if associated else cover)
    shown: NDArray[np.uint8] = ((tinted + (WHITE - cover) * WHITE + 127) // WHITE).clip(max=WHITE).astype(np.uint8)
    return shown


CONTIGUOUS = 1
# At addresses that are multiples of 32, libjpeg-turbo bypasses the caches: a tile that is read again at once, as ours
# are, then takes half as long again (256 px: 280 us at 16 bytes past such an address, 375 to 405 us at one).
LINE, BEYOND = 32, 16
JPEGS = (*CONVERTING, COMPRESSION.JPEG_LOSSY)
SOI, EOI = b"\xff\xd8", b"\xff\xd9"
BLOCK = 16  # px: writers may pad a tile to whole blocks
# Declares samples as RGB: otherwise libjpeg takes three of them for YCbCr.
ADOBE_RGB = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
TRANSFORM = 11  # bytes from Adobe's name to its colour transform
MARKS_BYTES = 1 << 10


def jpeg_decoder(page: TiffPage, tile_px: tuple[int, int]) -> Decode | None:
    """Return a function that decodes the bytes of a piece of `page` to uint8 [h, w, samples]; None if not JPEG.

    The function's second argument is 1, 2, 4 or 8: the factor by which the piece is reduced while it is decoded. Where
    libjpeg only warns (data that ends early, bytes left over, markers out of place), this is an error: libjpeg would
    fill the rest with grey. The function returns None if the bytes are sound but only tifffile knows their colours.
    """
    if page.compression not in JPEGS:
        return None
    samples = int(page.samplesperpixel) if page.planarconfig == CONTIGUOUS else 1
    in_colour = samples == 3 and page.photometric in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR)
    as_rgb = in_colour and page.photometric == PHOTOMETRIC.RGB and not page.is_jfif  # Aperio's
    tables = page.jpegtables or SOI + EOI
    head = SOI + (ADOBE_RGB if as_rgb else b"") + tables[2 : max(2, tables.rfind(EOI))]
    height, width = (ceil_div(size, BLOCK) * BLOCK for size in tile_px)
    colours = {1: "GRAY", 3: "RGB"}[samples] if samples == 1 or in_colour else ""

    def decode(data: bytes, reduction: int) -> NDArray[np.uint8] | None:
        if not data.startswith(SOI):
            raise ValueError("not a JPEG")
        whole = b"".join((head, memoryview(data)[2:]))
        if not colours or (as_rgb and _says_ycc(data)):
            check_whole_jpeg(whole)
            return None
        buffer = _between_lines((height // reduction, width // reduction, samples))
        rows, columns = tile_px[0] // reduction, tile_px[1] // reduction
        if reduction == 1:
            return decode_jpeg(whole, colours, buffer=buffer)[:rows, :columns]  # type: ignore[no-any-return, unused-ignore]
        return decode_jpeg(whole, colours, buffer=buffer, min_height=rows, min_width=columns)[:rows, :columns]  # type: ignore[no-any-return, unused-ignore]

    return decode


def _says_ycc(data: bytes) -> bool:
    """Return whether a JPEG has a marker that makes libjpeg take its samples for YCbCr."""
    adobe = data.find(b"Adobe", 0, MARKS_BYTES)
    return data.find(b"JFIF", 0, MARKS_BYTES) >= 0 or (adobe >= 0 and data[adobe + TRANSFORM] != 0)


def check_whole_jpeg(data: bytes) -> None:
    """Raise a ValueError for a JPEG if libjpeg would have to invent part of it."""
    *_, colours, _ = decode_jpeg_header(data)
    decode_jpeg(data, {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(colours, "RGB"))


def reduced_jpeg2000(data: bytes, reduction: int) -> NDArray[np.uint8] | None:
    """Return the samples of a JPEG 2000 without its finest detail, each axis shorter by a power of two.

    None if they are not 8-bit colours.
    """
    with Image.open(BytesIO(data), formats=("JPEG2000",)) as image:
        image.reduce = reduction.bit_length() - 1  # type: ignore[method-assign, assignment]
        return np.asarray(image) if image.mode == "RGB" else None


def _between_lines(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return an array at an address that is not a multiple of `LINE`."""
    size = shape[0] * shape[1] * shape[2]
    memory = np.empty(size + LINE, np.uint8)
    start = (BEYOND - memory.__array_interface__["data"][0]) % LINE  # `memory.ctypes` takes longer
    return memory[start : start + size].reshape(shape)
