"""Saturation: probabilities that hide the evidence, units that hide the gradient, and channels that are never on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.planted import features, patches, trained
from tests.subjects import subject_of
from tests.toy_models import PooledLinear
from wsi_gradcam.audit.measures.changes import leaky_maps, saturation
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import TargetError

TUMOUR = Target("tumour", 1)


def test_a_saturated_model_is_seen_and_another_is_not() -> None:
    sample = patches(20, 0)
    found = {}
    for factor in (0.02, 100.0):
        network = PooledLinear(trained().features, 12)
        with torch.no_grad():
            network.fc.weight.copy_(trained().fc.weight * factor)
            network.fc.bias.copy_(trained().fc.bias * factor)
        subject = subject_of(network)
        images = subject.images(sample.rgb)
        found[factor] = saturation(subject, images, subject.aim(images, TUMOUR))
    assert found[100.0].saturated.mean() > 0.9
    assert found[100.0].gradient_ratio.mean() < 0.05
    assert not found[0.02].saturated.any()
    assert found[0.02].gradient_ratio.mean() > 0.1
    assert not found[100.0].silent.any()


def test_the_ratio_is_that_of_gradients_by_hand() -> None:
    subject = subject_of(trained())
    images = subject.images(patches(5, 1).rgb)
    found = saturation(subject, images, subject.aim(images, TUMOUR))
    network = subject.program.module
    for i, image in enumerate(images):
        value = network.features(image[None]).detach().requires_grad_(True)  # type: ignore[operator]
        logits = network.fc(value.mean(dim=(2, 3)))  # type: ignore[operator]
        (g,) = torch.autograd.grad(logits[0, 1], value, retain_graph=True)
        (p,) = torch.autograd.grad(logits.softmax(dim=1)[0, 1], value)
        assert found.gradient_ratio[i] == pytest.approx(float(p.norm() / g.norm()), rel=1e-3, abs=1e-6)
        off = (value[0] == 0).flatten(1).all(dim=1)
        assert found.dead_share[i] == pytest.approx(float(off.float().mean()))


def test_channels_that_are_never_on_are_dead() -> None:
    network = PooledLinear(features(), 12)
    with torch.no_grad():
        network.features[2].bias[[3, 7]] = -1e6  # type: ignore[index]
    subject = subject_of(network)
    images = subject.images(patches(6, 0).rgb)
    found = saturation(subject, images, subject.aim(images, TUMOUR))
    assert {3, 7} <= set(np.flatnonzero(found.dead).tolist())
    assert (found.dead_share >= found.dead.mean()).all()


class Gated(nn.Module):
    """A head whose hidden unit is off, or on."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.features = features()
        self.hidden = nn.Sequential(nn.Linear(12, 1), nn.ReLU())
        self.fc = nn.Linear(1, 2)
        with torch.no_grad():
            self.hidden[0].bias.fill_(bias)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.hidden(self.features(images).mean(dim=(2, 3))))  # type: ignore[no-any-return]


def test_a_leaky_backward_shows_what_a_unit_that_is_off_hides() -> None:
    torch.manual_seed(0)
    closed, opened = Gated(-50.0), Gated(50.0)
    opened.load_state_dict({k: v for k, v in closed.state_dict().items() if k != "hidden.0.bias"}, strict=False)
    maps = {}
    for name, network in (("closed", closed), ("open", opened)):
        subject = subject_of(network)
        images = subject.images(patches(5, 0).rgb)
        aim = subject.aim(images, TUMOUR)
        maps[name] = subject.maps(images, aim), leaky_maps(subject, images, aim)
        silent = saturation(subject, images, aim).silent
        assert silent.tolist() == [float(name == "closed")] * 5
    assert not maps["closed"][0].any()
    torch.testing.assert_close(maps["open"][1], maps["open"][0])
    torch.testing.assert_close(maps["closed"][1], 0.1 * maps["open"][0])


def test_without_a_relu_behind_the_layer_nothing_leaks() -> None:
    subject = subject_of(trained())
    images = subject.images(patches(5, 0).rgb)
    aim = subject.aim(images, TUMOUR)
    torch.testing.assert_close(leaky_maps(subject, images, aim), subject.maps(images, aim))


def test_a_contrast_has_no_probability() -> None:
    subject = subject_of(trained())
    images = subject.images(patches(2, 0).rgb)
    with pytest.raises(TargetError, match="the target is not a class; give a class"):
        saturation(subject, images, subject.aim(images, Target("tumour-other", 1, 0)))
