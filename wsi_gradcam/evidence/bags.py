"""Slide-level models: the patches that carry a slide's answer, sorted by their features, and the answer without them.

A place is a patch. By the coefficients c_i of the run's first bag method, feature d of patch i contributes
c_id (f_id - b_d) to the slide's logit, where b is where the path of Integrated Gradients begins, else 0. These add up
to the relevance that the run has stored. All is done with stored features, block by block; pixels are read of examples
alone. To remove a kind is to take its patches out of the bag, as the audit does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.audit.batch import HELD_BYTES, SHOWN_PX
from wsi_gradcam.audit.measures.bags import BagSubject, random_answers, rows_of, whole_answer
from wsi_gradcam.audit.measures.shortcuts import BLURRED, equal_areas, removal
from wsi_gradcam.audit.plan import Arrays, patch_seeds, read_arrays, write_arrays
from wsi_gradcam.audit.questions.bag_trust import COPIES, DRAWN, DRAWN_AT_ONCE
from wsi_gradcam.audit.schema import BLUR, GLASS, PEN
from wsi_gradcam.errors import SlideError, SlideFormatError, one_line
from wsi_gradcam.evidence import NOTHING, PIECE, PRESENT, EvidenceFolder, drawn_patches
from wsi_gradcam.evidence.clusters import SHOWN, shown_by
from wsi_gradcam.evidence.tables import sort_slide, stored_plan
from wsi_gradcam.mil.attribution import explain_bag
from wsi_gradcam.mil.networks import Pooled
from wsi_gradcam.mil.spec import slide_probabilities
from wsi_gradcam.results.feature_store import BOXES, Bag
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.run.claims import EVIDENCE
from wsi_gradcam.run.types import Processed, Stage
from wsi_gradcam.slides import read_region

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.evidence import DrawnPatches, EvidencePlan, Shown
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.mil.networks import Aggregator
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.slides import Slide

    Floats = NDArray[np.float64]

LOG = logging.getLogger("wsi_gradcam")
ROWS = 1024  # whose stored coefficients are in memory at once
ELSEWHERE = 8  # equal areas elsewhere, of each kind on a slide
ENLARGED = 0.9  # of the slide's pixels are those of patches that were enlarged
WHOLE = "whole"  # in sums of all patches of a slide
AROUND = 3  # sides of a patch that its surroundings are wide


def walk(context: Context[Any], entry: SlideEntry, take: Callable[[int, Floats], None]) -> None:
    """Call `take` with the first row and the contributions [n, D] of each block of a slide's bag, in order."""
    plan: EvidencePlan = context.workload.plan
    run, store = plan.run, context.features(entry)
    bag, method = Bag(store), run.settings.bag_method[0]
    number = next(i for i, target in enumerate(run.targets) if target.label == plan.target.label)
    base = np.array(run.baseline) if run.baseline else np.zeros(bag.shape[1])

    def weigh(start: int, coefficients: NDArray[np.floating[Any]]) -> None:
        features = np.asarray(bag[start : start + len(coefficients)], np.float64)
        take(start, coefficients.astype(np.float64) * (features - (base if method == "integrated_gradients" else 0)))

    if store.has("coefficients"):
        for start in range(0, len(bag), ROWS):
            rows = bag.rows[start : start + ROWS]
            stored = store.read("coefficients", int(rows[0]), int(rows[-1]) + 1)
            weigh(start, stored[rows - rows[0], number])
        return
    network, targets = context.aggregator().network, run.targets[number : number + 1]
    explain_bag(
        network, bag, targets, (method,), baseline=base, coefficients=lambda _, start, found: weigh(start, found[:, 0])
    )


def measure_bag(context: Context[Any], entry: SlideEntry) -> Processed:
    """Store what the patches of a slide's sample contribute, piece by piece, unless that was done."""
    plan: EvidencePlan = context.workload.plan
    folder = EvidenceFolder(plan.run.out / EVIDENCE)
    drawn = drawn_patches(folder, entry.id, plan.sample_digest)
    places = [folder.batch(entry.id, plan.digest, number) for number in range(-(-len(drawn) // PIECE))]
    if all(place.is_file() for place in places):
        return Processed(len(drawn))
    started, bag = time.perf_counter(), Bag(context.features(entry))
    slide_plan = stored_plan(context.folder(entry), plan)
    drawn = drawn.only(np.argsort(drawn.numbers, kind="stable"))  # as the bag is walked
    known, kept, done = _known(context, entry, slide_plan, drawn), _Kept(), 0
    more = _probe(context, entry, bag) if plan.probed(entry.id) else {}
    rows = np.searchsorted(bag.rows, drawn.numbers)

    def take(start: int, parts: Floats) -> None:
        nonlocal done
        here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(parts))]
        kept.add(parts[here - start])
        while len(kept) >= min(PIECE, max(1, len(drawn) - done)):
            count = min(PIECE, len(drawn) - done)
            arrays = {name: values[done : done + count] for name, values in known.items()} | kept.first(count)
            write_arrays(places[done // PIECE], arrays | (more if done == 0 else {}))
            done += count

    walk(context, entry, take)
    return Processed(len(drawn), 0, 0.0, time.perf_counter() - started)


class _Kept:
    """Contributions that are not stored yet, as unit vectors, and their sums."""

    def __init__(self) -> None:
        self._features: list[NDArray[np.float16]] = []
        self._values: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    def add(self, parts: Floats) -> None:
        """Add contributions [n, D]."""
        length = np.maximum(np.linalg.norm(parts, axis=1, keepdims=True), 1e-300)
        self._features += list((parts / length).astype(np.float16))
        self._values += parts.sum(axis=1).tolist()

    def first(self, count: int) -> Arrays:
        """Return the first ones as the places of a piece, each of which is a patch, and forget them."""
        features, self._features = self._features[:count], self._features[count:]
        values, self._values = self._values[:count], self._values[count:]
        return {
            "place/patch": np.arange(count),
            "place/cell": np.zeros(count, np.int64),
            "place/value": np.array(values),
            "place/weight": np.ones(count),
            "place/features": np.stack(features),
        }


def _known(context: Context[Any], entry: SlideEntry, slide_plan: SlidePlan, drawn: DrawnPatches) -> Arrays:
    """Return what is known of patches: where they are, their weights, the probability of their slide, and flaws.

    Blur is not known of features that were made elsewhere, and enlarged patches all look blurred.
    """
    plan: EvidencePlan = context.workload.plan
    store, numbers = context.patch_store(entry), drawn.numbers
    found: Arrays = {"patch/number": numbers, "patch/weight": drawn.weights, "patch/yx": drawn.yx}
    done = Manifest(context.folder(entry).manifest).done()
    activation, target = plan.run.slide_model.activation, plan.target
    if target.is_class and target.index is not None and activation != "none" and done is not None:
        shares = slide_probabilities(np.array([done.answer[name] for name in plan.run.facts.classes]), activation)
        found["patch/probability"] = np.full(len(numbers), shares[target.index])
    for name in (PEN, GLASS):
        found[f"suspect/{name}"] = np.nan_to_num(store.share(name)[numbers])
    blur = store.blur()[numbers]
    enlarged = slide_plan.patch_mpp(plan.run.patch_px, plan.run.mpp) < ENLARGED * max(slide_plan.slide_mpp)
    if not (enlarged or np.isnan(blur).all()):
        found[f"suspect/{BLUR}"] = (blur > BLURRED).astype(np.float32)
    return found


def _probe(context: Context[Any], entry: SlideEntry, bag: Bag) -> Arrays:
    """Return the model's answer to some of a slide's patches [1, K], and those of random copies [1, copies, K]."""
    plan: EvidencePlan = context.workload.plan
    network = context.aggregator().network
    some = _some(network, bag, _seed(plan, entry))
    answers = random_answers(network, some, COPIES, plan.settings.seed)
    return {"probe/own": whole_answer(network, some)[None], "probe/answers": answers[None]}


def _some(network: Aggregator, bag: Bag, seed: int) -> NDArray[np.floating[Any]]:
    most = DRAWN if isinstance(network, Pooled) and not network.critical_count else DRAWN_AT_ONCE
    chosen = np.random.default_rng(seed).choice(len(bag), min(most, len(bag)), replace=False)
    return rows_of(bag, np.sort(chosen))


def _seed(plan: EvidencePlan, entry: SlideEntry) -> int:
    (seed,) = patch_seeds(plan.settings.seed, entry.id, [0])
    return seed


def sort_bag(context: Context[Any], entry: SlideEntry) -> Processed:
    """Sort all patches of a slide into kinds, and store that, unless it was done."""
    plan: EvidencePlan = context.workload.plan
    place = EvidenceFolder(plan.run.out / EVIDENCE).batch(entry.id, plan.cells_digest, 0)
    count = plan.counts[entry.id]
    if place.is_file():
        return Processed(count)
    assert plan.kinds is not None
    started, sorter = time.perf_counter(), plan.kinds
    stored_plan(context.folder(entry), plan)
    numbers = Bag(context.features(entry)).rows
    kinds, values = np.full(len(numbers), -1), np.zeros(len(numbers))
    store = context.patch_store(entry)
    shown = shown_by({name: np.nan_to_num(store.share(name))[numbers] for name in SHOWN})

    def take(start: int, parts: Floats) -> None:
        part = slice(start, start + len(parts))
        values[part] = parts.sum(axis=1)
        kinds[part] = sorter.sort(parts, values[part], shown[part])

    walk(context, entry, take)
    sums = np.zeros((len(numbers), len(sorter)), np.float32)
    own = np.flatnonzero(kinds >= 0)
    sums[own, kinds[own]] = values[own]
    arrays: Arrays = {
        "patch/number": numbers,
        "patch/yx": store.yx()[numbers],
        "cells/kinds": np.where(kinds < 0, NOTHING, kinds + 1).astype(np.uint8)[:, None, None],
        "cells/sums": sums,
        "cells/values": values,
    }
    if (features := context.features(entry)).has(BOXES):
        arrays["patch/box"] = features.read(BOXES)[numbers]
    write_arrays(place, arrays)
    return Processed(count, 0, 0.0, time.perf_counter() - started)


def sort_whole(context: Context[Any], entry: SlideEntry) -> None:
    """Write what kinds are on a slide, as `sort_slide`; sums are those of all its patches, and not of the sample."""
    sort_slide(context, entry)
    plan: EvidencePlan = context.workload.plan
    folder = EvidenceFolder(plan.run.out / EVIDENCE)
    place = folder.batch(entry.id, plan.sums_digest, 0)
    arrays = read_arrays(place)
    if len(arrays["unit/area"]) == 1 and not plan.shares[entry.id].like and WHOLE not in arrays:
        cells = read_arrays(folder.batch(entry.id, plan.cells_digest, 0))
        write_arrays(place, exact_sums(arrays, cells, plan.shares[entry.id].stands_for))


def exact_sums(arrays: Arrays, cells: Arrays, stands_for: float) -> Arrays:
    """Return the sums of a slide's sample as those of all its patches; what lies on something keeps its share.

    Args:
        cells: what was found of all patches.
        stands_for: how many slides this one stands for.
    """
    values, own = cells["cells/values"], np.abs(cells["cells/sums"]).sum(axis=0, dtype=np.float64) * stands_for
    mass = np.array([values[values > 0].sum(), -values[values < 0].sum()]) * stands_for
    area = np.bincount(cells["cells/kinds"].ravel(), minlength=NOTHING + 1)[1 : len(own) + 1] * stands_for
    known = arrays["unit/own_mass"][0]
    factor = np.divide(own, known, out=np.zeros_like(own), where=known > 0)
    found = {name: sums * factor if name.startswith("kind/") else sums for name, sums in arrays.items()}
    sums = {"mass": mass, "area": len(values) * stands_for, "own_mass": own, "own_area": area}
    found |= {f"unit/{name}": np.array([value], np.float64) for name, value in sums.items()}
    return found | {WHOLE: np.ones(1, np.bool_)}


def show_bag(context: Context[Any], entry: SlideEntry, number: int) -> Processed:
    """Take kinds out of a slide's bag, take pictures of its examples, and store both, unless that was done."""
    plan: EvidencePlan = context.workload.plan
    shown = plan.shown[entry.id][number * PIECE : (number + 1) * PIECE]
    folder = EvidenceFolder(plan.run.out / EVIDENCE)
    place = folder.batch(entry.id, plan.shown_digest, number)
    if place.is_file():
        return Processed(len(shown))
    started, slide_plan = time.perf_counter(), stored_plan(context.folder(entry), plan)
    cells = read_arrays(folder.batch(entry.id, plan.cells_digest, 0))
    changes = {one.kind: (np.nan, np.nan) for one in shown}
    if wanted := [one.kind for one in shown if one.covered]:
        changes |= _without(context, entry, slide_plan, cells, wanted)
    change = np.array([changes[one.kind] if one.covered else (np.nan, np.nan) for one in shown]).reshape(-1, 2)
    arrays: Arrays = {
        "shown/kind": np.array([one.kind for one in shown], np.int64),
        "cover/change": change[:, 0],
        "cover/elsewhere": change[:, 1],
    }
    computed = time.perf_counter()
    write_arrays(place, arrays | _examples(context, entry, slide_plan, shown))
    return Processed(len(shown), 0, time.perf_counter() - computed, computed - started)


def _without(
    context: Context[Any], entry: SlideEntry, slide_plan: SlidePlan, cells: Arrays, wanted: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """Return for kinds the change of the slide's logit without their patches, and without equal areas elsewhere.

    NaN where a kind is less than a hundredth of the slide's evidence, or more than half of its patches: then there is
    no equal area.
    """
    plan: EvidencePlan = context.workload.plan
    bag = Bag(context.features(entry))
    held = bag[: len(bag)] if len(bag) * bag.shape[1] * 4 <= HELD_BYTES else bag
    subject = BagSubject.of(context.aggregator().network, held, plan.target, plan.run.slide_model.activation)
    places = cells["patch/yx"] / np.array(slide_plan.footprint)
    found = {}
    for kind in wanted:
        own, values = cells["cells/sums"][:, kind], cells["cells/values"]
        side = np.abs(values[np.sign(values) == np.sign(own.sum())]).sum()
        mask = cells["cells/kinds"][:, 0, 0] == kind + 1
        elsewhere = equal_areas(mask, places, ELSEWHERE, _seed(plan, entry) + kind)
        found[kind] = np.nan, np.nan
        if elsewhere is not None and np.abs(own).sum() >= PRESENT * side:
            told = removal(subject, mask, elsewhere)
            found[kind] = -told.drop, -told.control_drop
    return found


def _examples(context: Context[Any], entry: SlideEntry, slide_plan: SlidePlan, shown: Sequence[Shown]) -> Arrays:
    """Return the pictures of examples, each with its surroundings; none where the slide cannot be read any more."""
    examples = [i for i, one in enumerate(shown) if one.example]
    if not examples:
        return {}
    try:
        with context.slide(entry) as slide:
            if slide.info.digest != slide_plan.slide_digest:
                raise SlideFormatError(f"{entry.path}: not the file that was explained; put the right one there")
            pictures = [_pictures(slide, slide_plan, shown[i].yx) for i in examples]
    except SlideError as error:
        LOG.warning("%s: the report has no pictures of it: %s", entry.id, one_line(error))
        return {}
    found: Arrays = {
        "example/row": np.array(examples, np.int64),
        "example/number": np.array([shown[i].number for i in examples], np.int64),
        "example/extreme": np.array([shown[i].example == "extreme" for i in examples]),
        "example/rgb": np.stack([patch for patch, _ in pictures]),
        "example/around": np.stack([around for _, around in pictures]),
        "example/cells": np.ones((len(examples), 1, 1), np.bool_),
    }
    run, label = context.workload.plan.run, context.workload.plan.target.label
    of_target = [number for number, one in enumerate(run.maps) if one.target.label == label]
    if of_target:
        store, numbers = context.patch_store(entry), [shown[i].number for i in examples]
        found["example/map"] = np.concatenate([store.cams(n, n + 1, of_target[0]) for n in numbers])
    return found


def _pictures(slide: Slide, plan: SlidePlan, yx: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a patch and its surroundings, uint8 [h, w, 3]; `AROUND` sides of it are half as fine."""
    um = [side * mpp for side, mpp in zip(plan.footprint, plan.slide_mpp, strict=True)]
    mpp = max(max(um) / SHOWN_PX, *plan.slide_mpp)
    height, width = (max(1, round(side / mpp)) for side in um)
    margin = [side * (AROUND - 1) / 2 for side in plan.footprint]
    patch = read_region(slide, yx[0], yx[1], height, width, mpp)
    size = (max(1, height * AROUND // 2), max(1, width * AROUND // 2))
    return patch, read_region(slide, yx[0] - margin[0], yx[1] - margin[1], *size, 2 * mpp)


MEASURE_BAG = Stage("evidence", measure_bag)
SORT_BAG = Stage("sort", sort_bag)
SORT_WHOLE = Stage("tables", sort_whole)
SHOW_BAG = Stage("remove", show_bag)
