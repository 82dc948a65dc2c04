"""Macenko's method: two stains as directions of optical density.

M. Macenko et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009, 1107-1110.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from wsi_gradcam.errors import StainError
from wsi_gradcam.tissue.stain.density import FAINTEST, FEWEST_PX, LIGHT, densities, tissue

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALPHA = 1.0  # per cent of the pixels beyond each of the two directions
STRONGEST = 99.0  # percentile of the concentrations
# Between the two stains. H&E slides have 19 to 45 degrees, tiles of 224 px a median of 16 to 28. One stain alone should
# have none, but noise and JPEG give 2 to 20 (median 11), so that not all of it is found out; at 10 degrees noise is
# enlarged six times, and no picture is worth it.
NARROWEST_DEG = 10.0
LEAST_DENSITY = -0.05  # of a unit stain in any channel; real stains have 0.09 or more
WEAKEST = 0.15  # concentration; slides have 0.5 or more
CHUNK_PX = 1 << 16  # that are changed at once: half the time of a whole batch, which leaves the processor's cache
DIGITS = 6  # that are kept: sums differ in the last bit from machine to machine

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Macenko:
    """How tissue is stained.

    Attributes:
        stains: optical density of (red, green, blue) of haematoxylin and of eosin, a unit of concentration each.
        concentrations: the 99th percentile of each over tissue.
    """

    method: ClassVar[str] = "macenko"

    stains: tuple[Triple, Triple]
    concentrations: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """The stain as plain values."""
        return {
            "method": self.method,
            "stains": [list(stain) for stain in self.stains],
            "concentrations": list(self.concentrations),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Macenko:
        """The stain that `to_json` wrote."""
        first, second = values["stains"]
        haematoxylin, eosin = values["concentrations"]
        return cls((_triple(first), _triple(second)), (float(haematoxylin), float(eosin)))


# The reference values of the common MATLAB implementation (M. Veta), which nearly all others took over.
PUBLISHED = Macenko(((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)), (1.9705, 1.0308))


def measure(rgb: NDArray[np.uint8]) -> Macenko:
    """The stains of pixels, RGB uint8 [n, 3].

    The two directions of largest variance of the densities span the plane of both stains. In it the stains are the
    outermost directions but for `ALPHA` per cent of the pixels. Concentrations are least squares.

    Raises:
        StainError: too little is stained, one stain only, or colours that two stains do not make.
    """
    density = densities(rgb)
    stained = density[(density >= FAINTEST).all(axis=1)]
    if len(stained) < FEWEST_PX:
        raise StainError(f"only {len(stained)} of {len(rgb)} pixels are stained, expected at least {FEWEST_PX}")
    stains = _outermost(stained)
    concentrations = np.percentile(_unmixed(stains, density[tissue(density)]), STRONGEST, axis=0)
    if not (concentrations >= WEAKEST).all():
        weak = ", ".join(f"{value:.3f}" for value in concentrations)
        raise StainError(f"hardly any of one stain: concentrations of {weak}, expected at least {WEAKEST}")
    stains, concentrations = stains.round(DIGITS), concentrations.round(DIGITS)
    return Macenko((_triple(stains[0]), _triple(stains[1])), (float(concentrations[0]), float(concentrations[1])))


def apply(slide: Macenko, target: Macenko, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels RGB uint8 [..., 3] with the target's stains in the slide's concentrations, scaled to the target's.

    Densities become `power @ density`, hence intensities products of powers of the three channels: nine tables of
    256 values, and no logarithm a pixel. Rounded down, as networks' training data were by usual implementations.
    """
    tables, pixels = _tables(slide, target), rgb.reshape(-1, 3)
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


def _tables(slide: Macenko, target: Macenko) -> NDArray[np.float32]:
    """[channel of the result, channel of the slide, value] factors, of which three make a result."""
    scale = np.divide(target.concentrations, slide.concentrations)
    power = np.einsum("sc,s,si->ci", target.stains, scale, np.linalg.pinv(np.transpose(slide.stains)))
    tables: NDArray[np.float64] = np.exp(-power[..., None] * densities(np.arange(256, dtype=np.uint8)))
    tables = np.clip(tables, 1e-12, 1e12)  # so that no product is infinite, or 0 times infinite
    tables[:, 0] *= LIGHT
    return tables.astype(np.float32)


def _outermost(density: NDArray[np.float64]) -> NDArray[np.float64]:
    """Haematoxylin and eosin [2, 3], unit vectors, from densities [n, 3].

    Angles are taken from the mean's direction: from an axis whose sign is chance they would wrap round in places.
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
            f"(nearly) one stain only: its colours differ by {np.degrees(high - low):.1f} degrees of optical density, "
            f"expected at least {NARROWEST_DEG:g}"
        )
    ends = middle * np.exp(1j * np.array([low, high]))
    stains = np.outer(ends.real, along) + np.outer(ends.imag, across)
    if stains.min() < LEAST_DENSITY:
        raise StainError(
            f"its colours are not those of two stains: one would have the optical density {stains.min():.2f}, "
            f"expected at least {LEAST_DENSITY:g}; is there ink, or no tissue?"
        )
    return stains[np.argsort(-stains[:, 0])]  # haematoxylin absorbs red


def _unmixed(stains: NDArray[np.float64], density: NDArray[np.float64]) -> NDArray[np.float64]:
    """Concentrations [n, 2] that explain densities [n, 3] best."""
    result: NDArray[np.float64] = np.einsum("si,ni->ns", np.linalg.pinv(stains.T), density)
    return result


def _triple(values: Any) -> Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third
