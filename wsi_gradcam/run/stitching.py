"""The stages that make the heatmap: blend patches into a block, make a coarser block of a finished level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.geometry import Region
from wsi_gradcam.models.spec import probabilities
from wsi_gradcam.results.heatmap import CHUNK, EXPLAINED, TISSUE, UNREADABLE, Channel
from wsi_gradcam.results.manifest import Manifest, block_name, digest_of
from wsi_gradcam.results.overview import read_mask
from wsi_gradcam.results.patch_store import OK, PatchStore
from wsi_gradcam.results.stitch import Blender, Enlarger, coarsen, coarsen_flags, touching

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.run_files import SlideFolder
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.plan import RunPlan
    from wsi_gradcam.run.types import Workload


def channels(run: RunPlan) -> list[Channel]:
    """The heatmap's channels: all explanations, then all probabilities."""
    maps = [Channel(shown.label, active=i == 0) for i, shown in enumerate(run.maps)]
    return maps + [Channel(f"probability: {t.label}", active=False) for t in run.probabilities]


def stitch_block(context: Context[Workload], entry: SlideEntry, number: int) -> None:
    """Blend one block of the heatmap's finest level."""
    run, plan, folder = context.run, context.plan(entry), context.folder(entry)
    block = plan.blocks(0)[number]
    patches, heatmap = context.patch_store(entry), context.heatmap(entry)
    seen = _seen(plan, patches.yx())
    inside = touching(seen, plan.view[2:], plan.stride, block)
    readable = inside[_status(patches, inside, plan.span) == OK]
    enlarger = Enlarger(plan.view[2:], run.facts.cam_shape, plan.stride, run.settings.window)
    digests, covered = [], np.zeros((block.height, block.width), np.bool_)
    for channel in range(len(channels(run))):  # one at a time: memory does not grow with the targets
        blender = Blender(enlarger, block)
        for first, chosen in _by_span(readable, plan.span):
            values = _channel_values(run, patches, channel, first, min(first + plan.span, plan.patches))
            blender.add(seen[chosen], values[chosen - first])
        image, covered = blender.result()
        heatmap.write(0, channel, block, image)
        digests.append(digest_of((image,)))
    flags = _flags(folder, plan, block, covered, seen[np.setdiff1d(inside, readable)])
    heatmap.write_flags(0, block, flags)
    _complete_block(folder, plan, 0, number, [*digests, digest_of((flags,))])


def coarsen_block(context: Context[Workload], entry: SlideEntry, level: int, number: int) -> None:
    """Make one block of a coarser level from the finished level before it."""
    run, plan, folder = context.run, context.plan(entry), context.folder(entry)
    block = plan.blocks(level)[number]
    height, width = plan.level_shapes[level - 1]
    heatmap = context.heatmap(entry)
    source = Region(block.y * 2, block.x * 2, block.height * 2, block.width * 2).intersect(Region(0, 0, height, width))
    bands = [  # the source of a whole block is four blocks large: it is read in bands of a chunk
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
    """Where the part of each patch begins that the network sees, level-0 px [n, 2]."""
    return yx + np.array(plan.view[:2]) if any(plan.view[:2]) else yx


def _status(store: PatchStore, indices: NDArray[np.int64], span: int) -> NDArray[np.uint8]:
    """Status of patches, uint8 [n]: no more is read than the spans that they are in."""
    status = [store.status(first, first + span)[chosen - first] for first, chosen in _by_span(indices, span)]
    return np.concatenate(status) if status else np.zeros(0, np.uint8)


def _channel_values(run: RunPlan, store: PatchStore, channel: int, start: int, stop: int) -> NDArray[np.float32]:
    """What a heatmap channel shows of patches, float32 [n, h, w]: an explanation, or the probability."""
    if channel < len(run.maps):
        return store.cams(start, stop, channel) * np.float32(run.maps[channel].factor)
    target = run.probabilities[channel - len(run.maps)]
    shares = probabilities(store.logits(start, stop), run.facts.activation)
    share = shares.max(axis=1) if target.index is None else shares[:, target.index]
    return np.broadcast_to(share[:, None, None], (len(share), *run.facts.cam_shape))


def _by_span(indices: NDArray[np.int64], span: int) -> list[tuple[int, NDArray[np.int64]]]:
    """(first patch of the span, the indices in it) for each span that has some."""
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
    """The coverage label of a block: tissue from the mask's nearest pixel, explained, unreadable."""
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
