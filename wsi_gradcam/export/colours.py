"""The colours of heatmap values: a colour map over a window, above a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.results.heatmap import EXPLAINED

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

STEPS = 256
GRAY = "gray"
FADE = 0.25  # the share of the window over which colours reach their full opacity


@dataclass(frozen=True)
class Colouring:
    """A mapping of values to colours.

    Attributes:
        colormap: a name that matplotlib knows.
        low, high: the window; values below and above get the first and the last colour.
        threshold: lower values are not shown; None shows all.
        alpha: opacity of shown values, 0 to 1; without a threshold, of values in the window's upper three quarters.
    """

    colormap: str
    low: float
    high: float
    threshold: float | None = None
    alpha: float = 1.0

    @property
    def table(self) -> NDArray[np.uint8]:
        """Return the colour map, RGB uint8 [256, 3]."""
        return np.asarray(check_colormap(self.colormap)(np.arange(STEPS), bytes=True)[:, :3], np.uint8)

    def steps(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the index of each value in the colour map: the window is divided into 256 equal steps."""
        with np.errstate(over="ignore"):  # values far outside the window
            scaled = (values - np.float32(self.low)) * np.float32(STEPS / (self.high - self.low))
        return np.asarray(np.clip(scaled, 0, STEPS - 1), np.uint8)

    def shown(self, values: NDArray[np.float32], flags: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return True where pixels were explained and their values reach the threshold."""
        explained = (flags & EXPLAINED) > 0
        return explained if self.threshold is None else explained & (values >= np.float32(self.threshold))

    def rgb(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the colours [h, w, 3] of all values, shown or not."""
        return np.asarray(self.table[self.steps(values)], np.uint8)

    def rgba(self, values: NDArray[np.float32], flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return colours and opacity [h, w, 4]; all zeros where nothing is shown."""
        out = np.zeros((*values.shape, 4), np.uint8)
        shown = self.shown(values, flags)
        out[shown, :3] = self.rgb(values[shown])
        out[shown, 3] = self._opacity(values[shown])
        return out

    def _opacity(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return opacities; without a threshold they grow over the window's lowest part: tissue stays visible."""
        if self.threshold is not None:
            return np.full(values.shape, round(255 * self.alpha), np.uint8)
        share = np.clip((values - np.float32(self.low)) / np.float32((self.high - self.low) * FADE), 0, 1)
        return np.asarray(np.rint(share * np.float32(255 * self.alpha)), np.uint8)

    def gray(self, values: NDArray[np.float32], flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return gray levels [h, w]: 1 to 255 over the window, 0 where nothing is shown."""
        return np.where(self.shown(values, flags), np.maximum(self.steps(values), 1), 0).astype(np.uint8)


def check_colormap(name: str) -> Colormap:
    """Return the colour map of matplotlib with a name.

    Raises:
        ConfigError: there is no such colour map.
    """
    if name not in colormaps:
        near = get_close_matches(name.lower(), list(colormaps), 3)
        mend = f"did you mean {' or '.join(near)}?" if near else "expected one of matplotlib's, such as inferno, gray"
        raise ConfigError(f"colormap {name!r} is not known; {mend}")
    return colormaps[name]
