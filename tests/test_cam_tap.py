"""The tap gives the layer's own output, and hooks, modes and grad mode are as before, whatever happens inside."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_gradcam.cam.layers import Tap, find_module, tapped
from wsi_gradcam.errors import LayerError
from wsi_gradcam.models.outputs import LogitsOf

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
    assert torch.equal(tap.value(), expected)
    assert torch.equal(output, network(IMAGES))


def test_the_gradient_goes_through_an_in_place_operation() -> None:
    network = Changed()
    with tapped(network, "layer") as tap:
        output = tap.forward(network, IMAGES)
    first, second = (torch.autograd.grad(output[:, k].sum(), tap.value(), retain_graph=True)[0] for k in (1, 2))
    alive = (tap.value().detach() > 0) / 36.0  # mean over 6 x 6
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
        (Changed(), "layer5", "no layer 'layer5'; did you mean layer\\?; 'wsi-gradcam info --model' lists them"),
        (Changed(), "head", "no layer 'head'; it has layer, unused; 'wsi-gradcam info"),
        (Changed(), "", "no layer ''"),
    ],
    ids=["unused", "reused", "tuple", "misspelt", "unknown", "empty"],
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


class Chain(nn.Module):
    """Three layers, the second and third of which are added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        first = torch.tanh(self.first(images))
        return cast(Tensor, torch.tanh(self.second(first)) * self.third(first)).mean(dim=(2, 3))


@pytest.mark.parametrize("order", [("first", "third", "second"), ("second", "first", "third")])
def test_several_layers_have_their_own_values_and_gradients(order: tuple[str, ...]) -> None:
    torch.manual_seed(2)
    network = Chain()
    kept: dict[str, Tensor] = {}
    for layer in order:
        find_module(network, layer).register_forward_hook(
            lambda module, args, output, layer=layer: kept.__setitem__(layer, output)
        )
    expected = torch.autograd.grad(network(IMAGES)[:, 1].sum(), [kept[layer] for layer in order])
    with tapped(network, *order) as tap:
        output = tap.forward(network, IMAGES)
    found = torch.autograd.grad(output[:, 1].sum(), [tap.values[layer] for layer in order])
    for layer, one, other in zip(order, found, expected, strict=True):
        torch.testing.assert_close(tap.values[layer], kept[layer])
        torch.testing.assert_close(one, other)


def test_one_missing_layer_of_several_leaves_no_hook_on_the_others() -> None:
    network = Chain()
    with pytest.raises(LayerError, match="did you mean third"), tapped(network, "first", "thrid"):
        pass
    assert not hooks(network)


def test_before_the_layer_there_is_no_graph_and_behind_it_there_is() -> None:
    network, modes = Changed(), dict[str, bool]()
    network.layer.register_forward_pre_hook(lambda *args: modes.__setitem__("before", torch.is_grad_enabled()))
    with torch.enable_grad(), tapped(network, "layer") as tap:
        output = tap.forward(network, IMAGES)
        assert torch.is_grad_enabled()
    assert modes == {"before": False}
    assert tap.value().is_leaf
    assert output.requires_grad


def test_the_caller_of_a_network_that_forbids_gradients_gets_an_output_without() -> None:
    class Forbidding(Changed):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                maps = self.layer(images)
            return cast(Tensor, maps).mean(dim=(2, 3))

    network = Forbidding()
    with tapped(network, "layer") as tap:
        assert not tap.forward(network, IMAGES).requires_grad


def test_layers_have_the_names_they_have_in_the_network_that_is_wrapped_for_its_logits() -> None:
    network = Changed()
    assert find_module(LogitsOf(network, None), "layer") is network.layer


def test_only_tensors_are_tapped() -> None:
    with pytest.raises(LayerError, match="returns a dict"):
        Tap(("layer",)).hook("layer", {"maps": IMAGES})


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
    assert torch.equal(tap.value(), network.layer(IMAGES[:1] * 2))
