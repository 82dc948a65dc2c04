"""The plan of a run and of its slides, and what they will cost. Nothing is written here."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

from wsi_gradcam.cam.facts import EXACT, METHOD_INFO, MethodInfo
from wsi_gradcam.cam.targets import Target, check_trusted, function_digest, parse_targets
from wsi_gradcam.errors import ConfigError, ModelError, MppError, did_you_mean
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.mil.spec import BAG_METHODS, CHAINED, SlideModelSpec, encoder_of
from wsi_gradcam.results.channels import RELEVANCE
from wsi_gradcam.results.heatmap import SHARD
from wsi_gradcam.results.manifest import SlidePlan
from wsi_gradcam.results.stitch import Enlarger
from wsi_gradcam.run.examining import fit_stain
from wsi_gradcam.slides.openslide_tiles import judged_by_openslide_alone
from wsi_gradcam.tissue.annotations import in_frame, tissue_within
from wsi_gradcam.tissue.grid import Patches, choose_patches, patch_grid
from wsi_gradcam.tissue.masks import TISSUE_RULE, slide_masks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.slides import Slide, SlideInfo
    from wsi_gradcam.tissue.annotations import Regions

LOG = logging.getLogger("wsi_gradcam")

FORMAT = 4  # of everything below OUT; raised when old results must not be continued
MIB = 1 << 20


@dataclass(frozen=True)
class Map:
    """An explanation of a run: a channel of the heatmap, a row of the patch store's maps.

    Attributes:
        factor: from the raw map to what the heatmap shows, see `MethodInfo.scale`.
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
    """The plan of a run: all that is the same for all slides. Small and picklable: workers get it once.

    Attributes:
        out: where the results lie.
        spec: the model's specification; workers load the model from it.
        facts: what was found of the model.
        settings: how slides are explained.
        targets: what is explained.
    """

    out: StoragePath
    spec: ModelSpec | SlideModelSpec
    facts: ModelFacts
    settings: Settings
    targets: tuple[Target, ...]

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
        """The explanations of a patch: each method, of each target."""
        cells = self.facts.cam_shape[0] * self.facts.cam_shape[1]
        return tuple(
            Map(method, target, cells if METHOD_INFO[method].scale == "cells" else 1)
            for method in self.settings.method
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
    def bag_channels(self) -> tuple[str, ...]:
        """Labels of the heatmap's channels that a slide-level model adds: the relevance of patches, and attention."""
        if self.facts.bag is None:
            return ()
        return (*(f"{RELEVANCE}: {target.label}" for target in self.targets), *self.facts.bag.attention)

    def identity(self) -> dict[str, Any]:
        """Return all that results depend on besides the slide, as plain values."""
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
        return {"format": FORMAT, "model": self.facts.digest, "settings": settings}

    def digest(self) -> str:
        """Return the sha256 of `identity()`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def plan_run(out: StoragePathLike, spec: ModelSpec | SlideModelSpec, facts: ModelFacts, settings: Settings) -> RunPlan:
    """Return the run's plan, checked as far as is possible without a slide.

    Raises:
        TargetError: a target the model does not have, or a function that is not allowed to run.
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
            f"{facts.name}: the micrometres per pixel the model was trained at are not known; add 'mpp: 0.5' to the "
            "model file or give --patch-mpp"
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
    for method in methods:
        if method not in METHOD_INFO:
            raise ConfigError(f"method {method!r} is not known; expected one of {', '.join(METHOD_INFO)}")


def check_bag_methods(settings: Settings) -> None:
    """Raise ConfigError for methods that are none of a slide-level model, or that cannot lead down to pixels."""
    first, *others = settings.bag_method
    if first not in CHAINED:
        raise ConfigError(
            f"bag_method {first!r} comes first, but only {', '.join(CHAINED)} lead on to pixels; name one of them "
            f"before it: --bag-method {CHAINED[0]},{first}"
        )
    for name in others:
        if name not in BAG_METHODS:
            near = did_you_mean(name, BAG_METHODS)
            raise ConfigError(
                f"bag_method {name!r} is not known; expected {', '.join(BAG_METHODS)}{near and f'; {near}'}"
            )
    if "finercam" in settings.method:
        raise ConfigError("finercam compares classes of a patch, which slide-level models do not have; use gradcam")


def plan_slide(
    slide: Slide, run: RunPlan, regions: Regions | None = None
) -> tuple[SlidePlan, Patches, NDArray[np.bool_]]:
    """Return the plan of an open slide, its patches and its tissue mask.

    Reads a thumbnail, and some tissue for its stain.

    Raises:
        MppError: the slide's mpp is not known.
        SlideReadError: the thumbnail cannot be read.
        AnnotationError: the regions cannot be understood, or lie where no tissue is.
        StainError: its stain cannot be measured, and the model asks for that.
        ConfigError: patches smaller than a heatmap pixel.
        MppError: the slide is far too coarse for the model.
    """
    settings, info = run.settings, slide.info
    slide_px = (info.height, info.width)
    grid = patch_grid(slide_px, info.mpp_yx, run.patch_px, run.mpp, settings.stride(run.patch_px))
    scale = grid.footprint[0] / run.patch_px[0], grid.footprint[1] / run.patch_px[1]
    y, x, height, width = run.facts.view
    view = (y * scale[0], x * scale[1], height * scale[0], width * scale[1])
    notes = _enlarging(info, run.mpp, settings.allow_upsampling)
    if judged_by_openslide_alone(info):
        notes.append("its tiles are judged by OpenSlide alone, which shows some that are damaged")
    Enlarger(view[2:], run.facts.cam_shape, settings.heatmap_stride)  # refuses what cannot be drawn
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
    block_px = SHARD * settings.heatmap_stride
    patches = choose_patches(grid, mask, settings.min_tissue, block_px, masks.pen, masks.glass)
    target = run.facts.stain
    plan = SlidePlan(
        slide_digest=info.digest,
        run_digest=run.digest(),
        slide_px=slide_px,
        slide_mpp=info.mpp_yx,
        footprint=grid.footprint,
        view=view,
        patches=len(patches.yx),
        span=settings.span_patches,
        stride=settings.heatmap_stride,
        mask_digest=regions.digest if regions else "",
        bounds=bounds,
        mask_frame=frame,
        notes=tuple(notes),
        stain=fit_stain(slide, masks.tissue, run.mpp, target) if target is not None and len(patches.yx) else None,
        tissue_rule=TISSUE_RULE,
    )
    return plan, patches, mask


# Of a slide's pixels for the model: enlarged more, it is told; more still, the model would see blur for tissue.
ENLARGED, MOST_ENLARGED = 1.5, 4.0


def _enlarging(info: SlideInfo, mpp: float, allowed: bool) -> list[str]:
    """Return a note on a slide that is coarser than the model needs.

    Raises:
        MppError: it is far too coarse, and that is not allowed.
    """
    factor = max(info.mpp_yx) / mpp
    if factor <= ENLARGED:
        return []
    told = f"its finest level has {max(info.mpp_yx):g} um/px, the model needs {mpp:g}: enlarged {factor:.3g} times"
    if factor > MOST_ENLARGED and not allowed:
        raise MppError(
            f"{info.path}: too coarse for the model: {told}, expected up to {MOST_ENLARGED:g}; give a finer scan, "
            "--mpp with --replace-mpp if the file's is wrong, or --allow-upsampling"
        )
    return [told]


@dataclass(frozen=True)
class Pace:
    """The time that a run will take: the patches that are left, how many a second, and what that rests on."""

    patches: int
    patches_per_s: float
    basis: str

    @property
    def seconds(self) -> float:
        """The time that is left, in seconds."""
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

    700 MiB are Python, torch and timm as measured on a CPU; a block's stitching holds five arrays of a shard;
    a batch's largest layer is held twice, and a copy of the pixels.
    """
    batch = run.facts.batch_size
    pixels = 3 * 4 * run.patch_px[0] * run.patch_px[1]
    forward = batch * (2 * run.facts.activation_bytes + 3 * pixels)
    stitching = 5 * 4 * SHARD * SHARD
    return 700 * MIB + 4 * run.facts.parameters + max(forward, stitching)
