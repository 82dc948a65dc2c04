"""What other tools count otherwise, found in their sources and runs, does not happen here.

Quantus 0.6.0: the mean over the stages of a randomisation holds the untouched model, whose likeness is 1; the pointing
game counts empty masks and constant maps as hits; of ROAD only the first batch is scored; relevance mass divides by a
sum in which negative values cancel positive ones; ties are broken by place
(test_audit_quantus shows its numbers). pytorch-grad-cam scales every map to 0..1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.planted import patches, trained
from tests.subjects import subject_of
from wsi_gradcam.audit.measures.removal import removal_curves, removal_ranks, replace_by_neighbours
from wsi_gradcam.audit.measures.sanity import randomisation
from wsi_gradcam.audit.measures.subject import Subject
from wsi_gradcam.audit.questions.plausibility import pointing_game, relevance_mass, relevance_rank
from wsi_gradcam.cam.targets import Target

TUMOUR = Target("tumour", 1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(trained())


def test_the_untouched_model_is_no_stage(subject: Subject) -> None:
    images = subject.images(patches(4, 0).rgb)
    stages = randomisation(subject, images, subject.aim(images, TUMOUR), stages=99)
    assert [stage.layers for stage in stages] == [("fc",), ("features.2",), ("features.0",)]
    assert all(float(np.nanmax(stage.likeness["spearman"])) < 0.999 for stage in stages)


def test_neither_an_empty_mask_nor_a_constant_map_is_a_hit() -> None:
    maps, masks = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    maps[0, 1, 1] = 1  # with an empty mask
    masks[1, 0, 0] = True  # with a constant map
    assert np.isnan(pointing_game(maps, masks)).all()


def test_road_scores_every_batch(subject: Subject) -> None:
    sample = patches(6, 1)
    images = subject.images(sample.rgb)
    found = {}
    for size in (4, 64):
        small = Subject(subject.model, subject.program, batch_size=size)
        aim = small.aim(images, TUMOUR)
        maps = {"map": small.maps(images, aim)}
        found[size] = removal_curves(small, images, aim, maps, replace_by_neighbours(images), [0.3])["map"].road
    assert np.isfinite(found[4]).all()
    assert len(set(found[4].tolist())) == 6
    np.testing.assert_allclose(found[4], found[64], rtol=1e-4, atol=1e-4)


def test_relevance_mass_is_a_share_also_of_signed_maps() -> None:
    random = np.random.default_rng(0)
    maps, masks = random.normal(0, 1, (200, 4, 4)).astype(np.float32), random.random((200, 4, 4)) < 0.4
    mass = relevance_mass(maps, masks)
    assert ((mass >= 0) & (mass <= 1)).all()
    quotient = (maps * masks).sum(axis=(1, 2)) / maps.sum(axis=(1, 2))
    assert (quotient < 0).any()
    assert (quotient > 1).any()


def test_place_breaks_no_ties() -> None:
    maps, masks = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    maps[:, 2, 2] = 1
    masks[0, 0], masks[1, 3] = True, True  # the first row, the last
    assert relevance_rank(maps, masks).tolist() == pytest.approx([3 / 15, 3 / 15])
    ranks = removal_ranks(torch.from_numpy(maps[:1]), (4, 4), 0)[0].flatten().tolist()
    assert ranks != sorted(ranks)


def test_maps_are_not_scaled_a_patch(subject: Subject) -> None:
    """Twice the evidence is twice the map, of each patch."""
    images = subject.images(patches(4, 2).rgb)
    twice = trained()
    double = subject_of(type(twice)(twice.features, 12))
    network = double.program.module
    network.fc.load_state_dict({name: 2 * value for name, value in twice.fc.state_dict().items()})  # type: ignore[union-attr]
    maps, larger = (one.maps(images, one.aim(images, TUMOUR)) for one in (subject, double))
    torch.testing.assert_close(larger, 2 * maps)
    assert float(maps.amin()) < 0
