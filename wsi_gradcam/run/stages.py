"""The stages of a slide up to the model: plan it and find what is left to do, then explain span after span."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from wsi_gradcam.errors import ModelError, ResumeError, StoreError, one_line
from wsi_gradcam.results.feature_store import FeatureStore, create_store
from wsi_gradcam.results.heatmap import HeatmapStore
from wsi_gradcam.results.manifest import Manifest, SlidePlan, block_name, span_name
from wsi_gradcam.results.overview import write_mask
from wsi_gradcam.results.patch_store import OK, UNREADABLE, PatchStore, SpanData
from wsi_gradcam.results.run_files import RunFolder
from wsi_gradcam.run.plan import RunPlan
from wsi_gradcam.run.plan import plan_slide as make_plan
from wsi_gradcam.run.stitching import channels
from wsi_gradcam.run.types import Planned, Processed, Workload
from wsi_gradcam.system.isolation import CRASHES
from wsi_gradcam.tissue.annotations import Regions, entry_outlines, entry_regions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.mil.features import FeatureBag
    from wsi_gradcam.results.run_files import SlideFolder
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.slides.patch_reader import Batch
    from wsi_gradcam.tissue import Patches


class OverwritingWorkload(Workload, Protocol):
    """A workload that may recompute results."""

    @property
    def overwrite(self) -> bool:
        """True if slides that have results are planned again."""


def plan_slide(context: Context[OverwritingWorkload], entry: SlideEntry) -> Planned:
    """Plan a slide and create its stores, unless that was done; return what is left to do.

    Raises:
        ResumeError: the folder holds results of another file, model or configuration.
        StoreError: the folder cannot be created.
    """
    context.check_out()
    folder, run = context.folder(entry), context.run
    # not something that this command has done
    overwrite = context.workload.overwrite and entry.path not in CRASHES.finished_before
    if folder.place.is_file():  # OUT is the archive itself
        raise StoreError(f"{folder.place}: there is a file where the slide's results belong; choose another --out")
    with context.slide(entry) as slide, context.given(entry) as given:
        regions = entry_regions(entry, run.settings)
        encoded = None if overwrite else _encoded(folder, run)
        planned, problem = (None, "") if encoded else _stored(folder, slide, run, regions, given)
        if planned is not None and not (overwrite and planned.outcome is not None):
            return planned
        if problem and not overwrite:
            raise ResumeError(problem)
        plan, patches, mask = make_plan(slide, run, regions, given)
        entry_outlines(entry, run.settings, mask, slide.info)  # refused before any work
        boxes = None if given is None else given.boxes
        kept = {} if encoded is None else _kept_features(folder, encoded, plan, patches)
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
            "methods": list(run.settings.methods),
            "maps": [shown.label for shown in run.maps],
            "classes": list(run.facts.classes),
            "heatmap_factor": [shown.factor for shown in run.maps],
            "note": "cam holds the methods' raw maps; heatmap values are cam * heatmap_factor",
        },
    )
    if not run.only_encodes:
        HeatmapStore.create(
            folder.heatmap,
            entry.id,
            plan.heatmap_px,
            (plan.slide_mpp[0] * plan.stride, plan.slide_mpp[1] * plan.stride),
            channels(run),
            attributes={**run.identity(), "slide": plan.slide_digest, "model_name": run.facts.name},
        )
    if run.facts.bag is not None:
        create_store(run, folder.features, plan.patches, plan.span, boxes, keep=bool(kept))
    for name, record in kept.items():
        manifest.complete("features", name, {**record, "run": plan.run_digest})
    manifest.write_plan(plan)
    return _left_to_do(plan, manifest, run)


def _encoded(folder: SlideFolder, run: RunPlan) -> SlidePlan | None:
    """Return the plan of a slide for which another run has only computed features, just as this one would."""
    if run.facts.bag is None or run.only_encodes:
        return None
    try:
        plan, store = Manifest(folder.manifest).plan(), FeatureStore(folder.features, read_only=True)
        is_same = store.attributes.get("encoding") == run.encoding()
    except (FileNotFoundError, StoreError):
        return None
    return plan if plan is not None and is_same and not store.has("relevance") else None


def _kept_features(
    folder: SlideFolder, before: SlidePlan, plan: SlidePlan, patches: Patches
) -> dict[str, dict[str, Any]]:
    """Return the records of spans whose features already exist.

    Raises:
        ResumeError: they belong to other patches, or to another file.
    """
    changed = {name for name, value in before.to_json().items() if value != plan.to_json().get(name)}
    same = np.array_equal(PatchStore(folder.cams, read_only=True).yx(), patches.yx)
    if changed - {"run_digest", "notes"} or not same:
        raise ResumeError(
            f"{folder.place}: holds features of different patches, or of another file; choose another --out, or "
            "recompute with --overwrite"
        )
    return Manifest(folder.manifest).records("features")


def _stored(
    folder: SlideFolder, slide: Slide, run: RunPlan, regions: Regions | None, given: FeatureBag | None
) -> tuple[Planned | None, str]:
    """Return what is left to do for a slide that was planned before; else None, and why that plan cannot be used."""
    manifest = Manifest(folder.manifest)
    try:
        plan = manifest.plan()
        if plan is None:
            return None, ""
        problem = _mismatch(plan, slide, run, regions, given)
        if not problem:
            return _left_to_do(plan, manifest, run), ""
    except (StoreError, TypeError) as error:  # this slide's problem, not the whole run's
        return None, f"{folder.manifest}: damaged ({one_line(error)}); delete it or recompute with --overwrite"
    return None, f"{folder.place}: {problem}; choose another --out, or recompute with --overwrite"


def _mismatch(plan: SlidePlan, slide: Slide, run: RunPlan, regions: Regions | None, given: FeatureBag | None) -> str:
    if plan.run_digest != run.digest():
        return "holds results of another model or configuration"
    if plan.slide_digest != slide.info.digest:
        return f"holds results of a different file from {slide.info.path} as it is now"
    if plan.slide_mpp != slide.info.mpp_yx:
        return f"holds results at mpp {plan.slide_mpp}, but the slide's is {slide.info.mpp_yx}"
    if plan.mask_digest != (regions.digest if regions else ""):
        return f"holds results with a different mask from the present one ({regions.path if regions else 'none'})"
    if given is not None and plan.features != given.digest:
        return f"holds results of different features from {given.source} as they are now"
    frame = run.settings.mask_frame
    if regions and slide.info.bounds and frame not in ("auto", plan.mask_frame or "slide"):
        return f"holds results with the mask as drawn on '{plan.mask_frame or 'slide'}', not on '{frame}'"
    return ""


def _left_to_do(plan: SlidePlan, manifest: Manifest, run: RunPlan) -> Planned:
    if (done := manifest.done()) is not None:
        manifest.fold()
        return Planned(plan.patches, 0, [], [], done.outcome)
    encoded = manifest.completed("features") if run.facts.bag is not None and plan.patches else None
    explained, blocks = manifest.completed("spans"), manifest.completed("blocks")
    spans = [i for i in range(len(plan.spans)) if span_name(i) not in explained]
    encode = [] if encoded is None else [i for i in range(len(plan.spans)) if span_name(i) not in encoded]
    if run.only_encodes:
        left = sum(stop - start for start, stop in (plan.spans[i] for i in encode))
        return Planned(plan.patches, left, [], [], encode=encode)
    return Planned(
        patches=plan.patches,
        left=sum(stop - start for start, stop in (plan.spans[i] for i in spans)),
        spans=spans,
        blocks=[
            [i for i in range(len(plan.blocks(level))) if block_name(level, i) not in blocks]
            for level in range(len(plan.level_shapes))
        ],
        encode=encode,
        to_encode=sum(stop - start for start, stop in (plan.spans[i] for i in encode)),
        aggregate=encoded is not None and not manifest.completed("bag"),
        given=bool(plan.features),
        pixels=bool(run.maps),
    )


def explain_span(context: Context[Workload], entry: SlideEntry, span: int, upcoming: int | None = None) -> Processed:
    """Run the model over a span and store logits and CAMs.

    If the number of the slide's `upcoming` span is known, its first patches are read meanwhile. A cluster may ask for a
    span that is already finished, if the worker that did it died before it could answer.
    """
    plan, folder = context.plan(entry), context.folder(entry)
    start, stop = plan.spans[span]
    manifest = Manifest(folder.manifest)
    if manifest.has("spans", span_name(span), plan.run_digest):
        return Processed(stop - start)
    store = context.patch_store(entry)
    next_yx = None if upcoming is None else store.yx(*plan.spans[upcoming])
    with context.patches(entry) as reader:
        yx = store.yx(start, stop)
        clock = Clock(reader.batches(yx, next_yx))
        data, causes, likeness = _explain(context, entry, start, yx, clock)
    store.write_span(start, data)
    record = {
        "digest": data.digest(),
        "run": plan.run_digest,
        "causes": {str(start + i): c for i, c in causes.items()},
    }
    alike = [value for i, value in enumerate(likeness) if i not in causes]
    if plan.features and alike:
        record["agreement"] = {"patches": len(alike), "mean": round(float(np.mean(alike)), 4)}
    manifest.complete("spans", span_name(span), record)
    model = context.model()
    at_once = model.at_once if model.at_once < model.facts.batch_size else 0
    return Processed(stop - start, len(causes), clock.waited_s, clock.model_s, clock.read_s, at_once)


def read_ahead(context: Context[Workload], entry: SlideEntry, span: int) -> None:
    """Begin to read the first patches of the span that will be explained next."""
    start, stop = context.plan(entry).spans[span]
    with context.patches(entry) as reader:
        reader.read_ahead(context.patch_store(entry).yx(start, stop))


@dataclass
class Clock:
    """Batches on their way to the model, and how long each side waited for the other."""

    batches: Iterator[Batch]
    waited_s: float = 0.0
    model_s: float = 0.0
    read_s: float = 0.0

    def __iter__(self) -> Iterator[Batch]:
        ready = time.perf_counter()
        for batch in self.batches:
            received = time.perf_counter()
            yield batch
            self.waited_s, self.read_s = self.waited_s + received - ready, self.read_s + batch.read_s
            ready = time.perf_counter()
            self.model_s += ready - received


def _explain(
    context: Context[Workload], entry: SlideEntry, start: int, yx: NDArray[np.int64], batches: Iterable[Batch]
) -> tuple[SpanData, dict[int, str], list[float]]:
    """Return the results of patches, why some could not be read and, for a slide-level model, the cosines of features.

    The cosines compare the stored features with those that the encoder computes now.
    """
    run, count, model = context.run, len(yx), context.model()
    logits = np.zeros((count, len(run.facts.classes)), np.float32)
    cams = np.zeros((count, len(run.maps), *run.facts.cam_shape), np.float32)
    status = np.full(count, OK, np.uint8)
    blur = np.full(count, np.nan, np.float32)
    causes: dict[int, str] = {}
    likeness: list[float] = []
    features = None if run.facts.bag is None else context.features(entry)
    begun: deque[tuple[slice, Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]]] = deque()

    def store(most: int) -> None:
        """Store results until those of no more than `most` batches are outstanding."""
        while len(begun) > most:
            part, found = begun.popleft()
            answers, cams[part] = found()
            if features is None:
                logits[part] = answers
            else:
                likeness.extend(_cosines(answers, features.read("features", start + part.start, start + part.stop)))

    for batch in batches:
        part = slice(batch.start, batch.start + len(batch.rgb))
        if features is None:
            begun.append((part, model.begin(batch.rgb, run.targets, run.settings.methods)))
        else:
            rows = start + part.start, start + part.stop
            weights = features.read("coefficients", *rows)
            begun.append((part, model.begin_weighed(batch.rgb, weights, run.settings.methods)))
            logits[part] = features.read("logits", *rows)
        blur[part] = batch.measures
        causes |= {batch.start + i: cause for i, cause in batch.causes.items()}
        store(model.in_flight)
    store(0)
    for at in causes:
        logits[at], cams[at], status[at] = 0, 0, UNREADABLE
    finite = np.isfinite(logits).all(axis=1) & np.isfinite(cams).all(axis=(1, 2, 3))
    if not finite.all():
        y, x = yx[int(np.argmin(finite))].tolist()
        raise ModelError(
            f"{entry.path}: the model gives NaN or infinite values for the patch at level-0 x {x}, y {y}; "
            "check its weights and normalisation"
        )
    return SpanData(logits, cams, status, blur), causes, likeness


def _cosines(one: NDArray[np.float32], other: NDArray[np.floating[Any]]) -> list[float]:
    """Return the cosine of the angle between each pair of vectors [n, D]; 0 if one has no length."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: list[float] = np.divide((a * b).sum(axis=1), lengths, out=np.zeros(len(a)), where=lengths > 0).tolist()
    return found
