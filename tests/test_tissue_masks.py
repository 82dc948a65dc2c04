"""Tissue masks of known pictures, and box shares against counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter, uniform_filter

from tests.oracles import share_of
from tests.slides_in_memory import ArraySlide
from tests.synthetic import GLASS, tissue_texture
from wsi_gradcam.errors import MppError
from wsi_gradcam.tissue.masks import Shares, find_masks, glass_colour, slide_masks

Rgb = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
PINK_PALE, FAT = (232, 222, 230), (226, 226, 228)


def tissue_of(picture: Rgb, smallest_px: int = 0) -> npt.NDArray[np.bool_]:
    return find_masks(picture, smallest_px).tissue


def glass(size: tuple[int, int], colour: tuple[int, int, int] = GLASS, sigma: float = 1.5) -> Rgb:
    noise = np.random.default_rng(5).normal(colour, sigma, (*size, 3))
    return np.clip(np.rint(noise), 0, 255).astype(np.uint8)


def with_square(picture: Rgb, colour: tuple[int, int, int], top: int, left: int, side: int) -> npt.NDArray[np.bool_]:
    """Paint a square of noisy colour into the picture; where it is."""
    where = np.zeros(picture.shape[:2], np.bool_)
    where[top : top + side, left : left + side] = True
    picture[where] = glass((side, side), colour, 3).reshape(-1, 3)
    return where


def agreement(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("colour", [(231, 160, 196), (118, 66, 142), (150, 100, 60), PINK_PALE, FAT])
@pytest.mark.parametrize("background", [GLASS, (255, 255, 255), (250, 246, 240)])
def test_tissue_is_told_from_glass(colour: tuple[int, int, int], background: tuple[int, int, int]) -> None:
    picture = glass((120, 160), background)
    where = with_square(picture, colour, 30, 50, 50)
    assert agreement(tissue_of(picture), where) > 0.85


def test_pale_tissue_is_kept_beside_dark_tissue() -> None:
    picture = glass((150, 200))
    pale, dark = with_square(picture, PINK_PALE, 20, 20, 40), with_square(picture, (118, 66, 142), 70, 110, 60)
    assert agreement(tissue_of(picture), pale | dark) > 0.85


@pytest.mark.parametrize("background", [GLASS, (255, 255, 255), (215, 214, 210)])
@pytest.mark.parametrize("sigma", [0.0, 1.5, 3.0])
def test_all_glass_is_empty(background: tuple[int, int, int], sigma: float) -> None:
    assert not tissue_of(glass((100, 100), background, sigma)).any()


def test_uneven_lamp_light_is_no_tissue() -> None:
    shade = np.linspace(-4, 4, 200)[:, None, None]
    picture = np.clip(glass((200, 200)).astype(float) + shade, 0, 255).astype(np.uint8)
    assert tissue_of(picture).mean() < 0.01


def test_all_tissue_is_full() -> None:
    assert tissue_of(tissue_texture(128, np.random.default_rng(0))).mean() > 0.98


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (3, 5), (40, 1)])
@pytest.mark.parametrize(
    ("colour", "tissue"),
    [
        ((0, 0, 0), False),
        ((118, 66, 142), True),
        ((231, 160, 196), True),
        ((255, 255, 255), False),
        ((243, 242, 245), False),
    ],
)
def test_a_single_colour_is_one_answer_at_any_size(
    size: tuple[int, int], colour: tuple[int, int, int], tissue: bool
) -> None:
    mask = tissue_of(np.full((*size, 3), colour, np.uint8), smallest_px=0)
    assert mask.shape == size
    assert (mask == tissue).all()


@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))), st.integers(0, 20))
def test_any_picture_gives_a_mask_of_its_size(picture: Rgb, smallest: int) -> None:
    before = picture.copy()
    mask = tissue_of(picture, smallest)
    assert mask.shape == picture.shape[:2]
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(picture, before)


def test_dust_and_pinholes_are_dropped() -> None:
    picture = glass((120, 120))
    where = with_square(picture, (231, 160, 196), 20, 20, 60)
    picture[43:53, 43:53] = GLASS
    picture[100:104, 100:104] = (110, 80, 120)
    assert tissue_of(picture)[102, 102]
    assert not tissue_of(picture)[48, 48]
    mask = tissue_of(picture, smallest_px=100)
    assert not mask[95:, 95:].any()
    assert mask[48, 48]
    assert agreement(mask, where) > 0.9


@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (210, 208, 212)])
def test_the_glass_colour_is_found_beside_much_tissue(colour: tuple[int, int, int]) -> None:
    picture = glass((100, 100), colour)
    with_square(picture, (118, 66, 142), 0, 0, 95)
    assert np.abs(np.subtract(glass_colour(picture), colour)).max() <= 3


def test_without_glass_white_stands_in() -> None:
    assert glass_colour(np.full((9, 9, 3), (118, 66, 142), np.uint8)) == (255, 255, 255)


class TestOfASlide:
    def test_covers_the_slide_at_eight_um_per_pixel(self) -> None:
        level0 = glass((640, 960))
        where = with_square(level0, (200, 120, 160), 320, 480, 256)
        mask = slide_masks(ArraySlide([level0], (2.0, 2.0))).tissue
        assert mask.shape == (160, 240)
        assert agreement(mask, where[2::4, 2::4]) > 0.9

    def test_drops_specks_by_their_true_area(self) -> None:
        for mpp, kept in ((1.0, False), (4.0, True)):
            level0 = glass((600, 600))
            with_square(level0, (120, 60, 130), 280, 280, 32)
            assert slide_masks(ArraySlide([level0], (mpp, mpp))).tissue.any() == kept

    def test_needs_the_mpp(self) -> None:
        with pytest.raises(MppError, match="--mpp"):
            slide_masks(ArraySlide([glass((20, 20))], None))

    @pytest.mark.parametrize("size", [(1, 1), (3, 500), (50, 50)])
    def test_of_any_size_has_a_mask(self, size: tuple[int, int]) -> None:
        assert slide_masks(ArraySlide([glass(size, (120, 60, 130))], (0.5, 0.5))).tissue.size >= 1


def texture(size: tuple[int, int], colour: tuple[int, int, int], strength: float) -> npt.NDArray[np.float64]:
    """Stained tissue at 8 um per pixel: unevenness of many sizes."""
    rng = np.random.default_rng(2)
    uneven: npt.NDArray[np.float64] = sum(gaussian_filter(rng.normal(size=size), s) * s for s in (1, 3, 8))
    uneven = strength * (uneven / uneven.std())[..., None] * (0.7, 1.0, 0.5)
    return np.array(colour) - uneven + rng.normal(0, 1.5, (*size, 3))


def section(
    glass_rgb: tuple[int, int, int], stain: tuple[int, int, int], strength: float, within: Mask | None = None
) -> tuple[npt.NDArray[np.float64], Mask]:
    """Fragments of tissue on noisy glass, 400 x 600 px, and where they are."""
    rng = np.random.default_rng(1)
    hills = gaussian_filter(rng.normal(size=(400, 600)), 25)
    where: Mask = hills > np.quantile(hills, 0.7)
    if within is not None:
        where &= within
    share = gaussian_filter(where.astype(float), 1)[..., None]
    return rng.normal(glass_rgb, 1.0, (400, 600, 3)) * (1 - share) + texture(
        where.shape, stain, strength
    ) * share, where


def rounded(picture: npt.NDArray[np.float64]) -> Rgb:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def staircase() -> Mask:
    """Scanned stripes that begin and end at places of their own, as of a frozen section."""
    rng, scanned = np.random.default_rng(4), np.zeros((400, 600), np.bool_)
    for left in range(20, 560, 40):
        scanned[int(rng.integers(10, 90)) : 400 - int(rng.integers(10, 90)), left : left + 40] = True
    return scanned


def overlap(found: Mask, true: Mask) -> float:
    """Dice's coefficient."""
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


HE = (205, 140, 180)


class TestKindsOfSlides:
    """Dice before the rule for fill: 0.24 to 0.48 of frozen sections, 0.91 of dark slides, 0.62 to 0.67 of shadows."""

    @pytest.mark.parametrize("colour", [(241, 236, 239), (250, 249, 250), (228, 223, 226)])
    @pytest.mark.parametrize("fill", [255, 0])
    @pytest.mark.parametrize("sharp", [True, False])
    @pytest.mark.parametrize(("stain", "strength"), [(HE, 10.0), ((225, 200, 218), 5.0)])
    def test_a_frozen_section_with_filled_area(
        self, colour: tuple[int, int, int], fill: int, sharp: bool, stain: tuple[int, int, int], strength: float
    ) -> None:
        scanned = staircase()
        picture, true = section(colour, stain, strength, binary_erosion(scanned, iterations=8))
        share = (scanned.astype(float) if sharp else uniform_filter(scanned.astype(float), 2))[..., None]
        found = find_masks(rounded(picture * share + fill * (1 - share)), 78)
        assert overlap(found.tissue, true) > 0.93
        assert found.tissue[true].mean() > 0.98
        assert found.unscanned is not None
        assert overlap(found.unscanned, ~scanned) > 0.95
        assert not found.pen.any()
        assert not found.shadow[~binary_dilation(true, iterations=6)].any()
        assert sum(found.shares().values()) == pytest.approx(1)

    def test_tiles_of_glass_that_were_left_out_are_unscanned(self) -> None:
        scanned = np.zeros((400, 600), np.bool_)
        scanned[64:320, 64:512] = scanned[128:384, 320:576] = True
        picture, true = section(GLASS, HE, 8.0, binary_erosion(scanned, iterations=8))
        found = find_masks(rounded(np.where(scanned[..., None], picture, 255.0)), 78)
        assert overlap(found.tissue, true) > 0.93
        assert found.unscanned is not None

    @pytest.mark.parametrize(
        ("colour", "stain", "strength"),
        [
            (GLASS, (228, 227, 233), 4.0),  # mucin
            (GLASS, FAT, 4.0),
            ((257, 257, 257), (238, 236, 244), 3.0),  # the same on glass that the camera shows pure white
            ((257, 257, 257), (232, 215, 228), 5.0),
            ((257, 257, 257), HE, 10.0),
            ((215, 214, 210), (170, 110, 150), 8.0),  # dark scans
            ((192, 189, 190), (150, 90, 130), 8.0),
            ((152, 149, 150), (110, 70, 100), 8.0),
        ],
        ids=str,
    )
    def test_faint_tissue_pure_white_glass_and_dark_scans(
        self, colour: tuple[int, int, int], stain: tuple[int, int, int], strength: float
    ) -> None:
        picture, true = section(colour, stain, strength)
        found = find_masks(rounded(picture), 78)
        assert overlap(found.tissue, true) > 0.95
        assert found.unscanned is None

    def test_immunohistochemistry_without_counterstain(self) -> None:
        picture, true = section(GLASS, (234, 230, 229), 3.0)
        hills = gaussian_filter(np.random.default_rng(7).normal(size=true.shape), 4)
        brown = true & (hills > np.quantile(hills, 0.96))
        picture[brown] = texture(true.shape, (140, 100, 70), 8.0)[brown]
        found = find_masks(rounded(picture), 78)
        assert overlap(found.tissue, true) > 0.95
        assert found.tissue[brown].mean() > 0.99

    @pytest.mark.parametrize("gray", [230, 215, 200])
    def test_even_shade_beside_the_coverslip_is_no_tissue(self, gray: int) -> None:
        shade = np.zeros((400, 600), np.bool_)
        shade[:, 520:] = shade[360:] = True
        picture, true = section(GLASS, HE, 8.0, ~binary_dilation(shade, iterations=6))
        depth = gaussian_filter(shade.astype(float), 1.5)[..., None] * (1 - gray / 243)
        found = find_masks(rounded(picture * (1 - depth)), 78)
        assert overlap(found.tissue, true) > 0.93
        assert not found.tissue[binary_erosion(shade, iterations=3)].any()

    def test_published_masks_of_a_tumour_lie_on_tissue(self, shared_data: Path) -> None:
        folder, lost = shared_data / "tiles/ocdc_tumour_masks", []
        for file in sorted((folder / "images").glob("*.jpg")):
            tumour = rgb_of(folder / "masks" / file.name, shrink=16)[..., 0] > 200
            found = tissue_of(rgb_of(file, shrink=16))
            lost.append(float((tumour & ~found).sum() / max(1, tumour.sum())))
        assert len(lost) == 7
        assert sorted(lost)[:6] == [0.0] * 6
        assert max(lost) < 0.06  # holes of one crop


class TestRealTiles:
    @pytest.mark.parametrize("name", ["no-tissue.png", "no-tissue2.png", "almost-white-1.png"])
    def test_glass_is_nearly_empty(self, shared_data: Path, name: str) -> None:
        assert tissue_of(rgb_of(shared_data / "tiles/histolab_qc_tiles" / name)).mean() < 0.02

    def test_tumour_crops_are_nearly_full(self, shared_data: Path) -> None:
        files = sorted((shared_data / "tiles/ocdc_tumour_masks/images").glob("*.jpg"))
        # 0.5 um per pixel; the mask is made at 8.
        shares = [tissue_of(rgb_of(file, shrink=16)).mean() for file in files]
        assert len(shares) == 7
        assert min(shares) > 0.8
        assert np.mean(shares) > 0.92


def rgb_of(path: Path, shrink: int = 1) -> Rgb:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").reduce(shrink))


boxes = st.tuples(st.floats(-3, 9), st.floats(-3, 9), st.floats(0.05, 9), st.floats(0.05, 9))


@given(npst.arrays(np.bool_, st.tuples(st.integers(1, 7), st.integers(1, 7))), st.lists(boxes, min_size=1, max_size=4))
def test_shares_of_boxes_equal_counting(
    mask: npt.NDArray[np.bool_], found: list[tuple[float, float, float, float]]
) -> None:
    edges = np.array([(y, x, y + height, x + width) for y, x, height, width in found])
    expected = [share_of(mask, *edge) for edge in edges.tolist()]
    np.testing.assert_allclose(Shares(mask).of(edges), expected, atol=2e-6)


@given(st.integers(1, 2048), st.floats(0.1, 300), st.data())
@settings(max_examples=15, deadline=None)
def test_none_is_zero_and_all_is_one_exactly(size: int, side: float, data: st.DataObject) -> None:
    """A share of 1e-13 would pass for tissue, and one of 0.9999999 for glass at --min-tissue 1."""
    left = data.draw(st.floats(0, max(0.0, size - side)))
    side = min(side, size - left)
    if side < 0.1:
        return
    box = np.array([[left, left, left + side, left + side]])
    full = np.ones((size, size), np.bool_)
    assert Shares(full).of(box)[0] == 1
    full[np.floor(left).astype(int) : np.ceil(left + side).astype(int)] = False
    assert Shares(full).of(box)[0] == 0


def test_a_slide_without_colour_has_tissue_and_no_shadows() -> None:
    gray = np.full((200, 300, 3), 240, np.uint8)
    gray[:, :10] = 0
    gray[50:150, 80:220] = np.random.default_rng(0).integers(60, 160, (100, 140, 1), dtype=np.uint8)
    found = find_masks(gray, 20)
    assert found.tissue[60:140, 90:210].mean() > 0.95
    assert not found.shadow[:, 20:].any()
    assert not found.tissue[:, :10].any()
    assert not found.pen.any()
    gray[10:40, 10:290] = (200, 120, 160)  # with some colour, gray is a shadow again
    assert find_masks(gray, 20).shadow[60:140, 90:210].mean() > 0.9
