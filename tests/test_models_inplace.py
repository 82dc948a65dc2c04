"""Networks whose `forward` changes its input: valid, and explained like those that leave it alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.programs import FORMS, save_program, small
from tests.toy_models import pooled_linear
from wsi_gradcam import GradCAM
from wsi_gradcam.audit.images import audit_images
from wsi_gradcam.cam.explainer import Request, examine
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.models.load import load_model, model_of
from wsi_gradcam.models.spec import ModelSpec

CHANGES = ["sub_", "mul_", "view", "index", "relu_", "reversed"]


class Changing(nn.Module):
    """A network behind a change of its input, made in place or not."""

    def __init__(self, change: str, in_place: bool) -> None:
        super().__init__()
        self.net: nn.Module = small()
        self.change, self.in_place = change, in_place

    def forward(self, x: Tensor) -> Tensor:
        given = x if self.in_place else x.clone()
        if self.change == "sub_":
            given.sub_(0.5)
        elif self.change == "mul_":
            given *= 2
        elif self.change == "view":
            given.flatten(2).transpose(1, 2).add_(0.25)
        elif self.change == "index":
            given[:, 1] = 0
        elif self.change == "relu_":
            torch.relu_(given)
        else:
            given.copy_(given.flip(1))
        return self.net(given)  # type: ignore[no-any-return]


class PooledChanging(Changing):
    """The same with a pooled ReLU, which every method can explain."""

    def __init__(self, in_place: bool) -> None:
        super().__init__("sub_", in_place)
        torch.manual_seed(0)
        self.net = pooled_linear()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("change", CHANGES)
def test_logits_and_maps_are_those_of_the_network_that_leaves_its_input(change: str, images: Tensor) -> None:
    before = images.clone()
    found, expected = (
        GradCAM(Changing(change, in_place), method=["gradcam", "hirescam", "occlusion", "gradient", "scorecam"])(images)
        for in_place in (True, False)
    )
    assert torch.equal(images, before)
    assert torch.equal(found.logits, expected.logits)
    for method, maps in expected.by_method.items():
        assert torch.allclose(found.by_method[method], maps, rtol=1e-5, atol=1e-6), method


def test_every_method_agrees(images: Tensor) -> None:
    found, expected = (
        GradCAM(PooledChanging(in_place), "net.features", list(METHOD_INFO), engine="eager", precision="float32")(
            images
        )
        for in_place in (True, False)
    )
    for method in METHOD_INFO:
        maps = expected.by_method[method]
        assert torch.allclose(found.by_method[method], maps, rtol=1e-4, atol=1e-5 * float(maps.abs().max())), method


@pytest.mark.parametrize("engine", ["eager", "openvino"])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_engines_agree(engine: str, precision: str, images: Tensor) -> None:
    models = [model_of(Changing("mul_", in_place), patch_px=32) for in_place in (True, False)]
    request = Request(engine=engine, precision=precision, batch_size=5)
    found, expected = (examine(model, request).program.predict(images) for model in models)
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_programs_that_change_their_input_are_explained(form: str, images: Tensor, tmp_path: Path) -> None:
    network = Changing("sub_", True).eval()
    example = images[:1] if form == "export" else images[:2]
    path = save_program(_scriptable() if form in ("script", "frozen") else network, example.clone(), form, tmp_path)
    kind = "export" if form.startswith("export") else "torchscript"
    spec = ModelSpec(name="n", source=f"{kind}:{path.name}", folder=tmp_path, patch_px=32).trusting()
    found = load_model(spec).module(images)
    assert torch.allclose(found, Changing("sub_", False)(images), rtol=1e-4, atol=1e-5)


class Scriptable(nn.Module):
    """The same in words that TorchScript understands."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        return self.net(x)  # type: ignore[no-any-return]


def _scriptable() -> nn.Module:
    return Scriptable().eval()


def test_an_audit_gives_the_same_numbers() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    found, expected = (
        audit_images(rgb, model_of(Changing("sub_", in_place), name="n", patch_px=32, mpp=0.5), only=["saturation"])
        for in_place in (True, False)
    )
    assert found.estimates == expected.estimates


def test_a_network_that_leaves_its_input_is_not_wrapped() -> None:
    network = small()
    model = model_of(network, patch_px=32)
    assert type(model.module) is type(network)
    assert list(model.module.state_dict()) == list(network.state_dict())
