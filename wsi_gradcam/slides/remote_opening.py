"""Which reader opens a URL: ours for plain TIFF pyramids and OME-Zarr; what needs OpenSlide must lie on a disk."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from wsi_gradcam.errors import SlideFormatError, SlideNotFoundError
from wsi_gradcam.io.urls import redact_url, split_url
from wsi_gradcam.slides.ome_zarr_reader import OmeZarrSlide
from wsi_gradcam.slides.opening import is_tiff, open_plain_tiff, own_facts
from wsi_gradcam.slides.remote import RemoteFile, is_zarr_at
from wsi_gradcam.slides.remote_zarr import RemoteZarr
from wsi_gradcam.slides.tiff_check import check_tiff
from wsi_gradcam.slides.tiff_levels import tiff_levels
from wsi_gradcam.slides.tiff_metadata import PLAIN, describe_plain, vendor_of_tiff

if TYPE_CHECKING:
    from tifffile import TiffFile

    from wsi_gradcam.slides.base import Slide, SlideFile
    from wsi_gradcam.slides.opening import Facts

    Mpp = tuple[float, float] | None

ZARR_SUFFIX = ".zarr"
FROM_DISKS = ("openslide", "picture")
MEND = "copy the file to a disk, and explain that"


def open_url(url: str, mpp: Mpp, reader: str, trust_objective: bool = False) -> Slide:
    """The slide behind a URL by a named reader, or by the one for its format.

    Raises:
        SlideNotFoundError: nothing is there.
        SlideAccessError: the server does not let it be read.
        SlideFormatError: not a slide that is read without a download, or damaged.
    """
    name = redact_url(url)
    if reader in FROM_DISKS:
        raise SlideFormatError(
            f"{name}: reader {reader!r} knows files only; expected auto, tiff or ome-zarr, or {MEND}"
        )
    path = split_url(url)[2]
    if reader == "ome-zarr" or (reader == "auto" and path.rstrip("/").endswith(ZARR_SUFFIX)):
        return OmeZarrSlide(RemoteZarr(url), mpp)
    try:
        file = RemoteFile(url)
    except SlideNotFoundError:
        if reader == "auto" and is_zarr_at(url):
            return OmeZarrSlide(RemoteZarr(url), mpp)
        raise
    return _tiff(file, mpp, reader, trust_objective)


def _tiff(file: RemoteFile, mpp: Mpp, reader: str, trust_objective: bool) -> Slide:
    plain = partial(plain_facts, mpp=mpp, trust_objective=trust_objective)
    try:
        if not is_tiff(file):
            raise SlideFormatError(f"{file.name}: neither TIFF nor OME-Zarr, which alone are read by URL; {MEND}")
        check_tiff(file)
        return open_plain_tiff(file, plain if reader == "auto" else partial(own_facts, mpp=mpp))
    finally:
        file.end_of_headers()  # whatever came of it: trouble with the network is no damage


def plain_facts(file: SlideFile, parsed: TiffFile, mpp: Mpp, trust_objective: bool) -> Facts:
    """Levels and description of a file, as OpenSlide and our own reader give them together.

    Raises:
        SlideFormatError: no plain pyramid of tiles.
    """
    vendor = vendor_of_tiff(parsed)
    if vendor is not None and vendor not in PLAIN:
        raise SlideFormatError(f"in the format of {vendor}, which OpenSlide reads, and from a disk only; {MEND}")
    levels = tiff_levels(parsed)
    return levels, describe_plain(file, parsed, levels, mpp, trust_objective)
