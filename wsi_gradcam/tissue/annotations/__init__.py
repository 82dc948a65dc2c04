"""Annotations that people drew on slides, and masks: a slide's file is found here and read by `regions`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from wsi_gradcam.errors import AnnotationError, ConfigError, SlideError, as_path
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.local import alike
from wsi_gradcam.slides import thumbnail
from wsi_gradcam.tissue.annotations.areas import Annotations, Area, Drawn, Shapes, rasterise
from wsi_gradcam.tissue.annotations.regions import ENDINGS, Moved, Regions, read_annotations, read_bytes, tissue_within

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.slides import Slide

__all__ = [
    "ENDINGS",
    "REGION",
    "Annotations",
    "Area",
    "Drawn",
    "Regions",
    "check_ending",
    "check_mask",
    "check_masks",
    "class_outlines",
    "drawn_labels",
    "entry_outlines",
    "entry_regions",
    "find_mask",
    "in_frame",
    "mask_file",
    "rasterise",
    "read_annotations",
    "read_regions",
    "slide_picture",
    "tissue_within",
]


WHOLE, BOUNDS, AUTO = "slide", "bounds", "auto"  # frames
LIKELY, OUTSIDE = 0.6, 0.02  # least share of a drawing on tissue in its own frame; share by which it may reach beyond


def in_frame(regions: Regions, tissue: NDArray[np.bool_], info: Ground, frame: str = AUTO) -> Regions:
    """Return the regions in the frame in which they were drawn: the whole slide, or its scanned part, as in QuPath.

    Args:
        tissue: bool [h, w] over the whole slide.
        info: has the slide's size and `bounds`.
        frame: "slide" or "bounds"; "auto" chooses the one in which the drawing lies on tissue inside the bounds.

    Raises:
        AnnotationError: both frames are possible, or neither is.
    """
    bounds = info.bounds
    if bounds is None or bounds == Region(0, 0, info.height, info.width) or frame == WHOLE:
        return regions
    both = (regions, replace(regions, part=bounds))
    if frame == BOUNDS:
        return both[1]
    shares, masks, errors = [], [], []
    for one in both:
        try:
            share, mask = _share_on_tissue(one, tissue, info, bounds)
        except AnnotationError as error:
            errors.append(error)
            share, mask = 0.0, None
        shares.append(share)
        masks.append(mask)
    if len(errors) == len(both):
        raise errors[0]
    if masks[0] is not None and masks[1] is not None and np.array_equal(masks[0], masks[1]):
        return regions
    best = both[shares.index(max(shares))]
    if max(shares) < LIKELY or min(shares) > max(shares) / 2:
        raise AnnotationError(
            f"{regions.path}: may be drawn on the whole slide, where {shares[0]:.0%} of it lies on tissue, or on the "
            f"scanned part alone ({bounds.width} x {bounds.height} px from x {bounds.x}, y {bounds.y}), where "
            f"{shares[1]:.0%} does; choose with --mask-frame slide or --mask-frame bounds (QuPath shows bounds)"
        )
    return best


class Ground(Protocol):
    """The size of a slide, level-0 px, and its scanned part."""

    @property
    def height(self) -> int:
        """Its height."""

    @property
    def width(self) -> int:
        """Its width."""

    @property
    def bounds(self) -> Region | None:
        """The part that was scanned; None where that is not recorded."""


def _share_on_tissue(
    regions: Regions, tissue: NDArray[np.bool_], info: Ground, bounds: Region
) -> tuple[float, NDArray[np.bool_]]:
    """Return the share of a drawing that lies on tissue, 0 if it reaches beyond the bounds, and its mask."""
    slide_px, shape = (info.height, info.width), (tissue.shape[0], tissue.shape[1])
    drawn = regions.drawn(slide_px)
    names = regions.wanted(drawn) or frozenset(regions.exclude)
    mask = drawn.mask(names, shape)
    inner = drawn.drawn if isinstance(drawn, Moved) else drawn
    if isinstance(inner, Shapes):
        low, high = inner.extent(names)
        first = (0, 0) if isinstance(drawn, Moved) else (bounds.y, bounds.x)
        for axis, side in enumerate((bounds.height, bounds.width)):
            if low[axis] < first[axis] - OUTSIDE * side or high[axis] > first[axis] + (1 + OUTSIDE) * side:
                return 0.0, mask
    return float((mask & tissue).sum() / max(1, mask.sum())), mask


def mask_file(folder: Path, slide_id: str, own: str = "") -> Path:
    """Return the slide's file in a folder of masks, see `find_mask`.

    Raises:
        AnnotationError: there is none, or more than one.
    """
    found = find_mask(folder, slide_id, own)
    if found is None:
        raise AnnotationError(
            f"{folder}: no mask for slide {slide_id}; expected {Path(slide_id).stem} with one of the endings "
            f"{' '.join(ENDINGS)}"
        )
    return found


def find_mask(folder: Path, slide_id: str, own: str = "") -> Path | None:
    """Return the slide's file in a folder of masks: named like the slide, with or without its ending; None if missing.

    Slides in folders have their masks in folders of the same name, or all in one. The slide itself, at `own`, is not a
    mask.

    Raises:
        AnnotationError: there is more than one.
    """
    slide = Path(as_path(slide_id))
    for name in (slide, slide.with_suffix(""), Path(slide.name), Path(slide.stem)):
        files = [file for ending in ENDINGS for file in alike(folder, f"{name}{ending}")]
        # a slide may be named as a mask would be: "a.tif"
        found = list(dict.fromkeys(file for file in files if file.is_file() and not _is_same(file, own)))
        if len(found) > 1:
            listed = ", ".join(file.name for file in found)
            raise AnnotationError(f"{folder}: {listed} are all masks for slide {slide_id}; keep one of them")
        if found:
            return found[0]
    return None


def _is_same(file: Path, other: str) -> bool:
    return bool(other) and Path(other).exists() and file.samefile(other)


def read_regions(
    mask: Path | None, slide_id: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = (), own: str = ""
) -> Regions | None:
    """Return the regions of a slide to be explained; None if there is no mask, which means all of it.

    Args:
        mask: a file, or a folder with a file for each slide.
        slide_id: the slide's id, its path relative to the archive.
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
    """Return the regions of a slide of a run: from its own mask, if a list names one, else from the settings' mask.

    Raises:
        AnnotationError: there is no such file, or it cannot be read.
    """
    if not entry.mask:
        return read_regions(settings.mask, entry.id, settings.include, settings.exclude, entry.path)
    path = Path(entry.mask)
    return Regions(path, read_bytes(path), settings.include, settings.exclude, shared=True)


def entry_outlines(entry: SlideEntry, settings: Settings, tissue: NDArray[np.bool_], info: Ground) -> Drawn | None:
    """Return the annotations whose outlines are drawn on a slide's overview; None if there are none for it.

    Args:
        entry, settings: the slide's entry and its run's settings.
        tissue, info: see `in_frame`.

    Raises:
        AnnotationError: there are several files, or one cannot be understood.
    """
    given = settings.outlines
    path = find_mask(given, entry.id, entry.path) if given is not None and given.is_dir() else given
    if path is None:
        return None
    regions = Regions(path, read_bytes(path), shared=True)
    return in_frame(regions, tissue, info, settings.mask_frame).drawn((info.height, info.width))


TRACED_PX = 2048  # longest side of a picture whose borders are traced


def class_outlines(drawn: Drawn, slide_px: tuple[int, int]) -> dict[str, list[NDArray[np.float64]]]:
    """Return the outlines of each class by name, including holes: (y, x) in level-0 px, float64 [n, 2] each.

    The last point is joined to the first. In pictures, borders are traced at up to `TRACED_PX` pixels a side.

    Raises:
        AnnotationError: a picture is damaged.
    """
    if isinstance(drawn, Moved):
        corner = np.array((drawn.part.y, drawn.part.x), np.float64)
        inner = class_outlines(drawn.drawn, (drawn.part.height, drawn.part.width))
        return {name: [outline + corner for outline in outlines] for name, outlines in inner.items()}
    if isinstance(drawn, Shapes):
        areas = drawn.areas_of(drawn.names)
        return {
            name: [outline for area in areas if area.name == name for outline in (area.outline, *area.holes)]
            for name in drawn.names
        }
    shrink = min(1.0, TRACED_PX / max(slide_px))
    shape = (max(1, round(slide_px[0] * shrink)), max(1, round(slide_px[1] * shrink)))
    return {name: _traced(drawn.mask({name}, shape), slide_px) for name in drawn.names}


def _traced(mask: NDArray[np.bool_], slide_px: tuple[int, int]) -> list[NDArray[np.float64]]:
    """Return the borders of a mask over the whole slide, (y, x) in level-0 px."""
    from skimage.measure import find_contours

    scale = np.array(slide_px, np.float64) / mask.shape
    found = find_contours(np.pad(mask, 1).astype(np.float32), 0.5)
    return [np.clip((outline[:-1] - 0.5) * scale, 0, slide_px) for outline in found]


def check_masks(entries: Sequence[SlideEntry], settings: Settings) -> None:
    """Refuse, before any work, masks and outlines that fit no slide; errors as for `check_mask`."""
    check_mask(settings.outlines, (), (), len(entries), "--outlines")
    without = sum(not entry.mask for entry in entries)
    if settings.mask is not None or without == len(entries):
        check_mask(settings.mask, settings.include, settings.exclude, without)


def check_mask(
    mask: Path | None, include: Sequence[str], exclude: Sequence[str], slides: int, flag: str = "--mask"
) -> None:
    """Refuse, before any work, a mask that fits no slide.

    Raises:
        ConfigError: classes without a mask, a mask that does not exist or has another ending, or one file for several
            slides.
    """
    if mask is None:
        if include or exclude:
            raise ConfigError("--include and --exclude choose classes of a mask; give the mask with --mask")
        return
    if not mask.exists():
        raise ConfigError(f"{mask}: does not exist, expected a file or a folder for {flag}; check the path")
    check_ending(mask)
    if slides > 1 and not mask.is_dir():
        raise ConfigError(
            f"{mask}: one file of {flag} for {slides} slides; give a folder with a file for each, named like the slide"
        )


def check_ending(path: Path) -> None:
    """Raise a ConfigError for a file with an ending that no mask has; folders pass."""
    if path.is_file() and path.suffix.lower() not in ENDINGS:
        raise ConfigError(
            f"{path}: neither annotations nor a mask; expected one of the endings {' '.join(ENDINGS)}"
            + (", because JPEG changes pixel values" if path.suffix.lower() in (".jpg", ".jpeg") else "")
        )


MAX_DRAWN = 32  # classes and regions that are outlined in pictures
REGION = "region: "  # before the names of regions


def drawn_labels(
    classes: Mapping[str, NDArray[np.bool_]], regions: Mapping[str, NDArray[np.bool_]]
) -> tuple[NDArray[np.uint32], str]:
    """Return what is drawn on pictures, uint32 [...], a bit for each class and region, and their names as JSON."""
    masks = {**classes, **{f"{REGION}{name}": mask for name, mask in regions.items()}}
    names = list(masks)[:MAX_DRAWN]
    found = np.zeros(next(iter(masks.values())).shape if masks else (0, 0), np.uint32)
    for bit, name in enumerate(names):
        found[masks[name]] |= np.uint32(1 << bit)
    return found, json.dumps(names)


SLIDE_PX = 700  # of the longer side of a slide's picture


def slide_picture(slide: Slide) -> NDArray[np.uint8] | None:
    """Return the slide, small, uint8 [h, w, 3]; None if it cannot be read as a whole."""
    try:
        return thumbnail(slide, 0.0, SLIDE_PX).rgb
    except SlideError:
        return None
