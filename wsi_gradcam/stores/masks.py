"""The tissue mask as a picture that any program opens."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wsi_gradcam.stores.places import AnyPlace, place_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


def write_mask(place: AnyPlace, mask: NDArray[np.bool_]) -> None:
    """Write a bool mask [h, w] as a black and white PNG: white is True."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(buffer, format="PNG")
    place_of(place).write(buffer.getvalue())


def read_mask(place: AnyPlace) -> NDArray[np.bool_]:
    """The bool mask [h, w] that `write_mask` wrote."""
    with Image.open(io.BytesIO(place_of(place).read())) as image:
        return np.asarray(image.convert("L")) > 127
