"""Features for other programs: HDF5 files of a slide's feature vectors, as TRIDENT and CLAM write them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import ConfigError, ResultError
from wsi_gradcam.mil.feature_files import write_clam, write_trident
from wsi_gradcam.mil.features import SlideFrame, steps
from wsi_gradcam.results.feature_store import BOXES, Bag, FeatureStore, encoding_problems
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.patch_store import PatchStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.export.job import Job
    from wsi_gradcam.results.slide import SlideResult


def has_features(slide: SlideResult) -> bool:
    """Return whether all features of a slide are there, explained or not."""
    manifest = Manifest(slide.folder.manifest)
    try:
        store = FeatureStore(slide.folder.features, read_only=True)
    except FileNotFoundError:
        return False
    return manifest.is_finished or not list(encoding_problems(store, manifest, slide.plan))


def trident(job: Job) -> list[Path]:
    """Write DEST/SLIDE.h5 as TRIDENT does."""
    bag, boxes, frame = _bag(job)
    slide = job.slide
    height, width = slide.patch_px
    if height != width:
        raise ConfigError(f"{slide.id}: patches of {height} x {width} px; TRIDENT's are squares, export the other way")
    step = next((step for step in steps(boxes[:, 1::-1]) if step), None)
    stride = width if step is None else min(width, round(width * step / slide.plan.footprint[1]))
    path = job.named(job.base, ".h5")
    with job.atomic_path(path) as partial:
        write_trident(
            partial,
            bag,
            boxes,
            frame,
            patch_px=width,
            stride_px=stride,
            mpp=slide.patch_mpp,
            encoder=slide.model_name,
        )
    return [path]


def clam(job: Job) -> list[Path]:
    """Write DEST/SLIDE.h5 as CLAM does, features and places in one file."""
    bag, boxes, frame = _bag(job)
    path = job.named(job.base, ".h5")
    with job.atomic_path(path) as partial:
        write_clam(partial, bag, boxes, frame)
    return [path]


def _bag(job: Job) -> tuple[Bag, NDArray[np.float64], SlideFrame]:
    """Return the features of a slide's readable patches, their boxes as of `FeatureBag`, and the slide.

    Raises:
        ResultError: it has none.
    """
    slide, plan = job.slide, job.slide.plan
    try:
        store = FeatureStore(slide.folder.features, read_only=True)
    except FileNotFoundError as error:
        raise ResultError(
            f"{slide.id}: has no features; slide-level models have them, and what 'wsi-gradcam encode' makes"
        ) from error
    bag = Bag(store)
    if store.has(BOXES):
        boxes = store.read(BOXES)
    else:
        yx = PatchStore(slide.folder.cams, read_only=True).yx()
        boxes = np.concatenate([yx, np.broadcast_to(plan.footprint, yx.shape)], axis=1).astype(np.float64)
    return bag, boxes[bag.rows], SlideFrame(slide.id, plan.slide_px, plan.slide_mpp)
