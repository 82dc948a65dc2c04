"""Maps that know nothing of the model: every score stands beside theirs.

Each is made on the grid of the map that it is compared with, so that the two differ in what they know and not in how
sharp they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wsi_gradcam.audit.measures.subject import enlarge

RANDOM, EDGES, CONSTANT, CENTRE = "random", "edges", "constant", "centre"
CONTROLS = (RANDOM, EDGES, CONSTANT, CENTRE)


def control_maps(images: Tensor, grid: tuple[int, int], seeds: Sequence[int]) -> dict[str, Tensor]:
    """All controls [P, h, w] by name for images [P, 3, H, W]; a seed a patch, so that batches change nothing."""
    return {
        RANDOM: random_maps(grid, seeds).to(images.device),
        EDGES: edge_maps(images, grid),
        CONSTANT: images.new_ones(len(images), *grid),
        CENTRE: centre_maps(grid).to(images.device).expand(len(images), -1, -1),
    }


def random_maps(grid: tuple[int, int], seeds: Sequence[int]) -> Tensor:
    """Gaussian noise [P, h, w]."""
    return torch.stack([torch.randn(grid, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def edge_maps(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """How steep the picture is, [P, h, w], not negative: Sobel's gradient of the mean of the colours, averaged."""
    gray = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    steepness = F.conv2d(gray, torch.stack([across, across.T])[:, None]).norm(dim=1)
    return enlarge(steepness, grid)


def centre_maps(grid: tuple[int, int]) -> Tensor:
    """A map [1, h, w] that falls from the middle to the borders: less the squared distance, in half sides."""
    height, width = grid
    y, x = ((torch.arange(n) + 0.5) * 2 / n - 1 for n in (height, width))
    return -(y[:, None] ** 2 + x[None, :] ** 2)[None]
