"""Locality: promises are gradients, infidelity is captum's, and a cliff beside a plateau is found."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.planted import patches, trained, untrained
from tests.planted_models import bent
from tests.subjects import subject_of
from tests.toy_models import PooledLinear
from wsi_gradcam.audit.measurements import estimate
from wsi_gradcam.audit.measures.changes import (
    STEPS,
    FiniteSteps,
    completeness_gap,
    finite_steps,
    hiding_changes,
    infidelity,
    input_gradient,
)
from wsi_gradcam.audit.measures.removal import blurred, mean_colour, replace_by
from wsi_gradcam.audit.measures.subject import Subject, enlarge
from wsi_gradcam.audit.questions.gradients import gradient_predicts
from wsi_gradcam.cam.targets import Target

TUMOUR = Target("tumour", 1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(trained(), methods=("gradcam", "integrated_gradients"))


def test_the_input_gradient_is_autograds(subject: Subject) -> None:
    images = subject.images(patches(5, 0).rgb)
    aim = subject.aim(images, Target("predicted"))
    leaf = images.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(subject.program.module(leaf).amax(dim=1).sum(), leaf)
    torch.testing.assert_close(input_gradient(subject, images, aim), expected)


def test_small_steps_keep_the_promise_and_all_are_really_made(subject: Subject) -> None:
    images = subject.images(patches(6, 1).rgb)
    aim = subject.aim(images, TUMOUR)
    maps, others = subject.maps(images, aim), blurred(images)
    found = finite_steps(subject, images, aim, maps, others, [-1.0, 1e-2])
    np.testing.assert_allclose(found.actual[:, 1], found.promised[:, 1], rtol=0.15, atol=2e-3)
    weight = enlarge(maps, (32, 32)).relu()
    weight = weight / weight.amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)
    without = images + (others - images) * weight[:, None]
    expected = subject.answers(without)[:, 1] - aim.logits[:, 1]
    np.testing.assert_allclose(found.actual[:, 0], expected, atol=1e-4)


def test_two_models_with_equal_maps_and_different_futures_are_told_apart() -> None:
    found, maps = {}, {}
    for story in ("straight", "plateau", "cliff"):
        network, rgb = bent(story)
        subject = subject_of(network)
        images = subject.images(rgb)
        aim = subject.aim(images, TUMOUR)
        maps[story] = subject.maps(images, aim)
        found[story] = finite_steps(subject, images, aim, maps[story], mean_colour(images))
    assert all(float((maps[a] - maps[b]).abs().max()) < 1e-6 for a, b in pairwise(maps))
    assert all(np.array_equal(found["straight"].promised, other.promised) for other in found.values())
    np.testing.assert_allclose(found["straight"].worth, 1, atol=1e-3)
    assert (found["straight"].reach == 1).all()
    forward = found["straight"].steps > 0.1
    assert (np.abs(found["plateau"].actual[:, forward]) < 0.1).all()
    assert (found["cliff"].actual[:, forward] < -0.4).all()
    for story in ("plateau", "cliff"):  # against the map all three are alike
        back = ~forward & (found[story].steps < 0)
        np.testing.assert_allclose(found[story].departure[:, back], 0, atol=1e-3)
    outcomes = {story: gradient_predicts(estimate(steps.worth, range(8))).outcome for story, steps in found.items()}
    assert outcomes == {"straight": "holds", "plateau": "fails", "cliff": "fails"}
    assert (found["plateau"].reach < 1).all()
    assert (found["cliff"].departure.min(axis=1) < found["plateau"].departure.min(axis=1) - 1).all()


def test_worth_and_reach_are_what_they_say() -> None:
    steps = np.array([-1.0, -0.5, 0.5, 1.0])
    promised = np.outer([1.0, 1.0, 1.0, 0.0], steps)
    actual = np.array([[-1, -0.5, 0.5, 1.0], [0, 0, 0, 0], [-0.4, -0.5, 0.5, 1.0], [0, 0, 0, 0]])
    found = FiniteSteps(steps, promised, actual)
    expected = [1, -1, (0.41 - 0.36) / (0.41 + 0.36), np.nan]
    np.testing.assert_allclose(found.worth, expected)
    assert found.reach.tolist() == [1, 0, 0.5, 0]


def test_a_map_without_positive_evidence_makes_no_step(subject: Subject) -> None:
    images = subject.images(patches(2, 0).rgb)
    found = finite_steps(subject, images, subject.aim(images, TUMOUR), -torch.ones(2, 8, 8), mean_colour(images))
    assert not found.promised.any()
    np.testing.assert_allclose(found.actual, 0, atol=1e-5)
    assert found.steps.tolist() == list(STEPS)


@pytest.mark.parametrize("normalise", [False, True])
def test_infidelity_is_captums(subject: Subject, normalise: bool) -> None:
    """In float64 throughout: squares of differences of logits leave four digits of float32."""
    metrics = pytest.importorskip("captum.metrics", reason="captum is an extra")
    images = subject.images(patches(5, 2).rgb)
    maps = subject.maps(images, subject.aim(images, TUMOUR), "integrated_gradients").double()
    exact, images = subject.with_module(copy.deepcopy(subject.program.module).double()), images.double()
    aim = exact.aim(images, TUMOUR)
    masks = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.3
    others = mean_colour(images).expand_as(images)
    promised, actual = hiding_changes(exact, images, aim, maps, masks, replace_by(images, others))
    turns = iter(masks)

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = next(turns)[None, None]
        return hidden.expand_as(inputs).to(inputs), torch.where(hidden, others, inputs)

    expected = metrics.infidelity(
        exact.program.module,
        perturb,
        images,
        (maps[:, None] / 3).expand_as(images),
        target=1,
        n_perturb_samples=4,
        max_examples_per_batch=5,
        normalize=normalise,
    )
    np.testing.assert_allclose(infidelity(promised, actual, normalise), expected, rtol=1e-6)


def test_a_linear_models_map_is_faithful_to_the_last_bit_and_a_random_one_is_not() -> None:
    network = PooledLinear(nn.AvgPool2d(4), 3)
    subject = subject_of(network)
    images = subject.images(patches(4, 3).rgb)
    aim = subject.aim(images, TUMOUR)
    maps = subject.maps(images, aim)
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    for i in range(3):
        masks[i, 8 * i : 8 * i + 8, 4:12] = True
    changes = hiding_changes(subject, images, aim, maps, masks, replace_by(images, torch.zeros(1, 3, 1, 1)))
    assert infidelity(*changes).max() < 1e-10
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0)) * maps.std()
    worse = hiding_changes(subject, images, aim, noise, masks, replace_by(images, torch.zeros(1, 3, 1, 1)))
    assert infidelity(*worse).min() > 1e-8
    assert infidelity(np.zeros((1, 3)), np.ones((1, 3)), normalise=True)[0] == 1


def test_integrated_gradients_are_complete_and_so_is_gradcam_of_a_linear_head(subject: Subject) -> None:
    images = subject.images(patches(6, 4).rgb)
    aim = subject.aim(images, TUMOUR)
    whole = aim.logit(aim.logits)
    zero = aim.logit(subject.answers(torch.zeros_like(images)))
    gap = completeness_gap(subject.maps(images, aim, "integrated_gradients"), whole, zero)
    assert np.abs(gap).max() < 0.05 * float((whole - zero).abs().max())
    network = untrained()
    network.load_state_dict(subject.program.module.state_dict())
    bias = network.fc.bias.detach()[1].expand(6)
    assert np.abs(completeness_gap(subject.maps(images, aim), whole, bias)).max() < 1e-4
