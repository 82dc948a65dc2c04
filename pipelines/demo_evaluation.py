"""Stitched maps of a patch classifier and the figures of its model card."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor

from demo_training import Mask, Rgb
from wsi_gradcam.models.zoo.nets import PatchCNN

CELL_PX = 16
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Maps:
    """Maps of one image by ``CELL_PX`` cells, [h, w]; and its patches one by one, [N].

    ``share`` is a map too: the true share of the class, painted over each patch.
    """

    probability: Floats
    cam: Floats
    truth: Mask
    share: Floats
    patch_probability: Floats
    patch_share: Floats


def corners(length: int, patch_px: int, stride_px: int) -> range:
    """First pixels of the patches that cover ``length``; the last may reach beyond it.

    >>> list(corners(130, 64, 64))
    [0, 64, 128]
    """
    return range(0, max(length - patch_px, 0) + stride_px, stride_px)


@dataclass(frozen=True)
class Cut:
    """An image cut into patches: RGB [N, P, P, 3], (y, x) of each top left, and share of truth [N]."""

    patches: Rgb
    places: list[tuple[int, int]]
    share: Floats

    def colour(self) -> Floats:
        """Mean and standard deviation of R, G, B of each patch, [N, 6], in 0..1."""
        pixels = self.patches.reshape(len(self.patches), -1, 3) / 255
        return np.concatenate([pixels.mean(axis=1), pixels.std(axis=1)], axis=1)


def cut(rgb: Rgb, mask: Mask, patch_px: int, overlap: float) -> Cut:
    """Patches that cover the image; beyond it there is white."""
    stride = round(patch_px * (1 - overlap))
    height, width = mask.shape
    places = [(y, x) for y in corners(height, patch_px, stride) for x in corners(width, patch_px, stride)]
    padding = (0, places[-1][0] + patch_px - height), (0, places[-1][1] + patch_px - width)
    canvas = np.pad(rgb, (*padding, (0, 0)), constant_values=255)
    truth = np.pad(mask, padding)
    patches = np.stack([canvas[y : y + patch_px, x : x + patch_px] for y, x in places])
    share = np.array([truth[y : y + patch_px, x : x + patch_px].mean() for y, x in places])
    return Cut(patches, places, share)


def maps_of(model: PatchCNN, rgb: Rgb, mask: Mask, mean: Tensor, std: Tensor, patch_px: int, overlap: float) -> Maps:
    """Maps of the second class over the image, from patches cut on a grid."""
    pieces = cut(rgb, mask, patch_px, overlap)
    probability, cams = predict(model, pieces.patches, mean, std)

    def painted(values: Floats) -> Floats:
        footprints = np.broadcast_to(values[:, None, None], cams.shape)
        return _cells(_blend(footprints, pieces.places, mask.shape))

    return Maps(
        probability=painted(probability),
        cam=_cells(_blend(cams, pieces.places, mask.shape)),
        truth=_cells(mask.astype(np.float64)) > 0.5,
        share=painted(pieces.share),
        patch_probability=probability,
        patch_share=pieces.share,
    )


def predict(model: PatchCNN, patches: NDArray[np.uint8], mean: Tensor, std: Tensor) -> tuple[Floats, Floats]:
    """Probability [N] of the second class of patches [N, P, P, 3], and its raw CAM enlarged, [N, P, P]."""
    probabilities: list[NDArray[np.float64]] = []
    cams: list[NDArray[np.float64]] = []
    for start in range(0, len(patches), 64):
        pixels = torch.from_numpy(patches[start : start + 64]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            activation = model.features((pixels - mean) / std)
        activation.requires_grad_()
        logits = model.head(activation.mean(dim=(2, 3)))
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), activation)
        cam = (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1, keepdim=True).detach()
        cams.append(F.interpolate(cam, patches.shape[1:3], mode="bilinear")[:, 0].double().numpy())
        probabilities.append(logits.detach().double().softmax(dim=1)[:, 1].numpy())
    return np.concatenate(probabilities), np.concatenate(cams)


def _blend(footprints: Floats, places: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> Floats:
    """Mean over the patches that cover each pixel of an image of this shape; they may reach beyond it."""
    size = footprints.shape[1]
    total, count = np.zeros((2, shape[0] + size, shape[1] + size))
    for footprint, (y, x) in zip(footprints, places, strict=True):
        total[y : y + size, x : x + size] += footprint
        count[y : y + size, x : x + size] += 1
    mean: Floats = (total / np.maximum(count, 1))[: shape[0], : shape[1]]
    return mean


def _cells(image: Floats) -> Floats:
    height, width = (size // CELL_PX for size in image.shape)
    whole = image[: height * CELL_PX, : width * CELL_PX]
    cells: Floats = whole.reshape(height, CELL_PX, width, CELL_PX).mean(axis=(1, 3))
    return cells


def roc_auc(truth: Mask, score: Floats) -> float:
    """Area under the ROC curve, from ranks (Hanley and McNeil 1982); nan when only one class is there."""
    truth, score = truth.ravel(), score.ravel()
    positive = int(truth.sum())
    negative = truth.size - positive
    if positive == 0 or negative == 0:
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def brier(truth: Mask, probability: Floats) -> float:
    """Mean squared difference of probability and truth: 0 is perfect, 0.25 is a coin."""
    return float(np.mean((probability - truth) ** 2))


def reliability(truth: Mask, probability: Floats, bins: int = 5) -> list[tuple[int, float, float]]:
    """(patches, mean probability, observed share) of equal bins of probability that are not empty."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    chosen = [index == i for i in range(bins)]
    return [(int(c.sum()), float(probability[c].mean()), float(truth[c].mean())) for c in chosen if c.any()]


def expected_calibration_error(truth: Mask, probability: Floats, bins: int = 10) -> float:
    """Mean gap of probability and observed share over bins, weighted by patches (Naeini et al. 2015)."""
    rows = reliability(truth, probability, bins)
    return sum(count * abs(mean - share) for count, mean, share in rows) / truth.size


def colour_baseline(train_x: Floats, train_y: Mask, test_x: Floats) -> Floats:
    """Probability [N] by logistic regression on mean and standard deviation of R, G, B."""
    centre, spread = train_x.mean(axis=0), train_x.std(axis=0) + 1e-9
    design = np.column_stack([(train_x - centre) / spread, np.ones(len(train_x))])
    signs = np.where(train_y, 1.0, -1.0)

    def objective(weights: Floats) -> float:
        margins = signs * (design @ weights)
        return float(np.logaddexp(0, -margins).mean() + 1e-3 * (weights**2).sum())

    weights = minimize(objective, np.zeros(design.shape[1]), method="L-BFGS-B").x
    scores: Floats = expit(np.column_stack([(test_x - centre) / spread, np.ones(len(test_x))]) @ weights)
    return scores
