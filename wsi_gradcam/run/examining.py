"""Examines a model on a few patches before a run, and a slide's stain on some pixels of its tissue."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wsi_gradcam.cam.facts import EXACT, SCALED, BagFacts, Choice, ModelFacts, Trial
from wsi_gradcam.errors import ConfigError, ModelError, SlideReadError, device_errors, one_line
from wsi_gradcam.io.urls import allowing_for_run
from wsi_gradcam.mil.spec import SlideModelSpec, encoder_of
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.results.display import ATTENTION
from wsi_gradcam.slides import read_region, with_reductions
from wsi_gradcam.slides.patch_reader import open_entry
from wsi_gradcam.system.processes import limit_arenas, make_sums_deterministic
from wsi_gradcam.tissue import choose_patches, patch_grid
from wsi_gradcam.tissue.annotations import entry_regions, in_frame, tissue_within
from wsi_gradcam.tissue.masks import slide_masks
from wsi_gradcam.tissue.stain import StainFit, apply, fit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.cam.targets import Target
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.mil.aggregators import LoadedAggregator
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.tissue.stain import Stain

LOG = logging.getLogger("wsi_gradcam")

SLIDES_TRIED = 3
MAX_BATCH_BYTES = 16 << 30
BLOCK_PX = 1 << 15
LOOKED_AT_PX, LOOKED_AT_MPP = (256, 256), 0.5  # size of patches that no network sees, as viewers show them
RATED = 1024  # patches
# A slide's stain is measured on this many squares of its tissue, with this many pixels a side: on CMU-1, the stains are
# then within 1.5 degrees of those of all pixels; with 128 squares of 64 px, they were off by 4.
STAIN_PLACES, STAIN_PX = 512, 32


def fit_stain(slide: Slide, mask: NDArray[np.bool_], mpp: float, target: Stain) -> StainFit:
    """Return the transformation of the slide's stain to the target, measured on its tissue `mask` at `mpp`.

    Raises:
        StainError: its stain cannot be measured.
        SlideReadError: none of its tissue can be read.
    """
    return fit(sample_tissue(slide, mask, mpp), target, slide.info.path)


def sample_tissue(slide: Slide, mask: NDArray[np.bool_], mpp: float) -> NDArray[np.uint8]:
    """Return pixels at `mpp` around pixels of the mask, evenly over it: RGB uint8 [n, 3], at most half a million.

    Raises:
        SlideReadError: none of them can be read.
    """
    info = slide.info
    inside = np.flatnonzero(mask)
    inside = inside[np.unique(np.linspace(0, len(inside) - 1, min(STAIN_PLACES, len(inside))).astype(int))]
    rows, columns = np.divmod(inside, mask.shape[1])
    y = (rows + 0.5) * info.height / mask.shape[0] - STAIN_PX / 2 * mpp / info.mpp_yx[0]
    x = (columns + 0.5) * info.width / mask.shape[1] - STAIN_PX / 2 * mpp / info.mpp_yx[1]
    found = [np.zeros((0, 3), np.uint8)]
    failure: SlideReadError | None = None
    for top, left in zip(y.tolist(), x.tolist(), strict=True):
        try:
            found.append(read_region(slide, top, left, STAIN_PX, STAIN_PX, mpp).reshape(-1, 3))
        except SlideReadError as error:
            failure = error
    if failure is not None and len(found) == 1:
        raise failure
    return np.concatenate(found)


def sample_patches(
    slides: Sequence[SlideEntry],
    settings: Settings,
    patch_px: tuple[int, int],
    mpp: float,
    count: int,
    stain: Stain | None = None,
    scaled: bool = False,
) -> NDArray[np.uint8] | None:
    """Return up to `count` of the patches that a run explains, uint8 [n, H, W, 3], from the first readable slide.

    They are of tissue and inside the mask, according to the settings; normalised if `stain` is given; read with reduced
    decoding if `scaled`. They are the same for the same archive and settings. None if none of the first slides has a
    readable patch. What cannot be read is logged, and reported when the slide's turn comes.
    """
    for entry in slides[:SLIDES_TRIED]:
        try:
            patches = _of_slide(entry, settings, patch_px, mpp, count, stain, scaled)
        except Exception as error:  # decoders and annotations raise many kinds of errors for damaged files
            LOG.info("engines are not compared on %s: %s", entry.id, one_line(error))
            continue
        if len(patches):
            return patches
        LOG.info("engines are not compared on %s: it has no readable patch to explain", entry.id)
    return None


def _of_slide(
    entry: SlideEntry,
    settings: Settings,
    patch_px: tuple[int, int],
    mpp: float,
    count: int,
    stain: Stain | None,
    scaled: bool,
) -> NDArray[np.uint8]:
    slide = open_entry(entry, settings)
    try:
        info = slide.info
        grid = patch_grid((info.height, info.width), info.mpp_yx, patch_px, mpp, settings.stride(patch_px))
        masks = slide_masks(slide)
        mask = masks.selected(settings.tissue)
        regions = entry_regions(entry, settings)
        if regions is not None:
            mask = tissue_within(in_frame(regions, masks.tissue, info, settings.mask_frame), mask, info)
        places = choose_patches(grid, mask, settings.min_tissue, BLOCK_PX).yx
        places = places[np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int))]
        source = with_reductions(slide) if scaled else slide
        patches = _readable(source, places.tolist(), patch_px, mpp)
        if stain is None or not len(patches):
            return patches
        return apply(fit_stain(slide, masks.tissue, mpp, stain), patches)
    finally:
        slide.close()


def _readable(slide: Slide, places: list[list[int]], patch_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
    found = [np.zeros((0, *patch_px, 3), np.uint8)]
    for y, x in places:
        try:
            found.append(read_region(slide, y, x, *patch_px, mpp)[None])
        except SlideReadError as error:
            LOG.info("engines are compared on noise, without a patch: %s", one_line(error))
    return np.concatenate(found)


def check_batch(model: Model, batch_size: int | Literal["auto"]) -> None:
    """Refuse a batch whose pixels alone exceed memory, before anything is allocated.

    Raises:
        ConfigError: the batch is too large; the message says how large.
    """
    count = 1 if batch_size == "auto" else batch_size
    size = count * (3 * math.prod(model.patch_px) + 3 * 4 * math.prod(model.input_px))
    if size > MAX_BATCH_BYTES:
        raise ConfigError(
            f"a batch of {count} patches of {model.patch_px} px is {size >> 30} GiB of pixels; choose a --batch-size "
            f"that makes at most {MAX_BATCH_BYTES >> 30}"
        )


def examine_model(
    model: ModelSpec | SlideModelSpec | Model,
    settings: Settings,
    slides: Sequence[SlideEntry],
    choice: Choice | None = None,
) -> Explainer:
    """Load a model unless it is loaded, find out what planning needs to know, and choose the engine.

    For a slide-level model, the encoder is run and the aggregator is checked.

    A `choice` that was made earlier is kept.

    Raises:
        ConfigError: a batch is too large, or the aggregator does not have a bag method.
        DeviceError: the process can no longer use its GPU.
        ModelError: it cannot be loaded, no layer can be explained, or an engine is not available.
    """
    make_sums_deterministic()
    limit_arenas()
    from wsi_gradcam.cam.explainer import MAX_CHOICE_PATCHES, Explainer, Request
    from wsi_gradcam.models.load import load_model

    def patches(model: Model, scaled: bool = False) -> NDArray[np.uint8] | None:
        mpp = settings.patch_mpp or model.mpp
        return (
            None
            if mpp is None
            else sample_patches(slides, settings, model.patch_px, mpp, MAX_CHOICE_PATCHES, model.stain, scaled)
        )

    if isinstance(model, SlideModelSpec):
        from wsi_gradcam.mil.aggregators import load_aggregator
        from wsi_gradcam.mil.attribution import check_methods

        aggregator = load_aggregator(model)
        check_methods(aggregator.network, settings.bag_method)
        encoder = examine_model(encoder_of(model), settings, slides, choice)
        encoder.facts = slide_level_facts(model, encoder.facts, aggregator)
        return encoder
    request = Request(
        settings.layer, settings.methods, settings.engine, settings.precision, settings.batch_size, choice
    )
    with device_errors(), allowing_for_run(settings.allow_hosts):
        loaded = load_model(model, settings.device) if isinstance(model, ModelSpec) else model
    check_batch(loaded, settings.batch_size)
    with device_errors():
        explainer = Explainer.examine(loaded, request, patches)
    if choice is None and settings.decode != EXACT:
        made = explainer.facts.choice
        decided = _decoding(explainer, settings, lambda scaled: patches(loaded, scaled))
        explainer.facts = replace(explainer.facts, choice=replace(made, decode=decided[0], decode_trial=decided[1]))
    return explainer


@dataclass
class Blind:
    """A slide-level model whose features come from elsewhere: none of its networks ever sees a pixel."""

    facts: ModelFacts
    aggregator: LoadedAggregator

    def rate(self, targets: Sequence[Target], methods: Sequence[str]) -> float:
        """Return patches explained per second, timed on noise; no method uses pixels."""
        from wsi_gradcam.mil.attribution import explain_bag

        noise = np.random.default_rng(0).normal(size=(RATED, self.aggregator.network.feature_dim))
        started = time.perf_counter()
        explain_bag(self.aggregator.network, noise, targets, ("integrated_gradients",))
        return RATED / (time.perf_counter() - started)


def examine_for_run(
    model: ModelSpec | SlideModelSpec | Model,
    settings: Settings,
    slides: Sequence[SlideEntry],
    choice: Choice | None = None,
) -> Explainer | Blind:
    """Examine a model, see `examine_model`, or a slide-level one without an encoder."""
    if not isinstance(model, SlideModelSpec) or model.encoder is not None:
        return examine_model(model, settings, slides, choice)
    from wsi_gradcam.mil.aggregators import load_aggregator

    aggregator = load_aggregator(model)
    return Blind(slide_level_facts(model, _no_encoder(settings, aggregator), aggregator), aggregator)


def _no_encoder(settings: Settings, aggregator: LoadedAggregator) -> ModelFacts:
    """Return the facts that replace those of an encoder if features come from elsewhere.

    Each slide's plan states the size of its patches; size and resolution here are those at which patches are displayed.
    """
    side = settings.patch_px or LOOKED_AT_PX
    return ModelFacts(
        name="",
        source="features made elsewhere",
        digest="",
        license=None,
        classes=tuple(map(str, range(aggregator.network.feature_dim))),
        activation="none",
        patch_px=side,
        view=(0.0, 0.0, float(side[0]), float(side[1])),
        mpp=settings.patch_mpp or LOOKED_AT_MPP,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        layers=(),
        traced=False,
        cam_shape=(1, 1),
        parameters=sum(parameter.numel() for parameter in aggregator.network.parameters()),
        activation_bytes=0,
        batch_size=settings.batch_size if isinstance(settings.batch_size, int) else 32,
        choice=Choice("none", "float64"),
    )


def slide_level_facts(spec: SlideModelSpec, encoder: ModelFacts, aggregator: LoadedAggregator) -> ModelFacts:
    """Return the facts of a slide-level model from those of its parts.

    Raises:
        ModelError: the encoder's features are not those that the aggregator expects.
    """
    from wsi_gradcam.mil.attribution import memory_growth

    length, network = len(encoder.classes), aggregator.network.double()  # as it will explain
    if length != network.feature_dim:
        raise ModelError(
            f"{spec.name}: the encoder gives {length} features, but the aggregator takes {network.feature_dim}; give "
            "the encoder that it was trained with"
        )
    heads = network(_zeros(network)).attention
    labels = () if heads is None else _attention_labels(heads.shape[1], aggregator.classes)
    return replace(
        encoder,
        name=spec.name,
        source=f"{encoder.source}, {spec.aggregator.source}",
        digest=sha256(f"{encoder.digest} {aggregator.digest}".encode()).hexdigest(),
        license=spec.license or encoder.license,
        classes=aggregator.classes,
        activation=spec.activation,
        notes=(*encoder.notes, *aggregator.notes),
        bag=BagFacts(encoder.digest, length, labels, memory_growth(network)),
    )


def _zeros(network: Any) -> Any:
    parameter = next(iter(network.parameters()))
    return parameter.new_zeros(1, network.feature_dim)


def _attention_labels(heads: int, classes: tuple[str, ...]) -> tuple[str, ...]:
    if heads == 1:
        return (ATTENTION,)
    names = classes if heads == len(classes) else tuple(map(str, range(heads)))
    return tuple(f"{ATTENTION}: {name}" for name in names)


def _decoding(
    explainer: Explainer, settings: Settings, patches: Callable[[bool], NDArray[np.uint8] | None]
) -> tuple[str, Trial | None]:
    """Return how tiles are decoded, and the trial if there was one; `patches` reads some exactly, or scaled."""
    if settings.decode == SCALED:
        return SCALED, None
    exact, scaled = patches(False), patches(True)
    trial = Trial("decode", SCALED)
    if exact is None or scaled is None or exact.shape != scaled.shape:
        return EXACT, replace(trial, remark="no patches could be read in both ways")
    if np.array_equal(exact, scaled):
        return EXACT, replace(trial, remark="makes no difference at the mpp of the model on the first slides")
    found = explainer.likeness(exact, scaled)
    trial = replace(trial, **asdict(found))
    return (
        (SCALED, trial) if found.is_enough else (EXACT, replace(trial, remark="maps differ from those of exact pixels"))
    )
