"""Methods that change the input or the layer agree with loops over single images, and ask no more than they must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
from captum.attr import LayerFeatureAblation, Occlusion
from torch import Tensor, nn

from tests import oracles
from tests.split_models import MODELS, Split, curved, of_class, of_classes, pictures, pooled, probe_of, relative
from wsi_gradcam.cam.methods import Probe, Score, ablationcam, occlusion, scorecam

Probing = Callable[[Probe, Score], Tensor]
PERTURBATIONS: dict[str, Probing] = {"scorecam": scorecam, "ablationcam": ablationcam, "occlusion": occlusion}
CLASSES = [2, 0, 3]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Split:
    return MODELS[request.param]()


@pytest.fixture(params=PERTURBATIONS)
def method(request: pytest.FixtureRequest) -> Probing:
    return PERTURBATIONS[request.param]


def counted(ask: Callable[[Tensor], Tensor], calls: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def count(given: Tensor) -> Tensor:
        calls.append(given)
        return ask(given)

    return count


# --- Score-CAM ---


def test_scorecam_is_its_formula(model: Split) -> None:
    images = pictures()
    probe = probe_of(model, images)
    expected = torch.tensor(
        [
            oracles.scorecam_by_hand(model, image, A, index)
            for image, A, index in zip(images, probe.activation, CLASSES, strict=True)
        ]
    )
    assert relative(scorecam(probe, of_classes(CLASSES)), expected) < 1e-5


def test_scorecam_weighs_channels_apart() -> None:
    """With the small logits of an untrained network all weights are nearly 1 / K, and the formula's test would pass."""
    probe = probe_of(pooled(), pictures())
    found = scorecam(probe, lambda logits: 100 * logits[:, 2])
    expected = [
        oracles.scorecam_by_hand(lambda x: 100 * pooled()(x), image, A, 2)
        for image, A in zip(probe.images, probe.activation, strict=True)
    ]
    assert relative(found, torch.tensor(expected)) < 1e-4  # rounding of the logits, times 100, is an exponent
    assert relative(found, probe.activation.mean(dim=1)) > 0.1


def test_scorecam_masks_from_zero_to_one_and_constant_maps_mask_all() -> None:
    probe, calls = probe_of(pooled(), torch.ones(2, 3, 32, 24)), list[Tensor]()
    A = torch.rand(2, 4, 4, 3) * 7 - 3
    A[0, 1], A[1, 2] = 5.0, 0.0
    scorecam(replace(probe, activation=A, predict=counted(probe.predict, calls)), of_class(0))
    assert len(calls) == 4
    for k, masked in enumerate(calls):
        for i in range(2):
            constant = (i, k) in {(0, 1), (1, 2)}
            assert float(masked[i].min()) == 0.0
            assert float(masked[i].max()) == (0.0 if constant else 1.0)


def test_scorecam_is_pytorch_grad_cams_where_maps_need_no_enlarging() -> None:
    package = pytest.importorskip("pytorch_grad_cam", reason="only the bench extra installs pytorch-grad-cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    torch.manual_seed(1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    model = Split(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()), head).eval()
    probe = probe_of(model, pictures())
    with package.ScoreCAM(model, [model.features]) as other:
        chosen = [targets.ClassifierOutputTarget(c) for c in CLASSES]
        weights = other.get_cam_weights(probe.images, model.features, chosen, probe.activation.numpy(), None)
    expected = torch.einsum("bk,bkhw->bhw", torch.from_numpy(weights), probe.activation)
    assert relative(scorecam(probe, of_classes(CLASSES)), expected) < 1e-5


# --- Ablation-CAM ---


def test_ablationcam_is_its_formula(model: Split) -> None:
    probe = probe_of(model, pictures())
    expected = torch.tensor(
        [oracles.ablationcam_by_hand(model.head, A, index) for A, index in zip(probe.activation, CLASSES, strict=True)]
    )
    assert relative(ablationcam(probe, of_classes(CLASSES)), expected) < 1e-5


def test_ablationcam_weighs_by_captums_ablation(model: Split) -> None:
    probe = probe_of(model, pictures())
    channels = probe.activation.shape[1]
    mask = torch.arange(channels)[None, :, None, None]
    drops = LayerFeatureAblation(model, model.features).attribute(probe.images, target=1, layer_mask=mask)
    expected = (drops * probe.activation).sum(dim=1)
    assert relative(ablationcam(probe, of_class(1)), expected) < 1e-5


@pytest.mark.parametrize("offset", [-50.0, 50.0])
def test_ablationcam_does_not_turn_with_the_sign_of_the_score(offset: float) -> None:
    """Divided by the score, as in pytorch-grad-cam, evidence for a class of negative logit would show as against it."""
    probe = probe_of(pooled(), pictures())
    expected = ablationcam(probe, of_class(1))
    found = ablationcam(probe, lambda logits: logits[:, 1] + offset)
    assert relative(found, expected) < 1e-3


def test_ablationcam_survives_a_head_that_changes_its_input() -> None:
    """An in-place ReLU behind the layer must change neither the layer's maps nor later channels' scores."""
    model = curved()  # its head begins with one
    probe = probe_of(model, pictures())
    before = probe.activation.clone()
    assert (before < 0).any()
    found = ablationcam(probe, of_class(0))
    assert torch.equal(probe.activation, before)
    cast(nn.ReLU, cast(nn.Sequential, model.head)[0]).inplace = False
    assert torch.equal(ablationcam(probe_of(model, pictures()), of_class(0)), found)


# --- occlusion ---


def test_occlusion_hides_two_cells_around_each_cell(model: Split) -> None:
    images = pictures()
    probe = probe_of(model, images)
    cell = images.shape[2] / probe.activation.shape[2]
    expected = torch.tensor(
        [
            oracles.occlusion_by_hand(model, image, index, 2 * cell, cell)
            for image, index in zip(images, CLASSES, strict=True)
        ]
    )
    found = occlusion(probe, of_classes(CLASSES))
    assert found.shape[1:] == probe.activation.shape[2:]
    assert float((found - expected).abs().max()) < 1e-6 * float(model(images).detach().abs().max())


@pytest.mark.parametrize(("window", "stride"), [(7.0, 5.0), (3.0, 2.5), (4.0, 8.0), (100.0, 8.0)])
def test_occlusion_takes_windows_and_strides(window: float, stride: float) -> None:
    model, images = curved(), pictures(2)
    found = occlusion(probe_of(model, images), of_class(1), (window, window), (stride, stride))
    expected = torch.tensor([oracles.occlusion_by_hand(model, image, 1, window, stride) for image in images])
    assert float((found - expected).abs().max()) < 1e-6 * float(model(images).detach().abs().max())


def test_occlusion_is_captums(model: Split) -> None:
    images = pictures()
    found = occlusion(probe_of(model, images), of_class(2), (8, 8), (8, 8))
    expected = Occlusion(model).attribute(images, sliding_window_shapes=(3, 8, 8), strides=(3, 8, 8), target=2)
    enlarged = found.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    assert float((enlarged - expected[:, 0]).abs().max()) < 1e-6 * float(model(images).detach().abs().max())


def test_occlusion_of_all_is_the_score_less_that_of_nothing() -> None:
    model, images = pooled(), pictures()
    found = occlusion(probe_of(model, images), of_class(0), (99, 99), (32, 24))
    expected = (model(images) - model(images * 0))[:, 0]
    torch.testing.assert_close(found[:, 0, 0], expected.detach())


def test_occlusion_finds_the_only_cell_that_counts() -> None:
    class Corner(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :1, 16:24, 8:16].sum(dim=(2, 3)) * torch.tensor([[1.0, -1.0]])

    images = torch.ones(1, 3, 32, 32)
    probe = Probe(images, torch.zeros(1, 2, 4, 4), Corner(), Corner(), Corner(), Corner())
    found = occlusion(probe, of_class(0), window_px=(8, 8))
    assert found.nonzero().tolist() == [[0, 2, 1]]
    assert float(found[0, 2, 1]) == 64.0
    assert torch.equal(occlusion(probe, of_class(1), window_px=(8, 8)), -found)


# --- what holds for all ---


@pytest.mark.parametrize("size", [1, 2])
def test_a_map_is_the_images_own(method: Probing, size: int, model: Split) -> None:
    images = pictures()
    expected = method(probe_of(model, images), of_classes(CLASSES))
    parts = [
        method(probe_of(model, images[i : i + size]), of_classes(CLASSES[i : i + size])) for i in range(0, 3, size)
    ]
    assert relative(torch.cat(parts), expected) < 1e-4  # differences of logits: rounding of the logits shows
    turned = method(probe_of(model, images.flip(0)), of_classes(CLASSES[::-1]))
    assert relative(turned.flip(0), expected) < 1e-4


def test_each_pass_is_one_batch_and_nothing_is_kept(method: Probing) -> None:
    model, images = curved(), pictures()
    plain = probe_of(model, images)
    calls: list[Tensor] = []
    answer, resume = counted(plain.predict, calls), counted(plain.resume, calls)
    before = plain.images.clone(), plain.activation.clone()
    with torch.enable_grad():
        found = method(replace(plain, predict=answer, resume=resume), of_class(0))
    assert not found.requires_grad
    channels, height, width = plain.activation.shape[1:]
    passes = {"scorecam": channels, "ablationcam": 1 + channels, "occlusion": 1 + height * width}
    assert [len(given) for given in calls] == [len(images)] * passes[method.__name__]
    assert torch.equal(images, before[0])
    assert torch.equal(plain.activation, before[1])


def test_a_layer_of_zeros_gives_finite_maps(method: Probing) -> None:
    model = pooled()
    with torch.no_grad():
        for parameter in model.features.parameters():
            parameter.zero_()
    probe = probe_of(model, pictures())
    assert not probe.activation.any()
    assert not method(probe, of_class(0)).any()


def test_low_precision_answers_give_float32_maps(method: Probing) -> None:
    plain = probe_of(pooled(), pictures())
    probe = replace(
        plain,
        activation=plain.activation.bfloat16(),
        predict=lambda images: plain.predict(images).bfloat16(),
        resume=lambda maps: plain.resume(maps.float()).bfloat16(),
    )
    found = method(probe, of_class(0))
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
