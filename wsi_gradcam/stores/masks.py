"""The tissue mask as a picture that any program opens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wsi_gradcam.stores.files import write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray


def write_mask(path: Path, mask: NDArray[np.bool_]) -> None:
    """Write a bool mask [h, w] as a black and white PNG: white is True."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def read_mask(path: Path) -> NDArray[np.bool_]:
    """The bool mask [h, w] that `write_mask` wrote."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L")) > 127
