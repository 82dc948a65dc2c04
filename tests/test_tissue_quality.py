"""Ink and shadows of known pictures, stains that are neither, and how blur is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from scipy import ndimage
from skimage.measure import blur_effect

from tests.synthetic import GLASS
from wsi_gradcam.tissue.masks import find_masks
from wsi_gradcam.tissue.quality import BLUR_PX, densities, measure_blur, pen_mask, shadow_mask

Rgb = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

BLUE, DARK_BLUE, GREEN, RED, BLACK = (25, 60, 170), (20, 30, 90), (46, 160, 135), (214, 30, 50), (28, 24, 30)
INKS = {"blue": BLUE, "dark blue": DARK_BLUE, "green": GREEN, "red": RED, "black": BLACK}
STAINS = {
    "haematoxylin": (118, 66, 142),
    "blued haematoxylin": (130, 142, 180),
    "dark nuclei": (66, 40, 96),
    "eosin": (231, 130, 170),
    "dark eosin": (205, 70, 120),
    "blood": (196, 72, 84),
    "DAB": (120, 78, 45),
    "dark DAB": (78, 44, 26),
    "melanin": (84, 58, 44),
    "pale": (232, 222, 230),
}


def glass(size: tuple[int, int], colour: Colour = GLASS, sigma: float = 1.5) -> Rgb:
    noise = np.random.default_rng(3).normal(colour, sigma, (*size, 3))
    return np.clip(np.rint(noise), 0, 255).astype(np.uint8)


def with_stroke(picture: Rgb, colour: Colour, width: int = 14) -> npt.NDArray[np.bool_]:
    """Draw a soft slanting stroke as ink does, which lets through a share of the light; where it is half as dense."""
    y, x = np.indices(picture.shape[:2])
    across = np.abs(x - picture.shape[1] / 2 - 0.4 * (y - picture.shape[0] / 2))
    ink = ndimage.gaussian_filter((across < width / 2).astype(float), 2)
    through = (np.array(colour) / 255) ** ink[..., None]
    picture[:] = (picture * through).astype(np.uint8)
    return np.asarray(ink > 0.5)


@pytest.mark.parametrize("name", INKS)
def test_strokes_on_glass_are_found_and_are_no_tissue(name: str) -> None:
    picture = glass((120, 160))
    stroke = with_stroke(picture, INKS[name])
    assert pen_mask(picture)[stroke].mean() > 0.97
    masks = find_masks(picture, 78)
    assert not masks.tissue.any()
    assert masks.pen[stroke].all()
    assert masks.pen.mean() < 3 * stroke.mean()


@pytest.mark.parametrize("name", INKS)
def test_strokes_across_tissue_leave_the_tissue_beside(name: str) -> None:
    picture = glass((120, 200), STAINS["eosin"], 6)
    stroke = with_stroke(picture, INKS[name])
    masks = find_masks(picture, 78)
    assert masks.pen[stroke].mean() > 0.97
    beside = ndimage.distance_transform_edt(~stroke) > 20
    assert masks.tissue[beside].all()


@pytest.mark.parametrize("name", STAINS)
def test_stains_are_neither_ink_nor_shadow(name: str) -> None:
    picture = glass((80, 80), STAINS[name], 5)
    assert not pen_mask(picture).any()
    assert not shadow_mask(picture, GLASS).any()
    slide = glass((140, 140))
    slide[30:110, 30:110] = picture
    assert find_masks(slide).tissue[32:108, 32:108].all()


def test_a_speck_of_ink_is_not_looked_at() -> None:
    picture = glass((60, 60), STAINS["eosin"], 3)
    picture[20:25, 20:25] = BLUE
    assert pen_mask(picture, 1).any()
    assert not pen_mask(picture, 40).any()


def test_ink_is_followed_to_its_pale_edge_and_no_farther() -> None:
    faded = np.array([250, 250, 250], np.uint8) - (np.array([190, 90, 60]) * np.linspace(1, 0.28, 100)[:, None]).astype(
        np.uint8
    )
    picture = np.repeat(faded[None], 20, axis=0)
    found = pen_mask(picture)
    red, green, _ = densities(picture)
    certain = red - green > 0.15
    assert certain.any()
    assert not certain.all()
    assert (found.any(axis=0).sum() - certain.any(axis=0).sum()) == 8
    assert found[certain].all()


@pytest.mark.parametrize("gray", [40, 110, 170])
def test_a_gray_shadow_along_the_border_is_dropped(gray: int) -> None:
    picture = glass((100, 160))
    picture[:, 130:] = gray
    masks = find_masks(picture, 78)
    assert not masks.tissue.any()
    assert (masks.shadow | masks.pen)[:, 132:].all()
    assert masks.glass[:, :120].all()


@pytest.mark.parametrize("value", [120, 180, 215])
@pytest.mark.parametrize("width", [2, 4])
def test_the_edge_of_a_coverslip_is_dropped_and_tissue_beside_it_kept(value: int, width: int) -> None:
    picture = glass((300, 400)).astype(float)
    line = np.zeros((300, 400))
    line[20 : 20 + width, 10:390] = line[20:290, 380 : 380 + width] = 1
    picture *= 1 - ndimage.gaussian_filter(line, 0.7)[..., None] * (1 - value / 243)
    picture[100:200, 100:200] = glass((100, 100), STAINS["pale"], 3)
    masks = find_masks(picture.astype(np.uint8), 78)
    square = np.zeros((300, 400), np.bool_)
    square[100:200, 100:200] = True
    assert masks.tissue[square].mean() > 0.99
    assert not masks.tissue[ndimage.distance_transform_edt(~square) > 4].any()
    assert masks.shadow.any()


def test_a_strand_of_tissue_is_no_line() -> None:
    picture = glass((100, 300))
    picture[50:54, 20:280] = (225, 190, 210)
    masks = find_masks(picture, 78)
    assert masks.tissue[51:53, 20:280].all()
    assert not masks.shadow.any()


def test_a_net_of_gray_membranes_is_no_line() -> None:
    picture = glass((200, 200))
    picture[::8] = picture[:, ::8] = (215, 214, 216)
    assert find_masks(picture, 78).tissue.mean() > 0.9


@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))), st.integers(0, 20))
def test_masks_of_any_picture_never_overlap(picture: Rgb, smallest: int) -> None:
    masks = find_masks(picture, smallest)
    total = sum(m.astype(int) for m in (masks.tissue, masks.pen, masks.glass))
    assert np.all(total == 1)
    assert not (masks.shadow & (masks.tissue | masks.pen)).any()


class TestRealPictures:
    """At 8 um per pixel, as slides are looked at: 16 for 0.5 um per pixel, 8 for 1."""

    @pytest.mark.parametrize("shrink", [8, 16])
    @pytest.mark.parametrize("name", ["no-tissue-green-pen", "no-tissue-red-pen"])
    def test_pen_on_glass_is_found(self, shared_data: Path, name: str, shrink: int) -> None:
        picture = rgb_of(shared_data / f"tiles/histolab_qc_tiles/{name}.png", shrink)
        masks = find_masks(picture, 20)
        assert masks.tissue.mean() < 0.01  # 0.8 of each without this
        assert masks.pen.mean() > 0.75

    def test_pen_over_fat_is_found(self, shared_data: Path) -> None:
        picture = rgb_of(shared_data / "tiles/histolab_qc_tiles/very-low-nuclei-score-red-pen-level1.png", 8)
        red, green, _ = densities(picture)
        inked = (green > 0.3) & (red < 0.12 * green)
        masks = find_masks(picture, 20)
        assert inked.mean() > 0.05
        assert masks.pen[inked].mean() > 0.97

    @pytest.mark.parametrize(("folder", "shrink"), [("ocdc_tumour_masks/images", 16), ("osteosarcoma_tcia", 8)])
    def test_scanned_tissue_is_not_lost(self, shared_data: Path, folder: str, shrink: int) -> None:
        pictures = [rgb_of(file, shrink) for file in sorted((shared_data / "tiles" / folder).rglob("*.jpg"))]
        assert len(pictures) >= 7
        assert not any(find_masks(picture, 78).pen.any() for picture in pictures)
        assert not any(find_masks(picture, 78).shadow.any() for picture in pictures)

    @pytest.mark.parametrize("shrink", [2, 4, 8])
    def test_dab_and_haematoxylin_are_not_lost(self, shrink: int) -> None:
        picture = np.asarray(Image.fromarray(skimage.data.immunohistochemistry()).reduce(shrink))
        assert not (pen_mask(picture, 78) | shadow_mask(picture, smallest_px=78)).any()

    def test_photographs_with_a_cast_lose_less_than_a_hundredth(self, shared_data: Path) -> None:
        files = sorted((shared_data / "tiles/oscc_oral").rglob("*100x*.jpg"))[::4]
        assert len(files) > 100
        found = [find_masks(rgb_of(file, 8), 78) for file in files]
        assert np.mean([(m.pen | m.shadow).mean() for m in found]) < 0.01


def rgb_of(path: Path, shrink: int) -> Rgb:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").reduce(shrink))


def tissue_patches() -> Rgb:
    picture = skimage.data.immunohistochemistry()
    return np.stack([picture[y : y + 128, x : x + 128] for y in range(0, 512, 128) for x in range(0, 512, 128)])


def blurred(patches: Rgb, sigma: float) -> Rgb:
    found: Rgb = np.rint(ndimage.gaussian_filter(patches.astype(float), (0, sigma, sigma, 0))).astype(np.uint8)
    return found


class TestBlur:
    def test_grows_with_blur_in_every_patch(self) -> None:
        measured = [measure_blur(blurred(tissue_patches(), sigma)) for sigma in (0, 0.7, 1, 1.5, 2, 3, 4)]
        assert np.all(np.diff(measured, axis=0) > 0)
        assert measured[0].max() < 0.35
        assert measured[-1].min() > 0.6

    def test_is_the_same_for_pale_stain(self) -> None:
        patches = tissue_patches()
        pale = (255 - (255 - patches.astype(float)) * 0.4).astype(np.uint8)
        assert np.abs(measure_blur(pale) - measure_blur(patches)).max() < 0.03

    def test_orders_patches_as_the_published_measure(self) -> None:
        """scikit-image's has Sobel's filter in place of differences, so only the order agrees."""
        patches = np.concatenate([blurred(tissue_patches(), sigma) for sigma in (0, 1, 2, 4)])
        expected = [blur_effect(patch, channel_axis=-1) for patch in patches]
        assert np.corrcoef(measure_blur(patches), expected)[0, 1] > 0.97

    @given(npst.arrays(np.uint8, st.tuples(st.just(2), st.integers(12, 20), st.integers(12, 20), st.just(3))))
    def test_equals_its_definition(self, patches: Rgb) -> None:
        np.testing.assert_allclose(measure_blur(patches), [slow_blur(patch) for patch in patches], atol=1e-6)

    @given(npst.arrays(np.uint8, st.tuples(st.just(3), st.integers(12, 20), st.integers(12, 20), st.just(3))))
    def test_is_a_share_of_each_patch_by_itself(self, patches: Rgb) -> None:
        found = measure_blur(patches)
        assert found.dtype == np.float32
        assert np.all((found >= 0) & (found <= 1) | np.isnan(found))
        np.testing.assert_array_equal(found, np.concatenate([measure_blur(patch[None]) for patch in patches]))

    @pytest.mark.parametrize("shape", [(1, 1), (11, 11), (64, 64)])
    def test_without_a_difference_it_is_not_known(self, shape: tuple[int, int]) -> None:
        assert np.isnan(measure_blur(np.full((2, *shape, 3), 200, np.uint8))).all()

    def test_no_patches(self) -> None:
        assert measure_blur(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0,)


def slow_blur(patch: Rgb) -> float:
    """A mean of 11 pixels, and what is left of the differences between neighbours; loops and floats."""
    gray = (patch.astype(int) @ np.array([77, 150, 29])) // 256
    shares = []
    for lines in (gray.T, gray):
        sharp = soft = 0.0
        for line in lines.tolist():
            means = [sum(line[i - 5 : i + 6]) / BLUR_PX for i in range(5, len(line) - 5)]
            for i in range(len(means) - 1):
                step = abs(line[i + 6] - line[i + 5])
                sharp += step
                soft += min(step, abs(means[i + 1] - means[i]))
        shares.append(soft / sharp if sharp else np.nan)
    return float(np.max(shares)) if not np.isnan(shares).any() else float(max(shares))
