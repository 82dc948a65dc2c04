"""Samples of a TIFF page as RGB of 8 bits, by the rules of the TIFF 6.0 specification.

JPEG tiles decoded to where the decoder writes fastest; what is decoded is tifffile's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from imagecodecs import jpeg_decode
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, SAMPLEFORMAT

from wsi_gradcam.errors import SlideFormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tifffile import TiffPage

    ToRGB = Callable[[NDArray[np.generic]], NDArray[np.uint8]]
    Decode = Callable[[bytes], NDArray[np.uint8]]


WHITE = 255
# Codecs whose decoder gives RGB of YCbCr; others would give the samples as they are.
CONVERTING = (COMPRESSION.JPEG, COMPRESSION.OJPEG, COMPRESSION.ALT_JPEG)
# Facsimile holds single bits: its decoder makes noise of other samples.
FAX = (COMPRESSION.CCITTRLE, COMPRESSION.CCITT_T4, COMPRESSION.CCITT_T6)
ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
CMYK_INKS = 1  # tag InkSet, the default
# Contributions of chroma by its value: red and blue in gray levels, green in 1/65536, rounded as OpenSlide's are.
_CHROMA = np.arange(256) - 128
RED_OF_CR, BLUE_OF_CB = (np.rint(share * _CHROMA).astype(np.int32) for share in (1.402, 1.772))
GREEN_OF_CB = np.rint(65536 * (0.5 - 0.34414 * _CHROMA)).astype(np.int32)
GREEN_OF_CR = np.rint(65536 * -0.71414 * _CHROMA).astype(np.int32)


def rgb_converter(page: TiffPage) -> ToRGB:
    """Return a function from a decoded tile [h, w, samples] of `page` to RGB uint8 [h, w, 3].

    Gray is repeated, white-is-zero turned over, palettes looked up, 16 bits scaled to 8, CMYK taken for ideal inks,
    alpha laid on white.

    Raises:
        SlideFormatError: samples that are no colours of an image; the message describes them.
    """
    bits = page.dtype.itemsize * 8 if page.dtype is not None and page.dtype.kind == "u" else 0
    if bits not in (8, 16) or page.bitspersample != bits:
        raise SlideFormatError(
            f"samples are {_kind(page)}, expected 8 or 16 bits without sign; convert it to 8-bit RGB"
        )
    if page.compression in FAX:
        raise SlideFormatError(
            f"{bits}-bit samples compressed as facsimile ({COMPRESSION(page.compression).name}), which holds single "
            "bits: damaged, or no picture in colour or gray; copy it again from its source, or convert it to 8-bit RGB"
        )
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
            convert = _ycbcr
        case (PHOTOMETRIC.RGB, 3):
            convert = _same
        case (PHOTOMETRIC.YCBCR, 3) if page.compression in CONVERTING:
            convert = _same
        case (PHOTOMETRIC.SEPARATED, 4) if page.tags.valueof("InkSet", default=CMYK_INKS) == CMYK_INKS:
            convert = _cmyk
        case _:
            raise SlideFormatError(
                f"{colours} samples of {_name(page.photometric)} are no colours that can be shown; expected gray, "
                "RGB, a palette or CMYK; convert it to 8-bit RGB"
            )
    alpha = colours if extra and page.extrasamples[0] in ALPHA else None
    associated = extra > 0 and page.extrasamples[0] == EXTRASAMPLE.ASSOCALPHA

    def to_rgb(tile: NDArray[np.generic]) -> NDArray[np.uint8]:
        eight = _eight_bits(tile)
        rgb = convert(eight[..., :colours])
        return rgb if alpha is None else _on_white(rgb, eight[..., alpha], associated)

    return to_rgb


def _kind(page: TiffPage) -> str:
    return f"{page.bitspersample} bits, {_name(SAMPLEFORMAT(page.sampleformat))}"


def _name(photometric: object) -> str:
    return str(getattr(photometric, "name", photometric))


def _eight_bits(tile: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return samples of 8 bits at full scale: 65535 becomes 255."""
    if tile.dtype == np.uint8:
        return tile  # type: ignore[return-value]
    return ((tile.astype(np.uint32) + 128) // 257).astype(np.uint8)


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


def _ycbcr(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert ITU-R BT.601 at full scale, as in JFIF, by OpenSlide's integer arithmetic."""
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
# To addresses that are multiples of 32, libjpeg-turbo writes past the caches: a tile that is read again at once, as
# ours are, then takes half as long again (256 px: 280 us at 16 beyond such an address, 375 to 405 us at one).
LINE, BEYOND = 32, 16


def whole_tile_decoder(page: TiffPage, tile_px: tuple[int, int]) -> Decode | None:
    """Return a function from the bytes of a tile that is wholly inside `page` to RGB uint8 [*tile_px, 3].

    None where the page's tiles are not JPEG of three colours of 8 bits. It raises whatever the decoder does.
    """
    if (page.compression, page.bitspersample, page.samplesperpixel) != (COMPRESSION.JPEG, 8, 3):
        return None
    if page.planarconfig != CONTIGUOUS or page.photometric not in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR):
        return None
    stored_as_rgb = page.photometric == PHOTOMETRIC.RGB and not page.is_jfif  # Aperio's
    return partial(_decoded, tile_px, page.jpegtables, PHOTOMETRIC.RGB if stored_as_rgb else None)


def _decoded(
    tile_px: tuple[int, int], tables: bytes | None, colours: PHOTOMETRIC | None, data: bytes
) -> NDArray[np.uint8]:
    return jpeg_decode(
        data, tables=tables, colorspace=colours, outcolorspace=PHOTOMETRIC.RGB, out=_between_lines((*tile_px, 3))
    )  # type: ignore[no-any-return, unused-ignore]


def _between_lines(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return an array at an address that is no multiple of `LINE`."""
    size = shape[0] * shape[1] * shape[2]
    memory = np.empty(size + LINE, np.uint8)
    start = (BEYOND - memory.ctypes.data) % LINE
    return memory[start : start + size].reshape(shape)
