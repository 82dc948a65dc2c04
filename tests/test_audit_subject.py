"""The interface of the audit: it explains as `GradCAM` does, and stays with what was explained at first."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.planted import patches, to_images, untrained
from tests.subjects import subject_of
from wsi_gradcam import GradCAM
from wsi_gradcam.audit.measures.subject import Subject, enlarge
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import ModelError

PREDICTED = Target("predicted")


@pytest.fixture
def subject() -> Subject:
    network = untrained(3)
    with torch.no_grad():  # both classes shall win
        network.fc.bias.sub_(network(to_images(patches(9, 0).rgb)).mean(dim=0))
    return subject_of(network, methods=("gradcam", "guided_backprop"))


def test_it_answers_and_explains_as_gradcam_does(subject: Subject) -> None:
    rgb = patches(9, 0).rgb
    images = subject.images(rgb)
    torch.testing.assert_close(images, to_images(rgb))
    aim = subject.aim(images, PREDICTED)
    found = GradCAM(subject.program.module, "features", ["gradcam", "guided_backprop"])(images)
    assert set(found.logits.argmax(dim=1).tolist()) == {0, 1}
    torch.testing.assert_close(aim.logits, found.logits)
    for method, maps in found.by_method.items():
        torch.testing.assert_close(subject.maps(images, aim, method), maps[:, 0])
    small = Subject(subject.model, subject.program, batch_size=2)
    torch.testing.assert_close(small.maps(images, aim), found.cams[:, 0])
    torch.testing.assert_close(small.answers(images), found.logits)


def test_the_aim_stays_where_the_prediction_changes(subject: Subject) -> None:
    images = subject.images(patches(9, 0).rgb)
    aim = subject.aim(images, PREDICTED)
    flipped = copy.deepcopy(subject.program.module)
    assert isinstance(flipped.fc, nn.Linear)
    with torch.no_grad():
        flipped.fc.weight.neg_()
        flipped.fc.bias.neg_()
    other = subject.with_module(flipped)
    torch.testing.assert_close(other.answers(images), -aim.logits)
    torch.testing.assert_close(other.maps(images, aim), -subject.maps(images, aim))
    torch.testing.assert_close(aim.logit(-aim.logits), -aim.logits.amax(dim=1))
    probability = aim.probability(aim.logits)
    assert probability is not None
    torch.testing.assert_close(probability, aim.logits.softmax(dim=1).amax(dim=1))


def test_finer_cam_is_told_the_class_itself(subject: Subject) -> None:
    images = subject.images(patches(4, 0).rgb)
    aim = subject.aim(images, Target("tumour", 1))
    expected = GradCAM(subject.program.module, "features", "finercam")(images, 1).cams[:, 0]
    torch.testing.assert_close(subject.maps(images, aim, "finercam"), expected)


def test_answers_of_any_shape(subject: Subject) -> None:
    images = subject.images(patches(5, 0).rgb)
    aim = subject.aim(images, Target("tumour-other", 1, 0))
    answers = torch.randn(5, 2, 3, 2)
    torch.testing.assert_close(aim.logit(answers), answers[..., 1] - answers[..., 0])
    assert aim.probability(answers) is None


def test_a_colour_is_what_the_network_sees(subject: Subject) -> None:
    expected = torch.tensor([255, 0, 51])[:, None, None] / 127.5 - 1
    torch.testing.assert_close(subject.colour((255, 0, 51)), expected)


@pytest.mark.parametrize(
    "rgb", [np.zeros((2, 32, 32, 4), np.uint8), np.zeros((2, 32, 32, 3)), np.zeros((0, 32, 32, 3), np.uint8)]
)
def test_what_is_no_patch_is_refused(subject: Subject, rgb: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"expected uint8 \[patches, height, width, 3\]"):
        subject.images(rgb)


def test_maps_are_enlarged_between_cells_and_made_smaller_by_means() -> None:
    maps = torch.arange(16.0).reshape(1, 4, 4)
    assert enlarge(maps, (2, 2)).tolist() == [[[2.5, 4.5], [10.5, 12.5]]]
    assert enlarge(maps, (8, 8))[0, 3, 3] == pytest.approx(maps[0, 1, 1] + 0.25 + 1)
    assert torch.equal(enlarge(maps, (4, 4)), maps)
