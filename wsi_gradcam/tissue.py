"""Where there is tissue on a slide: a mask from its thumbnail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from skimage.filters import gaussian, threshold_otsu
from skimage.morphology import closing, disk, remove_small_holes, remove_small_objects

from wsi_gradcam.slides import thumbnail

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides import Slide

MASK_MPP = 8.0  # about one nucleus a pixel
MASK_MAX_PX = 2048
# Otsu's threshold splits any picture in two, also pure glass and pure tissue, and beside dark tissue it lies above
# pale tissue. Glass varies by 2 % of full scale and pale fat or mucus differs from it by 6 %; so the threshold is
# kept between. At most 0.09 lost a quarter of a pale tumour, at most 0.05 loses none and adds 3 % to other slides.
LOWEST, HIGHEST = 0.035, 0.05
SMALLEST_UM2 = 5_000.0  # a speck of dust; a needle biopsy fragment is a hundred times that


def tissue_mask(slide: Slide) -> NDArray[np.bool_]:
    """Tissue of the whole slide, bool [h, w], each pixel `height / h` by `width / w` level-0 pixels.

    What cannot be decoded counts as tissue: its patches are tried, and recorded as unreadable where they are, so
    that a bad region never silently becomes glass.

    Raises:
        MppError: the slide's mpp is not known.
        SlideReadError: most of the slide cannot be decoded.
    """
    thumb = thumbnail(slide, MASK_MPP, MASK_MAX_PX)
    rgb = thumb.rgb
    mpp_y, mpp_x = slide.info.mpp_yx
    pixel_um2 = (slide.info.height * mpp_y / rgb.shape[0]) * (slide.info.width * mpp_x / rgb.shape[1])
    return mask_of(rgb, int(SMALLEST_UM2 / pixel_um2)) | thumb.unreadable


def mask_of(rgb: NDArray[np.uint8], smallest_px: int = 0) -> NDArray[np.bool_]:
    """Tissue in a picture, bool [h, w], from RGB uint8 [h, w, 3].

    A pixel is tissue when, after smoothing, some channel differs from the glass's colour by more than Otsu's
    threshold, which is kept between bounds measured on glass and on pale tissue. Fragments and holes smaller
    than `smallest_px` pixels are dropped.
    """
    glass = np.asarray(glass_colour(rgb), np.int16)
    difference = np.zeros(rgb.shape[:2], np.uint8)
    for channel in range(3):  # one at a time: a large thumbnail in float64 would be 100 MB
        np.maximum(difference, np.abs(rgb[..., channel] - glass[channel]).astype(np.uint8), out=difference)
    smooth = gaussian(difference.astype(np.float32) / 255.0, sigma=1.0)
    threshold = LOWEST if np.ptp(smooth) == 0 else float(np.clip(threshold_otsu(smooth), LOWEST, HIGHEST))
    mask: NDArray[np.bool_] = closing(smooth > threshold, disk(2))
    if smallest_px > 1:
        mask = remove_small_holes(remove_small_objects(mask, max_size=smallest_px), max_size=smallest_px)
    return mask


def glass_colour(rgb: NDArray[np.uint8]) -> tuple[int, int, int]:
    """The median colour of what is bright and gray, at least 0.5 % of the picture; else white."""
    flat = rgb.reshape(-1, 3)
    flat = flat[:: max(1, len(flat) // 500_000)]
    low, high = flat.min(axis=1), flat.max(axis=1)
    candidates = flat[(low >= 200) & (high - low <= 24)]
    if len(candidates) < 0.005 * len(flat):
        return 255, 255, 255
    bright = candidates[candidates.min(axis=1) >= np.percentile(candidates.min(axis=1), 50)]
    red, green, blue = (int(v) for v in np.median(bright, axis=0))
    return red, green, blue


def fraction_in(mask: NDArray[np.bool_], boxes: NDArray[np.float64]) -> NDArray[np.float32]:
    """Share of each box that is True in `mask`, float32 [n]; what lies outside the mask counts as False.

    `boxes` is [n, 4] of (top, left, bottom, right) in mask pixels, fractions allowed. Exact: the integral image
    is linear between its nodes where the mask is constant, so it is interpolated there. Rounded to a millionth,
    so that none is 0 and all is 1.
    """
    h, w = mask.shape
    integral = np.zeros((h + 1, w + 1), np.float64)
    integral[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    top, left, bottom, right = boxes.T

    def at(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        y, x = np.clip(y, 0, h), np.clip(x, 0, w)
        y0, x0 = np.minimum(y.astype(int), h - 1), np.minimum(x.astype(int), w - 1)
        fy, fx = y - y0, x - x0
        upper = integral[y0, x0] * (1 - fx) + integral[y0, x0 + 1] * fx
        lower = integral[y0 + 1, x0] * (1 - fx) + integral[y0 + 1, x0 + 1] * fx
        result: NDArray[np.float64] = upper * (1 - fy) + lower * fy
        return result

    inside = at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)
    # A box may be empty: rounding puts a last patch on the very edge.
    area = (bottom - top) * (right - left)
    share: NDArray[np.float64] = np.divide(inside, area, out=np.zeros_like(area), where=area > 0)
    return np.abs(share.round(6)).astype(np.float32)
