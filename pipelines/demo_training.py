"""Train a small CNN on random patches of annotated images: sampling, augmentation and the loop."""

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor

from wsi_gradcam.models.zoo.nets import PatchCNN

Rgb = NDArray[np.uint8]  # [H, W, 3]
Mask = NDArray[np.bool_]  # [H, W], true where the second class is
GLASS_RGB = (243.0, 5.0)  # mean and spread of the light background of scanners


@dataclass(frozen=True)
class Annotated:
    """An image with its pixel truth; patches lie where ``allowed`` is true (anywhere when None)."""

    name: str
    rgb: Rgb
    mask: Mask
    allowed: Mask | None = None


@dataclass(frozen=True)
class Recipe:
    """The recipe of a model's training. ``glass`` is the share of patches that are bare glass, of the first class."""

    patch_px: int
    steps: int
    batch: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    average: float = 0.99
    cell_loss: float = 1.0
    glass: float = 0.04
    stain_jitter: float = 0.12
    scales: tuple[float, ...] = (1.0, 0.88, 1.13)
    jpeg_qualities: tuple[int, ...] = (85, 65)


def variants(image: Annotated, recipe: Recipe) -> list[Annotated]:
    """The image at each scale, as it is and as JPEG of each quality."""
    found: list[Annotated] = []
    for scale in recipe.scales:
        scaled = _rescale(image, scale)
        found.append(scaled)
        found.extend(replace(scaled, rgb=jpeg(scaled.rgb, quality)) for quality in recipe.jpeg_qualities)
    return found


def jpeg(rgb: Rgb, quality: int) -> Rgb:
    """The image after one JPEG round trip."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))


def _rescale(image: Annotated, scale: float) -> Annotated:
    height, width = image.mask.shape
    size = round(width * scale), round(height * scale)
    rgb = np.array(Image.fromarray(image.rgb).resize(size, Image.Resampling.BICUBIC))
    allowed = None if image.allowed is None else _resize_mask(image.allowed, size)
    return Annotated(image.name, rgb, _resize_mask(image.mask, size), allowed)


def _resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    return np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


class Sampler:
    """Random patches, rotated and mirrored, with their masks; images are drawn with equal chance."""

    def __init__(self, images: Sequence[Annotated], recipe: Recipe, seed: int) -> None:
        self._variants = [variants(image, recipe) for image in images]
        self._recipe = recipe
        self._rng = np.random.default_rng(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Patches, float32 [B, 3, P, P] in 0..1, and masks, float32 [B, 1, P, P]."""
        pairs = [self._draw() for _ in range(self._recipe.batch)]
        patches = torch.from_numpy(np.stack([rgb for rgb, _ in pairs])).permute(0, 3, 1, 2).float() / 255
        return patches, torch.from_numpy(np.stack([mask for _, mask in pairs])).float()[:, None]

    def _draw(self) -> tuple[Rgb, Mask]:
        size = self._recipe.patch_px
        if self._rng.random() < self._recipe.glass:
            return self._glass(size), np.zeros((size, size), bool)
        choices = self._variants[self._rng.integers(len(self._variants))]
        image = choices[self._rng.integers(len(choices))]
        y, x = self._corner(image)
        rgb, mask = image.rgb[y : y + size, x : x + size], image.mask[y : y + size, x : x + size]
        turns, mirror = int(self._rng.integers(4)), bool(self._rng.integers(2))
        rgb, mask = np.rot90(rgb, turns), np.rot90(mask, turns)
        return (rgb[:, ::-1].copy(), mask[:, ::-1].copy()) if mirror else (rgb.copy(), mask.copy())

    def _corner(self, image: Annotated) -> tuple[int, int]:
        size = self._recipe.patch_px
        height, width = image.mask.shape
        while True:
            y, x = int(self._rng.integers(height - size + 1)), int(self._rng.integers(width - size + 1))
            if image.allowed is None or image.allowed[y : y + size, x : x + size].all():
                return y, x

    def _glass(self, size: int) -> Rgb:
        tint = self._rng.normal(*GLASS_RGB, size=3)
        grain = self._rng.normal(0, self._rng.uniform(0, 3), size=(size, size, 3))
        return np.clip(tint + grain, 0, 255).astype(np.uint8)


def augment(patches: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
    """Patches with other stain strengths, brightness and sharpness, float32 [B, 3, P, P] in 0..1.

    Optical density is taken apart into haematoxylin, eosin and DAB (Ruifrok and Johnston 2001), each is
    scaled by 1 +- ``jitter``, and put together again: one 3 x 3 matrix a patch.
    """
    count = len(patches)
    to_stains = torch.from_numpy(hed_from_rgb).float()
    to_rgb = torch.from_numpy(rgb_from_hed).float()
    strength = 1 + jitter * (2 * torch.rand(count, 3, generator=generator) - 1)
    mixing = torch.einsum("ij,bj,jk->bik", to_stains, strength, to_rgb)
    density = -torch.log(patches.clamp_min(1 / 255)).flatten(2)
    jittered = torch.exp(-torch.bmm(mixing.transpose(1, 2), density)).view_as(patches)
    light = 1 + 0.3 * jitter * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1)
    blur = 0.8 * torch.rand(count, 1, 1, 1, generator=generator).pow(3)
    smooth = F.avg_pool2d(F.pad(jittered, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    grain = 0.01 * torch.randn(patches.shape, generator=generator)
    return (light * torch.lerp(jittered, smooth, blur) + grain).clamp(0, 1)


def loss_of(model: PatchCNN, x: Tensor, masks: Tensor, cell_weight: float) -> Tensor:
    """Cross entropy of the patch with its share of each class, plus that of every cell with its own.

    Pooling and the head commute, so the second term trains the class activation map itself.
    """
    cells = model.cell_logits(x)
    share = F.adaptive_avg_pool2d(masks, (cells.shape[2], cells.shape[3]))
    patch_share = share.mean(dim=(2, 3))
    whole = F.cross_entropy(cells.mean(dim=(2, 3)), torch.cat([1 - patch_share, patch_share], 1))
    return whole + cell_weight * F.cross_entropy(cells, torch.cat([1 - share, share], 1))


def train(
    model: PatchCNN, images: Sequence[Annotated], mean: Tensor, std: Tensor, recipe: Recipe, seed: int
) -> PatchCNN:
    """The model's running average after ``recipe.steps`` steps of AdamW in one cycle, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(images, recipe, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, recipe.steps)
    averaged = copy.deepcopy(model)
    model.train()
    for _ in range(recipe.steps):
        patches, masks = sampler.batch()
        x = (augment(patches, recipe.stain_jitter, generator) - mean) / std
        optimiser.zero_grad()
        torch.autograd.backward(loss_of(model, x, masks, recipe.cell_loss))
        optimiser.step()
        schedule.step()
        _follow(averaged, model, recipe.average)
    return averaged.eval()


def _follow(averaged: PatchCNN, model: PatchCNN, decay: float) -> None:
    """Move the exponential average of weights and of batch statistics one step."""
    with torch.no_grad():
        for old, new in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
            old.copy_(torch.lerp(new, old, decay) if old.is_floating_point() else new)
