"""Suspects: each is found where it was put into real tissue, and hardly anywhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Rgb = NDArray[np.uint8]
SIDE = 224


def tiles(shared_data: Path, folder: str, pattern: str) -> Rgb:
    """Patches of 224 px, uint8 [n, 224, 224, 3], of real tissue."""
    found = []
    for path in sorted((shared_data / "tiles" / folder).rglob(pattern)):
        rgb = np.asarray(Image.open(path).convert("RGB"))
        rows, columns = (range(0, size - SIDE + 1, SIDE) for size in rgb.shape[:2])
        found += [rgb[y : y + SIDE, x : x + SIDE] for y in rows for x in columns]
    return np.stack(found)
