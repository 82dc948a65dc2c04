"""Patches with their most relevant pixels taken away, or with these alone: ranks, and what is put in their place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor
from torch.nn import functional as F

from wsi_gradcam.audit.subject import enlarge

Replace = Callable[[Tensor, Tensor], Tensor]
"""(rows int64 [B], hidden bool [B, H, W]) -> images [B, 3, H, W]: the patches `rows` with what is hidden replaced."""

BLUR_PX, BLUR_SIGMA_PX, BLUR_SIDE_PX = 11, 5.0, 224  # as the authors of deletion and insertion do at 224 px
# Weights of the neighbours in ROAD's imputation: (y, x) offsets, sides 1/6 and diagonals 1/12.
NEIGHBOURS = {(y, x): 1 / 6 if 0 in (y, x) else 1 / 12 for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)}


def removal_ranks(maps: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """The rank of each pixel in its map enlarged to `size`, int64 [P, H, W], 0 for the most relevant.

    Signed maps are ranked as they are. Ties are broken at random: where most of a map is 0, the order in which it is
    stored would else decide the score (one map scored 0.37, 0.50 or 0.63 by tie order alone).
    """
    values = enlarge(maps.float(), size).flatten(1)
    shuffled = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed)).to(values.device)
    order = shuffled[values[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).reshape(len(maps), *size)


def replace_by(images: Tensor, others: Tensor) -> Replace:
    """Replaces pixels of images [P, 3, H, W] by those of `others`, of the same shape or one that spreads to it."""
    others = others.expand_as(images)

    def replace(rows: Tensor, hidden: Tensor) -> Tensor:
        return torch.where(hidden[:, None], others[rows], images[rows])

    return replace


def blurred(images: Tensor) -> Tensor:
    """Images [P, 3, H, W] blurred by a Gaussian of 5 px, cut off at 11 px, where they have 224 px a side.

    At other sizes in proportion. Borders are mirrored, so that they do not darken.
    """
    scale = min(images.shape[2:]) / BLUR_SIDE_PX
    half = max(1, round(BLUR_PX // 2 * scale))
    offsets = torch.arange(-half, half + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * max(BLUR_SIGMA_PX * scale, 0.5) ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def mean_colour(images: Tensor) -> Tensor:
    """Each image's mean colour, [P, 3, 1, 1]."""
    return images.mean(dim=(2, 3), keepdim=True)


def replace_by_neighbours(images: Tensor, noise: Tensor | float = 0.0, seed: int = 0) -> Replace:
    """Noisy linear imputation: each hidden pixel is the weighted mean of its eight neighbours, hidden ones too.

    Weights are 1/6 for the sides and 1/12 for diagonals, made to sum to 1 at borders; the equations are solved exactly
    (Rong 2022, ROAD, arXiv 2202.00449). That the weights sum to 1 makes it the same before normalisation and after.
    `noise` is the standard deviation of the Gaussian that is added, for each colour [3, 1, 1] of a normalised image:
    the authors' 0.01 in 0..1 is 0.01 / std. Every patch gets the same noise. Where all is hidden, there is nothing to
    impute from, and it becomes the patch's mean colour.
    """
    generator = torch.Generator().manual_seed(seed)
    grain = torch.randn(images.shape[1:], generator=generator).to(images) * noise

    def replace(rows: Tensor, hidden: Tensor) -> Tensor:
        filled = images[rows].clone()
        for image, mask in zip(filled, hidden, strict=True):
            image[:, mask] = _imputed(image, mask) + grain[:, mask]
        return filled

    return replace


def _imputed(image: Tensor, hidden: Tensor) -> Tensor:
    """The hidden pixels [3, n] of an image [3, H, W]."""
    if bool(hidden.all()):
        return image.mean(dim=(1, 2))[:, None].expand(-1, hidden.numel())
    mask, known = hidden.cpu().numpy(), image.cpu().numpy().astype(np.float64)
    number = np.full(mask.shape, -1)
    number[mask] = np.arange(mask.sum())
    y, x = np.nonzero(mask)
    own = np.arange(len(y))
    total, right = np.zeros(len(y)), np.zeros((len(y), 3))
    entries = []
    for (dy, dx), weight in NEIGHBOURS.items():
        inside = (y + dy >= 0) & (y + dy < mask.shape[0]) & (x + dx >= 0) & (x + dx < mask.shape[1])
        at, ny, nx = own[inside], y[inside] + dy, x[inside] + dx
        total[at] += weight
        unknown = mask[ny, nx]
        right[at[~unknown]] += weight * known[:, ny[~unknown], nx[~unknown]].T
        entries.append((at[unknown], number[ny[unknown], nx[unknown]], np.full(int(unknown.sum()), -weight)))
    rows, columns, values = (np.concatenate(parts) for parts in zip(*entries, (own, own, total), strict=True))
    system = sparse.csc_matrix((values, (rows, columns)), shape=(len(y), len(y)))
    solved = np.asarray(spsolve(system, right)).reshape(len(y), 3)
    return torch.from_numpy(solved.T.copy()).to(image)
