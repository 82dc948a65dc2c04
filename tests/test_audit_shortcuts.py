"""Shortcuts: a marker that decides is found, another is left alone, and glass that is called tumour is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.planted import GLASS, SIDE_PX, patches, trained
from tests.subjects import subject_of
from wsi_gradcam.audit.measures.removal import mean_colour, replace_by
from wsi_gradcam.audit.measures.shortcuts import border, cover, glass_patches, masking, mass_on, moved_masks
from wsi_gradcam.cam.targets import Target

TUMOUR = Target("tumour", 1)
PREDICTED = Target("predicted")


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


def test_controls_are_whole_where_they_can_be() -> None:
    masks = np.zeros((3, 20, 30), bool)
    masks[0, 2:9, 20:30] = True
    masks[1] = border((20, 30), 2)
    for mask in moved_masks(masks, 20)[:, 0]:
        assert [int(np.ptp(places)) for places in np.nonzero(mask)] == [6, 9]
    round_it = moved_masks(masks, 20)[:, 1]
    assert (round_it.sum(axis=(1, 2)) == masks[1].sum()).all()
    assert ((round_it & masks[1]).sum(axis=(1, 2)) < masks[1].sum() / 2).all()
    assert not moved_masks(masks, 2)[:, 2].any()


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


def test_glass_has_its_colour_and_a_scanners_grain() -> None:
    rgb = glass_patches(GLASS, (SIDE_PX, SIDE_PX), 12, seed=0)
    assert np.abs(rgb.mean(axis=(0, 1, 2)) - GLASS).max() < 0.2
    assert rgb.std() == pytest.approx(2, rel=0.1)
    assert not np.array_equal(rgb[0], rgb[1])
