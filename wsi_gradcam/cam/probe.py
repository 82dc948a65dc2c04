"""What a method may ask of a model besides activation and gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""Logits [B, K] -> the explained scalar of each image [B]. Row i always belongs to image i of the batch: a score
may hold a class per image (the one predicted for the unchanged image)."""


@dataclass(frozen=True)
class Probe:
    """A batch and ways to ask the model about it. Every call takes and gives whole batches of the same B images.

    Attributes:
        images: normalised float32 [B, 3, H, W].
        activation: the layer's maps [B, K, h, w], detached.
        answer: images -> logits [B, K], without a graph; runs the fast trunk.
        resume: maps [B, K, h, w] put in the layer's place -> logits [B, K], without a graph; runs the head alone
            where the model could be split.
        differentiable: images that may require grad -> logits [B, K] with a graph, in float32.
        guided: as `differentiable`, but ReLU's backward also clips negative gradient; raises LayerError where the
            model has no ReLU.
    """

    images: Tensor
    activation: Tensor
    answer: Callable[[Tensor], Tensor]
    resume: Callable[[Tensor], Tensor]
    differentiable: Callable[[Tensor], Tensor]
    guided: Callable[[Tensor], Tensor]
