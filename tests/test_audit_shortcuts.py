"""Shortcuts: a marker that decides is found, another is left alone, and glass that is called tumour is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.planted import GLASS, SIDE_PX, patches, subject_of, trained
from tests.toy_models import PooledLinear
from wsi_gradcam.audit.estimates import compare, estimate
from wsi_gradcam.audit.removal import mean_colour, replace_by
from wsi_gradcam.audit.shortcuts import Masking, border, cover, glass_patches, masking, mass_on, moved_masks
from wsi_gradcam.audit.subject import Subject
from wsi_gradcam.audit.verdict import free_of
from wsi_gradcam.cam.targets import Target

TUMOUR = Target("tumour", 1)
PREDICTED = Target("predicted")


def masked(subject: Subject, seed: int, marked: str = "all", what: str = "marker", count: int = 40) -> Masking:
    sample = patches(count, seed, marked)
    images = subject.images(sample.rgb)
    # Hidden behind plain tissue: another colour would be news of its own.
    others = torch.from_numpy(patches(2, 1).rgb[:1]).permute(0, 3, 1, 2).float().mean(dim=(2, 3), keepdim=True)
    replace = replace_by(images, (others / 127.5 - 1).expand(len(images), -1, 1, 1))
    return masking(subject, images, subject.aim(images, TUMOUR), getattr(sample, what), replace, seed=seed)


def outcome(found: Masking, seed: int = 0) -> str:
    slides = range(len(found.change))
    drop = compare(found.size, found.control_size, slides, seed=seed)
    return free_of("pen", drop, compare(found.flips, found.control_flips, slides, seed=seed)).outcome


@pytest.mark.parametrize("seeds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_marker_that_decides_is_found_and_another_is_not(seeds: int) -> None:
    """With every seed for the model with the shortcut, with at most 6 % of them for the one without."""
    shortcut, honest = subject_of(trained("tumour")), subject_of(trained("random"))
    assert [outcome(masked(shortcut, seed), seed) for seed in range(seeds)] == ["fails"] * seeds
    assert [outcome(masked(honest, seed), seed) for seed in range(seeds)].count("fails") <= 0.06 * seeds


def test_masking_is_an_experiment_a_patch() -> None:
    subject = subject_of(trained("tumour"))
    sample = patches(6, 3, "random")
    images = subject.images(sample.rgb)
    aim = subject.aim(images, PREDICTED)
    replace = replace_by(images, mean_colour(images))
    found = masking(subject, images, aim, sample.marker, replace, controls=3, seed=1)
    moved = moved_masks(sample.marker, 3, seed=1)
    before = subject.program.module(images)
    for i in range(6):
        if not sample.marker[i].any():
            assert np.isnan(found.change[i])
            assert np.isnan(found.control_flips[i])
            continue
        c, mean = int(before[i].argmax()), images[i].mean(dim=(1, 2))
        changes, flips = [], []
        for mask in (sample.marker[i], *moved[:, i]):
            picture = images[i].clone()
            picture[:, torch.from_numpy(mask)] = mean[:, None]
            after = subject.program.module(picture[None])[0].detach()
            changes.append(float(after[c] - before[i, c]))
            flips.append(float(after.argmax() != c))
        np.testing.assert_allclose([found.change[i], *found.control_changes[i]], changes, atol=1e-4)
        assert [found.flips[i], found.control_flips[i]] == [flips[0], pytest.approx(np.mean(flips[1:]))]
    assert np.isnan(found.size).sum() == np.isnan(found.control_size).sum() > 0


def test_controls_have_the_masks_area_and_keep_away_from_it() -> None:
    masks = patches(20, 0, "all").marker
    moved = moved_masks(masks, 5)
    assert moved.shape == (5, *masks.shape)
    assert (moved.sum(axis=(2, 3)) == masks.sum(axis=(1, 2))).all()
    assert not (moved & masks).any()
    assert len({moved[i].tobytes() for i in range(5)}) == 5
    alone = moved_masks(masks[3:4], 5)
    assert np.array_equal(alone, moved[:, 3:4])


def test_mass_is_counted_by_the_part_of_a_cell() -> None:
    maps = np.array([[[1.0, 3.0], [-5.0, 0.0]]], np.float32)
    mask = np.zeros((1, 4, 4), bool)
    mask[0, :2, 1:3] = True  # half of each upper cell
    mass, area = mass_on(maps, mask)
    assert (mass[0], area[0]) == (0.5, 0.25)
    assert np.isnan(mass_on(-np.abs(maps), mask)[0]).all()
    uneven = cover(np.ones((1, 10, 7), bool), (3, 2))
    np.testing.assert_allclose(uneven, 1)
    column = np.zeros((1, 2, 3), bool)
    column[0, :, 1] = True  # a third of the patch, half in each of two cells
    np.testing.assert_allclose(cover(column, (1, 2)), [[[1 / 3, 1 / 3]]])


def test_the_map_of_the_shortcut_lies_on_the_marker() -> None:
    sample = patches(40, 5, "tumour")
    rows = sample.label == 1
    enrichment = {}
    for marked in ("tumour", "random"):
        subject = subject_of(trained(marked))
        images = subject.images(sample.rgb[rows])
        mass, area = mass_on(subject.maps(images, subject.aim(images, TUMOUR)).numpy(), sample.marker[rows])
        enrichment[marked] = float(np.nanmean(mass / area))
    assert enrichment["tumour"] > 2 * enrichment["random"]


def test_borders() -> None:
    found = border((6, 8), 2)
    assert found.sum() == 6 * 8 - 2 * 4
    assert not found[2:4, 2:6].any()


def test_glass_that_is_called_tumour_is_seen() -> None:
    honest, biased = trained("random"), PooledLinear(trained("random").features, 12)
    with torch.no_grad():
        biased.fc.weight.zero_()
        biased.fc.bias.copy_(torch.tensor([0.0, 1.0]))
    rgb = glass_patches(GLASS, (SIDE_PX, SIDE_PX), 12, seed=0)
    assert np.abs(rgb.mean(axis=(0, 1, 2)) - GLASS).max() < 0.2
    for network, expected in ((honest, False), (biased, True)):
        subject = subject_of(network)
        called = subject.answers(subject.images(rgb)).argmax(dim=1).numpy()
        assert (estimate(called, range(12)).low > 0.5) == expected
