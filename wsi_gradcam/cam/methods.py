"""CAM methods: a method is a small pure function of activation and gradient.

`A` and `g` = ds/dA are [B, K, h, w]; the result is the raw signed map [B, h, w].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Method = Callable[[Tensor, Tensor], Tensor]


def gradcam(A: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM, sum_k mean_hw(g)_k A_k, without ReLU, which is a view (Selvaraju 2017, arXiv 1610.02391).

    With global average pooling and a linear layer its sum over h, w plus the bias is the logit.
    """
    return torch.einsum("bk,bkhw->bhw", g.mean(dim=(2, 3)), A)


def hirescam(A: Tensor, g: Tensor) -> Tensor:
    """HiResCAM, sum_k g_k A_k cell by cell (Draelos 2020, arXiv 2011.08891)."""
    return (A * g).sum(dim=1)


METHODS: dict[str, Method] = {"gradcam": gradcam, "hirescam": hirescam}
