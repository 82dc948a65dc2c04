"""Exports: results in the formats of other programs, written slide by slide in bounded memory.

Each format is a function of a job, listed in `FORMATS`. A format sees results and slides only through its `Job`, and
knows nothing about how they were made.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from wsi_gradcam.errors import ConfigError, ResultError, StoreError, UnknownNameError, did_you_mean, one_line
from wsi_gradcam.evidence.labels import open_clusters
from wsi_gradcam.export.job import RUN, Job, Journal, Options
from wsi_gradcam.io.paths import StoragePathLike
from wsi_gradcam.results.display import ChannelInfo, find_channel
from wsi_gradcam.results.run import Result, open_result
from wsi_gradcam.results.run_files import folder_name
from wsi_gradcam.results.slide import SlideResult

__all__ = ["FORMATS", "Exported", "Options", "export"]

NAMELESS = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL}
# The module of each format; its function write(job), or another named one, returns the paths it has written.
FORMATS = {
    "ome-zarr-0.4": "arrays:write_ome_zarr",
    "ome-tiff": "arrays:write_ome_tiff",
    "tiff": "arrays:write_tiff",
    "asap": "arrays:write_asap",
    "tissuumaps": "arrays:write_tissuumaps",
    "geojson": "geojson",
    "clusters-geojson": "geojson:write_clusters",
    "marks-geojson": "geojson:write_marks",
    "marks-csv": "geojson:write_marks_csv",
    "qupath": "geojson:write_qupath",
    "png": "png",
    "deepzoom": "png:write_deepzoom",
    "dsa": "shapes:write_dsa",
    "asap-xml": "shapes:write_asap",
    "omero-rois": "shapes:write_omero",
    "cytomine": "shapes:write_cytomine",
    "dicom-parametric-map": "dicom",
    "dicom-segmentation": "dicom:write_segmentation",
    "dicom-labelmap": "dicom_regions:write_labelmap",
    "dicom-clusters": "dicom_regions:write_clusters",
    "dicom-annotations": "dicom_regions:write_annotations",
    "dicom-sr": "dicom_regions:write_report",
    "trident": "arrays:write_trident_features",
    "clam": "arrays:write_clam_features",
}
ALL = "all"  # heatmap formats; `tissuumaps` includes the pictures of `tiff`
OF_MARKS = ("marks-geojson", "marks-csv")
OF_FEATURES = ("trident", "clam")  # even for slides that are not explained yet
OF_CLUSTERS = ("clusters-geojson", "dicom-clusters")  # for slides whose evidence was sorted
OF_HEATMAPS = tuple(name for name in FORMATS if name not in (*OF_MARKS, *OF_FEATURES, *OF_CLUSTERS))


@dataclass(frozen=True)
class Exported:
    """The export of a slide: the files that were written, or the error."""

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
    *,
    remote_slides: bool = False,
    **options: Any,
) -> list[Exported]:
    """Write slides of a result into the folder `dest`, as DEST/SLIDE.ENDING.

    Args:
        result: an open result, or its folder or s3:// URL.
        remote_slides: as for `open_result`, for PNGs that show the slide.
        to: one of FORMATS, several joined by commas, or "all" heatmap formats.
        slides: their ids; by default, all that are finished.
        listener: called with the record of each slide.
        progress: called with the number of slides read for the run's window, and the total.
        options: see `Options`.

    Returns:
        A record for each slide in each format; those of slides that could not be exported have the error.

    Raises:
        ConfigError: an unknown format, option or channel.
        ResultError: there is no result, or no such slide.
        StoreError: the disk is full, or cannot be written.
    """
    formats = _formats(to)
    chosen = _options(options)
    opened = result if isinstance(result, Result) else open_result(result, remote_slides=remote_slides)
    return [
        record
        for each in formats
        for record in _export_as(each, opened, Path(dest), slides, chosen, listener=listener, progress=progress)
    ]


def _formats(to: str) -> list[str]:
    """Return the requested formats, each once."""
    if to == ALL:
        return [name for name in OF_HEATMAPS if name != "tiff"]
    names = [name.strip() for name in to.split(",")]
    for name in names:
        if name not in FORMATS:
            mend = did_you_mean(name, [*FORMATS, ALL]) or f"expected one of {', '.join(FORMATS)}, or {ALL}"
            raise ConfigError(f"format {name!r} is not known; {mend}")
    return list(dict.fromkeys(names))


def _export_as(
    to: str,
    opened: Result,
    dest: Path,
    slides: Sequence[str],
    chosen: Options,
    *,
    listener: Callable[[Exported], None] | None,
    progress: Callable[[int, int], None] | None,
) -> list[Exported]:
    """Write slides in one format."""
    unseen = (*OF_FEATURES, *OF_MARKS, *OF_CLUSTERS)  # formats without colours
    found = [opened[name] for name in slides] or [slide for slide in opened if _is_ready(slide, to)]
    if not found and to in OF_FEATURES:
        raise ConfigError(
            f"{opened.out}: no slide has features; slide-level models make them, and 'wsi-gradcam encode'"
        )
    if not found and to in OF_MARKS:
        raise ConfigError(f"{opened.out}: no slide has marks; 'wsi-gradcam view' makes them")
    if not found and to in OF_CLUSTERS:
        raise ConfigError(f"{opened.out}: no slide has clusters; 'wsi-gradcam evidence' makes them")
    if not found:
        raise ConfigError(f"{opened.out}: no slide is finished; run explain again")
    _check_channels(found, chosen.channel, opened.out)
    windows = opened.windows(progress) if chosen.window == RUN and to not in unseen else {}
    records = []
    ids = frozenset(opened.ids)
    with Journal(dest) as journal:
        for slide in found:
            job = Job(slide, dest / folder_name(slide.id), chosen, windows, ids, to, journal)
            records.append(_exported(slide, job, journal))
            if listener is not None:
                listener(records[-1])
    return records


def _options(given: dict[str, Any]) -> Options:
    attributes = given.pop("dicom_attributes", None)
    if attributes is None:
        return Options(**given)
    from wsi_gradcam.export.dicom_source import check_attributes, read_attributes

    if isinstance(attributes, str | PathLike):
        return Options(**given, dicom_attributes=read_attributes(Path(attributes)))
    return Options(**given, dicom_attributes=check_attributes(attributes, "dicom_attributes"))


def _is_ready(slide: SlideResult, to: str) -> bool:
    """Return whether everything that a format writes for a slide exists."""
    if to in OF_MARKS:
        return bool(slide.marks())
    if to in OF_CLUSTERS:
        return slide.is_finished and open_clusters(slide) is not None
    if to not in OF_FEATURES:
        return slide.is_finished
    from wsi_gradcam.export.arrays import has_features

    try:
        return has_features(slide)
    except (ResultError, StoreError):  # for one that has failed
        return False


def _check_channels(slides: Sequence[SlideResult], names: Sequence[str], where: object) -> None:
    """Raise a ConfigError for a channel that the run does not have; all its slides have the same channels."""
    known = next(filter(None, map(_channels, slides)), ()) if names else ()
    try:
        for name in names if known else ():
            find_channel(known, name, str(where))
    except UnknownNameError as error:
        raise ConfigError(str(error)) from error


def _channels(slide: SlideResult) -> tuple[ChannelInfo, ...]:
    with suppress(Exception):  # a damaged one is reported when its turn comes
        return slide.channels
    return ()


def _exported(slide: SlideResult, job: Job, journal: Journal) -> Exported:
    if not _is_ready(slide, job.to):
        what = f"is {slide.status}; run explain again, then export it"
        if job.to in OF_MARKS or (job.to in OF_CLUSTERS and slide.is_finished):
            what = "has no marks" if job.to in OF_MARKS else "has no clusters; it is not in the sample of its evidence"
        return Exported(slide.id, (), f"{slide.id}: {what}")
    try:
        if not job.options.overwrite and (paths := journal.was_done(job.digest)) is not None:
            return Exported(slide.id, tuple(paths))
        module, _, function = FORMATS[job.to].partition(":")
        paths = getattr(import_module(f"wsi_gradcam.export.{module}"), function or "write")(job)
        journal.done(paths, job.digest)
    except StoreError as error:
        # A problem with the disk, not with the slide, unless the disk does not accept its name.
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in NAMELESS:
            raise
        return Exported(slide.id, (), one_line(error))
    except Exception as error:  # one bad slide never stops the others
        return Exported(slide.id, (), one_line(error))
    return Exported(slide.id, tuple(paths))
