"""`audit_images`: the audit's questions of plain patches that are in memory, without slides or a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.archive import with_depth
from wsi_gradcam.audit.batch import PatchData, subject_of
from wsi_gradcam.audit.measurements import joined
from wsi_gradcam.audit.metrics import ArchiveFacts, metrics_of
from wsi_gradcam.audit.plan import BATCH_SIZE, AuditPlan, AuditSettings, SlideSample, patch_seeds
from wsi_gradcam.audit.report.figures import examples_of, scale_of
from wsi_gradcam.audit.report.page import archive_page
from wsi_gradcam.audit.stages import measure_patches
from wsi_gradcam.audit.vocabulary import QUESTIONS
from wsi_gradcam.cam.explainer import Request, examine
from wsi_gradcam.cam.targets import PREDICTED
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.models.load import Model, load_model
from wsi_gradcam.run.plan import check_methods, plan_run
from wsi_gradcam.run.settings import make_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.folder import Arrays
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.schema import Metrics
    from wsi_gradcam.models.spec import ModelSpec

    Masks = NDArray[np.bool_]

WHITE = (255, 255, 255)


def audit_images(
    rgb: NDArray[np.uint8],
    model: str | PathLike[str] | ModelSpec | Model,
    *,
    method: str | Sequence[str] = "gradcam",
    target: str = PREDICTED,
    groups: Sequence[str] | None = None,
    annotated: Masks | None = None,
    regions: Mapping[str, Masks] | None = None,
    glass: tuple[int, int, int] = WHITE,
    mpp: float | None = None,
    layer: str | None = None,
    only: Sequence[str] = tuple(QUESTIONS),
    seed: int = 0,
    device: str = "cpu",
    trust_code: bool = False,
    report: str | PathLike[str] | None = None,
) -> Metrics:
    """Audit a model on patches uint8 [N, h, w, 3] of its own size: the numbers and verdicts of `audit_run`.

    What needs a slide is not asked: the control by the probabilities round about, a shift of the grid, slides' scores.

    Args:
        model: as for `explain`, or loaded: see `model_of` for a network in memory.
        method: a name from `wsi_gradcam.cam.facts`, or several.
        target: what is explained: a class, or "predicted".
        groups: what each patch comes from, such as its slide [N]; patches of one are alike, and statements are about
            groups where there are 6 or more. None: each patch for itself.
        annotated: where the target's class is on each patch, bool [N, side, side], for plausibility.
        regions: masks [N, side, side] of what should not decide, by name.
        glass: RGB of bare glass.
        mpp: micrometres per pixel, where the model does not say it: ink and blur are judged by it.
        layer: the layer to explain.
        only: the questions to ask, see `wsi_gradcam.audit.vocabulary.QUESTIONS`.
        seed: of all random numbers.
        trust_code: allow the code in the model, and in a target that is a function, to run; see `load_model`.
        report: a file for the report, one page of HTML.

    Raises:
        ConfigError: arguments that do not fit together.
        ModelError: patches that the model does not take, or a model that cannot be explained.
        TargetError: a target that the model does not have.
    """
    loaded = model if isinstance(model, Model) else load_model(_named(model), device, trust_code=trust_code)
    loaded = replace(loaded, spec=loaded.spec.trusting(trust_code))
    _check(rgb, loaded, groups, annotated, regions or {}, target)
    settings = AuditSettings(len(rgb), seed, _ordered(only))
    plan = _planned(loaded, method, target, layer, mpp, settings, _names(rgb, groups))
    subject = subject_of(plan, loaded)
    batches: list[tuple[str, Arrays]] = []
    for name, sample in plan.samples.items():
        for number in range(sample.batches):
            patches = sample.patches[sample.batch(number)]
            data = _data(rgb, patches, annotated, regions or {}, glass, patch_seeds(seed, "", patches))
            batches.append((name, measure_patches(plan, subject, data, name, number)))
    first, arrays = batches[0]
    found = joined(batches, seed)
    metrics = metrics_of(found, plan, ArchiveFacts(len(plan.samples), len(rgb)))
    if report is not None:
        Path(report).write_bytes(_page(metrics, plan, found, arrays, first))
    return metrics


def _named(model: str | PathLike[str] | ModelSpec) -> str | ModelSpec:
    return fspath(model) if isinstance(model, str | PathLike) else model


def _ordered(only: Sequence[str]) -> tuple[str, ...]:
    return tuple(only) if set(only) - set(QUESTIONS) else tuple(name for name in QUESTIONS if name in only)


def _check(
    rgb: NDArray[np.uint8],
    model: Model,
    groups: Sequence[str] | None,
    annotated: Masks | None,
    regions: Mapping[str, Masks],
    target: str,
) -> None:
    wanted = (*model.patch_px, 3)
    if rgb.ndim != 4 or rgb.shape[1:] != wanted or rgb.dtype != np.uint8 or not len(rgb):
        raise ConfigError(
            f"patches are {rgb.dtype} {rgb.shape}, expected uint8 {('N', *wanted)}, as {model.name} reads them"
        )
    if groups is not None and len(groups) != len(rgb):
        raise ConfigError(f"{len(groups)} groups of {len(rgb)} patches; expected one for each")
    masks = {**regions, **({} if annotated is None else {"annotated": annotated})}
    for name, mask in masks.items():
        if mask.ndim != 3 or len(mask) != len(rgb) or mask.dtype != np.bool_:
            raise ConfigError(f"{name}: {mask.dtype} {mask.shape}, expected a bool mask for each of {len(rgb)} patches")
    if annotated is not None and target == PREDICTED:
        raise ConfigError("annotated shows one class; say which with target")


def _names(rgb: NDArray[np.uint8], groups: Sequence[str] | None) -> list[str]:
    return ["patches"] * len(rgb) if groups is None else [str(name) for name in groups]


def _planned(
    model: Model,
    method: str | Sequence[str],
    target: str,
    layer: str | None,
    mpp: float | None,
    audit: AuditSettings,
    names: Sequence[str],
) -> AuditPlan:
    settings = make_settings(
        method=method if isinstance(method, str) else list(method),
        target=[target],
        layer=layer,
        patch_mpp=mpp,
        engine="eager",
        precision="float32",
        batch_size=BATCH_SIZE,
    )
    check_methods(settings.method)
    facts = examine(model, Request(settings.layer, settings.method, batch_size=BATCH_SIZE)).facts
    run = plan_run(LocalPath(Path()), model.spec, facts, settings)
    samples = {}
    for name in sorted(set(names)):
        rows = np.flatnonzero(np.array(names, object) == name)
        rows = np.random.default_rng(audit.seed).permutation(rows)
        patches = tuple(rows.tolist())
        samples[name] = SlideSample(
            patches, ((0, 0),) * len(patches), (1.0,) * len(patches), ("given",) * len(patches), 0
        )
    return AuditPlan(
        run=run,
        run_digest="",
        settings=audit,
        target=run.targets[0],
        samples=with_depth(samples, audit),
        annotation_digests={},
        region_digests={},
    )


def _data(
    rgb: NDArray[np.uint8],
    patches: Sequence[int],
    annotated: Masks | None,
    regions: Mapping[str, Masks],
    glass: tuple[int, int, int],
    seeds: Sequence[int],
) -> PatchData:
    """Return a batch, filled up with its last patch."""
    rows = np.array([*patches, *[patches[-1]] * (BATCH_SIZE - len(patches))], np.int64)
    return PatchData(
        count=len(patches),
        number=rows,
        seeds=(*seeds, *[seeds[-1]] * (BATCH_SIZE - len(patches))),
        readable=np.ones(BATCH_SIZE, np.bool_),
        raw=rgb[rows],
        rgb=rgb[rows],
        wide=None,
        stored=None,
        probability=None,
        annotated=None if annotated is None else annotated[rows],
        regions={name: masks[rows] for name, masks in regions.items()},
        background=glass,
        slide_relevance={},
    )


def _page(metrics: Metrics, plan: AuditPlan, found: Measurements, first: Arrays, name: str) -> bytes:
    method = plan.run.settings.method[0]
    factor = next(shown.factor for shown in plan.run.maps if shown.method == method)
    examples = examples_of(first, name, method, factor, plan.run.facts.classes)
    return archive_page(metrics, [], examples, scale_of(found.patches.maps[method]) * factor)
