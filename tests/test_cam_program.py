"""A network whole and cut in two is the same function with the same gradients, holds little, and stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model

from tests.families import FAMILIES, images_of, layer_of, network_of
from tests.split_models import relative
from wsi_gradcam.cam import program as programs
from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.facts import Layer, Layout
from wsi_gradcam.cam.layers import check_layer, probe_images
from wsi_gradcam.cam.program import EagerProgram, SplitProgram, cut_at, trace_operators
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.cam.trunks import make_trunk
from wsi_gradcam.errors import EngineError, LayerError, ModelError
from wsi_gradcam.models.graph import fixed_batch

MAP = Layout("bkhw", 6, 8, 6)
PREDICTED = [Target("predicted")]


class Net(nn.Module):
    """A skip that bypasses the layer, an in-place ReLU right behind it, batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.layer = nn.Conv2d(6, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        skip = torch.tanh(self.norm(self.stem(images)))
        joined = torch.sigmoid(F.relu(self.layer(skip), inplace=True) + skip)
        return cast(Tensor, self.fc(self.dropout((joined**2).mean(dim=(2, 3))))) * 5


class Kept(Net):
    """The layer's own value goes around it: what the layer returned is kept by the layer itself."""

    class Keeping(nn.Conv2d):
        kept: Tensor

        def forward(self, images: Tensor) -> Tensor:
            self.kept = super().forward(images)
            return self.kept

    def __init__(self) -> None:
        super().__init__()
        self.layer = Kept.Keeping(6, 6, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        through = self.layer(self.stem(images))
        return cast(Tensor, self.fc((through * self.layer.kept).mean(dim=(2, 3))))


class Counting(Net):
    """Writes the number of images into itself in a way that nothing can undo."""

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer(self.stem(images))
        return cast(Tensor, self.fc(maps.mean(dim=(2, 3)))) * torch.arange(len(images))[:, None]


class Choosing(Net):
    """Looks at the picture to decide what to compute."""

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer(self.stem(images))
        return cast(Tensor, self.fc((maps if float(maps.sum()) > 0 else -maps).mean(dim=(2, 3))))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 24, generator=torch.Generator().manual_seed(5))


def split_program(network: nn.Module, layer: Layer, images: Tensor) -> SplitProgram:
    trunk, head = cut_at(network, layer.name, images)
    return SplitProgram(network, layer, make_trunk(trunk, "eager", "float32", images), head)


def both(network: nn.Module, layer: Layer, images: Tensor) -> list[EagerProgram]:
    return [EagerProgram(network, (layer,)), split_program(network, layer, images)]


def output_at(network: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """The network's output and the layer's, before it is changed in place."""
    kept: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda *args: kept.append(args[2].clone()))
    try:
        return network(images), kept[0]
    finally:
        handle.remove()


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


# --- the cut ---


@pytest.mark.parametrize("name", FAMILIES)
def test_trunk_and_head_are_the_network_for_any_number_of_images(name: str) -> None:
    network, layer = network_of(name), layer_of(name)
    trunk, head = cut_at(network, layer.name, images_of(name, 2))
    for count in (1, 2, 5):
        images = images_of(name, count)
        with torch.no_grad():
            value, *others = trunk(images)
            expected, at_layer = output_at(network, layer.name, images)
            assert relative(value, at_layer) < 1e-5
            assert relative(head(value, *others), expected) < 1e-5
    assert not hooks(network)


def test_what_bypasses_the_layer_crosses_the_cut(images: Tensor) -> None:
    network = Net().eval()
    trunk, head = cut_at(network, "layer", images)
    value, *others = trunk(images)
    skip = torch.tanh(network.norm(network.stem(images)))
    torch.testing.assert_close(value, network.layer(skip))
    assert len(others) == 1
    torch.testing.assert_close(others[0], skip)
    assert (value < 0).any()  # before the in-place ReLU
    assert not any("wsi_gradcam" in str(node.target) for part in (trunk, head) for node in part.graph.nodes)


@pytest.mark.parametrize(
    ("network", "layer", "problem"),
    [
        (Choosing(), "layer", "cannot be split at layer 'layer': .*operator by operator"),
        (Net(), "lyer", "no layer 'lyer'; did you mean layer"),
    ],
)
def test_a_network_that_cannot_be_cut_is_refused_with_the_reason(
    network: nn.Module, layer: str, problem: str, images: Tensor
) -> None:
    with pytest.raises(ModelError, match=problem):
        cut_at(network, layer, images)
    assert not hooks(network)
    assert network.training


def test_a_layer_that_runs_twice_cannot_be_cut(images: Tensor) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.fc(self.layer(self.layer(self.stem(x))).mean(dim=(2, 3))))

    with pytest.raises(EngineError, match="cannot be split at layer 'layer': it runs 2 times"):
        cut_at(Twice(), "layer", images)


def test_the_networks_own_weights_stay_trainable_and_are_not_copied(images: Tensor) -> None:
    network = Net().eval()
    graph = trace_operators(network, images)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not list(graph.parameters())
    ours = {tensor.data_ptr() for tensor in graph.buffers()}
    assert {parameter.data_ptr() for parameter in network.parameters()} <= ours


# --- the two programs ---


@pytest.mark.parametrize("build", [Net, Kept])
def test_both_programs_are_one(build: type[Net], images: Tensor) -> None:
    network = build()
    with torch.no_grad():
        network.norm.running_mean.normal_()  # type: ignore[union-attr]
    whole, cut = both(network, Layer("layer", MAP), images)
    done, other = whole.forward(images), cut.forward(images)
    network.eval()
    expected = network(images).detach()
    for each in (done, other):
        assert relative(each.logits, expected) < 1e-5
        assert each.logits.requires_grad
        new = torch.randn(3, 6, 8, 6)
        found = each.resume(new)
        assert not found.requires_grad
        assert relative(found, done.resume(new)) < 1e-5
    assert relative(done.values[0], other.values[0]) < 1e-5
    gradients = [torch.autograd.grad(each.logits[:, 1].sum(), each.values)[0] for each in (done, other)]
    assert relative(gradients[1], gradients[0]) < 1e-5
    for program in (whole, cut):
        answer = program.predict(images)
        assert relative(answer, expected) < 1e-5
        assert not answer.requires_grad


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_to_the_images_are_had_in_either_grad_mode(enabled: bool, images: Tensor) -> None:
    network = Net()
    for program in both(network, Layer("layer", MAP), images):
        leaf = images.clone().requires_grad_(True)
        with torch.set_grad_enabled(enabled):
            logits = program.differentiable(leaf)
            assert torch.is_grad_enabled() == enabled
        (found,) = torch.autograd.grad(logits[:, 2].sum(), leaf)
        again = images.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(network.eval()(again)[:, 2].sum(), again)
        network.train()
        assert torch.equal(found, expected)


def test_guided_is_the_network_with_guided_relus(images: Tensor) -> None:
    network = Net()
    program = EagerProgram(network, (Layer("layer", MAP),))
    leaf = images.clone().requires_grad_(True)
    logits = program.guided(leaf)
    assert relative(logits, network.eval()(images)) < 1e-5
    (guided,) = torch.autograd.grad(logits[:, 2].sum(), leaf)
    (plain,) = torch.autograd.grad(network(leaf)[:, 2].sum(), leaf)
    assert relative(guided, plain) > 0.01
    assert program.guided(images[:1]).shape == (1, 4)  # followed once, for batches of any size


def test_guided_of_a_network_without_relu_is_refused() -> None:
    with pytest.raises(LayerError, match="this model has none"):
        EagerProgram(network_of("convnext"), (layer_of("convnext"),)).guided(images_of("convnext", 1))


def test_training_mode_does_not_reach_the_result(images: Tensor) -> None:
    network, layer = Net(), Layer("layer", MAP)
    expected = [program.forward(images).logits for program in both(network.eval(), layer, images)]
    network.train()
    network.stem.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for program, wanted in zip(both(network, layer, images), expected, strict=True):
        assert torch.equal(program.forward(images).logits, wanted)
        program.predict(images)
        program.guided(images)
        program.differentiable(images)
    assert [part.training for part in network.children()] == [False, True, True, True, True]
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not hooks(network)


def test_an_unknown_layer_is_refused_when_the_program_is_made() -> None:
    with pytest.raises(LayerError, match="no layer 'lyer'"):
        EagerProgram(Net(), (Layer("lyer", MAP),))


@pytest.mark.parametrize("count", [2, 4])
def test_a_graph_of_one_batch_size_leaves_other_sizes_to_the_network(
    count: int, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "any_batch", _refusing)
    network, layer = Counting().eval(), Layer("layer", MAP)
    program = split_program(network, layer, images)
    trunk, head = cut_at(network, "layer", images)
    assert fixed_batch(head) == fixed_batch(trunk) == 3
    some = torch.cat([images, images])[:count]
    found = explain_batch(program, some, [Target("b", 1)])
    expected = explain_batch(EagerProgram(network, (layer,)), some, [Target("b", 1)])
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.cams["gradcam"], expected.cams["gradcam"])
    assert torch.equal(program.predict(some), expected.logits)


def _refusing(*args: object) -> None:
    raise ModelError("the model answers for batches of 2 images only")


# --- memory ---


@contextmanager
def saved_for_backward(network: nn.Module) -> Iterator[list[int]]:
    """Bytes of each storage that autograd keeps between forward and backward, without the network's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that addresses are not used twice
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    sizes += [storage.nbytes() for storage in kept.values()]


def test_little_is_held_for_the_backward_pass_of_resnet50() -> None:
    torch.manual_seed(0)
    network = get_model("resnet50").eval()
    images = probe_images((224, 224))
    layer = Layer("layer4", check_layer(network, "layer4", images))
    for program in both(network, layer, images):
        with saved_for_backward(network) as ours:
            explain_batch(program, images, PREDICTED)
        assert 0 < sum(ours) / len(images) < 2**20
    with saved_for_backward(network) as theirs:
        LayerGradCam(network, network.layer4).attribute(images, target=1)
    assert sum(theirs) / len(images) > 50 * 2**20  # captum, of a network whose weights may be trained
