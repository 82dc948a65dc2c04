"""Readers of slides: `open_slide` returns a `Slide`, and `read_region` any region of it at any mpp.

This room knows files, URLs and pixels, but neither tissue nor models nor runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ConfigError, MppError, SlideNotFoundError
from wsi_gradcam.io.urls import is_url, redact_url
from wsi_gradcam.slides.base import ZARR_FILES, Level, Slide, SlideInfo, check_mpp
from wsi_gradcam.slides.resample import Thumbnail, read_region, thumbnail
from wsi_gradcam.system.confinement import Limits, check_can_confine, limits_here

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

__all__ = [
    "SUFFIXES",
    "UNREAD",
    "Level",
    "Limits",
    "Slide",
    "SlideInfo",
    "Thumbnail",
    "check_mpp",
    "check_reader",
    "is_zarr",
    "open_slide",
    "read_region",
    "thumbnail",
    "with_reductions",
]

# Endings that are searched for in folders; a file that is named explicitly is tried whatever its ending.
SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .vms .vmu .scn .mrxs .svslide .bif .czi .dcm".split()  # noqa: SIM905
)
# Endings of slides in unsupported formats, and what converts them.
BIO_FORMATS, SDK = "bioformats2raw or QuPath", "the scanner's own software"
UNREAD = {
    **dict.fromkeys(".vsi .qptiff .lif .nd2 .lsm .oir .oib .oif .zvi .ims .jp2 .jpx .zif .afi".split(), BIO_FORMATS),  # noqa: SIM905
    **dict.fromkeys(".isyntax .i2syntax".split(), "isyntax2raw or Philips' own software"),  # noqa: SIM905
    **dict.fromkeys(".kfb .sdpc .dyqx .tron .mds .mdsx".split(), SDK),  # noqa: SIM905
}


def is_zarr(path: Path) -> bool:
    """Return True for a folder that is a Zarr group, and thus one image rather than many files."""
    return path.is_dir() and any((path / name).is_file() for name in ZARR_FILES)


def open_slide(
    path: str | PathLike[str],
    mpp: float | tuple[float, float] | None = None,
    reader: str = "auto",
    *,
    trust_objective: bool = False,
    channels: tuple[int, int, int] | None = None,
    isolate: Limits | bool | None = None,
) -> Slide:
    """Return the slide at `path`, a file, a Zarr folder or a URL; `mpp` or (y, x) replaces its own um per pixel.

    With `trust_objective`, an unknown mpp is derived from the power of the objective. If an image has several grey
    channels, as in fluorescence, `channels` are shown as red, green and blue; a slide in colour is shown as it is.

    Readers are the names in `opening.OPENERS`; `auto` chooses the fastest that reads the file correctly. With
    `isolate`, a separate process reads the slide within these limits (True: the default ones; None: as set by
    `isolating`, else none), see `isolated_reader`; this is meant for untrusted files.

    Raises:
        ConfigError: there is no such reader, or this system has no such processes.
        SlideNotFoundError: there is no such file.
        SlideAccessError: the server of a URL does not allow reading it.
        SlideFormatError: not a slide, or damaged.
        SlideContentError: a SlideFormatError for a file that is not an image in colour or grey.
        MppError: the given mpp is not possible. (A missing one is raised on the first use of `info.mpp_yx`.)
    """
    # Not imported above: `import wsi_gradcam.slides` must not need the shared library.
    from wsi_gradcam.slides.opening import open_file, open_url

    check_reader(reader)
    limits = _limits(isolate)
    if limits is not None:
        from wsi_gradcam.slides.isolated_reader import open_isolated
    given = (mpp, mpp) if isinstance(mpp, int | float) else mpp
    options: dict[str, Any] = {"mpp": given, "reader": reader, "trust_objective": trust_objective, "channels": channels}
    if isinstance(path, str) and is_url(path):
        _check_given(given, redact_url(path))
        return open_url(path, **options) if limits is None else open_isolated(path, limits, options)
    path = Path(path)
    if not path.is_file() and not is_zarr(path):
        what = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        raise SlideNotFoundError(f"{path}: {what}, expected a slide file; check the path")
    _check_given(given, str(path))
    return open_file(path, **options) if limits is None else open_isolated(str(path), limits, options)


def with_reductions(slide: Slide) -> Slide:
    """Return the slide with additional levels that are decoded at a reduced size, if its reader supports that.

    Patches at half, a quarter or an eighth of a level's resolution are then read several times as fast, and differ by a
    few grey levels. The original slide must not be closed separately.
    """
    reduced: Callable[[], Slide] | None = getattr(slide, "with_reductions", None)
    return slide if reduced is None else reduced()


def _limits(isolate: Limits | bool | None) -> Limits | None:
    if isinstance(isolate, bool):
        limits = Limits() if isolate else None
    else:
        limits = limits_here() if isolate is None else isolate
    check_can_confine(limits)
    return limits


def check_reader(name: str) -> None:
    """Raise a ConfigError if there is no reader of this name."""
    if name == "auto":
        return  # a cluster's client need not load what reads slides
    from wsi_gradcam.slides.opening import OPENERS

    if name not in OPENERS:
        raise ConfigError(f"reader {name!r} is not known; expected one of {', '.join(OPENERS)}")


def _check_given(mpp: tuple[float, float] | None, name: str) -> None:
    for value in mpp or ():
        if problem := check_mpp(value, "the given mpp"):
            raise MppError(f"{name}: {problem}")
