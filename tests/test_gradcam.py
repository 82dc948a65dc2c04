"""`GradCAM` for plain images: what it takes and gives, and that it leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torchvision.models import get_model

import wsi_gradcam
from tests import split_models
from tests.families import FAMILIES, images_of, network_of
from tests.split_models import Split, curved, pictures, plain, relative
from tests.toy_models import PooledLinear
from wsi_gradcam import GradCAM, gradcam
from wsi_gradcam.cam.auto import make_program
from wsi_gradcam.cam.facts import Choice, Layer
from wsi_gradcam.cam.program import Program, SplitProgram
from wsi_gradcam.errors import LayerError, ModelError
from wsi_gradcam.models.load import model_of
from wsi_gradcam.models.spec import ModelSpec

CLASSES = ["other", "tumor", "stroma", "fat"]


network, images = split_models.network, split_models.images  # fixtures


def by_autograd(network: Split, images: Tensor, weights: Sequence[float]) -> Tensor:
    """Grad-CAM [B, h, w] of a weighted sum of the logits."""
    leaf = network.features(images).detach().requires_grad_(True)
    logits = network.head(leaf.clone())
    (g,) = torch.autograd.grad((logits * torch.tensor(weights)).sum(), leaf)
    maps: Tensor = (g.mean(dim=(2, 3), keepdim=True) * leaf.detach()).sum(dim=1)
    return maps


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


# --- use ---


def test_three_lines_are_enough() -> None:
    network = get_model("resnet18").eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))

    explain = GradCAM(network)
    found = explain(images)

    expected = LayerGradCam(network, network.layer4).attribute(
        images, target=network(images).argmax(dim=1), relu_attributions=False
    )
    assert explain.layers(images) == ("layer4",)
    assert found.targets == ("predicted",)
    assert relative(found.cams, expected) < 1e-5
    assert relative(found.logits, network(images)) < 1e-5
    assert wsi_gradcam.GradCAM is GradCAM


@pytest.mark.parametrize(
    ("target", "label", "weights"),
    [
        (2, "stroma", [0.0, 0.0, 1.0, 0.0]),
        (np.int64(2), "stroma", [0.0, 0.0, 1.0, 0.0]),
        ("3", "fat", [0.0, 0.0, 0.0, 1.0]),
        ("tumor", "tumor", [0.0, 1.0, 0.0, 0.0]),
        ("tumor-stroma", "tumor-stroma", [0.0, 1.0, -1.0, 0.0]),
        (lambda logits: logits[:, 0] + 2 * logits[:, 3], "<lambda>", [1.0, 0.0, 0.0, 2.0]),
    ],
)
def test_a_target_is_what_it_says(
    target: Any, label: str, weights: list[float], network: Split, images: Tensor
) -> None:
    found = plain(network, classes=CLASSES)(images, target)
    assert found.targets == (label,)
    assert relative(found.cams[:, 0], by_autograd(network, images, weights)) < 1e-5
    assert relative(found.logits, network(images)) < 1e-5


def test_predicted_is_each_images_own_class(network: Split, images: Tensor) -> None:
    with torch.no_grad():  # several classes shall win
        cast(nn.Linear, network.head[5]).bias.sub_(network(images).mean(dim=0))  # type: ignore[index]
    explain = plain(network)
    every, predicted = explain(images, "all"), explain(images)
    winners = every.logits.argmax(dim=1)
    assert len(set(winners.tolist())) > 1
    assert every.targets == ("0", "1", "2", "3")
    torch.testing.assert_close(predicted.cams[:, 0], every.cams[torch.arange(5), winners])


def test_several_methods_and_targets_at_once(network: Split, images: Tensor) -> None:
    together = plain(network, method="layercam, gradcam,occlusion,gradient")(images, [1, "predicted", 0])
    assert list(together.by_method) == ["layercam", "gradcam", "occlusion", "gradient"]
    assert together.cams is together.by_method["layercam"]
    assert together.by_method["gradient"].shape == (5, 3, 32, 24)
    for method, maps in together.by_method.items():
        alone = plain(network, method=[method])(images, [1, "predicted", 0]).cams
        torch.testing.assert_close(maps, alone, rtol=1e-5, atol=1e-6)


def test_several_layers_are_fused(network: Split, images: Tensor) -> None:
    found = plain(network, layer="features.2+features")(images, 1).cams
    assert found.shape == (5, 1, 8, 6)
    parts = [plain(network, layer=layer)(images, 1).cams for layer in ("features.2", "features")]
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)


def test_maps_can_be_enlarged_to_lie_over_the_image(network: Split, images: Tensor) -> None:
    found = plain(network)(images, [0, 1])
    larger = found.enlarged(32, 24)
    assert larger.shape == (5, 2, 32, 24)
    torch.testing.assert_close(larger.mean(dim=(2, 3)), found.cams.mean(dim=(2, 3)), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_batches_and_a_short_last_one_do_not_matter(batch_size: int, network: Split, images: Tensor) -> None:
    expected = plain(network)(images, ["predicted", 1])
    found = plain(network, batch_size=batch_size)(images, ["predicted", 1])
    assert relative(found.logits, expected.logits) < 1e-5
    for t in range(2):
        assert relative(found.cams[:, t], expected.cams[:, t]) < 1e-5


def test_a_single_image_is_a_batch_of_one(network: Split, images: Tensor) -> None:
    expected = plain(network)(images, 1)
    found = plain(network)(images[2:3], 1)
    assert relative(found.cams, expected.cams[2:3]) < 1e-5


def test_images_of_several_sizes_have_layers_of_their_own(network: Split) -> None:
    explain = plain(network)
    for height, width in ((32, 24), (64, 64), (32, 24)):
        found = explain(torch.randn(2, 3, height, width), 1)
        assert found.cams.shape == (2, 1, height // 4, width // 4)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_another_precision_are_taken_as_float32(kind: torch.dtype, network: Split, images: Tensor) -> None:
    found = plain(network)(images.to(kind), 1)
    assert torch.equal(found.cams, plain(network)(images.to(kind).float(), 1).cams)
    assert found.cams.dtype == found.logits.dtype == torch.float32


# --- models ---


def test_whatever_model_takes_is_taken(images: Tensor, tmp_path: Path) -> None:
    spec = ModelSpec(name="toy", source="tests.toy_models:pooled_linear", patch_px=32, classes=("a", "b"))
    path = tmp_path / "model.yaml"
    path.write_text("name: toy\nsource: tests.toy_models:pooled_linear\npatch_px: 32\nclasses: [a, b]\n")
    found = [GradCAM(model)(pictures(2)[..., :24], "b") for model in (spec, path, str(path))]
    assert all(torch.equal(each.cams, found[0].cams) for each in found)
    assert found[0].targets == ("b",)


def test_a_loaded_model_brings_its_classes_and_layer(network: Split, images: Tensor) -> None:
    model = model_of(network, patch_px=(32, 24), classes=CLASSES, layer="features.2")
    explain = GradCAM(model)
    assert explain.layers(images) == ("features.2",)
    assert GradCAM(model, layer="features").layers(images) == ("features",)
    found = explain(images, "tumor-fat")
    expected = plain(network, layer="features.2")(images, "1-3")
    assert found.targets == ("tumor-fat",)
    assert relative(found.cams, expected.cams) < 1e-5


@pytest.mark.parametrize("kind", ["dict", "tuple", "column"])
def test_networks_that_return_more_or_less_than_logits_are_taken(kind: str, network: Split, images: Tensor) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor) -> object:
            logits = self.inner(x)
            return {"dict": {"x": x, "logits": logits}, "tuple": (logits, x), "column": logits[:, 1]}[kind]

    found = plain(Other(), layer="inner.features")(images, 0 if kind == "column" else 1)
    assert relative(found.cams, plain(network)(images, 1).cams) < 1e-5
    assert found.logits.shape == (5, 1 if kind == "column" else 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_explained_without_being_told_how(name: str) -> None:
    explain = GradCAM(network_of(name))
    images = images_of(name, 2)
    found = explain(images)
    assert explain.layers(images) == (FAMILIES[name].layer,)
    assert found.cams.shape == (2, 1, FAMILIES[name].layout.height, FAMILIES[name].layout.width)
    assert found.cams.any()
    assert not hooks(network_of(name))


# --- the model as it was ---


class Training(PooledLinear):
    """Batch normalisation and dropout."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        features = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        super().__init__(features, 6, classes=3)


@pytest.mark.parametrize(("engine", "precision"), [("eager", "float32"), ("eager", "bfloat16")])
def test_a_model_in_training_is_explained_as_in_evaluation_and_left_in_training(
    engine: str, precision: str, images: Tensor
) -> None:
    network = Training()
    expected = GradCAM(network.eval(), engine=engine, precision=precision)(images)
    network.train()
    network.features.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = GradCAM(network, engine=engine, precision=precision)(images)
    assert torch.equal(found.cams, expected.cams)
    assert torch.equal(found.logits, expected.logits)
    assert [network.training, network.features.training, network.fc.training] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert not hooks(network)


@pytest.mark.parametrize(("engine", "precision"), [("eager", "float32"), ("eager", "bfloat16")])
def test_a_step_of_training_between_two_calls_counts(engine: str, precision: str, images: Tensor) -> None:
    """Engines hold copies of the weights."""
    network = Training()
    explain = GradCAM(network, engine=engine, precision=precision)
    before = explain(images, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(images).square().sum().backward()
    optimizer.step()
    found = explain(images, 1)
    expected = GradCAM(network, engine=engine, precision=precision)(images, 1)
    assert torch.equal(found.cams, expected.cams)
    assert relative(found.cams, before.cams) > 0.01


def test_programs_are_made_once(network: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(module: nn.Module, layers: tuple[Layer, ...], engine: str, precision: str, batch: Tensor) -> Program:
        made.append(len(batch))
        return make_program(module, layers, engine, precision, batch)

    monkeypatch.setattr(gradcam, "make_program", counted)
    explain = GradCAM(network, layer="features", precision="bfloat16", batch_size=3)
    explain(pictures(5))
    explain(pictures(4))
    explain(pictures(1))
    assert made == [3]
    explain(torch.randn(2, 3, 64, 64))
    assert made == [3, 2]


def test_hooks_and_modes_are_restored_after_an_exception(network: Split, images: Tensor) -> None:
    class Failing(nn.Module):
        fails = False

        def forward(self, maps: Tensor) -> Tensor:
            if self.fails:
                raise ZeroDivisionError
            return maps

    failing = Failing()
    whole = nn.Sequential(network.features, failing, network.head).train()
    explain = plain(whole, layer="0")
    explain(images)
    failing.fails = True
    with pytest.raises(ZeroDivisionError):
        explain(images)
    assert not hooks(whole)
    assert whole.training
    assert torch.is_grad_enabled()
    with pytest.raises(ModelError, match=r"the model fails on images of shape \(3, 32, 24\): ZeroDivisionError"):
        plain(whole, layer="0")(images)
    assert not hooks(whole)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_callers_grad_mode_does_not_matter(
    mode: Callable[[], Any], precision: str, network: Split, images: Tensor
) -> None:
    expected = plain(network, precision=precision, method="gradcam,gradient")(images, [0, 1])
    with mode():
        enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        explain = plain(network, precision=precision, method="gradcam,gradient")
        found = explain(images * 1, [0, 1])  # made in that mode
        assert explain.layers(images) == ("features",)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (enabled, inference)
    for method in ("gradcam", "gradient"):
        assert torch.equal(found.by_method[method], expected.by_method[method])
    assert not found.cams.requires_grad
    assert not found.cams.is_inference()
    assert not found.logits.requires_grad


def test_images_that_require_gradients_get_none(network: Split, images: Tensor) -> None:
    leaf = images.clone().requires_grad_(True)
    found = plain(network, method="gradcam,gradient")(leaf, 1)
    assert leaf.grad is None
    assert not found.by_method["gradient"].requires_grad
    assert torch.equal(leaf, images)


# --- engines ---


def test_few_images_are_explained_by_float32_and_many_make_a_choice(
    network: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, int]] = []

    def choose(
        module: nn.Module, layers: tuple[Layer, ...], engine: str, precision: str, batch: Tensor, size: int
    ) -> tuple[Choice, Program]:
        asked.append((engine, precision, size))
        return Choice("eager", "bfloat16"), make_program(module, layers, "eager", "bfloat16", batch)

    few_expected, expected = (plain(network)(pictures(count), 1).cams for count in (15, 16))
    monkeypatch.setattr(gradcam, "choose", choose)
    explain = GradCAM(network, layer="features", batch_size=12)
    few = explain(pictures(15), 1)
    assert explain.choice is None
    assert not asked
    assert relative(few.cams, few_expected) < 1e-5
    many = explain(pictures(16), 1)
    assert asked == [("auto", "auto", 12)]
    assert explain.choice == Choice("eager", "bfloat16")
    assert 1e-6 < relative(many.cams, expected) < 0.1
    explain(pictures(3), 1)
    explain(pictures(40), 1)
    assert len(asked) == 1


def test_an_engine_that_is_asked_for_is_used_from_the_first_image_on(network: Split, images: Tensor) -> None:
    explain = GradCAM(network, layer="features", engine="eager", precision="bfloat16")
    found = explain(images[:1], 1)
    assert explain.choice == Choice("eager", "bfloat16")
    assert 1e-6 < relative(found.cams, plain(network)(images[:1], 1).cams) < 0.1


@pytest.mark.parametrize("name", ["vit, class token", "resnet18"])
def test_openvino_takes_batches_of_any_size(name: str) -> None:
    """Also of a transformer, whose graph computes the size of the batch."""
    pytest.importorskip("openvino", reason="only the engines extra installs OpenVINO")
    images = images_of(name, 7)
    explain = GradCAM(network_of(name), engine="openvino", precision="float32", batch_size=4)
    expected = GradCAM(network_of(name), engine="eager", precision="float32")
    for count in (7, 4, 1):
        found = explain(images[:count], [0, "predicted"])
        wanted = expected(images[:count], [0, "predicted"])
        assert relative(found.logits, wanted.logits) < 1e-5
        assert relative(found.cams[:, 0], wanted.cams[:, 0]) < 1e-5
        assert relative(found.cams[:, 1], wanted.cams[:, 1]) < 1e-5
    assert all(isinstance(program, SplitProgram) for program in explain._programs.values())
    assert explain.choice == Choice("openvino", "float32")


def test_a_method_that_cannot_explain_the_layer_is_refused() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=4).eval()
    with pytest.raises(LayerError, match=r"hirescam is 0 at layer 'blocks.1' .up to rounding.*norm1"):
        GradCAM(network, method="hirescam")(torch.randn(2, 3, 64, 64))
    assert GradCAM(network, "blocks.2.norm1", "hirescam")(torch.randn(2, 3, 64, 64)).cams.abs().max() > 0
    with pytest.raises(LayerError, match="CAM is defined only where global average pooling and a linear layer follow"):
        plain(curved(), method="cam")(pictures(2))


def test_threads_may_share_one(network: Split, images: Tensor) -> None:
    """A network holds one hook at a time."""
    explain = plain(network)
    expected = [explain(images, i).cams for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: explain(images, i % 4).cams, range(64)))
    assert all(torch.equal(cams, expected[i % 4]) for i, cams in enumerate(found))
    assert hooks(network) == 0
