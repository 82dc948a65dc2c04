"""Auditing slides: the stages, their order for a slide, and the workload that executors run.

One stage measures batches of patches, or a slide's bag for a slide-level model. The other writes a slide's
`spread.ome.zarr`: an image, aligned with the slide's heatmap, of where overlapping patches disagree; the same tissue
seen in a different frame should get the same explanation.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from wsi_gradcam.audit.measurements import SLIDE, Patches, arrays_of
from wsi_gradcam.audit.plan import AUDIT, AuditFolder, write_arrays
from wsi_gradcam.audit.questions import question_named
from wsi_gradcam.audit.schema import QUESTIONS
from wsi_gradcam.errors import StoreError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.display import QUANTILE
from wsi_gradcam.results.heatmap import (
    CHUNK,
    EXPLAINED,
    GROUP,
    Blender,
    Channel,
    Enlarger,
    HeatmapStore,
    coarsen,
    coarsen_flags,
    touching,
)
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.patch_store import OK
from wsi_gradcam.run.context import Exclusive
from wsi_gradcam.run.types import Processed, SlideJob, Stage, Task
from wsi_gradcam.run.workload import measuring_job
from wsi_gradcam.tissue.annotations import drawn_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.batch import PatchData, SlideBag
    from wsi_gradcam.audit.measures.subject import Subject
    from wsi_gradcam.audit.plan import Arrays, AuditPlan
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.patch_store import PatchStore
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.plan import Map, RunPlan

DRAWN_PX = 1 << 20  # of the level whose values determine the display window


@dataclass(frozen=True)
class AuditWorkload:
    """Auditing the slides of a sample.

    Attributes:
        plan: the plan of the audit.
        subject: the audited model in this process.
    """

    name: ClassVar[str] = AUDIT
    plan: AuditPlan
    subject: Exclusive[Subject] = field(default_factory=Exclusive, repr=False, compare=False)

    @property
    def patches(self) -> int:
        """The number of patches in the sample."""
        return sum(len(sample.patches) for sample in self.plan.samples.values())

    @property
    def run(self) -> RunPlan:
        """The plan of the run that is audited."""
        return self.plan.run

    def job(self, slide: SlideEntry) -> SlideJob:
        """Return the phases of a slide; see `Workload.job`."""
        overlap = self.plan.unit == "patch" and self.plan.settings.asks("stability") and has_overlap(self.plan)
        measured = [Task(MEASURE, slide, (i,)) for i in range(self.plan.samples[slide.id].batches)]
        return measuring_job(slide, [measured, [Task(SPREAD, slide)] if overlap else []])


def measure_batch(context: Context[AuditWorkload], entry: SlideEntry, number: int) -> Processed:
    """Measure a batch of a slide's sample and store the measurements, unless that has been done."""
    plan = context.workload.plan
    part = plan.samples[entry.id].batch(number)
    place = AuditFolder(plan.run.out / AUDIT).batch(entry.id, plan.audit_digest(), number)
    if place.is_file():
        return Processed(part.stop - part.start)
    if plan.unit == "slide":
        return _measure_slide(context, entry, place)
    from wsi_gradcam.audit.batch import (
        read_batch,
        subject_of,  # torch, which a client need not have
    )

    def make() -> Subject:
        return subject_of(plan, context.model().model)

    started = time.perf_counter()
    data = read_batch(context, plan, entry, number)
    read = time.perf_counter()
    subject = context.workload.subject
    with subject.used(make) as model:
        begun, idle_since = time.perf_counter(), max(started, subject.free_since)
        arrays = measure_patches(plan, model, data, entry.id, number)
        model_s = time.perf_counter() - begun
    write_arrays(place, arrays)
    unreadable = int((arrays["base/readable"] == 0).sum())
    return Processed(part.stop - part.start, unreadable, max(0.0, read - idle_since), model_s, read - started)


def _measure_slide(context: Context[AuditWorkload], entry: SlideEntry, place: StoragePath) -> Processed:
    """Measure the bag of a slide and store the measurements."""
    from wsi_gradcam.audit.batch import read_bag  # torch

    plan, started = context.workload.plan, time.perf_counter()
    bag = read_bag(context, plan, entry)
    read = time.perf_counter()
    write_arrays(place, measure_bag(plan, bag, plan.samples[entry.id].weights[0]))
    return Processed(1, 0, read - started, time.perf_counter() - read, read - started)


def measure_bag(plan: AuditPlan, bag: SlideBag, weight: float = 1.0) -> Arrays:
    """Return the measurements of a slide's bag, by name, with an axis of one slide first."""
    subject = bag.subject
    share = subject.probability(subject.logits)
    index = subject.target.index
    known = share is not None and index is not None
    facts = Patches(
        number=np.zeros(1, np.int64),
        weight=np.array([weight]),
        readable=np.ones(1, np.uint8),
        in_depth=np.ones(1, np.uint8),
        logits=subject.logits[None].astype(np.float32),
        logit=np.array([float(subject.scalar(subject.logits))]),
        explained_class=np.array([index], np.int64) if known else None,
        probability=np.array([float(share)]) if share is not None and known else None,
    )
    found = {**arrays_of(facts), "base/bag": np.array([float(len(subject.features))])}
    for name in plan.settings.only:
        if (record := question_named(name, "slide").measure(bag)) is not None:
            found |= arrays_of(record)
    return found


def write_slide_spread(context: Context[AuditWorkload], entry: SlideEntry) -> None:
    """Store where overlapping patches of a slide disagree, unless that has been done."""
    plan = context.workload.plan
    folder = AuditFolder(plan.run.out / AUDIT)
    if (folder.read_spread(entry.id) or {}).get("audit") != plan.audit_digest():
        slide_plan = Manifest(context.folder(entry).manifest).plan()
        if slide_plan is None:
            raise StoreError(f"{context.folder(entry).manifest} has no plan; run explain again")
        write_spread(folder, plan, entry.id, slide_plan, context.patch_store(entry))


def measure_patches(plan: AuditPlan, subject: Subject, data: PatchData, slide_id: str, number: int) -> Arrays:
    """Return the measurements of batch `number` of a slide, by name; NaN for a patch that can no longer be read."""
    from wsi_gradcam.cam.trunks import exact  # torch, which a client need not have

    with exact(subject.device):
        return _measure(plan, subject, data, slide_id, number)


def _measure(plan: AuditPlan, subject: Subject, data: PatchData, slide_id: str, number: int) -> Arrays:
    from wsi_gradcam.audit.batch import Batch, describe

    batch = Batch.of(plan, subject, data, number < plan.samples[slide_id].deep)
    found = arrays_of(describe(batch, slide_id, number)) | (drawn_arrays(data) if number == 0 else {})
    for name in QUESTIONS:
        if plan.settings.asks(name):
            question = question_named(name)
            if (record := question.measure(batch)) is not None:
                found |= arrays_of(record, np.float32)
            if number == 0 and question.measure_slide and (record := question.measure_slide(batch)) is not None:
                found |= {key: values[None] for key, values in arrays_of(record).items()}
    return {key: _trimmed(key, values, data) for key, values in found.items()}


def drawn_arrays(data: PatchData) -> Arrays:
    """Return what is drawn on patches and on the slide, with a small picture of it; only for a slide's first batch.

    Bits [N, side, side] and the names of the bits, see `drawn_labels`; in audits by older versions, which have no
    names, 1 is annotated and 2 is a region.
    """
    found: Arrays = {}
    if data.classes or data.regions:
        found["shown/drawn"], names = drawn_labels(data.classes, data.regions)
        found["shown/drawn_names"] = np.array([names] * len(data.number))
    if data.slide is not None:
        bits, names = drawn_labels(data.slide_classes, data.slide_regions)
        found |= {"shown/slide": data.slide[None], "shown/slide_drawn": bits[None]}
        found["shown/slide_names"] = np.array([names])
    return found


def _trimmed(key: str, values: NDArray[Any], data: PatchData) -> NDArray[Any]:
    """Return an array without the padding of the batch, and with NaN for patches that could not be read."""
    if key.startswith(SLIDE):
        return values
    found = values[: data.count].copy()
    if np.issubdtype(found.dtype, np.floating) and key != "base/weight":
        found[~data.readable[: data.count]] = np.nan
    return found


MEASURE = Stage("audit", measure_batch, needs_model=True)
SPREAD = Stage("spread", write_slide_spread)


def has_overlap(audit: AuditPlan) -> bool:
    """Return whether patches of the run overlap; only then can they disagree."""
    stride = audit.run.settings.stride(audit.run.patch_px)
    return stride[0] < audit.run.patch_px[0] or stride[1] < audit.run.patch_px[1]


def write_spread(folder: AuditFolder, audit: AuditPlan, slide_id: str, plan: SlidePlan, store: PatchStore) -> None:
    """Write the spread of the first method's maps, a channel per target, block by block, and its means.

    A pixel seen by only one patch is 0 and not marked as explained: nothing is known about it.
    """
    maps = [
        (number, shown) for number, shown in enumerate(audit.run.maps) if shown.method == audit.run.settings.method[0]
    ]
    image = HeatmapStore.create(
        folder.spread(slide_id),
        slide_id,
        plan.heatmap_px,
        (plan.slide_mpp[0] * plan.stride, plan.slide_mpp[1] * plan.stride),
        [Channel(f"spread: {shown.target.label}", active=i == 0) for i, (_, shown) in enumerate(maps)],
        attributes={
            "audit": audit.audit_digest(),
            "method": audit.run.settings.method[0],
            "run": plan.run_digest,
            "slide": plan.slide_digest,
        },
    )
    sums = np.zeros((len(maps), 3))
    for block in plan.blocks(0):
        sums += _write_block(image, audit, plan, store, maps, block)
    for level in range(1, len(plan.level_shapes)):
        for block in plan.blocks(level):
            _coarsen_block(image, level, block, len(maps))
    _set_windows(image)
    found = {
        shown.target.label: {"spread": _mean(total, count), "size": _mean(size, count)}
        for (_, shown), (total, size, count) in zip(maps, sums.tolist(), strict=True)
    }
    folder.spread_means(slide_id).write(json.dumps({"audit": audit.audit_digest(), "maps": found}, indent=1).encode())


def _write_block(
    image: HeatmapStore,
    audit: AuditPlan,
    plan: SlidePlan,
    store: PatchStore,
    maps: list[tuple[int, Map]],
    block: Region,
) -> NDArray[np.float64]:
    """Write a block; returns by map the sums of the spread and of the mean's magnitude, and the number of pixels."""
    seen = store.yx() + np.array(plan.view[:2])
    inside = touching(seen, plan.view[2:], plan.stride, block)
    inside = inside[store.status()[inside] == OK]
    enlarger = Enlarger(plan.view[2:], audit.run.facts.cam_shape, plan.stride, audit.run.settings.window)
    sums, several = np.zeros((len(maps), 3)), np.zeros((block.height, block.width), np.bool_)
    for channel, (number, shown) in enumerate(maps):
        cams = _cams(store, inside, number) * np.float32(shown.factor)
        mean, spreads, several = spread(enlarger, block, seen[inside], cams)
        image.write(0, channel, block, spreads.astype(np.float32))
        sums[channel] = (
            spreads[several].sum(dtype=np.float64),
            np.abs(mean[several]).sum(dtype=np.float64),
            several.sum(),
        )
    image.write_flags(0, block, np.where(several, EXPLAINED, 0).astype(np.uint8))
    return sums


def _cams(store: PatchStore, indices: NDArray[np.int64], number: int) -> NDArray[np.float32]:
    """Return one of the maps of some patches that are close together in the store."""
    if not len(indices):
        return store.cams(0, 0, number)
    first, last = int(indices[0]), int(indices[-1]) + 1
    parts, step = [], 1 << 14
    for start in range(first, last, step):
        stop = min(start + step, last)
        chosen = indices[(indices >= start) & (indices < stop)]
        if len(chosen):
            parts.append(store.cams(start, stop, number)[chosen - start])
    return np.concatenate(parts)


def _coarsen_block(image: HeatmapStore, level: int, block: Region, channels: int) -> None:
    height, width = image.shapes[level - 1]
    source = Region(block.y * 2, block.x * 2, block.height * 2, block.width * 2).intersect(Region(0, 0, height, width))
    bands = [
        Region(y, source.x, min(2 * CHUNK, source.bottom - y), source.width)
        for y in range(source.y, source.bottom, 2 * CHUNK)
    ]
    flags = [image.read_flags(level - 1, band) for band in bands]
    image.write_flags(level, block, np.concatenate([coarsen_flags(part) for part in flags]))
    for channel in range(channels):
        parts = [
            coarsen(image.read(level - 1, channel, band), (part & EXPLAINED) > 0)
            for band, part in zip(bands, flags, strict=True)
        ]
        image.write(level, channel, block, np.concatenate(parts))


def _set_windows(image: HeatmapStore) -> None:
    """Set the colour range from 0 to nearly the largest spread of the slide."""
    level = next((i for i, (h, w) in enumerate(image.shapes) if h * w <= DRAWN_PX), len(image.shapes) - 1)
    whole = Region(0, 0, *image.shapes[level])
    known = (image.read_flags(level, whole) & EXPLAINED) > 0
    shown = []
    for number, channel in enumerate(image.channels):
        values = image.read(level, number, whole)[known]
        high = float(values.max()) if len(values) else 1.0
        end = float(np.quantile(values, QUANTILE)) if len(values) else 1.0
        shown.append(Channel(channel.label, 0.0, max(high, end) or 1.0, 0.0, end or 1.0, channel.active))
    image.set_channels(shown)


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def spread(
    enlarger: Enlarger, block: Region, yx: NDArray[np.int64], cams: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Return (mean, spread, seen by several) of the patches in a block of the heatmap, each [height, width].

    The mean is the heatmap itself. The spread is the standard deviation around it with the same blending weights w,
    sqrt(sum w (v - mean)² / sum w), in the map's unit. A pixel seen by only one patch has spread 0 and is not seen by
    several: nothing is known about it. Two passes, since sum v² - mean² would be rounding error where patches agree.

    Args:
        yx: int64 [n, 2] in level-0 px of the patches that intersect the block, in their order.
        cams: float32 [n, h, w].
    """
    blender = Blender(enlarger, block)
    blender.add(yx, cams)
    mean, _ = blender.result()
    squares, weights, count = np.zeros_like(mean), np.zeros_like(mean), np.zeros(mean.shape, np.int64)
    for start in range(0, len(yx), GROUP):
        for place, value, weight in blender.placements(yx[start : start + GROUP], cams[start : start + GROUP]):
            squares[place] += weight * (value - mean[place]) ** 2
            weights[place] += weight
            count[place] += weight > 0
    several = count > 1
    variance = np.divide(squares, weights, out=np.zeros_like(squares), where=several)
    return mean, np.sqrt(variance), several
