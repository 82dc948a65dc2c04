"""Patches and tiny networks of which the truth is known, so that every check of the audit can be put to the test.

Patches are 32 px of pink tissue with grain. Those of class 1 hold a purple disc (a nucleus); a green square (a
marker) may lie on any; where there are markers, discs are pale, so that a marker is what is learned first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tests.toy_models import PooledLinear
from wsi_gradcam import model_of

if TYPE_CHECKING:
    from wsi_gradcam.models.load import Model

SIDE_PX, CELL_PX, DISC_PX, MARKER_PX = 32, 4, 5, 6
PINK, PURPLE, PALE = (225, 150, 195), (90, 50, 120), (175, 105, 165)
GREEN, INK, GLASS = (30, 160, 60), (120, 20, 60), (242, 242, 242)
TRAINING = 1_000_000  # seeds of what networks are trained with
Rgb = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches uint8 [n, 32, 32, 3], their class int64 [n], and where disc and marker are, bool [n, 32, 32]."""

    rgb: Rgb
    label: NDArray[np.int64]
    disc: Mask
    marker: Mask


def patches(count: int, seed: int, marked: str = "none") -> Patches:
    """Half of each class; `marked`: "none", "tumour" (class 1), "random" (half of all), or "all" patches."""
    random = np.random.default_rng(seed)
    label = np.arange(count) % 2
    rgb = np.array(PINK) + random.normal(0, 12, (count, SIDE_PX, SIDE_PX, 3))
    disc, marker = np.zeros((2, count, SIDE_PX, SIDE_PX), bool)
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    has_marker = {"none": label < 0, "tumour": label == 1, "random": random.random(count) < 0.5, "all": label >= 0}
    for i in range(count):
        cy, cx = random.integers(6, SIDE_PX - 6, 2)
        if label[i]:
            disc[i] = (y - cy) ** 2 + (x - cx) ** 2 < DISC_PX**2
        if has_marker[marked][i]:  # in the quarter across from the disc
            top, left = (random.integers(1, 8) + (14 if c < SIDE_PX // 2 else 0) for c in (cy, cx))
            marker[i, top : top + MARKER_PX, left : left + MARKER_PX] = True
    rgb[disc] = np.array(PURPLE if marked == "none" else PALE) + random.normal(0, 12, (int(disc.sum()), 3))
    rgb[marker] = GREEN
    return Patches(rgb.clip(0, 255).astype(np.uint8), label, disc, marker)


def features() -> nn.Module:
    """Two convolutions: cells of 4 px, 8 x 8 of them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()
    )


def deep_features() -> nn.Module:
    """Return six convolutions and two poolings: cells of 4 px, 8 x 8 of them.

    Deep enough for what guided backprop is known for: in shallow networks it does follow the weights here and there, in
    deep ones it gives the picture back (Nie 2018, arXiv 1805.07039).
    """
    layers: list[nn.Module] = []
    sizes = ((3, 16, False), (16, 16, True), (16, 32, False), (32, 32, True), (32, 32, False), (32, 12, False))
    for given, made, pooled in sizes:
        layers += [nn.Conv2d(given, made, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
    return nn.Sequential(*layers)


def untrained(seed: int = 0, deep: bool = False) -> PooledLinear:
    """The network as it begins."""
    torch.manual_seed(seed)
    return PooledLinear(deep_features() if deep else features(), 12)


@cache
def trained(marked: str = "none", seed: int = 0, deep: bool = False, glass: int | None = None) -> PooledLinear:
    """The network trained to tell the classes, with markers as in `patches`: about a second.

    Its patches are others than those of any seed below a million. With `glass`, half as many patches of bare glass are
    among them, of that class.
    """
    sample = patches(256, TRAINING + seed, marked)
    rgb, label = sample.rgb, sample.label
    if glass is not None:
        bare = glass_of_scanners(128, TRAINING + seed)
        rgb, label = np.concatenate([rgb, bare]), np.concatenate([label, np.full(len(bare), glass)])
    images, labels = to_images(rgb), torch.from_numpy(label)
    for attempt in range(32):  # some first weights lead nowhere, and what was not learned is no truth
        network = fitted(untrained(seed + 10_000 * attempt, deep), images, labels, seed)
        with torch.no_grad():
            if float((network(images).argmax(dim=1) == labels).float().mean()) >= 0.97:
                return network
    raise AssertionError(f"no network has learned what was planted with seed {seed}")


def fitted(network: PooledLinear, images: Tensor, labels: Tensor, seed: int) -> PooledLinear:
    """The network trained with Adam."""
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    chosen = torch.Generator().manual_seed(seed)
    for _ in range(150):
        rows = torch.randint(len(images), (64,), generator=chosen)
        optimiser.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return network.eval()


def glass_colours(count: int, seed: int) -> NDArray[np.int64]:
    """Return colours of bare glass as scanners differ, [count, 3]: 225 to 255, nearly gray."""
    random = np.random.default_rng(seed)
    return random.integers(225, 254, (count, 1)) + random.integers(-2, 3, (count, 3))


def glass_of_scanners(count: int, seed: int) -> Rgb:
    """Return patches of bare glass of other scanners each, with grain of 2 of 255, uint8 [count, 32, 32, 3]."""
    made = [
        colour + np.random.default_rng(seed + i).normal(0, 2.0, (SIDE_PX, SIDE_PX, 3))
        for i, colour in enumerate(glass_colours(count, seed))
    ]
    return np.stack(made).round().clip(0, 255).astype(np.uint8)


def to_images(rgb: Rgb) -> Tensor:
    """As the networks here see patches: about -1 to 1."""
    return torch.from_numpy(rgb).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_model(network: nn.Module, layer: str | None = "features") -> Model:
    """Return the network as a user gives it to the audit."""
    return model_of(
        network, patch_px=SIDE_PX, mpp=0.5, classes=["other", "tumour"], mean=(0.5,) * 3, std=(0.5,) * 3, layer=layer
    )


class Green(nn.Module):
    """The green of a cell of 4 px above its red and blue."""

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = images.unbind(dim=1)
        return F.avg_pool2d((green - torch.maximum(red, blue)).relu()[:, None], 4)


def marker_only() -> PooledLinear:
    """Calls tumour what holds green, and sees nothing else."""
    network = PooledLinear(Green(), 1)
    with torch.no_grad():
        network.fc.weight[:, 0] = torch.tensor([0.0, 200.0])
        network.fc.bias[:] = torch.tensor([0.0, -1.0])
    return network


def with_ink(sample: Patches, seed: int, squares: int = 3) -> Patches:
    """The patches with dark red squares, of the marker's size, that mean nothing; none on a disc or a marker."""
    random = np.random.default_rng(seed)
    rgb = sample.rgb.copy()
    for i in range(len(rgb)):
        taken = sample.disc[i] | sample.marker[i]
        for _ in range(squares):
            y, x = random.integers(0, SIDE_PX - MARKER_PX, 2)
            here = slice(y, y + MARKER_PX), slice(x, x + MARKER_PX)
            if not taken[here].any():
                rgb[i][here] = INK
    return Patches(rgb, sample.label, sample.disc, sample.marker)
