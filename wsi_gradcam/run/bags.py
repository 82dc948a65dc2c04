"""The stages that only slide-level models have: encode spans of patches, then explain the bag of their features.

After these two a patch is explained like any other, but for its targets: what each of its features is worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import ModelError
from wsi_gradcam.results.channels import ATTENTION
from wsi_gradcam.results.feature_store import Bag, FeatureStore
from wsi_gradcam.results.manifest import BAG, WHOLE, Manifest, span_name
from wsi_gradcam.results.patch_store import OK, UNREADABLE
from wsi_gradcam.run.stages import Clock
from wsi_gradcam.run.types import Processed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.types import Workload


def encode_span(context: Context[Workload], entry: SlideEntry, span: int, upcoming: int | None = None) -> Processed:
    """Run the encoder over a span and store its features; see `explain_span`."""
    plan, folder = context.plan(entry), context.folder(entry)
    start, stop = plan.spans[span]
    manifest, name = Manifest(folder.manifest), span_name(span)
    if manifest.has("features", name, plan.run_digest):
        return Processed(0, encoded=stop - start)
    places, store, model = context.patch_store(entry), context.features(entry), context.model()
    found = np.zeros((stop - start, store.shape[1]), np.float32)
    status = np.full(stop - start, OK, np.uint8)
    next_yx = None if upcoming is None else places.yx(*plan.spans[upcoming])
    with context.patches(entry) as reader:
        clock = Clock(reader.batches(places.yx(start, stop), next_yx))
        for batch in clock:
            found[batch.start : batch.start + len(batch.rgb)] = model.features(batch.rgb)
            for i in batch.causes:
                found[batch.start + i], status[batch.start + i] = 0, UNREADABLE
    with np.errstate(over="ignore"):
        kept = found.astype(context.run.settings.feature_precision)
    _check_finite(entry, kept, places.yx(start, stop))
    store.write(start, features=kept, status=status)
    manifest.complete("features", name, {"digest": store.digest(start, stop), "run": plan.run_digest})
    return Processed(0, 0, clock.waited_s, clock.model_s, clock.read_s, encoded=stop - start)


def _check_finite(entry: SlideEntry, found: NDArray[np.floating[Any]], yx: NDArray[np.int64]) -> None:
    finite = np.isfinite(found).all(axis=1)
    if not finite.all():
        y, x = yx[int(np.argmin(finite))].tolist()
        raise ModelError(
            f"{entry.path}: features of the patch at level-0 y {y}, x {x} are NaN or infinite in {found.dtype}; check "
            "the encoder's weights and normalisation"
            + ("" if found.dtype == np.float32 else ", or give --feature-precision float32")
        )


def aggregate_bag(context: Context[Workload], entry: SlideEntry) -> None:
    """Have the aggregator answer for the slide, and store what each patch is worth to the answer.

    Raises:
        ModelError: no patch of the slide can be read, or the bag needs more memory than there is.
    """
    plan, folder, run = context.plan(entry), context.folder(entry), context.run
    manifest = Manifest(folder.manifest)
    if manifest.has(BAG, WHOLE, plan.run_digest):
        return
    from wsi_gradcam.mil.attribution import explain_bag

    store, network = context.features(entry), context.aggregator().network
    bag = Bag(store)
    if not len(bag.rows):
        raise ModelError(f"{entry.path}: no patch of it can be read, so a slide-level model has no answer")
    first, *_ = methods = run.settings.bag_method

    def keep(method: str, start: int, block: NDArray[np.floating[Any]]) -> None:
        if method == first:
            _put(store, bag.rows[start : start + len(block)], coefficients=block)

    explained = explain_bag(network, bag, run.targets, (*methods, ATTENTION), coefficients=keep)
    classes = [Target(name, i) for i, name in enumerate(run.facts.classes)]
    alone = explain_bag(network, bag, classes, ("single",)).relevance["single"]
    relevance = np.stack([explained.relevance[method] for method in methods], axis=1)
    _put(store, bag.rows, relevance=relevance, logits=alone)
    if store.has(ATTENTION):
        _put(store, bag.rows, attention=explained.attention["attention_weight"])
    logits = dict(zip(run.facts.classes, explained.logits.tolist(), strict=True))
    manifest.complete(BAG, WHOLE, {"answer": logits, "run": plan.run_digest})


def _put(store: FeatureStore, rows: NDArray[np.int64], **values: NDArray[Any]) -> None:
    """Write values of rows of patches, of which unreadable ones are left out; they keep zeros."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    for name, some in values.items():
        whole = np.zeros((last - first, *some.shape[1:]), np.float32)
        whole[rows - first] = some
        store.write(first, **{name: whole})
