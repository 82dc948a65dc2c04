"""Stain normalisation: a slide's stain, found once on its tissue, and pixels as if stained like a target.

Networks that were trained on normalised patches expect them. Usual libraries find the stain of each patch anew, so
that a patch of one stain alone, or of little tissue, comes out strangely, and two patches that overlap differ; here a
slide has one stain, and each pixel of it is changed alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import StainError
from wsi_gradcam.tissue.stain import macenko, reinhard
from wsi_gradcam.tissue.stain.macenko import Macenko
from wsi_gradcam.tissue.stain.reinhard import Reinhard

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PUBLISHED", "Macenko", "Reinhard", "Stain", "StainFit", "apply", "fit", "measure", "stain_from_json"]

Stain = Macenko | Reinhard

# Where a model file names a method only.
PUBLISHED: dict[str, Stain] = {"macenko": macenko.PUBLISHED, "reinhard": reinhard.PUBLISHED}


@dataclass(frozen=True)
class StainFit:
    """What changes a slide's pixels: its own stain and the target's, of the same method. Plain numbers."""

    slide: Stain
    target: Stain

    def to_json(self) -> dict[str, Any]:
        """The fit as plain values."""
        return {"slide": self.slide.to_json(), "target": self.target.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StainFit:
        """The fit that `to_json` wrote; other values raise KeyError or TypeError."""
        return cls(stain_from_json(values["slide"]), stain_from_json(values["target"]))


def stain_from_json(values: dict[str, Any]) -> Stain:
    """The stain that its `to_json` wrote; other values raise KeyError or TypeError."""
    kinds: dict[str, type[Stain]] = {"macenko": Macenko, "reinhard": Reinhard}
    return kinds[values["method"]].from_json(values)


def measure(rgb: NDArray[np.uint8], method: str) -> Stain:
    """The stain of pixels, RGB uint8 [n, 3]; glass among them is left out.

    Raises:
        StainError: they do not show one that can be measured.
    """
    return macenko.measure(rgb) if method == "macenko" else reinhard.measure(rgb)


def fit(rgb: NDArray[np.uint8], target: Stain, name: str) -> StainFit:
    """What makes tissue of a slide, RGB uint8 [n, 3], look like the target.

    Raises:
        StainError: the tissue's stain cannot be measured; the message begins with `name`, the slide's.
    """
    try:
        return StainFit(measure(rgb, target.method), target)
    except StainError as error:
        raise StainError(
            f"{name}: its stain cannot be normalised by {target.method}: {error}; leave this slide out, or explain it "
            "with a model file that says 'stain: none'"
        ) from error


def apply(fit: StainFit, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels of the slide, RGB uint8 [..., 3], as if stained like the target.

    A pixel's result depends on the pixel alone. Macenko's method leaves glass white, Reinhard's may tint it.
    """
    if isinstance(fit.slide, Macenko) and isinstance(fit.target, Macenko):
        return macenko.apply(fit.slide, fit.target, rgb)
    assert isinstance(fit.slide, Reinhard)
    assert isinstance(fit.target, Reinhard)
    return reinhard.apply(fit.slide, fit.target, rgb)
