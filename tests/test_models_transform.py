"""Patches become the network's input exactly as torchvision and Pillow would do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.spec import Resizing
from wsi_gradcam.models.transform import RESAMPLING, Transform, make_transform

MEAN, STD = (0.7238, 0.5716, 0.6779), (0.112, 0.1459, 0.1089)


def patches(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Noise with a smooth part, uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, None, :, None]
    return torch.from_numpy((ramp + rng.integers(0, 56, (count, height, width, 3))).astype(np.uint8))


def by_torchvision(rgb: Tensor, resizing: Resizing) -> Tensor:
    """The pipeline of a torchvision script, one PIL image after the other."""
    modes = {mode.value: mode for mode in T.InterpolationMode}
    steps: list[Any] = []
    if resizing.resize is not None:
        size = resizing.resize if isinstance(resizing.resize, int) else list(resizing.resize)
        steps.append(T.Resize(size, interpolation=modes[resizing.interpolation]))
    if resizing.crop is not None:
        steps.append(T.CenterCrop(resizing.crop))
    pipeline = T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])
    return torch.stack([pipeline(Image.fromarray(patch.numpy())) for patch in rgb])


@settings(max_examples=40)
@given(
    patch=st.tuples(st.integers(20, 60), st.integers(20, 60)),
    resize=st.one_of(st.integers(16, 40), st.tuples(st.integers(16, 40), st.integers(16, 40))),
    crop=st.one_of(st.none(), st.integers(1, 16), st.tuples(st.integers(1, 16), st.integers(1, 16))),
    interpolation=st.sampled_from(sorted(RESAMPLING)),
)
def test_resized_patches_are_torchvisions_bit_for_bit(
    patch: tuple[int, int], resize: Any, crop: Any, interpolation: Any
) -> None:
    resizing = Resizing(resize=resize, crop=crop, interpolation=interpolation)
    transform = make_transform(patch, MEAN, STD, resizing=resizing)
    rgb = patches(2, *patch)
    found, expected = transform(rgb), by_torchvision(rgb, resizing)
    assert found.shape[2:] == transform.input_px
    if transform.resize_px is None:  # the sums of patches that go in as they are, which are not torchvision's
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(found, expected)


def test_patches_of_the_right_size_keep_every_bit_they_had() -> None:
    rgb = patches(3, 9, 11)
    transform = make_transform((9, 11), MEAN, STD, resizing=Resizing(resize=(9, 11), crop=(9, 11)))
    assert transform == Transform((9, 11), MEAN, STD)
    mean, std = torch.tensor(MEAN) * 255, torch.tensor(STD) * 255
    assert torch.equal(transform(rgb), ((rgb.float() - mean) / std).permute(0, 3, 1, 2))
    assert transform(rgb).is_contiguous()


@pytest.mark.parametrize("resize", [None, 16])
def test_colours_of_0_to_255_stay_what_they_are(resize: int | None) -> None:
    transform = make_transform((32, 32), (0, 0, 0), (1, 1, 1), 255, Resizing(resize=resize))
    found = transform(patches(2, 32, 32))
    assert torch.equal(found, found.round())
    assert float(found.max()) > 100
    if resize is None:
        assert torch.equal(found, patches(2, 32, 32).permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("resize", [None, 16])
def test_the_scale_is_that_of_white(resize: int | None) -> None:
    white = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    transform = make_transform((32, 32), (1, 0.5, 0), (1, 2, 4), 2.0, Resizing(resize=resize))
    values = [channel.unique().tolist() for channel in transform(white)[0]]
    assert values == [[1.0], [0.75], [0.5]]


def test_the_network_may_see_the_middle_of_a_patch() -> None:
    transform = make_transform((350, 500), MEAN, STD, resizing=Resizing(resize=256, crop=(224, 200)))
    assert transform.resize_px == (256, 365)
    assert transform.input_px == (224, 200)
    y, x, height, width = transform.view
    assert (y, height) == (16 * 350 / 256, 224 * 350 / 256)
    assert (x, width) == pytest.approx((82 * 500 / 365, 200 * 500 / 365))


def test_without_a_crop_the_network_sees_all() -> None:
    assert make_transform((350, 350), MEAN, STD, resizing=Resizing(resize=224)).view == (0, 0, 350, 350)
    assert make_transform((64, 32), MEAN, STD).view == (0, 0, 64, 32)


@pytest.mark.parametrize("crop", [33, (8, 40)])
def test_a_crop_larger_than_the_patch_is_refused(crop: Any) -> None:
    with pytest.raises(ModelError, match=r"does not fit in \(32, 32\) px"):
        make_transform((64, 64), MEAN, STD, resizing=Resizing(resize=32, crop=crop))


def test_patches_of_another_size_are_not_squeezed_silently() -> None:
    transform = make_transform((64, 64), MEAN, STD, resizing=Resizing(resize=32))
    with pytest.raises(ModelError, match=r"patches of \(64, 60\) px were given, expected \(64, 64\)"):
        transform(patches(1, 64, 60))


@pytest.mark.parametrize("crop", [None, 24])
def test_patches_that_readers_have_resized_become_the_same(crop: int | None) -> None:
    rgb = patches(3, 64, 64)
    transform = make_transform((64, 64), MEAN, STD, resizing=Resizing(resize=32, crop=crop, interpolation="bicubic"))
    resized = np.stack([transform.resized(patch) for patch in rgb.numpy()])
    assert resized.shape == (3, 32, 32, 3)
    assert torch.equal(transform(torch.from_numpy(resized)), transform(rgb))


def test_patches_that_need_no_resizing_are_left() -> None:
    patch = patches(1, 64, 64).numpy()[0]
    assert make_transform((64, 64), MEAN, STD).resized(patch) is patch
