"""Methods that differentiate by the input agree with single images, with captum, and add up where they promise it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
from captum.attr import GuidedBackprop, IntegratedGradients, NoiseTunnel, Saliency
from scipy.special import roots_legendre
from torch import Tensor, nn

from tests import oracles
from tests.split_models import (
    MODELS,
    Split,
    curved,
    of_class,
    of_classes,
    perceptron,
    pictures,
    pooled,
    probe_of,
    relative,
)
from wsi_gradcam.cam.methods import (
    SAMPLES,
    SEED,
    SPREAD,
    STEPS,
    Probe,
    Score,
    gradient,
    guided_backprop,
    integrated_gradients,
    smoothgrad,
)
from wsi_gradcam.errors import LayerError

Probing = Callable[[Probe, Score], Tensor]
PIXELS: dict[str, Probing] = {
    "gradient": gradient,
    "smoothgrad": smoothgrad,
    "integrated_gradients": integrated_gradients,
    "guided_backprop": guided_backprop,
}
CLASSES = [1, 3, 0]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Split:
    return MODELS[request.param]()


@pytest.fixture(params=PIXELS)
def method(request: pytest.FixtureRequest) -> Probing:
    return PIXELS[request.param]


def without_in_place(model: Split) -> Split:
    """captum's hooks on modules refuse in-place ReLUs."""
    for part in model.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    return model


# --- gradient and SmoothGrad ---


def test_gradient_is_its_formula(model: Split) -> None:
    images = pictures()
    expected = [
        oracles.strongest_colour(oracles.input_gradient(model, image, index))
        for image, index in zip(images, CLASSES, strict=True)
    ]
    assert relative(gradient(probe_of(model, images), of_classes(CLASSES)), torch.stack(expected)) < 1e-5


def test_gradient_is_captums_saliency(model: Split) -> None:
    images = pictures()
    expected = Saliency(model).attribute(images.clone().requires_grad_(True), target=CLASSES).amax(dim=1)
    assert relative(gradient(probe_of(model, images), of_classes(CLASSES)), expected) < 1e-5


def test_smoothgrad_is_its_formula(model: Split) -> None:
    images = pictures()
    expected = [
        oracles.smoothgrad_by_hand(model, image, index, SAMPLES, SPREAD, SEED)
        for image, index in zip(images, CLASSES, strict=True)
    ]
    assert relative(smoothgrad(probe_of(model, images), of_classes(CLASSES)), torch.stack(expected)) < 1e-5


def test_smoothgrad_is_captums_with_the_same_noise(monkeypatch: pytest.MonkeyPatch, model: Split) -> None:
    image = pictures(1)
    generator = torch.Generator().manual_seed(SEED)

    def noise(mean: float, deviations: Tensor) -> Tensor:
        return deviations * torch.stack([torch.randn(image.shape[1:], generator=generator) for _ in deviations])

    monkeypatch.setattr(torch, "normal", noise)
    deviation = SPREAD * float(image.max() - image.min())
    tunnel = NoiseTunnel(Saliency(model))
    expected = tunnel.attribute(image, nt_type="smoothgrad", nt_samples=SAMPLES, stdevs=deviation, target=2, abs=False)
    assert relative(smoothgrad(probe_of(model, image), of_class(2)), expected.abs().amax(dim=1)) < 1e-5


def test_smoothgrad_of_an_image_is_the_same_wherever_it_stands() -> None:
    image, others = pictures(1), pictures(4)
    expected = smoothgrad(probe_of(perceptron(), image), of_class(0))
    for place in range(4):
        batch = others.clone()
        batch[place] = image
        found = smoothgrad(probe_of(perceptron(), batch), of_class(0))[place : place + 1]
        assert relative(found, expected) < 1e-5


def test_smoothgrad_leaves_the_global_random_state_alone() -> None:
    probe = probe_of(pooled(), pictures())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = smoothgrad(probe, of_class(0))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(smoothgrad(probe, of_class(0)), first)


def test_smoothgrad_noise_is_of_each_images_own_range() -> None:
    plain, asked = probe_of(pooled(), torch.rand(2, 3, 32, 24)), list[Tensor]()
    images = torch.stack([plain.images[0], 10 * plain.images[1] - 4])

    def differentiable(given: Tensor) -> Tensor:
        asked.append(given.detach() - images)
        return plain.differentiable(given)

    smoothgrad(replace(plain, images=images, differentiable=differentiable), of_class(0))
    assert len(asked) == SAMPLES
    deviations = torch.stack(asked).std(dim=(0, 2, 3, 4))
    ranges = images.amax(dim=(1, 2, 3)) - images.amin(dim=(1, 2, 3))
    torch.testing.assert_close(deviations, SPREAD * ranges, rtol=0.02, atol=0)


def test_smoothgrad_without_noise_is_the_gradient() -> None:
    constant = probe_of(curved(), torch.full((2, 3, 32, 24), 0.7))  # its range is 0
    assert relative(smoothgrad(constant, of_class(0)), gradient(constant, of_class(0))) < 1e-5


def test_smoothgrad_averages_signed_gradients() -> None:
    """A gradient that changes sign with the noise cancels; the mean of its absolute values would not."""

    class Steep(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cos(100 * images).sum(dim=(1, 2, 3))[:, None]

    images = pictures(1)
    probe = Probe(images, images, Steep(), Steep(), Steep(), Steep())
    assert float(smoothgrad(probe, of_class(0), samples=400).max()) < 30  # 100 / sqrt(400) times a few
    assert float(gradient(probe, of_class(0)).mean()) > 80


# --- Integrated Gradients ---


def test_integrated_gradients_is_its_formula(model: Split) -> None:
    images = pictures()
    places, weights = roots_legendre(STEPS)
    rule = list(zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))
    expected = [
        oracles.integrated_by_hand(model, image, index, rule) for image, index in zip(images, CLASSES, strict=True)
    ]
    assert relative(integrated_gradients(probe_of(model, images), of_classes(CLASSES)), torch.stack(expected)) < 1e-5


def test_integrated_gradients_is_captums(model: Split) -> None:
    images = pictures()
    expected = IntegratedGradients(model).attribute(
        images, target=CLASSES, n_steps=STEPS, method="gausslegendre", internal_batch_size=3
    )
    found = integrated_gradients(probe_of(model, images), of_classes(CLASSES))
    assert relative(found, expected.sum(dim=1).float()) < 1e-5
    assert (found < 0).any()


def complete(model: Split, steps: int) -> float:
    """How far the sum over pixels is from s(x) - s(0), relative to it; the worst image."""
    images = pictures()
    found = integrated_gradients(probe_of(model, images), of_class(1), steps).sum(dim=(1, 2))
    expected = (model(images) - model(images * 0)).detach()[:, 1]
    return float(((found - expected) / expected).abs().max())


def smooth(model: Split) -> Split:
    """`model` with curves in place of kinks."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus())
    return model


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_integrated_gradients_add_up_to_the_change_of_the_score(build: Callable[[], Split]) -> None:
    assert complete(smooth(build()), STEPS) < 1e-4
    assert complete(build(), STEPS) < 0.1  # at each kink the integrand jumps
    assert complete(build(), 300) < 0.01


def test_integrated_gradients_of_a_linear_model_are_exact() -> None:
    torch.manual_seed(2)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 24, 4))
    images = pictures()
    probe = Probe(images, images, linear, linear, linear, linear)
    weights = cast(nn.Linear, linear[1]).weight[1].reshape(3, 32, 24).detach()
    assert relative(integrated_gradients(probe, of_class(1)), (images * weights).sum(dim=1)) < 1e-5


def test_integrated_gradients_of_the_baseline_are_zero() -> None:
    assert not integrated_gradients(probe_of(curved(), torch.zeros(1, 3, 32, 24)), of_class(0)).any()


# --- guided backpropagation ---


def test_guided_backprop_is_its_formula(model: Split) -> None:
    images = pictures()
    expected = [
        oracles.strongest_colour(oracles.guided_by_hand(model, image, index))
        for image, index in zip(images, CLASSES, strict=True)
    ]
    assert relative(guided_backprop(probe_of(model, images), of_classes(CLASSES)), torch.stack(expected)) < 1e-5


def test_guided_backprop_is_captums(model: Split) -> None:
    images = pictures()
    captum = GuidedBackprop(without_in_place(model))
    with pytest.warns(UserWarning, match="backward hooks"):
        expected = captum.attribute(images.clone().requires_grad_(True), target=CLASSES)
    found = guided_backprop(probe_of(model, images), of_classes(CLASSES))
    assert relative(found, expected.detach().abs().amax(dim=1)) < 1e-5


def test_guided_backprop_is_not_the_gradient(model: Split) -> None:
    probe = probe_of(model, pictures())
    assert relative(guided_backprop(probe, of_class(0)), gradient(probe, of_class(0))) > 0.1


def test_guided_backprop_of_a_model_without_relu_is_refused() -> None:
    def refuse(images: Tensor) -> Tensor:
        raise LayerError("no ReLU")

    with pytest.raises(LayerError, match="no ReLU"):
        guided_backprop(replace(probe_of(pooled(), pictures()), guided=refuse), of_class(0))


# --- what holds for all ---


@pytest.mark.parametrize("size", [1, 2])
def test_a_map_is_the_images_own(method: Probing, size: int, model: Split) -> None:
    images = pictures()
    expected = method(probe_of(model, images), of_classes(CLASSES))
    parts = [
        method(probe_of(model, images[i : i + size]), of_classes(CLASSES[i : i + size])) for i in range(0, 3, size)
    ]
    assert relative(torch.cat(parts), expected) < 1e-5
    turned = method(probe_of(model, images.flip(0)), of_classes(CLASSES[::-1]))
    assert relative(turned.flip(0), expected) < 1e-5


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_had_in_either_grad_mode_and_leave_nothing_behind(method: Probing, enabled: bool) -> None:
    model, images = curved(), pictures()
    probe, before = probe_of(model, images), images.clone()
    expected = method(probe, of_class(1))
    with torch.set_grad_enabled(enabled):
        found = method(probe, of_class(1))
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(found, expected)
    assert found.shape == (3, 32, 24)
    assert found.dtype == torch.float32
    assert found.any()
    assert not found.requires_grad
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert images.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_score_that_does_not_see_the_image_has_a_map_of_zeros(method: Probing) -> None:
    probe = probe_of(pooled(), pictures())
    bias = nn.Parameter(torch.ones(3, 4))
    blind = replace(probe, differentiable=lambda images: bias * 2, guided=lambda images: bias * 2)
    assert not method(blind, of_class(0)).any()


def test_a_dead_layer_gives_zeros(method: Probing) -> None:
    model = pooled()
    with torch.no_grad():
        for parameter in model.features.parameters():
            parameter.zero_()
    found = method(probe_of(model, pictures()), of_class(0))
    assert torch.isfinite(found).all()
    assert not found.any()
