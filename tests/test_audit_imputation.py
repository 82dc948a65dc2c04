"""Imputation: it solves its equations, as the authors' own code does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wsi_gradcam.audit.measures.removal import WEIGHTS, impute


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sides_weigh_twice_as_much_as_diagonals_and_all_weigh_one() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert WEIGHTS[0, 1] == WEIGHTS[-1, 0] == pytest.approx(2 * WEIGHTS[1, 1])


def imputed_by_hand(image: Tensor, hidden: Tensor) -> Tensor:
    """Every hidden pixel becomes its neighbours' weighted mean, over and over until nothing moves."""
    filled = image.double().clone()
    filled[:, hidden] = 0
    height, width = hidden.shape
    for _ in range(3000):
        largest = 0.0
        for y, x in hidden.nonzero().tolist():
            near = [
                (w, filled[:, y + dy, x + dx])
                for (dy, dx), w in WEIGHTS.items()
                if 0 <= y + dy < height and 0 <= x + dx < width
            ]
            new = sum(w * v for w, v in near) / sum(w for w, _ in near)
            largest = max(largest, float((new - filled[:, y, x]).abs().max()))
            filled[:, y, x] = new
        if largest < 1e-10:
            break
    return filled


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_imputation_solves_its_equations(share: float) -> None:
    image = noise(1, 3, 6, 7)
    hidden = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) < share
    hidden[0, 0], hidden[3, 3] = True, False
    found = impute(image, hidden[None])[0]
    torch.testing.assert_close(found.double(), imputed_by_hand(image[0], hidden), rtol=0, atol=1e-6)
    assert torch.equal(found[:, ~hidden], image[0][:, ~hidden])


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_imputation_is_that_of_pytorch_grad_cam() -> None:
    road = pytest.importorskip("pytorch_grad_cam.metrics.road", reason="pytorch-grad-cam is an extra")
    image, hidden = noise(3, 20, 17), noise(20, 17, seed=3) > -0.5
    hidden[5, 5] = False
    expected = road.NoisyLinearImputer(noise=0)(image, (~hidden).float())
    found = impute(image[None], hidden[None])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_nothing_to_impute_from_gives_the_mean_colour_and_nothing_hidden_the_image() -> None:
    images = noise(3, 3, 5, 5)
    hidden = torch.zeros(3, 5, 5, dtype=torch.bool)
    hidden[0], hidden[2, 1, 1] = True, True
    before = images.clone()
    found = impute(images, hidden)
    torch.testing.assert_close(found[0], images[0].mean(dim=(1, 2), keepdim=True).expand(3, 5, 5))
    assert torch.equal(found[1], images[1])
    assert (found[2] != images[2]).any(dim=0).sum() == 1
    assert torch.equal(images, before)
