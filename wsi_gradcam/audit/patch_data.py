"""All that a piece of an audit needs of its patches: pixels, what the run stored, what was annotated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.annotated import annotated_slide
from wsi_gradcam.audit.plan import PIECE, patch_seeds
from wsi_gradcam.errors import ResumeError, SlideFormatError, SlideReadError
from wsi_gradcam.models.spec import probabilities
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.patch_store import OK
from wsi_gradcam.slides import read_region
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

SHIFT = 4  # of a patch's side: how far the grid is moved
REACH = 1.5  # footprints from which a probability still counts in a map of probabilities


@dataclass(frozen=True, eq=False)
class PatchData:
    """A piece of `count` patches, filled up to `PIECE` with its last one, so that all batches have one size.

    Attributes:
        number: of each in the slide's table.
        seeds: one for each.
        readable: bool; the others are zeros.
        raw: uint8 [PIECE, h, w, 3], as they are on the slide.
        rgb: the same as the model sees them before its own transform: with the stain that it wants.
        wide: the same with a margin at the bottom and the right, [PIECE, h + h // SHIFT, w + w // SHIFT, 3]; None
            where there is nothing round the patch.
        stored: float32 [PIECE, maps, h, w], what the run stored; None without a run.
        probability: float32 [PIECE, classes, h, w], maps of the patches' probabilities alone; None where nothing is
            known of patches round about.
        annotated: what each whole patch shows of the annotation, bool [PIECE, side, side]; None where there is none.
        regions: what each whole patch shows of areas that should not decide, bool [PIECE, side, side] by their class.
        background: RGB of bare glass.
        slide_relevance: of the slide's patches, by the label of a class: (mean of the first method's map, probability);
            of a slide's first piece alone.
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


def read_piece(context: Context[Workload], audit: AuditPlan, entry: SlideEntry, number: int) -> PatchData:
    """The piece of a slide's sample.

    Raises:
        ResumeError: the slide's results are of another run by now.
        SlideFormatError: the slide is another file than was explained.
        AnnotationError: the slide's annotations cannot be understood.
    """
    plan = _plan_of(context, audit, entry)
    sample = audit.samples[entry.id]
    part = sample.piece(number)
    missing = PIECE - (part.stop - part.start)
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
        PIECE - missing,
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
