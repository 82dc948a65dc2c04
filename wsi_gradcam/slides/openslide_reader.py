"""The reader that uses the OpenSlide library, which knows every vendor. The only module with x, y order."""

from __future__ import annotations

import math
import re
import threading
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openslide
from PIL import Image

from wsi_gradcam.errors import SlideFormatError, SlideReadError, one_line
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.local import read_file
from wsi_gradcam.slides.base import (
    Level,
    LocalFile,
    SlideInfo,
    check_mpp,
    content_digest,
    make_levels,
    mpp_from_objective,
    pad_with_background,
)
from wsi_gradcam.slides.openslide_tiles import TileJudge
from wsi_gradcam.slides.tiff_levels import open_tiff, spacing_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

WHITE = (255, 255, 255)
# Formats whose scanners store every tile, or record which tiles of glass were left out: any other tile without data was
# lost, and OpenSlide shows both as transparent. Others (MIRAX, Philips, Leica, Ventana, ...) leave out glass without a
# record.
DENSE = frozenset({"aperio", "generic-tiff", "trestle"})


def library_version() -> str:
    """Return the version of the OpenSlide library."""
    return str(openslide.__library_version__)


class OpenSlideSlide:
    """A `Slide` read by OpenSlide.

    Attributes:
        stored_px: (height, width) of the levels, including the padding of their last tiles.

    An OpenSlide handle that has failed once answers every later call with the same error, so after a failed read the
    file is opened again: one bad region must not cost the rest of the slide.
    """

    def __init__(self, path: Path, mpp: tuple[float, float] | None = None, trust_objective: bool = False) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle = _open(path)
        info = _describe(path, self._handle, mpp)
        self.stored_px = [(height, width) for width, height in self._handle.level_dimensions]
        self._info = mpp_from_objective(info) if trust_objective else info
        self._downsamples = self._handle.level_downsamples
        self._tiles = TileJudge(path, self._info.vendor, self.stored_px)

    @property
    def info(self) -> SlideInfo:
        """The slide's metadata."""
        return self._info

    def read_level(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the pixels of `region` of `level` as RGB uint8 [height, width, 3], transparency on the background.

        Raises:
            SlideReadError: a tile is damaged or missing; the slide stays usable.
        """
        shown = region.intersect(Region(0, 0, self._info.levels[level].height, self._info.levels[level].width))
        if shown.height > 0 and shown.width > 0:
            try:
                self._tiles.check(level, shown, slack=0 if self.is_exact(level) else 1)
            except Exception as error:  # decoders raise many kinds
                raise SlideReadError(f"{self._where(level, region)} cannot be decoded: {one_line(error)}") from error
        return self.read_as_it_is(level, region)

    def read_as_it_is(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the same as `read_level`, but with whatever OpenSlide makes of damaged tiles.

        Raises:
            SlideReadError: OpenSlide itself cannot decode a tile, or one is missing.
        """

        def read(inside: Region) -> NDArray[np.uint8]:
            rgba = self._read(level, inside)
            if self._info.vendor in DENSE and rgba.getchannel("A").getextrema()[0] == 0 and self._has_lost_tiles:
                raise SlideReadError(f"{self._where(level, region)} has no data: a tile is missing from the file")
            return _composite(rgba, self._info.background)

        # OpenSlide's own padding above and to the left is a pixel off if its downsample is not an integer.
        return pad_with_background(region, self._info.levels[level], self._info.background, read)

    def is_exact(self, level: int) -> bool:
        """Return whether OpenSlide reads a level without interpolation, that is, if its downsample is an integer."""
        return float(self._downsamples[level]).is_integer()

    def close(self) -> None:
        """Release the file."""
        self._tiles.close()
        self._handle.close()

    @cached_property
    def _has_lost_tiles(self) -> bool:
        """Return True unless all tiles without data are recorded as left out; True, too, if that cannot be seen."""
        with suppress(Exception), closing(LocalFile(self._path)) as file, open_tiff(file) as parsed:  # may raise any
            pages: Any = parsed.pages
            places = [np.array([page.databytecounts, page.dataoffsets]) for page in pages if page.is_tiled]
            return not places[0].any() or any(bool((offsets[counts == 0] > 0).any()) for counts, offsets in places)
        return True

    def _read(self, level: int, region: Region) -> Image.Image:
        # OpenSlide takes level-0 coordinates and divides them by its own downsample, the mean of both axes. If that is
        # not an integer, it interpolates, up to half a level-0 pixel off.
        factor = self._downsamples[level]
        location = (round(region.x * factor), round(region.y * factor))
        size = (region.width, region.height)
        handle = self._handle
        try:
            return handle.read_region(location, level, size)
        except openslide.OpenSlideError:
            self._replace(handle)
        # The handle may have been broken by another thread's bad region: only an unshared one shows whether this one is
        # bad.
        with _open(self._path) as own:
            try:
                return own.read_region(location, level, size)
            except openslide.OpenSlideError as error:
                raise SlideReadError(f"{self._where(level, region)} cannot be decoded: {error}") from error

    def _where(self, level: int, region: Region) -> str:
        size = f"{region.width} x {region.height} px"
        return f"{self._path}: level {level}, x {region.x}, y {region.y}, {size}"

    def _replace(self, failed: openslide.AbstractSlide) -> None:
        with self._lock:
            if self._handle is failed:  # another thread has not replaced it yet
                self._handle = _open(self._path)


def detect_vendor(path: Path) -> str | None:
    """Return OpenSlide's name for a file's format; None if it does not know it.

    Raises:
        SlideFormatError: DICOM whose sequences are nested too deeply for a recursive parser; MIRAX that claims more of
            something than OpenSlide could allocate, which would end the process.
    """
    if _is_dicom(path):
        _check_nesting(path)
    if path.suffix.lower() == MIRAX:
        _check_counts(path, path.with_suffix("") / "Slidedat.ini")
    vendor: str | None = openslide.OpenSlide.detect_format(path)
    return vendor


DICOM = b"DICM"  # after 128 bytes
MAX_DICOM_HEAD = 32 << 20  # bytes that are searched; the header of a slide with 100,000 frames has about 20 MB
MAX_NESTED = 64  # depth of nested sequences; in slides it is five
# The item of a sequence with its length, the ends of an item and of a sequence, and the pixels (PS3.5, 7.5).
_PARTS = re.compile(rb"\xfe\xff\x00\xe0(.{4})|\xfe\xff\x0d\xe0|\xe0\x7f\x10\x00", re.DOTALL)
_NO_LENGTH, DICOM_PIXELS = 0xFFFFFFFF, b"\xe0"


MIRAX = ".mrxs"
MAX_SLIDEDAT = 4 << 20  # bytes; in slides it has about 50 kB
MAX_COUNT, MAX_PICTURES = 1 << 16, 1 << 24  # of levels, files, ..., and of camera images
_COUNTS = re.compile(rb"^\s*(\w*COUNT|IMAGENUMBER_[XY]|CameraImageDivisionsPerSide)\s*=\s*\+?(\d+)", re.MULTILINE)


def _check_counts(path: Path, slidedat: Path) -> None:
    """Refuse a MIRAX slide whose configuration claims more of something than slides have."""
    try:
        data = read_file(slidedat, MAX_SLIDEDAT)
    except FileNotFoundError:  # OpenSlide will say so
        return
    except OSError as error:
        raise SlideFormatError(f"{path}: {slidedat.name} cannot be read: {error.strerror}") from error
    numbers = [(name.decode(), int(digits[:20])) for name, digits in _COUNTS.findall(data)]
    wrong = next((each for each in numbers if each[1] > MAX_COUNT), None)
    if wrong is not None:
        raise SlideFormatError(f"{path}: {slidedat.name} has {wrong[0]} {wrong[1]:,}, expected at most {MAX_COUNT:,}")
    sides = [number for name, number in numbers if name.startswith("IMAGENUMBER")]
    if math.prod(sides[:2]) > MAX_PICTURES:
        raise SlideFormatError(f"{path}: {slidedat.name} has {math.prod(sides[:2]):,} images, more than any slide has")


def _is_dicom(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == DICOM
    except OSError:  # OpenSlide will say so
        return False


def _check_nesting(path: Path) -> None:
    """Refuse a DICOM file if it, or another in its folder (as a slide's levels are), is nested too deeply."""
    for file in sorted(path.parent.iterdir()):
        if _is_dicom(file) and _depth(file) > MAX_NESTED:
            raise SlideFormatError(
                f"{file}: its sequences are nested deeper than {MAX_NESTED} levels, which no slide needs"
            )


def _depth(path: Path) -> int:
    """Return how deeply the sequences of a DICOM file are nested, before its pixels."""
    with path.open("rb") as file:
        data = file.read(MAX_DICOM_HEAD)
    ends: list[float] = []  # of the items that are open
    deepest = 0
    for part in _PARTS.finditer(data):
        while ends and ends[-1] <= part.start():
            ends.pop()
        if part[1] is not None:
            length = int.from_bytes(part[1], "little")
            ends.append(math.inf if length == _NO_LENGTH else part.end() + length)
            deepest = max(deepest, len(ends))
        elif data[part.start() : part.start() + 1] == DICOM_PIXELS:
            break
        elif ends:
            ends.pop()
        if deepest > MAX_NESTED:
            break
    return deepest


def _open(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideFormatError(
            f"{path}: not a slide that OpenSlide can read, or truncated; expected Aperio, Hamamatsu, Leica, MIRAX, "
            "Philips, Sakura, Trestle, Ventana, Zeiss, DICOM or tiled TIFF; copy the file again from its source or "
            "convert it, for example to a tiled TIFF"
        ) from error
    except openslide.OpenSlideError as error:
        raise SlideFormatError(
            f"{path}: damaged, truncated or unsupported slide (OpenSlide: {error}); copy the file again from its "
            "source or convert it, for example to a tiled TIFF"
        ) from error


def _describe(path: Path, handle: openslide.OpenSlide, mpp: tuple[float, float] | None) -> SlideInfo:
    properties: Mapping[str, str] = handle.properties
    found, problem = (mpp, "") if mpp is not None else _mpp(properties)
    return SlideInfo(
        path=str(path),
        levels=_levels(path, handle),
        mpp=found,
        mpp_problem=problem,
        vendor=properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        background=_background(properties),
        bounds=_bounds(properties, handle.dimensions[::-1]),
        # Formats with many files (MIRAX, DICOM) have their pixels elsewhere: OpenSlide's own hash covers them.
        digest=content_digest(path, properties.get(openslide.PROPERTY_NAME_QUICKHASH1, "")),
        objective=_objective(properties),
    )


def _levels(path: Path, handle: openslide.OpenSlide) -> tuple[Level, ...]:
    """Return the levels; OpenSlide takes their factors from their sizes, even if these are padded to whole tiles."""
    sizes = [(height, width) for width, height in handle.level_dimensions]
    tiles = [_tile(handle.properties, level) for level in range(len(sizes))]
    spacings: Mapping[tuple[int, int], tuple[float, float] | None] = {}
    if len(sizes) > 1 and handle.properties.get(openslide.PROPERTY_NAME_VENDOR) in DENSE:
        with suppress(Exception), closing(LocalFile(path)) as file, open_tiff(file) as parsed:  # may raise anything
            pages: Any = parsed.pages
            spacings = {_size(page): spacing_of(page) for page in pages}
    return make_levels(sizes, [spacings.get(size) for size in sizes], tiles)


def _size(page: Any) -> tuple[int, int]:
    return int(page.imagelength), int(page.imagewidth)


def _tile(properties: Mapping[str, str], level: int) -> tuple[int, int] | None:
    """Return (height, width) of a level's tiles; None if OpenSlide does not say."""
    try:
        height, width = (int(properties[f"openslide.level[{level}].tile-{side}"]) for side in ("height", "width"))
    except (KeyError, ValueError):
        return None
    return height, width


def _objective(properties: Mapping[str, str]) -> float | None:
    try:
        power = float(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER, "nan"))
    except ValueError:
        return None
    return power if 0 < power < math.inf else None


def _mpp(properties: Mapping[str, str]) -> tuple[tuple[float, float] | None, str]:
    """Return mpp (y, x) and an empty string, or None and the problem."""
    values = []
    for name in (openslide.PROPERTY_NAME_MPP_Y, openslide.PROPERTY_NAME_MPP_X):
        text = properties.get(name)
        if text is None:
            return None, f"the file has no {name}; give the micrometres per pixel, such as --mpp 0.25"
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


def _bounds(properties: Mapping[str, str], slide_px: tuple[int, int]) -> Region | None:
    """Return the part of a slide of `slide_px` (height, width) that was scanned; None if that is not recorded."""
    names = (
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
    )
    try:
        found = Region(*(int(properties[name]) for name in names)).intersect(Region(0, 0, *slide_px))
    except (KeyError, ValueError):
        return None
    return found if found.height > 0 and found.width > 0 else None


def _composite(rgba: Image.Image, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return np.asarray(rgba.convert("RGB"))
    canvas = Image.new("RGB", rgba.size, background)
    canvas.paste(rgba, mask=alpha)
    return np.asarray(canvas)
