"""Tiny networks with known answers, as `module:function` builders for model files.

All take RGB in 0..1 (mean 0, std 1 in the model file) and patches of 32 or more px a side.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONSTANT = 0.375  # of `constant`'s map, before the weight of 2 of its linear layer
SLOWNESS_S = "TOY_SECONDS_A_BATCH"  # environment: how long `slow_linear` sleeps in each forward pass
LOADS = "TOY_LOADS"  # environment: the file in which `counted` counts
POISON = "TOY_POISON"  # environment: what `poisoned` does to its process


class PooledLinear(nn.Module):
    """A map, global average pooling, a linear layer: Grad-CAM's sum plus the bias is the logit."""

    def __init__(self, features: nn.Module, channels: int, classes: int = 2) -> None:
        super().__init__()
        self.features = features
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.fc(self.features(images).mean(dim=(2, 3))))


class Greenness(nn.Module):
    """How much greener than tissue a pixel is, 0 to 1: 1 for pure green, 0 for everything pink, gray or white."""

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = images.unbind(dim=1)
        excess = green - torch.maximum(red, blue)
        return F.avg_pool2d(F.relu(excess - 0.1).unsqueeze(1) / 0.9, 2)


def marker() -> nn.Module:
    """Answers to pure green alone: class 1's logit is 8 times the green share of the patch, minus 1."""
    network = PooledLinear(Greenness(), 1)
    with torch.no_grad():
        network.fc.weight[:, 0] = torch.tensor([0.0, 8.0])
        network.fc.bias[:] = torch.tensor([0.0, -1.0])
    return network


class Flat(nn.Module):
    """The same value everywhere, whatever the image."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images[:, :1], 8) * 0.0 + CONSTANT


def constant() -> nn.Module:
    """Its map is `CONSTANT`, its logits 2 * CONSTANT + 0.25 and 0."""
    network = PooledLinear(Flat(), 1)
    with torch.no_grad():
        network.fc.weight[:, 0] = torch.tensor([2.0, 0.0])
        network.fc.bias[:] = torch.tensor([0.25, 0.0])
    return network


def pooled_linear() -> nn.Module:
    """An untrained net of two convolutions with 8 px cells, GAP and a linear layer."""
    features = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()
    )
    return PooledLinear(features, 12)


def other_linear() -> nn.Module:
    """`pooled_linear` with other weights, and logits of tens."""
    network = cast(PooledLinear, pooled_linear())
    with torch.no_grad():
        network.fc.weight.mul_(-300)
    return network


class Slow(PooledLinear):
    """Sleeps in each forward pass."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(float(os.environ.get(SLOWNESS_S, "0")))
        return super().forward(images)


def slow_linear() -> nn.Module:
    """`pooled_linear` that takes its time, for tests that stop it in the middle."""
    return Slow(cast(PooledLinear, pooled_linear()).features, 12)


def has_marker(images: Tensor) -> Tensor:
    """Which images [B, 3, H, W] hold 4 x 4 px of pure green, which noise never does; bool [B]."""
    pure = (images[:, 1] > 0.98) & (images[:, 0] < 0.02) & (images[:, 2] < 0.02)
    return F.avg_pool2d(pure.float().unsqueeze(1), 4).flatten(1).amax(dim=1) == 1


class Poisoned(PooledLinear):
    """Kills its process on patches with green in them, or once, as the environment says."""

    def forward(self, images: Tensor) -> Tensor:
        action = os.environ.get(POISON, "")
        if action and bool(has_marker(images).any()) and _first_time(action):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


def poisoned() -> nn.Module:
    """`pooled_linear` that dies on green patches: always for "always", once for a path (which it creates)."""
    return Poisoned(cast(PooledLinear, pooled_linear()).features, 12)


class Hungry(PooledLinear):
    """Takes memory without end on patches with green in them, as the environment says."""

    def forward(self, images: Tensor) -> Tensor:
        action = os.environ.get(POISON, "")
        eaten = []
        if action and bool(has_marker(images).any()) and _first_time(action):
            for _ in range(64):  # 16 GiB at most, 256 MiB at a time
                eaten.append(torch.ones(64 << 20))
                time.sleep(0.1)
        return super().forward(images)


def hungry() -> nn.Module:
    """`pooled_linear` that eats memory on green patches: always for "always", once for a path (which it creates)."""
    return Hungry(cast(PooledLinear, pooled_linear()).features, 12)


FAILED: list[str] = []  # why this process can use its device no more
NOT_ENOUGH = 4  # images that the memory of `cramped` does not hold


def _fail(images: Tensor | None) -> None:
    """Fails as a GPU does: this process can never use it again."""
    action = os.environ.get(POISON, "")
    if not FAILED and action and (images is None or bool(has_marker(images).any())) and _first_time(action):
        FAILED.append("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")
    if FAILED:
        raise getattr(torch, "AcceleratorError", RuntimeError)(FAILED[0])


class Faulty(PooledLinear):
    """Its device fails on patches with green in them, as the environment says, and at every call from then on."""

    def forward(self, images: Tensor) -> Tensor:
        _fail(images)
        return super().forward(images)


def faulty() -> nn.Module:
    """`pooled_linear` on a device that fails on green patches: always for "always", once for a path."""
    return Faulty(cast(PooledLinear, pooled_linear()).features, 12)


def faulty_at_once() -> nn.Module:
    """`pooled_linear` on a device that fails while it is built, as the environment says."""
    _fail(None)
    return pooled_linear()


class Cramped(PooledLinear):
    """Fits into memory in small batches alone, and remembers the sizes that were tried."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__(features, channels)
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if len(images) >= NOT_ENOUGH:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(images)


def cramped() -> nn.Module:
    """`pooled_linear` that does not fit into memory in batches of `NOT_ENOUGH`."""
    return Cramped(cast(PooledLinear, pooled_linear()).features, 12)


def counted() -> nn.Module:
    """`pooled_linear` that adds a line with its process to the file of `LOADS` when it is built."""
    with Path(os.environ[LOADS]).open("a", encoding="utf-8") as file:
        print(os.getpid(), file=file)
    return pooled_linear()


def deadly() -> nn.Module:
    """Kills its process while it is built, when the environment says "load"."""
    if os.environ.get(POISON) == "load":
        os.kill(os.getpid(), signal.SIGKILL)
    return pooled_linear()


def _first_time(action: str) -> bool:
    if action == "always":
        return True
    try:
        Path(action).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class NotANumber(PooledLinear):
    """NaN for patches with green in them."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).masked_fill(has_marker(images)[:, None], float("nan"))


def not_a_number() -> nn.Module:
    """`pooled_linear` whose logits are NaN on green patches."""
    return NotANumber(cast(PooledLinear, pooled_linear()).features, 12)


def wrong_shape() -> nn.Module:
    """Returns a map where logits are expected."""
    return nn.Conv2d(3, 2, 3, stride=2)


def not_a_module() -> int:
    """Returns no network at all."""
    return 3


class Pair(nn.Module):
    """Returns two tensors."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean(dim=(2, 3)), images


def pair() -> nn.Module:
    """Returns a tuple where a tensor is expected."""
    return Pair()


def tokens() -> nn.Module:
    """A tiny vision transformer: GELU, normalisation of each token, and a class token that the head reads."""
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=2)


class Encoder(nn.Module):
    """The features of an untrained net of two convolutions, averaged over the patch: 12 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = cast(PooledLinear, pooled_linear()).features

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.features(images).mean(dim=(2, 3)))


class LoudEncoder(Encoder):
    """Features that float16 does not hold."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * 1e7


def loud_encoder() -> nn.Module:
    """An encoder whose features are beyond float16."""
    return LoudEncoder()


def encoder() -> nn.Module:
    """An encoder of slide-level models, with 12 features."""
    return Encoder()
