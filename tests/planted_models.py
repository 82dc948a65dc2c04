"""Models of which it is known, by how they are built, what a check of the audit must say about them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.planted import PINK, SIDE_PX, subject_of, trained
from tests.toy_models import PooledLinear
from wsi_gradcam.audit.measures.subject import Subject

SLOPES = {"straight": 0.0, "plateau": -1.0, "cliff": -20.0}


class Bent(nn.Module):
    """A bright spot's strength, and behind a bend another story of what comes next.

    Maps and gradients of all three are equal on patches that lie before the bend.
    """

    def __init__(self, story: str, margin: float) -> None:
        super().__init__()
        self.features = nn.AvgPool2d(4)
        self.slope, self.margin = SLOPES[story], margin
        self.here = torch.tensor(0.0)

    def evidence(self, images: Tensor) -> Tensor:
        return self.features(images)[:, 0].mean(dim=(1, 2)) * 10  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        evidence = self.evidence(images)
        beyond = (evidence - self.here - self.margin).relu()
        return torch.stack([torch.zeros_like(evidence), evidence + self.slope * beyond], dim=1)


def bent(story: str, seed: int = 0, count: int = 8) -> tuple[Subject, Tensor]:
    """The model, and patches that all lie just before its bend: a bright square on gray, each of another size."""
    random = np.random.default_rng(seed)
    rgb = np.full((count, SIDE_PX, SIDE_PX, 3), int(random.integers(110, 140)), np.uint8)
    for patch in rgb:
        side = int(random.integers(6, 11))
        y, x = random.integers(0, SIDE_PX - side, 2)
        patch[y : y + side, x : x + side] = int(random.integers(220, 256))
    subject = subject_of(Bent(story, margin=float(random.uniform(0.005, 0.02))).eval())
    images, module = subject.images(rgb), subject.program.module
    assert isinstance(module, Bent)
    module.here = module.evidence(images).detach()
    return subject, images


class Colour(nn.Module):
    """How much darker green is than red: what eosin does."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d((images[:, :1] - images[:, 1:2]).relu(), 4)


def stain_reader() -> PooledLinear:
    """Calls pink above the usual tumour."""
    return _read(Colour(), 100.0, -100.0 * (225 - 150) / 127.5)


class Darkness(nn.Module):
    """How much darker a cell of 4 px is than most of the patch, whatever its colour, from a margin on."""

    def forward(self, images: Tensor) -> Tensor:
        gray = images.mean(dim=1, keepdim=True)
        usual = gray.flatten(1).median(dim=1).values[:, None, None, None]
        return F.avg_pool2d((usual - gray - 0.2).relu(), 4)


def darkness_reader() -> PooledLinear:
    """Calls tumour what holds a dark disc, far from doubt, whatever the stain."""
    return _read(Darkness(), 200.0, -3.0)


class Blinkers(nn.Module):
    """The images with pink in place of green: what comes after never sees a marker."""

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = images.unbind(dim=1)
        marked = green - torch.maximum(red, blue) > 0.3
        pink = images.new_tensor(PINK)[:, None, None] / 127.5 - 1
        return torch.where(marked[:, None], pink, images)


def blinkered(seed: int = 0) -> PooledLinear:
    """A trained network that no marker reaches."""
    honest = trained(seed=seed)
    network = PooledLinear(nn.Sequential(Blinkers(), honest.features), 12)
    network.fc.load_state_dict(honest.fc.state_dict())
    return network


def with_margin(images: Tensor, margin: float, share: float, seed: int = 0) -> PooledLinear:
    """A trained network, its last layer scaled: the logits of a `share` of the images are less than `margin` apart."""
    honest = trained(seed=seed)
    network = PooledLinear(honest.features, 12)
    with torch.no_grad():
        logits = honest(images)
        factor = margin / float((logits[:, 1] - logits[:, 0]).abs().quantile(share))
        network.fc.weight.copy_(honest.fc.weight * factor)
        network.fc.bias.copy_(honest.fc.bias * factor)
    return network


def _read(features: nn.Module, weight: float, bias: float) -> PooledLinear:
    network = PooledLinear(features, 1)
    with torch.no_grad():
        network.fc.weight[:, 0] = torch.tensor([0.0, weight])
        network.fc.bias[:] = torch.tensor([0.0, bias])
    return network
