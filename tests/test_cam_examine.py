"""What planning learns of a model is true, and a model that cannot be explained is refused here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import oracles
from tests.families import FAMILIES, network_of
from tests.split_models import of_class, relative
from tests.toy_models import PooledLinear
from wsi_gradcam.cam import explainer as examining
from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.explainer import (
    Request,
    examine,
    explainable_layers,
    locate_layers,
    prepare_program,
    traced_module,
)
from wsi_gradcam.cam.facts import Choice, Layer, Layout
from wsi_gradcam.cam.layers import probe_images
from wsi_gradcam.cam.program import EagerProgram, SplitProgram
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import LayerError, ModelError
from wsi_gradcam.models.load import Model, load_model, model_of
from wsi_gradcam.models.outputs import LogitsOf
from wsi_gradcam.models.spec import ModelSpec

IMAGES = probe_images((32, 32))


@pytest.fixture
def model() -> Model:
    return load_model(ModelSpec(name="toy", source="tests.toy_models:pooled_linear", patch_px=(32, 48), mpp=0.5))


def test_facts_are_the_models(model: Model) -> None:
    facts = examine(model).facts
    assert facts.layers == (Layer("features", Layout("bkhw", 12, 4, 6)),)
    assert (facts.layer, facts.cam_shape, facts.traced) == ("features", (4, 6), False)
    assert facts.parameters == 3 * 8 * 25 + 8 + 8 * 12 * 9 + 12 + 12 * 2 + 2
    assert (facts.batch_size, facts.choice) == (32, Choice("eager", "float32"))
    for field in (
        "name",
        "source",
        "digest",
        "license",
        "classes",
        "activation",
        "patch_px",
        "view",
        "mpp",
        "mean",
        "std",
    ):
        assert getattr(facts, field) == getattr(model, field)


def test_activation_bytes_are_the_largest_input_plus_output(model: Model) -> None:
    first, second = 4 * (3 * 32 * 48 + 8 * 8 * 12), 4 * (8 * 8 * 12 * 2)
    assert first > second
    assert examine(model).facts.activation_bytes == first


@pytest.mark.parametrize(
    ("given", "specified", "used"), [("features.0", "features.1", "features.0"), (None, "features.1", "features.1")]
)
def test_a_layer_given_goes_before_the_specifications(
    given: str | None, specified: str, used: str, model: Model
) -> None:
    facts = examine(dataclasses.replace(model, layer=specified), Request(given)).facts
    assert facts.layer == used
    assert facts.cam_shape == (8, 12)


def test_several_layers_have_the_finest_grid(model: Model) -> None:
    examined = examine(model, Request("features.1 + features"))
    assert examined.facts.layer == "features.1+features"
    assert examined.facts.cam_shape == (8, 12)
    maps = explain_batch(examined.program, probe_images((32, 48)), [Target("a", 0)]).cams["gradcam"]
    assert maps.shape[2:] == (8, 12)


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        ("layer4", "has no layer 'layer4'; it has features, fc"),
        ("feature", "has no layer 'feature'; did you mean features"),
        ("features+fc", r"layer 'fc' has output of shape \(2, 2\)"),
        ("features+features", "names a layer twice"),
        ("features+", "has no layer ''"),
    ],
)
def test_a_wrong_layer_is_refused(layer: str, problem: str, model: Model) -> None:
    with pytest.raises(LayerError, match=problem):
        examine(model, Request(layer))


def test_weights_that_are_not_numbers_are_named_as_such(model: Model) -> None:
    with torch.no_grad():
        cast(PooledLinear, model.module).fc.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="toy: gives NaN or infinite values"):
        examine(model)


def test_a_model_without_parameters_can_be_examined(model: Model) -> None:
    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Tanh()

        def forward(self, images: Tensor) -> Tensor:
            return cast(Tensor, self.features(images)).mean(dim=(2, 3))

    facts = examine(dataclasses.replace(model, module=Means())).facts
    assert (facts.parameters, facts.layer) == (0, "features")


# --- methods ---


@pytest.mark.parametrize("method", ["scorecam", "occlusion", "integrated_gradients", "guided_backprop"])
def test_methods_that_ask_the_model_refuse_several_layers_before_the_work_begins(method: str, model: Model) -> None:
    with pytest.raises(LayerError, match=f"toy: {method} can explain one layer only"):
        examine(model, Request("features.1+features", methods=("gradcam", method)))


def test_cam_and_guided_backprop_refuse_what_they_are_not_defined_for(model: Model) -> None:
    class Curved(PooledLinear):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tanh(super().forward(images))

    class Smooth(PooledLinear):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.GELU()), 4)

    examine(model, Request(methods=("cam", "guided_backprop")))
    features = cast(PooledLinear, model.module).features
    with pytest.raises(LayerError, match="cam is defined only for global average pooling followed by one linear layer"):
        examine(dataclasses.replace(model, module=Curved(features, 12)), Request(methods=("cam",)))
    with pytest.raises(LayerError, match="this model has none"):
        examine(dataclasses.replace(model, module=Smooth()), Request(methods=("guided_backprop",)))


def test_a_map_that_is_rounding_is_refused() -> None:
    """HiResCAM before a normalisation of each token: a factor of all channels changes nothing behind it."""
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=4).eval()
    model = model_of(network, patch_px=64)
    assert examine(model, Request(methods=("gradcam",), batch_size=2)).facts.layer == "blocks.1"
    with pytest.raises(LayerError, match=r"hirescam is 0 at layer 'blocks.1' .up to rounding.*norm1"):
        examine(model, Request(methods=("gradcam", "hirescam"), batch_size=2))
    assert examine(model, Request("blocks.2.norm1", ("hirescam",), batch_size=2)).facts.layer == "blocks.2.norm1"


def test_a_method_whose_maps_are_not_finite_is_refused(model: Model) -> None:
    class Rooted(PooledLinear):
        """The root of 0 is finite, its gradient is not."""

        def forward(self, images: Tensor) -> Tensor:
            maps = self.features(images)
            return cast(Tensor, self.fc(torch.sqrt(maps.relu() * maps).mean(dim=(2, 3))))

    network = Rooted(nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Tanh()), 4)
    with pytest.raises(LayerError, match="toy: layercam gives NaN or infinite values on noise images"):
        examine(dataclasses.replace(model, module=network), Request("features", ("layercam",)))


# --- networks without modules to hook ---


class Functional(nn.Module):
    """Calls functions instead of modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.first, self.second = nn.Parameter(torch.randn(6, 3, 4, 4)), nn.Parameter(torch.randn(5, 6, 3, 3))
        self.last = nn.Parameter(torch.randn(4, 5))

    def maps(self, images: Tensor) -> Tensor:
        return F.relu(F.conv2d(F.relu(F.conv2d(images, self.first, stride=4)), self.second, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images).mean(dim=(2, 3)) @ self.last.T


class Frozen(nn.Module):
    """Its backbone runs where there are no gradients."""

    def __init__(self, forbidding: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.forbidding = forbidding
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Conv2d(6, 5, 3, 1, 1), nn.ReLU())
        self.fc = nn.Linear(5, 4)

    def maps(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        with self.forbidding():
            maps = self.maps(images)
        return cast(Tensor, self.fc(maps.mean(dim=(2, 3))))


@pytest.mark.parametrize(
    "build",
    [Functional, lambda: Frozen(torch.no_grad), lambda: Frozen(torch.inference_mode)],
    ids=["functions", "no_grad", "inference_mode"],
)
def test_networks_without_modules_to_hook_are_explained_at_their_operators(
    build: Callable[[], Functional | Frozen],
) -> None:
    network = build().eval()
    module, layers, traced = locate_layers(network, None, IMAGES)
    assert traced
    assert [layer.name for layer in layers] == ["relu_1"]
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = explain_batch(EagerProgram(module, layers), images, [Target("c", 2), Target("b", 1)], ["layercam"])
    assert relative(found.logits, network(images)) < 1e-5
    maps = network.maps(images).detach().clone()
    weights = network.last if isinstance(network, Functional) else network.fc.weight
    for t, index in enumerate([2, 1]):
        expected = torch.einsum("k,bkhw->bhw", weights[index].detach().relu() / maps[0, 0].numel(), maps)
        assert relative(found.cams["layercam"][:, t], expected) < 1e-5
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_named_operator_is_found_where_no_module_has_the_name() -> None:
    network = Functional().eval()
    _, layers, traced = locate_layers(network, "relu", IMAGES)
    assert traced
    assert layers == (Layer("relu", Layout("bkhw", 6, 8, 8)),)
    with pytest.raises(LayerError, match="has no layer 'relu_7'"):
        locate_layers(network, "relu_7", IMAGES)


def test_a_frozen_transformer_is_explained_for_batches_of_any_size() -> None:
    """Its class token is repeated for each image, which a graph notes as a number."""

    class FrozenTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.vit: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=4)

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                tokens = self.vit.forward_features(images)
            return cast(Tensor, self.vit.forward_head(tokens))

    network = FrozenTokens().eval()
    module, layers, traced = locate_layers(network, None, probe_images((64, 64)))
    assert traced
    assert layers[0].layout == Layout("bnk", 192, 4, 4, 1)
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = explain_batch(EagerProgram(module, layers), images, [Target("b", 1)])
    assert relative(found.logits, network(images)) < 1e-5
    expected = []
    for image in images:
        A, g = oracles.layer_and_gradient(network.vit, "blocks.1", image, of_class(1))
        A, g = layers[0].layout.to_map(A), layers[0].layout.to_map(g)
        expected.append(oracles.one_by_one(oracles.gradcam_of_image, A, g))
    assert relative(found.cams["gradcam"][:, 0], torch.cat(expected)) < 1e-5


def test_outputs_in_a_dict_or_a_tuple_are_explained_at_the_networks_own_layers() -> None:
    class Wrapped(nn.Module):
        def __init__(self, network: nn.Module, kind: type) -> None:
            super().__init__()
            self.network, self.kind = network, kind

        def forward(self, images: Tensor) -> object:
            logits = self.network(images)
            return {"aux": images, "logits": logits} if self.kind is dict else (logits, images)

    inner, family = network_of("resnet18"), FAMILIES["resnet18"]
    for kind, output in ((dict, "logits"), (tuple, 0)):
        module, layers, traced = locate_layers(LogitsOf(Wrapped(inner, kind), output), None, probe_images(family.size))
        assert not traced
        assert [layer.name for layer in layers] == ["network.layer4"]
        found = explain_batch(EagerProgram(module, layers), probe_images(family.size), [Target("a", 0)])
        plain = EagerProgram(inner, (Layer("layer4", family.layout),))
        expected = explain_batch(plain, probe_images(family.size), [Target("a", 0)])
        assert torch.equal(found.cams["gradcam"], expected.cams["gradcam"])


def test_a_network_that_can_be_explained_in_no_way_is_refused_with_the_reason() -> None:
    class Blind(Frozen):
        """Its pictures are gone when it answers."""

        def forward(self, images: Tensor) -> Tensor:
            return cast(Tensor, self.fc(torch.ones(len(images), 5)))

    with pytest.raises(
        LayerError, match=r"no layer in the later part of Blind is a spatial map .* give one with --layer"
    ):
        locate_layers(Blind(torch.no_grad).eval(), None, IMAGES)


def test_the_graph_leaves_the_network_as_it_was() -> None:
    network = Functional()
    graph = traced_module(network, IMAGES)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not list(graph.parameters())


# --- programs ---


def test_the_same_program_is_made_in_another_process(model: Model) -> None:
    examined = examine(model, Request(engine="eager", precision="bfloat16", batch_size=4))
    assert examined.facts.choice == Choice("eager", "bfloat16")
    again = prepare_program(model, examined.facts)
    assert isinstance(again, SplitProgram)
    images = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    found, expected = (explain_batch(p, images, [Target("a", 0)]) for p in (again, examined.program))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.cams["gradcam"], expected.cams["gradcam"])
    with torch.no_grad():
        assert 1e-6 < relative(found.logits, model.module(images)) < 0.05


def test_the_same_graph_is_made_in_another_process() -> None:
    model = model_of(Functional(), patch_px=32)
    facts = examine(model, Request(batch_size=4)).facts
    assert (facts.traced, facts.layer) == (True, "relu_1")
    found = explain_batch(prepare_program(model, facts), IMAGES, [Target("a", 0)])
    with torch.no_grad():
        assert relative(found.logits, model.module(IMAGES)) < 1e-5
    names = [layer.name for layer in explainable_layers(model, facts)]
    assert [name for name in names if name.startswith("relu")] == ["relu", "relu_1"]


def test_layers_that_could_be_explained_are_listed_in_their_order(model: Model) -> None:
    layers = explainable_layers(model, examine(model).facts)
    assert [layer.name for layer in layers] == ["features.0", "features.1", "features.2", "features.3", "features"]


def test_a_choice_made_before_is_kept(model: Model) -> None:
    choice = Choice("eager", "bfloat16")
    request = Request(engine="auto", precision="auto", choice=choice, batch_size=4)
    assert not request.needs_patches
    examined = examine(model, request)
    assert examined.facts.choice is choice
    assert isinstance(examined.program, SplitProgram)


@pytest.mark.parametrize(("count", "compared"), [(0, 4), (1, 4), (3, 4), (9, 8), (200, 64)])
def test_the_choice_is_made_on_whole_batches_of_the_runs_patches(
    count: int, compared: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def choose(
        module: nn.Module, layers: tuple[Layer, ...], engine: str, precision: str, images: Tensor, batch_size: int
    ) -> tuple[Choice, EagerProgram]:
        seen.append(images)
        return Choice("eager", "float32"), EagerProgram(module, layers)

    monkeypatch.setattr(examining, "choose", choose)
    monkeypatch.setattr(examining, "read_choice", lambda key: None)
    patches = torch.randint(0, 256, (count, 32, 48, 3), dtype=torch.uint8) if count else None
    examine(model, Request(engine="auto", precision="auto", batch_size=4), patches)
    (images,) = seen
    assert len(images) == compared
    if patches is not None and count > 1:
        prepared = model.prepare(patches)
        assert torch.equal(images[: min(count, compared)], prepared[: min(count, compared)])


def test_what_was_chosen_before_is_chosen_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []

    def choose(module: nn.Module, layers: tuple[Layer, ...], *rest: object) -> tuple[Choice, EagerProgram]:
        chosen.append(1)
        return Choice("eager", "float32"), EagerProgram(module, layers)

    monkeypatch.setattr(examining, "choose", choose)
    model = dataclasses.replace(model, digest="of this test")
    first, second = (examine(model, Request(engine="auto", precision="auto", batch_size=2)) for _ in range(2))
    assert len(chosen) == 1
    assert first.facts.choice == second.facts.choice
    examine(model, Request(engine="auto", precision="auto", batch_size=3))  # other batches
    assert len(chosen) == 2


def test_a_batch_size_is_found_where_it_is_asked_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "find_batch_size", lambda module, layers, images: 16)
    assert examine(model, Request(batch_size="auto")).facts.batch_size == 16
