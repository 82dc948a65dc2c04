"""Results in the formats of other programs: `export` writes them, one slide after the other, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from wsi_gradcam.errors import ConfigError, StoreError, one_line
from wsi_gradcam.export.job import RUN, Job, Options
from wsi_gradcam.io.paths import StoragePathLike
from wsi_gradcam.results.run import Result, open_result
from wsi_gradcam.results.slide import SlideResult

__all__ = ["FORMATS", "Exported", "Options", "export"]

# A module each, with write(job) -> paths.
FORMATS = {
    "ome-zarr-0.4": "ome_zarr_04",
    "ome-tiff": "ome_tiff",
    "tiff": "tiff",
    "geojson": "geojson",
    "qupath": "qupath",
    "png": "png",
    "deepzoom": "deepzoom",
}


@dataclass(frozen=True)
class Exported:
    """What became of a slide: the files that were made, or why they were not."""

    slide: str
    paths: tuple[Path, ...]
    error: str = ""


def export(
    result: Result | StoragePathLike,
    to: str,
    dest: str | PathLike[str],
    slides: Sequence[str] = (),
    listener: Callable[[Exported], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Exported]:
    """Write slides of a result into the folder `dest`, as DEST/SLIDE.ENDING.

    Args:
        result: an open result, or its folder or s3:// URL.
        to: one of FORMATS.
        slides: their ids; nothing given: all that are finished.
        listener: told of each slide.
        progress: told how many slides are read for the run's window, and of how many.
        options: see `Options`.

    Returns:
        A record a slide. A slide that could not be exported is in it with the cause; the others are done.

    Raises:
        ConfigError: an unknown format or option.
        ResultError: no result, or no such slide.
        StoreError: the disk is full, or refuses.
    """
    if to not in FORMATS:
        raise ConfigError(f"format {to!r} is not known; expected one of {', '.join(FORMATS)}")
    chosen = Options(**options)
    opened = result if isinstance(result, Result) else open_result(result)
    found = [opened[name] for name in slides] or [slide for slide in opened if slide.is_finished]
    if not found:
        raise ConfigError(f"{opened.out}: no slide is finished; run explain again")
    windows = opened.windows(progress) if chosen.window == RUN else {}
    records = []
    for slide in found:
        records.append(_exported(slide, Job(slide, Path(dest) / slide.id, chosen, windows), to))
        if listener is not None:
            listener(records[-1])
    return records


def _exported(slide: SlideResult, job: Job, to: str) -> Exported:
    if not slide.is_finished:
        return Exported(slide.id, (), f"{slide.id}: is {slide.status}; run explain again, then export it")
    try:
        paths = import_module(f"wsi_gradcam.export.{FORMATS[to]}").write(job)
    except StoreError as error:
        if isinstance(error.__cause__, OSError):  # the disk's matter, not the slide's
            raise
        return Exported(slide.id, (), one_line(error))
    except Exception as error:  # one bad slide never stops the others
        return Exported(slide.id, (), one_line(error))
    return Exported(slide.id, tuple(paths))
