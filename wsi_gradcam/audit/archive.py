"""An explained run on disk: its settings, model, slides and annotations, and the sample of its patches.

The sample is drawn once, in two steps, so that each patch stands for a known number of others. First slides by site,
scanner and label, if there are too many for the number of patches; then patches of each, by their predicted class and,
with annotations, by whether the border of an annotation runs through them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from wsi_gradcam.audit.measurements import stratified_sample
from wsi_gradcam.audit.plan import BATCH_SIZE, AuditSettings, SlideSample, deep_patches
from wsi_gradcam.audit.schema import Unit, UntestedRow
from wsi_gradcam.cam.targets import PREDICTED, Target, check_trusted, parse_targets
from wsi_gradcam.errors import (
    ConfigError,
    ModelError,
    ResultError,
    ResumeError,
    StoreError,
    as_path,
    picked,
)
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.io.urls import allowed_hosts
from wsi_gradcam.mil.spec import SlideModelSpec, slide_model_in, with_patch_px
from wsi_gradcam.models.spec import ModelSpec, explain_validation
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.overview import read_mask
from wsi_gradcam.results.slide import slide_address
from wsi_gradcam.results.slide_tables import read_slide_records
from wsi_gradcam.run.plan import RunPlan, plan_run
from wsi_gradcam.run.settings import Settings, make_settings
from wsi_gradcam.tissue.annotations import find_mask, in_frame, read_regions
from wsi_gradcam.tissue.annotations.areas import LabelPicture
from wsi_gradcam.tissue.annotations.regions import Moved
from wsi_gradcam.tissue.masks import Shares

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.geometry import Region
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.run import Result
    from wsi_gradcam.results.run_files import SlideFolder
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.tissue.annotations import Regions
    from wsi_gradcam.tissue.annotations.areas import Drawn

    Box = tuple[float, float, float, float]
    Spec = ModelSpec | SlideModelSpec

GROUPINGS = ("site", "scanner", "label")
MASK_PX = 2048  # of the longer side of a mask over the whole slide, from which shares of patches are taken
UNNAMED = "region"
SIDE_PX = 64  # of a patch's mask; finer than the cells of any map
PARTLY = (0.02, 0.98)  # shares of a patch between which an annotation tells where a map should look
FEWEST = 2  # of each stratum of a slide


@dataclass(frozen=True)
class Candidate:
    """A slide that can be audited: its results, its entry in the list of slides, and its number of patches."""

    slide: SlideResult
    entry: SlideEntry
    patches: int


@dataclass(frozen=True)
class ExplainedRun:
    """A run on disk.

    Attributes:
        settings: of the run.
        spec: of its model, resolved.
        model_settings: those used to examine the model: eager, float32, with the run's layer and batch size.
        candidates: the slides that can be audited.
        left_out: the other slides, and why they cannot be.
        targets: of the run, by name only: no function is loaded.
        groups: the slides' groups, such as "site", by slide id.
    """

    result: Result
    settings: Settings
    spec: Spec
    model_settings: Settings
    candidates: tuple[Candidate, ...]
    left_out: tuple[UntestedRow, ...]
    targets: tuple[Target, ...]
    groups: dict[str, dict[str, str]]

    @property
    def unit(self) -> Unit:
        """What questions are asked about: patches, or slides for a slide-level model."""
        return "slide" if isinstance(self.spec, SlideModelSpec) else "patch"

    @cached_property
    def entries(self) -> dict[str, SlideEntry]:
        """The slides by id."""
        return {one.entry.id: one.entry for one in self.candidates}

    def plan(self, facts: ModelFacts) -> RunPlan:
        """Return the run's plan, with the model as it is now.

        Raises:
            ResumeError: the results are from another model or other settings.
        """
        run = self.result.record
        if run.choice is None:
            raise ResumeError(f"{self.result.out}: made by an older version; explain again to audit it")
        baseline = tuple(map(float, self.result.run.get("baseline", ())))
        eager = replace(plan_run(self.result.folder.place, self.spec, facts, self.settings), baseline=baseline)
        stored = replace(eager, facts=replace(facts, choice=run.choice))
        if stored.digest() != run.run_digest:
            what = "another model" if facts.digest != run.model.digest else "other settings or another version"
            raise ResumeError(
                f"{self.result.out}: its results come from {what}; give the model that made them with --model, or "
                "explain again"
            )
        return eager


def open_run(result: Result, given: Spec | None = None, trust_code: bool = False, held: bool = False) -> ExplainedRun:
    """Open a run, from its run.yaml, slides.jsonl and the slides' manifests.

    Args:
        given: the model, if the run does not say how to load it, or its file has moved.
        trust_code: allow code in the model, and in targets that are functions, to run.
        held: the model has already been loaded.

    Raises:
        ResultError: no slide is finished, or an older version wrote the run.
        ConfigError: the model was passed by a program, so it has to be given again.
        ModelError: loading the model runs code, which is not allowed.
    """
    run = result.record
    settings = make_settings(**run.settings | {"allow_hosts": allowed_hosts()})
    spec = (given or _spec_of(result)).trusting(trust_code)
    if isinstance(spec, SlideModelSpec) and settings.features is not None and not settings.methods:
        spec = spec.model_copy(update={"encoder": None})  # as when it was explained: no pixels were seen
    if not held:
        spec.check_trusted()
    targets = parse_targets(settings.target, run.model.classes)
    check_trusted(targets, trust_code or (spec.trusted and not held))
    if settings.patch_px is not None:
        spec = with_patch_px(spec, settings.patch_px)
    model_settings = settings.model_copy(
        update={"engine": "eager", "precision": "float32", "layer": run.model.layer, "batch_size": run.model.batch_size}
    )
    entries = _entries(result)
    candidates, left_out = [], []
    for slide in result:
        why = _why_not(slide, entries)
        if why:
            left_out.append(UntestedRow(what=slide.id, why=why))
        else:
            candidates.append(Candidate(slide, entries[slide.id], slide.plan.patches))
    if not candidates:
        raise ResultError(f"{result.out}: no slide is finished and has tissue, so there is nothing to audit")
    groups = {
        key: {name: value for name, entry in entries.items() if (value := getattr(entry, key))} for key in GROUPINGS
    }
    return ExplainedRun(
        result,
        settings,
        spec,
        model_settings,
        tuple(candidates),
        tuple(left_out),
        targets,
        {key: by for key, by in groups.items() if by},
    )


def audited_target(targets: Sequence[Target], classes: Sequence[str], label: str, annotated: bool) -> Target:
    """Return the target to audit.

    Args:
        targets: of the run.
        classes: of its model.
        label: of one of the run's, or "predicted"; "": each patch's predicted class where all classes were explained or
            `predicted` was, else the run's first; with annotations, the run's only class.

    Raises:
        ConfigError: it was not explained, or nothing says which class the annotations show.
    """
    known = {target.label: target for target in targets}
    every = len([t for t in targets if t.index is not None and t.is_class]) == len(classes)
    if every and len(classes) > 1:
        known.setdefault(PREDICTED, Target(PREDICTED))
    if label:
        if (name := picked(label, known)) is None:
            raise ConfigError(f"target {label!r} was not explained; expected one of {', '.join(known)}")
        return known[name]
    if annotated:
        named = [target for target in targets if target.index is not None and target.is_class]
        if len(named) != 1:
            raise ConfigError(
                f"annotations show one class, but the run explains {', '.join(known)}; choose one with --target"
            )
        return named[0]
    return known.get(PREDICTED, targets[0])


def _spec_of(result: Result) -> Spec:
    model = result.record.model
    if model.spec is None:
        raise ResultError(f"{result.out}/run.yaml does not say how to load its model; give the model with --model")
    values: dict[str, Any] = {**model.spec, "folder": Path(model.folder)}
    try:
        if "aggregator" in values:
            return slide_model_in(values)
        spec = ModelSpec.model_validate(values)
    except ValidationError as error:
        raise ModelError(f"{result.out}/run.yaml: {explain_validation(error)}") from error
    if spec.kind == "live":
        raise ConfigError(
            f"{result.out}: its model was a network object in a Python program, which cannot be loaded again; pass the "
            "same network to audit_run as `model`"
        )
    return spec


def _entries(result: Result) -> dict[str, SlideEntry]:
    """Return the run's slides by id, as listed in slides.jsonl."""
    found = {}
    for name, row in read_slide_records(result.folder.record).items():
        told = {key: str(row.get(key, "")) for key in ("mask", *GROUPINGS, "patient")}
        path, stated = as_path(row["path"]), None if (mpp := row.get("mpp")) is None else (mpp[0], mpp[1])
        address = slide_address(path, result.out)
        found[name] = SlideEntry(name, path, stated, "" if address == path else address, **told)
    return found


def _why_not(slide: SlideResult, entries: dict[str, SlideEntry]) -> str:
    if slide.status == SlideStatus.FAILED and not slide.is_finished:
        return f"failed: {slide.error}"
    if not slide.is_finished:
        return "is not finished; explain again to finish it"
    if slide.id not in entries:
        return "is not in slides.jsonl; explain again"
    try:
        patches = slide.plan.patches
    except StoreError as error:
        return str(error)
    return "" if patches else "no tissue was found on it"


def draw_sample(candidates: Sequence[Candidate], settings: AuditSettings) -> dict[str, SlideSample]:
    """Return the sample by slide id, ordered by id; the same for the same seed."""
    samples = {}
    for candidate, each, weight in draw_shares(candidates, settings):
        found = _patches(candidate, settings, each, weight)
        if found.patches:
            samples[candidate.slide.id] = found
    return with_depth(samples, settings)


def draw_shares(candidates: Sequence[Candidate], settings: AuditSettings) -> list[tuple[Candidate, int, float]]:
    """Return the sampled slides, ordered by id, the number of patches to draw, and how many slides each stands for."""
    chosen, stands_for = _slides(candidates, settings, max(1, settings.patches // BATCH_SIZE))
    each = -(-settings.patches // max(1, len(chosen)))
    return [(one, each, weight) for one, weight in zip(chosen, stands_for, strict=True)]


def draw_slides(candidates: Sequence[Candidate], settings: AuditSettings) -> dict[str, SlideSample]:
    """Return the sample of slides by id, for a slide-level model; the slides themselves are measured."""
    chosen, weights = _slides(candidates, settings, settings.slides)
    return {
        one.slide.id: whole_slide(one.entry.label or "any", weight)
        for one, weight in zip(chosen, weights, strict=True)
        if (np.asarray(one.slide.table(["status"]).column("status")) == "ok").any()
    }


def whole_slide(stratum: str, weight: float = 1.0) -> SlideSample:
    """Return the sample of a slide that is measured as a whole."""
    return SlideSample((0,), ((0, 0),), (weight,), (stratum,), 1)


def _slides(
    candidates: Sequence[Candidate], settings: AuditSettings, wanted: int
) -> tuple[list[Candidate], list[float]]:
    """Return about `wanted` slides, and how many slides each stands for."""
    ordered = sorted(candidates, key=lambda one: one.slide.id)
    if len(ordered) <= wanted:
        return ordered, [1.0] * len(ordered)
    groups = [f"{c.entry.site}|{c.entry.scanner}|{c.entry.label}" for c in ordered]
    if len(set(groups)) > wanted // 2:  # too many kinds to include each
        groups = [""] * len(ordered)
    rows, weights = stratified_sample(groups, wanted, settings.seed)
    return [ordered[row] for row in rows.tolist()], weights.tolist()


def _patches(candidate: Candidate, settings: AuditSettings, count: int, stands_for: float) -> SlideSample:
    slide = candidate.slide
    patches = ReadablePatches.of(slide.table(sample_columns(slide.classes)), slide.classes)
    strata = _strata(slide, settings, patches, candidate.entry.path)
    return patches.draw(slide.id, strata, count, settings.seed, stands_for)


def sample_columns(classes: Sequence[str]) -> list[str]:
    """Return the columns of a slide's table that determine which of its patches are drawn."""
    return ["y", "x", "status", *(f"logit_{name}" for name in classes)]


@dataclass(frozen=True, eq=False)
class ReadablePatches:
    """The patches of a slide that could be read when it was explained.

    For each: its number in the slide's table, level-0 px (y, x) of its top left corner, and its predicted class.
    """

    numbers: NDArray[np.int64]
    yx: NDArray[np.int64]
    predicted: list[str]

    @classmethod
    def of(cls, table: pa.Table, classes: Sequence[str]) -> ReadablePatches:
        """Return those of a table with the columns `sample_columns`."""
        readable = np.flatnonzero(table.column("status").to_numpy(zero_copy_only=False) == "ok")
        yx = np.stack([table.column(axis).to_numpy() for axis in ("y", "x")], axis=1)[readable]
        columns = [table.column(f"logit_{name}").to_numpy(zero_copy_only=False) for name in classes]
        logits = np.stack(columns, axis=1)[readable]
        predicted = logits.argmax(axis=1) if logits.shape[1] > 1 else (logits[:, 0] > 0).astype(np.int64)
        names = list(classes) if len(classes) > 1 else [f"not {classes[0]}", classes[0]]
        return cls(readable, yx, [names[number] for number in predicted.tolist()])

    def draw(self, slide_id: str, strata: Sequence[str], count: int, seed: int, stands_for: float) -> SlideSample:
        """Return about `count` of them, from each stratum in proportion; the slide stands for `stands_for` slides."""
        if not len(self.numbers):
            return SlideSample((), (), (), (), 0)
        name = slide_id.encode("utf-8", "backslashreplace")  # what no encoding knows seeds too
        drawn = [f"{name.decode()}|{stratum}" for stratum in strata]
        rows, weights = stratified_sample(drawn, count, seed, FEWEST)
        order = np.random.default_rng([seed, *name]).permutation(len(rows))
        rows, each = rows[order], (weights[order] * stands_for).tolist()
        numbers, yx = tuple(self.numbers[rows].tolist()), tuple((y, x) for y, x in self.yx[rows].tolist())
        return SlideSample(numbers, yx, tuple(each), tuple(strata[row] for row in rows.tolist()), 0)


def _strata(slide: SlideResult, settings: AuditSettings, patches: ReadablePatches, own: str) -> list[str]:
    strata, yx = patches.predicted, patches.yx
    if settings.annotations is None or not len(yx):
        return strata
    ground = ground_of(slide.plan, slide.folder, settings)
    found = annotated_slide(settings.annotations, slide.id, settings.include, slide.size_px, own, ground)
    if found is None:
        return strata
    shares = found.shares(yx, slide.plan.view)
    partly = (shares > PARTLY[0]) & (shares < PARTLY[1])
    return [f"{name}, partly annotated" if part else name for name, part in zip(strata, partly.tolist(), strict=True)]


def with_depth(samples: Mapping[str, SlideSample], settings: AuditSettings) -> dict[str, SlideSample]:
    """Return the samples with batches to measure in depth, assigned to slides one at a time in a random order."""
    names = list(samples)
    order = [names[i] for i in np.random.default_rng(settings.seed).permutation(len(names)).tolist()]
    left, given = deep_patches(settings.patches), Counter[str]()
    while left > 0:
        before = left
        for name in order:
            if left > 0 and given[name] < samples[name].batches:
                part = samples[name].batch(given[name])
                given[name] += 1
                left -= part.stop - part.start
        if left == before:  # all are deep
            break
    return {name: replace(sample, deep=given[name]) for name, sample in samples.items()}


@dataclass(frozen=True)
class Annotated:
    """The annotations of a slide of size `slide_px` (height, width)."""

    regions: Regions
    slide_px: tuple[int, int]

    def shares(self, yx: NDArray[np.int64], view: Box) -> NDArray[np.float32]:
        """Return the annotated share of each patch at level-0 `yx` [n, 2]; `view` is (y, x, height, width) in it."""
        return self._shares(partial(self.regions.mask, self.slide_px), yx, view)

    def shares_by_class(self, yx: NDArray[np.int64], view: Box) -> dict[str, NDArray[np.float32]]:
        """Return the share of each patch that a class covers, by its name as in `masks_by_class`."""
        drawn = self.regions.drawn(self.slide_px)
        return {shown: self._shares(partial(drawn.mask, {name}), yx, view) for shown, name in self._classes().items()}

    def _shares(
        self, mask_of: Callable[[tuple[int, int]], NDArray[np.bool_]], yx: NDArray[np.int64], view: Box
    ) -> NDArray[np.float32]:
        longer = max(self.slide_px)
        shape = tuple(max(1, round(side * min(1, MASK_PX / longer))) for side in self.slide_px)
        scale = np.array([shape[0] / self.slide_px[0], shape[1] / self.slide_px[1]])
        start = (yx + np.array(view[:2])) * scale
        mask = mask_of((shape[0], shape[1]))
        return Shares(mask).of(np.concatenate([start, start + np.array(view[2:]) * scale], axis=1))

    @property
    def _is_picture(self) -> bool:
        """True for a picture, whose only class has a number as its name."""
        drawn = self.regions.drawn(self.slide_px)
        return isinstance(drawn.drawn if isinstance(drawn, Moved) else drawn, LabelPicture)

    def masks(self, yx: Sequence[tuple[int, int]], view: Box) -> NDArray[np.bool_]:
        """Return masks of the annotated areas of each patch, bool [n, SIDE_PX, SIDE_PX].

        Raises:
            AnnotationError: the file cannot be read.
        """
        drawn = self.regions.drawn(self.slide_px)
        return _cut(drawn, self.regions.wanted(drawn), _boxes(yx, view))

    def masks_by_class(self, yx: Sequence[tuple[int, int]], view: Box) -> dict[str, NDArray[np.bool_]]:
        """Return the same for each class by name; one without a name, and that of a picture, is "region"."""
        drawn, boxes = self.regions.drawn(self.slide_px), _boxes(yx, view)
        return {shown: _cut(drawn, {name}, boxes) for shown, name in self._classes().items()}

    def slide_masks(self, shape: tuple[int, int]) -> dict[str, NDArray[np.bool_]]:
        """Return where each class is on the whole slide, bool [h, w] of this shape, by name as in `masks_by_class`."""
        drawn = self.regions.drawn(self.slide_px)
        return {shown: drawn.mask({name}, shape) for shown, name in self._classes().items()}

    def _classes(self) -> dict[str, str]:
        """Return the names of classes as drawn, by the names shown."""
        names = self.regions.drawn(self.slide_px).names
        single = self._is_picture and len(names) < 2
        return {UNNAMED if single else name or UNNAMED: name for name in names or [UNNAMED]}


@dataclass(frozen=True)
class Ground:
    """What annotations are placed on.

    Attributes:
        height, width: of the slide's level 0.
        bounds: the part of it that was scanned; None if all, or if unknown.
        tissue: the file of its tissue.
        frame: what annotations were drawn on, see `in_frame`.
    """

    height: int
    width: int
    bounds: Region | None
    tissue: StoragePath
    frame: str


def ground_of(plan: SlidePlan, folder: SlideFolder, settings: AuditSettings) -> Ground:
    """Return what annotations of a slide are placed on."""
    return Ground(*plan.slide_px, plan.scanned, folder.tissue, settings.mask_frame)


def annotated_slide(
    annotations: Path | None,
    slide_id: str,
    include: tuple[str, ...],
    slide_px: tuple[int, int],
    own: str = "",
    ground: Ground | None = None,
) -> Annotated | None:
    """Return the annotations of a slide; None if a folder has none for it, or none of the classes that count.

    Raises:
        AnnotationError: several files match, or one cannot be read.
    """
    if annotations is None or (annotations.is_dir() and find_mask(annotations, slide_id, own) is None):
        return None
    regions = read_regions(annotations, slide_id, include, own=own)
    assert regions is not None
    if ground is not None and ground.bounds is not None:
        regions = in_frame(regions, read_mask(ground.tissue), ground, ground.frame)
    if include and regions.shared and not set(regions.include) & set(regions.drawn(slide_px).known):
        return None
    return Annotated(regions, slide_px)


def _boxes(yx: Sequence[tuple[int, int]], view: Box) -> list[Box]:
    """Return (y, x, height, width) of the area that the model sees for each patch, level-0 px."""
    return [(y + view[0], x + view[1], view[2], view[3]) for y, x in yx]


def _cut(drawn: Drawn, names: Collection[str], boxes: Sequence[Box]) -> NDArray[np.bool_]:
    """Return where classes are in each box, bool [n, SIDE_PX, SIDE_PX]."""
    return np.stack([drawn.cut(names, box, (SIDE_PX, SIDE_PX)) for box in boxes])
