"""Masks of tissue, ink and bare glass from a slide's thumbnail, and a preview for checking them by eye."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import binary_dilation, binary_opening, label, maximum_filter, minimum_filter
from skimage.filters import gaussian, threshold_otsu
from skimage.morphology import closing, disk, remove_small_holes, remove_small_objects

from wsi_gradcam.io.local import write_atomic
from wsi_gradcam.slides import thumbnail
from wsi_gradcam.tissue.annotations import in_frame
from wsi_gradcam.tissue.quality import ROWS, label_sizes, pen_mask, shadow_mask

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from wsi_gradcam.slides import Slide
    from wsi_gradcam.tissue.annotations import Regions

MASK_MPP = 8.0  # about one nucleus per pixel
MASK_MAX_PX = 2048
# Otsu's threshold splits any picture in two, even pure glass and pure tissue, and next to dark tissue it lies above
# pale tissue. Glass varies by 2% of full scale, and pale fat or mucus differs from it by 6%, so the threshold is kept
# between the two. An upper limit of 0.09 lost a quarter of a pale tumour; 0.05 loses none and adds 3% to other slides.
LOWEST, HIGHEST = 0.035, 0.05
SMALLEST_PX = 16  # fewer pixels of ink or shadow than this prove nothing, whatever the size of a pixel
# Tissue lost with ink and shadows at 8 um per pixel: none of 45 tiles of osteosarcoma, 7 of an oral tumour, an IHC
# micrograph and an Aperio slide; 0.3% of 528 photographs of oral tissue, all in two with dark grey glass. Of strokes of
# a green and a red pen on glass, 95 to 100% is found.
RIM_PX = 4  # the rim of ink and shadows: still darker than glass, but too pale to have a colour
GRAY_RANGE, GRAY_SHARE = 3, 0.999
BLACK = 20  # anything darker is a border or empty, even without any colour
SMALLEST_UM2 = 5_000.0  # a speck of dust; a needle biopsy fragment is a hundred times that

# Scanners leave out what they take for empty and fill it with pure white or black, in rectangles. Bare glass is a
# different white, and even: over 7 px, its green differs by at most 4 in 58% and 74% of the glass of two scanned
# slides, while tissue has texture at this resolution.
FILL_WHITE, FILL_BLACK, FILL_PX = 254, 1, 9
STRAIGHT_PX, STRAIGHT = 12, 0.5  # at least half of a fill's border lies in straight runs along rows and columns
EVEN_PX, EVEN = 7, 4
LEAST_GLASS, LEAST_EVEN = 0.005, 0.02  # share of the scanned area
BRIGHT, DARKEST, GRAYISH = (
    200,
    100,
    24,
)  # of glass: its darkest channel, even in a dark scan, and how far its channels differ
EVEN_SHADOW_PX, NEUTRAL = 400, 0.015  # a shadow is at least this large and has the hue of glass
TISSUE_RULE = 2  # version of the rule; 1 took fill for glass

# The preview: colours distinct from stains and from each other, for colour-blind people too (Okabe and Ito).
OUTLINE_COLOUR, PEN_COLOUR, SHADOW_COLOUR = (0, 158, 115), (230, 159, 0), (86, 180, 233)
EXCLUDED_COLOUR = (60, 60, 60)
OPACITY = 0.65
PREVIEW_PX = 1600  # longest side of the picture: it fits a screen, and shows single nuclei of a small biopsy


@dataclass(frozen=True, eq=False)
class SlideMasks:
    """Disjoint masks of a slide, at the resolution of its thumbnail.

    Attributes:
        rgb: the thumbnail, uint8 [h, w, 3]; a pixel is `height / h` by `width / w` level-0 pixels.
        tissue: bool [h, w]; includes what could not be decoded.
        pen: bool [h, w], ink.
        shadow: bool [h, w], grey that is neither: shadows, edges of coverslips, dirt. It counts as glass.
        unscanned: bool [h, w], what the scanner left out and filled; None if there is none. It counts as glass.
    """

    rgb: NDArray[np.uint8]
    tissue: NDArray[np.bool_]
    pen: NDArray[np.bool_]
    shadow: NDArray[np.bool_]
    unscanned: NDArray[np.bool_] | None = None

    def selected(self, rule: str) -> NDArray[np.bool_]:
        """Return what counts as tissue, bool [h, w], for `auto`, `with-pen` or `everything`, see `Settings.tissue`."""
        if rule == "everything":
            return np.ones_like(self.tissue)
        return self.tissue | self.pen if rule == "with-pen" else self.tissue

    @property
    def glass(self) -> NDArray[np.bool_]:
        """Everything that is neither tissue nor ink, bool [h, w]."""
        return ~(self.tissue | self.pen)

    def shares(self) -> dict[str, float]:
        """Return shares of the slide that add up to 1: `tissue`, `pen`, `shadow`, bare `glass`, `unscanned`."""
        found = {"tissue": self.tissue, "pen": self.pen, "shadow": self.shadow, "unscanned": self.unscanned}
        shares = {name: 0.0 if where is None else float(where.mean()) for name, where in found.items()}
        return {**shares, "glass": max(0.0, 1 - sum(shares.values()))}


def slide_masks(slide: Slide) -> SlideMasks:
    """Return tissue, ink and shadows of the whole slide.

    What cannot be decoded counts as tissue: its patches are tried, and recorded as unreadable if they are, so that a
    bad region never silently becomes glass.

    Raises:
        MppError: the slide's mpp is not known.
        SlideReadError: most of the slide cannot be decoded.
    """
    thumb = thumbnail(slide, MASK_MPP, MASK_MAX_PX)
    rgb = thumb.rgb
    mpp_y, mpp_x = slide.info.mpp_yx
    pixel_um2 = (slide.info.height * mpp_y / rgb.shape[0]) * (slide.info.width * mpp_x / rgb.shape[1])
    found = find_masks(rgb, int(SMALLEST_UM2 / pixel_um2))
    known = ~thumb.unreadable
    unscanned = None if found.unscanned is None else found.unscanned & known
    return SlideMasks(rgb, found.tissue | thumb.unreadable, found.pen & known, found.shadow & known, unscanned)


def find_masks(rgb: NDArray[np.uint8], smallest_px: int = 0) -> SlideMasks:
    """Return tissue, ink and shadows in an image, RGB uint8 [h, w, 3].

    A pixel is tissue if, after smoothing, some channel differs from the colour of the glass by more than Otsu's
    threshold, which is kept between limits measured on glass and on pale tissue, and if it is neither ink nor a grey
    that no stain has; in a picture without any colour, neither is looked for. Fragments and holes smaller than
    `smallest_px` pixels are dropped.
    """
    unscanned = unscanned_area(rgb)
    glass = glass_colour(rgb, unscanned)
    shown = rgb
    if unscanned.any():  # like glass: its border is neither a shadow nor tissue
        shown = np.where(_wider(unscanned)[..., None], np.array(glass, np.uint8), rgb)
    smooth = _difference(shown, glass)
    scanned = smooth if unscanned.all() else smooth[~unscanned]
    threshold = LOWEST if np.ptp(scanned) == 0 else float(np.clip(threshold_otsu(scanned), LOWEST, HIGHEST))
    differs = smooth > threshold
    pen, shadow = _artefacts(shown, glass, differs, unscanned, min(max(SMALLEST_PX, smallest_px), differs.size))
    mask: NDArray[np.bool_] = closing(differs & ~pen & ~shadow, disk(2)) & ~pen & ~shadow
    if smallest_px > 1:
        mask = remove_small_holes(remove_small_objects(mask, max_size=smallest_px), max_size=smallest_px)
    mask &= ~unscanned
    pen, shadow = pen & ~mask & ~unscanned, shadow & ~mask & ~pen & ~unscanned
    return SlideMasks(rgb, mask, pen, shadow, unscanned if unscanned.any() else None)


def _artefacts(
    rgb: NDArray[np.uint8],
    glass: tuple[int, int, int],
    differs: NDArray[np.bool_],
    unscanned: NDArray[np.bool_],
    least: int,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return ink and shadows, bool [h, w] each; `differs` marks what differs from glass."""
    if _is_gray(rgb):
        return np.zeros_like(differs), rgb.max(axis=2) < BLACK
    shadow = shadow_mask(rgb, glass, least) | _even_shadow(rgb, glass, differs, unscanned)
    return _with_rim(pen_mask(rgb, least), differs), _with_rim(shadow, differs)


def _even_shadow(
    rgb: NDArray[np.uint8], glass: tuple[int, int, int], differs: NDArray[np.bool_], unscanned: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return grey glass beside the coverslip: even, with the glass's own hue, reaching the border of the scanned area.

    Unstained fat is grey too, but has membranes and does not reach the border.
    """
    neutral = np.concatenate([_is_neutral(rgb[top : top + ROWS], glass) for top in range(0, len(rgb), ROWS)])
    found = _even_gray(rgb, DARKEST) & neutral & differs
    labels, count = label(found)
    border = _wider(unscanned, EVEN_PX)
    border[:EVEN_PX], border[-EVEN_PX:], border[:, :EVEN_PX], border[:, -EVEN_PX:] = True, True, True, True
    keep = label_sizes(labels, count) >= EVEN_SHADOW_PX
    keep &= np.bincount(labels[border], minlength=count + 1) > 0
    keep[0] = False
    core: NDArray[np.bool_] = keep[labels]
    if core.any():
        core = binary_dilation(core, iterations=EVEN_PX, mask=core | (neutral & differs))
    return core


def _is_neutral(rgb: NDArray[np.uint8], glass: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Return what has the hue of glass, bool [h, w]."""
    light = [rgb[..., i] / np.float32(max(1, glass[i])) for i in range(3)]
    neutral: NDArray[np.bool_] = np.maximum.reduce(light) - np.minimum.reduce(light) <= NEUTRAL
    return neutral


def _wider(where: NDArray[np.bool_], px: int = 1) -> NDArray[np.bool_]:
    """Return the mask widened by up to `px` pixels."""
    wider: NDArray[np.bool_] = (
        binary_dilation(where, np.ones((2 * px + 1, 2 * px + 1))) if where.any() else where.copy()
    )
    return wider


def unscanned_area(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return what a scanner left out and filled with pure white or black, bool [h, w].

    White counts only if its border consists of straight runs, like that of scanned rectangles, and if there is other
    glass besides it: the glass of some scanners is itself pure white.
    """
    white, black = (_fill(where) for where in (rgb.min(axis=2) >= FILL_WHITE, rgb.max(axis=2) <= FILL_BLACK))
    if white.any():
        even = _even_gray(rgb, BRIGHT) & ~_wider(white)
        if even.sum() < LEAST_EVEN * (~white).sum():
            white = np.zeros_like(white)
    return white | black


def _fill(pure: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return large areas of a pure colour whose border is mostly straight."""
    if not pure.any():
        return pure
    solid = binary_opening(np.pad(pure, FILL_PX, mode="edge"), np.ones((FILL_PX, FILL_PX)))
    labels, count = label(solid[FILL_PX:-FILL_PX, FILL_PX:-FILL_PX])
    straight, total = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    for areas in (labels, labels.T):
        owner, border = np.maximum(areas[1:], areas[:-1]), areas[1:] != areas[:-1]
        total += np.bincount(owner[border], minlength=count + 1)
        if border.shape[1] >= STRAIGHT_PX:
            runs = binary_opening(border, np.ones((1, STRAIGHT_PX)))
            straight += np.bincount(owner[runs], minlength=count + 1)
    keep = straight > STRAIGHT * total
    keep[0] = False
    found: NDArray[np.bool_] = keep[labels]
    return found


def _even_gray(rgb: NDArray[np.uint8], darkest: int) -> NDArray[np.bool_]:
    """Return grey without any texture, bool [h, w]: bare glass, and the shadows on it."""
    green, low = rgb[..., 1], rgb.min(axis=2)
    even = maximum_filter(green, EVEN_PX) - minimum_filter(green, EVEN_PX) <= EVEN
    found: NDArray[np.bool_] = even & (low >= darkest) & (rgb.max(axis=2) - low <= GRAYISH)
    return found


def _is_gray(rgb: NDArray[np.uint8]) -> bool:
    """Return whether an image is grey throughout, as from a scanner without colour: grey then shows no shadows."""
    return bool((np.ptp(rgb, axis=2) <= GRAY_RANGE).mean() > GRAY_SHARE)


def _with_rim(found: NDArray[np.bool_], differs: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return ink or shadow with the pale rim where it fades into glass."""
    if not found.any():
        return found
    rim: NDArray[np.bool_] = binary_dilation(found, iterations=RIM_PX, mask=found | differs)
    return rim


def _difference(rgb: NDArray[np.uint8], glass: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return the largest difference of any channel from the glass, 0 to 1, smoothed, float32 [h, w]."""
    difference = np.zeros(rgb.shape[:2], np.uint8)
    for channel, value in enumerate(glass):  # one at a time: a large thumbnail in float64 would be 100 MB
        np.maximum(difference, np.abs(rgb[..., channel] - np.int16(value)).astype(np.uint8), out=difference)
    smooth: NDArray[np.float32] = gaussian(difference.astype(np.float32) / 255.0, sigma=1.0)
    return smooth


def glass_colour(rgb: NDArray[np.uint8], unscanned: NDArray[np.bool_] | None = None) -> tuple[int, int, int]:
    """Return the median RGB of the brighter half of bare glass: bright grey, if it is 0.5% of the scanned area.

    Otherwise, in a dark scan, it is that of even grey, if there is 2% of it; otherwise white. `unscanned` is searched
    for if it is not given.
    """
    unscanned = unscanned_area(rgb) if unscanned is None else unscanned
    flat = rgb[~_wider(unscanned)] if unscanned.any() else rgb.reshape(-1, 3)
    flat = flat[:: max(1, len(flat) // 500_000)]
    low, high = flat.min(axis=1), flat.max(axis=1)
    candidates = flat[(low >= BRIGHT) & (high - low <= GRAYISH)]
    if len(candidates) < LEAST_GLASS * len(flat):
        candidates = flat[:0]
    if unscanned.any() or not len(candidates):
        even = _even_gray(rgb, BRIGHT if len(candidates) else DARKEST) & ~_wider(unscanned)
        candidates = rgb[even] if even.sum() >= LEAST_EVEN * (~unscanned).sum() else candidates
    return _brighter_half(candidates)


def _brighter_half(pixels: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Return the median RGB of the brighter half of pixels [n, 3]; white if there are none."""
    if not len(pixels):
        return 255, 255, 255
    low = pixels.min(axis=1)
    red, green, blue = (int(v) for v in np.median(pixels[low >= np.percentile(low, 50)], axis=0))
    return red, green, blue


def write_mask_preview(
    path: Path, slide: Slide, tissue: str = "auto", regions: Regions | None = None, frame: str = "auto"
) -> dict[str, float]:
    """Write the slide's thumbnail as a PNG: tissue to be explained outlined in green, ink orange, shadows blue.

    Everything outside the regions, in their frame (see `in_frame`), is dark grey.

    Returns:
        Shares of the slide: `tissue` (to be explained), `pen`, `shadow`, `unscanned`, `glass`, `excluded`.

    Raises:
        MppError: the slide's mpp is not known.
        SlideReadError: most of the slide cannot be decoded.
        AnnotationError: the regions cannot be understood.
        StoreError: the image cannot be written.
    """
    rgb = thumbnail(slide, min(slide.info.mpp_yx), PREVIEW_PX).rgb
    masks = slide_masks(slide)
    mask, excluded = masks.selected(tissue), np.zeros_like(masks.tissue)
    if regions is not None:
        regions = in_frame(regions, masks.tissue, slide.info, frame)
        excluded = ~regions.mask((slide.info.height, slide.info.width), mask.shape)
        mask = mask & ~excluded
    for where, colour in ((masks.shadow, SHADOW_COLOUR), (masks.pen, PEN_COLOUR), (excluded, EXCLUDED_COLOUR)):
        tinted = _enlarged(where, rgb.shape)
        rgb[tinted] = (rgb[tinted] * (1 - OPACITY) + np.array(colour) * OPACITY).astype(np.uint8)
    rgb[_border(_enlarged(mask, rgb.shape))] = OUTLINE_COLOUR
    buffer, about = io.BytesIO(), PngInfo()
    about.add_text("Software", "wsi_gradcam")  # tells a search for slides that it is not one
    Image.fromarray(rgb).save(buffer, format="PNG", pnginfo=about)
    write_atomic(path, buffer.getvalue())
    return {**masks.shares(), "tissue": float(mask.mean()), "excluded": float(excluded.mean())}


def _enlarged(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the mask at another size, by the nearest pixel."""
    rows, columns = ((np.arange(size) + 0.5) * of // size for size, of in zip(shape[:2], mask.shape, strict=True))
    enlarged: NDArray[np.bool_] = mask[rows.astype(int)[:, None], columns.astype(int)]
    return enlarged


def _border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels around the mask and, at the edge of the image, the mask's own."""
    thick = 1 + max(mask.shape) // 800
    border: NDArray[np.bool_] = binary_dilation(mask, iterations=thick) & ~mask
    inner = np.zeros_like(mask)
    inner[thick:-thick, thick:-thick] = True
    return border | (mask & ~inner)


class Shares:
    """The share of boxes that is True in a mask, exact thanks to the mask's integral image.

    The integral image is linear between its nodes, where the mask is constant, so it is interpolated there. Boxes are
    [n, 4] of (top, left, bottom, right) in mask pixels; fractions are allowed.
    """

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self._size = mask.shape
        # Enough for masks of 46,340 px square, with half the bytes of larger integers.
        self._integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)
        self._integral[1:, 1:] = mask.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)

    def of(self, boxes: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the shares of boxes [n, 4], float32 [n]; outside the mask counts as False.

        They are rounded to a millionth, so that none gives 0 and all gives 1.
        """
        top, left, bottom, right = boxes.T
        inside = self._at(bottom, right) - self._at(top, right) - self._at(bottom, left) + self._at(top, left)
        # A box may be empty: rounding can put a last patch exactly on the edge.
        area = (bottom - top) * (right - left)
        share: NDArray[np.float64] = np.divide(inside, area, out=np.zeros_like(area), where=area > 0)
        return np.abs(share.round(6)).astype(np.float32)

    def _at(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        h, w = self._size
        y, x = np.clip(y, 0, h), np.clip(x, 0, w)
        y0, x0 = np.minimum(y.astype(int), h - 1), np.minimum(x.astype(int), w - 1)
        fy, fx = y - y0, x - x0
        upper = self._integral[y0, x0] * (1 - fx) + self._integral[y0, x0 + 1] * fx
        lower = self._integral[y0 + 1, x0] * (1 - fx) + self._integral[y0 + 1, x0 + 1] * fx
        result: NDArray[np.float64] = upper * (1 - fy) + lower * fy
        return result
