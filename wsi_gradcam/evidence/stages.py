"""The three passes over the slides of a sample: what the model does in their tasks, and what these write to disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from wsi_gradcam.audit.measures.removal import mean_colour, replace_by
from wsi_gradcam.audit.measures.sanity import random_answers
from wsi_gradcam.audit.measures.shortcuts import cover, input_masks, masking, suspects
from wsi_gradcam.audit.measures.subject import Aim, Subject
from wsi_gradcam.audit.plan import Arrays, patch_seeds, write_arrays
from wsi_gradcam.cam.engine import gradients
from wsi_gradcam.cam.targets import make_score
from wsi_gradcam.cam.trunks import exact
from wsi_gradcam.errors import SlideFormatError, SlideReadError
from wsi_gradcam.evidence import (
    DRAWN,
    NOTHING,
    PIECE,
    DrawnPatches,
    EvidenceFolder,
    EvidencePlan,
    drawn_patches,
)
from wsi_gradcam.evidence.bags import MEASURE_BAG, SHOW_BAG, SORT_BAG, SORT_WHOLE
from wsi_gradcam.evidence.clusters import SHOWN, shown_by
from wsi_gradcam.evidence.comparing import compare_slide
from wsi_gradcam.evidence.tables import draw_cells, draw_slide, sort_slide, stored_plan
from wsi_gradcam.run.claims import EVIDENCE
from wsi_gradcam.run.context import Exclusive
from wsi_gradcam.run.types import Part, Planned, Processed, SlideJob, Stage, Task
from wsi_gradcam.run.workload import measuring_job
from wsi_gradcam.slides import read_region
from wsi_gradcam.tissue.stain import apply

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.measures.subject import Subject
    from wsi_gradcam.audit.plan import Arrays
    from wsi_gradcam.cam.engine import AnyTarget
    from wsi_gradcam.evidence.clusters import Kinds
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.plan import RunPlan

    Rgb = NDArray[np.uint8]
    Masks = NDArray[np.bool_]
    Floats = NDArray[np.float64]


# Batches always have this size, padded if necessary: for others torch chooses other kernels, whose sums differ.
BATCH_SIZE = 16
CONTROLS = 4  # equal areas elsewhere, for each covered patch


@dataclass(frozen=True, eq=False)
class Seen:
    """Patches as on the slide, and as the model sees them.

    Attributes:
        raw: uint8 [P, h, w, 3] of the slide; used to detect ink, glass and blur.
        rgb: the same with the stain that the model expects.
        mpp: micrometres per pixel.
        glass: RGB of the slide's bare glass.
        seeds: one for each patch.
        shown: returns masks [P, h, w] of patches as seen by the network, [P, H, W].
    """

    raw: Rgb
    rgb: Rgb
    mpp: float
    glass: tuple[int, int, int]
    seeds: Sequence[int]
    shown: Callable[[Masks], Masks] = lambda masks: masks


@torch.enable_grad()
def contributions(subject: Subject, images: Tensor, target: AnyTarget) -> tuple[Tensor, Tensor]:
    """Return logits [P, K] of images and the contribution of each channel in each cell to the target, [P, C, h, w]."""
    answers, parts = [], []
    layout = subject.program.layers[0].layout
    with exact(images.device):
        for some in _filled(images):
            done = subject.program.forward(some)
            (gradient, *_) = next(gradients(done.logits, [make_score(target, done.logits)], done.values[:1]))
            answers.append(done.logits.detach())
            parts.append((layout.to_map(done.values[0].detach()) * layout.to_map(gradient)).detach())
    count = len(images)
    return torch.cat(answers)[:count], torch.cat(parts)[:count]


def _filled(images: Tensor) -> Sequence[Tensor]:
    """Return batches of one size, padded with the last image."""
    missing = -len(images) % BATCH_SIZE
    return torch.split(torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]), BATCH_SIZE)


def describe(subject: Subject, seen: Seen, target: AnyTarget, cells: int = DRAWN) -> Arrays:
    """Return facts about patches (`patch/...`, [P]), and the places drawn from them (`place/...`, [n]).

    Cells are drawn with a probability that grows with their contribution, and are weighted accordingly: on average,
    weighted sums over places equal those over all cells.
    """
    logits, parts = contributions(subject, subject.images(seen.rgb), target)
    grid = (parts.shape[2], parts.shape[3])
    values = parts.sum(dim=1).flatten(1).double().cpu().numpy()
    rows, chosen, weights = draw_cells(values, seen.seeds, cells)
    features = parts.flatten(2)[torch.from_numpy(rows), :, torch.from_numpy(chosen)].float().cpu().numpy()
    length = np.linalg.norm(features, axis=1, keepdims=True)
    aim = Aim(target, logits, subject.model.activation)
    probability = aim.probability(logits)
    found: Arrays = {
        "patch/logits": logits.float().cpu().numpy(),
        "patch/logit": aim.logit(logits).double().cpu().numpy(),
        "place/patch": rows,
        "place/cell": chosen,
        "place/value": values[rows, chosen],
        "place/weight": weights,
        "place/features": np.divide(features, length, out=np.zeros_like(features), where=length > 0).astype(np.float16),
    }
    if probability is not None:
        found["patch/probability"] = probability.double().cpu().numpy()
    for name, masks in suspects(seen.raw, seen.mpp, seen.glass).items():
        covered = cover(seen.shown(masks), grid).reshape(len(values), -1)
        found[f"suspect/{name}"] = covered[rows, chosen].astype(np.float32)
    return found


def probe(subject: Subject, rgb: Rgb, seed: int) -> NDArray[np.float32]:
    """Return answers [P, draws, K] of copies of the model with random weights; see `sanity.random_answers`."""
    answers = random_answers(subject, subject.images(rgb), seed=seed)
    return answers.swapaxes(0, 1).float().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Sorted:
    """Patches with all their cells sorted into kinds.

    Attributes:
        logits: [P, K].
        map: [P, h, w] sum of the contributions.
        kinds: [P, h, w] the kind of each cell, -1 if it contributes next to nothing.
    """

    images: Tensor
    logits: Tensor
    map: NDArray[np.float32]
    kinds: NDArray[np.int64]


def sort_cells(subject: Subject, rgb: Rgb, target: AnyTarget, kinds: Kinds, seen: Seen | None = None) -> Sorted:
    """Return patches with each of their cells sorted into kinds; `seen` tells where they show glass or ink."""
    images = subject.images(rgb)
    logits, parts = contributions(subject, images, target)
    shape = (parts.shape[0], parts.shape[2], parts.shape[3])
    features = parts.flatten(2).transpose(1, 2).flatten(0, 1).float().cpu().numpy()
    values = features.sum(axis=1, dtype=np.float64)
    shown = None
    if seen is not None and kinds.shows:
        masks = suspects(seen.raw, seen.mpp, seen.glass)
        shown = shown_by({name: cover(seen.shown(masks[name]), shape[1:]).ravel() for name in SHOWN})
    sorted_as = kinds.sort(features, values, shown).reshape(shape)
    return Sorted(images, logits, values.reshape(shape).astype(np.float32), sorted_as)


def cover_kinds(
    subject: Subject, patches: Sorted, target: AnyTarget, wanted: Sequence[int], seed: int
) -> tuple[Floats, Floats]:
    """Return (change, change by equal areas) [P] of the explained scalar when the cells of a kind are covered.

    The kind of patch i is `wanted`[i]. Covered cells get the patch's mean colour; areas elsewhere have the same shape,
    see `masking`. NaN if the kind is absent, or fills the patch.
    """
    cells = patches.kinds == np.asarray(wanted)[:, None, None]
    size = patches.images.shape[2:]
    ways = [np.arange(side) * own // side for side, own in zip(size, cells.shape[1:], strict=True)]
    masks = cells[:, ways[0][:, None], ways[1][None]]
    aim = Aim(target, patches.logits, subject.model.activation)
    replace = replace_by(patches.images, mean_colour(patches.images))
    with exact(patches.images.device):
        found = masking(subject, patches.images, aim, masks, replace, CONTROLS, seed)
    return found.change, found.control_changes.mean(axis=1)


@dataclass(frozen=True)
class EvidenceWorkload:
    """A pass over the slides of the sample.

    Attributes:
        plan: the plan, which says which pass this is.
        subject: the model in this process.
    """

    name: ClassVar[str] = EVIDENCE
    plan: EvidencePlan
    subject: Exclusive[Subject] = field(default_factory=Exclusive, repr=False, compare=False)

    @property
    def patches(self) -> int | None:
        """The number of patches of the pass; None for the first, in which workers draw them."""
        if self.plan.step == "measure":
            return None
        if self.plan.step == "show":
            return sum(len(own) for own in self.plan.shown.values())
        return sum(self.plan.counts.values())

    @property
    def part(self) -> Part:
        """Which pass it is, in words."""
        names = {"measure": "measuring places", "sort": "sorting cells into clusters", "show": "covering clusters"}
        if self.plan.unit == "slide":
            names |= {"measure": "measuring patches", "sort": "sorting patches", "show": "removing clusters"}
        return Part(list(names).index(self.plan.step) + 1, len(names), names[self.plan.step])

    @property
    def run(self) -> RunPlan:
        """The plan of the run whose slides these are."""
        return self.plan.run

    def job(self, slide: SlideEntry) -> SlideJob:
        """Return the phases of a slide; see `Workload.job`."""
        whole = self.plan.unit == "slide"
        if self.plan.step == "measure":

            def then(drawn: Planned) -> list[list[Task]]:
                return [[Task(MEASURE_BAG, slide)] if whole else [Task(MEASURE, slide, (i,)) for i in drawn.spans]]

            return measuring_job(slide, [[Task(DRAW, slide)]], then)
        pieces = [(i,) for i in range(self.plan.pieces(slide.id))]
        if self.plan.step == "sort":
            cells = [] if self.plan.settings.skip_labels else [Task(CELLS, slide, index) for index in pieces]
            cells = [Task(SORT_BAG, slide)] if whole else cells
            compared = [Task(COMPARE, slide)] if self.plan.against[0] else []
            return measuring_job(slide, [cells, [Task(SORT_WHOLE if whole else SORT, slide)], compared])
        return measuring_job(slide, [[Task(SHOW_BAG if whole else SHOW, slide, index) for index in pieces]])


def _piece(plan: EvidencePlan, folder: EvidenceFolder, entry: SlideEntry, number: int) -> DrawnPatches:
    return drawn_patches(folder, entry.id, plan.sample_digest).piece(number)


def measure_piece(context: Context[EvidenceWorkload], entry: SlideEntry, number: int) -> Processed:
    """Measure a piece of a slide's sample and store the measurements, unless that has been done."""
    plan = context.workload.plan
    folder = EvidenceFolder(plan.run.out / EVIDENCE)
    patches, place = _piece(plan, folder, entry, number), folder.batch(entry.id, plan.digest, number)
    if place.is_file():
        return Processed(len(patches))
    started = time.perf_counter()
    seen, readable = _read(context, entry, patches.numbers.tolist(), patches.yx.tolist())
    read = time.perf_counter()
    kept = patches.only(readable)
    found: Arrays = {"patch/number": kept.numbers, "patch/weight": kept.weights, "patch/yx": kept.yx}
    with context.workload.subject.used(lambda: _subject(context)) as subject:
        if readable.any():
            found |= describe(subject, seen, plan.target, DRAWN)
            if number == 0 and plan.probed(entry.id):
                found["probe/answers"] = probe(subject, seen.rgb[: plan.probed(entry.id)], plan.settings.seed)
    write_arrays(place, found)
    done = time.perf_counter()
    return Processed(len(patches), int((~readable).sum()), read - started, done - read, read - started)


def sort_piece(context: Context[EvidenceWorkload], entry: SlideEntry, number: int) -> Processed:
    """Sort all cells of the patches of a piece into kinds and store them, unless that has been done."""
    plan = context.workload.plan
    folder = EvidenceFolder(plan.run.out / EVIDENCE)
    patches, place = _piece(plan, folder, entry, number), folder.batch(entry.id, plan.cells_digest, number)
    if place.is_file():
        return Processed(len(patches))
    assert plan.kinds is not None
    started = time.perf_counter()
    seen, readable = _read(context, entry, patches.numbers.tolist(), patches.yx.tolist())
    read = time.perf_counter()
    grid, count = plan.run.facts.cam_shape, int(readable.sum())
    kinds, sums = np.zeros((count, *grid), np.uint8), np.zeros((count, len(plan.kinds)), np.float32)
    if count:
        with context.workload.subject.used(lambda: _subject(context)) as subject:
            found = sort_cells(subject, seen.rgb, plan.target, plan.kinds, seen)
        kinds = np.where(found.kinds < 0, NOTHING, found.kinds + 1).astype(np.uint8)
        sums = np.stack([np.where(found.kinds == i, found.map, 0).sum(axis=(1, 2)) for i in range(len(plan.kinds))], 1)
    arrays: Arrays = {
        "patch/number": patches.numbers[readable],
        "patch/yx": patches.yx[readable],
        "cells/kinds": kinds,
        "cells/sums": sums.astype(np.float32),
    }
    write_arrays(place, arrays)
    done = time.perf_counter()
    return Processed(len(patches), 0, read - started, done - read, read - started)


def show_piece(context: Context[EvidenceWorkload], entry: SlideEntry, number: int) -> Processed:
    """Cover kinds in some patches of a slide, take pictures of others, and store both, unless that has been done."""
    plan = context.workload.plan
    shown = plan.shown[entry.id][number * PIECE : (number + 1) * PIECE]
    place = EvidenceFolder(plan.run.out / EVIDENCE).batch(entry.id, plan.shown_digest, number)
    if place.is_file():
        return Processed(len(shown))
    from wsi_gradcam.audit.batch import small_picture

    assert plan.kinds is not None
    started = time.perf_counter()
    seen, readable = _read(context, entry, [one.number for one in shown], [one.yx for one in shown])
    read = time.perf_counter()
    shown = tuple(one for one, good in zip(shown, readable.tolist(), strict=True) if good)
    found: Arrays = {"shown/kind": np.array([one.kind for one in shown], np.int64)}
    if shown:
        with context.workload.subject.used(lambda: _subject(context)) as subject:
            patches = sort_cells(subject, seen.rgb, plan.target, plan.kinds, seen)
            kinds = [one.kind for one in shown]
            change, elsewhere = cover_kinds(subject, patches, plan.target, kinds, plan.settings.seed)
        covered = np.array([one.covered for one in shown])
        found |= {
            "cover/change": np.where(covered, change, np.nan),
            "cover/elsewhere": np.where(covered, elsewhere, np.nan),
        }
        examples = [i for i, one in enumerate(shown) if one.example]
        if examples:
            found |= {
                "example/row": np.array(examples, np.int64),
                "example/number": np.array([shown[i].number for i in examples], np.int64),
                "example/extreme": np.array([shown[i].example == "extreme" for i in examples]),
                "example/rgb": np.stack([small_picture(seen.raw[i]) for i in examples]),
                "example/map": patches.map[examples],
                "example/cells": patches.kinds[examples] == np.array(kinds)[examples][:, None, None],
            }
    write_arrays(place, found)
    done = time.perf_counter()
    return Processed(len(readable), int((~readable).sum()), read - started, done - read, read - started)


DRAW = Stage("draw", draw_slide)
MEASURE = Stage("evidence", measure_piece, needs_model=True)
CELLS = Stage("sort", sort_piece, needs_model=True)
SORT = Stage("tables", sort_slide)
COMPARE = Stage("compare", compare_slide)
SHOW = Stage("cover", show_piece, needs_model=True)


def _subject(context: Context[EvidenceWorkload]) -> Subject:
    run = context.workload.run
    return Subject.of(context.model().model, run.settings.method, run.facts.layer, BATCH_SIZE)


def _read(
    context: Context[EvidenceWorkload], entry: SlideEntry, patches: Sequence[int], yx: Sequence[tuple[int, int]]
) -> tuple[Seen, NDArray[np.bool_]]:
    """Return the patches that can be read, and which ones they are.

    Raises:
        ResumeError: the slide's results now belong to another run.
        SlideFormatError: the slide is not the file that was explained.
    """
    plan, run = context.workload.plan, context.workload.run
    slide_plan = stored_plan(context.folder(entry), plan)
    mpp = slide_plan.patch_mpp(run.patch_px, run.mpp)
    rgb, readable = [], np.ones(len(yx), np.bool_)
    with context.slide(entry) as slide:
        if slide.info.digest != slide_plan.slide_digest:
            raise SlideFormatError(f"{entry.path}: not the file that was explained; put the right one there")
        for i, (y, x) in enumerate(yx):
            try:
                rgb.append(read_region(slide, y, x, *run.patch_px, mpp))
            except SlideReadError:
                readable[i] = False
    raw = np.stack(rgb) if rgb else np.zeros((0, *run.patch_px, 3), np.uint8)
    treated = raw if slide_plan.stain is None or not len(raw) else apply(slide_plan.stain, raw)
    seeds = patch_seeds(plan.settings.seed, entry.id, [n for n, good in zip(patches, readable, strict=True) if good])
    size, view = context.model().input_px, run.facts.view

    def shown(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return input_masks(masks, size, view, run.patch_px)

    return Seen(raw, treated, run.mpp, context.glass(entry), seeds, shown), readable
