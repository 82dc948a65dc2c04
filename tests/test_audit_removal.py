"""Ranks, and what is put in the place of pixels: against plain sums, and against the authors' imputation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wsi_gradcam.audit.measures.removal import (
    BLUR_SIDE_PX,
    blurred,
    mean_colour,
    removal_ranks,
    replace_by,
    replace_by_neighbours,
)
from wsi_gradcam.audit.measures.subject import centre_maps, control_maps, edge_maps, enlarge, random_maps


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ranks_are_those_of_the_enlarged_map() -> None:
    maps = noise(3, 4, 5)
    ranks = removal_ranks(maps, (9, 11), seed=1)
    for map_, rank in zip(enlarge(maps, (9, 11)), ranks, strict=True):
        assert sorted(rank.flatten().tolist()) == list(range(99))
        ordered = map_.flatten()[rank.flatten().argsort()]
        assert bool((ordered[:-1] >= ordered[1:]).all())


def test_ties_are_broken_by_the_seed_alone() -> None:
    maps = torch.zeros(2, 8, 8)
    maps[1, 2, 3] = 1
    first, again, other = (removal_ranks(maps, (8, 8), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[1, 2, 3] == 0
    spread = torch.stack([removal_ranks(maps[:1], (8, 8), seed)[0] for seed in range(200)]).float().mean(dim=0)
    assert float((spread - 31.5).abs().max()) < 6  # nowhere are ties taken first: a mean of 200 strays 1.3


def test_pixels_are_replaced_where_hidden_and_nowhere_else() -> None:
    images, others = noise(3, 3, 6, 7), noise(3, 3, 6, 7, seed=1)
    rows, hidden = torch.tensor([2, 0, 2, 1]), noise(4, 6, 7, seed=2) > 0
    found = replace_by(images, others)(rows, hidden)
    for row, mask, image in zip(rows.tolist(), hidden, found, strict=True):
        assert torch.equal(image[:, mask], others[row][:, mask])
        assert torch.equal(image[:, ~mask], images[row][:, ~mask])
    colour = replace_by(images, mean_colour(images))(rows[:1], torch.ones(1, 6, 7, dtype=torch.bool))
    torch.testing.assert_close(colour[0, :, 3, 3], images[2].mean(dim=(1, 2)))


def test_blur_is_a_gaussian() -> None:
    from scipy.ndimage import correlate1d

    images = noise(2, 3, BLUR_SIDE_PX, BLUR_SIDE_PX + 3)
    kernel = np.exp(-(np.arange(-5, 6) ** 2) / 50)
    kernel /= kernel.sum()
    expected = images.numpy().astype(np.float64)
    for axis in (2, 3):
        expected = correlate1d(expected, kernel, axis=axis, mode="mirror")
    np.testing.assert_allclose(blurred(images), expected, atol=1e-6)
    flat = torch.full((1, 3, 32, 32), 0.3)
    torch.testing.assert_close(blurred(flat), flat)


def test_imputation_commutes_with_normalisation_and_noise_is_as_told() -> None:
    image, hidden = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(1)), noise(1, 40, 40, seed=2) > 0
    std = torch.tensor([0.2, 0.3, 0.5])[:, None, None]
    rows = torch.tensor([0])
    plain = replace_by_neighbours(image)(rows, hidden)
    torch.testing.assert_close(replace_by_neighbours((image - 0.5) / std)(rows, hidden), (plain - 0.5) / std)
    noisy = replace_by_neighbours(image, 0.01 / std)(rows, hidden)
    spread = (noisy - plain)[0, :, hidden[0]].std(dim=1)
    torch.testing.assert_close(spread, 0.01 / std[:, 0, 0], rtol=0.1, atol=0)
    assert torch.equal((noisy - plain)[0, :, ~hidden[0]], torch.zeros(3, int((~hidden).sum())))


def test_controls_know_the_picture_at_most() -> None:
    images = noise(4, 3, 16, 24)
    found = control_maps(images, (4, 6), [7, 8, 9, 10])
    assert tuple(found) == ("random", "edges", "constant", "centre")
    assert all(maps.shape == (4, 4, 6) for maps in found.values())
    assert torch.equal(found["random"][2], random_maps((4, 6), [9])[0])  # whatever the batch
    assert torch.equal(found["constant"], torch.ones(4, 4, 6))
    centre = centre_maps((5, 7))[0]
    assert centre.argmax() == 2 * 7 + 3
    corners = centre[[0, 0, 4, 4], [0, 6, 0, 6]]
    torch.testing.assert_close(corners, centre.min().expand(4))


def test_edges_are_where_colours_change() -> None:
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, :, 8:] = 1
    found = edge_maps(images, (16, 16))[0]
    assert torch.equal(found[:, 7:9], torch.full((16, 2), 0.5))
    assert not found[:, :7].any()
    assert not found[:, 9:].any()
    np.testing.assert_allclose(edge_maps(images, (2, 2))[0], 0.5 / 8, rtol=1e-6)
