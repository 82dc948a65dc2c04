"""A few patches of an archive and a few pixels of a slide, for what needs real tissue before the work begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import SlideReadError
from wsi_gradcam.patches import choose, patch_grid
from wsi_gradcam.reading import open_entry
from wsi_gradcam.slides import read_region
from wsi_gradcam.stain import StainFit, apply, fit
from wsi_gradcam.tissue import tissue_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.config import Settings
    from wsi_gradcam.inputs import SlideEntry
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.stain import Stain

SLIDES_TRIED = 3
BLOCK_PX = 1 << 15
# A slide's stain is measured on so many squares of its tissue, of so many pixels a side: on CMU-1 the stains are then
# within 1.5 degrees of those of all pixels; 128 squares of 64 px were 4 off.
STAIN_PLACES, STAIN_PX = 512, 32


def fit_stain(slide: Slide, mask: NDArray[np.bool_], mpp: float, target: Stain) -> StainFit:
    """What makes the slide look like the target, measured on its tissue `mask` at `mpp`; the same each time.

    Raises:
        StainError: its stain cannot be measured.
        SlideReadError: none of its tissue can be read.
    """
    return fit(sample_tissue(slide, mask, mpp), target, slide.info.path)


def sample_tissue(slide: Slide, mask: NDArray[np.bool_], mpp: float) -> NDArray[np.uint8]:
    """Pixels at `mpp` around pixels of the tissue mask, evenly over it: RGB uint8 [n, 3], at most half a million.

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
) -> NDArray[np.uint8] | None:
    """Up to `count` patches uint8 [n, H, W, 3], evenly over the tissue of the first slide that can be read.

    With a `stain` they are normalised to it. The same for the same archive and settings. None where none of the first
    slides has a readable patch.
    """
    for entry in slides[:SLIDES_TRIED]:
        try:
            patches = _of_slide(entry, settings, patch_px, mpp, count, stain)
        except Exception:  # a bad slide is reported when its turn comes
            continue
        if len(patches):
            return patches
    return None


def _of_slide(
    entry: SlideEntry, settings: Settings, patch_px: tuple[int, int], mpp: float, count: int, stain: Stain | None
) -> NDArray[np.uint8]:
    slide = open_entry(entry, settings)
    try:
        info = slide.info
        grid = patch_grid((info.height, info.width), info.mpp_yx, patch_px, mpp, settings.stride(patch_px))
        mask = tissue_mask(slide)
        places = choose(grid, mask, settings.min_tissue, BLOCK_PX).yx
        places = places[np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int))]
        found = []
        for y, x in places.tolist():
            try:
                found.append(read_region(slide, y, x, *patch_px, mpp))
            except SlideReadError:
                continue
        patches = np.stack(found) if found else np.zeros((0, *patch_px, 3), np.uint8)
        return patches if stain is None or not found else apply(fit_stain(slide, mask, mpp, stain), patches)
    finally:
        slide.close()
