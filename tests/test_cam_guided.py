"""Guided ReLUs: the same values, and a gradient only where it and the slope are positive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_gradcam.cam.layers import guided_graph, guided_relu
from wsi_gradcam.errors import LayerError
from wsi_gradcam.models.graph import trace

VALUES = torch.tensor([-2.0, 0.0, 1.0, 3.0, 6.0, 8.0])


@pytest.mark.parametrize("ceiling", [torch.inf, 6.0, 1.0])
@pytest.mark.parametrize("given", [[1.0] * 6, [-1.0] * 6, [1.0, 1.0, -1.0, 2.0, 2.0, -2.0]])
def test_a_guided_relu_passes_positive_gradients_where_it_has_a_slope(ceiling: float, given: list[float]) -> None:
    leaf = VALUES.clone().requires_grad_(True)
    value = guided_relu(leaf, ceiling)
    assert value.tolist() == [min(max(v, 0.0), ceiling) for v in VALUES.tolist()]
    (found,) = torch.autograd.grad(value, leaf, torch.tensor(given))
    expected = [max(g, 0.0) if 0 < v < ceiling else 0.0 for v, g in zip(VALUES.tolist(), given, strict=True)]
    assert found.tolist() == expected


class Net(nn.Module):
    """A ReLU of one kind, and a sum with negative weights behind it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "in place":
            maps = F.relu_(images * 1)
        elif self.kind == "clamp":
            maps = F.hardtanh(images * 1, 0.0, 1.0)
        else:
            maps = {"relu": F.relu, "relu6": F.relu6}[self.kind](images)
        return torch.stack([maps[:, 0].sum(dim=(1, 2)), -maps[:, 1].sum(dim=(1, 2))], dim=1)


@pytest.mark.parametrize(
    ("kind", "ceiling"), [("relu", torch.inf), ("in place", torch.inf), ("relu6", 6.0), ("clamp", 1.0)]
)
def test_every_spelling_of_relu_is_guided(kind: str, ceiling: float) -> None:
    network, images = Net(kind), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 5
    graph = guided_graph(trace(network, images))
    leaf = images.clone().requires_grad_(True)
    logits = graph(leaf)
    assert torch.equal(logits, network(images))
    (first,) = torch.autograd.grad(logits[:, 0].sum(), leaf, retain_graph=True)
    (second,) = torch.autograd.grad(logits[:, 1].sum(), leaf)
    assert torch.equal(first[:, 0], ((images[:, 0] > 0) & (images[:, 0] < ceiling)).float())
    assert not first[:, 1:].any()
    assert not second.any()  # a negative gradient stops at the ReLU


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Hardtanh(-1, 1)])
def test_a_network_without_relu_is_refused(activation: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(LayerError, match="defined for ReLU, and this model has none; use gradient or smoothgrad"):
        guided_graph(trace(network, torch.zeros(2, 3, 8, 8)))
