"""Optical density, and which pixels are tissue by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIGHT = 240.0  # of the lamp, in gray levels, as in the implementations that networks are trained with
FAINTEST = 0.15  # density, Macenko's beta: glass with its noise and dirt lies below
FEWEST_PX = 1000  # fewer pixels give no percentile that can be relied on


def densities(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Optical density -ln((value + 1) / 240) of values 0 to 255; additive over stains (Beer and Lambert)."""
    result: NDArray[np.float64] = -np.log((np.arange(256) + 1.0) / LIGHT)[rgb]
    return result


def tissue(density: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which pixels [n, 3] are no glass: some channel is absorbed. Pale eosin leaves red as it is."""
    return np.asarray((density >= FAINTEST).any(axis=1))
