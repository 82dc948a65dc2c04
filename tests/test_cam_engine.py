"""Grad-CAM agrees with captum and with autograd by hand, whatever the batch, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation
from torch import Tensor, nn
from torch.nn import functional as F

from tests import oracles
from tests.families import FAMILIES, READING_CLASS_TOKENS, images_of, layer_of, network_of
from tests.oracles import gradcam_by_hand
from tests.split_models import curved, of_class, pictures, probe_of, relative
from tests.toy_models import PooledLinear, pooled_linear
from wsi_gradcam.cam.engine import TARGETS_AT_ONCE, AnyTarget, explain_batch, fuse
from wsi_gradcam.cam.facts import METHOD_INFO, Layer
from wsi_gradcam.cam.layers import check_layer, probe_images
from wsi_gradcam.cam.methods import PROBING, Score
from wsi_gradcam.cam.program import EagerProgram, SplitProgram, cut_at
from wsi_gradcam.cam.targets import Target, finer_score
from wsi_gradcam.cam.trunks import make_trunk
from wsi_gradcam.errors import LayerError, TargetError

TARGETS = (Target("two", 2), Target("predicted"), Target("zero", 0))


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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return cast(str, request.param)


def explained(
    network: nn.Module, layer: str, images: Tensor, targets: Sequence[AnyTarget], method: str = "gradcam"
) -> tuple[Tensor, Tensor]:
    """Logits and maps of one method, by the plainest program."""
    found = explain_batch(plain(network, layer, images), images, targets, [method])
    return found.logits, found.cams[method]


def plain(network: nn.Module, layer: str, images: Tensor) -> EagerProgram:
    noise = probe_images((images.shape[2], images.shape[3]))
    return EagerProgram(network, (Layer(layer, check_layer(network, layer, noise)),))


def uncertainty(logits: Tensor) -> Tensor:
    """A target that is a curve."""
    return logits.logsumexp(dim=1) - logits[:, 3]


# --- exactness ---

SCORES: list[tuple[AnyTarget, Score]] = [
    (Target("two", 2), lambda logits: logits[:, 2]),
    (Target("predicted"), lambda logits: logits.amax(dim=1)),
    (Target("one-zero", 1, 0), lambda logits: logits[:, 1] - logits[:, 0]),
    (uncertainty, uncertainty),
]
ORACLES = {
    "gradcam": oracles.gradcam_of_image,
    "layercam": oracles.layercam_of_image,
    "hirescam": oracles.hirescam_of_image,
}


def expected_maps(name: str, images: Tensor, score: Score) -> dict[str, Tensor]:
    """By a full forward pass with a graph, image by image, and loops over plain numbers."""
    layout = FAMILIES[name].layout
    found = [oracles.layer_and_gradient(network_of(name), FAMILIES[name].layer, image, score) for image in images]
    A, g = (torch.cat([layout.to_map(pair[i]) for pair in found]) for i in range(2))
    return {method: oracles.one_by_one(oracle, A, g) for method, oracle in ORACLES.items()}


@pytest.mark.parametrize("engine", ["whole", "eager", "openvino"])
def test_maps_are_those_of_plain_autograd(family: str, engine: str) -> None:
    """For every kind of target; the trunk whole, cut and run by PyTorch, or by OpenVINO in float32."""
    if engine == "openvino":
        pytest.importorskip("openvino", reason="only the engines extra installs OpenVINO")
    images, layers = images_of(family, 2), (layer_of(family),)
    program: EagerProgram = EagerProgram(network_of(family), layers)
    if engine != "whole":
        trunk, head = cut_at(network_of(family), layers[0].name, images)
        program = SplitProgram(network_of(family), layers[0], make_trunk(trunk, engine, "float32", images), head)
    # Behind the layer of a class token there is a normalisation alone, which a factor of all channels passes
    # without a trace: the sum over channels of g A is 0 in each cell, and its digits are rounding.
    methods = [method for method in ORACLES if method != "hirescam" or family not in READING_CLASS_TOKENS]
    found = explain_batch(program, images, [target for target, _ in SCORES], methods)
    with torch.no_grad():
        assert relative(found.logits, network_of(family)(images)) < 1e-5
    for t, (_, score) in enumerate(SCORES):
        expected = expected_maps(family, images, score)
        for method in methods:
            assert relative(found.cams[method][:, t], expected[method]) < 1e-5, (t, method)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - READING_CLASS_TOKENS))
def test_maps_equal_captums(family: str) -> None:
    images, layer, network = images_of(family), layer_of(family), network_of(family)
    found = explain_batch(EagerProgram(network, (layer,)), images, [Target("three", 3)], ["gradcam", "hirescam"]).cams
    part = network.get_submodule(layer.name)
    if layer.layout.axes == "bkhw":
        expected = LayerGradCam(network, part).attribute(images, target=3, relu_attributions=False).detach()
        assert relative(found["gradcam"], expected) < 1e-5
    products = LayerGradientXActivation(network, part).attribute(images, target=3).detach()
    assert relative(found["hirescam"], layer.layout.to_map(products).sum(dim=1)[:, None]) < 1e-5


def test_hirescam_of_a_class_tokens_layer_is_rounding() -> None:
    """Why it is left out above; whoever explains a transformer by it should name the norm1 of its last block."""
    name = "vit, class token"
    images, network = images_of(name), network_of(name)
    A, g = oracles.layer_and_gradient(network, "blocks.2", images[0], of_class(2))
    A, g = layer_of(name).layout.to_map(A), layer_of(name).layout.to_map(g)
    assert float((A * g).sum(dim=1).abs().max()) < 1e-5 * float((A * g).abs().sum(dim=1).max())
    _, found = explained(network, "blocks.3.norm1", images, [Target("two", 2)], "hirescam")
    assert float(found.abs().max()) > 1e-4 * float((A * g).abs().sum(dim=1).max())


@pytest.mark.parametrize("name", ["resnet18", "vit, pooled"])
def test_several_layers_are_the_mean_of_their_maps_on_the_finest_grid(name: str) -> None:
    first = {"resnet18": "layer3", "vit, pooled": "blocks.0"}[name]
    network, images = network_of(name), images_of(name, 2)
    layers = tuple(Layer(layer, check_layer(network, layer, images[:2])) for layer in (FAMILIES[name].layer, first))
    targets = [target for target, _ in SCORES]
    found = explain_batch(EagerProgram(network, layers), images, targets, ["gradcam", "layercam"])
    for t, (_, score) in enumerate(SCORES):
        for method in ("gradcam", "layercam"):
            parts = []
            for layer in layers:
                pairs = [oracles.layer_and_gradient(network, layer.name, image, score) for image in images]
                A, g = (torch.cat([layer.layout.to_map(pair[i]) for pair in pairs]) for i in range(2))
                parts.append(oracles.one_by_one(ORACLES[method], A, g))
            height, width = max(tuple(part.shape[1:]) for part in parts)
            larger = [
                torch.stack([oracles.enlarged_by_pixel(cells, height, width) for cells in part])
                * (part[0].numel() / (height * width))
                for part in parts
            ]
            assert relative(found.cams[method][:, t], (larger[0] + larger[1]) / 2) < 1e-5


def test_fused_maps_of_logits_keep_their_sum_and_others_their_values() -> None:
    coarse, fine = torch.full((1, 2, 2), 3.0), torch.zeros(1, 4, 4)
    assert float(fuse([coarse, fine], "cells").sum()) == pytest.approx(float(coarse.sum()) / 2)
    assert torch.equal(fuse([coarse, fine], "one"), torch.full((1, 4, 4), 1.5))
    assert fuse([coarse], "cells") is coarse


# --- several targets in one backward pass ---


@pytest.mark.parametrize("count", [1, 2, TARGETS_AT_ONCE, TARGETS_AT_ONCE + 1, 2 * TARGETS_AT_ONCE + 3])
def test_gradients_of_many_targets_are_those_of_each(count: int, images: Tensor) -> None:
    torch.manual_seed(1)
    network = PooledLinear(nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Tanh()), 6, classes=count)
    program = plain(network, "features", images)
    together = explain_batch(program, images, [Target(str(i), i) for i in range(count)]).cams["gradcam"]
    for i in range(count):
        alone = explain_batch(program, images, [Target("alone", i)]).cams["gradcam"]
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-5, atol=1e-8)


class Whole(torch.autograd.Function):
    """A network's own operator whose backward pass cannot take gradients of several targets at once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value * value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        found = torch.zeros_like(value)
        return found.add_(2 * value * gradients[0])


def test_operators_that_take_one_gradient_at_a_time_are_asked_one_by_one(images: Tensor) -> None:
    class Squaring(PooledLinear):
        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.fc(cast(Tensor, Whole.apply(self.features(x))).mean(dim=(2, 3))))

    torch.manual_seed(1)
    network = Squaring(nn.Conv2d(3, 6, 4, 4), 6, classes=3)
    _, found = explained(network, "features", images, [Target("a", 0), Target("b", 1), Target("c", 2)])
    for t in range(3):
        pairs = [oracles.layer_and_gradient(network, "features", i, of_class(t)) for i in images]
        A, g = (torch.cat([pair[i] for pair in pairs]) for i in range(2))
        assert relative(found[:, t], oracles.one_by_one(oracles.gradcam_of_image, A, g)) < 1e-5


@pytest.mark.parametrize(
    "function",
    [lambda logits: logits.detach()[:, 0], lambda logits: torch.ones(len(logits))],
    ids=["detached", "constant"],
)
@pytest.mark.parametrize("others", [[], [Target("a", 0)]])
def test_a_target_that_hides_how_it_depends_on_the_logits_is_refused(
    function: AnyTarget, others: list[AnyTarget], pooled: PooledLinear, images: Tensor
) -> None:
    with pytest.raises(TargetError, match="does not depend on its logits"):
        explained(pooled, "features", images, [*others, function])


# --- methods ---


def test_several_methods_share_one_pass(bypassed: Bypassed, images: Tensor) -> None:
    program = plain(bypassed, "layer", images)
    passes: list[int] = []
    bypassed.stem.register_forward_hook(lambda *args: passes.append(1))
    names = ["hirescam", "finercam", "gradcam", "layercam"]
    together = explain_batch(program, images, TARGETS, names)
    assert len(passes) == 1
    assert list(together.cams) == names
    for name in names:
        alone = explain_batch(program, images, TARGETS, [name])
        torch.testing.assert_close(together.cams[name], alone.cams[name], rtol=1e-5, atol=1e-8)


def test_finercam_is_gradcam_of_its_score(bypassed: Bypassed, images: Tensor) -> None:
    _, found = explained(bypassed, "layer", images, TARGETS, "finercam")
    logits = bypassed(images).detach()
    for t, target in enumerate(TARGETS):
        classes = logits.argmax(dim=1) if target.index is None else torch.full((len(images),), target.index)
        _, expected = explained(bypassed, "layer", images, [finer_score(logits, classes)])
        torch.testing.assert_close(found[:, t], expected[:, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("target", [Target("a-b", 0, 1), uncertainty])
def test_finercam_of_what_is_no_class_is_refused(target: AnyTarget, bypassed: Bypassed, images: Tensor) -> None:
    with pytest.raises(TargetError, match="give a class as the target"):
        explained(bypassed, "layer", images, [target], "finercam")


@pytest.mark.parametrize("name", [name for name, info in METHOD_INFO.items() if info.asks == "model"])
def test_methods_that_ask_the_model_are_their_functions(name: str, images: Tensor) -> None:
    """On a network cut by hand; that the functions are right is shown elsewhere."""
    model, images = curved(), pictures(2)
    found = explain_batch(plain(model, "features", images), images, [Target("b", 1), Target("predicted")], [name])
    probe, logits = probe_of(model, images), model(images).detach()
    rows = torch.arange(len(images))
    scores: list[Score] = [lambda out: out[:, 1], lambda out: out[rows, logits.argmax(dim=1)]]
    for t, score in enumerate(scores):
        assert relative(found.cams[name][:, t], PROBING[name](probe, score)) < 1e-4  # differences of logits


@pytest.mark.parametrize("name", ["swin", "vit, class token"])
@pytest.mark.parametrize("cut", [False, True])
def test_channels_of_tokens_can_be_left_out(name: str, cut: bool) -> None:
    """Ablation-CAM puts changed maps back, where a class token without a place must stay."""
    network, layer, images = network_of(name), layer_of(name), images_of(name, 1)
    part = network.get_submodule(layer.name)
    program = EagerProgram(network, (layer,))
    if cut:
        trunk, head = cut_at(network, layer.name, images)
        program = SplitProgram(network, layer, make_trunk(trunk, "eager", "float32", images), head)
    done = program.forward(images)
    value = done.values[0].detach()
    maps = layer.layout.to_map(value).clone()
    maps[:, :20] = 0
    found = done.resume(layer.layout.put(value, maps))

    def leave_out(module: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., layer.layout.prefix :, :20] = 0
        return output

    handle = part.register_forward_hook(leave_out)
    try:
        with torch.no_grad():
            expected = network(images)
    finally:
        handle.remove()
    assert relative(found, expected) < 1e-5
    with torch.no_grad():
        assert relative(found, network(images)) > 1e-3


def test_methods_that_ask_the_model_refuse_several_layers(images: Tensor) -> None:
    model, images = curved(), pictures(2)
    layers = tuple(Layer(name, check_layer(model, name, images)) for name in ("features.2", "features"))
    with pytest.raises(LayerError, match="explain only one layer; give one --layer"):
        explain_batch(EagerProgram(model, layers), images, [Target("a", 0)], ["occlusion"])


# --- what holds for all ---


def test_gradcam_equals_autograd_by_hand_for_several_targets_at_once(bypassed: Bypassed, images: Tensor) -> None:
    logits, cams = explained(bypassed, "layer", images, TARGETS)
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
    logits, cams = explained(bypassed, "layer", images, [*everything, Target("predicted")])
    winners = logits.argmax(dim=1)
    assert len(set(winners.tolist())) > 1
    torch.testing.assert_close(cams[:, 4], cams[torch.arange(5), winners])


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "xgradcam"])
def test_with_pooling_and_a_linear_layer_a_maps_sum_and_the_bias_are_the_logit(
    method: str, pooled: PooledLinear, images: Tensor
) -> None:
    targets = [Target("b", 1), Target("a", 0)]
    logits, cams = explained(pooled, "features", images, targets, method)
    bias, cells = pooled.fc.bias.detach()[[1, 0]], cams.shape[2] * cams.shape[3]
    torch.testing.assert_close(cams.sum(dim=(2, 3)) + bias, logits[:, [1, 0]], rtol=0, atol=1e-4)
    torch.testing.assert_close((cams * cells).mean(dim=(2, 3)) + bias, logits[:, [1, 0]], rtol=0, atol=1e-4)


def test_hirescam_is_gradcam_behind_pooling_and_a_linear_layer(pooled: PooledLinear, images: Tensor) -> None:
    targets = [Target("a", 0)]
    _, smooth = explained(pooled, "features", images, targets)
    _, sharp = explained(pooled, "features", images, targets, "hirescam")
    torch.testing.assert_close(smooth, sharp, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batch_size_does_not_matter(size: int, bypassed: Bypassed, images: Tensor) -> None:
    logits, cams = explained(bypassed, "layer", images, TARGETS)
    parts = [explained(bypassed, "layer", part, TARGETS) for part in torch.split(images, size)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), logits)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), cams)


def test_order_in_the_batch_does_not_matter(bypassed: Bypassed, images: Tensor) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    logits, cams = explained(bypassed, "layer", images, TARGETS)
    shuffled_logits, shuffled_cams = explained(bypassed, "layer", images[order], TARGETS)
    torch.testing.assert_close(shuffled_logits, logits[order])
    torch.testing.assert_close(shuffled_cams, cams[order])


def test_training_mode_does_not_reach_the_result(images: Tensor) -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Tanh())
    network = PooledLinear(features, 4)
    expected = explained(network.eval(), "features", images, [Target("a", 0)])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = explained(network.train(), "features", images, [Target("a", 0)])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


def test_no_gradient_reaches_a_parameter(pooled: PooledLinear, images: Tensor) -> None:
    explained(pooled, "features", images, [Target("a", 0)])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pooled.parameters())


def test_results_hold_no_graph(pooled: PooledLinear, images: Tensor) -> None:
    logits, cams = explained(pooled, "features", images, [Target("a", 0)])
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
        explained(pooled, "features", images, [Target("a", 0)])
    assert plain > images.numel()
    assert sum(saved) < 200  # the pooled values and the linear layer's weights


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_had_in_either_grad_mode(enabled: bool, pooled: PooledLinear, images: Tensor) -> None:
    expected = explained(pooled, "features", images, [Target("a", 0)])[1]
    with torch.set_grad_enabled(enabled):
        found = explained(pooled, "features", images, [Target("a", 0)])[1]
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

    _, cams = explained(OneBlind(), "features", images, [Target("seeing", 0), Target("blind", 1)])
    assert cams[:, 0].any()
    assert not cams[:, 1].any()
