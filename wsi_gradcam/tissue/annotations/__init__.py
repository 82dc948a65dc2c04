"""Annotations that people drew on slides, and masks: the file of a slide is found here, and read by `regions`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_gradcam.errors import AnnotationError, ConfigError
from wsi_gradcam.tissue.annotations.areas import Annotations, Area, rasterise
from wsi_gradcam.tissue.annotations.regions import ENDINGS, Regions, read_annotations, read_bytes, tissue_within

if TYPE_CHECKING:
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.settings import Settings

__all__ = [
    "ENDINGS",
    "Annotations",
    "Area",
    "Regions",
    "check_ending",
    "check_mask",
    "check_masks",
    "entry_regions",
    "find_mask",
    "mask_file",
    "rasterise",
    "read_annotations",
    "read_regions",
    "tissue_within",
]


def mask_file(folder: Path, slide_id: str, own: str = "") -> Path:
    """Return the slide's file in a folder of masks, see `find_mask`.

    Raises:
        AnnotationError: there is none, or more than one.
    """
    found = find_mask(folder, slide_id, own)
    if found is None:
        raise AnnotationError(
            f"{folder}: no mask of slide {slide_id}; expected {Path(slide_id).stem} with one of the endings "
            f"{' '.join(ENDINGS)}"
        )
    return found


def find_mask(folder: Path, slide_id: str, own: str = "") -> Path | None:
    """Return the slide's file in a folder of masks: named as the slide, with or without its ending; None without one.

    Slides in folders have their masks in folders of the same name, or all in one. The slide itself, at `own`, is no
    mask of it.

    Raises:
        AnnotationError: there is more than one.
    """
    slide = Path(slide_id)
    for name in (slide, slide.with_suffix(""), Path(slide.name), Path(slide.stem)):
        files = [folder / f"{name}{ending}" for ending in ENDINGS]
        # a slide may be called as a mask would be: "a.tif"
        found = list(dict.fromkeys(file for file in files if file.is_file() and not _is_same(file, own)))
        if len(found) > 1:
            listed = ", ".join(file.name for file in found)
            raise AnnotationError(f"{folder}: {listed} are all masks of slide {slide_id}; expected one of them")
        if found:
            return found[0]
    return None


def _is_same(file: Path, other: str) -> bool:
    return bool(other) and Path(other).exists() and file.samefile(other)


def read_regions(
    mask: Path | None, slide_id: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = (), own: str = ""
) -> Regions | None:
    """Return the regions of a slide to be explained; None without a mask: all of it.

    Args:
        mask: a file, or a folder with a file for each slide.
        slide_id: of the slide, its path relative to the archive.
        own: path of the slide itself, which may lie in that folder.

    Raises:
        AnnotationError: there is no such file, or it cannot be read.
    """
    if mask is None:
        return None
    shared = mask.is_dir()
    path = mask_file(mask, slide_id, own) if shared else mask
    return Regions(path, read_bytes(path), include, exclude, shared)


def entry_regions(entry: SlideEntry, settings: Settings) -> Regions | None:
    """Return the regions of a slide of a run: by its own mask, which a list names, else by the settings'.

    Raises:
        AnnotationError: there is no such file, or it cannot be read.
    """
    if not entry.mask:
        return read_regions(settings.mask, entry.id, settings.include, settings.exclude, entry.path)
    path = Path(entry.mask)
    return Regions(path, read_bytes(path), settings.include, settings.exclude, shared=True)


def check_masks(entries: Sequence[SlideEntry], settings: Settings) -> None:
    """Refuse, before any work, masks that fit no slide; errors as of `check_mask`."""
    without = sum(not entry.mask for entry in entries)
    if settings.mask is not None or without == len(entries):
        check_mask(settings.mask, settings.include, settings.exclude, without)


def check_mask(mask: Path | None, include: Sequence[str], exclude: Sequence[str], slides: int) -> None:
    """Refuse, before any work, a mask that fits no slide.

    Raises:
        ConfigError: classes without a mask, a mask that does not exist or has another ending, or one file for several
            slides.
    """
    if mask is None:
        if include or exclude:
            raise ConfigError("include and exclude name classes of a mask; give the file with --mask")
        return
    if not mask.exists():
        raise ConfigError(f"{mask}: does not exist, expected a file or a folder for --mask; check the path")
    check_ending(mask)
    if slides > 1 and not mask.is_dir():
        raise ConfigError(
            f"{mask}: one mask for {slides} slides; give a folder that holds a file for each, named as the slide"
        )


def check_ending(path: Path) -> None:
    """Raise a ConfigError for a file with an ending that no mask has; a folder is passed."""
    if path.is_file() and path.suffix.lower() not in ENDINGS:
        raise ConfigError(
            f"{path}: not a file of annotations or a mask; expected one of the endings {' '.join(ENDINGS)}"
            + (", since JPEG changes the values of pixels" if path.suffix.lower() in (".jpg", ".jpeg") else "")
        )
