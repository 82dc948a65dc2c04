"""Deletion and insertion: against plain loops and torch-cam; they tell planted truths from controls."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.planted import Patches, patches, trained, untrained
from tests.subjects import subject_of
from wsi_gradcam.audit.measures.removal import (
    STEPS,
    Curves,
    blurred,
    mean_colour,
    mean_height,
    removal_curves,
    removal_ranks,
    replace_by,
    replace_by_neighbours,
    slide_removal,
)
from wsi_gradcam.audit.measures.subject import Aim, Subject, control_maps
from wsi_gradcam.audit.schema import CONTROLS, PROBABILITY
from wsi_gradcam.cam.targets import Target

TUMOUR = Target("tumour", 1)
PREDICTED = Target("predicted")
MADE = tuple(name for name in CONTROLS if name != PROBABILITY)
FRACTIONS = [i / STEPS for i in range(STEPS + 1)]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(trained())


def curves_of(subject: Subject, sample: Patches, target: Any = TUMOUR, **maps: Tensor) -> dict[str, Curves]:
    images = subject.images(sample.rgb)
    aim = subject.aim(images, target)
    if not maps:
        maps = {"gradcam": subject.maps(images, aim)} | control_maps(images, (8, 8), range(len(images)))
    return removal_curves(subject, images, aim, maps, replace_by(images, mean_colour(images)))


@pytest.mark.parametrize("target", [TUMOUR, PREDICTED, Target("tumour-other", 1, 0), lambda logits: logits.sum(dim=1)])
def test_curves_are_those_of_a_plain_loop(subject: Subject, target: Any) -> None:
    images = subject.images(patches(5, 1).rgb)
    aim = subject.aim(images, target)
    maps = subject.maps(images, aim)
    others = blurred(images)
    fractions = [0.0, 0.1, 0.35, 1.0]
    found = removal_curves(subject, images, aim, {"map": maps}, replace_by(images, others), fractions, seed=3)["map"]
    ranks = removal_ranks(maps, (32, 32), 3)
    with torch.no_grad():
        before = subject.program.module(images)
        for i in range(5):
            for j, count in enumerate([0, 102, 358, 1024]):
                gone = (ranks[i] < count)[None]
                pictures = torch.stack(
                    [torch.where(gone, others[i], images[i]), torch.where(gone, images[i], others[i])]
                )
                answers = subject.program.module(pictures)
                rows = slice(i, i + 1)
                expected = [float(Aim(target, before[rows], "softmax").logit(a[None])[0]) for a in answers]
                got = [float(found.deletion[i, j]), float(found.insertion[i, j])]
                np.testing.assert_allclose(got, expected, atol=2e-5)
                if found.deletion_probability is not None and found.insertion_probability is not None:
                    c = 1 if target is TUMOUR else int(before[i].argmax())
                    shares = answers.softmax(dim=1)[:, c]
                    np.testing.assert_allclose(found.deletion_probability[i, j], shares[0], atol=1e-5)
                    np.testing.assert_allclose(found.insertion_probability[i, j], shares[1], atol=1e-5)
    assert (found.deletion_probability is None) == (target not in (TUMOUR, PREDICTED))
    at = [0, 102 / 1024, 358 / 1024, 1]
    np.testing.assert_allclose(mean_height(found.deletion, at), np.trapezoid(found.deletion, at), atol=1e-5)


class Preset:
    """Gives maps that are there already, as torch-cam's metrics ask for them."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, class_idx: Any, scores: Tensor) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, maps: list[Tensor]) -> Tensor:
        return maps[0]

    def _hooks_off(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


def test_areas_are_those_of_torchcam() -> None:
    torchcam = pytest.importorskip("torchcam.metrics", reason="torch-cam is an extra")
    subject = subject_of(trained())
    images = subject.images(patches(6, 2).rgb)
    maps = torch.randn(6, 32, 32, generator=torch.Generator().manual_seed(0))  # no ties, which it breaks by place
    metric = torchcam.DeletionInsertionMetric(
        Preset(subject.program.module, maps), lambda logits: logits.softmax(dim=1), steps=32
    )
    metric.update(images, class_idx=1)
    expected = metric.summary()
    aim, replace = subject.aim(images, TUMOUR), replace_by(images, torch.zeros(1, 3, 1, 1))
    fractions = [i / 32 for i in range(33)]
    found = removal_curves(subject, images, aim, {"map": maps}, replace, fractions)["map"]
    assert found.deletion_probability is not None
    assert found.insertion_probability is not None
    for name, curve in (("deletion_auc", found.deletion_probability), ("insertion_auc", found.insertion_probability)):
        np.testing.assert_allclose(mean_height(curve, fractions).mean(), expected[name], atol=1e-6)


class Counting(nn.Module):
    """Counts the images that it is asked about."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return self.network(images)  # type: ignore[no-any-return]


def test_no_picture_is_asked_about_twice() -> None:
    subject = subject_of(Counting(untrained()), layer="network.features")
    module = subject.program.module
    assert isinstance(module, Counting)
    images = subject.images(patches(7, 3).rgb)
    aim = subject.aim(images, TUMOUR)
    maps = control_maps(images, (8, 8), range(7))
    module.images = 0
    removal_curves(subject, images, aim, maps, replace_by(images, blurred(images)))
    assert module.images == 7 * (len(MADE) * 2 * (STEPS - 1) + 1)


def test_a_batch_changes_nothing_and_a_broken_map_is_told(subject: Subject) -> None:
    sample = patches(6, 4)
    images = subject.images(sample.rgb)
    aim = subject.aim(images, TUMOUR)
    maps = subject.maps(images, aim)
    maps[2, 0, 0] = torch.nan
    found = curves_of(subject, sample, gradcam=maps)["gradcam"]
    alone = curves_of(subject, Patches(sample.rgb[3:], sample.label[3:], sample.disc[3:], sample.marker[3:]))["gradcam"]
    np.testing.assert_allclose(found.score(FRACTIONS)[3:], alone.score(FRACTIONS), rtol=0, atol=1e-4)
    assert np.isfinite(found.score(FRACTIONS)).tolist() == [True, True, False, True, True, True]


def test_a_map_scores_above_every_control_and_its_opposite_below(subject: Subject) -> None:
    sample = patches(24, 5)
    images = subject.images(sample.rgb)
    aim = subject.aim(images, TUMOUR)
    maps = subject.maps(images, aim)
    found = curves_of(subject, sample, right=maps, wrong=-maps, **control_maps(images, (8, 8), range(24)))
    scores = {name: curves.score(FRACTIONS) for name, curves in found.items()}
    for name in MADE:
        assert float((scores["right"] - scores[name]).mean()) > 0.1
        assert float((scores["wrong"] - scores[name]).mean()) < -0.1
    np.testing.assert_allclose(scores["right"], -scores["wrong"], rtol=0.2, atol=0.2)


def test_road_tells_them_apart_too(subject: Subject) -> None:
    sample = patches(8, 6)
    images = subject.images(sample.rgb)
    aim = subject.aim(images, TUMOUR)
    maps = {"right": subject.maps(images, aim)} | control_maps(images, (8, 8), range(8))
    replace = replace_by_neighbours(images, 0.01 / 0.5)
    found = removal_curves(subject, images, aim, maps, replace, [i / 10 for i in range(1, 10)])
    assert found["right"].deletion.shape == (8, 9)
    tumour = sample.label == 1
    assert all(float((found["right"].road - found[name].road)[tumour].mean()) > 0.1 for name in MADE)


def test_road_is_half_of_least_less_most_relevant_first() -> None:
    curves = Curves(np.array([[3.0, 1.0, 0.0]]), np.array([[1.0, 2.0, 4.0]]))
    assert float(curves.road[0]) == pytest.approx((7 - 4) / 3 / 2)
    assert float(mean_height(curves.deletion, [0.25, 0.5, 0.75])[0]) == pytest.approx((2 + 0.5) / 2)


def top_mean(scores: Any, count: int) -> float:
    return float(np.sort(scores)[-count:].mean())


def test_a_slides_score_falls_fastest_where_what_it_hangs_on_goes_first() -> None:
    random = np.random.default_rng(0)
    scores = random.random(400).astype(np.float32)
    fractions = np.linspace(0, 0.9, 10)
    found = slide_removal(scores, scores, partial(top_mean, count=20), fractions)
    assert (found["most"][1:] < found["random"][1:]).all()
    np.testing.assert_allclose(found["least"], found["least"][0])
    np.testing.assert_allclose(found["most"], [top_mean(np.sort(scores)[: 400 - 40 * i], 20) for i in range(10)])
    blind = slide_removal(np.zeros(400, np.float32), scores, partial(top_mean, count=20), fractions, 200)
    np.testing.assert_allclose(blind["most"], blind["random"], atol=0.15)
    again = slide_removal(np.zeros(400, np.float32), scores, partial(top_mean, count=20), fractions, 200)
    assert all(np.array_equal(blind[name], again[name]) for name in blind)
