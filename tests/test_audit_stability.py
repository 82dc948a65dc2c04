"""Stability: the changes are what they say; the measure is captum's; stain-sensitive models are told from others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.planted import Rgb, patches, trained
from tests.subjects import subject_of
from wsi_gradcam.audit.measures.changes import (
    CHANGE_FUNCTIONS,
    as_strong_noise,
    jpeg,
    moves,
    noise,
    relative_change,
    shift_change,
    stain_jitter,
)
from wsi_gradcam.audit.measures.subject import Aim, Subject
from wsi_gradcam.cam.targets import Target

TUMOUR = Target("tumour", 1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(trained())


@pytest.mark.parametrize("name", CHANGE_FUNCTIONS)
def test_changes_are_drawn_anew_and_the_same_for_the_same_seed(name: str) -> None:
    patch = patches(2, 0).rgb[1]
    random = np.random.default_rng(1)
    first, second = CHANGE_FUNCTIONS[name](patch, random), CHANGE_FUNCTIONS[name](patch, random)
    assert first.shape == patch.shape
    assert first.dtype == np.uint8
    assert not np.array_equal(first, second)
    assert np.array_equal(CHANGE_FUNCTIONS[name](patch, np.random.default_rng(1)), first)


def test_noise_is_as_strong_as_told() -> None:
    gray = np.full((64, 64, 3), 128, np.uint8)
    assert noise(gray, np.random.default_rng(0), 7.0).std() == pytest.approx(7, rel=0.02)
    control = as_strong_noise(partial(stain_jitter, strength=0.5))
    patch = np.clip(patches(2, 0).rgb[1], 60, 190)
    for seed in range(5):
        strong = (partial(stain_jitter, strength=0.5)(patch, np.random.default_rng(seed)).astype(float) - patch).std()
        moved = control(patch, np.random.default_rng(seed)).astype(float) - patch
        assert (moved**2).mean() ** 0.5 >= 0.9 * strong
        assert abs(moved.mean()) < 0.15 * (moved**2).mean() ** 0.5  # no colour of its own


def test_stains_change_in_proportion_and_not_at_all_without_strength() -> None:
    patch = patches(2, 0).rgb[1]
    assert np.array_equal(stain_jitter(patch, np.random.default_rng(0), 0.0), patch)
    glass = np.full((4, 4, 3), 255, np.uint8)
    assert np.abs(stain_jitter(glass, np.random.default_rng(0)).astype(int) - 255).max() <= 8
    density, moved = (
        -np.log(np.mean(picture[patches(2, 0).disc[1]], axis=0) / 255)
        for picture in (patch, stain_jitter(patch, np.random.default_rng(3)))
    )
    assert 0.7 < np.linalg.norm(moved) / np.linalg.norm(density) < 1.35


def test_jpeg_is_pillows() -> None:
    patch = patches(2, 0).rgb[1]
    found = jpeg(patch, np.random.default_rng(0))
    assert 0 < np.abs(found.astype(int) - patch).mean() < 15


def test_the_largest_change_is_captums_sensitivity(subject: Subject) -> None:
    metrics = pytest.importorskip("captum.metrics", reason="captum is an extra")
    sample = patches(6, 1)
    images = subject.images(sample.rgb)
    aim = subject.aim(images, TUMOUR)
    steps = [torch.from_numpy(np.random.default_rng(i).integers(-9, 9, sample.rgb.shape)) for i in range(3)]
    turns = iter(steps)

    def perturb(inputs: Tensor) -> Tensor:
        return inputs + next(turns).permute(0, 3, 1, 2).float() / 127.5

    expected = metrics.sensitivity_max(
        lambda inputs: (subject.maps(inputs[0] if isinstance(inputs, tuple) else inputs, aim),),
        images,
        perturb,
        n_perturb_samples=3,
        max_examples_per_batch=6,
    )
    before = subject.maps(images, aim)
    changed = [images + step.permute(0, 3, 1, 2).float() / 127.5 for step in steps]
    found = torch.stack([relative_change(before, subject.maps(after, aim)) for after in changed]).amax(dim=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_moves_are_those_of_a_plain_loop(subject: Subject) -> None:
    rgb = patches(6, 2).rgb
    images = subject.images(rgb)
    aim = subject.aim(images, TUMOUR)
    change: Callable[[Rgb, np.random.Generator], Rgb] = partial(noise, levels=60.0)
    found = moves(subject, rgb, aim, change, repeats=4, seeds=range(10, 16))
    for i in range(6):
        random = np.random.default_rng(10 + i)
        before = subject.maps(images[i : i + 1], Aim(TUMOUR, aim.logits[i : i + 1], "softmax"))
        changes, flips, logits = [], [], []
        for _ in range(4):
            after = subject.images(change(rgb[i], random)[None])
            answer = subject.answers(after)
            flips.append(float(answer.argmax() != aim.logits[i].argmax()))
            logits.append(abs(float(answer[0, 1] - aim.logits[i, 1])))
            if not flips[-1]:
                changes.append(float(relative_change(before, subject.maps(after, Aim(TUMOUR, answer, "softmax")))))
        assert found.flips[i] == pytest.approx(np.mean(flips))
        assert found.logit_change[i] == pytest.approx(np.mean(logits), abs=1e-4)
        expected = max(changes, default=np.nan)
        assert found.map_change[i] == pytest.approx(expected, rel=1e-3, nan_ok=True)


def test_a_map_of_zeros_and_a_prediction_that_never_stays_give_no_number(subject: Subject) -> None:
    rgb = patches(2, 3).rgb
    aim = subject.aim(subject.images(rgb), TUMOUR)
    assert bool(relative_change(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)).isnan().all())
    flipped = moves(subject, rgb, aim, lambda patch, random: rgb[1 - int(np.array_equal(patch, rgb[1]))], repeats=2)
    assert np.isnan(flipped.map_change).all()
    assert flipped.flips.tolist() == [1, 1]
    assert np.isfinite(flipped.other_patch).all()


def test_patches_may_be_divided_as_one_likes(subject: Subject) -> None:
    rgb = patches(6, 4).rgb
    found = []
    for parts in ([range(6)], [range(1), range(1, 4), range(4, 6)]):
        some = []
        for part in parts:
            images = subject.images(rgb[part])
            some.append(moves(subject, rgb[part], subject.aim(images, TUMOUR), noise, repeats=2, seeds=part))
        found.append({name: np.concatenate([getattr(one, name) for one in some]) for name in vars(some[0])})
    for name in ("map_change", "logit_change", "flips"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-3, atol=1e-5)
    assert np.isnan(found[1]["other_patch"]).tolist() == [True] + [False] * 5  # alone, it has no other


def test_a_shift_moves_the_map_along(subject: Subject) -> None:
    """Of a whole cell's shift, only borders remain; a map that stays with the patch changes much more."""
    sample = patches(8, 5)
    wide = np.tile(sample.rgb, (1, 2, 2, 1))[:, :40, :40]
    aim = partial(subject.aim, target=TUMOUR)
    none = shift_change(subject, wide, aim, (0, 0))
    whole, part = (shift_change(subject, wide, aim, offset) for offset in ((4, 4), (2, 2)))
    assert not none.any()
    assert (whole < 0.4).all()
    assert (part > 0).all()
    images = subject.images(np.ascontiguousarray(wide[:, :32, :32]))
    maps = subject.maps(images, subject.aim(images, TUMOUR))
    stuck = relative_change(maps, maps.roll((1, 1), dims=(1, 2))).numpy()
    assert whole.mean() < stuck.mean() / 2
