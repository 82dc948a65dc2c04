"""The stage that runs the model: a span of patches in, their logits and CAMs out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import ModelError
from wsi_gradcam.results.manifest import Manifest, span_name
from wsi_gradcam.results.patch_store import OK, UNREADABLE, SpanData
from wsi_gradcam.run.types import Processed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.types import Workload
    from wsi_gradcam.slides.patch_reader import Batch


def explain_span(context: Context[Workload], entry: SlideEntry, span: int, upcoming: int | None = None) -> Processed:
    """Run the model over a span and store logits and CAMs.

    Where the number of the slide's `upcoming` span is known, its first patches are read meanwhile. A cluster may ask
    for a span that is finished, when the worker that did it dies before it can answer.
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
        clock = _Clock(reader.batches(yx, next_yx))
        data, causes = _explain(context, entry, yx, clock)
    store.write_span(start, data)
    manifest.complete(
        "spans",
        span_name(span),
        {
            "digest": data.digest(),
            "run": plan.run_digest,
            "causes": {str(start + i): c for i, c in causes.items()},
        },
    )
    model = context.model()
    at_once = model.at_once if model.at_once < model.facts.batch_size else 0
    return Processed(stop - start, len(causes), clock.waited_s, clock.model_s, clock.read_s, at_once)


def read_ahead(context: Context[Workload], entry: SlideEntry, span: int) -> None:
    """Begin to read the first patches of the span that will be explained next."""
    start, stop = context.plan(entry).spans[span]
    with context.patches(entry) as reader:
        reader.read_ahead(context.patch_store(entry).yx(start, stop))


@dataclass
class _Clock:
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
    context: Context[Workload], entry: SlideEntry, yx: NDArray[np.int64], batches: Iterable[Batch]
) -> tuple[SpanData, dict[int, str]]:
    run, count, model = context.run, len(yx), context.model()
    logits = np.zeros((count, len(run.facts.classes)), np.float32)
    cams = np.zeros((count, len(run.maps), *run.facts.cam_shape), np.float32)
    status = np.full(count, OK, np.uint8)
    blur = np.full(count, np.nan, np.float32)
    causes: dict[int, str] = {}
    for batch in batches:
        part = slice(batch.start, batch.start + len(batch.rgb))
        logits[part], cams[part] = model.explain(batch.rgb, run.targets, run.settings.method)
        blur[part] = batch.measures
        for i, cause in batch.causes.items():
            at = batch.start + i
            logits[at], cams[at], status[at], causes[at] = 0, 0, UNREADABLE, cause
    finite = np.isfinite(logits).all(axis=1) & np.isfinite(cams).all(axis=(1, 2, 3))
    if not finite.all():
        y, x = yx[int(np.argmin(finite))].tolist()
        raise ModelError(
            f"{entry.path}: the model gives NaN or infinite values for the patch at level-0 y {y}, x {x}; "
            "check its weights and normalisation"
        )
    return SpanData(logits, cams, status, blur), causes
