"""The reader of plain PNG and JPEG images as slides of one level; micrometres per pixel must be given."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from wsi_gradcam.errors import SlideFormatError, one_line
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides.base import SlideInfo, content_digest, make_levels, pad_with_background
from wsi_gradcam.slides.tiff_samples import check_whole_jpeg
from wsi_gradcam.slides.tiff_streams import check_jpeg

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMATS = ("PNG", "JPEG")
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
WHITE = (255, 255, 255)
MAX_PX = 1 << 26  # decoded as a whole, in 0.6 GB
CONVERTED_PX = 1 << 22  # at once
NO_MPP = "an image file does not state its pixel size; give the micrometres per pixel, such as --mpp 0.25"


class PictureSlide:
    """A `Slide` that is one picture, held in memory."""

    def __init__(self, path: Path, mpp: tuple[float, float] | None = None, trust_objective: bool = False) -> None:
        self._pixels = _decoded(path)
        self._info = SlideInfo(
            path=str(path),
            levels=make_levels([self._pixels.shape[:2]]),
            mpp=mpp,
            mpp_problem="" if mpp else NO_MPP,
            vendor="picture",
            background=WHITE,
            bounds=None,
            digest=content_digest(path),
        )

    @property
    def info(self) -> SlideInfo:
        """The slide's metadata."""
        return self._info

    def read_level(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the pixels of `region` as RGB uint8 [height, width, 3]; outside the picture: white."""
        return pad_with_background(
            region, self._info.levels[level], WHITE, lambda inside: self._pixels[inside.slices].copy()
        )

    def close(self) -> None:
        """Release the memory."""
        self._pixels = self._pixels[:0]


def is_picture(path: Path) -> bool:
    """Return True for a file with the signature of PNG or JPEG."""
    with path.open("rb") as file:
        return file.read(8).startswith(SIGNATURES)


def _decoded(path: Path) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a tighter limit is checked here
            if picture.width * picture.height > MAX_PX:
                raise SlideFormatError(
                    f"{path}: an image of {picture.width} x {picture.height} px; expected at most {MAX_PX:,} px: "
                    "convert it to a tiled TIFF"
                )
            if picture.format == "JPEG":
                data = path.read_bytes()
                check_jpeg(data)
                check_whole_jpeg(data)
            ImageOps.exif_transpose(picture, in_place=True)
            return _rgb(picture)
    except SlideFormatError:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise SlideFormatError(
            f"{path}: damaged or truncated ({one_line(error)}); copy the image again from its source"
        ) from error


def _rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """Return all pixels in RGB; converted some rows at a time, since conversions need several copies."""
    picture.load()
    width, height = picture.size
    rgb = np.empty((height, width, 3), np.uint8)
    step = max(1, CONVERTED_PX // width)
    for top in range(0, height, step):
        rgb[top : top + step] = _rgb_rows(picture.crop((0, top, width, min(height, top + step))))
    return rgb


def _rgb_rows(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        gray = ((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGB", picture.size, WHITE)
        canvas.paste(picture, mask=picture.getchannel("A"))
        return np.asarray(canvas)
    return np.asarray(picture.convert("RGB"))
