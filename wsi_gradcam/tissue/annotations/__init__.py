"""Annotations that people drew on slides: areas in level-0 pixels, and masks of them."""

from __future__ import annotations

from wsi_gradcam.tissue.annotations.areas import Annotations, Area, rasterise
from wsi_gradcam.tissue.annotations.regions import (
    Regions,
    check_mask,
    check_masks,
    entry_regions,
    read_annotations,
    read_regions,
)

__all__ = [
    "Annotations",
    "Area",
    "Regions",
    "check_mask",
    "check_masks",
    "entry_regions",
    "rasterise",
    "read_annotations",
    "read_regions",
]
