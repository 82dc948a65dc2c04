"""Where in a patch there is what should not decide: ink, bare glass, blur, and the border that sees padding.

Masks for `shortcuts`. Colours are judged at the resolution at which the rules were measured, about
8 um per pixel; edges of masks are as coarse. Rulers, folds and other things are given as masks by who knows of them.

Folds are not looked for: what is published compares saturation and intensity with the rest of a whole slide (Kothari
2013, 10.4103/2153-3539.117448; it finds half of them). Within a patch, with a threshold that 1 in 100 pixels of flat
tissue reaches, less than a fifth of doubled tissue was found, and none of another laboratory's.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from wsi_gradcam.audit.measures.shortcuts import border
from wsi_gradcam.tissue.masks import HIGHEST, MASK_MPP
from wsi_gradcam.tissue.quality import measure_blur, pen_mask

Rgb = NDArray[np.uint8]
Masks = NDArray[np.bool_]

PEN, GLASS, BLUR, BORDER = "pen", "glass", "blur", "border"
SUSPECTS = (PEN, GLASS, BLUR, BORDER)
GIVEN = " (given)"  # ends the names of suspects that somebody has drawn
_IN_WORDS = {PEN: "ink", GLASS: "bare glass", BLUR: "what is blurred", BORDER: "the patch's border"}

WINDOWS = 4  # a side: what is blurred is told for windows of a quarter of the patch
SMALLEST_WINDOW_PX = 24
# Of windows of 56 px of sharp tissue (four sources, two magnifications) at most 0.1 % are above; of those blurred by a
# Gaussian of 3 px 9 in 10 are, of 2 px about half. Nearly flat windows tell nothing, and count as sharp.
BLURRED = 0.45
BORDER_SHARE = 1 / 14  # of the side: half a cell of 7 x 7
SMALLEST_PEN_PX, PEN_EDGE_PX = 4, 2  # of 8 um: farther from the stroke, tissue beside it would be taken for its edge


def in_words(suspect: str) -> str:
    """What a suspect is called in a sentence.

    >>> in_words("pen"), in_words("ruler (given)")
    ('ink', 'ruler')
    """
    return _IN_WORDS.get(suspect, suspect.removesuffix(GIVEN))


def suspects(rgb: Rgb, mpp: float, glass: tuple[int, int, int] = (255, 255, 255)) -> dict[str, Masks]:
    """Masks bool [P, h, w] by the names in `SUSPECTS`, of patches uint8 [P, h, w, 3]; they may overlap.

    Args:
        mpp: micrometres per pixel of the patches.
        glass: the colour of the slide's bare glass, see `wsi_gradcam.tissue.masks.glass_colour`.
    """
    size, side = (rgb.shape[1], rgb.shape[2]), max(1, round(MASK_MPP / mpp))
    coarse = block_means(rgb, side)
    pen = np.stack([pen_mask(patch, SMALLEST_PEN_PX, PEN_EDGE_PX) for patch in coarse])
    bare = glass_of(coarse, glass)
    large = partial(spread_out, side=side, size=size)
    return {
        PEN: large(pen),
        GLASS: large(bare & ~pen),
        BLUR: blurred_windows(rgb) & ~large(bare),
        BORDER: np.broadcast_to(border(size, max(1, round(BORDER_SHARE * min(size)))), rgb.shape[:3]),
    }


def glass_of(rgb: Rgb, glass: tuple[int, int, int]) -> Masks:
    """Where all channels are as near to `glass` as bare glass is, bool [...], of RGB uint8 [..., 3]."""
    difference = np.abs(rgb.astype(np.int16) - np.array(glass, np.int16)).max(axis=-1)
    near: Masks = difference <= HIGHEST * 255
    return near


def blurred_windows(rgb: Rgb) -> Masks:
    """Return the windows of a quarter of the side that `tissue.quality.measure_blur` finds blurred, bool [P, h, w]."""
    height, width = rgb.shape[1:3]
    windows = max(1, min(WINDOWS, min(height, width) // SMALLEST_WINDOW_PX))
    found = np.zeros(rgb.shape[:3], np.bool_)
    for y in range(windows):
        for x in range(windows):
            rows, columns = _part(height, y, windows), _part(width, x, windows)
            blur = measure_blur(np.ascontiguousarray(rgb[:, rows, columns]))
            found[:, rows, columns] = (blur > BLURRED)[:, None, None]
    return found


def block_means(rgb: Rgb, side: int) -> Rgb:
    """Means of blocks of `side` pixels, uint8 [P, ceil(h / side), ceil(w / side), 3]; the last pixel repeats."""
    height, width = rgb.shape[1:3]
    padded = np.pad(rgb, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    blocks = padded.reshape(len(rgb), padded.shape[1] // side, side, padded.shape[2] // side, side, 3)
    means: Rgb = blocks.mean(axis=(2, 4), dtype=np.float32).round().astype(np.uint8)
    return means


def spread_out(masks: Masks, side: int, size: tuple[int, int]) -> Masks:
    """Masks [P, h, w] of blocks of `side` pixels, for patches of `size`."""
    large: Masks = masks.repeat(side, axis=1).repeat(side, axis=2)[:, : size[0], : size[1]]
    return large


def _part(size: int, number: int, parts: int) -> slice:
    return slice(size * number // parts, size * (number + 1) // parts)
