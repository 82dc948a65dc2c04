"""What is audited at once: a batch of patches with pixels and maps, or, for a slide-level model, the bag of a slide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from wsi_gradcam.audit.archive import annotated_slide, ground_of
from wsi_gradcam.audit.measurements import Patches
from wsi_gradcam.audit.measures.bags import (
    BagSubject,
    Flipping,
    flipping,
    is_constant,
    leaving_order,
    of_heads,
    relevance_of,
)
from wsi_gradcam.audit.measures.sanity import encoder_stays
from wsi_gradcam.audit.measures.shortcuts import input_masks
from wsi_gradcam.audit.measures.subject import Subject, control_maps, probability_maps
from wsi_gradcam.audit.plan import BATCH_SIZE, patch_seeds
from wsi_gradcam.audit.schema import ATTENTION, GLASS, PEN, PROBABILITY, RANDOM_ORDER, SINGLE
from wsi_gradcam.cam.engine import pool_to_layer_grid
from wsi_gradcam.errors import ModelError, ResumeError, SlideError, SlideFormatError, SlideReadError
from wsi_gradcam.models.spec import probabilities
from wsi_gradcam.results.feature_store import Bag
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.patch_store import OK
from wsi_gradcam.slides import read_region
from wsi_gradcam.tissue.annotations import slide_picture
from wsi_gradcam.tissue.stain import apply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from wsi_gradcam.audit.measures.subject import Aim
    from wsi_gradcam.audit.plan import AuditPlan
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.results.feature_store import FeatureStore
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.patch_store import PatchStore
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.types import Workload
    from wsi_gradcam.slides import Slide

SHIFT = 4  # of a patch's side: how far the grid is shifted


@dataclass(frozen=True, eq=False)
class PatchData:
    """A batch of `count` patches, padded with its last one to P, `BATCH_SIZE`, so that all batches have the same size.

    Attributes:
        number: of each in the slide's table.
        seeds: one for each.
        readable: bool; unreadable patches are zeros.
        raw: uint8 [P, h, w, 3], as on the slide.
        rgb: the same as the model sees them before its own transform: with the stain that it expects.
        wide: the same with a margin at the bottom and the right, [P, h + h // SHIFT, w + w // SHIFT, 3]; None where
            nothing surrounds the patch.
        stored: float32 [P, maps, h, w], as stored by the run; None without a run.
        probability: float32 [P, classes, h, w], maps of only the patches' probabilities; None where nothing is known
            about surrounding patches.
        annotated: where each whole patch is annotated, bool [P, side, side]; None without annotations.
        regions: where each whole patch shows areas that should not affect the answer, bool [P, side, side] by class.
        background: RGB of bare glass.
        slide_relevance: of the slide's patches, by class label: (mean of the first method's map, probability); only for
            the first batch of a slide.
        classes: where each whole patch shows each annotated class; only for the first batch of a slide, for its
            pictures.
        slide, slide_classes, slide_regions: the whole slide, small, uint8 [h, w, 3], and masks [h, w] of what is drawn
            on it; only for the first batch of a slide, and only if there is something.
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
    classes: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    slide: NDArray[np.uint8] | None = None
    slide_classes: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    slide_regions: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


def read_batch(context: Context[Workload], audit: AuditPlan, entry: SlideEntry, number: int) -> PatchData:
    """Read a batch of a slide's sample.

    Raises:
        ResumeError: the slide's results now belong to another run.
        SlideFormatError: the slide is not the file that was explained.
        AnnotationError: the slide's annotations cannot be read.
    """
    plan = _plan_of(context, audit, entry)
    sample = audit.samples[entry.id]
    part = sample.batch(number)
    missing = BATCH_SIZE - (part.stop - part.start)
    patches = [*sample.patches[part], *sample.patches[part.stop - 1 : part.stop] * missing]
    yx = [*sample.yx[part], *sample.yx[part.stop - 1 : part.stop] * missing]
    with context.slide(entry) as slide:
        if slide.info.digest != plan.slide_digest:
            raise SlideFormatError(
                f"{entry.path}: not the file that was explained; restore the original there, or explain again"
            )
        raw, wide, readable = _pixels(slide, audit, yx)
        ground = ground_of(plan, context.folder(entry), audit.settings)
        found = annotated_slide(
            audit.settings.annotations, entry.id, audit.settings.include, plan.slide_px, entry.path, ground
        )
        given = annotated_slide(audit.settings.regions, entry.id, (), plan.slide_px, entry.path, ground)
        small = None if number or (found or given) is None else slide_picture(slide)
    rgb = raw
    if plan.stain is not None:
        rgb, wide = apply(plan.stain, raw), apply(plan.stain, wide)
    store = context.patch_store(entry)
    whole = (0.0, 0.0, *plan.footprint)
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
        {} if number or found is None else found.masks_by_class(yx, whole),
        small,
        {} if small is None or found is None else found.slide_masks(small.shape[:2]),
        {} if small is None or given is None else given.slide_masks(small.shape[:2]),
    )


def _plan_of(context: Context[Workload], audit: AuditPlan, entry: SlideEntry) -> SlidePlan:
    folder = context.folder(entry)
    plan = Manifest(folder.manifest).plan()
    if plan is None or plan.run_digest != audit.run_digest:
        raise ResumeError(
            f"{folder.place}: another run has started there in the meantime; audit again when it is finished"
        )
    return plan


def _pixels(
    slide: Slide, audit: AuditPlan, yx: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the patches, the patches with a margin, and which could be read."""
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
    """Return `PatchData.slide_relevance`; maps are read one span at a time."""
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


SHOWN_PX = 160  # of the longer side of an example


@dataclass(frozen=True, eq=False)
class Batch:
    """Patches being audited.

    Attributes:
        images: [P, 3, H, W] as seen by the network.
        maps: [P, h, w] of the run's methods, by name, on the grid stored by the run.
        controls: maps that know nothing about the model, by name, on the same grid.
        in_depth: whether slow measurements are made too.
    """

    plan: AuditPlan
    subject: Subject
    data: PatchData
    images: Tensor
    aim: Aim
    maps: dict[str, Tensor]
    controls: dict[str, Tensor]
    in_depth: bool

    @classmethod
    def of(cls, plan: AuditPlan, subject: Subject, data: PatchData, in_depth: bool) -> Batch:
        """Return the batch of some patches; this runs the model and each method once."""
        images = subject.images(data.rgb)
        aim = subject.aim(images, plan.target)
        grid = plan.run.facts.cam_shape
        methods = plan.run.settings.method
        maps = {name: pool_to_layer_grid(subject.maps(images, aim, name), name, grid) for name in methods}
        controls = control_maps(images, grid, data.seeds)
        if data.probability is not None and aim.classes is not None:
            rows = torch.arange(len(images))
            controls[PROBABILITY] = torch.from_numpy(data.probability)[rows, aim.classes].to(images.device)
        return cls(plan, subject, data, images, aim, maps, controls, in_depth)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of the run."""
        return self.plan.run.settings.method

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the maps."""
        return self.plan.run.facts.cam_shape

    @property
    def patch_px(self) -> tuple[int, int]:
        """(height, width) of a patch."""
        return self.plan.run.patch_px

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of a patch."""
        return self.plan.run.mpp

    @property
    def seed(self) -> int:
        """The seed of everything that is the same for all patches."""
        return self.plan.settings.seed

    @cached_property
    def map_arrays(self) -> dict[str, NDArray[np.float32]]:
        """The methods' maps as arrays."""
        return {name: map_.float().cpu().numpy() for name, map_ in self.maps.items()}

    def input_masks(self, masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return masks [P, h, w] of patches as seen by the network, [P, H, W], by nearest pixels."""
        height, width = self.images.shape[2:]
        return input_masks(masks, (height, width), self.plan.run.facts.view, self.patch_px)


def subject_of(plan: AuditPlan, model: Model) -> Subject:
    """Return the run's model, to be audited."""
    return Subject.of(model, plan.run.settings.method, plan.run.facts.layer, BATCH_SIZE)


def describe(batch: Batch, slide_id: str, number: int) -> Patches:
    """Return what is known about every patch of batch `number` of a slide.

    That is what was explained, its maps, and whether they are the run's.
    """
    data, aim = batch.data, batch.aim
    sample = batch.plan.samples[slide_id]
    weights = np.zeros(BATCH_SIZE)
    weights[: data.count] = sample.weights[sample.batch(number)]
    classes, probability = aim.classes, aim.probability(aim.logits)
    known = classes is not None and probability is not None
    return Patches(
        number=data.number,
        weight=weights,
        readable=data.readable.astype(np.uint8),
        in_depth=np.full(BATCH_SIZE, batch.in_depth, np.uint8),
        logits=aim.logits.float().cpu().numpy(),
        logit=aim.logit(aim.logits).cpu().double().numpy(),
        explained_class=classes.numpy() if known and classes is not None else None,
        probability=probability.cpu().double().numpy() if known and probability is not None else None,
        difference={name: _difference(batch, name) for name in batch.methods},
        maps=batch.map_arrays,
        shown=np.stack([small_picture(rgb) for rgb in data.rgb]) if number == 0 else None,
    )


def _difference(batch: Batch, method: str) -> NDArray[np.float64]:
    """Return how far the maps are from those stored by the run, relative to these; NaN where none was stored."""
    run, stored, maps = batch.plan.run, batch.data.stored, batch.map_arrays[method]
    found = np.full(len(maps), np.nan)
    if stored is None:
        return found
    rows = {
        shown.target.index if shown.target.is_class else shown.target: number
        for number, shown in enumerate(run.maps)
        if shown.method == method
    }
    classes = None if batch.aim.classes is None else batch.aim.classes.tolist()
    for i, map_ in enumerate(maps):
        keys = [batch.plan.target] if classes is None else [classes[i], None]
        row = next((rows[key] for key in keys if key in rows), None)
        if row is not None and (size := np.linalg.norm(stored[i, row])) > 0:
            found[i] = np.linalg.norm(map_ - stored[i, row]) / size
    return found


def small_picture(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a patch for a report, at most `SHOWN_PX` large."""
    scale = min(1.0, SHOWN_PX / max(rgb.shape[:2]))
    size = max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))


RANDOM_ORDERS, FEWER_ORDERS = 10, 3  # for networks that answer all orders at once, and for others
ENCODED = 32  # patches of a slide passed to random encoders
SHOWS = 0.05  # of a patch: with at least this much ink, glass or region it counts as such
HELD_BYTES = 1 << 29  # of a bag's features held in memory; larger ones are read again


@dataclass(frozen=True, eq=False)
class SlideBag:
    """A slide of a slide-level model being audited.

    Attributes:
        subject: its bag, and the network that predicts from it.
        relevance: [N] of the patches, by method.
        places: [N, 2] of the patches' corners, in patches' sides; None where they are not known.
        suspects: [N] which patches show something that should not affect the answer, by name; only those that occur.
        annotated: [N] share of each patch that is annotated; None if nothing is.
        seed: of the slide's random numbers.
        model_seed: of random weights, which are the same for all slides.
        staying_of_encoder: returns how similar maps stay with random weights of the encoder, [draws] by method; empty
            if that cannot be measured.
    """

    subject: BagSubject
    relevance: dict[str, NDArray[np.float64]]
    places: NDArray[np.float64] | None
    suspects: dict[str, NDArray[np.bool_]]
    annotated: NDArray[np.float64] | None
    seed: int
    model_seed: int
    staying_of_encoder: Callable[[], dict[str, list[float]]] = field(default=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose relevances are audited."""
        return tuple(self.relevance)

    @cached_property
    def flips(self) -> dict[str, list[Flipping]]:
        """How the answer changes as patches are removed, by method; at random in several orders.

        A map that is the same everywhere has no order: it gets the random orders, lest one order win by chance.
        """
        draws = RANDOM_ORDERS if self.subject.in_one_go else FEWER_ORDERS
        orders = [leaving_order(values, self.seed) for values in self.relevance.values()]
        chance = [np.random.default_rng([self.seed, i]).permutation(len(orders[0])) for i in range(draws)]
        found = flipping(self.subject, [*orders, *chance])
        at_random = found[len(orders) :]
        flips = {
            name: at_random if is_constant(values) else [one]
            for (name, values), one in zip(self.relevance.items(), found, strict=False)
        }
        return {**flips, RANDOM_ORDER: at_random}

    def some(self, count: int) -> BagSubject:
        """Return the bag of `count` of its patches, drawn at random; all of them if there are no more."""
        size = len(self.subject.features)
        if size <= count:
            return self.subject.part(np.arange(size))
        return self.subject.part(np.sort(np.random.default_rng(self.seed).choice(size, count, replace=False)))


def read_bag(context: Context[Workload], audit: AuditPlan, entry: SlideEntry) -> SlideBag:
    """Read a slide's bag: its features, what the run stored for each patch, and a few patches' pixels for encoders.

    Raises:
        ResumeError: the slide's results now belong to another run.
        AnnotationError: the slide's annotations cannot be read.
    """
    plan, run, settings = _plan_of(context, audit, entry), audit.run, audit.settings
    store, places = context.features(entry), context.patch_store(entry)
    bag = Bag(store)
    rows = bag.rows
    held = bag[: len(rows)] if len(rows) * store.shape[1] * 4 <= HELD_BYTES else bag
    subject = BagSubject.of(context.aggregator().network, held, audit.target, run.slide_model.activation)
    (seed,) = patch_seeds(settings.seed, entry.id, [0])
    yx, whole = places.yx()[rows], (0.0, 0.0, *plan.footprint)
    ground = ground_of(plan, context.folder(entry), settings)
    found = annotated_slide(settings.annotations, entry.id, settings.include, plan.slide_px, entry.path, ground)
    given = annotated_slide(settings.regions, entry.id, (), plan.slide_px, entry.path, ground)
    shares = {PEN: places.share(PEN)[rows], GLASS: places.share(GLASS)[rows]}
    shares |= {} if given is None else {given_name(n): s for n, s in given.shares_by_class(yx, whole).items()}
    return SlideBag(
        subject,
        {name: stored_relevance(audit, subject, store, rows, name) for name in audit.methods},
        yx / np.array(plan.footprint),
        {name: share > SHOWS for name, share in shares.items() if (share > SHOWS).any()},
        None if found is None else found.shares(yx, whole).astype(np.float64),
        seed,
        settings.seed,
        partial(_encoder_stays, context, audit, entry, subject, rows),
    )


def _encoder_stays(
    context: Context[Workload], audit: AuditPlan, entry: SlideEntry, subject: BagSubject, rows: NDArray[np.int64]
) -> dict[str, list[float]]:
    """Return `SlideBag.staying_of_encoder` for a few patches of the slide, whose pixels are read."""
    if audit.run.slide_model.encoder is None:
        return {}
    plan, random = _plan_of(context, audit, entry), np.random.default_rng(audit.settings.seed)
    chosen = np.sort(random.choice(len(rows), min(ENCODED, len(rows)), replace=False))
    yx = context.patch_store(entry).yx()[rows[chosen]].tolist()
    mpp = plan.patch_mpp(audit.run.patch_px, audit.run.mpp)
    try:
        with context.slide(entry) as slide:
            rgb = np.stack([read_region(slide, y, x, *audit.run.patch_px, mpp) for y, x in yx])
    except SlideError:
        return {}
    model, part = context.model().model, subject.part(chosen)
    device = next(iter(model.module.parameters()), torch.empty(0)).device
    treated = rgb if plan.stain is None else apply(plan.stain, rgb)
    images = model.prepare(torch.from_numpy(treated).to(device))

    def relevance(features: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        return relevance_of(subject.network, features, subject.target, audit.methods)

    before = relevance(np.asarray(part.features, np.float64))
    return encoder_stays(model.module, images, relevance, before, seed=audit.settings.seed)


def given_name(name: str) -> str:
    """Return the name of a suspect that somebody has drawn."""
    return f"{name.replace('/', '-')} (given)"


def stored_relevance(
    audit: AuditPlan, subject: BagSubject, store: FeatureStore, rows: NDArray[np.int64], method: str
) -> NDArray[np.float64]:
    """Return the relevance [N] of the patches `rows` for what is audited, as stored by the run.

    Raises:
        ModelError: the slide's predicted class was not explained.
    """
    run = audit.run
    if method == ATTENTION:
        return of_heads(store.read(ATTENTION)[rows], subject.target, len(run.facts.classes))
    if method == SINGLE:
        return subject.scalar(store.read("logits")[rows].astype(np.float64))
    same = [audit.target, subject.target]
    column = next(
        (i for i, one in enumerate(run.targets) if one in same or (one.is_class and one.index == subject.target.index)),
        None,
    )
    if column is None:
        raise ModelError(f"{subject.target.label} is predicted for the slide, but was not explained; give --target")
    number = run.settings.bag_method.index(method)
    found: NDArray[np.float64] = store.read("relevance")[rows, number, column].astype(np.float64)
    return found
