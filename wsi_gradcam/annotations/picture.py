"""A mask drawn as a PNG: what is not black is in."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wsi_gradcam.errors import AnnotationError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# 8,000 x 8,000: a slide of 128,000 px at a sixteenth. Pillow itself warns of bombs from 89 million on.
MOST_PX = 64_000_000


def read_picture(path: Path, data: bytes) -> NDArray[np.bool_]:
    """The mask in a PNG, bool [h, w]: pixels with any colour but black (of a palette, any number but 0).

    What is wholly transparent is out.

    Raises:
        AnnotationError: not a PNG, damaged, or too large.
    """
    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 24:
        raise AnnotationError(f"{path}: not a PNG; expected a mask as PNG that covers the whole slide")
    width, height = struct.unpack(">II", data[16:24])
    if width * height > MOST_PX:
        raise AnnotationError(
            f"{path}: {height} x {width} px, expected at most {MOST_PX:,} px; a mask of a sixteenth of the slide is "
            "as fine as it is used"
        )
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return _not_black(image)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise AnnotationError(f"{path}: damaged: {' '.join(str(error).split())}; write the mask again") from error


def _not_black(image: Image.Image) -> NDArray[np.bool_]:
    """A strip at a time: all channels of a large mask at once would be four times the mask."""
    image.load()
    found = np.zeros((image.height, image.width), np.bool_)
    for top in range(0, image.height, 256):
        strip = np.asarray(image.crop((0, top, image.width, min(top + 256, image.height))))
        if image.mode in ("LA", "RGBA"):
            strip = strip[..., :-1] * (strip[..., -1:] > 0)
        found[top : top + 256] = strip.any(axis=2) if strip.ndim == 3 else strip > 0
    return found


def resized(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask at another size: a pixel is in where at least half of what it covers is."""
    gray = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
    return np.asarray(gray.resize((shape[1], shape[0]), Image.Resampling.BOX)) > 127
