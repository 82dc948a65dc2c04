"""Reinhard's method: mean and deviation of each channel of a perceptual colour space.

E. Reinhard et al., Color transfer between images, IEEE Computer Graphics and Applications 21(5), 2001, 34-41. They
took l-alpha-beta; pathology's implementations, and the networks trained with them, take CIE L*a*b* (sRGB, D65).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageFilter
from skimage.color import rgb2lab, xyz2rgb

from wsi_gradcam.errors import StainError
from wsi_gradcam.tissue.stain.density import FEWEST_PX, densities, tissue

if TYPE_CHECKING:
    from numpy.typing import NDArray

NODES = 65  # of the look-up table, along each of red, green and blue: Pillow's most
# Of L*, a* and b*: less is the camera's noise (0.4 on gray), not to be enlarged to a stain's contrast. Slides have 3 or
# more, the plainest tile of 1024 px has 1.
LEAST_DEVIATION = 0.5
DIGITS = 6
WHITE = (0.95047, 1.0, 1.08883)  # X, Y, Z of D65
KNEE = 6 / 29  # of the cube root; below it L*a*b* is linear

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Reinhard:
    """Mean and standard deviation of L* (0 to 100), a* and b* over tissue."""

    method: ClassVar[str] = "reinhard"

    mean: Triple
    std: Triple

    def to_json(self) -> dict[str, Any]:
        """The stain as plain values."""
        return {"method": self.method, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Reinhard:
        """The stain that `to_json` wrote."""
        return cls(_triple(values["mean"]), _triple(values["std"]))


# Over 50,000 tiles of 450 H&E slides of the TCGA: the preset `reinhard_fast`, v3, of Slideflow (J. M. Dolezal et al.,
# Slideflow: deep learning for digital histopathology with real-time whole-slide visualization, BMC Bioinformatics 25,
# 134, 2024).
PUBLISHED = Reinhard((58.12343, 26.483482, -12.701005), (14.675022, 7.5744166, 5.226378))


def measure(rgb: NDArray[np.uint8]) -> Reinhard:
    """Mean and deviation of the tissue among pixels, RGB uint8 [n, 3].

    Raises:
        StainError: too little tissue, or all of it of one colour.
    """
    pixels = rgb[tissue(densities(rgb))]
    if len(pixels) < FEWEST_PX:
        raise StainError(f"only {len(pixels)} of {len(rgb)} pixels are stained, expected at least {FEWEST_PX}")
    lab = rgb2lab(pixels)
    mean, std = _triple(lab.mean(axis=0).round(DIGITS)), _triple(lab.std(axis=0).round(DIGITS))
    if min(std) < LEAST_DEVIATION:
        found = ", ".join(f"{value:.2f}" for value in std)
        raise StainError(
            f"it is (nearly) of one colour: L*, a* and b* deviate by {found}, expected at least {LEAST_DEVIATION:g}"
        )
    return Reinhard(mean, std)


def apply(slide: Reinhard, target: Reinhard, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels RGB uint8 [..., 3] with the target's mean and deviation, through a table that is interpolated."""
    width = rgb.shape[-2]
    rows = Image.fromarray(np.ascontiguousarray(rgb).reshape(-1, width, 3))
    return np.asarray(rows.filter(_look_up(slide, target))).reshape(rgb.shape)


@lru_cache(maxsize=4)
def _look_up(slide: Reinhard, target: Reinhard) -> ImageFilter.Color3DLUT:
    blue, green, red = np.meshgrid(*[np.linspace(0.0, 1.0, NODES)] * 3, indexing="ij")  # red runs fastest
    changed = exactly(slide, target, np.stack([red, green, blue], axis=-1))
    return ImageFilter.Color3DLUT(NODES, changed.ravel())


def exactly(slide: Reinhard, target: Reinhard, rgb: NDArray[Any]) -> NDArray[np.float64]:
    """What `apply` interpolates: RGB 0 to 1 from RGB uint8, or of 0 to 1 [..., 3]."""
    scale = np.divide(target.std, slide.std)
    lightness, a, b = np.moveaxis((rgb2lab(rgb) - slide.mean) * scale + target.mean, -1, 0)
    y = (lightness + 16) / 116
    roots = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = np.where(roots > KNEE, roots**3, (roots - 4 / 29) * 3 * KNEE**2) * WHITE
    result: NDArray[np.float64] = xyz2rgb(xyz)
    return result


def _triple(values: Any) -> Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third
