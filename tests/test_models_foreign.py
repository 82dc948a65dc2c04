"""Weights that others trained and published load into a class written again.

They are those of https://github.com/Heartfirey/Shufflenet-in-lung-colon-image-classification.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.test_models_load import spec
from wsi_gradcam.models.load import load_model


def shuffled(maps: Tensor, groups: int) -> Tensor:
    """Channels dealt out among the groups."""
    count, channels, height, width = maps.shape
    return maps.view(count, groups, channels // groups, height, width).transpose(1, 2).reshape(maps.shape)


class ShuffleUnit(nn.Module):
    """A unit of ShuffleNet (1707.01083, figure 2): grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        own = after - before if stride == 2 else after
        inner = own // 4
        self.stride, self.groups = stride, 1 if before == 24 else 2
        self.conv1 = nn.Conv2d(before, inner, 1, groups=self.groups, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.conv3 = nn.Conv2d(inner, own, 1, groups=2, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(inner), nn.BatchNorm2d(own)

    def forward(self, maps: Tensor) -> Tensor:
        new = shuffled(self.bn1(self.conv1(maps)).relu(), self.groups)
        new = self.bn3(self.conv3(self.bn2(self.conv2(new)).relu()))
        new = torch.cat([new, nn.functional.avg_pool2d(maps, 3, 2, 1)], 1) if self.stride == 2 else new + maps
        return torch.relu(new)


class ShuffleNet(nn.Module):
    """ShuffleNet of two groups for pictures of 32 px."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24)
        widths = [24, 200, 400, 800]
        for i, units in enumerate((4, 8, 4)):
            first = ShuffleUnit(widths[i], widths[i + 1], 2)
            others = [ShuffleUnit(widths[i + 1], widths[i + 1], 1) for _ in range(units - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *others))
        self.layers = [f"layer{i + 1}" for i in range(3)]
        self.linear = nn.Linear(800, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.bn1(self.conv1(images)).relu()
        for name in self.layers:
            maps = self.get_submodule(name)(maps)
        logits: Tensor = self.linear(nn.functional.avg_pool2d(maps, 4).flatten(1))
        return logits


def shufflenet() -> nn.Module:
    return ShuffleNet()


def test_foreign_weights_load_into_a_class_written_anew(shared_data: Path) -> None:
    (path,) = (shared_data / "weights" / "shufflenet_lc25000").glob("*.pkl")
    model = load_model(
        spec(source=f"{__name__}:shufflenet", weights=str(path), scale=255, classes=["a", "b", "c", "d", "e"])
    )
    assert sum(p.numel() for p in model.module.parameters()) == 883_577
    # Tissue in 0..255 is what its first normalisation has seen in training; in 0..1 it would be nearly constant.
    tile = Image.open(next((shared_data / "tiles" / "oscc_oral").rglob("*.jpg"))).convert("RGB").resize((128, 128))
    rgb = torch.from_numpy(np.asarray(tile).copy()).unfold(0, 32, 32).unfold(1, 32, 32)
    rgb = rgb.permute(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3)
    network: Any = model.module
    assert 0.3 < network.bn1(network.conv1(model.prepare(rgb))).std() < 3
    assert network.bn1(network.conv1(model.prepare(rgb) / 255)).std(dim=(0, 2, 3)).max() < 0.1
    logits = model.module(model.prepare(rgb))
    assert logits.shape == (16, 5)
    assert float(logits.std(dim=0).min()) > 0.01
