"""The first stage of a slide: plan it, create its stores, and find what is left to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from wsi_gradcam.errors import ResumeError, StoreError, one_line
from wsi_gradcam.results.heatmap import HeatmapStore
from wsi_gradcam.results.manifest import Manifest, SlidePlan, block_name, span_name
from wsi_gradcam.results.overview import write_mask
from wsi_gradcam.results.patch_store import PatchStore
from wsi_gradcam.results.run_files import RunFolder
from wsi_gradcam.run.plan import RunPlan
from wsi_gradcam.run.plan import plan_slide as make_plan
from wsi_gradcam.run.stitching import channels
from wsi_gradcam.run.types import Planned, Workload
from wsi_gradcam.system.isolation import CRASHES
from wsi_gradcam.tissue.annotations import Regions, entry_regions

if TYPE_CHECKING:
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.run_files import SlideFolder
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.slides import Slide


class OverwritingWorkload(Workload, Protocol):
    """A workload that may make results anew."""

    @property
    def overwrite(self) -> bool:
        """True where slides that have results are planned anew."""


def plan_slide(context: Context[OverwritingWorkload], entry: SlideEntry) -> Planned:
    """Plan a slide and create its stores, unless that was done; return what is left to do.

    Raises:
        ResumeError: the folder holds results of another file, model or configuration.
        StoreError: it cannot be made.
    """
    context.check_out()
    folder, run = context.folder(entry), context.run
    # not what this command has done
    overwrite = context.workload.overwrite and entry.path not in CRASHES.finished_before
    if folder.place.is_file():  # OUT is the archive itself
        raise StoreError(f"{folder.place}: a file stands where the slide's results would be; choose another --out")
    with context.slide(entry) as slide:
        regions = entry_regions(entry, run.settings)
        planned, problem = _stored(folder, slide, run, regions)
        if planned is not None and not (overwrite and planned.outcome is not None):
            return planned
        if problem and not overwrite:
            raise ResumeError(problem)
        plan, patches, mask = make_plan(slide, run, regions)
    folder = RunFolder(run.out).emptied(entry.id)
    manifest = Manifest(folder.manifest)
    manifest.clear()
    context.forget_stores(entry)
    write_mask(folder.tissue, mask)
    PatchStore.create(
        folder.cams,
        patches,
        plan.span,
        len(run.facts.classes),
        len(run.maps),
        run.facts.cam_shape,
        attributes={
            "targets": [target.label for target in run.targets],
            "methods": list(run.settings.method),
            "maps": [shown.label for shown in run.maps],
            "classes": list(run.facts.classes),
            "heatmap_factor": [shown.factor for shown in run.maps],
            "note": "cam holds the methods' raw maps; heatmap values are cam * heatmap_factor",
        },
    )
    HeatmapStore.create(
        folder.heatmap,
        entry.id,
        plan.heatmap_px,
        (plan.slide_mpp[0] * plan.stride, plan.slide_mpp[1] * plan.stride),
        channels(run),
        attributes={**run.identity(), "slide": plan.slide_digest, "model_name": run.facts.name},
    )
    manifest.write_plan(plan)
    return _left_to_do(plan, manifest)


def _stored(folder: SlideFolder, slide: Slide, run: RunPlan, regions: Regions | None) -> tuple[Planned | None, str]:
    """Return what is left to do of a slide that was planned before; else None, and why that plan cannot be used."""
    manifest = Manifest(folder.manifest)
    try:
        plan = manifest.plan()
        if plan is None:
            return None, ""
        problem = _mismatch(plan, slide, run, regions)
        if not problem:
            return _left_to_do(plan, manifest), ""
    except (StoreError, TypeError) as error:  # this slide's matter, not the whole run's
        return None, f"{folder.manifest}: damaged ({one_line(error)}); delete it or recompute with --overwrite"
    return None, f"{folder.place}: {problem}; choose another --out, or recompute with --overwrite"


def _mismatch(plan: SlidePlan, slide: Slide, run: RunPlan, regions: Regions | None) -> str:
    if plan.run_digest != run.digest():
        return "holds results of another model or configuration"
    if plan.slide_digest != slide.info.digest:
        return f"holds results of another file than {slide.info.path} is now"
    if plan.slide_mpp != slide.info.mpp_yx:
        return f"holds results at mpp {plan.slide_mpp}, the slide's is {slide.info.mpp_yx}"
    if plan.mask_digest != (regions.digest if regions else ""):
        return f"holds results of another mask than {regions.path if regions else 'none'} is now"
    frame = run.settings.mask_frame
    if regions and slide.info.bounds and frame not in ("auto", plan.mask_frame or "slide"):
        return f"holds results of the mask as drawn on '{plan.mask_frame or 'slide'}', not on '{frame}'"
    return ""


def _left_to_do(plan: SlidePlan, manifest: Manifest) -> Planned:
    if (done := manifest.done()) is not None:
        manifest.fold()
        return Planned(plan.patches, 0, [], [], done.outcome)
    explained, blocks = manifest.completed("spans"), manifest.completed("blocks")
    spans = [i for i in range(len(plan.spans)) if span_name(i) not in explained]
    return Planned(
        patches=plan.patches,
        left=sum(stop - start for start, stop in (plan.spans[i] for i in spans)),
        spans=spans,
        blocks=[
            [i for i in range(len(plan.blocks(level))) if block_name(level, i) not in blocks]
            for level in range(len(plan.level_shapes))
        ],
    )
