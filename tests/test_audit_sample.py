"""The sample: patches stand for known others, whatever the slides; the same seed draws the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.audit.archive import Candidate, draw_sample
from wsi_gradcam.audit.measures.subject import probability_maps
from wsi_gradcam.audit.plan import BATCH_SIZE, FEWEST_DEEP, AuditSettings, SlideSample, deep_patches, patch_seeds
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.inputs.find import SlideEntry


class FakeSlide:
    """What `draw` asks of a slide's results: a table with some unreadable patches, two classes."""

    classes = ("other", "tumour")
    size_px = (1000, 1000)

    def __init__(self, name: str, patches: int, seed: int = 0, unreadable: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.id = name
        status = np.array(["ok"] * patches, object)
        status[random.permutation(patches)[:unreadable]] = "unreadable"
        self.values: dict[str, Any] = {
            "y": np.arange(patches) * 10,
            "x": np.arange(patches) * 7,
            "status": status,
            "logit_other": np.zeros(patches, np.float32),
            "logit_tumour": random.normal(-1, 1, patches).astype(np.float32),
        }

    def table(self, columns: list[str]) -> pa.Table:
        return pa.table({name: pa.array(self.values[name]) for name in columns})


def candidate(name: str, patches: int, seed: int = 0, unreadable: int = 0, site: str = "") -> Candidate:
    slide = FakeSlide(name, patches, seed, unreadable)
    return Candidate(cast(Any, slide), SlideEntry(name, f"/{name}", site=site), patches)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    patches=st.integers(1, 120),
    seed=st.integers(0, 5),
)
def test_weights_sum_to_what_they_stand_for(sizes: list[int], patches: int, seed: int) -> None:
    candidates = [candidate(f"{i}.svs", size, i) for i, size in enumerate(sizes)]
    samples = draw_sample(candidates, AuditSettings(patches, seed))
    assert samples == draw_sample(candidates[::-1], AuditSettings(patches, seed))
    for name, sample in samples.items():
        size = sizes[int(name.removesuffix(".svs"))]
        assert len(set(sample.patches)) == len(sample.patches) <= size
        assert sum(sample.weights) >= size - 1e-6
        assert 0 <= sample.deep <= sample.batches
        assert all(yx == (10 * i, 7 * i) for i, yx in zip(sample.patches, sample.yx, strict=True))
        assert SlideSample.from_json(sample.to_json()) == sample
    if len(samples) == len(sizes):  # all slides are in: every patch is stood for once
        assert sum(sum(sample.weights) for sample in samples.values()) == pytest.approx(sum(sizes))
    deep = sum(min(sample.deep * BATCH_SIZE, len(sample.patches)) for sample in samples.values())
    wanted = min(deep_patches(patches), sum(len(sample.patches) for sample in samples.values()))
    assert wanted <= deep < wanted + BATCH_SIZE


def test_weighted_shares_are_those_of_the_archive() -> None:
    """A rare class is drawn more often than its share, and weighs less."""
    candidates = [candidate(f"{i}.svs", 400, i) for i in range(30)]
    truth = np.mean([one.slide.table(["logit_tumour"]).column(0).to_numpy() > 0 for one in candidates])
    shares = []
    for seed in range(60):
        samples = draw_sample(candidates, AuditSettings(80, seed)).values()
        weights = np.concatenate([sample.weights for sample in samples])
        rare = np.concatenate([[name == "tumour" for name in sample.strata] for sample in samples])
        shares.append(np.average(rare, weights=weights))
    assert np.mean(shares) == pytest.approx(truth, abs=0.02)


def test_many_slides_are_chosen_from_each_site() -> None:
    candidates = [candidate(f"{i:03d}.svs", 50, i, site="small" if i < 3 else "large") for i in range(200)]
    samples = draw_sample(candidates, AuditSettings(80, 1))
    assert len(samples) <= 80 // BATCH_SIZE + 1
    assert {name < "003.svs" for name in samples} == {True, False}
    assert all(len(sample.patches) >= BATCH_SIZE for sample in samples.values())


def test_unreadable_patches_are_not_drawn() -> None:
    one = candidate("a.svs", 40, unreadable=30)
    (sample,) = draw_sample([one], AuditSettings(40)).values()
    assert len(sample.patches) == 10
    assert draw_sample([candidate("a.svs", 5, unreadable=5)], AuditSettings(40)) == {}


def test_deep_pieces_are_dealt_to_as_many_slides_as_there_are() -> None:
    samples = draw_sample([candidate(f"{i}.svs", 100, i) for i in range(20)], AuditSettings(200))
    assert sorted(sample.deep for sample in samples.values()) == [0] * 14 + [1] * (FEWEST_DEEP // BATCH_SIZE)


def test_a_name_that_no_encoding_knows_is_drawn_from() -> None:
    assert draw_sample([candidate("\udcff.svs", 9)], AuditSettings(4))


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="patches is 0"):
        AuditSettings(patches=0)
    with pytest.raises(ConfigError, match="check the path"):
        AuditSettings(annotations=tmp_path / "none")


def test_seeds_belong_to_patches() -> None:
    seeds = patch_seeds(0, "a", range(50))
    assert len(set(seeds)) == 50
    assert patch_seeds(0, "a", [7]) == [seeds[7]]
    assert not set(seeds) & {*patch_seeds(1, "a", range(50)), *patch_seeds(0, "b", range(50))}


def test_a_map_of_probabilities_alone() -> None:
    """Against a plain loop; constant where all are alike, and rising to where it is likely."""
    places = np.array([(y, x) for y in (0, 10, 20) for x in (0, 10, 20)])
    shares = np.stack([places[:, 1] / 20, 1 - places[:, 1] / 20], axis=1).astype(np.float32)
    found = probability_maps(np.array([(10, 10)]), places, shares, (10.0, 10.0), (2, 3))
    for row in range(2):
        for column in range(3):
            at = np.array([10 + 10 * (row + 0.5) / 2, 10 + 10 * (column + 0.5) / 3])
            weight = np.exp(-((places + 5 - at) ** 2).sum(axis=1) / (2 * 5**2))
            near = (np.abs(places - 10) < 15).all(axis=1)
            expected = (weight[near, None] * shares[near]).sum(axis=0) / weight[near].sum()
            np.testing.assert_allclose(found[0, :, row, column], expected, rtol=1e-5)
    assert (np.diff(found[0, 0], axis=1) > 0).all()
    alike = probability_maps(places, places, np.full((9, 1), 0.25, np.float32), (10.0, 10.0), (4, 4))
    np.testing.assert_allclose(alike, 0.25, rtol=1e-6)
