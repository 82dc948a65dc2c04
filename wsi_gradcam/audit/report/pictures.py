"""Pictures of the audit's report: example patches, their maps over them, and the slide's overview."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from PIL import Image

from wsi_gradcam.audit.measurements import Patches, record_from
from wsi_gradcam.audit.questions.faithfulness import Faithfulness
from wsi_gradcam.audit.questions.saturation import Saturation
from wsi_gradcam.audit.vocabulary import EDGES, RANDOM
from wsi_gradcam.results.overview import opened_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.folder import Arrays
    from wsi_gradcam.io.paths import StoragePath

FOR_AND_AGAINST = colormaps["RdBu_r"]  # red speaks for the class, blue against it; apart for colour-blind eyes
OPACITY = 0.65
QUANTILE = 0.99
SHOWN = 4  # example patches of a slide
COMPARED = (RANDOM, EDGES)  # controls whose curves stand beside the map's


@dataclass(frozen=True)
class Picture:
    """A PNG file, its size in pixels, and a description for those who do not see it."""

    png: bytes
    width: int
    height: int
    description: str


@dataclass(frozen=True, eq=False)
class Example:
    """An example patch.

    Attributes:
        title: which patch it is.
        rgb: uint8 [h, w, 3].
        map: float32 [h, w] of the first method, as heatmaps show it.
        leaky: the same with a backward that leaks through ReLUs; None where it is not known.
        curves: of deletion and insertion, by the map's name: (deletion [Q], insertion [Q]).
    """

    title: str
    rgb: NDArray[np.uint8]
    map: NDArray[np.float32]
    leaky: NDArray[np.float32] | None
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]

    def pictures(self, scale: float) -> list[Picture]:
        """Return the patch, its map, and where there is one the map with a leaky backward; `scale` as for `overlay`."""
        pictures = [picture(self.rgb, f"{self.title}: the patch")]
        pictures.append(overlay(self.rgb, self.map, scale, f"{self.title}: its map"))
        if self.leaky is not None:
            pictures.append(overlay(self.rgb, self.leaky, scale, f"{self.title}: its map with a leaky backward"))
        return pictures


def examples_of(
    arrays: Arrays, slide: str, method: str, factor: int, classes: Sequence[str], wanted: int = SHOWN
) -> list[Example]:
    """Return example patches of a slide's first batch: those of the highest and the lowest score, and between.

    `factor` is from raw maps to what heatmaps show.
    """
    patches = record_from(Patches, arrays)
    assert patches is not None
    known = np.flatnonzero(patches.readable).tolist()
    order = sorted(known, key=lambda i: (-float(np.nan_to_num(patches.logit[i])), i))
    chosen = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(wanted, len(order)))]
    curves, gradients = record_from(Faithfulness, arrays), record_from(Saturation, arrays)
    of_maps = {} if curves is None else {name: curves.main[name] for name in (method, *COMPARED)}
    leaky = None if gradients is None else gradients.leaky.get(method)
    assert patches.shown is not None
    return [
        Example(
            _title(patches, slide, classes, i),
            patches.shown[i],
            patches.maps[method][i] * np.float32(factor),
            None if leaky is None else leaky[i] * np.float32(factor),
            {name: (one.deletion[i], one.insertion[i]) for name, one in of_maps.items()},
        )
        for i in dict.fromkeys(chosen)
    ]


def _title(patches: Patches, slide: str, classes: Sequence[str], i: int) -> str:
    title = f"{slide}, patch {int(patches.number[i])}"
    if patches.probability is None or patches.explained_class is None:
        return title
    label = classes[int(patches.explained_class[i])]
    return f"{title}, probability of {label} {float(patches.probability[i]):.2f}"


def scale_of(maps: NDArray[np.float32]) -> float:
    """Return the value that is shown in full colour, one for all patches: else healthy tissue would look hot."""
    finite = np.abs(maps[np.isfinite(maps)])
    top = float(np.quantile(finite, QUANTILE)) if len(finite) else 0.0
    return top if top > 0 else 1.0


def overlay(rgb: NDArray[np.uint8], map_: NDArray[np.float32], scale: float, description: str) -> Picture:
    """Return a map [h, w] in colour over the gray patch; what is near 0 stays gray, `scale` has full colour."""
    height, width = rgb.shape[:2]
    large = np.asarray(
        Image.fromarray(np.nan_to_num(map_).astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    )
    value = np.clip(large / scale, -1, 1)
    colour = FOR_AND_AGAINST((value + 1) / 2, bytes=True)[..., :3].astype(np.float32)
    gray = np.repeat(rgb.mean(axis=2, dtype=np.float32)[..., None], 3, axis=2)
    opacity = OPACITY * np.minimum(1, np.abs(value) * 3)[..., None]
    return picture((gray * (1 - opacity) + colour * opacity).round().astype(np.uint8), description)


def colour_scale(scale: float, unit: str) -> Picture:
    """Return the overlays' colours from -`scale` to `scale`, left to right."""
    ramp = FOR_AND_AGAINST(np.linspace(0, 1, 256), bytes=True)[None, :, :3].repeat(10, axis=0)
    description = f"colours from {-scale:.3g} (blue) over 0 (gray) to {scale:.3g} (red), {unit}"
    return picture(np.ascontiguousarray(ramp), description)


def smaller(place: StoragePath, description: str, most_px: int) -> Picture:
    """Return the picture in a file of results, no wider than `most_px`; errors as of `opened_picture`."""
    with opened_picture(place) as image:
        image.thumbnail((most_px, image.height), Image.Resampling.LANCZOS)
        return picture(np.asarray(image.convert("RGB")), description)


def picture(rgb: NDArray[np.uint8], description: str) -> Picture:
    """Return an image uint8 [h, w, 3] as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", optimize=True)
    height, width = rgb.shape[:2]
    return Picture(buffer.getvalue(), width, height, description)
