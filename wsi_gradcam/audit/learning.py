"""Has the model learned anything that tells such patches apart? Its answers against those of random copies.

Weights that were learned work together, so that the evidence of different patches differs by far more than with random
weights of the same size. A model that was never trained, whose weights did not load, or that knows nothing of such
pictures is one more random copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsi_gradcam.audit.sanity import random_copies
from wsi_gradcam.audit.subject import Subject

DRAWS = 49  # of which none may differ as much: a false praise in 50


def random_answers(subject: Subject, images: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Logits [draws, P, K] of images [P, 3, H, W] with all weights random; pieces of an archive may be joined."""
    return torch.stack([copy.answers(images) for copy in random_copies(subject, images, draws, seed)])


def answer_spread(logits: Tensor) -> Tensor:
    """How much the evidence of patches differs, [...] of logits [..., P, K]: its standard deviation over the patches.

    Evidence is the logits less their mean over the classes, which no probability depends on; of all classes together.
    Of a single logit, it is that.
    """
    values = logits.double()
    if values.shape[-1] > 1:
        values = values - values.mean(dim=-1, keepdim=True)
    return values.var(dim=-2, correction=0).sum(dim=-1).sqrt()
