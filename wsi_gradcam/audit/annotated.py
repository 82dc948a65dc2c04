"""Where annotations lie on patches: masks of what each patch shows of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.tissue.annotations import Area, rasterise, read_regions
from wsi_gradcam.tissue.annotations.regions import ENDINGS, PICTURE, parse, read_png_mask
from wsi_gradcam.tissue.masks import Shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.tissue.annotations import Regions

    Box = tuple[float, float, float, float]

MASK_PX = 2048  # of the longer side of a mask over the whole slide, from which shares of patches are taken
UNNAMED = "region"
SIDE_PX = 64  # of a patch's mask: finer than the cells of any map


@dataclass(frozen=True)
class Annotated:
    """The annotations of a slide of `slide_px` (height, width)."""

    regions: Regions
    slide_px: tuple[int, int]

    def shares(self, yx: NDArray[np.int64], view: Box) -> NDArray[np.float32]:
        """Share of each patch at level-0 `yx` [n, 2] that is annotated; `view` is (y, x, height, width) in it."""
        longer = max(self.slide_px)
        shape = tuple(max(1, round(side * min(1, MASK_PX / longer))) for side in self.slide_px)
        mask = self.regions.mask(self.slide_px, (shape[0], shape[1]))
        scale = np.array([shape[0] / self.slide_px[0], shape[1] / self.slide_px[1]])
        start = (yx + np.array(view[:2])) * scale
        return Shares(mask).of(np.concatenate([start, start + np.array(view[2:]) * scale], axis=1))

    def masks(self, yx: Sequence[tuple[int, int]], view: Box) -> NDArray[np.bool_]:
        """What each patch shows of the annotated areas, bool [n, SIDE_PX, SIDE_PX].

        Raises:
            AnnotationError: the file cannot be understood.
        """
        boxes = _boxes(yx, view)
        if self.regions.path.suffix.lower() == PICTURE:
            picture = read_png_mask(self.regions.path, self.regions.data)
            return np.stack([_cut(picture, self.slide_px, box) for box in boxes])
        areas = [area for area in parse(self.regions.path, self.regions.data).areas if self._counts(area)]
        return np.stack([_drawn(areas, box, str(self.regions.path)) for box in boxes])

    def masks_by_class(self, yx: Sequence[tuple[int, int]], view: Box) -> dict[str, NDArray[np.bool_]]:
        """As `masks`, of each class by its name; what has none, and a picture, is "region"."""
        if self.regions.path.suffix.lower() == PICTURE:
            return {UNNAMED: self.masks(yx, view)}
        boxes, areas = _boxes(yx, view), parse(self.regions.path, self.regions.data).areas
        found: dict[str, NDArray[np.bool_]] = {}
        for name in sorted({area.name for area in areas}):
            mine = [area for area in areas if area.name == name]
            found[name or UNNAMED] = np.stack([_drawn(mine, box, str(self.regions.path)) for box in boxes])
        return found

    def _counts(self, area: Area) -> bool:
        return not self.regions.include or area.name in self.regions.include


def annotated_slide(
    annotations: Path | None, slide_id: str, include: tuple[str, ...], slide_px: tuple[int, int]
) -> Annotated | None:
    """The annotations of a slide; None where a folder has none for it, or none of the classes that count.

    Raises:
        AnnotationError: several files would do, or one cannot be read.
    """
    if annotations is None or (annotations.is_dir() and not _has_file(annotations, slide_id)):
        return None
    regions = read_regions(annotations, slide_id, include)
    assert regions is not None
    named = include and regions.shared and regions.path.suffix.lower() != PICTURE
    if named and not set(include) & set(parse(regions.path, regions.data).names):
        return None
    return Annotated(regions, slide_px)


def _boxes(yx: Sequence[tuple[int, int]], view: Box) -> list[Box]:
    """(y, x, height, width) of what the model sees of each patch, level-0 px."""
    return [(y + view[0], x + view[1], view[2], view[3]) for y, x in yx]


def _has_file(folder: Path, slide_id: str) -> bool:
    """Whether a folder has annotations of a slide, by the names that `annotations.files.file_for` looks for."""
    slide = Path(slide_id)
    names = (slide, slide.with_suffix(""), Path(slide.name), Path(slide.stem))
    return any((folder / f"{name}{ending}").is_file() for name in names for ending in ENDINGS)


def _drawn(areas: Sequence[Area], box: Box, source: str) -> NDArray[np.bool_]:
    """The areas in a box (y, x, height, width)."""
    origin, end = np.array(box[:2]), np.array(box[:2]) + np.array(box[2:])
    near = [
        replace(area, outline=area.outline - origin, holes=tuple(hole - origin for hole in area.holes))
        for area in areas
        if (area.outline.max(axis=0) > origin).all() and (area.outline.min(axis=0) < end).all()
    ]
    side = round(box[2]), round(box[3])
    return rasterise(near, (max(1, side[0]), max(1, side[1])), (SIDE_PX, SIDE_PX), source)


def _cut(picture: NDArray[np.bool_], slide_px: tuple[int, int], box: Box) -> NDArray[np.bool_]:
    """A box of a mask over the whole slide, the nearest pixel of each place; False beside the slide."""
    at = []
    for axis in (0, 1):
        places = (box[axis] + (np.arange(SIDE_PX) + 0.5) * box[2 + axis] / SIDE_PX) / slide_px[axis]
        at.append(np.floor(places * picture.shape[axis]).astype(np.int64))
    inside = [(a >= 0) & (a < size) for a, size in zip(at, picture.shape, strict=True)]
    rows, columns = (np.clip(a, 0, size - 1) for a, size in zip(at, picture.shape, strict=True))
    found: NDArray[np.bool_] = picture[rows[:, None], columns] & inside[0][:, None] & inside[1]
    return found
