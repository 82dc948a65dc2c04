"""How logits become probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Activation = Literal["softmax", "sigmoid", "none"]


def probabilities(logits: NDArray[np.float32], activation: Activation) -> NDArray[np.float32]:
    """Logits float32 [n, classes] through softmax, sigmoid or nothing; same shape.

    >>> probabilities(np.array([[0, 0], [1000, 0]], np.float32), "softmax").tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    if activation == "none":
        return logits
    if activation == "sigmoid":
        return (0.5 * (1 + np.tanh(logits / 2))).astype(np.float32)  # does not overflow
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = shifted / shifted.sum(axis=1, keepdims=True)
    return shares
