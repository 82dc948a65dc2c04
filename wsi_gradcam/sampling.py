"""A few patches of an archive, for choices that need real tissue before the work begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import SlideReadError
from wsi_gradcam.patches import choose, patch_grid
from wsi_gradcam.slides import open_slide, read_region
from wsi_gradcam.tissue import tissue_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.config import Settings
    from wsi_gradcam.inputs import SlideEntry

SLIDES_TRIED = 3
BLOCK_PX = 1 << 15


def sample_patches(
    slides: Sequence[SlideEntry], settings: Settings, patch_px: tuple[int, int], mpp: float, count: int
) -> NDArray[np.uint8] | None:
    """Up to `count` patches uint8 [n, H, W, 3], evenly over the tissue of the first slide that can be read.

    The same for the same archive and settings. None where none of the first slides has a readable patch.
    """
    for entry in slides[:SLIDES_TRIED]:
        try:
            patches = _of_slide(entry, settings, patch_px, mpp, count)
        except Exception:  # a bad slide is reported when its turn comes
            continue
        if len(patches):
            return patches
    return None


def _of_slide(
    entry: SlideEntry, settings: Settings, patch_px: tuple[int, int], mpp: float, count: int
) -> NDArray[np.uint8]:
    slide = open_slide(entry.path, settings.mpp)
    try:
        info = slide.info
        grid = patch_grid((info.height, info.width), info.mpp_yx, patch_px, mpp, settings.stride(patch_px))
        places = choose(grid, tissue_mask(slide), settings.min_tissue, BLOCK_PX).yx
        places = places[np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int))]
        found = []
        for y, x in places.tolist():
            try:
                found.append(read_region(slide, y, x, *patch_px, mpp))
            except SlideReadError:
                continue
        return np.stack(found) if found else np.zeros((0, *patch_px, 3), np.uint8)
    finally:
        slide.close()
