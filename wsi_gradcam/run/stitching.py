"""The stages that turn a slide's patch store into its results: blend a block, coarsen a level, finish the slide."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import ResumeError
from wsi_gradcam.geometry import Region
from wsi_gradcam.models.spec import probabilities
from wsi_gradcam.results.display import ATTENTION, PROBABILITY, QUANTILE, unit_of, window_end, window_floor
from wsi_gradcam.results.feature_store import BOXES, FeatureStore
from wsi_gradcam.results.heatmap import (
    CHUNK,
    EXPLAINED,
    TISSUE,
    UNREADABLE,
    Blender,
    Channel,
    Enlarger,
    HeatmapStore,
    blend_boxes,
    coarsen,
    coarsen_flags,
    touching,
)
from wsi_gradcam.results.manifest import (
    Manifest,
    SlideDone,
    SlideOutcome,
    SlideStatus,
    block_name,
    digest_of,
    span_name,
)
from wsi_gradcam.results.overview import draw_overview, read_mask
from wsi_gradcam.results.patch_store import OK, PatchStore, write_table
from wsi_gradcam.results.patch_store import UNREADABLE as UNREADABLE_PATCH
from wsi_gradcam.results.run_files import made_with, run_values
from wsi_gradcam.results.seals import digests_of
from wsi_gradcam.results.slide_tables import answer_in_words, answer_shares
from wsi_gradcam.tissue.annotations import entry_outlines

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.run_files import SlideFolder
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.plan import RunPlan
    from wsi_gradcam.run.types import Workload


LOG = logging.getLogger("wsi_gradcam")


def channels(run: RunPlan) -> list[Channel]:
    """Return the heatmap's channels: all explanations, then all probabilities."""
    maps = [Channel(shown.label, active=i == 0) for i, shown in enumerate(run.maps)]
    maps += [Channel(f"probability: {t.label}", active=False) for t in run.probabilities]
    first = "" if run.maps else next(iter(run.bag_channels), "")
    return maps + [Channel(label, active=label == first) for label in run.bag_channels]


def stitch_block(context: Context[Workload], entry: SlideEntry, number: int) -> None:
    """Blend one block of the heatmap's finest level."""
    run, plan, folder = context.run, context.plan(entry), context.folder(entry)
    block = plan.blocks(0)[number]
    patches, heatmap = context.patch_store(entry), context.heatmap(entry)
    seen = _seen(plan, patches.yx())
    boxes = context.features(entry).read(BOXES) if plan.features else None
    inside = touching(seen, plan.view[2:], plan.stride, block)
    readable = inside[_status(patches, inside, plan.span) == OK]
    enlarger = Enlarger(plan.view[2:], run.facts.cam_shape, plan.stride, run.settings.window)
    digests, covered = [], np.zeros((block.height, block.width), np.bool_)
    for channel in range(len(channels(run))):  # one at a time: memory does not grow with the targets
        if boxes is not None and channel >= len(run.maps):
            image, here = _blended_boxes(context, entry, channel, block, boxes)
        else:
            blender = Blender(enlarger, block)
            for first, chosen in _by_span(readable, plan.span):
                values = _channel_values(context, entry, channel, first, min(first + plan.span, plan.patches))
                blender.add(seen[chosen], values[chosen - first])
            image, here = blender.result()
        covered |= here
        heatmap.write(0, channel, block, image)
        digests.append(digest_of((image,)))
    flags = _flags(folder, plan, block, covered, seen[np.setdiff1d(inside, readable)])
    heatmap.write_flags(0, block, flags)
    _complete_block(folder, plan, 0, number, [*digests, digest_of((flags,))])


def _blended_boxes(
    context: Context[Workload], entry: SlideEntry, channel: int, block: Region, boxes: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a block of a channel with one number per patch, for patches of the features' size."""
    plan = context.plan(entry)
    inside = touching(boxes[:, :2], boxes[:, 2:], plan.stride, block)
    readable = inside[_status(context.patch_store(entry), inside, plan.span) == OK]
    found = [np.zeros(0, np.float32)]
    for first, chosen in _by_span(readable, plan.span):
        values = _channel_values(context, entry, channel, first, min(first + plan.span, plan.patches))
        found.append(values[chosen - first, 0, 0])
    return blend_boxes(boxes[readable], np.concatenate(found), plan.stride, block, context.run.settings.window)


def coarsen_block(context: Context[Workload], entry: SlideEntry, level: int, number: int) -> None:
    """Compute one block of a coarser level from the finished level before it."""
    run, plan, folder = context.run, context.plan(entry), context.folder(entry)
    block = plan.blocks(level)[number]
    height, width = plan.level_shapes[level - 1]
    heatmap = context.heatmap(entry)
    source = Region(block.y * 2, block.x * 2, block.height * 2, block.width * 2).intersect(Region(0, 0, height, width))
    bands = [  # the source of a whole block is four blocks in size: it is read in bands of a chunk
        Region(y, source.x, min(2 * CHUNK, source.bottom - y), source.width)
        for y in range(source.y, source.bottom, 2 * CHUNK)
    ]
    flags = np.concatenate([coarsen_flags(heatmap.read_flags(level - 1, band)) for band in bands])
    heatmap.write_flags(level, block, flags)
    explained = [(heatmap.read_flags(level - 1, band) & EXPLAINED) > 0 for band in bands]
    digests = []
    for channel in range(len(channels(run))):
        image = np.concatenate(
            [coarsen(heatmap.read(level - 1, channel, band), e) for band, e in zip(bands, explained, strict=True)]
        )
        heatmap.write(level, channel, block, image)
        digests.append(digest_of((image,)))
    _complete_block(folder, plan, level, number, [*digests, digest_of((flags,))])


def _seen(plan: SlidePlan, yx: NDArray[np.int64]) -> NDArray[Any]:
    """Return the top left corner of the part of each patch that the network sees, level-0 px [n, 2]."""
    return yx + np.array(plan.view[:2]) if any(plan.view[:2]) else yx


def _status(store: PatchStore, indices: NDArray[np.int64], span: int) -> NDArray[np.uint8]:
    """Return the status of patches, uint8 [n]; only the spans that contain them are read."""
    status = [store.status(first, first + span)[chosen - first] for first, chosen in _by_span(indices, span)]
    return np.concatenate(status) if status else np.zeros(0, np.uint8)


def _channel_values(
    context: Context[Workload], entry: SlideEntry, channel: int, start: int, stop: int
) -> NDArray[np.float32]:
    """Return the values of a heatmap channel for patches, float32 [n, h, w]: an explanation, or one number each."""
    run, store = context.run, context.patch_store(entry)
    if channel < len(run.maps):
        return store.cams(start, stop, channel) * np.float32(run.maps[channel].factor)
    number = channel - len(run.maps)
    if number < len(run.probabilities):
        target = run.probabilities[number]
        shares = probabilities(store.logits(start, stop), run.facts.activation)
        share = shares.max(axis=1) if target.index is None else shares[:, target.index]
    else:
        share = _bag_values(run, context.features(entry), number - len(run.probabilities), start, stop)
    return np.broadcast_to(share[:, None, None], (len(share), *run.facts.cam_shape))


def _bag_values(run: RunPlan, store: FeatureStore, number: int, start: int, stop: int) -> NDArray[np.float32]:
    """Return the values of one of `RunPlan.bag_channels` for patches, float32 [n]."""
    if number < len(run.targets):
        values: NDArray[np.float32] = store.read("relevance", start, stop)[:, 0, number]
        return values
    weights: NDArray[np.float32] = store.read(ATTENTION, start, stop)[:, number - len(run.targets)]
    return weights


def _by_span(indices: NDArray[np.int64], span: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Return (first patch of the span, the indices in it) for each span that has some."""
    if not len(indices):
        return []
    cuts = np.flatnonzero(np.diff(indices // span)) + 1
    return [(int(part[0]) // span * span, part) for part in np.split(indices, cuts)]


def _flags(
    folder: SlideFolder,
    plan: SlidePlan,
    block: Region,
    covered: NDArray[np.bool_],
    unreadable: NDArray[Any],
) -> NDArray[np.uint8]:
    """Return the coverage label of a block: tissue (by the mask's nearest pixel), explained, unreadable."""
    mask = read_mask(folder.tissue)
    y = (np.arange(block.y, block.bottom) + 0.5) * plan.stride * mask.shape[0] / plan.slide_px[0]
    x = (np.arange(block.x, block.right) + 0.5) * plan.stride * mask.shape[1] / plan.slide_px[1]
    rows, columns = np.minimum(y.astype(int), mask.shape[0] - 1), np.minimum(x.astype(int), mask.shape[1] - 1)
    flags = np.where(mask[rows[:, None], columns], TISSUE, 0).astype(np.uint8)
    flags[covered] |= EXPLAINED
    for top, left in unreadable.tolist():
        first_y, first_x = max(0, int(top // plan.stride) - block.y), max(0, int(left // plan.stride) - block.x)
        end_y = max(0, int(-(-(top + plan.view[2]) // plan.stride)) - block.y)
        end_x = max(0, int(-(-(left + plan.view[3]) // plan.stride)) - block.x)
        flags[first_y:end_y, first_x:end_x] |= UNREADABLE
    return flags


def _complete_block(folder: SlideFolder, plan: SlidePlan, level: int, number: int, digests: list[str]) -> None:
    record = {"digests": digests, "run": plan.run_digest}
    Manifest(folder.manifest).complete("blocks", block_name(level, number), record)


# Display statistics come from the finest level with at most this many pixels: a million values determine a 99.5%
# quantile well, and memory stays limited.
STATISTICS_PX = 1 << 20


def finish_slide(context: Context[Workload], entry: SlideEntry) -> SlideOutcome:
    """Set the heatmap's display windows, write the slide's table and overview, and record it as done.

    A cluster may ask twice, if the worker that did it died before it could answer: the record stays as it is.

    Raises:
        ResumeError: some pieces are not this run's; they are forgotten, so that running again recomputes them.
        SlideFormatError: the slide's file was replaced meanwhile.
    """
    run, folder = context.run, context.folder(entry)
    manifest, store, heatmap = Manifest(folder.manifest), PatchStore(folder.cams), HeatmapStore(folder.heatmap)
    if (done := manifest.done()) is not None:
        manifest.fold()
        return done.outcome
    plan = context.plan(entry)
    spans, blocks = manifest.records("spans"), manifest.records("blocks")
    _refuse_foreign(manifest, plan, store, spans, blocks)
    floor = window_floor(run.facts.bag is not None, plan.patches)
    shown = [_windowed(heatmap, i, channel, floor) for i, channel in enumerate(channels(run))]
    heatmap.set_channels(shown)
    causes = {int(i): cause for record in spans.values() for i, cause in record["causes"].items()}
    bag = None if run.facts.bag is None else FeatureStore(folder.features)
    write_table(folder.table, run, plan, store, causes, entry.id, None if bag is None else bag.columns)
    with context.slide(entry) as slide:
        outlines = entry_outlines(entry, run.settings, read_mask(folder.tissue), slide.info)
        answer = manifest.answer()
        words = answer_in_words(answer, answer_shares(answer, run.facts.activation))
        draw_overview(folder.overview, run, plan, slide, heatmap, shown, outlines, words)
    context.check_slide(entry)
    folder.place.remove_partial_files()
    outcome = SlideOutcome(
        status=SlideStatus.OK if plan.patches else SlideStatus.NO_TISSUE,
        patches=plan.patches,
        unreadable=int((store.status() == UNREADABLE_PATCH).sum()),
        cause=_most_common(causes),
        notes="; ".join([*plan.notes, *_agreement(entry, spans)]),
    )
    record = SlideDone(
        outcome,
        spans={name: value["digest"] for name, value in spans.items()},
        blocks={name: value["digests"] for name, value in blocks.items()},
        files=digests_of(folder.place, folder.covered()),
        arrays={**store.known_digests(), **({} if bag is None else bag.digests())},
        slide=entry.id,
        made_with=made_with(run_values(run)),
        answer=manifest.answer(),
    )
    manifest.write_done(record)
    return outcome


AGREEMENT = 0.95  # cosine of features; pictures resized by other programs leave about 0.98


def _agreement(entry: SlideEntry, spans: dict[str, Any]) -> list[str]:
    """Return a note if given features are not those that the encoder computes for their patches, by their cosine."""
    found = [record["agreement"] for record in spans.values() if record.get("agreement")]
    count = sum(each["patches"] for each in found)
    mean = sum(each["mean"] * each["patches"] for each in found) / count if count else 1.0
    if mean >= AGREEMENT:
        return []
    note = (
        "its features are not those that the encoder computes for these patches: their mean cosine similarity is "
        f"{mean:.3f} ; relevance is based on the features, maps on the encoder"
    )
    LOG.warning("%s: %s", entry.path, note)
    return [note]


def _refuse_foreign(
    manifest: Manifest, plan: SlidePlan, store: PatchStore, spans: dict[str, Any], blocks: dict[str, Any]
) -> None:
    """Raise a ResumeError if a process of another run, still busy when this one began, has overwritten its pieces."""
    parts = dict(zip(map(span_name, range(len(plan.spans))), plan.spans, strict=True))
    found = zip(parts, store.digests(list(parts.values())), strict=True)
    records = ((name, spans.get(name, {}), digest) for name, digest in found)
    foreign = [name for name, r, digest in records if (r.get("run"), r.get("digest")) != (plan.run_digest, digest)]
    count = sum(len(plan.blocks(level)) for level in range(len(plan.level_shapes)))
    whole = len(blocks) == count and all(block.get("run") == plan.run_digest for block in blocks.values())
    if foreign or not whole:
        manifest.forget("spans", foreign)
        manifest.forget("blocks", blocks)
        raise ResumeError(
            f"{len(foreign)} spans of the slide were overwritten by another process; use each --out in only one run at "
            "a time, and run the same command again"
        )


def _most_common(causes: dict[int, str]) -> str:
    return Counter(causes.values()).most_common(1)[0][0] if causes else ""


def _windowed(heatmap: HeatmapStore, number: int, channel: Channel, floor: float) -> Channel:
    """Return an explanation's channel with its value range, and a window from 0 to the 99.5% quantile."""
    unit = unit_of(channel.label)
    if unit == PROBABILITY:
        return channel
    level = next((i for i, (h, w) in enumerate(heatmap.shapes) if h * w <= STATISTICS_PX), len(heatmap.shapes) - 1)
    whole = Region(0, 0, *heatmap.shapes[level])
    values = heatmap.read(level, number, whole)[(heatmap.read_flags(level, whole) & EXPLAINED) > 0]
    if not len(values):
        return channel
    low, high, top = float(values.min()), float(values.max()), float(np.quantile(values, QUANTILE))
    end = window_end(top, unit, floor)
    return Channel(channel.label, min(low, 0.0), max(high, end), 0.0, end, channel.active)
