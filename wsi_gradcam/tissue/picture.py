"""A picture by which a person can check what is taken for tissue, ink and shadow, and what is left out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage

from wsi_gradcam.io.local import write_atomic
from wsi_gradcam.slides import thumbnail
from wsi_gradcam.tissue.masks import slide_masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides import Slide
    from wsi_gradcam.tissue.annotations import Regions

# Apart from stains and from each other, for colour-blind eyes too (Okabe and Ito).
OUTLINE, PEN, SHADOW = (0, 158, 115), (230, 159, 0), (86, 180, 233)
EXCLUDED = (60, 60, 60)
OPACITY = 0.65
SIDE_PX = 1600  # of the picture, at most: it fits a screen and shows a nucleus of a small biopsy


def write_mask_picture(
    path: Path, slide: Slide, tissue: str = "auto", regions: Regions | None = None
) -> dict[str, float]:
    """Write the slide's thumbnail as PNG: tissue to be explained outlined in green, ink orange, shadows blue.

    What lies outside of the regions is dark gray.

    Returns:
        Shares of the slide: `tissue` (to be explained), `pen`, `shadow`, `excluded`.

    Raises:
        MppError: the slide's mpp is not known.
        SlideReadError: most of the slide cannot be decoded.
        AnnotationError: the regions cannot be understood.
        StoreError: the picture cannot be written.
    """
    rgb = thumbnail(slide, min(slide.info.mpp_yx), SIDE_PX).rgb
    masks = slide_masks(slide)
    mask, excluded = masks.counted(tissue), np.zeros_like(masks.tissue)
    if regions is not None:
        excluded = ~regions.mask((slide.info.height, slide.info.width), mask.shape)
        mask = mask & ~excluded
    for where, colour in ((masks.shadow, SHADOW), (masks.pen, PEN), (excluded, EXCLUDED)):
        tinted = _enlarged(where, rgb.shape)
        rgb[tinted] = (rgb[tinted] * (1 - OPACITY) + np.array(colour) * OPACITY).astype(np.uint8)
    rgb[_border(_enlarged(mask, rgb.shape))] = OUTLINE
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())
    found = {"tissue": mask, "pen": masks.pen, "shadow": masks.shadow, "excluded": excluded}
    return {name: float(where.mean()) for name, where in found.items()}


def _enlarged(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask at the picture's size, each pixel the nearest of the mask's."""
    rows, columns = ((np.arange(size) + 0.5) * of // size for size, of in zip(shape[:2], mask.shape, strict=True))
    enlarged: NDArray[np.bool_] = mask[rows.astype(int)[:, None], columns.astype(int)]
    return enlarged


def _border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels round the mask, at the edge of the picture the mask's own."""
    thick = 1 + max(mask.shape) // 800
    border: NDArray[np.bool_] = ndimage.binary_dilation(mask, iterations=thick) & ~mask
    inner = np.zeros_like(mask)
    inner[thick:-thick, thick:-thick] = True
    return border | (mask & ~inner)
