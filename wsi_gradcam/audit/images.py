"""`audit_images` and `audit_bags`: the audit's questions about data in memory, without slides or a run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.audit.archive import whole_slide, with_depth
from wsi_gradcam.audit.batch import PatchData, SlideBag, given_name, subject_of
from wsi_gradcam.audit.measurements import joined
from wsi_gradcam.audit.measures.bags import BagSubject
from wsi_gradcam.audit.metrics import ArchiveFacts, metrics_of
from wsi_gradcam.audit.plan import BATCH_SIZE, AuditPlan, AuditSettings, SlideSample, asked_questions, patch_seeds
from wsi_gradcam.audit.report.figures import examples_of, scale_of
from wsi_gradcam.audit.report.page import archive_page
from wsi_gradcam.audit.schema import ATTENTION, INTEGRATED, QUESTIONS, SINGLE
from wsi_gradcam.audit.stages import measure_bag, measure_patches
from wsi_gradcam.cam.explainer import Request, examine
from wsi_gradcam.cam.facts import BagFacts, Choice, ModelFacts
from wsi_gradcam.cam.targets import PREDICTED, parse_targets
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.mil.aggregators import load_aggregator
from wsi_gradcam.mil.networks import opaque
from wsi_gradcam.mil.spec import AggregatorSpec, SlideModelSpec, read_slide_model
from wsi_gradcam.models.load import Model, load_model
from wsi_gradcam.run.plan import RunPlan, check_methods, plan_run
from wsi_gradcam.run.settings import make_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.plan import Arrays
    from wsi_gradcam.audit.schema import Metrics
    from wsi_gradcam.mil.networks import Aggregator
    from wsi_gradcam.mil.spec import SlideActivation
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

    Anything that needs a slide is left out: the control by neighbouring probabilities, a shift of the grid, and slides'
    scores.

    Args:
        model: as for `explain`, or loaded: see `model_of` for a network in memory.
        method: a name from `wsi_gradcam.cam.facts`, or several.
        target: what is explained: a class, or "predicted".
        groups: the origin of each patch, such as its slide [N]; patches of one group are similar, and statements are
            about groups if there are 6 or more. None: each patch is independent.
        annotated: where each patch shows the target's class, bool [N, side, side], for plausibility.
        regions: masks [N, side, side] of what should not affect the answer, by name.
        glass: RGB of bare glass.
        mpp: micrometres per pixel, if the model does not state it; used to detect ink and blur.
        layer: the layer to explain.
        only: the questions to ask, see `wsi_gradcam.audit.schema.QUESTIONS`.
        seed: of all random numbers.
        trust_code: allow the code in the model, and in a target that is a function, to run; see `load_model`.
        report: a file for the report, one page of HTML.

    Raises:
        ConfigError: arguments that do not fit together.
        ModelError: patches that the model does not accept, or a model that cannot be explained.
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
            data = _data(rgb, patches, annotated, regions or {}, glass, patch_seeds(seed, "", patches), target)
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
        raise ConfigError("`annotated` shows one class; give it as `target`")


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
    label: str,
) -> PatchData:
    """Return a batch of patches for target `label`, padded with its last patch."""
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
        classes={} if annotated is None else {label: annotated[rows]},
    )


def _page(metrics: Metrics, plan: AuditPlan, found: Measurements, first: Arrays, name: str) -> bytes:
    method = plan.run.settings.method[0]
    factor = next(shown.factor for shown in plan.run.maps if shown.method == method)
    examples = examples_of(first, name, method, factor, plan.run.facts.classes)
    return archive_page(metrics, [], examples, scale_of(found.patches.maps[method]) * factor)


def audit_bags(
    features: Mapping[str, NDArray[np.floating]] | Sequence[NDArray[np.floating]],
    model: str | PathLike[str] | SlideModelSpec | nn.Module,
    *,
    method: str | Sequence[str] = "",
    target: str = PREDICTED,
    classes: Sequence[str] | None = None,
    activation: SlideActivation = "softmax",
    places: Mapping[str, NDArray[np.floating]] | None = None,
    annotated: Mapping[str, NDArray[np.floating]] | None = None,
    regions: Mapping[str, Mapping[str, Masks]] | None = None,
    only: Sequence[str] = (),
    seed: int = 0,
    trust_code: bool = False,
    report: str | PathLike[str] | None = None,
) -> Metrics:
    """Audit a slide-level model on bags of feature vectors [N, D], one per slide, like `audit_run` does with slides.

    Args:
        features: by the slide's name, or in a list.
        model: the file of a slide-level model, of which only the aggregator is used, or a `torch.nn.Module` from [N, D]
            to logits, or an `Aggregator` of `wsi_gradcam.mil.networks`.
        method: bag methods, including `single` and `attention`; by default integrated_gradients, single, and attention
            if there is one.
        target: what is explained: a class, or "predicted".
        classes: of a module; a model file has its own.
        activation: of a module; a model file has its own.
        places: positions of the patches, [N, 2] in units of their side, by slide: with these, areas elsewhere are as
            compact as regions.
        annotated: share of each patch that shows the target's class, [N], by slide.
        regions: which patches show what should not affect the answer, bool [N], by name and slide.
        only: the questions to ask, see `wsi_gradcam.audit.schema.BAG_QUESTIONS`; all if none are given.
        seed: of all random numbers.
        trust_code: allow the code in the model to run.
        report: a file for the report, one page of HTML.

    Raises:
        ConfigError: arguments that do not fit together.
        ModelError: features that the model does not accept.
        TargetError: a target that the model does not have.
    """
    bags = dict(features) if isinstance(features, Mapping) else {f"bag {i}": one for i, one in enumerate(features)}
    if not bags:
        raise ConfigError("no features; give a bag for each slide")
    for name, parts in (("places", places or {}), ("annotated", annotated or {}), *(regions or {}).items()):
        _check_bags(name, parts, bags)
    width = next(iter(bags.values())).shape[-1]
    network, spec, names = _aggregator(model, width, classes, activation, trust_code)
    attended = ATTENTION if network.attention_is is not None else ""
    methods = (method,) if isinstance(method, str) else tuple(method)
    methods = tuple(filter(None, methods)) or (INTEGRATED, SINGLE, *filter(None, [attended]))
    samples = {name: whole_slide("given") for name in bags}
    plan = AuditPlan(
        run=_bag_run(spec, network, names, target, attended),
        run_digest="",
        settings=AuditSettings(len(bags), seed, asked_questions(only, "slide"), slides=len(bags)),
        target=parse_targets([target], names)[0],
        samples=samples,
        annotation_digests={},
        region_digests={},
        unit="slide",
        bag_methods=methods,
    )
    measured = []
    for name, one in bags.items():
        subject = BagSubject.of(network, one, plan.target, spec.activation)
        suspects = {given_name(key): masks[name] for key, masks in (regions or {}).items() if name in masks}
        bag = SlideBag(
            subject,
            subject.relevance(methods),
            None if places is None or name not in places else np.asarray(places[name], np.float64),
            {key: mask for key, mask in suspects.items() if mask.any()},
            None if annotated is None or name not in annotated else np.asarray(annotated[name], np.float64),
            patch_seeds(seed, name, [0])[0],
            seed,
        )
        measured.append((name, measure_bag(plan, bag)))
    metrics = metrics_of(joined(measured, seed), plan, ArchiveFacts(len(bags), sum(map(len, bags.values()))))
    if report is not None:
        Path(report).write_bytes(archive_page(metrics, [], [], 1.0))
    return metrics


def _check_bags(name: str, parts: Mapping[str, NDArray[Any]], bags: Mapping[str, NDArray[np.floating]]) -> None:
    for slide, values in parts.items():
        if slide not in bags or len(values) != len(bags[slide]):
            raise ConfigError(f"{name} of {slide!r}: expected one of each patch of one of the bags")


def _aggregator(
    model: str | PathLike[str] | SlideModelSpec | nn.Module,
    width: int,
    classes: Sequence[str] | None,
    activation: SlideActivation,
    trust_code: bool,
) -> tuple[Aggregator, SlideModelSpec, tuple[str, ...]]:
    """Return a network in double precision, its specification and the names of its classes."""
    if isinstance(model, str | PathLike):
        model = read_slide_model(fspath(model))
    if isinstance(model, SlideModelSpec):
        loaded = load_aggregator(model.trusting(trust_code))
        return loaded.network.double(), model, loaded.classes
    network = opaque(copy.deepcopy(model), type(model).__name__, width, None).double().eval()
    names = tuple(classes) if classes is not None else tuple(str(k) for k in range(network.class_count))
    if len(names) != network.class_count:
        raise ConfigError(f"{len(names)} classes are named, but the model gives {network.class_count} logits")
    part = AggregatorSpec(source="module:function")
    return network, SlideModelSpec(name=type(model).__name__, aggregator=part, activation=activation), names


def _bag_run(
    spec: SlideModelSpec, network: Aggregator, classes: tuple[str, ...], target: str, attended: str
) -> RunPlan:
    """Return a plan that says what was audited, even though there was no run."""
    facts = ModelFacts(
        name=spec.name,
        source=spec.aggregator.source,
        digest="",
        license=spec.license,
        classes=classes,
        activation=spec.activation,
        patch_px=(1, 1),
        view=(0.0, 0.0, 1.0, 1.0),
        mpp=None,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        layers=(),
        traced=False,
        cam_shape=(1, 1),
        parameters=sum(each.numel() for each in network.parameters()),
        activation_bytes=0,
        batch_size=1,
        choice=Choice("eager", "float32"),
        bag=BagFacts("", network.feature_dim, (attended,) if attended else ()),
    )
    return RunPlan(LocalPath(Path()), spec, facts, make_settings(target=[target]), parse_targets([target], classes))
