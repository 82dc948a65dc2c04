"""Names of what an audit measures, and its fixed choices, for those who measure and those who read. Needs no torch.

Numbers of patches are kept by names such as `faithfulness/blur/gradcam/deletion`; the first axis is the patches'.
Those of a whole slide begin with `slide/`, and their first axis is 1.
"""

from __future__ import annotations

from wsi_gradcam.cam.facts import METHOD_INFO

# Of a patch's pixels, that are taken away: 7 answers a way beside the two that all maps share. The area under a curve
# of 29 points differs little, and costs four times as much.
CURVE_FRACTIONS = tuple(i / 8 for i in range(9))
ROAD_FRACTIONS = (0.2, 0.5, 0.8)  # each costs an exact solution for up to 40,000 pixels
BLUR, BACKGROUND, MEAN, ROAD = "blur", "background", "mean", "road"
MAIN = MEAN  # what gaps are filled with on all patches and for all maps: a blurred patch may show all of a small one
BASELINES = (MAIN, BLUR, BACKGROUND, ROAD)  # the others where it is deep, beside
PROBABILITY = "probability"
CONTROLS = ("random", "edges", "constant", "centre", PROBABILITY)
GUIDED, INTEGRATED = "guided_backprop", "integrated_gradients"
ORDERS = ("top_down", "bottom_up", "independent")
CHANGES = ("noise", "stain", "jpeg")
STRONG_NOISE = "noise as strong as"
REMOVED_FRACTIONS = tuple(i / 20 for i in range(19))  # of a slide's patches
COPIES = "random copies"  # whom their numbers are of
SMOOTH = 8  # noisy copies of a patch in smooth randomisation
REPEATS = 2
STEPS = (-1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0)  # along a map
HIDDEN_MASKS = 8
MASKED = (0.02, 0.9)  # shares of a patch between which a suspect can be hidden, with as much elsewhere
# Methods that run the model dozens of times for a map: nothing that needs many maps is asked of them.
EXPENSIVE = frozenset(
    name for name, info in METHOD_INFO.items() if info.asks == "model" and name not in ("gradient", GUIDED)
)
