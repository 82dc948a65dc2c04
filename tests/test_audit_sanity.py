"""Parameter randomisation: what becomes random, in which order; and it fails whom it must."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.planted import patches, trained
from tests.subjects import subject_of
from wsi_gradcam.audit.measures.sanity import (
    ORDERS,
    Order,
    complexity_rise,
    layers_in_order,
    randomisation,
    randomise,
    staying_maps,
    stays_or_turns,
)
from wsi_gradcam.audit.measures.subject import Subject, enlarge
from wsi_gradcam.cam.targets import Target

TUMOUR = Target("tumour", 1)


class Disorderly(nn.Module):
    """Runs its layers in another order than it registers them, has a parameter of its own, and a layer for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.gain = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.second(F.relu(self.first(images)))) * self.gain[:, None, None]
        return self.head(maps.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def test_layers_come_in_the_order_in_which_they_run() -> None:
    network = Disorderly().train()
    assert layers_in_order(network, torch.zeros(2, 3, 8, 8)) == ["", "first.0", "first.1", "second", "head"]
    assert network.first[1].training
    assert not any(part._forward_pre_hooks for part in network.modules())


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_random_is_what_was_told(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(Disorderly(), layer="second")
    original = {name: value.clone() for name, value in subject.program.module.state_dict().items()}
    seen: list[set[str]] = []
    plain = Subject.with_module

    def spy(self: Subject, module: nn.Module) -> Subject:
        state = module.state_dict()
        seen.append({name for name, value in state.items() if not torch.equal(value, original[name])})
        return plain(self, module)

    monkeypatch.setattr(Subject, "with_module", spy)
    images = subject.images(patches(2, 0).rgb)
    found = randomisation(subject, images, subject.aim(images, TUMOUR), order=order, stages=99)
    names = ["", "first.0", "first.1", "second", "head"]
    run = names[::-1] if order == "top_down" else names
    assert [stage.layers for stage in found] == [(name,) for name in run]
    assert [stage.random_share for stage in found] == [
        pytest.approx(0.2 if order == "independent" else (i + 1) / 5) for i in range(5)
    ]
    own = {
        "": {"gain"},
        "first.0": {"first.0.weight"},
        "first.1": set(),
        "second": {"second.weight", "second.bias"},
        "head": {"head.weight", "head.bias"},
    }
    for i, changed in enumerate(seen):
        expected = own[run[i]] if order == "independent" else set().union(*(own[name] for name in run[: i + 1]))
        # Vectors are shuffled, which can leave a short one, and one of equal values, as it was.
        assert changed <= expected
        assert {name for name in expected if name.endswith("weight")} <= changed
    state = subject.program.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.items())


def test_stages_share_layers_where_there_are_many() -> None:
    subject = subject_of(Disorderly(), layer="second")
    images = subject.images(patches(2, 0).rgb)
    found = randomisation(subject, images, subject.aim(images, TUMOUR), stages=2)
    assert [stage.layers for stage in found] == [("head", "second", "first.1"), ("first.0", "")]
    assert found[-1].random_share == 1


def test_random_weights_have_the_size_of_the_old_ones_and_vectors_keep_their_values() -> None:
    layer = nn.Linear(300, 200)
    nn.init.normal_(layer.weight, 0.5, 2.0)
    nn.init.uniform_(layer.bias, 0, 1)
    before = layer.bias.detach().clone()
    randomise(layer, 1)
    layer.requires_grad_(False)
    assert float(layer.weight.square().mean().sqrt()) == pytest.approx(4.25**0.5, rel=0.02)
    assert abs(float(layer.weight.mean())) < 0.05
    assert not torch.equal(layer.bias, before)
    assert torch.equal(layer.bias.sort().values, before.sort().values)
    again = nn.Linear(300, 200)
    with torch.no_grad():
        again.weight.copy_(torch.full((200, 300), 4.25**0.5))
    randomise(again, 1)
    torch.testing.assert_close(again.weight, layer.weight, rtol=0.02, atol=0)


def test_entropy_rises_with_complexity() -> None:
    simple = np.zeros((1, 10, 10), np.float32)
    simple[0, 0, :5] = 1  # histogram 95 : 5
    rich = np.arange(100, dtype=np.float32).reshape(1, 10, 10)
    h = -(0.95 * np.log(0.95) + 0.05 * np.log(0.05))
    assert complexity_rise(simple, rich)[0] == pytest.approx((np.log(100) - h) / h)
    assert np.isnan(complexity_rise(np.zeros((1, 10, 10), np.float32), rich)[0])
    assert np.isnan(complexity_rise(rich, np.full((1, 10, 10), np.nan, np.float32))[0])


@pytest.fixture(scope="module")
def trained_deep() -> dict[str, Subject]:
    return {m: subject_of(trained(deep=True), methods=(m,)) for m in ("gradcam", "guided_backprop")}


def test_maps_that_stay_are_told_by_pairs_of_random_networks(trained_deep: dict[str, Subject]) -> None:
    """Which stay depends on the seed, and on no other patch; Grad-CAM's maps cancel out within a pair."""
    images = trained_deep["gradcam"].images(patches(4, 0).rgb)
    for method, subject in trained_deep.items():
        aim = subject.aim(images, TUMOUR)
        found = staying_maps(subject, images, aim, method, draws=3, seed=7)
        alone = staying_maps(subject, images[2:], subject.aim(images[2:], TUMOUR), method, draws=3, seed=7)
        assert np.array_equal(alone, found[:, 2:], equal_nan=True)
        if method == "gradcam":
            assert (np.isnan(found) | (found == 0)).all()  # of a patch that shows nothing the map is constant
            assert np.isfinite(found[:, 1::2]).all()
            continue
        before = subject.maps(images, aim, method)
        for draw, stays in enumerate(found):
            names = layers_in_order(subject.program.module, images)
            network = copy.deepcopy(subject.program.module)
            for name in names:
                randomise(network.get_submodule(name), 7 + 10_000 * draw + names.index(name))
            signs = []
            for _ in range(2):
                after = subject.with_module(network).maps(images, aim, method)
                first, second = (enlarge(maps, (8, 8)).numpy() for maps in (before, after))
                signs.append(stays_or_turns(first, second, 7 + 10_000 * draw))
                network.fc.weight.data *= -1  # type: ignore[operator, union-attr]
            np.testing.assert_array_equal(stays, np.mean(signs, axis=0))


def test_smooth_maps_are_means_over_noise(trained_deep: dict[str, Subject]) -> None:
    """Of a linear network the noise cancels out, and what is left is the map itself."""
    subject = trained_deep["gradcam"]
    images = subject.images(patches(6, 0).rgb)
    aim = subject.aim(images, TUMOUR)
    one, four = (randomisation(subject, images, aim, stages=1, samples=n, seed=5)[0] for n in (1, 4))
    assert not np.allclose(one.likeness["spearman"], four.likeness["spearman"], equal_nan=True)
    again = randomisation(subject, images, aim, stages=1, samples=4, seed=5)[0]
    assert np.array_equal(four.likeness["spearman"], again.likeness["spearman"], equal_nan=True)
    half = [
        randomisation(subject, part, aim_, stages=1, samples=4, seed=5)[0].likeness["spearman"]
        for part, aim_ in ((images[:3], subject.aim(images[:3], TUMOUR)), (images[3:], subject.aim(images[3:], TUMOUR)))
    ]
    np.testing.assert_allclose(np.concatenate(half), four.likeness["spearman"], atol=0.02)


def test_a_map_of_one_value_but_for_rounding_has_no_complexity() -> None:
    """Its range cannot be divided into bins, which must not end an audit."""
    varied = np.random.default_rng(0).random((1, 8, 8)).astype(np.float32)
    flat = np.ones((1, 8, 8), np.float32)
    flat[0, 0, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert complexity_rise(varied, flat).tolist() == [-1.0]
