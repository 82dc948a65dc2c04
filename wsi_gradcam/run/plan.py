"""The plan of a run and of its slides, and their estimated cost. Nothing is written here."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.cam.facts import EXACT, METHOD_INFO, NO_METHOD, MethodInfo
from wsi_gradcam.cam.targets import Target, check_trusted, function_digest, parse_targets
from wsi_gradcam.errors import ConfigError, FeatureError, ModelError, MppError, did_you_mean
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.mil.feature_files import open_features
from wsi_gradcam.mil.features import FeatureBag, SlideFrame, check_on_tissue
from wsi_gradcam.mil.spec import (
    BAG_METHODS,
    CHAINED,
    SlideModelSpec,
    encoder_of,
    refuse_large_bag,
    whole_bag_bytes,
)
from wsi_gradcam.results.display import RELEVANCE
from wsi_gradcam.results.heatmap import SHARD, Enlarger
from wsi_gradcam.results.manifest import SlidePlan
from wsi_gradcam.run.examining import fit_stain
from wsi_gradcam.slides.openslide_tiles import judged_by_openslide_alone
from wsi_gradcam.tissue import Patches, choose_patches, patch_grid, patches_at
from wsi_gradcam.tissue.annotations import in_frame, tissue_within
from wsi_gradcam.tissue.masks import TISSUE_RULE, slide_masks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.mil.feature_arrays import FeatureFolder
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.slides import Slide, SlideInfo
    from wsi_gradcam.tissue.annotations import Regions
    from wsi_gradcam.tissue.stain import StainFit

LOG = logging.getLogger("wsi_gradcam")

# The settings in an identity that do not affect the features of patches.
AFTER_FEATURES = {"method", "target", "window", "bag_method", "bag_channels", "baseline", "given_features"}
FORMAT = 4  # format of everything below OUT; raised when old results must not be continued
MIB = 1 << 20


@dataclass(frozen=True)
class Map:
    """One of a run's explanations: a channel of the heatmap, and a row of the patch store's maps.

    Attributes:
        factor: factor from the raw map to the heatmap, see `MethodInfo.scale`.
    """

    method: str
    target: Target
    factor: int

    @property
    def label(self) -> str:
        """The name of the heatmap's channel."""
        return f"{self.method}: {self.target.label}"

    @property
    def info(self) -> MethodInfo:
        """The facts about the method."""
        return METHOD_INFO[self.method]


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run: everything that is the same for all slides. Small and picklable: workers get it once.

    Attributes:
        out: where the results are.
        spec: the model's specification; workers load the model from it.
        facts: the facts about the model.
        settings: how slides are explained.
        targets: what is explained.
        baseline: the feature vector at which Integrated Gradients of a slide-level model begin; () for zero.
    """

    out: StoragePath
    spec: ModelSpec | SlideModelSpec
    facts: ModelFacts
    settings: Settings
    targets: tuple[Target, ...]
    baseline: tuple[float, ...] = ()

    @property
    def patch_px(self) -> tuple[int, int]:
        """(height, width) of the model's input."""
        return self.facts.patch_px

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of a patch."""
        mpp = self.settings.patch_mpp or self.facts.mpp
        assert mpp is not None  # checked by plan_run
        return mpp

    @property
    def maps(self) -> tuple[Map, ...]:
        """The explanations of a patch: each method for each target."""
        cells = self.facts.cam_shape[0] * self.facts.cam_shape[1]
        return tuple(
            Map(method, target, cells if METHOD_INFO[method].scale == "cells" else 1)
            for method in self.settings.methods
            for target in self.targets
        )

    @property
    def probabilities(self) -> tuple[Target, ...]:
        """The targets that have a probability, which is a channel too."""
        return tuple(target for target in self.targets if target.is_class)

    @property
    def slide_model(self) -> SlideModelSpec:
        """The specification of a run's slide-level model."""
        assert isinstance(self.spec, SlideModelSpec)
        return self.spec

    @property
    def encoder(self) -> ModelSpec:
        """The specification of the network that sees patches: the model, or the encoder of a slide-level one."""
        return encoder_of(self.spec) if isinstance(self.spec, SlideModelSpec) else self.spec

    @property
    def sees_pixels(self) -> bool:
        """True if the model's network is shown patches: False where features are given and no pixel is explained."""
        return bool(self.settings.methods) or self.settings.features is None

    @property
    def only_encodes(self) -> bool:
        """True if only features are computed, so that there is no answer."""
        return self.facts.bag is not None and not self.facts.classes

    @property
    def bag_channels(self) -> tuple[str, ...]:
        """Labels of the heatmap's channels that a slide-level model adds: the relevance of patches, and attention."""
        if self.facts.bag is None:
            return ()
        return (*(f"{RELEVANCE}: {target.label}" for target in self.targets), *self.facts.bag.attention)

    def identity(self) -> dict[str, Any]:
        """Return everything that results depend on besides the slide, as plain values."""
        settings = self.settings.identity()
        settings.update(
            layer=self.facts.layer,
            target=[asdict(t) for t in self.targets],
            engine=self.facts.choice.engine,
            precision=self.facts.choice.precision,
            batch_size=self.facts.batch_size,
        )
        if self.facts.choice.decode != EXACT:  # not in runs of older versions
            settings["decode"] = self.facts.choice.decode
        if self.facts.bag is not None:
            settings["bag_method"] = list(self.settings.bag_method)
            settings["feature_precision"] = self.settings.feature_precision
            settings["bag_channels"] = list(self.bag_channels)
            settings |= self._given()
        return {"format": FORMAT, "model": self.facts.digest, "settings": settings}

    def _given(self) -> dict[str, Any]:
        """Return what runs on given features, and runs with a baseline other than zero, depend on."""
        found: dict[str, Any] = {"given_features": True} if self.settings.features is not None else {}
        if self.baseline:
            found["baseline"] = hashlib.sha256(repr(self.baseline).encode()).hexdigest()
        return found

    def encoding(self) -> str:
        """Return the sha256 of everything that features depend on besides the slide; "" without features."""
        if self.facts.bag is None:
            return ""
        kept = {name: value for name, value in self.identity()["settings"].items() if name not in AFTER_FEATURES}
        kept |= {"encoder": self.facts.bag.encoder, "patch_px": self.patch_px, "mpp": self.mpp}
        kept["stain"] = None if self.facts.stain is None else self.facts.stain.to_json()
        return hashlib.sha256(json.dumps({"format": FORMAT, **kept}, sort_keys=True).encode()).hexdigest()

    def digest(self) -> str:
        """Return the sha256 of `identity()`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def plan_run(out: StoragePathLike, spec: ModelSpec | SlideModelSpec, facts: ModelFacts, settings: Settings) -> RunPlan:
    """Return the run's plan, checked as far as is possible without a slide.

    Raises:
        TargetError: a target that the model does not have, or a function that is not allowed to run.
        ConfigError: an unknown method, a stride larger than the patch.
        ModelError: the model's mpp is not known.
    """
    check_methods(settings.method)
    if facts.bag is not None:
        check_bag_methods(settings)
    if settings.span_patches % facts.batch_size:
        raise ConfigError(
            f"span_patches is {settings.span_patches}, expected a multiple of the batch size {facts.batch_size}, so "
            "that batches are cut the same way everywhere"
        )
    if facts.mpp is None and settings.patch_mpp is None:
        raise ModelError(
            f"{facts.name}: the micrometres per pixel that the model was trained at are not known; give them, for "
            "example with --patch-mpp 0.5, or as 'mpp: 0.5' in the model file"
        )
    parsed = parse_targets(settings.target, facts.classes)
    check_trusted(parsed, spec.trusted)
    targets = tuple(
        target if target.function is None else replace(target, digest=function_digest(target.function))
        for target in parsed
    )
    return RunPlan(storage_path(out), spec, facts, settings, targets)


def check_methods(methods: Sequence[str]) -> None:
    """Raise ConfigError for a method that is not known."""
    if NO_METHOD in methods and len(methods) > 1:
        raise ConfigError(f"method is {', '.join(methods)}: {NO_METHOD} stands alone")
    for method in () if tuple(methods) == (NO_METHOD,) else methods:
        if method not in METHOD_INFO:
            near = did_you_mean(method, METHOD_INFO)
            expected = f"expected one of {', '.join(METHOD_INFO)}{f'; {near}' if near else ''}"
            raise ConfigError(f"method {method!r} is not known; {expected}")


def check_features(settings: Settings, is_slide_level: bool) -> None:
    """Raise ConfigError for settings that do not apply to given features, and for flags of features without any."""
    names = [name for name in type(settings).model_fields if name.startswith("feature_")]
    given = [name for name in names if name != "feature_precision" and getattr(settings, name) is not None]
    if settings.features is None and given:
        raise ConfigError(f"{given[0]} is given without features; give their folder with --features")
    chosen = {"mask": settings.mask, "overlap": settings.overlap, "stride_px": settings.stride_px}
    refused = [name for name, value in chosen.items() if value]
    if settings.features is not None and refused:
        raise ConfigError(f"features determine the patches; leave out {' and '.join(refused)}")
    if not is_slide_level and settings.features is not None:
        raise ConfigError(
            "features are only for slide-level models, whose file has an 'aggregator:'; leave out --features"
        )
    if not is_slide_level and not settings.methods:
        raise ConfigError(f"method {NO_METHOD}: is only for slide-level models; choose a method such as gradcam")


def check_bag_methods(settings: Settings) -> None:
    """Raise ConfigError for unknown bag methods, or a first one that cannot be continued to pixels."""
    first, *others = settings.bag_method
    if first not in CHAINED:
        raise ConfigError(
            f"bag_method {first!r} comes first, but only {', '.join(CHAINED)} can be continued to pixels; put one of "
            f"them first: --bag-method {CHAINED[0]},{first}"
        )
    for name in others:
        if name not in BAG_METHODS:
            near = did_you_mean(name, BAG_METHODS)
            raise ConfigError(
                f"bag_method {name!r} is not known; expected {', '.join(BAG_METHODS)}{near and f'; {near}'}"
            )
    if "finercam" in settings.method:
        raise ConfigError("finercam compares a patch's classes, which slide-level models do not have; use gradcam")


def plan_slide(
    slide: Slide, run: RunPlan, regions: Regions | None = None, given: FeatureBag | None = None
) -> tuple[SlidePlan, Patches, NDArray[np.bool_]]:
    """Return the plan of an open slide, its patches and its tissue mask; patches are those of `given` features.

    It reads a thumbnail, and some tissue for its stain.

    Raises:
        MppError: the slide's mpp is not known.
        SlideReadError: the thumbnail cannot be read.
        AnnotationError: the regions cannot be read, or there is no tissue in them.
        StainError: its stain cannot be measured, and the model asks for that.
        ConfigError: patches smaller than a heatmap pixel.
        FeatureError: the given features are those of patches that the encoder does not see, or of glass.
        ModelError: the aggregator sees all patches at once, and they need more memory than there is.
        MppError: the slide is far too coarse for the model.
    """
    settings, info = run.settings, slide.info
    slide_px = (info.height, info.width)
    grid = patch_grid(slide_px, info.mpp_yx, run.patch_px, run.mpp, settings.stride(run.patch_px))
    footprint, notes = (grid.footprint, []) if given is None else _given_patches(given, run, info)
    scale = footprint[0] / run.patch_px[0], footprint[1] / run.patch_px[1]
    y, x, height, width = run.facts.view
    view = (y * scale[0], x * scale[1], height * scale[0], width * scale[1])
    notes += _enlarging(info, run.mpp, settings.allow_upsampling) if run.sees_pixels else []
    if judged_by_openslide_alone(info):
        notes.append("its tiles are checked only by OpenSlide, which shows some damaged ones")
    Enlarger(view[2:], run.facts.cam_shape, settings.heatmap_stride)  # refuses outlines that cannot be drawn
    if given is not None and len(given):
        Enlarger((float(given.boxes[:, 2].min()), float(given.boxes[:, 3].min())), (1, 1), settings.heatmap_stride)
    masks = slide_masks(slide)
    mask = masks.selected(settings.tissue)
    if regions is not None:
        regions = in_frame(regions, masks.tissue, info, settings.mask_frame)
        mask = tissue_within(regions, mask, info)
    bounds = () if info.bounds in (None, Region(0, 0, *slide_px)) else astuple(info.bounds)
    frame = "" if regions is None or not bounds else "bounds" if regions.part else "slide"
    if frame and settings.mask_frame == "auto":
        notes.append(f"the mask is taken as drawn on the {'scanned part' if frame == 'bounds' else 'whole slide'}")
    for note in notes:
        LOG.warning("%s: %s", info.path, note)
    if given is None:
        block_px = SHARD * settings.heatmap_stride
        patches = choose_patches(grid, mask, settings.min_tissue, block_px, masks.pen, masks.glass)
    else:
        patches = patches_at(given.boxes, slide_px, mask, masks.pen, masks.glass)
        if settings.feature_axes is None:
            check_on_tissue(given.source, given.boxes, info.path, slide_px, masks.tissue)
    _check_bag(run, info.path, len(patches.yx))
    plan = SlidePlan(
        slide_digest=info.digest,
        run_digest=run.digest(),
        slide_px=slide_px,
        slide_mpp=info.mpp_yx,
        footprint=footprint,
        view=view,
        patches=len(patches.yx),
        span=settings.span_patches,
        stride=settings.heatmap_stride,
        mask_digest=regions.digest if regions else "",
        bounds=bounds,
        mask_frame=frame,
        notes=tuple(notes),
        stain=_stain(slide, run, masks.tissue, len(patches.yx)),
        tissue_rule=TISSUE_RULE,
        features="" if given is None else given.digest,
    )
    return plan, patches, mask


def open_given(folder: FeatureFolder, slide_id: str, info: SlideInfo, run: RunPlan) -> FeatureBag:
    """Open the given features of a slide according to the run's settings; see `open_features`."""
    settings, bag = run.settings, run.facts.bag
    assert bag is not None
    return open_features(
        folder,
        SlideFrame.of(slide_id, info),
        patch_um=settings.feature_patch_um,
        unit=settings.feature_unit,
        axes=settings.feature_axes,
        name=settings.feature_name,
        dimensions=bag.feature_dim,
    )


def _check_bag(run: RunPlan, path: str, patches: int) -> None:
    """Refuse a slide with too many patches for an aggregator that sees all at once; see `refuse_large_bag`."""
    bag = run.facts.bag
    if bag is not None and bag.whole and patches:
        needed = whole_bag_bytes(bag.whole, patches, bag.feature_dim, len(run.targets))
        refuse_large_bag(patches, needed, run.settings.bag_method, f"{path}: ")


def _stain(slide: Slide, run: RunPlan, tissue: NDArray[np.bool_], patches: int) -> StainFit | None:
    """Return the transformation of a slide's stain to the model's, if the model asks for it and there are patches."""
    target = run.facts.stain
    return fit_stain(slide, tissue, run.mpp, target) if target is not None and patches else None


# Shares of a patch's side: the error from rounding, and from programs that know magnifications only by name.
SAME_SIDE, NEAR_SIDE = 0.02, 0.15


def _given_patches(given: FeatureBag, run: RunPlan, info: SlideInfo) -> tuple[tuple[float, float], list[str]]:
    """Return (height, width) in level-0 px of patches whose features were made elsewhere, and notes.

    If pixels are explained, this is what the encoder is shown, with square pixels.

    Raises:
        FeatureError: the encoder sees patches of another size or shape.
    """
    notes = list(given.notes)
    seen = tuple(px * run.mpp / mpp for px, mpp in zip(run.patch_px, info.mpp_yx, strict=True))
    if not len(given):
        return (seen[0], seen[1]), notes
    height, width = map(float, np.median(given.boxes[:, 2:], axis=0))
    if not run.sees_pixels:
        return (height, width), notes
    um = height * info.mpp_yx[0], width * info.mpp_yx[1]
    mend = f"give --patch-mpp if it was trained on these, or explain only down to patches with --method {NO_METHOD}"
    told = f"{given.source}: features of patches of {um[0]:.4g} x {um[1]:.4g} um"
    if float(np.abs(given.boxes[:, 2:] / (height, width) - 1).max()) > SAME_SIDE:
        raise FeatureError(
            f"{told} and of other sizes, but pixels can be explained only in patches of one size; {mend}"
        )
    mpp = math.sqrt(um[0] / run.patch_px[0] * um[1] / run.patch_px[1])
    shown = tuple(px * mpp / each for px, each in zip(run.patch_px, info.mpp_yx, strict=True))
    if max(abs(shown[0] / height - 1), abs(shown[1] / width - 1), abs(mpp / run.mpp - 1) - NEAR_SIDE) > SAME_SIDE:
        sees = " x ".join(f"{px * run.mpp:.4g}" for px in run.patch_px)
        raise FeatureError(f"{told}, but the encoder sees {sees} um ({run.patch_px[0]} px at {run.mpp:g}); {mend}")
    if abs(mpp / run.mpp - 1) > SAME_SIDE:
        notes.append(f"patches are read at the resolution of the features, {mpp:.4g} um/px, not at {run.mpp:g}")
    return (shown[0], shown[1]), notes


# Enlargement of a slide's pixels for the model: above the first it is reported; above the second, the model would see
# blur instead of tissue.
ENLARGED, MOST_ENLARGED = 1.5, 4.0


def _enlarging(info: SlideInfo, mpp: float, allowed: bool) -> list[str]:
    """Return a note on a slide that is coarser than the model needs.

    Raises:
        MppError: it is far too coarse, and that is not allowed.
    """
    factor = max(info.mpp_yx) / mpp
    if factor <= ENLARGED:
        return []
    told = f"its finest level has {max(info.mpp_yx):g} um/px, but the model needs {mpp:g}: enlarged {factor:.3g} times"
    if factor > MOST_ENLARGED and not allowed:
        raise MppError(
            f"{info.path}: too coarse for the model: {told}, expected at most {MOST_ENLARGED:g}; use a finer scan, "
            "--mpp with --replace-mpp if the file's mpp is wrong, or --allow-upsampling"
        )
    return [told]


@dataclass(frozen=True)
class Pace:
    """The time that a run will take: the remaining patches, the rate, and the basis of that estimate."""

    patches: int
    patches_per_s: float
    basis: str

    @property
    def seconds(self) -> float:
        """The remaining time, in seconds."""
        return self.patches / self.patches_per_s


@dataclass(frozen=True)
class Estimate:
    """The cost of a slide's plan: tasks, bytes on disk before compression, and memory of one process."""

    slide: SlideEntry
    patches: int
    spans: int
    blocks: int
    store_bytes: int
    memory_bytes: int


def estimate(entry: SlideEntry, plan: SlidePlan, run: RunPlan) -> Estimate:
    """Return the cost of a slide's plan."""
    maps, classes = len(run.maps), len(run.facts.classes)
    cells = run.facts.cam_shape[0] * run.facts.cam_shape[1]
    per_patch = 4 * (maps * cells + classes) + 8 + 4 * 4 + 1  # place, shares and blur, status
    covered_px = min(
        plan.heatmap_px[0] * plan.heatmap_px[1],
        plan.patches * plan.footprint[0] * plan.footprint[1] / plan.stride**2,
    )
    per_pixel = 4 * (maps + len(run.probabilities)) + 1  # channels, and the label
    heatmap = covered_px * per_pixel * 4 / 3
    return Estimate(
        slide=entry,
        patches=plan.patches,
        spans=len(plan.spans),
        blocks=sum(len(plan.blocks(level)) for level in range(len(plan.level_shapes))),
        store_bytes=round(plan.patches * per_patch + heatmap),
        memory_bytes=memory_estimate(run),
    )


def memory_estimate(run: RunPlan) -> int:
    """Return the estimated peak memory of one process, in bytes: it depends on batch and block, not on the slide.

    700 MiB are Python, torch and timm, as measured on a CPU; stitching a block holds five arrays of a shard; a batch
    holds its largest layer twice, and copies of the pixels.
    """
    batch = run.facts.batch_size
    pixels = 3 * 4 * run.patch_px[0] * run.patch_px[1]
    forward = batch * (2 * run.facts.activation_bytes + 3 * pixels)
    stitching = 5 * 4 * SHARD * SHARD
    return 700 * MIB + 4 * run.facts.parameters + max(forward, stitching)
