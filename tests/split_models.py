"""Small networks cut at their layer, and probes of them that a test can read in one glance."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from wsi_gradcam import GradCAM
from wsi_gradcam.cam.methods import Probe, Score

CLASSES = 4


class Split(nn.Module):
    """`features` up to the layer, `head` from the layer to `CLASSES` logits."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.features(images)))


class Squared(nn.Module):
    """A curve, so that second derivatives are not zero."""

    def forward(self, maps: Tensor) -> Tensor:
        return torch.tanh(maps) ** 2 + maps


def pooled() -> Split:
    """Maps that are not negative, pooling, a linear layer."""
    torch.manual_seed(11)
    features = nn.Sequential(nn.Conv2d(3, 6, 5, 4, 2), nn.ReLU(), nn.Conv2d(6, 9, 3, 2, 1), nn.ReLU())
    return Split(features, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, CLASSES))).eval()


def curved() -> Split:
    """Signed maps, and an in-place ReLU right behind the layer."""
    torch.manual_seed(12)
    features = nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3, 1, 1))
    head = nn.Sequential(
        nn.ReLU(inplace=True),
        Squared(),
        nn.Conv2d(7, 5, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )
    return Split(features, head).eval()


def perceptron() -> Split:
    """More channels than cells, and a head of two fully connected layers, which weighs each cell."""
    torch.manual_seed(13)
    features = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 20, 3, 1, 1), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(20 * 4 * 3, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    return Split(features, head).eval()


MODELS: dict[str, Callable[[], Split]] = {"pooled": pooled, "curved": curved, "perceptron": perceptron}


def last(part: nn.Module) -> nn.Module:
    """The last module of a sequence."""
    return cast(nn.Sequential, part)[-1]


def pictures(count: int = 3) -> Tensor:
    """Normalised images [count, 3, 32, 24] of different contrast."""
    generator = torch.Generator().manual_seed(21)
    return torch.randn(count, 3, 32, 24, generator=generator) * torch.linspace(0.5, 2, count)[:, None, None, None]


def activation_and_gradient(model: Split, images: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """The layer's maps and the gradient of `score`, by plain autograd."""
    leaf = model.features(images).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(model.head(leaf.clone())).sum(), leaf)
    return leaf.detach(), gradient


def of_class(index: int) -> Score:
    """The logit of one class."""
    return lambda logits: logits[:, index]


def of_classes(classes: list[int]) -> Score:
    """The logit of each row's own class."""
    return lambda logits: logits.gather(1, torch.tensor(classes)[:, None])[:, 0]


def probe_of(model: Split, images: Tensor) -> Probe:
    """A probe that asks `model` as plainly as can be."""
    guided = deepcopy(model)
    _guide(guided)
    with torch.no_grad():
        activation = model.features(images)
    return Probe(images, activation, torch.no_grad()(model), torch.no_grad()(model.head), model, guided)


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.save_for_backward(maps)
        return maps.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (maps,) = ctx.saved_tensors
        return torch.where(maps > 0, gradients[0].clamp(min=0), 0.0)


class _GuidedReLU(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return cast(Tensor, _Guided.apply(maps))


def _guide(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, _GuidedReLU())
        else:
            _guide(child)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value of the same image."""
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    scale = expected.abs().flatten(1).amax(dim=1).clamp(min=1e-30)
    return float(((found - expected).abs().flatten(1).amax(dim=1) / scale).max())


@pytest.fixture
def network() -> Split:
    """`curved`, made again for each test."""
    return curved()


@pytest.fixture
def images() -> Tensor:
    """Five pictures."""
    return pictures(5)


def plain(network: nn.Module, **options: Any) -> GradCAM:
    """`GradCAM` of a network's `features`, run by PyTorch alone."""
    return GradCAM(network, **{"layer": "features", "engine": "eager", "precision": "float32", **options})
