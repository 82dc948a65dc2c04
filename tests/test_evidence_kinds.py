"""Kinds of evidence, found in contributions that are made."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_gradcam.evidence.clusters import NO_TISSUE, Choice, find_kinds


def found(glass_share: float, seed: int = 0) -> tuple[Choice, dict[str, np.ndarray]]:
    """Kinds of two morphologies against a target, the first of which the model cannot tell from glass."""
    random, count = np.random.default_rng(seed), 4000
    kind = (random.random(count) < 0.4).astype(int)
    features = np.eye(8)[kind] + 0.1 * random.normal(size=(count, 8))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    shown = ((kind == 0) & (random.random(count) < glass_share / 0.6)).astype(np.int8)
    values, weights = -random.exponential(size=count), np.ones(count)
    choice = find_kinds([(features, values, weights, shown)], seed)
    assert choice is not None
    return choice, {"features": features, "values": values, "shown": shown, "kind": kind}


def test_glass_is_a_kind_of_its_own_even_where_the_model_takes_it_for_tissue() -> None:
    choice, places = found(glass_share=0.3)
    ((bare, what),) = choice.kinds.shows.items()
    assert NO_TISSUE[what - 1] == "bare glass"
    assert choice.kinds.sides == ("against",) * 3
    trial = choice.chosen("against")
    assert trial is not None
    assert trial.kinds == 2  # without glass
    assert choice.is_sure("against")
    sorted_as = choice.kinds.sort(places["features"], places["values"], places["shown"])
    kept, glass = sorted_as >= 0, places["shown"] > 0
    assert (sorted_as[kept & glass] == bare).all()
    assert not (sorted_as[kept & ~glass] == bare).any()
    for kind in (0, 1):
        (own,) = np.unique(sorted_as[kept & ~glass & (places["kind"] == kind)])
        assert own != bare
    shares = [(sorted_as == i).sum() for i in range(3)]
    assert shares == sorted(shares, reverse=True)  # the largest first, as without glass
    assert len(choice.kinds.middles) == 3
    assert min(choice.kinds.middles) > 0


@pytest.mark.parametrize("glass_share", [0.0, 0.005])
def test_hardly_any_glass_is_no_kind(glass_share: float) -> None:
    choice, _ = found(glass_share)
    assert choice.kinds.shows == {}
    assert len(choice.kinds) == 2
