"""Example patches of the audit's report: what the model saw, and the map over it, as pictures in the page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from PIL import Image

from wsi_gradcam.pages.parts import Html, text

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOR_AND_AGAINST = colormaps["RdBu_r"]  # red speaks for the class, blue against it; apart for colour-blind eyes
OPACITY = 0.65
QUANTILE = 0.99


def scale_of(maps: NDArray[np.float32]) -> float:
    """The size of a value that is shown in full colour, one for all patches: else healthy tissue would look hot."""
    finite = np.abs(maps[np.isfinite(maps)])
    top = float(np.quantile(finite, QUANTILE)) if len(finite) else 0.0
    return top if top > 0 else 1.0


def patch_picture(rgb: NDArray[np.uint8], said: str) -> Html:
    """A patch as the model saw it."""
    return _image(rgb, said)


def overlay(rgb: NDArray[np.uint8], map_: NDArray[np.float32], scale: float, said: str) -> Html:
    """A map [h, w] in colour over the gray patch; what is near 0 stays gray."""
    height, width = rgb.shape[:2]
    large = np.asarray(
        Image.fromarray(np.nan_to_num(map_).astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    )
    value = np.clip(large / scale, -1, 1)
    colour = FOR_AND_AGAINST((value + 1) / 2, bytes=True)[..., :3].astype(np.float32)
    gray = np.repeat(rgb.mean(axis=2, dtype=np.float32)[..., None], 3, axis=2)
    opacity = OPACITY * np.minimum(1, np.abs(value) * 3)[..., None]
    return _image((gray * (1 - opacity) + colour * opacity).round().astype(np.uint8), said)


def legend(scale: float, unit: str) -> Html:
    """The colours with their values."""
    ramp = FOR_AND_AGAINST(np.linspace(0, 1, 256), bytes=True)[None, :, :3].repeat(10, axis=0)
    said = f"colours from {-scale:.3g} (blue) over 0 (gray) to {scale:.3g} (red), {unit}"
    picture = _image(np.ascontiguousarray(ramp), said, "scale")
    return Html(f"{picture}<p>{text(f'blue, against: {-scale:.3g}; gray: 0; red, for: {scale:.3g} ({unit})')}</p>")


def smaller(data: bytes, said: str, most_px: int) -> Html:
    """A picture of a file, no wider than `most_px`."""
    with Image.open(io.BytesIO(data)) as picture:
        picture.thumbnail((most_px, picture.height), Image.Resampling.LANCZOS)
        return _image(np.asarray(picture.convert("RGB")), said, "overview")


def _image(rgb: NDArray[np.uint8], said: str, kind: str = "") -> Html:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height, width = rgb.shape[:2]
    shape = f' class="{kind}"' if kind else ""
    return Html(f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{text(said)}"{shape}>')
