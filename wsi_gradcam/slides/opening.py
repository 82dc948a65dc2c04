"""Which reader opens a file: OpenSlide knows every vendor, ours is faster where it gives the same pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from wsi_gradcam.errors import SlideError, SlideFormatError, SlideReadError, one_line
from wsi_gradcam.slides.base import LocalFile
from wsi_gradcam.slides.ome_zarr_reader import OmeZarrSlide
from wsi_gradcam.slides.openslide_reader import OpenSlideSlide, vendor_of
from wsi_gradcam.slides.picture_reader import PictureSlide, is_picture
from wsi_gradcam.slides.tiff_check import check_tiff
from wsi_gradcam.slides.tiff_levels import AGAIN, TOP_LEFT, TiffLevel, open_tiff, tiff_levels
from wsi_gradcam.slides.tiff_metadata import PLAIN, describe_tiff, tiff_mpp
from wsi_gradcam.slides.tiff_reader import TiffSlide

if TYPE_CHECKING:
    from tifffile import TiffFile

    from wsi_gradcam.slides.base import Slide, SlideFile, SlideInfo

    Facts = tuple[list[TiffLevel], SlideInfo]

LOG = logging.getLogger("wsi_gradcam")

Reader = Literal["auto", "openslide", "tiff", "ome-zarr", "picture"]
READERS: tuple[str, ...] = get_args(Reader)
Mpp = tuple[float, float] | None

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TILES_COMPARED = 3  # a level


def open_as(path: Path, mpp: Mpp, reader: str, trust_objective: bool = False) -> Slide:
    """The slide at `path` by a named reader, or by the fastest that shows it rightly.

    Raises:
        SlideFormatError: the reader does not know the file, or it is damaged.
    """
    if path.is_file():
        with closing(LocalFile(path)) as file:
            if is_tiff(file):
                check_tiff(file)
    return OPENERS[reader](path, mpp, trust_objective)


def open_plain_tiff(file: SlideFile, facts: Callable[[SlideFile, TiffFile], Facts]) -> TiffSlide:
    """The slide in a TIFF file by our own reader, which owns the file; `facts` tells them of the parsed one.

    Raises:
        SlideFormatError: it holds no picture that can be shown, or is damaged.
    """
    try:
        try:
            with open_tiff(file) as parsed:
                levels, info = facts(file, parsed)
        except SlideFormatError as error:
            raise SlideFormatError(f"{file.name}: {error}") from error
        except SlideError:
            raise
        except Exception as error:  # parsing a damaged file may raise anything
            raise SlideFormatError(f"{file.name}: damaged TIFF ({one_line(error)[:200]}); {AGAIN}") from error
    except BaseException:
        file.close()
        raise
    return TiffSlide(file, levels, info)


def is_tiff(file: SlideFile) -> bool:
    """Whether a file begins as a TIFF does."""
    with file.stream() as stream:
        return stream.read(4) in TIFF_SIGNATURES


def _auto(path: Path, mpp: Mpp, trust_objective: bool) -> Slide:
    if path.is_dir():
        return OmeZarrSlide(path, mpp)
    if is_picture(path):
        return PictureSlide(path, mpp)
    vendor = vendor_of(path)
    if vendor is None and _begins_as_tiff(path):
        return _tiff(path, mpp, trust_objective)
    known = OpenSlideSlide(path, mpp, trust_objective)
    if vendor not in PLAIN:
        return known
    try:
        fast = _like(LocalFile(path), mpp, known)
    except Exception as error:  # tifffile need not know what OpenSlide does
        LOG.info("%s is read by OpenSlide: %s", path, one_line(error))
        return known
    known.close()
    return fast


def _like(file: LocalFile, mpp: Mpp, known: OpenSlideSlide) -> TiffSlide:
    """The slide by our own reader, if some tiles of each level are what OpenSlide shows. It owns the file.

    Raises:
        SlideFormatError: they are not.
    """
    try:
        levels, info = _facts(file, mpp, known.info)
        fast = TiffSlide(file, levels, info)
        if levels[0].orientation == TOP_LEFT:  # OpenSlide does not turn pictures
            for level in range(min(len(info.levels), len(known.info.levels))):
                _compare(fast, known, level)
    except BaseException:
        file.close()
        raise
    return fast


def _facts(file: LocalFile, mpp: Mpp, known: SlideInfo) -> Facts:
    """Levels and description of a file that OpenSlide knows, from it as far as it sees all of the file."""
    with open_tiff(file) as parsed:
        levels = tiff_levels(parsed)
        if levels[0].orientation != TOP_LEFT:
            return levels, describe_tiff(file, parsed, levels, mpp)
        more = parsed.is_ome and len(levels) > len(known.levels)  # OpenSlide knows no levels in SubIFDs
        info = describe_tiff(file, parsed, levels, mpp) if more else known
        if parsed.is_ome and info.mpp is None and (said := tiff_mpp(parsed))[0] is not None:  # nor any OME-XML
            info = replace(info, mpp=said[0], mpp_problem="")
    return _same_sizes(levels, info), info


def _same_sizes(levels: Sequence[TiffLevel], info: SlideInfo) -> list[TiffLevel]:
    """The pages that are the slide's levels."""
    by_size = {level.shown_px: level for level in levels}
    wanted = [(level.height, level.width) for level in info.levels]
    if missing := [size for size in wanted if size not in by_size]:
        raise SlideFormatError(f"no level of {missing[0][0]} x {missing[0][1]} px is found in the file")
    return [by_size[size] for size in wanted]


def _compare(fast: TiffSlide, known: OpenSlideSlide, level: int) -> None:
    """Compare some tiles of a level; only the first where OpenSlide interpolates the others."""
    tiles = fast.some_tiles(level, TILES_COMPARED)
    for region in tiles if known.is_exact(level) else tiles[:1]:
        try:
            expected = known.read_level(level, region)
        except SlideReadError:  # neither needs to read it
            continue
        found = fast.read_level(level, region)
        if not np.array_equal(found, expected):
            off = int(np.abs(found.astype(np.int16) - expected).max())
            raise SlideFormatError(f"level {level}, y {region.y}, x {region.x} differs from OpenSlide's by {off}")


def _tiff(path: Path, mpp: Mpp, trust_objective: bool) -> TiffSlide:
    return open_plain_tiff(LocalFile(path), partial(own_facts, mpp=mpp))


def own_facts(file: SlideFile, parsed: TiffFile, mpp: Mpp) -> Facts:
    """Levels and description of a file by what it says itself."""
    levels = tiff_levels(parsed)
    return levels, describe_tiff(file, parsed, levels, mpp)


def _begins_as_tiff(path: Path) -> bool:
    with closing(LocalFile(path)) as file:
        return is_tiff(file)


OPENERS: dict[str, Callable[[Path, Mpp, bool], Slide]] = {
    "auto": _auto,
    "openslide": OpenSlideSlide,
    "tiff": _tiff,
    "ome-zarr": OmeZarrSlide,
    "picture": PictureSlide,
}
