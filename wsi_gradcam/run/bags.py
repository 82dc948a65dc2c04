"""The stages of slide-level models only: compute or import the features of spans of patches, then explain the bag.

After these two, a patch is explained like any other, except for its targets: the coefficients of its features. If no
pixels are explained, what is known about the patch is recorded instead.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.cam.facts import NO_METHOD, BagFacts
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import ConfigError, FeatureError, ModelError, ResumeError, one_line
from wsi_gradcam.mil.feature_arrays import FeatureFolder
from wsi_gradcam.results.display import ATTENTION
from wsi_gradcam.results.feature_store import FEATURE_ROWS, Bag, FeatureStore, encoding_problems
from wsi_gradcam.results.manifest import BAG, WHOLE, Manifest, SlideOutcome, SlideStatus, span_name
from wsi_gradcam.results.patch_store import OK, UNREADABLE, SpanData
from wsi_gradcam.run.plan import open_given, plan_run
from wsi_gradcam.run.stages import Clock
from wsi_gradcam.run.types import Processed
from wsi_gradcam.slides.patch_reader import open_entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.io.paths import StoragePathLike
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.results.run_files import RunFolder
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.plan import RunPlan
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.run.types import Workload

LOG = logging.getLogger("wsi_gradcam")
UNENCODED = "could not be read when features were made"


def plan_encoding(out: StoragePathLike, spec: ModelSpec, facts: ModelFacts, settings: Settings) -> RunPlan:
    """Return the plan of a run that only computes features with an encoder.

    Raises:
        ConfigError, ModelError: as for `plan_run`.
    """
    length, nothing = len(facts.classes), settings.model_copy(update={"method": (NO_METHOD,), "target": ()})
    encoder = replace(facts, classes=(), bag=BagFacts(facts.digest, length, ()))
    return plan_run(out, spec, encoder, nothing)


def mean_feature(out: RunFolder, entries: Sequence[SlideEntry], run: RunPlan) -> tuple[float, ...]:
    """Return the mean feature vector of all readable patches of slides, summed slide by slide.

    It is the same whatever the order of the slides.

    Raises:
        ConfigError: there is no patch.
    """
    place, settings = run.settings.features, run.settings
    folder = None if place is None else FeatureFolder(place, [entry.id for entry in entries])
    sums: list[NDArray[np.float64]] = []
    count = 0
    for entry in sorted(entries, key=lambda entry: entry.id):
        try:
            if folder is None:
                total, patches = _sum(Bag(FeatureStore(out.slide(entry.id).features, read_only=True)))
            else:
                with (
                    closing(open_entry(entry, settings)) as slide,
                    open_given(folder, entry.id, slide.info, run) as bag,
                ):
                    total, patches = _sum(bag.features)
        except Exception as error:  # of a slide that will fail for the same reason
            LOG.info("the mean of the features leaves out %s: %s", entry.id, one_line(error))
            continue
        sums.append(total)
        count += patches
    if not count:
        raise ConfigError("bag_baseline mean: no slide has readable features; use --bag-baseline zero")
    return tuple((np.sum(sums, axis=0) / count).tolist())


def _sum(features: Any) -> tuple[NDArray[np.float64], int]:
    """Return the sum of features [N, D], read in blocks, and N."""
    total = np.zeros(features.shape[1])
    for start in range(0, features.shape[0], FEATURE_ROWS):
        total += np.asarray(features[start : start + FEATURE_ROWS], np.float64).sum(axis=0)
    return total, features.shape[0]


def finish_encoding(context: Context[Workload], entry: SlideEntry) -> SlideOutcome:
    """Return the outcome of computing a slide's features.

    Raises:
        ResumeError: some features are not this run's; their records are deleted, so that running again recomputes them.
    """
    plan, folder = context.plan(entry), context.folder(entry)
    store, manifest = FeatureStore(folder.features), Manifest(folder.manifest)
    wrong = list(encoding_problems(store, manifest, plan))
    if wrong:
        manifest.forget("features", map(span_name, range(len(plan.spans))))
        raise ResumeError(f"{folder.features}: {wrong[0]}; use each --out in only one run at a time, and run it again")
    context.check_slide(entry)
    causes = Counter(r["cause"] for r in manifest.records("features").values() if r.get("cause"))
    return SlideOutcome(
        SlideStatus.OK if plan.patches else SlideStatus.NO_TISSUE,
        plan.patches,
        int((store.read("status") == UNREADABLE).sum()) if plan.patches else 0,
        causes.most_common(1)[0][0] if causes else "",
        "; ".join(plan.notes),
    )


def encode_span(context: Context[Workload], entry: SlideEntry, span: int, upcoming: int | None = None) -> Processed:
    """Run the encoder over a span and store its features; see `explain_span`."""
    plan, folder = context.plan(entry), context.folder(entry)
    start, stop = plan.spans[span]
    manifest, name = Manifest(folder.manifest), span_name(span)
    if manifest.has("features", name, plan.run_digest):
        return _encoded(context.run, stop - start)
    places, model = context.patch_store(entry), context.model()
    found = np.zeros((stop - start, context.features(entry).shape[1]), np.float32)
    status, causes = np.full(stop - start, OK, np.uint8), Counter[str]()
    next_yx = None if upcoming is None else places.yx(*plan.spans[upcoming])
    with context.patches(entry) as reader:
        clock = Clock(reader.batches(places.yx(start, stop), next_yx))
        for batch in clock:
            found[batch.start : batch.start + len(batch.rgb)] = model.features(batch.rgb)
            for i, cause in batch.causes.items():
                found[batch.start + i], status[batch.start + i], causes[cause] = 0, UNREADABLE, causes[cause] + 1
    _keep(context, entry, span, found, status, causes.most_common(1)[0][0] if causes else "")
    return _encoded(context.run, stop - start, causes.total(), clock)


def _encoded(run: RunPlan, count: int, unreadable: int = 0, clock: Clock | None = None) -> Processed:
    """Return the result for patches that are encoded: finished, or still to be explained."""
    times = (0.0, 0.0, 0.0) if clock is None else (clock.waited_s, clock.model_s, clock.read_s)
    return Processed(count, unreadable, *times) if run.only_encodes else Processed(0, 0, *times, encoded=count)


def import_span(context: Context[Workload], entry: SlideEntry, span: int) -> Processed:
    """Store the features of a span from another program.

    Raises:
        FeatureError: they were replaced since the slide was planned, or cannot be read.
    """
    plan = context.plan(entry)
    start, stop = plan.spans[span]
    if Manifest(context.folder(entry).manifest).has("features", span_name(span), plan.run_digest):
        return Processed(0, encoded=stop - start)
    with context.given(entry) as given:
        assert given is not None
        if given.digest != plan.features:
            raise FeatureError(
                f"{given.source}: was replaced by another file during the run; do not change files during a run, and "
                "run the same command again with --overwrite"
            )
        found = given.features[start:stop]
    _keep(context, entry, span, found, np.full(stop - start, OK, np.uint8))
    return Processed(0, encoded=stop - start)


def _keep(
    context: Context[Workload],
    entry: SlideEntry,
    span: int,
    found: NDArray[np.floating[Any]],
    status: NDArray[np.uint8],
    cause: str = "",
) -> None:
    """Store the features of a span, and record that they are there; `cause` says why some could not be made."""
    plan, store = context.plan(entry), context.features(entry)
    start, stop = plan.spans[span]
    with np.errstate(over="ignore"):
        kept = found.astype(context.run.settings.feature_precision)
    finite = np.isfinite(kept).all(axis=1)
    if not finite.all():
        y, x = context.patch_store(entry).yx(start, stop)[int(np.argmin(finite))].tolist()
        raise ModelError(
            f"{entry.path}: features of the patch at level-0 x {x}, y {y} are NaN or infinite in {kept.dtype}; "
            + ("" if plan.features else "check the encoder's weights and normalisation")
            + ("" if kept.dtype == np.float32 or plan.features else ", or ")
            + ("" if kept.dtype == np.float32 else "use --feature-precision float32")
        )
    store.write(start, features=kept, status=status)
    record = {"digest": store.digest(start, stop), "run": plan.run_digest, **({"cause": cause} if cause else {})}
    Manifest(context.folder(entry).manifest).complete("features", span_name(span), record)


def aggregate_bag(context: Context[Workload], entry: SlideEntry) -> None:
    """Compute the aggregator's answer for the slide, and store each patch's contribution to it.

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
        raise ModelError(f"{entry.path}: none of its patches can be read, so a slide-level model has no answer")
    first, *_ = methods = run.settings.bag_method

    def keep(method: str, start: int, block: NDArray[np.floating[Any]]) -> None:
        if method == first and run.maps:
            _put(store, bag.rows[start : start + len(block)], coefficients=block)

    asked = (*methods, ATTENTION) if store.has(ATTENTION) else methods
    base = np.array(run.baseline) if run.baseline else None
    explained = explain_bag(network, bag, run.targets, asked, baseline=base, coefficients=keep)
    classes = [Target(name, i) for i, name in enumerate(run.facts.classes)]
    alone = explain_bag(network, bag, classes, ("single",)).relevance["single"]
    relevance = np.stack([explained.relevance[method] for method in methods], axis=1)
    _put(store, bag.rows, relevance=relevance, logits=alone)
    if store.has(ATTENTION):
        _put(store, bag.rows, attention=explained.attention["attention_weight"])
    logits = dict(zip(run.facts.classes, explained.logits.tolist(), strict=True))
    manifest.complete(BAG, WHOLE, {"answer": logits, "run": plan.run_digest})


def answer_span(context: Context[Workload], entry: SlideEntry, span: int) -> Processed:
    """Record what is known about the patches of a span, none of which is explained down to its pixels."""
    plan, folder, store = context.plan(entry), context.folder(entry), context.features(entry)
    start, stop = plan.spans[span]
    manifest, name = Manifest(folder.manifest), span_name(span)
    if manifest.has("spans", name, plan.run_digest):
        return Processed(stop - start)
    status, count = store.read("status", start, stop), stop - start
    no_maps = np.zeros((count, 0, 1, 1), np.float32)
    data = SpanData(store.read("logits", start, stop), no_maps, status, np.full(count, np.nan, np.float32))
    context.patch_store(entry).write_span(start, data)
    causes = {str(start + int(i)): UNENCODED for i in np.flatnonzero(status == UNREADABLE)}
    manifest.complete("spans", name, {"digest": data.digest(), "run": plan.run_digest, "causes": causes})
    return Processed(count, len(causes))


def _put(store: FeatureStore, rows: NDArray[np.int64], **values: NDArray[Any]) -> None:
    """Write values for rows of patches, leaving out unreadable ones, which keep zeros."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    for name, some in values.items():
        whole = np.zeros((last - first, *some.shape[1:]), np.float32)
        whole[rows - first] = some
        store.write(first, **{name: whole})
