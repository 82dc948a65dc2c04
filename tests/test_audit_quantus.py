"""Quantus: where it is right, the audit's definitions give its numbers; where it is not, its numbers are what docs say.

That the audit does not share its defects is shown without Quantus in test_audit_known_defects. Quantus asks for
opencv-python, which writes over the opencv-python-headless of pytorch-grad-cam: `make venv` installs it without that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.planted import TRAINING, Patches, features, fitted, patches, trained
from tests.subjects import subject_of
from tests.toy_models import PooledLinear
from wsi_gradcam.audit.measures.changes import (
    completeness_gap,
    hiding_changes,
    infidelity,
    input_gradient,
    relative_change,
)
from wsi_gradcam.audit.measures.removal import impute, removal_curves, replace_by, replace_by_neighbours
from wsi_gradcam.audit.measures.sanity import complexity_rise, spearman, ssim
from wsi_gradcam.audit.measures.subject import Aim, Subject, enlarge
from wsi_gradcam.audit.questions.plausibility import auroc, pointing_game, relevance_mass, relevance_rank
from wsi_gradcam.cam.targets import Target

quantus = pytest.importorskip("quantus", reason="Quantus is installed by `make venv`; no extra can ask for it")

TUMOUR, CONTRAST = Target("tumour", 1), Target("tumour-other", 1, 0)
SIDE, CELL_PX = 24, 4  # whole pixels of three colours divide 24 x 24, as its pixel flipping asks for
SEEDS = range(3)
Numbers = NDArray[np.float64]
Maps = NDArray[np.float32]
Masks = NDArray[np.bool_]
close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


class Exact(PooledLinear):
    """A network in float64: squares and differences of logits leave four digits of float32."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.double())


class Gray(PooledLinear):
    """A network of pictures with one channel."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.expand(-1, 3, -1, -1))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(trained())


@pytest.fixture(scope="module")
def exact(subject: Subject) -> Subject:
    network = Exact(features(), 12)
    network.load_state_dict(subject.program.module.state_dict())
    return subject.with_module(network.double().eval())


def asked(name: str, *, abs: bool = False, normalise: bool = False, **settings: Any) -> Any:
    """A metric of Quantus that takes maps as they are."""
    return getattr(quantus, name)(abs=abs, normalise=normalise, disable_warnings=True, **settings)


def located(name: str, maps: Maps, masks: Masks, **settings: Any) -> Numbers:
    """What a metric of Quantus that asks no model says of maps and masks [P, h, w]."""
    wide = maps[:, None].astype(np.float64)
    found = asked(name, **settings)(None, np.zeros_like(wide), np.zeros(len(maps)), wide, masks[:, None], True)
    return np.asarray(found, np.float64)


def scored(metric: Any, module: nn.Module, images: Tensor, maps: Numbers | Maps, **given: Any) -> Any:
    """What a metric of Quantus says of maps [P, C, H, W] of class 1."""
    labels = given.pop("y_batch", np.ones(len(images), int))
    return metric(module, images.numpy(), labels, maps, channel_first=True, device="cpu", **given)


def maps_and_masks(seed: int, count: int = 40, side: int = 16) -> tuple[Maps, Masks]:
    """Signed maps without ties, and rectangles."""
    random = np.random.default_rng(seed)
    masks = np.zeros((count, side, side), bool)
    for mask in masks:
        (y, x), (height, width) = random.integers(0, side // 2, 2), random.integers(1, side // 2, 2)
        mask[y : y + height, x : x + width] = True
    return random.normal(0, 1, masks.shape).astype(np.float32), masks


def colour_images(exact: Subject, seed: int, count: int = 4) -> Tensor:
    return exact.images(patches(count, seed).rgb)[:, :, :SIDE, :SIDE].contiguous()


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_colours(maps: Tensor) -> Maps:
    """Maps [P, h, w] for each colour [P, 3, h, w]."""
    return np.ascontiguousarray(maps[:, None].expand(-1, 3, -1, -1).numpy())


# What agrees.


@pytest.mark.parametrize("seed", SEEDS)
def test_pointing_game_rank_and_auroc_are_the_same(seed: int) -> None:
    maps, masks = maps_and_masks(seed)
    close(pointing_game(maps, masks), located("PointingGame", maps, masks))
    close(relevance_rank(maps, masks), located("RelevanceRankAccuracy", maps, masks))
    close(auroc(maps, masks), located("AUC", maps, masks))
    tied = maps.round(1)
    close(auroc(tied, masks), located("AUC", tied, masks))


@pytest.mark.parametrize("seed", SEEDS)
def test_top_k_intersection_is_the_pointing_game_of_one_cell_and_the_rank_of_as_many_as_the_mask_has(seed: int) -> None:
    maps, masks = maps_and_masks(seed)
    masks[:] = masks[0]
    close(pointing_game(maps, masks), located("TopKIntersection", maps, masks, k=1))
    close(relevance_rank(maps, masks), located("TopKIntersection", maps, masks, k=int(masks[0].sum())))


@pytest.mark.parametrize("seed", SEEDS)
def test_relevance_mass_is_the_same_where_nothing_is_negative_or_is_left_out(seed: int) -> None:
    maps, masks = maps_and_masks(seed)
    close(relevance_mass(abs(maps), masks), located("RelevanceMassAccuracy", abs(maps), masks))
    positive = located("AttributionLocalisation", maps, masks, positive_attributions=True)
    close(relevance_mass(maps, masks), positive)


@pytest.mark.parametrize("seed", SEEDS)
def test_deletion_is_pixel_flipping(exact: Subject, seed: int) -> None:
    images, maps = colour_images(exact, seed), noise(4, SIDE, SIDE, seed=seed)
    aim, replace = exact.aim(images, TUMOUR), replace_by(images, torch.zeros(1, 3, 1, 1))
    found = removal_curves(exact, images, aim, {"map": maps}, replace, torch.linspace(0, 1, 37).tolist())["map"]
    flipping = asked("PixelFlipping", features_in_step=3 * SIDE * SIDE // 36, perturb_baseline=0.0)
    assert found.deletion_probability is not None
    for softmax, curve in ((False, found.deletion), (True, found.deletion_probability)):
        close(curve[:, 1:], scored(flipping, exact.program.module, images, in_colours(maps), softmax=softmax))


@pytest.mark.parametrize("seed", SEEDS)
def test_deletion_and_insertion_are_region_perturbation_from_both_ends(exact: Subject, seed: int) -> None:
    images, cells = colour_images(exact, seed), noise(4, SIDE // CELL_PX, SIDE // CELL_PX, seed=seed)
    maps = cells.repeat_interleave(CELL_PX, dim=1).repeat_interleave(CELL_PX, dim=2)
    aim, replace = exact.aim(images, TUMOUR), replace_by(images, torch.zeros(1, 3, 1, 1))
    found = removal_curves(exact, images, aim, {"map": maps}, replace, torch.linspace(0, 1, 37).tolist())["map"]
    whole = found.deletion[:, :1]
    for order, curve in (("morf", found.deletion[:, 1:]), ("lerf", found.insertion[:, ::-1][:, 1:])):
        metric = asked("RegionPerturbation", patch_size=CELL_PX, order=order, perturb_baseline=0.0)
        close(whole - curve, scored(metric, exact.program.module, images, in_colours(maps), softmax=False))


@pytest.mark.parametrize("seed", SEEDS)
def test_imputation_is_the_same(seed: int) -> None:
    image = noise(3, 20, 17, seed=seed).double()
    hidden = torch.rand(20, 17, generator=torch.Generator().manual_seed(seed)) < (0.2, 0.6, 0.9)[seed]
    expected = quantus.noisy_linear_imputation(image.numpy(), np.flatnonzero(hidden.numpy()), noise=0)
    close(impute(image[None], hidden[None])[0], expected)


@pytest.fixture(scope="module")
def gray(subject: Subject) -> Subject:
    """Its ROAD takes pictures of one channel alone."""
    torch.manual_seed(0)
    sample = patches(256, TRAINING)
    images = subject.images(sample.rgb).mean(dim=1, keepdim=True)
    return subject.with_module(fitted(Gray(features(), 12), images, torch.from_numpy(sample.label), seed=0))


def gray_maps(gray: Subject, sample: Patches) -> tuple[Tensor, Tensor]:
    """Pictures of one channel, and their maps [P, 32, 32] with a little noise: without ties."""
    images = gray.images(sample.rgb).mean(dim=1, keepdim=True)
    maps = enlarge(gray.maps(images, gray.aim(images, CONTRAST)), (32, 32))
    return images, maps + 1e-3 * maps.std() * noise(*maps.shape, seed=0)


def road(subject: Subject, images: Tensor, maps: Tensor, labels: NDArray[np.int64], batch_size: int) -> list[float]:
    """Its accuracies with 3, 5, 6 and 50 % imputed, most relevant first."""
    metric = asked("ROAD", noise=0.0, percentages=[3, 5, 6, 50])
    given = {"y_batch": labels, "batch_size": batch_size}
    found = scored(metric, subject.program.module, images, maps[:, None].numpy(), **given)
    return list(found.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_road_of_one_batch_is_the_same(gray: Subject, seed: int) -> None:
    sample = patches(24, seed)
    images, maps = gray_maps(gray, sample)
    aim, fractions = gray.aim(images, CONTRAST), [0.03, 0.05, 0.06, 0.5]
    found = removal_curves(gray, images, aim, {"map": maps}, replace_by_neighbours(images), fractions)["map"]
    right = (found.deletion > 0) == (sample.label == 1)[:, None]
    expected = road(gray, images, maps, sample.label, 24)
    close(right.mean(axis=0), expected)
    assert len(set(expected)) > 1


def blocks() -> Tensor:
    """Masks of the 3 x 3 squares of 8 px, row by row, bool [9, SIDE, SIDE]."""
    places = torch.arange(9).reshape(3, 3).repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
    return torch.stack([places == i for i in range(9)])


@pytest.mark.parametrize("seed", SEEDS)
def test_infidelity_is_the_same_of_the_same_squares(exact: Subject, seed: int) -> None:
    """Its squares stay hidden: each perturbation holds those before it."""
    images = colour_images(exact, seed)
    aim = exact.aim(images, TUMOUR)
    gradient = input_gradient(exact, images, aim).double()
    metric = asked("Infidelity", perturb_patch_sizes=[8], n_perturb_samples=1, perturb_baseline=0.0)
    expected = np.array(scored(metric, exact.program.module, images, gradient.numpy()))
    replace, contribution = replace_by(images, torch.zeros(1, 3, 1, 1)), (gradient * images).sum(dim=1)
    more, one = (
        infidelity(*hiding_changes(exact, images, aim, contribution, masks, replace))
        for masks in (blocks().cumsum(dim=0) > 0, blocks())
    )
    close(more, expected)
    assert (abs(one / expected - 1) > 0.1).all()


def explained(subject: Subject, aim: Aim, module: nn.Module, images: Any) -> Maps:
    """Maps [P, 32, 32] of another network of the subject's build, less their mean.

    Quantus takes maps of a picture's size, and none that are negative throughout.
    """
    maps = enlarge(subject.with_module(module.eval()).maps(torch.as_tensor(images).float(), aim), (32, 32))
    return (maps - maps.mean(dim=(1, 2), keepdim=True)).numpy()


def explaining(subject: Subject, aim: Aim) -> Any:
    def explain(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> Maps:
        return explained(subject, aim, model, inputs)[:, None]

    return explain


@pytest.mark.parametrize("seed", SEEDS)
def test_max_sensitivity_is_the_largest_relative_change(subject: Subject, seed: int) -> None:
    images = subject.images(patches(6, seed).rgb)
    aim = subject.aim(images, TUMOUR)
    steps = [noise(*images.shape, seed=10 * seed + i) / 10 for i in range(3)]
    turns = iter(steps)

    def perturb(arr: Any, **_: Any) -> Any:
        return arr + next(turns).reshape(arr.shape).numpy()

    before = explained(subject, aim, subject.program.module, images)
    metric = asked("MaxSensitivity", nr_samples=3, perturb_func=perturb)
    expected = scored(
        metric, subject.program.module, images, before[:, None], explain_func=explaining(subject, aim), batch_size=6
    )
    after = [torch.from_numpy(explained(subject, aim, subject.program.module, images + step)) for step in steps]
    close(torch.stack([relative_change(torch.from_numpy(before), each) for each in after]).amax(dim=0), expected)


@pytest.fixture(params=SEEDS)
def randomised(subject: Subject, request: pytest.FixtureRequest) -> Iterator[tuple[Any, Maps, dict[str, Maps]]]:
    """Asks a test of randomisation by Quantus; the maps before, and those of its random networks by their layer."""
    module, seed = subject.program.module, int(request.param)
    images = subject.images(patches(8, seed).rgb)
    aim = subject.aim(images, TUMOUR)
    before = explained(subject, aim, module, images)

    def ask(name: str, **settings: Any) -> Any:
        metric = asked(name, layer_order="bottom_up", seed=seed, **settings)
        return scored(metric, module, images, before[:, None], explain_func=explaining(subject, aim))

    with torch.random.fork_rng():
        networks = quantus.helpers.model.pytorch_model.PyTorchModel(module, channel_first=True)
        made = networks.get_random_layer_generator("bottom_up", seed)
        yield ask, before, {name: explained(subject, aim, network, images) for name, network in made}


Randomised = tuple[Any, Maps, dict[str, Maps]]


def test_likeness_to_its_random_networks_is_the_same_and_its_mean_counts_the_untouched_one(
    randomised: Randomised,
) -> None:
    ask, before, after = randomised
    stages = ask("MPRT")
    assert list(stages) == ["original", *after]
    for name, maps in after.items():
        close(spearman(before, maps), stages[name])
    close(stages["original"], 1)
    ours = np.mean([spearman(before, maps) for maps in after.values()], axis=0)
    close((1 + len(after) * ours) / (1 + len(after)), ask("MPRT", return_average_correlation=True))


def test_ssim_is_the_same_at_the_same_range(randomised: Randomised) -> None:
    """It takes as the range what the two maps span, ours is 2: of -1 to 1. Maps that reach both ends have both."""
    _, before, after = randomised
    for maps in after.values():
        pair = [each / abs(each).max(axis=(1, 2), keepdims=True) for each in (before, maps)]
        pair[0][:, 0, 0], pair[1][:, -1, -1] = -1, 1
        close(ssim(*pair), quantus.similarity_func.ssim(*pair, batched=True, win_size=3))


def test_the_rise_of_complexity_is_the_same(randomised: Randomised) -> None:
    ask, before, after = randomised
    expected = ask("EfficientMPRT", complexity_func_kwargs={"n_bins": 100})
    close(complexity_rise(before, list(after.values())[-1]), expected)


# What does not, and why.


def test_it_counts_empty_masks_and_constant_maps_as_hits() -> None:
    maps, masks = maps_and_masks(0, 3)
    maps[0], masks[1] = 0, False
    assert located("PointingGame", maps, masks)[:2].tolist() == [1, 1]
    assert np.isnan(pointing_game(maps, masks)).tolist() == [True, True, False]


def test_one_of_several_highest_cells_is_a_whole_hit_to_it() -> None:
    maps, masks = np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), bool)
    maps[0, 0], masks[0, 0, 0] = 1, True
    assert located("PointingGame", maps, masks).tolist() == [1]
    assert pointing_game(maps, masks).tolist() == [0.25]


def test_its_rank_hangs_on_the_order_in_which_ties_are_stored() -> None:
    maps, masks = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    maps[:, 2, 2] = 1
    masks[0, 0], masks[1, 3] = True, True
    first, last = located("RelevanceRankAccuracy", maps, masks)
    assert abs(first - last) > 0.2
    assert relevance_rank(maps, masks).tolist() == pytest.approx([3 / 15, 3 / 15])


def test_its_relevance_mass_is_no_share_where_relevance_is_negative() -> None:
    maps, masks = maps_and_masks(0, 200)
    theirs = located("RelevanceMassAccuracy", maps, masks)
    assert (theirs < 0).any()
    assert (theirs > 1).any()
    assert ((relevance_mass(maps, masks) >= 0) & (relevance_mass(maps, masks) <= 1)).all()


def test_its_road_scores_the_first_batch_alone(gray: Subject) -> None:
    sample = patches(24, 1)
    ordered = np.argsort(-sample.label, kind="stable")  # the tumours first: a batch is not like the other
    images, maps = (each[ordered] for each in gray_maps(gray, sample))
    labels = sample.label[ordered]
    every, first, halves = (
        road(gray, images[:count], maps[:count], labels[:count], size) for count, size in ((24, 24), (12, 12), (24, 12))
    )
    assert halves == first
    assert halves != every


def test_its_road_takes_no_colour(subject: Subject) -> None:
    images = subject.images(patches(2, 0).rgb)
    for maps in (noise(2, 1, 32, 32, seed=0), noise(2, 3, 32, 32, seed=0)):
        with pytest.raises(IndexError):
            scored(asked("ROAD", percentages=[50]), subject.program.module, images, maps.numpy())


def test_its_completeness_asks_floats_to_be_equal() -> None:
    subject = subject_of(PooledLinear(nn.AvgPool2d(4), 3))
    images = subject.images(patches(40, 0).rgb)
    aim = subject.aim(images, TUMOUR)
    maps = input_gradient(subject, images, aim) * images  # complete, as the network is linear
    zero = aim.logit(subject.answers(torch.zeros_like(images)))
    assert abs(completeness_gap(maps.sum(dim=1), aim.logit(aim.logits), zero)).max() < 1e-6
    theirs = scored(asked("Completeness", perturb_baseline=0.0), subject.program.module, images, maps.numpy())
    assert not all(theirs)
