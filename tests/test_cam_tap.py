"""The tap gives the layer's own output, and hooks, modes and grad mode are as before, whatever happens inside."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_gradcam.cam.tap import gradients, tapped
from wsi_gradcam.errors import LayerError

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Changed(nn.Module):
    """Changes the layer's output in place right behind it, as DenseNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.unused = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.layer(images), inplace=True).mean(dim=(2, 3))


class Raising(nn.Module):
    """Raises before, in or behind the layer."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.layer = nn.Identity() if place != "in" else Broken()
        self.dropout = nn.Dropout()

    def forward(self, images: Tensor) -> Tensor:
        if self.place == "before":
            raise ZeroDivisionError
        images = self.layer(images)
        if self.place == "behind":
            raise ZeroDivisionError
        return images.mean(dim=(2, 3))


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise ZeroDivisionError


class Twice(nn.Module):
    """Runs one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.layer(self.layer(images))).mean(dim=(2, 3))


class Pairs(nn.Module):
    """Its layer returns a tuple."""

    class Two(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images

    def __init__(self) -> None:
        super().__init__()
        self.layer = Pairs.Two()

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.layer(images)[0].mean(dim=(2, 3)))


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_the_activation_is_what_the_layer_returned_before_an_in_place_operation() -> None:
    network = Changed()
    expected = network.layer(IMAGES).detach()
    assert (expected < 0).any()
    with tapped(network, "layer") as tap:
        output = tap.forward(network, IMAGES)
    assert tap.activation is not None
    assert torch.equal(tap.activation, expected)
    assert torch.equal(output, network(IMAGES))


def test_the_gradient_goes_through_an_in_place_operation() -> None:
    network = Changed()
    with tapped(network, "layer") as tap:
        output = tap.forward(network, IMAGES)
    assert tap.activation is not None
    first, second = list(gradients(output[:, 1:3], tap.activation))
    alive = (tap.activation.detach() > 0) / 36.0  # mean over 6 x 6
    assert torch.equal(first[:, 1], alive[:, 1].float())
    assert torch.equal(second[:, 2], alive[:, 2].float())
    assert not first[:, [0, 2, 3]].any()


def test_a_replacement_goes_to_the_head_instead_of_the_layers_output() -> None:
    network = Changed()
    with tapped(network, "layer") as tap:
        tap.replacement = torch.arange(2 * 4 * 2 * 2.0).reshape(2, 4, 2, 2)
        output = tap.forward(network, IMAGES)
    assert torch.equal(output, tap.replacement.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("network", "layer", "problem"),
    [
        (Changed(), "unused", "'unused' is not used in the forward pass"),
        (Twice(), "layer", "'layer' runs more than once"),
        (Pairs(), "layer", "'layer' returns a tuple, expected a tensor"),
        (Changed(), "layer5", r"no layer 'layer5'; it has layer, unused"),
        (Changed(), "", "no layer ''"),
    ],
    ids=["unused", "reused", "tuple", "unknown", "empty"],
)
def test_a_layer_that_cannot_be_tapped_is_refused_and_left_as_it_was(
    network: nn.Module, layer: str, problem: str
) -> None:
    with pytest.raises(LayerError, match=problem), tapped(network, layer) as tap:
        tap.forward(network, IMAGES)
    assert not hooks(network)
    assert network.training


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("place", ["before", "in", "behind"])
def test_an_exception_leaves_no_hook_no_mode_and_no_grad_mode_behind(place: str, enabled: bool) -> None:
    network = Raising(place)
    network.layer.eval()  # modes differ within the network
    before = [part.training for part in network.modules()]
    with torch.set_grad_enabled(enabled):
        with pytest.raises(ZeroDivisionError), tapped(network, "layer") as tap:
            tap.forward(network, IMAGES)
        assert torch.is_grad_enabled() == enabled
    assert not hooks(network)
    assert [part.training for part in network.modules()] == before == [True, False, True]


def test_a_networks_own_eval_that_raises_leaves_no_hook() -> None:
    class Stubborn(Changed):
        def eval(self) -> Stubborn:
            raise ZeroDivisionError

    network = Stubborn()
    with pytest.raises(ZeroDivisionError), tapped(network, "layer"):
        pass
    assert not hooks(network)


def test_other_peoples_hooks_stay() -> None:
    network, seen = Changed(), []
    network.layer.register_forward_hook(lambda *args: seen.append(args[2].shape))
    with tapped(network, "layer") as tap:
        tap.forward(network, IMAGES)
    assert hooks(network) == 1
    network(IMAGES)
    assert len(seen) == 2


def test_inside_the_network_runs_in_evaluation_mode() -> None:
    network = Raising("nowhere")
    with tapped(network, "layer"):
        assert not any(part.training for part in network.modules())
    assert all(part.training for part in network.modules())


def test_a_second_pass_forgets_the_first() -> None:
    network = Changed()
    with tapped(network, "layer") as tap:
        tap.forward(network, IMAGES)
        tap.forward(network, IMAGES[:1] * 2)
    assert tap.activation is not None
    assert torch.equal(tap.activation, network.layer(IMAGES[:1] * 2))
