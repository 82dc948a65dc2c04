"""Finer-CAM's score: what sets a class apart from the classes that the model takes for similar."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wsi_gradcam.errors import TargetError

if TYPE_CHECKING:
    from wsi_gradcam.cam.probe import Score

GAMMA = 0.6  # the authors' setting for several classes; their function's own default is 1
COMPARED = 3


def finer_score(
    logits: Tensor,
    classes: Tensor,
    gamma: float = GAMMA,
    compared: int = COMPARED,
    differentiate_weights: bool = True,
) -> Score:
    """The score whose Grad-CAM is Finer-CAM, sum_d p_d (s_c - gamma s_d) / sum_d p_d, for images answered `logits`.

    (Zhang 2025, arXiv 2501.11309.) c is the row's class, d the `compared` other classes (all others, if they are
    fewer) whose logits are nearest to s_c, the lower index first among equals, and p the softmax of all logits.
    p_d / sum p_d is taken as the softmax over the d alone, which cannot underflow. The d are those of `logits`, also
    when the score is asked of other logits later.

    As in the authors' code and pytorch-grad-cam the weights q_d = p_d / sum p_d are differentiated as well: class d
    weighs -gamma q_d (1 + s_d - sum q s), and a class more than 1 below that mean counts in favour of c. Without
    `differentiate_weights` they are constants, those of `logits`, and class d weighs -gamma q_d: the map is the
    weighted mean of the maps of s_c - gamma s_d, and with global average pooling and a linear layer its sum is the
    score less that of the biases. With two classes both are the same.

    Args:
        logits: [B, C], C of 2 or more.
        classes: the explained class of each row, int64 [B].
        gamma: how much of the similar classes' evidence is taken away; 0 is Grad-CAM.
        compared: how many classes are compared with.
        differentiate_weights: as the authors' code does; else they are constants.

    Raises:
        TargetError: one logit, so that there is nothing to compare with.
    """
    if logits.shape[1] < 2:
        raise TargetError("Finer-CAM compares a class with others, but the model has one logit; use gradcam")
    logits, own = logits.detach(), classes[:, None]
    distance = (logits - logits.gather(1, own)).abs().scatter(1, own, torch.inf)
    nearest = distance.argsort(dim=1, stable=True)[:, : min(compared, logits.shape[1] - 1)]
    shares = logits.gather(1, nearest).softmax(dim=1)

    def score(answer: Tensor) -> Tensor:
        others = answer.gather(1, nearest)
        weights = others.softmax(dim=1) if differentiate_weights else shares
        return (weights * (answer.gather(1, own) - gamma * others)).sum(dim=1)

    return score
