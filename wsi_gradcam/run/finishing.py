"""The last stage of a slide: display windows, table, overview, final record."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import ResumeError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.channels import QUANTILE, window_end
from wsi_gradcam.results.heatmap import EXPLAINED, Channel, HeatmapStore
from wsi_gradcam.results.manifest import Manifest, SlideDone, SlideOutcome, SlideStatus, sha256_of, span_name
from wsi_gradcam.results.overview import draw_overview
from wsi_gradcam.results.patch_store import UNREADABLE, PatchStore, write_table
from wsi_gradcam.run.stitching import channels

if TYPE_CHECKING:
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.types import Workload

# Statistics for display come from the finest level of at most this many pixels: a million values place a 99.5 %
# quantile well, and memory stays bounded.
STATISTICS_PX = 1 << 20


def finish_slide(context: Context[Workload], entry: SlideEntry) -> SlideOutcome:
    """Set the heatmap's display windows, write the slide's table and overview, and record it as done.

    A cluster may ask twice, when the worker that did it dies before it can answer: the record stays as it is.

    Raises:
        ResumeError: some pieces are not this run's; they are forgotten, so that running again makes them anew.
    """
    run, folder = context.run, context.folder(entry)
    manifest, store, heatmap = Manifest(folder.manifest), PatchStore(folder.cams), HeatmapStore(folder.heatmap)
    if (done := manifest.done()) is not None:
        manifest.fold()
        return done.outcome
    plan = context.plan(entry)
    spans, blocks = manifest.records("spans"), manifest.records("blocks")
    _refuse_foreign(manifest, plan, store, spans, blocks)
    units = [shown.info.unit for shown in run.maps]
    shown = [
        _windowed(heatmap, i, channel, units[i]) if i < len(units) else channel
        for i, channel in enumerate(channels(run))
    ]
    heatmap.set_channels(shown)
    causes = {int(i): cause for record in spans.values() for i, cause in record["causes"].items()}
    write_table(folder.table, run, plan, store, causes)
    with context.slide(entry) as slide:
        draw_overview(folder.overview, run, plan, slide, heatmap, shown)
    folder.place.remove_partial_files()
    outcome = SlideOutcome(
        status=SlideStatus.OK if plan.patches else SlideStatus.NO_TISSUE,
        patches=plan.patches,
        unreadable=int((store.status() == UNREADABLE).sum()),
        cause=_most_common(causes),
    )
    record = SlideDone(
        outcome,
        spans={name: value["digest"] for name, value in spans.items()},
        blocks={name: value["digests"] for name, value in blocks.items()},
        files={place.name: sha256_of(place) for place in (folder.table, folder.overview, folder.tissue)},
    )
    manifest.write_done(record)
    return outcome


def _refuse_foreign(
    manifest: Manifest, plan: SlidePlan, store: PatchStore, spans: dict[str, Any], blocks: dict[str, Any]
) -> None:
    """Raise ResumeError where a process of another run, still busy when this one began, has written over its pieces."""
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
            f"{len(foreign)} spans of the slide were written over by another process; let one run at a time use an "
            "--out, and run the same command again"
        )


def _most_common(causes: dict[int, str]) -> str:
    return Counter(causes.values()).most_common(1)[0][0] if causes else ""


def _windowed(heatmap: HeatmapStore, number: int, channel: Channel, unit: str) -> Channel:
    """Return an explanation's channel with its value range, and a window from 0 to the 99.5 % quantile."""
    level = next((i for i, (h, w) in enumerate(heatmap.shapes) if h * w <= STATISTICS_PX), len(heatmap.shapes) - 1)
    whole = Region(0, 0, *heatmap.shapes[level])
    values = heatmap.read(level, number, whole)[(heatmap.read_flags(level, whole) & EXPLAINED) > 0]
    if not len(values):
        return channel
    low, high, top = float(values.min()), float(values.max()), float(np.quantile(values, QUANTILE))
    end = window_end(top, unit)
    return Channel(channel.label, min(low, 0.0), max(high, end), 0.0, end, channel.active)
