"""The choice of a reader for a slide.

OpenSlide knows every vendor; our own reader is faster where it gives the same pixels. URLs are read only by our own
readers: plain TIFF pyramids and OME-Zarr; a slide that needs OpenSlide must be on a local disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import (
    SlideContentError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
    SlideReadError,
    one_line,
)
from wsi_gradcam.io.urls import redact_url, split_url
from wsi_gradcam.slides.base import OURS, LocalFile, check_not_dark, is_tiff, make_levels
from wsi_gradcam.slides.ome_zarr_reader import OmeZarrSlide
from wsi_gradcam.slides.openslide_reader import OpenSlideSlide, detect_vendor
from wsi_gradcam.slides.picture_reader import PictureSlide, is_picture
from wsi_gradcam.slides.remote import RemoteFile, RemoteZarr, is_remote_zarr
from wsi_gradcam.slides.tiff_levels import AGAIN, TOP_LEFT, TiffLevel, open_tiff, tiff_levels
from wsi_gradcam.slides.tiff_metadata import (
    PLAIN,
    check_tiff,
    describe_plain,
    describe_tiff,
    first_texts,
    is_export,
    tiff_mpp,
    tiff_vendor,
)
from wsi_gradcam.slides.tiff_reader import TiffSlide, says_rgb

if TYPE_CHECKING:
    from tifffile import TiffFile

    from wsi_gradcam.slides.base import Channels, Slide, SlideFile, SlideInfo

    Facts = tuple[list[TiffLevel], SlideInfo]

LOG = logging.getLogger("wsi_gradcam")

Mpp = tuple[float, float] | None

TILES_COMPARED = 3  # a level
ZARR_SUFFIX = ".zarr"
ELSEWHERE = ".vsi"  # a TIFF that has only a thumbnail
REMOTE_READERS = ("auto", "tiff", "ome-zarr")  # the others read only files
WITH_CHANNELS = ("auto", "tiff", "ome-zarr")
COPY_FIRST = "copy the file to a local disk and explain the copy"


def open_file(
    path: Path, mpp: Mpp, reader: str, trust_objective: bool = False, channels: Channels | None = None
) -> Slide:
    """Return the slide at `path` by a named reader, or by the fastest that reads it correctly.

    Of grey pictures that belong together, `channels` are shown as red, green and blue.

    Raises:
        SlideFormatError: the reader does not know the file, or it is damaged.
    """
    if path.suffix.lower() == ELSEWHERE:
        raise SlideFormatError(
            f"{path}: its pixels are in a folder beside it, which cannot be read; convert it to OME-TIFF"
        )
    if path.is_file():
        with closing(LocalFile(path)) as file:
            if is_tiff(file):
                check_tiff(file)
    chosen = () if channels is None or reader not in WITH_CHANNELS else (channels,)  # the others read slides in colour
    return OPENERS[reader](path, mpp, trust_objective, *chosen)


def open_tiff_slide(file: SlideFile, facts: Callable[[SlideFile, TiffFile], Facts]) -> TiffSlide:
    """Return the slide in a TIFF file, opened by our own reader, which owns the file; `facts` reads the parsed file.

    Raises:
        SlideFormatError: it contains no picture that can be shown, or is damaged.
    """
    try:
        try:
            with open_tiff(file) as parsed:
                levels, info = facts(file, parsed)
        except SlideFormatError as error:
            raise type(error)(f"{file.name}: {error}") from error
        except SlideError:
            raise
        except Exception as error:  # parsing a damaged file may raise anything
            raise SlideFormatError(f"{file.name}: damaged TIFF ({one_line(error)[:200]}); {AGAIN}") from error
        slide = TiffSlide(file, levels, info)
        try:
            _check_depth(slide, levels)
        except SlideContentError as error:
            raise SlideContentError(f"{file.name}: {error}") from error
    except BaseException:
        file.close()
        raise
    return slide


def _check_depth(slide: TiffSlide, levels: Sequence[TiffLevel]) -> None:
    """Raise a SlideContentError for a picture that uses fewer than its samples' 16 bits without saying so."""
    if not levels[0].full:
        numbers = sorted({len(levels) - 1, 0}, reverse=True)
        places = [(number, tile) for number in numbers for tile in slide.sample_tiles(number, TILES_COMPARED)]
        check_not_dark(slide, places, chosen=levels[0].is_chosen)


def _open_auto(path: Path, mpp: Mpp, trust_objective: bool, channels: Channels | None = None) -> Slide:
    if path.is_dir():
        return OmeZarrSlide(path, mpp, trust_objective, channels)
    if is_picture(path):
        return PictureSlide(path, mpp)
    vendor = detect_vendor(path)
    if vendor is None and _begins_as_tiff(path):
        return _open_local_tiff(path, mpp, trust_objective, channels)
    if vendor not in PLAIN:
        return OpenSlideSlide(path, mpp, trust_objective)
    return _open_plain(path, mpp, trust_objective, channels)


def _open_plain(path: Path, mpp: Mpp, trust_objective: bool, channels: Channels | None) -> Slide:
    """Return a plain pyramid, opened by the faster reader that knows its codec; none may show what is not a picture."""
    try:
        known = OpenSlideSlide(path, mpp, trust_objective)
    except SlideFormatError as error:
        LOG.info("%s is not read by OpenSlide: %s", path, one_line(error))
        facts = partial(plain_facts, mpp=mpp, trust_objective=trust_objective, channels=channels)
        return open_tiff_slide(LocalFile(path), facts)
    try:
        fast = _open_if_equal(LocalFile(path), mpp, known, channels)
    except SlideContentError as error:
        known.close()
        raise SlideContentError(f"{path}: {error}") from error
    except Exception as error:  # tifffile may not know a codec that OpenSlide knows
        LOG.info("%s is read by OpenSlide: %s", path, one_line(error))
        return known
    known.close()
    return fast


def _open_openslide(path: Path, mpp: Mpp, trust_objective: bool) -> Slide:
    """Return the slide, opened by OpenSlide, unless that would show it wrongly, or show what is not a picture."""
    if detect_vendor(path) in PLAIN and _is_misread(path, mpp, trust_objective):
        raise SlideContentError(f"{path}: OpenSlide shows it in the wrong colours; use --reader auto")
    return OpenSlideSlide(path, mpp, trust_objective)


def _is_misread(path: Path, mpp: Mpp, trust_objective: bool) -> bool:
    """Return whether OpenSlide shows a plain TIFF in other colours than it has.

    Raises:
        SlideContentError: it would show what is not a picture.
    """
    try:
        try:
            with closing(LocalFile(path)) as file, open_tiff(file) as parsed:
                first = tiff_levels(parsed)[0]
                differs = first.is_joined or first.is_scaled or says_rgb(file, first)
        except SlideContentError as error:
            raise SlideContentError(f"{path}: {error}") from error
        if not first.full:
            _open_local_tiff(path, mpp, trust_objective).close()
    except SlideContentError:
        raise
    except Exception:  # OpenSlide may not agree
        return False
    return differs


def _open_if_equal(file: LocalFile, mpp: Mpp, known: OpenSlideSlide, channels: Channels | None) -> TiffSlide:
    """Return the slide, opened by our own reader, if some tiles of each level equal OpenSlide's. It owns the file.

    Raises:
        SlideFormatError: they do not.
    """
    try:
        levels, info = _facts(file, mpp, known, channels)
        fast = TiffSlide(file, levels, info)
        _check_depth(fast, levels)
        if levels[0].orientation == TOP_LEFT and not levels[0].is_joined:  # OpenSlide does not rotate or join pictures
            # For Aperio slides, it makes smaller levels from level 0 where tiles are missing.
            count = min(len(info.levels), len(known.info.levels)) if levels[0].counts.all() else 1
            for level in range(count):
                _compare(fast, known, level)
    except BaseException:
        file.close()
        raise
    return fast


def _facts(file: LocalFile, mpp: Mpp, known: OpenSlideSlide, channels: Channels | None) -> Facts:
    """Return levels and metadata of a file that OpenSlide knows; from OpenSlide, as far as it sees the whole file."""
    with open_tiff(file) as parsed:
        levels = tiff_levels(parsed, channels)
        if levels[0].orientation != TOP_LEFT or levels[0].is_joined:
            return levels, describe_tiff(file, parsed, levels, mpp)
        more = parsed.is_ome and len(levels) > len(known.stored_px)  # OpenSlide knows no levels in SubIFDs
        if more:
            info = describe_tiff(file, parsed, levels, mpp)
        else:
            levels = _same_sizes(levels, known.stored_px)
            info = replace(known.info, levels=make_levels(*zip(*(level.stored for level in levels), strict=True)))
        if parsed.is_ome and info.mpp is None and (found := tiff_mpp(parsed))[0] is not None:  # nor any OME-XML
            info = replace(info, mpp=found[0], mpp_problem="")
    return levels, info


def _same_sizes(levels: Sequence[TiffLevel], wanted: Sequence[tuple[int, int]]) -> list[TiffLevel]:
    """Return the pages that have the given sizes."""
    by_size = {level.shown_px: level for level in levels}
    if missing := [size for size in wanted if size not in by_size]:
        raise SlideFormatError(f"no level of {missing[0][0]} x {missing[0][1]} px is found in the file")
    return [by_size[size] for size in wanted]


def _compare(fast: TiffSlide, known: OpenSlideSlide, level: int) -> None:
    """Compare some tiles of a level; only the first one if OpenSlide interpolates the others.

    A tile that either reader cannot read is damaged: OpenSlide, which fills in some, must not read it instead of ours.
    """
    if fast.obeys_streams(level) or fast.is_scaled(level):  # OpenSlide does not
        return
    tiles = fast.sample_tiles(level, TILES_COMPARED)
    for region in tiles if known.is_exact(level) else tiles[:1]:
        try:
            expected = known.read_as_it_is(level, region)
            found = fast.read_level(level, region)
        except SlideReadError:
            continue
        if not np.array_equal(found, expected):
            off = int(np.abs(found.astype(np.int16) - expected).max())
            raise SlideFormatError(f"level {level}, x {region.x}, y {region.y} differs from OpenSlide's by {off}")


def _open_local_tiff(path: Path, mpp: Mpp, trust_objective: bool, channels: Channels | None = None) -> TiffSlide:
    return open_tiff_slide(LocalFile(path), partial(tiff_facts, mpp=mpp, channels=channels))


def tiff_facts(file: SlideFile, parsed: TiffFile, mpp: Mpp, channels: Channels | None = None) -> Facts:
    """Return levels and metadata of a file from its own tags."""
    levels = tiff_levels(parsed, channels)
    return levels, describe_tiff(file, parsed, levels, mpp)


def _begins_as_tiff(path: Path) -> bool:
    with closing(LocalFile(path)) as file:
        return is_tiff(file)


def open_url(url: str, mpp: Mpp, reader: str, trust_objective: bool = False, channels: Channels | None = None) -> Slide:
    """Return the slide at a URL, opened by a named reader or the one for its format; `channels` as in `open_file`.

    Raises:
        SlideNotFoundError: nothing is there.
        SlideAccessError: the server does not let it be read.
        SlideFormatError: not a slide that can be read without a download, or damaged.
    """
    name = redact_url(url)
    if reader not in REMOTE_READERS:
        raise SlideFormatError(
            f"{name}: reader {reader!r} reads only files; expected {', '.join(REMOTE_READERS)}, or {COPY_FIRST}"
        )
    path = split_url(url)[2]
    if reader == "ome-zarr" or (reader == "auto" and any(p.endswith(ZARR_SUFFIX) for p in path.split("/"))):
        return OmeZarrSlide(RemoteZarr(url), mpp, trust_objective, channels)
    try:
        file = RemoteFile(url)
    except SlideNotFoundError:
        if reader == "auto" and is_remote_zarr(url):
            return OmeZarrSlide(RemoteZarr(url), mpp, trust_objective, channels)
        raise
    return _open_remote_tiff(file, mpp, reader, trust_objective, channels)


def _open_remote_tiff(
    file: RemoteFile, mpp: Mpp, reader: str, trust_objective: bool, channels: Channels | None
) -> Slide:
    plain = partial(plain_facts, mpp=mpp, trust_objective=trust_objective, channels=channels)
    try:
        if not is_tiff(file):
            raise SlideFormatError(
                f"{file.name}: neither TIFF nor OME-Zarr, the only formats that are read by URL; {COPY_FIRST}"
            )
        check_tiff(file)
        with file.stream() as stream:
            texts = first_texts(stream, file.size)
        if is_export(texts):
            raise SlideContentError(f"{file.name}: an export made by {OURS}, not a slide; give the slide")
        return open_tiff_slide(file, plain if reader == "auto" else partial(tiff_facts, mpp=mpp, channels=channels))
    finally:
        file.forget_headers()  # in any case: a network error is not damage


def plain_facts(
    file: SlideFile, parsed: TiffFile, mpp: Mpp, trust_objective: bool, channels: Channels | None = None
) -> Facts:
    """Return levels and metadata of a file, as OpenSlide and our own reader together give them.

    Raises:
        SlideFormatError: not a plain pyramid of tiles.
    """
    vendor = tiff_vendor(parsed)
    if vendor is not None and vendor not in PLAIN:
        raise SlideFormatError(
            f"in {vendor}'s format, which is read by OpenSlide, and only from a local disk; {COPY_FIRST}"
        )
    levels = tiff_levels(parsed, channels)
    if levels[0].is_joined:
        return levels, describe_tiff(file, parsed, levels, mpp)
    return levels, describe_plain(file, parsed, levels, mpp, trust_objective)


# The readers by name, each a function of the path, the mpp that replaces the file's, and `trust_objective`; those that
# read pictures with several channels also take the chosen channels.
OPENERS: dict[str, Callable[..., Slide]] = {
    "auto": _open_auto,
    "openslide": _open_openslide,
    "tiff": _open_local_tiff,
    "ome-zarr": OmeZarrSlide,
    "picture": PictureSlide,
}
