"""Where overlapping patches disagree: the same tissue seen in another frame should be explained alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.results.stitch import GROUP, Blender, Enlarger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.geometry import Region


def spread(
    enlarger: Enlarger, block: Region, yx: NDArray[np.int64], cams: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """(mean, spread, seen by several) of what patches say about a block of the heatmap, each [height, width].

    The mean is the heatmap itself. The spread is the standard deviation round it with the same blending weights w,
    sqrt(sum w (v - mean)² / sum w), in the map's unit. A pixel that one patch alone sees has spread 0 and is not seen
    by several: nothing is known of it. Two passes, since sum v² - mean² would be rounding where patches agree.

    Args:
        yx: int64 [n, 2] in level-0 px of the patches that meet the block, in their order.
        cams: float32 [n, h, w].
    """
    blender = Blender(enlarger, block)
    blender.add(yx, cams)
    mean, _ = blender.result()
    squares, weights, count = np.zeros_like(mean), np.zeros_like(mean), np.zeros(mean.shape, np.int64)
    for start in range(0, len(yx), GROUP):
        for place, value, weight in blender.placements(yx[start : start + GROUP], cams[start : start + GROUP]):
            squares[place] += weight * (value - mean[place]) ** 2
            weights[place] += weight
            count[place] += weight > 0
    several = count > 1
    variance = np.divide(squares, weights, out=np.zeros_like(squares), where=several)
    return mean, np.sqrt(variance), several
