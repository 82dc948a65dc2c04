"""What an audit needs of its patches: pixels, what the run stored, what is annotated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.plan import BATCH_SIZE, patch_seeds
from wsi_gradcam.errors import ResumeError, SlideFormatError, SlideReadError
from wsi_gradcam.models.spec import probabilities
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.patch_store import OK
from wsi_gradcam.slides import read_region
from wsi_gradcam.tissue.annotations import Area, rasterise, read_regions
from wsi_gradcam.tissue.annotations.regions import ENDINGS, PICTURE, parse, read_png_mask
from wsi_gradcam.tissue.masks import Shares
from wsi_gradcam.tissue.stain import apply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.audit.plan import AuditPlan
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.patch_store import PatchStore
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.types import Workload
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.tissue.annotations import Regions

    Box = tuple[float, float, float, float]

SHIFT = 4  # of a patch's side: how far the grid is moved
MASK_PX = 2048  # of the longer side of a mask over the whole slide, from which shares of patches are taken
UNNAMED = "region"
SIDE_PX = 64  # of a patch's mask: finer than the cells of any map
REACH = 1.5  # footprints from which a probability still counts in a map of probabilities


@dataclass(frozen=True, eq=False)
class PatchData:
    """A batch of `count` patches, filled up with its last one to P, `BATCH_SIZE`, so that all batches have one size.

    Attributes:
        number: of each in the slide's table.
        seeds: one for each.
        readable: bool; the others are zeros.
        raw: uint8 [P, h, w, 3], as they are on the slide.
        rgb: the same as the model sees them before its own transform: with the stain that it wants.
        wide: the same with a margin at the bottom and the right, [P, h + h // SHIFT, w + w // SHIFT, 3]; None
            where there is nothing round the patch.
        stored: float32 [P, maps, h, w], what the run stored; None without a run.
        probability: float32 [P, classes, h, w], maps of the patches' probabilities alone; None where nothing is
            known of patches round about.
        annotated: what each whole patch shows of the annotation, bool [P, side, side]; None where there is none.
        regions: what each whole patch shows of areas that should not decide, bool [P, side, side] by their class.
        background: RGB of bare glass.
        slide_relevance: of the slide's patches, by the label of a class: (mean of the first method's map, probability);
            of a slide's first batch alone.
    """

    count: int
    number: NDArray[np.int64]
    seeds: tuple[int, ...]
    readable: NDArray[np.bool_]
    raw: NDArray[np.uint8]
    rgb: NDArray[np.uint8]
    wide: NDArray[np.uint8] | None
    stored: NDArray[np.float32] | None
    probability: NDArray[np.float32] | None
    annotated: NDArray[np.bool_] | None
    regions: dict[str, NDArray[np.bool_]]
    background: tuple[int, int, int]
    slide_relevance: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def read_batch(context: Context[Workload], audit: AuditPlan, entry: SlideEntry, number: int) -> PatchData:
    """Read a batch of a slide's sample.

    Raises:
        ResumeError: the slide's results are of another run by now.
        SlideFormatError: the slide is another file than was explained.
        AnnotationError: the slide's annotations cannot be understood.
    """
    plan = _plan_of(context, audit, entry)
    sample = audit.samples[entry.id]
    part = sample.batch(number)
    missing = BATCH_SIZE - (part.stop - part.start)
    patches = [*sample.patches[part], *sample.patches[part.stop - 1 : part.stop] * missing]
    yx = [*sample.yx[part], *sample.yx[part.stop - 1 : part.stop] * missing]
    with context.slide(entry) as slide:
        if slide.info.digest != plan.slide_digest:
            raise SlideFormatError(f"{entry.path}: another file than was explained; put the right one there")
        raw, wide, readable = _pixels(slide, audit, yx)
    rgb = raw
    if plan.stain is not None:
        rgb, wide = apply(plan.stain, raw), apply(plan.stain, wide)
    store = context.patch_store(entry)
    whole = (0.0, 0.0, *plan.footprint)
    found = annotated_slide(audit.settings.annotations, entry.id, audit.settings.include, plan.slide_px)
    given = annotated_slide(audit.settings.regions, entry.id, (), plan.slide_px)
    return PatchData(
        BATCH_SIZE - missing,
        np.array(patches, np.int64),
        tuple(patch_seeds(audit.settings.seed, entry.id, patches)),
        readable,
        raw,
        rgb,
        wide,
        np.concatenate([store.read_span(i, i + 1).cams for i in patches]),
        _probability_maps(store, audit, plan, np.array(yx)),
        None if found is None else found.masks(yx, whole),
        {} if given is None else given.masks_by_class(yx, whole),
        context.glass(entry),
        {} if number else _slide_relevance(store, audit, plan),
    )


def _plan_of(context: Context[Workload], audit: AuditPlan, entry: SlideEntry) -> SlidePlan:
    folder = context.folder(entry)
    plan = Manifest(folder.manifest).plan()
    if plan is None or plan.run_digest != audit.run_digest:
        raise ResumeError(f"{folder.place}: another run has begun there meanwhile; audit again when it is finished")
    return plan


def _pixels(
    slide: Slide, audit: AuditPlan, yx: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]:
    """The patches, the same with a margin, and which could be read."""
    height, width = audit.run.patch_px
    rgb = np.zeros((len(yx), height, width, 3), np.uint8)
    wide = np.zeros((len(yx), height + height // SHIFT, width + width // SHIFT, 3), np.uint8)
    readable = np.ones(len(yx), np.bool_)
    for i, (y, x) in enumerate(yx):
        try:
            rgb[i] = read_region(slide, y, x, height, width, audit.run.mpp)
            wide[i] = read_region(slide, y, x, *wide.shape[1:3], audit.run.mpp)
        except SlideReadError:
            rgb[i], wide[i], readable[i] = 0, 0, False
    return rgb, wide, readable


def _slide_relevance(
    store: PatchStore, audit: AuditPlan, plan: SlidePlan
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """As `PatchData.slide_relevance`; maps are read a span at a time."""
    readable = store.status() == OK
    shares = probabilities(store.logits(0, plan.patches), audit.run.facts.activation)
    found = {}
    for number, shown in enumerate(audit.run.maps):
        target = shown.target
        wanted = audit.target.index in (None, target.index) and target.is_class and audit.target.is_class
        if shown.method == audit.run.settings.method[0] and target.index is not None and wanted:
            means = [store.cams(*span, number).mean(axis=(1, 2)) for span in plan.spans]
            found[target.label] = np.concatenate(means)[readable], shares[readable, target.index]
    return found


def _probability_maps(
    store: PatchStore, audit: AuditPlan, plan: SlidePlan, yx: NDArray[np.int64]
) -> NDArray[np.float32]:
    readable = store.status() == OK
    shares = probabilities(store.logits(0, plan.patches)[readable], audit.run.facts.activation)
    return probability_maps(yx, store.yx()[readable], shares, plan.footprint, audit.run.facts.cam_shape)


def probability_maps(
    yx: NDArray[np.int64],
    places: NDArray[np.int64],
    shares: NDArray[np.float32],
    footprint: tuple[float, float],
    grid: tuple[int, int],
) -> NDArray[np.float32]:
    """What the probabilities of the patches round about alone would show on patches at `yx`, [n, classes, h, w].

    At each cell the mean of `shares` [N, classes] of the patches at `places` [N, 2], weighed by a Gaussian of the
    distance of their centres, of half a footprint. It knows what the model answers, and nothing of why.
    """
    cells = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in grid), indexing="ij"), axis=-1).reshape(-1, 2)
    found = np.zeros((len(yx), shares.shape[1], len(cells)), np.float32)
    size = np.array(footprint)
    for i, corner in enumerate(yx):
        near = (np.abs(places - corner) < REACH * size).all(axis=1)
        centres = (places[near] - corner) / size + 0.5
        squares = ((cells[:, None] - centres[None]) ** 2).sum(axis=-1) / (2 * 0.5**2)
        weight = np.exp(-squares)
        found[i] = (weight @ shares[near] / weight.sum(axis=1, keepdims=True)).T
    return found.reshape(len(yx), shares.shape[1], *grid)


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
