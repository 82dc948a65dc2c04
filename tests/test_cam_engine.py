"""Grad-CAM agrees with captum and with autograd by hand, whatever the batch, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model

from tests.oracles import gradcam_by_hand
from tests.toy_models import PooledLinear, pooled_linear
from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.layers import find_layer, probe_images
from wsi_gradcam.cam.methods import METHODS, gradcam, hirescam
from wsi_gradcam.cam.targets import Target

TARGETS = (Target("two", 2), Target("predicted", None), Target("zero", 0))
NETWORKS = ("resnet18", "densenet121", "efficientnet_b0", "convnext_tiny", "vgg16")


class Bypassed(nn.Module):
    """The layer's map meets a skip that bypasses it, and an in-place ReLU right behind it; the head is curved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.layer = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def skip(self, images: Tensor) -> Tensor:
        return torch.tanh(self.stem(images))

    def trunk(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.layer(self.skip(images)))

    def head(self, activation: Tensor, skip: Tensor) -> Tensor:
        joined = torch.sigmoid(F.relu(activation) + skip)
        return cast(Tensor, self.fc((joined**2).mean(dim=(2, 3)))) * 5

    def forward(self, images: Tensor) -> Tensor:
        skip = self.skip(images)
        joined = torch.sigmoid(F.relu(self.layer(skip), inplace=True) + skip)
        return cast(Tensor, self.fc((joined**2).mean(dim=(2, 3)))) * 5


@pytest.fixture
def bypassed() -> Bypassed:
    torch.manual_seed(3)
    return Bypassed().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 32, 24, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pooled() -> PooledLinear:
    torch.manual_seed(4)
    return cast(PooledLinear, pooled_linear().eval())


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return cast(nn.Module, get_model(request.param, weights=None, num_classes=5).eval())


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_gradcam_equals_captum(network: nn.Module) -> None:
    images = probe_images((64, 64))
    layer = find_layer(network, images)
    _, found = explain_batch(network, layer, images, [Target("three", 3)], gradcam)
    captum = LayerGradCam(network, network.get_submodule(layer))
    expected = captum.attribute(images, target=3, relu_attributions=False).detach()
    assert (expected < 0).any()  # signed: a ReLU on either side would show
    assert relative(found, expected) < 1e-5


def test_gradcam_equals_autograd_by_hand_for_several_targets_at_once(bypassed: Bypassed, images: Tensor) -> None:
    logits, cams = explain_batch(bypassed, "layer", images, TARGETS, gradcam)
    for i in range(len(images)):
        image = images[i : i + 1]
        head = partial(bypassed.head, skip=bypassed.skip(image).detach())
        for t, target in enumerate(TARGETS):
            expected = gradcam_by_hand(bypassed.trunk, head, image, target.index)
            torch.testing.assert_close(cams[i : i + 1, t], expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits, bypassed(images).detach())


def test_predicted_is_each_patchs_own_class(bypassed: Bypassed, images: Tensor) -> None:
    everything = [Target(str(i), i) for i in range(4)]
    with torch.no_grad():  # all classes shall win somewhere
        bypassed.fc.bias.sub_(bypassed(images).mean(dim=0) / 5)
    logits, cams = explain_batch(bypassed, "layer", images, [*everything, Target("predicted", None)], gradcam)
    winners = logits.argmax(dim=1)
    assert len(set(winners.tolist())) > 1
    torch.testing.assert_close(cams[:, 4], cams[torch.arange(5), winners])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_with_pooling_and_a_linear_layer_a_maps_sum_and_the_bias_are_the_logit(
    method: Callable[[Tensor, Tensor], Tensor], pooled: PooledLinear, images: Tensor
) -> None:
    targets = [Target("b", 1), Target("a", 0)]
    logits, cams = explain_batch(pooled, "features", images, targets, method)
    bias, cells = pooled.fc.bias.detach()[[1, 0]], cams.shape[2] * cams.shape[3]
    torch.testing.assert_close(cams.sum(dim=(2, 3)) + bias, logits[:, [1, 0]], rtol=0, atol=1e-4)
    torch.testing.assert_close((cams * cells).mean(dim=(2, 3)) + bias, logits[:, [1, 0]], rtol=0, atol=1e-4)


def test_hirescam_is_gradcam_behind_pooling_and_a_linear_layer(pooled: PooledLinear, images: Tensor) -> None:
    targets = [Target("a", 0)]
    _, smooth = explain_batch(pooled, "features", images, targets, gradcam)
    _, sharp = explain_batch(pooled, "features", images, targets, hirescam)
    torch.testing.assert_close(smooth, sharp, rtol=1e-5, atol=1e-7)


def test_hirescam_weighs_each_cell_by_its_own_gradient() -> None:
    A, g = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    found = hirescam(A, g)
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)).tolist():
        expected = sum(float(A[b, k, y, x]) * float(g[b, k, y, x]) for k in range(3))
        assert float(found[b, y, x]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batch_size_does_not_matter(size: int, bypassed: Bypassed, images: Tensor) -> None:
    logits, cams = explain_batch(bypassed, "layer", images, TARGETS, gradcam)
    parts = [explain_batch(bypassed, "layer", part, TARGETS, gradcam) for part in torch.split(images, size)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), logits)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), cams)


def test_order_in_the_batch_does_not_matter(bypassed: Bypassed, images: Tensor) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    logits, cams = explain_batch(bypassed, "layer", images, TARGETS, gradcam)
    shuffled_logits, shuffled_cams = explain_batch(bypassed, "layer", images[order], TARGETS, gradcam)
    torch.testing.assert_close(shuffled_logits, logits[order])
    torch.testing.assert_close(shuffled_cams, cams[order])


def test_training_mode_does_not_reach_the_result(images: Tensor) -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Tanh())
    network = PooledLinear(features, 4)
    expected = explain_batch(network.eval(), "features", images, [Target("a", 0)], gradcam)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = explain_batch(network.train(), "features", images, [Target("a", 0)], gradcam)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


def test_no_gradient_reaches_a_parameter(pooled: PooledLinear, images: Tensor) -> None:
    explain_batch(pooled, "features", images, [Target("a", 0)], gradcam)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pooled.parameters())


def test_results_hold_no_graph(pooled: PooledLinear, images: Tensor) -> None:
    logits, cams = explain_batch(pooled, "features", images, [Target("a", 0)], gradcam)
    assert not logits.requires_grad
    assert not cams.requires_grad


def test_the_trunk_saves_nothing_for_a_backward_pass(pooled: PooledLinear, images: Tensor) -> None:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pooled(images)
        plain = sum(saved)
        saved.clear()
        explain_batch(pooled, "features", images, [Target("a", 0)], gradcam)
    assert plain > images.numel()
    assert sum(saved) < 200  # the pooled values and the linear layer's weights


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_had_in_either_grad_mode(enabled: bool, pooled: PooledLinear, images: Tensor) -> None:
    expected = explain_batch(pooled, "features", images, [Target("a", 0)], gradcam)[1]
    with torch.set_grad_enabled(enabled):
        found = explain_batch(pooled, "features", images, [Target("a", 0)], gradcam)[1]
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(found, expected)
    assert expected.any()


def test_a_target_that_does_not_see_the_layer_has_a_map_of_zeros(images: Tensor) -> None:
    class OneBlind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv2d(3, 2, 4, stride=4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.features(x).mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1)

    _, cams = explain_batch(OneBlind(), "features", images, [Target("seeing", 0), Target("blind", 1)], gradcam)
    assert cams[:, 0].any()
    assert not cams[:, 1].any()
