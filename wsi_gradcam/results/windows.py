"""Display windows: between which values colour runs. Windows are views, values stay as they are."""

from __future__ import annotations

QUANTILE = 0.995
NARROWEST = 1.0  # logits


def window_end(top: float, unit: str) -> float:
    """Where the window of an explanation ends whose `QUANTILE` is `top`; it begins at 0.

    What lies below 0 speaks against the class and stays dark: that is Grad-CAM's ReLU, as a view. The window is
    never narrower than one logit, so that a slide without evidence looks cold and its noise is not stretched to hot;
    methods whose values are not logits have no such floor.

    >>> window_end(0.2, "logit"), window_end(0.2, "arbitrary"), window_end(-3.0, "arbitrary")
    (1.0, 0.2, 1.0)
    """
    return max(top, NARROWEST) if unit == "logit" or top <= 0 else top
