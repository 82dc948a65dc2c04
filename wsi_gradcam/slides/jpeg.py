"""JPEG tiles decoded to where the decoder writes fastest; what is decoded is tifffile's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from imagecodecs import jpeg_decode
from tifffile import COMPRESSION, PHOTOMETRIC

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from tifffile import TiffPage

    Decode = Callable[[bytes], NDArray[np.uint8]]

CONTIGUOUS = 1
# To addresses that are multiples of 32, libjpeg-turbo writes past the caches: a tile that is read again at once, as
# ours are, then takes half as long again (256 px: 280 us at 16 beyond such an address, 375 to 405 us at one).
LINE, BEYOND = 32, 16


def whole_tile_decoder(page: TiffPage, tile_px: tuple[int, int]) -> Decode | None:
    """A function from the bytes of a tile that lies wholly in `page` to RGB uint8 [*tile_px, 3].

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
    """An array at an address that is no multiple of `LINE`."""
    size = shape[0] * shape[1] * shape[2]
    memory = np.empty(size + LINE, np.uint8)
    start = (BEYOND - memory.ctypes.data) % LINE
    return memory[start : start + size].reshape(shape)
