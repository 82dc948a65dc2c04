"""The networks of the bundled models: plain convolutional trunks, global average pooling, one linear layer.

With this head the Grad-CAM of a logit is the linear layer applied to each cell of the last activation, over
the number of cells. The explanation is exact: its cells add up to the logit less the bias.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class ConvBlock(nn.Sequential):
    """3 x 3 convolution, batch normalisation, ReLU: [B, in, H, W] to [B, out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class PatchCNN(nn.Module):
    """A CNN whose class evidence is a sum over cells.

    ``blocks`` gives (channels, stride) of each block. ``features`` is the module whose output is the last
    spatial activation, float32 [B, C, h, w], never negative.
    """

    def __init__(self, blocks: Sequence[tuple[int, int]], classes: int) -> None:
        super().__init__()
        widths = [3, *(channels for channels, _ in blocks)]
        strides = [stride for _, stride in blocks]
        self.features = nn.Sequential(
            *(ConvBlock(i, o, s) for i, o, s in zip(widths[:-1], widths[1:], strides, strict=True))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], classes)
        _centre(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 [B, K], of RGB patches ``x``, float32 [B, 3, H, W], normalised by mean and std."""
        return cast(Tensor, self.head(self.pool(self.features(x)).flatten(1)))

    def cell_logits(self, x: Tensor) -> Tensor:
        """The head applied to every cell, float32 [B, K, h, w]; their mean over h, w is ``forward(x)``."""
        activation = self.features(x)
        return torch.einsum("bchw,kc->bkhw", activation, self.head.weight) + self.head.bias[:, None, None]


def _centre(head: nn.Linear) -> None:
    """Make the classes' weights add up to zero.

    Softmax sees only differences of logits: what the classes have in common is arbitrary, yet it would be
    painted into the CAM of a single logit. The gradients of cross entropy add up to zero over classes: with
    two of them, weights that begin opposite stay opposite, and the CAM of one logit is half that of the
    difference.
    """
    with torch.no_grad():
        head.weight -= head.weight.mean(dim=0, keepdim=True)
        head.bias.zero_()


def oral_tumour() -> PatchCNN:
    """Tumour in H&E of oral cancer: [B, 3, H, W] to logits [B, 2] of (other, tumour); 8 px cells."""
    return PatchCNN([(24, 2), (48, 2), (48, 1), (64, 2), (64, 1), (64, 1)], classes=2)


def ihc_dab() -> PatchCNN:
    """DAB in an IHC micrograph: [B, 3, H, W] to logits [B, 2] of (negative, positive); 8 px cells."""
    return PatchCNN([(8, 2), (16, 2), (24, 2), (24, 1)], classes=2)
