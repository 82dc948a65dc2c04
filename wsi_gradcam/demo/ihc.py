"""The micrograph of the demo: real immunohistochemistry from scikit-image, with a pixel truth by colour."""

from typing import cast

import numpy as np
import skimage.data
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.color import rgb2hed

HELD_OUT = (slice(256, 512), slice(256, 512))
"""Rows and columns of the quadrant that the bundled model never saw: bottom right, a gland in stroma."""

DAB_SIGMA_PX = 3.0
"""Smoothing of the DAB density, so that unstained nuclei (about 10 px wide) belong to their stained cells."""

DAB_THRESHOLD = 0.035
"""Least smoothed density that is positive: the valley between stroma, glass (0.01) and epithelium (0.08)."""

_MAX_DENSITY = 0.3  # pure black decomposes to 1.5 and would spread; the 99th percentile is 0.19


def micrograph() -> NDArray[np.uint8]:
    """RGB, uint8 [512, 512, 3]: colonic glands, FHL2 in brown (DAB), haematoxylin, bare glass at the left.

    Acquired at the Center for Microscopy and Molecular Imaging; no known copyright restrictions. The file
    is in the scikit-image wheel: nothing is downloaded. Its pixel size is not known; the demo takes 0.5 mpp.
    """
    return cast(NDArray[np.uint8], skimage.data.immunohistochemistry())


def dab_positive(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """True where there is DAB, bool [H, W], of an RGB image, uint8 [H, W, 3].

    The DAB channel of colour deconvolution (Ruifrok and Johnston 2001; scikit-image's matrix and units),
    smoothed by ``DAB_SIGMA_PX`` and cut at ``DAB_THRESHOLD``. White has no density and is negative.
    """
    density = np.clip(rgb2hed(rgb)[..., 2], 0.0, _MAX_DENSITY)
    smooth = gaussian_filter(density, DAB_SIGMA_PX)
    return cast(NDArray[np.bool_], smooth > DAB_THRESHOLD)
