"""Reading slides: `open_slide` returns a `Slide`, `read_region` any region of it at any mpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wsi_gradcam.errors import MppError, SlideNotFoundError
from wsi_gradcam.slides.base import Level, Slide, SlideInfo, check_mpp
from wsi_gradcam.slides.resample import Thumbnail, read_region, thumbnail

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["SUFFIXES", "Level", "Slide", "SlideInfo", "Thumbnail", "open_slide", "read_region", "thumbnail"]

# What is looked for in a folder; a file that is named outright is tried whatever its ending.
SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .vms .vmu .scn .mrxs .svslide .bif .czi .dcm".split()  # noqa: SIM905
)


def open_slide(path: str | PathLike[str], mpp: float | tuple[float, float] | None = None) -> Slide:
    """The slide at `path`; `mpp` (or (y, x)) replaces what the file says of its micrometres per level-0 pixel.

    Raises:
        SlideNotFoundError: no file there.
        SlideFormatError: not a slide, or damaged.
        MppError: the given mpp is not possible. (A missing one is raised on the first use of `info.mpp_yx`.)
    """
    # Not above: `import wsi_gradcam.slides` shall not need the shared library.
    from wsi_gradcam.slides.openslide_reader import OpenSlideSlide

    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise SlideNotFoundError(f"{path}: {what}, expected a slide file; check the path")
    given = (mpp, mpp) if isinstance(mpp, int | float) else mpp
    for value in given or ():
        if problem := check_mpp(value, "the given mpp"):
            raise MppError(f"{path}: {problem}")
    return OpenSlideSlide(path, given)
