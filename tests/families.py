"""One small network of every family, with the layer and layout that are right for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, get_model

from wsi_gradcam.cam.facts import Layer, Layout
from wsi_gradcam.cam.layers import check_layer, probe_images

CLASSES = 5


@dataclass(frozen=True)
class Family:
    """A network of `CLASSES` classes, its input's (height, width), and what should be found."""

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    layer: str
    layout: Layout


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: get_model(name, num_classes=CLASSES, **options)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


FAMILIES = {
    "resnet18": Family(_torchvision("resnet18"), (64, 64), "layer4", Layout("bkhw", 512, 2, 2)),
    # An in-place ReLU right behind the layer.
    "densenet": Family(
        lambda: DenseNet(block_config=(2, 2, 2, 2), num_classes=CLASSES),
        (64, 64),
        "features",
        Layout("bkhw", 128, 2, 2),
    ),
    "efficientnet_b0": Family(_torchvision("efficientnet_b0"), (64, 96), "features", Layout("bkhw", 1280, 2, 3)),
    "convnext": Family(_timm("convnext_atto"), (64, 64), "stages", Layout("bkhw", 320, 2, 2)),
    "swin": Family(
        _timm("swin_tiny_patch4_window7_224", img_size=(64, 128), window_size=2, depths=(1, 1, 1, 1), embed_dim=24),
        (64, 128),
        "norm",
        Layout("bhwk", 192, 2, 4),
    ),
    "vit, class token": Family(
        _timm("vit_tiny_patch16_224", img_size=(64, 96), depth=4), (64, 96), "blocks.2", Layout("bnk", 192, 4, 6, 1)
    ),
    "vit, registers": Family(
        _timm("vit_small_patch14_reg4_dinov2", img_size=56, depth=3, embed_dim=48, num_heads=3),
        (56, 56),
        "blocks.1",
        Layout("bnk", 48, 4, 4, 5),
    ),
    "vit, pooled": Family(
        _timm("vit_tiny_patch16_224", img_size=64, depth=3, global_pool="avg"),
        (64, 64),
        "blocks",
        Layout("bnk", 192, 4, 4, 1),
    ),
}

READING_CLASS_TOKENS = {"vit, class token", "vit, registers"}  # alone, behind their last block


@cache
def network_of(name: str) -> nn.Module:
    """The untrained network, in evaluation mode; tests share it and leave it as it is."""
    torch.manual_seed(0)
    return FAMILIES[name].build().eval()


@cache
def layer_of(name: str) -> Layer:
    """Its layer, as the package finds the layout."""
    family = FAMILIES[name]
    return Layer(family.layer, check_layer(network_of(name), family.layer, probe_images(family.size)))


def images_of(name: str, count: int = 3) -> Tensor:
    """Noise in the size that the network takes."""
    return torch.randn(count, 3, *FAMILIES[name].size, generator=torch.Generator().manual_seed(7))
