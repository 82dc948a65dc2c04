"""The layer that is found, on networks people use and on networks made to mislead; and the self-test of a named one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from tests.families import FAMILIES, network_of
from tests.toy_models import PooledLinear, pooled_linear
from wsi_gradcam.cam.facts import Layout
from wsi_gradcam.cam.layers import candidate_layers, check_layer, dominates, find_layer, probe_images
from wsi_gradcam.errors import LayerError, ModelError

IMAGES = probe_images((32, 32))


class Net(nn.Module):
    """Three convolutions with a forward of the test's own."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh())
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)
        self.call = forward
        self.calls = 0
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.call(self, images)

    def head(self, activation: Tensor) -> Tensor:
        return cast(Tensor, self.fc(self.pool(torch.relu(activation)).flatten(1)))


class Untouched(nn.Module):
    """Stays out of state and mode bookkeeping: returns what a function makes of the images."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def plain(net: Net, images: Tensor) -> Tensor:
    return net.head(net.third(net.second(net.first(images))))


def bypassed(net: Net, images: Tensor) -> Tensor:
    second = net.second(net.first(images))
    return net.head(net.third(second) + second)


def reused(net: Net, images: Tensor) -> Tensor:
    return net.head(net.third(net.third(net.second(net.first(images)))))


def overwritten(net: Net, images: Tensor) -> Tensor:
    return net.head(net.third(torch.relu_(net.second(net.first(images)))).relu_())


def side_branch(net: Net, images: Tensor) -> Tensor:
    """The last map that is made goes nowhere."""
    second = net.second(net.first(images))
    net.third(second)
    return net.head(second)


def noisy(net: Net, images: Tensor) -> Tensor:
    return plain(net, images) + 0.01 * torch.rand(3)


def counting(net: Net, images: Tensor) -> Tensor:
    return plain(net, images) * net.calls


def squared_in_place(net: Net, images: Tensor) -> Tensor:
    """What no backward pass can undo: the sigmoid's result is needed and overwritten."""
    return net.head(torch.sigmoid(net.third(net.second(net.first(images)))).mul_(2))


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda: get_model("vgg11", init_weights=False), "features.19"),
        (lambda: get_model("mobilenet_v3_small"), "features"),
        (lambda: get_model("densenet121"), "features"),
        (lambda: timm.create_model("efficientnet_b0"), "bn2"),
        (lambda: timm.create_model("maxvit_pico_rw_256", img_size=64, num_classes=5), "norm"),
        (pooled_linear, "features"),
    ],
    ids=["vgg11", "mobilenet_v3", "densenet121", "timm efficientnet_b0", "maxvit", "toy"],
)
def test_the_last_map_that_the_output_passes_through_is_found(build: Callable[[], nn.Module], layer: str) -> None:
    torch.manual_seed(0)
    network = build().eval().requires_grad_(False)
    images = probe_images((64, 64))
    assert find_layer(network, images) == layer
    assert check_layer(network, layer, images).channels > 1
    assert not hooks(network)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layer_and_layout_of_every_family_are_found(name: str) -> None:
    """Behind the last block but one of a transformer with a class token no gradient reaches the picture's tokens."""
    network, family = network_of(name), FAMILIES[name]
    images = probe_images(family.size)
    assert find_layer(network, images) == family.layer
    assert check_layer(network, family.layer, images) == family.layout
    assert not hooks(network)


def test_the_last_block_of_a_transformer_that_reads_its_class_token_alone_is_refused() -> None:
    network = network_of("vit, class token")
    with pytest.raises(LayerError, match=r"does not depend on the map of layer 'blocks\.3'; choose another"):
        check_layer(network, "blocks.3", probe_images((64, 96)))


class Sequences(nn.Module):
    """A map whose cells are put in one axis, channels first, normalised there, and averaged."""

    def __init__(self, channels: int, cells: int, norm: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 1)
        self.conv = nn.Conv2d(5, channels, 4, stride=4)
        self.flat = nn.Flatten(2)
        self.norm = nn.LayerNorm(cells) if norm else nn.Identity()
        self.fc = nn.Linear(channels, 3)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.fc(self.norm(self.flat(torch.tanh(self.conv(self.stem(images))))).mean(dim=2)))


@pytest.mark.parametrize("channels", [49, 50, 100])
def test_maps_with_cells_in_one_axis_are_not_taken_for_tokens(channels: int) -> None:
    """[B, K, h w] with K = 49 or 100 could be 7 x 7 or 10 x 10 tokens, with 50 a class token and 7 x 7."""
    network = Sequences(channels, 64, norm=True).eval()
    candidates, _ = candidate_layers(network, IMAGES)
    assert [c.name for c in candidates] == ["stem", "conv"]
    assert find_layer(network, IMAGES) == "conv"


def test_a_view_of_a_map_is_no_map_of_its_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Tanh(), nn.Flatten(2), nn.Flatten(1), nn.Linear(256, 3)).eval()
    candidates, _ = candidate_layers(network, IMAGES)
    assert [(c.name, c.layout.axes) for c in candidates] == [("0", "bkhw"), ("1", "bkhw")]


def test_attention_weights_are_not_taken_for_a_map() -> None:
    """[B, heads, N, N] has a picture's proportions, but the values that are weighted go around it."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 8, stride=8)
            self.norm = nn.LayerNorm(8)
            self.softmax = nn.Softmax(dim=-1)
            self.fc = nn.Linear(8, 3)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.norm(self.conv(images).flatten(2).mT)
            weights = self.softmax(tokens @ tokens.mT)
            return cast(Tensor, self.fc((weights @ tokens).mean(dim=1)))

    network = Attending().eval()
    images = probe_images((32, 32))
    assert "softmax" not in {find_layer(network, images)}
    assert find_layer(network, images) == "norm"


def test_modules_that_return_numbers_and_scalars_do_not_mislead() -> None:
    class Scalar(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, images: plain(net, images) + 0 * cast(Tensor, self.scale(images.mean())))
            self.scale = nn.Identity()

    assert find_layer(Scalar(), IMAGES) == "third"


@pytest.mark.parametrize(
    ("forward", "layer"),
    [(plain, "third"), (bypassed, "second"), (reused, "second"), (overwritten, "third"), (side_branch, "second")],
)
def test_skips_reuse_and_side_branches_do_not_mislead(forward: Callable[[Net, Tensor], Tensor], layer: str) -> None:
    assert find_layer(Net(forward), IMAGES) == layer


def test_a_map_of_pooling_is_passed_over_for_the_finer_one() -> None:
    features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    assert find_layer(PooledLinear(features, 4).eval(), IMAGES) == "features.1"


def test_a_map_of_one_cell_is_passed_over() -> None:
    features = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Tanh(), nn.Conv2d(4, 4, 4))
    assert find_layer(PooledLinear(features, 4).eval(), IMAGES) == "features.1"


@pytest.mark.parametrize(("hidden", "found"), [(0, True), (1, False)])
def test_a_map_as_early_as_a_patch_embedding_is_not_taken(hidden: int, found: bool) -> None:
    tail = [nn.Flatten(), *hidden * [nn.Linear(16, 16), nn.Tanh()], nn.Linear(16, 3)]
    network = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.Tanh(), *tail).eval()
    if found:
        assert find_layer(network, IMAGES) == "1"
    else:
        with pytest.raises(LayerError, match="no layer in the later part of Sequential"):
            find_layer(network, IMAGES)


def test_a_small_network_with_a_large_head_has_a_layer() -> None:
    trunk = [nn.Conv2d(3, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 5), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(100, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)]
    assert find_layer(nn.Sequential(*trunk, *head).eval(), IMAGES) == "4"


def test_an_output_that_ignores_the_picture_has_no_layer() -> None:
    network = PooledLinear(nn.Conv2d(3, 4, 3), 4).eval()
    nn.init.zeros_(network.fc.weight)
    with pytest.raises(LayerError):
        find_layer(network, IMAGES)


def test_the_grad_mode_of_the_caller_does_not_matter() -> None:
    with torch.no_grad():
        assert find_layer(Net(plain), IMAGES) == "third"
        assert check_layer(Net(plain), "third", IMAGES) == Layout("bkhw", 4, 16, 16)


def test_candidates_say_their_shape_and_depth() -> None:
    candidates, leaves = candidate_layers(Net(plain), IMAGES)
    layout = Layout("bkhw", 4, 16, 16)
    assert [(c.name, c.layout, c.passive, c.depth) for c in candidates] == [
        ("first.0", layout, False, 1),
        ("first.1", layout, False, 2),
        ("first", layout, False, 2),
        ("second", layout, False, 3),
        ("third", layout, False, 4),
    ]
    assert leaves == 6


def test_a_module_that_runs_twice_is_no_candidate() -> None:
    candidates, _ = candidate_layers(Net(reused), IMAGES)
    assert "second" in [c.name for c in candidates]
    assert "third" not in [c.name for c in candidates]


def test_a_layer_dominates_only_when_nothing_bypasses_it() -> None:
    assert dominates(Net(plain), "first", IMAGES)
    assert not dominates(Net(bypassed), "third", IMAGES)


@pytest.mark.parametrize("layer", ["first", "second", "third"])
def test_a_named_layer_may_be_bypassed(layer: str) -> None:
    assert check_layer(Net(bypassed), layer, IMAGES) == Layout("bkhw", 4, 16, 16)


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        ("fc", r"output of shape \(2, 3\)"),
        ("pool", r"output of shape \(2, 4, 1, 1\)"),
        ("layer4", "no layer 'layer4'; it has first, second, third, pool, fc"),
        ("thrid", r"no layer 'thrid'; did you mean third(, first)?\?"),
    ],
)
def test_a_named_layer_that_is_no_map_is_refused(layer: str, problem: str) -> None:
    with pytest.raises(LayerError, match=problem):
        check_layer(Net(plain), layer, IMAGES)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.permute(2, 0, 1, 3),  # rows first
        lambda x: x.reshape(8, 3, 16, 16),  # cut into quarters
        lambda x: x[:1],
    ],
    ids=["rows first", "more maps than pictures", "fewer maps than pictures"],
)
def test_maps_of_another_kind_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    network = Net(lambda net, images: net.fc(net.second(images).flatten()[:8].reshape(2, 4)))
    network.second = Untouched(function)  # type: ignore[assignment]
    with pytest.raises(LayerError, match=r"'second' has output of shape .* for 2 images, expected a map"):
        check_layer(network, "second", IMAGES)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_layer_that_the_output_does_not_depend_on_is_refused(frozen: bool) -> None:
    network = Net(side_branch).requires_grad_(not frozen)
    with pytest.raises(LayerError, match="does not depend on the map of layer 'third'"):
        check_layer(network, "third", IMAGES)


@pytest.mark.parametrize("forward", [noisy, counting])
def test_a_model_that_is_another_function_on_every_call_fails_the_self_test(
    forward: Callable[[Net, Tensor], Tensor],
) -> None:
    network = Net(forward)
    with pytest.raises(ModelError, match="not the same function on every call"):
        check_layer(network, "third", IMAGES)
    assert not hooks(network)


def test_a_model_that_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(LayerError, match="cannot be differentiated after layer 'third'"):
        check_layer(Net(squared_in_place), "third", IMAGES)


def test_pictures_with_other_proportions_keep_them() -> None:
    images = probe_images((64, 32))
    assert find_layer(Net(plain), images) == "third"
    assert check_layer(Net(plain), "third", images) == Layout("bkhw", 4, 32, 16)


@pytest.fixture
def raising() -> nn.Module:
    def fail(images: Tensor) -> Tensor:
        raise ZeroDivisionError

    return nn.Sequential(nn.Conv2d(3, 4, 3), Untouched(fail))


@pytest.mark.parametrize(
    "call", [find_layer, lambda module, images: check_layer(module, "0", images)], ids=["find", "check"]
)
def test_an_exception_in_the_model_leaves_no_hook(
    raising: nn.Module, call: Callable[[nn.Module, Tensor], object]
) -> None:
    with pytest.raises(ZeroDivisionError):
        call(raising, IMAGES)
    assert not hooks(raising)
