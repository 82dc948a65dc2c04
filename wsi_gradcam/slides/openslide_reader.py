"""Slides through the OpenSlide library: the reader that knows every vendor. The only module with x, y order."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openslide
from PIL import Image

from wsi_gradcam.errors import SlideFormatError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides.base import SlideInfo, check_mpp, content_digest, levels_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

WHITE = (255, 255, 255)


class OpenSlideSlide:
    """A `Slide` read by OpenSlide.

    An OpenSlide handle that failed once answers every later call with the same error, so a failed read opens the
    file anew: one bad region must not cost the rest of the slide.
    """

    def __init__(self, path: Path, mpp: tuple[float, float] | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle = _open(path)
        self._info = _describe(path, self._handle, mpp)
        self._downsamples = self._handle.level_downsamples

    @property
    def info(self) -> SlideInfo:
        """What is known of the slide."""
        return self._info

    def read_level(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Pixels of `region` of `level` as RGB uint8 [height, width, 3], transparency on the background."""
        # OpenSlide wants level-0 coordinates and divides them by its own downsample, the mean of both axes.
        factor = self._downsamples[level]
        location = (round(region.x * factor), round(region.y * factor))
        handle = self._handle
        try:
            rgba = handle.read_region(location, level, (region.width, region.height))
        except openslide.OpenSlideError as error:
            self._replace(handle)
            raise SlideReadError(
                f"{self._path}: level {level}, y {region.y}, x {region.x}, {region.height} x {region.width} px "
                f"cannot be decoded: {error}"
            ) from error
        return _composite(rgba, self._info.background)

    def close(self) -> None:
        """Release the file."""
        self._handle.close()

    def _replace(self, failed: openslide.AbstractSlide) -> None:
        with self._lock:
            if self._handle is failed:  # not yet replaced by another thread
                self._handle = _open(self._path)


def _open(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideFormatError(
            f"{path}: not a slide that OpenSlide reads; expected Aperio, Hamamatsu, Leica, MIRAX, Philips, Sakura, "
            "Trestle, Ventana, Zeiss, DICOM or tiled TIFF; convert it, for example to a tiled TIFF"
        ) from error
    except openslide.OpenSlideError as error:
        raise SlideFormatError(
            f"{path}: damaged or truncated slide, OpenSlide says: {error}; copy the file again from its source"
        ) from error


def _describe(path: Path, handle: openslide.OpenSlide, mpp: tuple[float, float] | None) -> SlideInfo:
    properties: Mapping[str, str] = handle.properties
    found, problem = (mpp, "") if mpp is not None else _mpp(properties)
    return SlideInfo(
        path=str(path),
        levels=levels_of([(height, width) for width, height in handle.level_dimensions]),
        mpp=found,
        mpp_problem=problem,
        vendor=properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        background=_background(properties),
        bounds=_bounds(properties),
        # Formats of many files (MIRAX, DICOM) have their pixels elsewhere: OpenSlide's own hash covers them.
        digest=content_digest(path, properties.get(openslide.PROPERTY_NAME_QUICKHASH1, "")),
    )


def _mpp(properties: Mapping[str, str]) -> tuple[tuple[float, float] | None, str]:
    """(y, x) and an empty string, or None and what is wrong."""
    values = []
    for name in (openslide.PROPERTY_NAME_MPP_Y, openslide.PROPERTY_NAME_MPP_X):
        text = properties.get(name)
        if text is None:
            return None, f"the file has no {name}; give the micrometres per pixel with --mpp"
        try:
            value = float(text)
        except ValueError:
            return None, f"{name} is {text!r}, expected a number; give the true value with --mpp"
        if problem := check_mpp(value, name):
            return None, problem
        values.append(value)
    return (values[0], values[1]), ""


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    text = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "")
    try:
        red, green, blue = bytes.fromhex(text)
    except ValueError:
        return WHITE
    return red, green, blue


def _bounds(properties: Mapping[str, str]) -> Region | None:
    names = (
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
    )
    if not all(name in properties for name in names):
        return None
    return Region(*(int(properties[name]) for name in names))


def _composite(rgba: Image.Image, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return np.asarray(rgba.convert("RGB"))
    canvas = Image.new("RGB", rgba.size, background)
    canvas.paste(rgba, mask=alpha)
    return np.asarray(canvas)
