"""The pieces of work: each reads its input from disk, writes its output, and records that it is done.

A piece is named by a stage, a slide and numbers; no pixels travel (P1). Pieces of one stage never write the same
file (P3), so they run anywhere, in any order, and again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.annotations import Regions, regions_of
from wsi_gradcam.errors import ModelError, ResumeError, StoreError, one_line
from wsi_gradcam.finish import RECORD_KEYS, finish_slide
from wsi_gradcam.geometry import Region
from wsi_gradcam.memory import give_back
from wsi_gradcam.models.activation import probabilities
from wsi_gradcam.models.reproducible import steady_sums
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.plan import RunPlan, SlidePlan
from wsi_gradcam.plan import plan_slide as make_plan
from wsi_gradcam.quality import blur_of
from wsi_gradcam.reading import Batch, PatchReader, open_entry
from wsi_gradcam.sampling import sample_patches
from wsi_gradcam.stain import apply
from wsi_gradcam.stitch import Blender, Enlarger, coarsen, coarsen_flags, touching
from wsi_gradcam.stores.heatmap import CHUNK, EXPLAINED, TISSUE, UNREADABLE, Channel, HeatmapStore
from wsi_gradcam.stores.layout import RunFolder, SlideFolder
from wsi_gradcam.stores.manifest import Manifest, block_name, digest_of, span_name
from wsi_gradcam.stores.masks import read_mask, write_mask
from wsi_gradcam.stores.patch_store import OK, PatchStore, SpanData
from wsi_gradcam.stores.patch_store import UNREADABLE as PATCH_UNREADABLE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.cam.choice import Choice
    from wsi_gradcam.config import Settings
    from wsi_gradcam.explainer import Explainer
    from wsi_gradcam.inputs import SlideEntry
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.stain import StainFit


@dataclass(frozen=True)
class Task:
    """A piece of work: the name of a stage, a slide, and the piece's numbers."""

    stage: str
    slide: SlideEntry
    index: tuple[int, ...] = ()


class Context:
    """What a process keeps between tasks: the model and the slide it has open."""

    def __init__(self, run: RunPlan, overwrite: bool = False, model: Explainer | None = None) -> None:
        self.run = run
        self.overwrite = overwrite
        self.upcoming: Task | None = None
        self._lock = threading.Lock()
        self._model = model
        self._slides: dict[SlideEntry, _Opened] = {}

    def model(self) -> Explainer:
        """The run's model, loaded on first use unless it was given."""
        with self._lock:
            if self._model is None:
                steady_sums()
                from wsi_gradcam.explainer import Explainer

                self._model = Explainer.load(self.run.spec, self.run.facts, self.run.settings.device)
            return self._model

    @contextmanager
    def slide(self, entry: SlideEntry) -> Iterator[Slide]:
        """The slide, opened on first use. The last one stays open for the next task.

        Threads of one process may work on different slides: what one of them reads is never closed.
        """
        with self._lock:
            if entry not in self._slides:
                self._close_unused()
                self._slides[entry] = _Opened(open_entry(entry, self.run.settings))
            opened = self._slides[entry]
            opened.users += 1
        try:
            yield opened.slide
        finally:
            with self._lock:
                opened.users -= 1

    @contextmanager
    def patches(self, entry: SlideEntry) -> Iterator[PatchReader]:
        """What reads the slide's patches; it stays as long as the slide is open."""
        run = self.run
        with self.slide(entry) as slide:
            with self._lock:
                opened = self._slides[entry]
                if opened.reader is None:
                    size, threads = run.facts.batch_size, run.settings.reader_threads
                    opened.reader = PatchReader(slide, run.patch_px, run.mpp, size, threads)
            yield opened.reader

    def close(self) -> None:
        """Release the slides that nobody uses."""
        with self._lock:
            self._close_unused()

    def folder(self, entry: SlideEntry) -> SlideFolder:
        """Where the slide's results are."""
        return RunFolder(self.run.out).slide(entry.id)

    def plan(self, entry: SlideEntry) -> SlidePlan:
        """The slide's plan, as `plan_slide` stored it.

        Raises:
            StoreError: this process does not see it.
            ResumeError: another run has replaced it meanwhile.
        """
        folder = self.folder(entry)
        values = Manifest(folder.manifest).plan()
        if values is None:
            raise StoreError(
                f"{folder.manifest}: no plan to be seen there; --out must be a folder that all workers share"
            )
        plan = SlidePlan.from_json(values)
        if plan.run_digest != self.run.digest():
            raise ResumeError(
                f"{folder.path}: another run has begun there meanwhile; let one run at a time use an --out"
            )
        return plan

    def _close_unused(self) -> None:
        for entry in [entry for entry, opened in self._slides.items() if not opened.users]:
            opened = self._slides.pop(entry)
            if opened.reader is not None:
                opened.reader.close()
            opened.slide.close()


@dataclass
class _Opened:
    """An open slide, how many tasks read it, and what reads its patches."""

    slide: Slide
    users: int = 0
    reader: PatchReader | None = None


@dataclass(frozen=True)
class Pending:
    """What is left to do of a slide after planning: `left` of its patches, in spans, and blocks by level."""

    patches: int
    left: int
    spans: list[int]
    blocks: list[list[int]]
    done: dict[str, Any] | None


def examine_model(
    model: ModelSpec | Model, settings: Settings, slides: Sequence[SlideEntry], choice: Choice | None = None
) -> Explainer:
    """Learn of a model, loaded here unless it is, what planning needs, and choose what runs it.

    A `choice` that was made before is kept.

    Raises:
        ModelError: it cannot be loaded, no layer can be explained, or an engine cannot be had.
    """
    steady_sums()
    from wsi_gradcam.cam.examine import MOST_FOR_CHOICE, Request
    from wsi_gradcam.explainer import Explainer
    from wsi_gradcam.models.load import load_model

    def patches(model: Model) -> NDArray[np.uint8] | None:
        mpp = settings.patch_mpp or model.mpp
        return (
            None if mpp is None else sample_patches(slides, settings, model.patch_px, mpp, MOST_FOR_CHOICE, model.stain)
        )

    request = Request(settings.layer, settings.method, settings.engine, settings.precision, settings.batch_size, choice)
    loaded = load_model(model, settings.device) if isinstance(model, ModelSpec) else model
    return Explainer.examine(loaded, request, patches)


def plan_slide(context: Context, entry: SlideEntry) -> Pending:
    """Plan a slide and lay out its stores, unless that was done; say what is left.

    Raises:
        ResumeError: the folder holds results of another file, model or configuration.
        StoreError: it cannot be made.
    """
    folder, run = context.folder(entry), context.run
    if folder.path.is_file():  # OUT is the archive itself
        raise StoreError(f"{folder.path}: a file stands where the slide's results would be; choose another --out")
    with context.slide(entry) as slide:
        regions = regions_of(run.settings.mask, entry.id, run.settings.include, run.settings.exclude)
        pending, problem = _stored(folder, slide, run, regions)
        if pending is not None and not (context.overwrite and pending.done is not None):
            return pending
        if problem and not context.overwrite:
            raise ResumeError(problem)
        plan, patches, mask = make_plan(slide, run, regions)
    manifest = Manifest(folder.manifest)
    manifest.clear()
    write_mask(folder.tissue, mask)
    PatchStore.create(
        folder.cams, patches, plan.span, len(run.facts.classes), len(run.maps), run.facts.cam_shape,
        attributes={
            "targets": [target.label for target in run.targets],
            "methods": list(run.settings.method),
            "maps": [shown.label for shown in run.maps],
            "classes": list(run.facts.classes),
            "heatmap_factor": [shown.factor for shown in run.maps],
            "note": "cam holds the methods' raw maps; heatmap values are cam * heatmap_factor",
        },
    )  # fmt: skip
    HeatmapStore.create(
        folder.heatmap, entry.id, plan.heatmap_px,
        (plan.slide_mpp[0] * plan.stride, plan.slide_mpp[1] * plan.stride),
        channels(run), attributes={**run.identity(), "slide": plan.slide_digest, "model_name": run.facts.name},
    )  # fmt: skip
    manifest.write_plan(plan.to_json())
    return _pending(plan, manifest)


def channels(run: RunPlan) -> list[Channel]:
    """The heatmap's channels: all explanations, then all probabilities."""
    maps = [Channel(shown.label, active=i == 0) for i, shown in enumerate(run.maps)]
    return maps + [Channel(f"probability: {t.label}", active=False) for t in run.probabilities]


def explain_span(context: Context, entry: SlideEntry, span: int) -> int:
    """Run the model over a span and store logits and CAMs; returns how many patches."""
    plan, folder = context.plan(entry), context.folder(entry)
    store = PatchStore(folder.cams)
    start, stop = plan.spans[span]
    following = context.upcoming.index if context.upcoming and context.upcoming.stage == "explain" else ()
    then = store.yx(*plan.spans[following[0]]) if following else None
    with context.patches(entry) as reader:
        yx = store.yx(start, stop)
        data, causes = _explain(context, entry, yx, reader.batches(yx, then), plan.stain)
    store.write_span(start, data)
    Manifest(folder.manifest).complete(
        "spans",
        span_name(span),
        {
            "digest": data.digest(),
            "run": plan.run_digest,
            "causes": {str(start + i): c for i, c in causes.items()},
        },
    )
    return stop - start


def stitch_block(context: Context, entry: SlideEntry, number: int) -> int:
    """Blend one block of the heatmap's finest level; returns how many patches it holds."""
    run, plan, folder = context.run, context.plan(entry), context.folder(entry)
    block = plan.blocks(0)[number]
    patches, heatmap = PatchStore(folder.cams), HeatmapStore(folder.heatmap)
    seen = _seen(plan, patches.yx())
    inside = touching(seen, plan.view[2:], plan.stride, block)
    readable = inside[patches.status()[inside] == OK]
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
    return len(inside)


def coarsen_block(context: Context, entry: SlideEntry, level: int, number: int) -> int:
    """Make one block of a coarser level from the finished level before it."""
    run, plan, folder = context.run, context.plan(entry), context.folder(entry)
    block = plan.blocks(level)[number]
    height, width = plan.level_shapes[level - 1]
    heatmap = HeatmapStore(folder.heatmap)
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
    return 0


def finish(context: Context, entry: SlideEntry) -> dict[str, Any]:
    """Make the slide's table, overview and final record, which is returned.

    A cluster may ask twice, when the worker that did it dies before it tells: the record stays as it is.
    """
    folder = context.folder(entry)
    manifest = Manifest(folder.manifest)
    if (done := manifest.done()) is not None:
        manifest.fold()
        return done
    with context.slide(entry) as slide:
        return finish_slide(context.run, context.plan(entry), folder, slide, channels(context.run))


STAGES: dict[str, Callable[..., Any]] = {
    "plan": plan_slide,
    "explain": explain_span,
    "stitch": stitch_block,
    "coarsen": coarsen_block,
    "finish": finish,
}


def perform(context: Context, task: Task, then: Task | None = None) -> Any:
    """Do a piece of work and return its small result; where it is known what follows, that may be prepared."""
    context.upcoming = then
    try:
        return STAGES[task.stage](context, task.slide, *task.index)
    finally:
        give_back()


def _stored(folder: SlideFolder, slide: Slide, run: RunPlan, regions: Regions | None) -> tuple[Pending | None, str]:
    """What is left to do where the slide was planned before; else why that cannot be continued, if it was."""
    manifest = Manifest(folder.manifest)
    try:
        stored = manifest.plan()
        if stored is None:
            return None, ""
        plan = SlidePlan.from_json(stored)
        problem = _mismatch(plan, slide, run, regions)
        if not problem:
            return _pending(plan, manifest), ""
    except (StoreError, KeyError, TypeError) as error:  # this slide's matter, not the whole run's
        return None, f"{folder.manifest}: damaged ({one_line(error)}); delete it or recompute with --overwrite"
    return None, f"{folder.path}: {problem}; choose another --out, or recompute with --overwrite"


def _mismatch(plan: SlidePlan, slide: Slide, run: RunPlan, regions: Regions | None) -> str:
    if plan.run_digest != run.digest():
        return "holds results of another model or configuration"
    if plan.slide_digest != slide.info.digest:
        return f"holds results of another file than {slide.info.path} is now"
    if plan.slide_mpp != slide.info.mpp_yx:
        return f"holds results at mpp {plan.slide_mpp}, the slide's is {slide.info.mpp_yx}"
    if plan.mask_digest != (regions.digest if regions else ""):
        return f"holds results of another mask than {regions.path if regions else 'none'} is now"
    return ""


def _pending(plan: SlidePlan, manifest: Manifest) -> Pending:
    if (done := manifest.done()) is not None:
        if missing := RECORD_KEYS - done.keys():
            raise KeyError(f"done.json has no {', '.join(sorted(missing))}")
        manifest.fold()
        return Pending(plan.patches, 0, [], [], done)
    explained, blocks = manifest.completed("spans"), manifest.completed("blocks")
    spans = [i for i in range(len(plan.spans)) if span_name(i) not in explained]
    return Pending(
        patches=plan.patches,
        left=sum(stop - start for start, stop in (plan.spans[i] for i in spans)),
        spans=spans,
        blocks=[
            [i for i in range(len(plan.blocks(level))) if block_name(level, i) not in blocks]
            for level in range(len(plan.level_shapes))
        ],
        done=None,
    )


def _explain(
    context: Context, entry: SlideEntry, yx: NDArray[np.int64], batches: Iterator[Batch], stain: StainFit | None
) -> tuple[SpanData, dict[int, str]]:
    run, count = context.run, len(yx)
    logits = np.zeros((count, len(run.facts.classes)), np.float32)
    cams = np.zeros((count, len(run.maps), *run.facts.cam_shape), np.float32)
    status = np.full(count, OK, np.uint8)
    blur = np.full(count, np.nan, np.float32)
    causes: dict[int, str] = {}
    for batch in batches:
        part = slice(batch.start, batch.start + len(batch.rgb))
        rgb = batch.rgb if stain is None else apply(stain, batch.rgb)
        logits[part], cams[part] = context.model().explain(rgb, run.targets, run.settings.method)
        blur[part] = blur_of(batch.rgb)  # as read: another stain is no sharper
        for i, cause in batch.causes.items():
            at = batch.start + i
            logits[at], cams[at], status[at], causes[at], blur[at] = 0, 0, PATCH_UNREADABLE, cause, np.nan
    finite = np.isfinite(logits).all(axis=1) & np.isfinite(cams).all(axis=(1, 2, 3))
    if not finite.all():
        y, x = yx[int(np.argmin(finite))].tolist()
        raise ModelError(
            f"{entry.path}: the model gives NaN or infinite values for the patch at level-0 y {y}, x {x}; "
            "check its weights and normalisation"
        )
    return SpanData(logits, cams, status, blur), causes


def _seen(plan: SlidePlan, yx: NDArray[np.int64]) -> NDArray[Any]:
    """Where the part of each patch begins that the network sees, level-0 px [n, 2]."""
    return yx + np.array(plan.view[:2]) if any(plan.view[:2]) else yx


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
