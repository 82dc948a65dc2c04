"""What people drew on slides: `read_annotations` gives areas in level-0 pixels, `rasterise` masks of them."""

from __future__ import annotations

from wsi_gradcam.tissue.annotations.areas import Annotations, Area, rasterise
from wsi_gradcam.tissue.annotations.reading import read_annotations
from wsi_gradcam.tissue.annotations.regions import Regions, check_mask, check_masks, regions_for, regions_of

__all__ = [
    "Annotations",
    "Area",
    "Regions",
    "check_mask",
    "check_masks",
    "rasterise",
    "read_annotations",
    "regions_for",
    "regions_of",
]
