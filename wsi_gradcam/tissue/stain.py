"""Stain normalisation: a slide's stain is measured once on its tissue, and pixels change as if stained like a target.

Networks that were trained on normalised patches expect them. Most libraries measure the stain of each patch separately,
so that a patch with only one stain, or with little tissue, comes out strangely, and two overlapping patches differ;
here a slide has one stain, and all its pixels are changed alike.

Macenko's method: two stains as directions of optical density.
M. Macenko et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009, 1107-1110.

Reinhard's method: mean and deviation of each channel of a perceptual colour space. E. Reinhard et al., Color transfer
between images, IEEE Computer Graphics and Applications 21(5), 2001, 34-41. They used l-alpha-beta; implementations for
pathology, and the networks trained with them, use CIE L*a*b* (sRGB, D65).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageFilter
from skimage.color import rgb2lab, xyz2rgb

from wsi_gradcam.errors import StainError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Triple = tuple[float, float, float]

LIGHT = 240.0  # of the incident light, in grey levels, as in the implementations that networks are trained with
FAINTEST = 0.15  # density, Macenko's beta: glass with its noise and dirt is below it
FEWEST_PX = 1000  # fewer pixels do not give a reliable percentile
DIGITS = 6  # decimals that are kept: sums differ in the last bit from machine to machine

# Macenko's method.
ALPHA = 1.0  # per cent of the pixels beyond each of the two directions
STRONGEST = 99.0  # percentile of the concentrations
# Angle between the two stains. H&E slides have 19 to 45 degrees, tiles of 224 px a median of 16 to 28. A single stain
# should have none, but noise and JPEG give 2 to 20 (median 11), so that not every such slide is detected; at 10
# degrees, noise is amplified six times, and no picture is usable.
NARROWEST_DEG = 10.0
LEAST_DENSITY = -0.05  # density of a unit stain in any channel; real stains have 0.09 or more
WEAKEST = 0.15  # concentration; slides have 0.5 or more
CHUNK_PX = 1 << 16  # pixels at once: half the time of a whole batch

# Reinhard's method.
NODES = 65  # size of the look-up table along each of red, green and blue: Pillow's maximum
# Deviation of L*, a* and b*: less is the camera's noise (0.4 on grey), which must not be amplified to a stain's
# contrast. Slides have 3 or more, the plainest tile of 1024 px has 1.
LEAST_DEVIATION = 0.5
WHITE = (0.95047, 1.0, 1.08883)  # X, Y, Z of D65
KNEE = 6 / 29  # of the cube root; below it L*a*b* is linear


def densities(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return optical densities -ln((value + 1) / 240) of values 0 to 255; additive over stains (Beer and Lambert)."""
    result: NDArray[np.float64] = -np.log((np.arange(256) + 1.0) / LIGHT)[rgb]
    return result


def is_tissue(density: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which pixels [n, 3] are not glass, bool [n]: some channel is absorbed. Pale eosin does not affect red."""
    return np.asarray((density >= FAINTEST).any(axis=1))


@dataclass(frozen=True)
class Macenko:
    """Two stains of tissue.

    Attributes:
        stains: optical density of (red, green, blue) of haematoxylin and of eosin, a unit of concentration each.
        concentrations: the 99th percentile of each over tissue.
    """

    method: ClassVar[str] = "macenko"

    stains: tuple[Triple, Triple]
    concentrations: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return the stain as plain values."""
        return {
            "method": self.method,
            "stains": [list(stain) for stain in self.stains],
            "concentrations": list(self.concentrations),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Macenko:
        """Return the stain that `to_json` wrote."""
        first, second = values["stains"]
        haematoxylin, eosin = values["concentrations"]
        return cls((_triple(first), _triple(second)), (float(haematoxylin), float(eosin)))

    @classmethod
    def measure(cls, rgb: NDArray[np.uint8]) -> Macenko:
        """Return the stains of pixels, RGB uint8 [n, 3].

        The two directions of largest variance of the densities span the plane of both stains. In this plane, the stains
        are the outermost directions, ignoring `ALPHA` per cent of the pixels. Concentrations are by least squares.

        Raises:
            StainError: too little is stained, there is only one stain, or two stains do not produce these colours.
        """
        density = densities(rgb)
        stained = density[(density >= FAINTEST).all(axis=1)]
        if len(stained) < FEWEST_PX:
            raise StainError(f"only {len(stained)} of {len(rgb)} pixels are stained, expected at least {FEWEST_PX}")
        stains = _outermost(stained)
        concentrations = np.percentile(_unmixed(stains, density[is_tissue(density)]), STRONGEST, axis=0)
        if not (concentrations >= WEAKEST).all():
            weak = ", ".join(f"{value:.3f}" for value in concentrations)
            raise StainError(f"one stain is nearly absent: concentrations of {weak}, expected at least {WEAKEST}")
        stains, concentrations = stains.round(DIGITS), concentrations.round(DIGITS)
        return cls((_triple(stains[0]), _triple(stains[1])), (float(concentrations[0]), float(concentrations[1])))

    def apply(self, target: Macenko, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return pixels RGB uint8 [..., 3] with the target's stains, their concentrations scaled to the target's.

        Densities become `power @ density`, so intensities are products of powers of the three channels: nine tables of
        256 values, and no logarithm per pixel. Results are rounded down, as in the training data of most networks.
        """
        tables, pixels = _tables(self, target), rgb.reshape(-1, 3)
        result = np.empty_like(pixels)
        for start in range(0, len(pixels), CHUNK_PX):
            part = slice(start, start + CHUNK_PX)
            channels = [np.ascontiguousarray(pixels[part, i]) for i in range(3)]
            for i in range(3):
                value = np.take(tables[i, 0], channels[0])
                value *= np.take(tables[i, 1], channels[1])
                value *= np.take(tables[i, 2], channels[2])
                result[part, i] = np.minimum(value, 255.0, out=value)
        return result.reshape(rgb.shape)


@lru_cache(maxsize=4)
def _tables(slide: Macenko, target: Macenko) -> NDArray[np.float32]:
    """Return factors [channel of the result, channel of the slide, value]; three of them make a result."""
    scale = np.divide(target.concentrations, slide.concentrations)
    power = np.einsum("sc,s,si->ci", target.stains, scale, np.linalg.pinv(np.transpose(slide.stains)))
    tables: NDArray[np.float64] = np.exp(-power[..., None] * densities(np.arange(256, dtype=np.uint8)))
    tables = np.clip(tables, 1e-12, 1e12)  # so that no product is infinite, or 0 times infinite
    tables[:, 0] *= LIGHT
    return tables.astype(np.float32)


def _outermost(density: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return haematoxylin and eosin [2, 3], unit vectors, from densities [n, 3].

    Angles are measured from the mean's direction: from an axis with a random sign, they would sometimes wrap around.
    """
    centred = density - density.mean(axis=0)
    # einsum, not BLAS: its sums do not depend on the number of threads
    _, axes = np.linalg.eigh(np.einsum("ni,nj->ij", centred, centred))
    across, along = axes[:, 1], axes[:, 2]
    places = np.einsum("ni,i->n", density, along) + 1j * np.einsum("ni,i->n", density, across)
    middle = places.mean() / abs(places.mean())
    low, high = np.percentile(np.angle(places * middle.conjugate()), (ALPHA, 100 - ALPHA))
    if not np.degrees(high - low) >= NARROWEST_DEG:
        raise StainError(
            f"(nearly) a single stain: its colours differ by {np.degrees(high - low):.1f} degrees of optical density, "
            f"expected at least {NARROWEST_DEG:g}"
        )
    ends = middle * np.exp(1j * np.array([low, high]))
    stains = np.outer(ends.real, along) + np.outer(ends.imag, across)
    if stains.min() < LEAST_DENSITY:
        raise StainError(
            f"its colours are not those of two stains: one would have the optical density {stains.min():.2f}, "
            f"expected at least {LEAST_DENSITY:g}; is there ink, or too little tissue?"
        )
    return stains[np.argsort(-stains[:, 0])]  # haematoxylin absorbs red


def _unmixed(stains: NDArray[np.float64], density: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the concentrations [n, 2] that best explain densities [n, 3]."""
    result: NDArray[np.float64] = np.einsum("si,ni->ns", np.linalg.pinv(stains.T), density)
    return result


@dataclass(frozen=True)
class Reinhard:
    """Mean and standard deviation of L* (0 to 100), a* and b* over tissue."""

    method: ClassVar[str] = "reinhard"

    mean: Triple
    std: Triple

    def to_json(self) -> dict[str, Any]:
        """Return the stain as plain values."""
        return {"method": self.method, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Reinhard:
        """Return the stain that `to_json` wrote."""
        return cls(_triple(values["mean"]), _triple(values["std"]))

    @classmethod
    def measure(cls, rgb: NDArray[np.uint8]) -> Reinhard:
        """Return the mean and deviation of the tissue among pixels, RGB uint8 [n, 3].

        Raises:
            StainError: there is too little tissue, or all of it has one colour.
        """
        pixels = rgb[is_tissue(densities(rgb))]
        if len(pixels) < FEWEST_PX:
            raise StainError(f"only {len(pixels)} of {len(rgb)} pixels are stained, expected at least {FEWEST_PX}")
        lab = rgb2lab(pixels)
        mean, std = _triple(lab.mean(axis=0).round(DIGITS)), _triple(lab.std(axis=0).round(DIGITS))
        if min(std) < LEAST_DEVIATION:
            found = ", ".join(f"{value:.2f}" for value in std)
            raise StainError(
                f"it has (nearly) a single colour: L*, a* and b* deviate by {found}, expected at least "
                f"{LEAST_DEVIATION:g}"
            )
        return cls(mean, std)

    def apply(self, target: Reinhard, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return pixels RGB uint8 [..., 3] with the target's mean and deviation, interpolated in a table."""
        width = rgb.shape[-2]
        rows = Image.fromarray(np.ascontiguousarray(rgb).reshape(-1, width, 3))
        return np.asarray(rows.filter(_lookup_table(self, target))).reshape(rgb.shape)


@lru_cache(maxsize=4)
def _lookup_table(slide: Reinhard, target: Reinhard) -> ImageFilter.Color3DLUT:
    blue, green, red = np.meshgrid(*[np.linspace(0.0, 1.0, NODES)] * 3, indexing="ij")  # red runs fastest
    changed = reinhard_exact(slide, target, np.stack([red, green, blue], axis=-1))
    return ImageFilter.Color3DLUT(NODES, changed.ravel())


def reinhard_exact(slide: Reinhard, target: Reinhard, rgb: NDArray[Any]) -> NDArray[np.float64]:
    """Return the exact values that `Reinhard.apply` interpolates: RGB 0 to 1 from RGB uint8 or 0 to 1, [..., 3]."""
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


Stain = Macenko | Reinhard
KINDS: dict[str, type[Stain]] = {"macenko": Macenko, "reinhard": Reinhard}

# The reference values of the common MATLAB implementation (M. Veta), which nearly all others adopted.
PUBLISHED_MACENKO = Macenko(((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)), (1.9705, 1.0308))
# Over 50,000 tiles of 450 H&E slides of the TCGA: the preset `reinhard_fast`, v3, of Slideflow (J. M. Dolezal et al.,
# Slideflow: deep learning for digital histopathology with real-time whole-slide visualization, BMC Bioinformatics 25,
# 134, 2024).
PUBLISHED_REINHARD = Reinhard((58.12343, 26.483482, -12.701005), (14.675022, 7.5744166, 5.226378))
# For model files that name a method only.
PUBLISHED: dict[str, Stain] = {"macenko": PUBLISHED_MACENKO, "reinhard": PUBLISHED_REINHARD}


@dataclass(frozen=True)
class StainFit:
    """A slide's own stain and the target's, by the same method: they determine how pixels change. Plain numbers."""

    slide: Stain
    target: Stain

    def to_json(self) -> dict[str, Any]:
        """Return the fit as plain values."""
        return {"slide": self.slide.to_json(), "target": self.target.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StainFit:
        """Return the fit that `to_json` wrote; other values raise KeyError or TypeError."""
        return cls(stain_from_json(values["slide"]), stain_from_json(values["target"]))


def stain_from_json(values: dict[str, Any]) -> Stain:
    """Return the stain that its `to_json` wrote; other values raise KeyError or TypeError."""
    return KINDS[values["method"]].from_json(values)


def measure(rgb: NDArray[np.uint8], method: str) -> Stain:
    """Return the stain of pixels, RGB uint8 [n, 3]; glass among them is ignored.

    Raises:
        StainError: they do not show a stain that can be measured.
    """
    return KINDS[method].measure(rgb)


def fit(rgb: NDArray[np.uint8], target: Stain, name: str) -> StainFit:
    """Return the fit that makes a slide's tissue, RGB uint8 [n, 3], look like the target.

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
    """Return pixels of the slide, RGB uint8 [..., 3], as if stained like the target.

    A pixel's result depends only on that pixel. Macenko's method leaves glass white, Reinhard's may tint it.
    """
    if isinstance(fit.slide, Macenko) and isinstance(fit.target, Macenko):
        return fit.slide.apply(fit.target, rgb)
    assert isinstance(fit.slide, Reinhard)
    assert isinstance(fit.target, Reinhard)
    return fit.slide.apply(fit.target, rgb)
