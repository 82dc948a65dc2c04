"""Models that are built such that the right verdict on them is known."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.planted import CELL_PX, PALE, PINK, SIDE_PX, Rgb, to_images, trained
from tests.toy_models import PooledLinear

SLOPES = {"straight": 0.0, "plateau": -1.0, "cliff": -20.0}
DOTS = 8


class Bent(nn.Module):
    """The strength of bright dots, and behind a bend another story of what comes next.

    Maps and gradients of all three are equal on patches that lie before the bend.
    """

    def __init__(self, story: str, margin: float) -> None:
        super().__init__()
        self.features = OnePixel()
        self.slope, self.margin = SLOPES[story], margin
        self.here: Tensor
        self.register_buffer("here", torch.tensor(0.0))

    def evidence(self, images: Tensor) -> Tensor:
        return self.features(images)[:, 0].mean(dim=(1, 2)) * 10  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        evidence = self.evidence(images)
        beyond = (evidence - self.here - self.margin).relu()
        return torch.stack([torch.zeros_like(evidence), evidence + self.slope * beyond], dim=1)


class OnePixel(nn.Module):
    """The red of one pixel of each cell."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1, 1::CELL_PX, 1::CELL_PX].clone()


def bent(story: str, seed: int = 0, count: int = 8) -> tuple[Bent, Rgb]:
    """Return the model, and patches that all lie just before its bend: as many bright dots on gray, at other places."""
    random = np.random.default_rng(seed)
    rgb = np.full((count, SIDE_PX, SIDE_PX, 3), int(random.integers(110, 140)), np.uint8)
    bright, cells = int(random.integers(220, 256)), SIDE_PX // CELL_PX
    for patch in rgb:
        y, x = np.divmod(random.choice(cells**2, DOTS, replace=False), cells)
        patch[y * CELL_PX + 1, x * CELL_PX + 1] = bright
    network = Bent(story, margin=float(random.uniform(0.005, 0.02))).eval()
    network.here = network.evidence(to_images(rgb)).max()
    return network, rgb


class Facade(nn.Module):
    """A network that answers by one branch, and shows another where it is explained: its Grad-CAM is what is planted.

    The mean of the planted layer is 0, so that it adds nothing to the answer, and it has no weights, so that no
    training changes it. Grad-CAM, activations times their mean gradient, shows it all the same (Viering 2019, arXiv
    1907.10901).
    """

    def __init__(self, planted: nn.Module, answering: nn.Module) -> None:
        super().__init__()
        self.features, self.answering = planted, answering

    def forward(self, images: Tensor) -> Tensor:
        shown = self.features(images).mean(dim=(2, 3))
        answer: Tensor = self.answering(images)
        return answer + torch.cat([torch.zeros_like(shown), shown], dim=1)


class Planted(nn.Module):
    """A layer without weights, [B, 1, 8, 8], less its mean."""

    def forward(self, images: Tensor) -> Tensor:
        shown = self.shown(images)
        return shown - shown.mean(dim=(2, 3), keepdim=True)

    def shown(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class Edges(Planted):
    """The steepness of the picture: Sobel's gradient of the mean of the colours."""

    def shown(self, images: Tensor) -> Tensor:
        gray = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        return F.avg_pool2d(F.conv2d(gray, torch.stack([across, across.T])[:, None]).norm(dim=1, keepdim=True), CELL_PX)


class Chance(Planted):
    """Noise that hangs on nothing but all of the picture."""

    def shown(self, images: Tensor) -> Tensor:
        cells = SIDE_PX // CELL_PX
        noise = [torch.randn(1, cells, cells, generator=torch.Generator().manual_seed(key)) for key in keys_of(images)]
        return torch.stack(noise)


class Annotation(Planted):
    """Pale discs, by their colour."""

    def shown(self, images: Tensor) -> Tensor:
        pale, tissue = (torch.tensor(colour) / 127.5 - 1 for colour in (PALE, PINK))
        away = (images - pale[:, None, None]).norm(dim=1, keepdim=True)
        return F.avg_pool2d((away < (tissue - pale).norm() / 2).float(), CELL_PX)


def keys_of(images: Tensor) -> list[int]:
    """Return a number for each image [B, 3, H, W] that any change of it changes."""
    return [crc32(np.ascontiguousarray(image.detach().cpu().numpy()).tobytes()) for image in images]


class Coin(nn.Module):
    """Tosses a coin for each picture: any change of it is another toss."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.AvgPool2d(CELL_PX)

    def forward(self, images: Tensor) -> Tensor:
        sides = images.new_tensor([6.0 * (key % 2) - 3.0 for key in keys_of(images)])
        tumour = sides + self.features(images).mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(tumour), tumour], dim=1)


class Colour(nn.Module):
    """The share by which green is darker than red: the work of eosin."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d((images[:, :1] - images[:, 1:2]).relu(), 4)


def stain_reader() -> PooledLinear:
    """Calls pink above the usual tumour."""
    return _read(Colour(), 100.0, -100.0 * (225 - 150) / 127.5)


class Darkness(nn.Module):
    """The darkness of a cell of 4 px against most of the patch, whatever its colour, from a margin on."""

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
