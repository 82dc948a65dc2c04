"""How a layer's output holds a map: channels first, channels last, or as tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

MOST_PREFIX_TOKENS = 16  # class, distillation and register tokens; published models have up to 9


@dataclass(frozen=True)
class Layout:
    """Axes of a layer's output for a batch of B images.

    Attributes:
        axes: `bkhw`; `bhwk` (Swin); or `bnk`, one token a cell in rows, after `prefix` tokens that have no place
            in the picture (ViT).
        channels, height, width: of the map.
    """

    axes: Literal["bkhw", "bhwk", "bnk"]
    channels: int
    height: int
    width: int
    prefix: int = 0

    def to_map(self, value: Tensor) -> Tensor:
        """The map [B, K, h, w] in an output; a view that gradients pass through."""
        if self.axes == "bkhw":
            return value
        if self.axes == "bhwk":
            return value.permute(0, 3, 1, 2)
        cells = value[:, self.prefix :].transpose(1, 2)
        return cells.reshape(len(value), self.channels, self.height, self.width)

    def put(self, value: Tensor, new: Tensor) -> Tensor:
        """The output `value` with the map `new` [B, K, h, w] in it; tokens without a place stay."""
        if self.axes == "bkhw":
            return new
        if self.axes == "bhwk":
            return new.permute(0, 2, 3, 1)
        import torch  # clients, which only pass layouts on, never load it

        return torch.cat([value[:, : self.prefix], new.flatten(2).transpose(1, 2)], dim=1)


@dataclass(frozen=True)
class Layer:
    """A layer to explain: its name in the model, and how its output holds a map."""

    name: str
    layout: Layout


def find_layout(output: Tensor, images: Tensor) -> Layout | None:
    """The layout of a layer's `output` for `images` [B, 3, H, W]; None where it holds no map of their proportions.

    A map has more than one cell, and a cell is as high as it is wide but for rounding. Where channels could be
    first or last, first is assumed; of several possible numbers of prefix tokens, the fewest.
    """
    if output.ndim < 3 or len(output) != len(images) or not output.is_floating_point():
        return None
    proportion = images.shape[2] / images.shape[3]
    if output.ndim == 4:
        if _is_grid(output.shape[2], output.shape[3], proportion):
            return Layout("bkhw", output.shape[1], output.shape[2], output.shape[3])
        if _is_grid(output.shape[1], output.shape[2], proportion):
            return Layout("bhwk", output.shape[3], output.shape[1], output.shape[2])
    if output.ndim == 3:
        for prefix in range(min(MOST_PREFIX_TOKENS, output.shape[1] - 2) + 1):
            tokens = output.shape[1] - prefix
            height = max(1, round(math.sqrt(tokens * proportion)))
            width = tokens // height
            # Exact, other than with rounded strides of convolutions: many numbers are products.
            if height * width == tokens > 1 and abs(height - width * proportion) < 0.5:
                return Layout("bnk", output.shape[2], height, width, prefix)
    return None


def _is_grid(height: int, width: int, proportion: float) -> bool:
    return height * width > 1 and abs(height - width * proportion) <= max(1.0, proportion)
