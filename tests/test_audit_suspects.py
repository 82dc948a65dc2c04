"""Suspects: each is found where it was put into real tissue, and hardly anywhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from wsi_gradcam.audit.measures.shortcuts import block_means, blurred_windows, spread_out, suspects

Rgb = NDArray[np.uint8]
SIDE = 224
INKS = {"blue": (0.12, 0.2, 0.6), "green": (0.1, 0.5, 0.3), "black": (0.08, 0.08, 0.09)}
"""What a stroke lets pass of red, green and blue."""


def tiles(shared_data: Path, folder: str, pattern: str, every: int = 1) -> Rgb:
    """Patches of 224 px, uint8 [n, 224, 224, 3], of real tissue."""
    found = []
    for path in sorted((shared_data / "tiles" / folder).rglob(pattern))[::every]:
        rgb = np.asarray(Image.open(path).convert("RGB"))
        rows, columns = (range(0, size - SIDE + 1, SIDE) for size in rgb.shape[:2])
        found += [rgb[y : y + SIDE, x : x + SIDE] for y in rows for x in columns]
    return np.stack(found)


@pytest.fixture(scope="module")
def tissue(shared_data: Path) -> Rgb:
    return np.concatenate(
        [
            tiles(shared_data, "osteosarcoma_tcia", "*.*g", 6)[::2],
            tiles(shared_data, "ocdc_tumour_masks/images", "*.jpg"),
        ]
    )


def test_of_clean_tissue_hardly_anything_is_suspect(tissue: Rgb) -> None:
    found = suspects(tissue, 0.5, (240, 240, 240))
    assert tuple(found) == ("pen", "glass", "blur", "border")
    assert all(masks.shape == tissue.shape[:3] and masks.dtype == np.bool_ for masks in found.values())
    assert found["pen"].mean() < 0.002
    assert found["blur"].mean() < 0.01


@pytest.mark.parametrize("ink", INKS)
def test_ink_over_tissue_is_found(tissue: Rgb, ink: str) -> None:
    inked = tissue.copy()
    inked[:, :, :112] = (inked[:, :, :112] * np.array(INKS[ink])).astype(np.uint8)
    pen = suspects(inked, 0.5, (240, 240, 240))["pen"]
    assert pen[:, :, :96].mean() > 0.95
    assert pen[:, :, 144:].mean() < 0.02


def test_strokes_of_real_pens_are_found_and_glass_beside_them_is_glass(shared_data: Path) -> None:
    for name in ("no-tissue-green-pen", "no-tissue-red-pen"):
        rgb = tiles(shared_data, "histolab_qc_tiles", f"{name}.png")
        found = suspects(rgb, 0.5, (240, 240, 240))
        assert found["pen"].any()
        assert not (found["pen"] & found["glass"]).any()


def test_glass_is_found_with_its_colour(tissue: Rgb) -> None:
    rgb = tissue[:6].copy()
    rgb[:, 112:] = (225 + np.random.default_rng(0).normal(0, 2, rgb[:, 112:].shape)).astype(np.uint8)
    assert suspects(rgb, 0.5, (225, 225, 225))["glass"][:, 112:].all()
    assert not suspects(rgb, 0.5, (255, 255, 255))["glass"][:, 112:].any()


def test_blur_is_found_window_by_window(tissue: Rgb) -> None:
    sharp = tissue[(tissue.mean(axis=(1, 2)) < 200).all(axis=1)][:12]  # not nearly bare
    half = sharp.copy()
    half[:, :112] = [ndimage.gaussian_filter(patch, (4, 4, 0))[:112] for patch in sharp]
    found = blurred_windows(half)
    assert found[:, :112].mean() > 0.9
    assert found[:, 112:].mean() < 0.05
    assert blurred_windows(np.full((1, 8, 8, 3), 9, np.uint8)).sum() == 0  # too small to tell


def test_the_border_is_half_a_cell() -> None:
    found = suspects(np.full((2, 56, 70, 3), 200, np.uint8), 8.0)["border"]
    assert found.shape == (2, 56, 70)
    assert found[:, :4].all()
    assert not found[:, 4:-4, 4:-4].any()


def test_blocks_and_back() -> None:
    rgb = np.zeros((1, 5, 7, 3), np.uint8)
    rgb[0, 4:] = 90
    means = block_means(rgb, 2)
    assert means.shape == (1, 3, 4, 3)
    assert means[0, :, 0, 0].tolist() == [0, 0, 90]
    assert np.array_equal(spread_out(means[..., 0] > 0, 2, (5, 7)), rgb[..., 0] > 0)
