"""Artefacts on slides (pen ink, shadows, edges of coverslips), the blur of patches, and filled outlines.

Pure functions of RGB arrays. Colours are judged by optical density, -log10(value / 256), in which a dye keeps the
ratios of its channels however thick its layer: so ink and stain are distinguished by ratios.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Density = NDArray[np.float32]
    Mask = NDArray[np.bool_]
    Corners = tuple[int, int, int, int]  # top, left, bottom, right
    Placed = tuple[NDArray[np.float64], Corners]  # an outline, and a box of pixels

DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)
CONNECTED = np.ones((3, 3), np.bool_)
ROWS = 256  # pixels of a picture at once, where each pixel is judged alone
BLUR_PX = 11

# Densities, at 8 um per pixel and smoothed, from measurements. "Lost" is the share of tissue pixels that the rule takes
# for ink, of 11,000 to 740,000 pixels each: 1,224 tiles of oral H&E photographed with a blue cast, 45 of osteosarcoma,
# 7 of an oral tumour, and an IHC micrograph (DAB and haematoxylin). Blue and green ink absorb more red than green,
# which neither haematoxylin, eosin nor DAB does: red - green is 0.33 in the middle of a green stroke and up to 0.14 in
# the tissue of the worst cast; lost: 0. Over eosin, the difference fades, but no tissue absorbs more red than 0.76.
COOL, COOL_RED, COOL_EDGE = 0.15, 0.85, 0.05
# Red ink lets red pass and absorbs blue nearly as much as green. Eosin absorbs little blue, DAB a good deal of red;
# blood comes closest: its red is at least 0.13 of its green, in ink 0.10. Lost: 0 at 0.115, 0.1% of osteosarcoma at
# 0.15; at 0.11, a tenth of the ink is missed.
WARM, WARM_RED, WARM_EDGE = 0.4, 0.115, 0.08
WARM_BLUE = (0.6, 1.2)  # of green
# Dark red and black ink on top of each other; DAB absorbs more blue, haematoxylin and eosin less. Lost: at most 0.04%.
DARK, DARK_BLUE = 0.8, (0.7, 1.05)
# Black ink is darker than any tissue at this resolution, or nearly as dark and grey. Lost: 0 at 0.7; 0.02% of grey.
BLACK, BLACK_GRAY = 0.7, 0.45
# Grey: the least density as a share of the greatest. DAB over haematoxylin is grey too, but seldom dark and large: at
# 0.12 and 0.95, 0.1% of IHC is lost; at 0.06, 4%.
SHADOW, SHADOW_EDGE, GRAY, GRAY_EDGE = 0.12, 0.03, 0.95, 0.8
# A line: thinner than 70 um and longer than half a millimetre. Tissue strands that thin and long have a colour.
LINE, LINE_COLOUR, LINE_WIDTH_PX, LINE_LONG_PX = 0.02, 0.01, 9, 64
LINE_AREA = 27  # px of area per px of the diagonal of its box: the four edges of a coverslip have half of that
EDGE_PX = 8  # how far a stroke or shadow fades, 64 um


def pen_mask(rgb: NDArray[np.uint8], smallest_px: int = 1, edge_px: int = EDGE_PX) -> NDArray[np.bool_]:
    """Return the mask of pen ink (blue, green, red, black), bool [h, w], from RGB uint8 [h, w, 3].

    Ink is found where at least `smallest_px` connected pixels have a colour that no stain of H&E or of
    immunohistochemistry has, and is followed from there to its pale edges, at most `edge_px` away. This is meant for a
    picture at about 8 um per pixel, where a stroke is tens of pixels wide and a nucleus is one.

    Special stains that are themselves green or blue (trichrome, Alcian blue, Luxol fast blue) are taken for ink.
    """
    red, green, blue = densities(rgb)
    cool, warm = _by_rows(_cool, red, green), _by_rows(_warm, red, green, blue)
    del red, green, blue
    return _grown(*cool, smallest_px, edge_px) | _grown(*warm, smallest_px, edge_px)


def shadow_mask(
    rgb: NDArray[np.uint8], glass: tuple[int, int, int] = (255, 255, 255), smallest_px: int = 1
) -> NDArray[np.bool_]:
    """Return the mask of grey, bool [h, w]: shadows, edges of coverslips, dirt.

    Pale grey is left out, because unstained fat is pale grey, unless it is a long thin line.

    Args:
        rgb: uint8 [h, w, 3], about 8 um per pixel.
        glass: the colour of bare glass, against which grey is judged.
        smallest_px: fewer connected pixels than this are ignored.
    """
    low = _density(rgb[..., 0], glass[0])
    high = low.copy()
    for i in (1, 2):  # one at a time: for a large thumbnail, each takes 16 MB
        density = _density(rgb[..., i], glass[i])
        np.minimum(low, density, out=low)
        np.maximum(high, density, out=high)
        del density
    return _grown(*_by_rows(_dark_gray, low, high), smallest_px) | _lines(low, high)


def _dark_gray(low: Density, high: Density) -> tuple[Mask, Mask]:
    """Return where grey is certain, and where it is possible."""
    certain = (low > SHADOW) & (low > GRAY * high)
    return certain, (low > SHADOW_EDGE) & (low > GRAY_EDGE * high)


def densities(
    rgb: NDArray[np.uint8], glass: tuple[int, int, int] = (255, 255, 255)
) -> tuple[Density, Density, Density]:
    """Return optical densities of red, green and blue against glass, float32 [h, w] each, smoothed to reduce noise."""
    red, green, blue = (_density(rgb[..., i], glass[i]) for i in range(3))
    return red, green, blue


def _density(channel: NDArray[np.uint8], glass: int) -> Density:
    found: Density = DENSITY[channel]
    found -= DENSITY[glass]
    smooth: Density = ndimage.gaussian_filter(found, 1.0, mode="nearest")
    return smooth


def _by_rows(judge: Callable[..., tuple[Mask, Mask]], *densities: Density) -> tuple[Mask, Mask]:
    """Return the result of a function of pixels, some rows at a time: intermediate values take 100 MB."""
    tops = range(0, len(densities[0]), ROWS)
    parts = [judge(*(density[top : top + ROWS] for density in densities)) for top in tops]
    certain, perhaps = (np.concatenate(found) for found in zip(*parts, strict=True))
    return certain, perhaps


def label_sizes(labels: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Return the number of pixels of each label, int64 [count + 1], without a copy of all in 64 bits."""
    sizes = np.zeros(count + 1, np.int64)
    for top in range(0, len(labels), ROWS):
        sizes += np.bincount(labels[top : top + ROWS].ravel(), minlength=count + 1)
    return sizes


def _cool(red: Density, green: Density) -> tuple[Mask, Mask]:
    """Return where blue and green ink is certain, and where it is possible."""
    more = red - green
    return (more > COOL) | (red > COOL_RED), more > COOL_EDGE


def _warm(red: Density, green: Density, blue: Density) -> tuple[Mask, Mask]:
    """Return where red and black ink, and their mixtures, are certain, and where they are possible."""
    low, high = _range(red, green, blue)
    hue = (blue > WARM_BLUE[0] * green) & (blue < WARM_BLUE[1] * green)
    certain = hue & (green > WARM) & (red < WARM_RED * green)
    certain |= (green > DARK) & (blue > DARK_BLUE[0] * green) & (blue < DARK_BLUE[1] * green)
    certain |= (low > BLACK) | ((low > BLACK_GRAY) & (low > 0.9 * high))
    return certain, hue & (green > WARM_EDGE)


def _range(red: Density, green: Density, blue: Density) -> tuple[Density, Density]:
    low, high = np.minimum(red, green), np.maximum(red, green)
    return np.minimum(low, blue, out=low), np.maximum(high, blue, out=high)


def _grown(certain: Mask, perhaps: Mask, smallest_px: int, edge_px: int = EDGE_PX) -> Mask:
    """Return sufficiently large groups of certain pixels, with their possible edges."""
    labels, count = ndimage.label(certain, CONNECTED)
    enough = label_sizes(labels, count) >= smallest_px
    enough[0] = False
    core: Mask = enough[labels]
    if not core.any():
        return core
    grown: Mask = ndimage.binary_dilation(core, CONNECTED, iterations=edge_px, mask=core | perhaps)
    return grown


def _lines(low: Density, high: Density) -> Mask:
    """Return long thin grey lines, including pale ones: edges of coverslips or bubbles."""
    most = (1 - GRAY) * high
    most += LINE_COLOUR
    gray = (low > LINE) & (high - low < most)
    del most
    thin = low - ndimage.grey_opening(low, size=LINE_WIDTH_PX) > LINE
    labels, _ = ndimage.label(gray & thin, CONNECTED)
    lines = np.zeros(low.shape, np.bool_)
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        length = float(np.hypot(*(part.stop - part.start for part in place)))
        if length >= LINE_LONG_PX:
            own = labels[place] == number
            lines[place] |= own & (own.sum() < LINE_AREA * length)  # not a net, such as fat
    found: Mask = ndimage.binary_dilation(lines, CONNECTED, iterations=2) if lines.any() else lines
    return found


def measure_blur(patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the blur of patches, float32 [n], 0 (sharp) to 1 (only slow gradients), from RGB uint8 [n, h, w, 3].

    The blur effect of Crete et al. (2007, doi:10.1117/12.702790): the share of the differences between neighbouring
    pixels that remains when the patch is blurred once more, by a mean of 11 pixels; the larger of both axes. Sharp
    patches lose much of their differences, blurred ones little. NaN for patches of one colour and for those below 12
    pixels.

    The variance of the Laplacian, which is more common, falls with blur and with pale stain alike; this is a share, so
    the strength of the stain cancels out. Sharp patches of tissue score 0.15 to 0.32, with a median of 0.24 (162 of H&E
    and IHC, most at 0.5 um per pixel); blurred by a Gaussian of 1, 2 and 4 pixels, they score 0.31, 0.45 and 0.57. Bare
    glass scores low: its noise is sharp.
    """
    return np.array([_blur(patch) for patch in patches], np.float32)


def _blur(patch: NDArray[np.uint8]) -> float:
    """Return the blur of a patch, computed in integers throughout, so that every machine gets the same."""
    red, green, blue = (patch[..., i].astype(np.uint16) for i in range(3))
    gray = ((77 * red + 150 * green + 29 * blue) >> 8).astype(np.int16)
    return max(_blur_along_rows(gray), _blur_along_rows(gray.T))


def _blur_along_rows(gray: NDArray[np.int16]) -> float:
    """Return the blur along the first axis. Neighbours in a running mean differ by what enters minus what leaves."""
    half = BLUR_PX // 2
    steps = np.abs(gray[half + 1 : -half] - gray[half : -half - 1]) * np.int16(BLUR_PX)
    blurred = np.abs(gray[BLUR_PX:] - gray[:-BLUR_PX])
    total = int(steps.sum(dtype=np.int64))
    return int(np.minimum(steps, blurred).sum(dtype=np.int64)) / total if total else float("nan")


CROSSINGS = 1 << 20  # crossings of an outline with pixel rows in one step: limits the memory
SMALL_PX, SMALL_POINTS = 64, 1 << 8  # pixels of outlines that are filled together


def fill(outline: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels whose centres the outline surrounds, bool [h, w]; (y, x) are in pixels from the corner.

    Each edge adds its direction to the winding number of everything to the right of where it crosses a row of centres
    (half-open, so that a vertex on a row counts once); a pixel is inside if the number is not 0.
    """
    height, width = shape
    start, end = outline, np.roll(outline, -1, axis=0)
    first = _row(np.minimum(start[:, 0], end[:, 0]), height)
    counts = _row(np.maximum(start[:, 0], end[:, 0]), height) - first
    turns = np.zeros(height * (width + 1), np.int32)
    for part in _parts(counts):
        edges = np.repeat(np.arange(part.start, part.stop), counts[part])
        within = np.arange(len(edges)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        rows = first[edges] + within
        (y0, x0), (y1, x1) = start[edges].T, end[edges].T
        x = x0 + (rows + 0.5 - y0) / (y1 - y0) * (x1 - x0)
        columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        np.add.at(turns, rows * (width + 1) + columns, np.where(y1 > y0, 1, -1).astype(np.int32))
    inside: NDArray[np.bool_] = np.cumsum(turns.reshape(height, width + 1)[:, :width], axis=1, dtype=np.int32) != 0
    return inside


def _row(y: NDArray[np.float64], height: int) -> NDArray[np.int64]:
    """Return the first row whose centre is at or below `y`."""
    return np.clip(np.ceil(y - 0.5), 0, height).astype(np.int64)


def _parts(counts: NDArray[np.int64]) -> list[slice]:
    """Return runs of edges with about CROSSINGS crossings each."""
    total = np.cumsum(counts)
    if not total[-1]:
        return []
    steps = np.arange(1, math.ceil(int(total[-1]) / CROSSINGS)) * CROSSINGS
    cuts = sorted({0, *np.searchsorted(total, steps).tolist(), len(counts)})
    return [slice(a, b) for a, b in pairwise(cuts)]


def is_small(outline: NDArray[np.float64], box: Corners) -> bool:
    """Return whether `fill_small` accepts an outline, in a box of pixels."""
    return box[2] - box[0] <= SMALL_PX and box[3] - box[1] <= SMALL_PX and len(outline) <= SMALL_POINTS


def fill_small(placed: Sequence[Placed], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Set the pixels of a mask that small outlines surround, by the rule of `fill`; many take little longer than one.

    Returns whether each outline surrounds the centre of any pixel in its box.
    """
    found = np.zeros(len(placed), np.bool_)
    if not placed:
        return found
    costs = np.cumsum([len(outline) * (box[2] - box[0] + 1) for outline, box in placed])
    cuts = np.unique(np.searchsorted(costs, np.arange(0, int(costs[-1]) + CROSSINGS, CROSSINGS)))
    for start, stop in pairwise(sorted({0, *cuts.tolist(), len(placed)})):
        found[start:stop] = _fill_together(placed[start:stop], mask)
    return found


def _fill_together(placed: Sequence[Placed], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    boxes = np.array([box for _, box in placed])
    corners, (heights, widths) = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).T
    lengths = np.array([len(outline) for outline, _ in placed])
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(placed)), lengths)
    start = np.concatenate([outline for outline, _ in placed]) - corners[owner]
    following = np.arange(1, len(start) + 1)
    following[ends - 1] = ends - lengths
    end = start[following]
    first = np.clip(np.ceil(np.minimum(start[:, 0], end[:, 0]) - 0.5), 0, heights[owner]).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(start[:, 0], end[:, 0]) - 0.5), 0, heights[owner]).astype(np.int64)
    counts = last - first
    edges = np.repeat(np.arange(len(start)), counts)
    rows = first[edges] + np.arange(len(edges)) - np.repeat(np.cumsum(counts) - counts, counts)
    (y0, x0), (y1, x1), of = start[edges].T, end[edges].T, owner[edges]
    columns = np.clip(np.ceil(x0 + (rows + 0.5 - y0) / (y1 - y0) * (x1 - x0) - 0.5), 0, widths[of]).astype(np.int64)
    # One canvas after another, each a column wider than its box: rows end at winding number 0.
    sizes = heights * (widths + 1)
    bases = np.cumsum(sizes) - sizes
    turns = np.zeros(int(sizes.sum()), np.int32)
    np.add.at(turns, bases[of] + rows * (widths[of] + 1) + columns, np.where(y1 > y0, 1, -1).astype(np.int32))
    (inside,) = np.nonzero(np.cumsum(turns, dtype=np.int32))
    of = np.searchsorted(bases, inside, "right") - 1
    y, x = np.divmod(inside - bases[of], widths[of] + 1)
    mask[y + corners[of, 0], x + corners[of, 1]] = True
    hit: NDArray[np.bool_] = np.bincount(of, minlength=len(placed)) > 0
    return hit
