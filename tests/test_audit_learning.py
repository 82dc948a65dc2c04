"""Learning: the spread of answers is what it says, and pieces of an archive may be joined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.planted import patches, trained
from tests.subjects import subject_of
from wsi_gradcam.audit.measures.sanity import random_answers
from wsi_gradcam.audit.questions.sanity import answer_spread


def test_the_spread_is_the_deviation_of_centred_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (3, 20, 4))
    centred = logits - logits.mean(axis=2, keepdims=True)
    expected = np.sqrt(((centred - centred.mean(axis=1, keepdims=True)) ** 2).mean(axis=1).sum(axis=1))
    np.testing.assert_allclose(answer_spread(logits), expected)
    shifted = logits + np.arange(20)[:, None]  # of all classes: no probability changes
    np.testing.assert_allclose(answer_spread(shifted), expected)
    single = np.array([[1.0], [3.0]])
    assert float(answer_spread(single)) == pytest.approx(1)


def test_random_answers_are_the_same_in_pieces_and_others_for_another_seed() -> None:
    subject = subject_of(trained())
    images = subject.images(patches(6, 0).rgb)
    whole = random_answers(subject, images, draws=3, seed=1)
    parts = torch.cat([random_answers(subject, part, draws=3, seed=1) for part in (images[:1], images[1:])], dim=1)
    assert whole.shape == (3, 6, 2)
    torch.testing.assert_close(parts, whole)
    assert not torch.allclose(random_answers(subject, images, draws=3, seed=2), whole)
    before = subject.answers(images)
    assert float((whole - before).abs().amax(dim=(1, 2)).min()) > 1e-3
