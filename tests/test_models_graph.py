"""Programs and networks as graphs: the same logits and gradients, for batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn

from tests.programs import FORMS, lively, save_program
from wsi_gradcam.cam.program import cut_at
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.graph import any_batch, fixed_batch, free_batch, trace, with_points
from wsi_gradcam.models.load import Model, load_model
from wsi_gradcam.models.spec import ModelSpec, read_spec


def images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def load(path: Path, side: int, **values: Any) -> Model:
    return load_model(read_spec(str(path)).model_copy(update={"patch_px": (side, side), **values}))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny operators: on a busy machine threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (tv.resnet18, 32),
    "densenet121": (tv.densenet121, 32),
    "efficientnet_b0": (tv.efficientnet_b0, 32),
    "inception_v3": (lambda: tv.inception_v3(init_weights=False), 75),
}


LARGE = ("densenet121", "inception_v3")  # hundreds of layers, tens of seconds for each form


@pytest.mark.parametrize("form", ["script", "trace", "frozen", "export"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in NETWORKS])
def test_a_program_answers_as_the_network_it_was_made_of(name: str, form: str, tmp_path: Path) -> None:
    build, side = NETWORKS[name]
    torch.manual_seed(1)
    network = lively(build(), images(16, 2 * side, 2))
    model = load(save_program(network, images(2, side, 1), form, tmp_path), side)
    for count in (1, 3):
        with torch.no_grad():
            expected = network(images(count, side))
            assert close(model.module(images(count, side)), expected)
    assert float(expected.std(dim=0).mean()) > 0.05 * float(expected.abs().mean())  # it does look at the pictures
    # Differentiable, and without reaching for weights.
    pictures = [images(2, side).requires_grad_() for _ in range(2)]
    found, expected = (
        torch.autograd.grad(f(x)[:, 7].sum(), x)[0] for f, x in zip((model.module, network), pictures, strict=True)
    )
    # Freezing folds normalisation into convolution: rounding then moves ReLUs that are close to zero.
    assert float((found - expected).norm()) <= (2e-2 if form == "frozen" else 1e-5) * float(expected.norm())


class Sized(nn.Module):
    """Writes the size of the batch into its shapes in the ways that networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.head = nn.Linear(6 * 17, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        count, channels, height, width = maps.shape
        rows = torch.relu(maps).permute(0, 2, 3, 1).reshape(count * height * width, channels)
        tokens = torch.cat([self.token.expand(count, -1, -1), rows.view(count, height * width, channels)], dim=1)
        return self.head(tokens.view(tokens.size(0), -1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention with the images in the second axis, as PyTorch's own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(mixed.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sizes_of_batches_in_a_program_do_not_bind_it(form: str, count: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = Sized().eval()
    if form == "export-dynamic" and count == 1:
        pytest.skip("torch.export takes an example of one image for a fixed size")
    model = load(save_program(network, images(count, 16), form, tmp_path), 16)
    for other in (1, 2, 3, 7):
        with torch.no_grad():
            assert close(model.module(images(other, 16)), network(images(other, 16)))


@pytest.mark.parametrize("network", [Sized, Attention])
def test_any_network_becomes_a_graph_for_any_batch(network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    module = network().eval()
    assert fixed_batch(trace(module, images(2, 16))) == 2  # otherwise this test shows nothing
    graph = any_batch(module, images(2, 16))
    for count in (1, 2, 6):
        with torch.no_grad():
            assert close(graph(images(count, 16)), module(images(count, 16)))


def test_a_graph_of_other_sizes_is_not_passed_off() -> None:
    class Mixing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3)) + torch.ones(len(images), 1).cumsum(0) * images.mean()

    with pytest.raises(ModelError, match=r"answers for batches of 2 images only|followed"):
        any_batch(Mixing(), images(2, 8))


def test_a_program_that_mixes_images_is_refused(tmp_path: Path) -> None:
    class Mixing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3)) + images.mean(dim=(0, 2, 3))

    with pytest.raises(ModelError, match=r"model\.pt2: answers for batches of 2 images only; export it .* dynamic"):
        load(save_program(Mixing(), images(2, 8), "export", tmp_path), 8)


def test_every_operator_of_a_program_has_a_name_and_can_be_hooked(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    model = load(save_program(network, images(2, 8), "frozen", tmp_path), 8)
    seen: dict[str, Any] = {}
    for name, part in model.module.named_modules():
        part.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        model.module(images(2, 8))
    assert {"conv2d", "relu"} <= seen.keys()
    assert torch.equal(seen["relu"], network[1](network[0](images(2, 8))))
    assert float(seen["conv2d"].min()) < 0  # not overwritten by the ReLU in place


def test_freeing_leaves_what_has_no_sizes_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    graph = trace(module, images(2, 8))
    code = graph.code
    free_batch(graph, images(2, 8))
    assert graph.code == code
    assert close(with_points(graph)(images(4, 8)), module(images(4, 8)))


def test_a_network_of_several_outputs_is_followed_for_its_logits(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            maps = self.conv(images)
            return {"features": maps, "logits": maps.mean(dim=(2, 3))}

    network = Two().eval()
    for form in ("script", "export"):
        model = load(save_program(network, images(2, 8), form, tmp_path), 8)
        assert close(model.module(images(3, 8)), network(images(3, 8))["logits"].detach())


def test_the_specification_of_a_program_is_its_file(tmp_path: Path) -> None:
    path = save_program(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), images(2, 8), "script", tmp_path)
    spec = read_spec(str(path))
    assert (spec.name, spec.kind, spec.source_path) == ("model", "torchscript", path)
    assert isinstance(spec, ModelSpec)


class Encoder(nn.Module):
    """A transformer with queries, keys and values of layers of their own, and attention written out."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.first, self.last = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True), nn.LayerNorm(12)
        self.query, self.key, self.value, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.masked = masked

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], dim=1)
        tokens = self.last(self.first(tokens))
        query, key, value = (
            part(tokens).view(len(images), -1, 3, 4).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.masked)
        tokens = tokens + self.out(found.transpose(1, 2).reshape(len(images), -1, 12))
        read: Tensor = nn.functional.silu(tokens)[:, 0] * 2.0
        return read


SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
HEADS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    # network, layer, linear layers that are spared tokens: projection and perceptron, in a causal one the last alone
    "vit": (lambda: timm.models.VisionTransformer(**SIZE), "blocks.0", 3),
    "behind a norm": (lambda: timm.models.VisionTransformer(**SIZE), "blocks.1.norm1", 3),
    "registers": (lambda: timm.models.VisionTransformer(**SIZE, reg_tokens=4, no_embed_class=True), "blocks.0", 3),
    "layer scale": (lambda: timm.models.VisionTransformer(**SIZE, init_values=1.0, qk_norm=True), "blocks.0", 3),
    "two tokens": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SIZE), "blocks.0", 6),
    "mean of tokens": (
        lambda: timm.models.VisionTransformer(**SIZE, class_token=False, global_pool="avg"),
        "blocks.0",
        0,
    ),
    "apart": (Encoder, "first", 2),
    "causal": (lambda: Encoder(True), "first", 1),
    "cnn": (tv.resnet18, "layer4", 0),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_computes_only_the_tokens_that_are_read(name: str) -> None:
    build, layer, spared = HEADS[name]
    torch.manual_seed(0)
    network = lively(build(), images(16, 32, 2)).requires_grad_(False)
    some = images(3, 32)
    trunk, head = cut_at(network, layer, images(2, 32))
    assert head.meta["spared"] == spared
    with torch.no_grad():
        value, *others = trunk(some)
        assert close(head(value, *others), network(some))
    whole: Tensor = value.clone().requires_grad_()

    def replaced(part: nn.Module, given: Any, output: Tensor) -> Tensor:
        return whole

    handle = network.get_submodule(layer).register_forward_hook(replaced)
    (expected,) = torch.autograd.grad(network(some)[:, 1].sum(), whole)
    handle.remove()
    leaf = value.clone().requires_grad_()
    (found,) = torch.autograd.grad(head(leaf, *others)[:, 1].sum(), leaf)
    assert close(found, expected)
