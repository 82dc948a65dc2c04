"""Stains are measured as they are, pixels are changed as the formulae say, and what has no stain is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torchstain
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from skimage.color import lab2rgb, rgb2lab

from wsi_gradcam.errors import StainError
from wsi_gradcam.tissue.stain import (
    PUBLISHED,
    Macenko,
    Reinhard,
    Stain,
    StainFit,
    apply,
    densities,
    fit,
    is_tissue,
    measure,
    reinhard_exact,
)

Rgb = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

# Eosin that absorbs some red: the method leaves out pixels of any other.
OTHER = Macenko(((0.65, 0.70, 0.29), (0.22, 0.93, 0.30)), (1.4, 0.8))
METHODS = ("macenko", "reinhard")


def concentrations(count: int = 20_000, seed: int = 0) -> Floats:
    """Of both stains [n, 2]: nuclei, stroma, mixtures, and some of each stain alone, as real tissue has."""
    rng = np.random.default_rng(seed)
    both = rng.gamma(3.0, 0.2, (count, 2)) + 0.1
    alone = rng.random(count)
    both[alone < 0.1, 0] = 0
    both[alone > 0.9, 1] = 0
    both[(both[:, 0] == 0) & (both[:, 1] < 0.8), 1] += 0.7
    return both


def stained(amounts: Floats, stains: object) -> Rgb:
    """RGB [n, 3] of concentrations [n, 2]: Beer and Lambert's law."""
    rgb: Rgb = np.clip(np.rint(240 * np.exp(-amounts @ np.asarray(stains)) - 1), 0, 255).astype(np.uint8)
    return rgb


def angle_deg(one: object, other: object) -> float:
    a, b = np.asarray(one, float), np.asarray(other, float)
    return float(np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))))


def tiles(shared_data: Path) -> list[Rgb]:
    """Real tissue of two laboratories."""
    folder = shared_data / "tiles"
    names = [
        *sorted((folder / "ocdc_tumour_masks" / "images").glob("*.jpg"))[:2],
        *sorted((folder / "oscc_oral" / "train" / "OSCC").glob("*.jpg"))[:2],
    ]
    return [np.asarray(Image.open(name).convert("RGB")) for name in names]


def of_tissue(tile: Rgb) -> Rgb:
    """Its pixels without glass, as a picture of one column: what other implementations leave out depends."""
    pixels = tile.reshape(-1, 3)
    return pixels[(densities(pixels) >= 0.15).all(axis=1)][:, None]


# --- Macenko ---------------------------------------------------------------------------------------------------------


@given(
    st.tuples(st.floats(0.6, 0.8), st.floats(0.4, 0.7), st.floats(0.2, 0.5)),
    st.tuples(st.floats(0.2, 0.35), st.floats(0.6, 0.9), st.floats(0.2, 0.5)),
    st.floats(0.8, 1.4),
    st.floats(0.8, 1.4),
)
def test_the_stains_that_made_a_picture_are_found(
    first: tuple[float, float, float], second: tuple[float, float, float], strong: float, weak: float
) -> None:
    """Stains that absorb in all channels: pixels of others are left out by the method itself."""
    haematoxylin, eosin = (np.array(stain) / np.linalg.norm(stain) for stain in (first, second))
    assume(angle_deg(haematoxylin, eosin) > 15)
    amounts = concentrations() * [strong, weak]
    found = measure(stained(amounts, [haematoxylin, eosin]), "macenko")
    assert isinstance(found, Macenko)
    assert angle_deg(found.stains[0], haematoxylin) < 1.5
    assert angle_deg(found.stains[1], eosin) < 1.5
    np.testing.assert_allclose(np.linalg.norm(found.stains, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found.concentrations, np.percentile(amounts, 99, axis=0), rtol=0.1)


def test_stains_that_exclude_each_other_are_found_too() -> None:
    """The largest variance then lies along their difference: angles from that axis wrap round."""
    rng = np.random.default_rng(0)
    share = np.where(rng.random(20_000) < 0.5, 0.0, 1.0) * 0.96 + 0.02 + rng.normal(0, 0.005, 20_000)
    amounts = np.stack([share, 1 - share], axis=1) * rng.uniform(1.0, 1.1, (20_000, 1))
    found = measure(stained(amounts, OTHER.stains), "macenko")
    assert isinstance(found, Macenko)
    assert angle_deg(found.stains[0], OTHER.stains[0]) < 3
    assert angle_deg(found.stains[1], OTHER.stains[1]) < 3


def test_real_tissue_is_measured_as_torchstain_does(shared_data: Path) -> None:
    for tile in tiles(shared_data):
        pixels = of_tissue(tile)
        peer = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
        peer.fit(pixels)
        found = measure(pixels[:, 0], "macenko")
        assert isinstance(found, Macenko)
        np.testing.assert_allclose(np.transpose(found.stains), peer.HERef, atol=1e-3)
        np.testing.assert_allclose(found.concentrations, peer.maxCRef, rtol=1e-3)


def test_real_tissue_is_changed_as_torchstain_does(shared_data: Path) -> None:
    peer = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    for tile in tiles(shared_data):
        pixels = of_tissue(tile)
        expected, _, _ = peer.normalize(pixels, stains=False)
        found = apply(fit(pixels[:, 0], PUBLISHED["macenko"], "tile"), pixels)
        difference = np.abs(found.astype(int) - expected.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.02


def test_each_pixel_follows_the_formula() -> None:
    slide, target = OTHER, PUBLISHED["macenko"]
    assert isinstance(target, Macenko)
    rgb = np.random.default_rng(0).integers(0, 256, (5000, 3), np.uint8)
    density = -np.log((rgb + 1.0) / 240)
    amounts = np.linalg.lstsq(np.transpose(slide.stains), density.T, rcond=None)[0].T
    amounts *= np.divide(target.concentrations, slide.concentrations)
    expected = np.minimum(240 * np.exp(-amounts @ np.array(target.stains)), 255)
    found = apply(StainFit(slide, target), rgb)
    assert np.abs(found - np.floor(expected)).max() <= 1
    assert (found != np.floor(expected)).mean() < 1e-3


# --- Reinhard --------------------------------------------------------------------------------------------------------


def test_real_tissue_gets_the_targets_mean_and_deviation(shared_data: Path) -> None:
    target = Reinhard((65.0, 20.0, -12.0), (10.0, 5.0, 4.0))  # well inside what RGB can show
    for tile in tiles(shared_data):
        made = fit(tile.reshape(-1, 3), target, "tile")
        pixels = tile.reshape(-1, 3)
        result = rgb2lab(apply(made, pixels[is_tissue(densities(pixels))][None])[0])
        np.testing.assert_allclose(result.mean(axis=0), target.mean, atol=0.5)
        np.testing.assert_allclose(result.std(axis=0), target.std, rtol=0.06)


def test_the_table_gives_what_the_formula_gives(shared_data: Path) -> None:
    target = PUBLISHED["reinhard"]
    assert isinstance(target, Reinhard)
    for tile in tiles(shared_data):
        made = fit(tile.reshape(-1, 3), target, "tile")
        assert isinstance(made.slide, Reinhard)
        lab = (rgb2lab(tile) - made.slide.mean) * np.divide(target.std, made.slide.std) + target.mean
        formula = reinhard_exact(made.slide, target, tile)
        inside = (formula > 0.001).all(axis=-1) & (formula < 0.999).all(axis=-1)
        np.testing.assert_allclose(formula[inside], lab2rgb(lab[inside]), atol=1e-4)
        difference = np.abs(apply(made, tile) - 255 * formula)
        assert difference.mean() < 0.4
        assert np.percentile(difference, 99.9) < 1.5
        assert difference.max() < 8  # near black, where the formula bends


def test_real_tissue_changes_its_colours_as_torchstain_changes_them(shared_data: Path) -> None:
    """torchstain rounds down, Pillow rounds: half a level lies between them."""
    first, *others = (of_tissue(tile) for tile in tiles(shared_data))
    peer = torchstain.normalizers.ReinhardNormalizer(backend="numpy")
    peer.fit(first)
    for pixels in others:
        found = apply(fit(pixels[:, 0], measure(first[:, 0], "reinhard"), "tile"), pixels)
        difference = found.astype(int) - peer.normalize(pixels)
        assert np.percentile(np.abs(difference), 99.9) <= 1
        assert 0.3 < difference.mean() < 0.7


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_has_the_targets_stain_stays_as_it_is(method: str) -> None:
    tissue_rgb = stained(concentrations(), OTHER.stains)
    made = fit(tissue_rgb, measure(tissue_rgb, method), "slide")
    changed = np.abs(apply(made, tissue_rgb[None])[0].astype(int) - tissue_rgb)
    assert np.percentile(changed, 99.9) <= 1
    assert changed.max() <= 2


# Reinhard's method knows no stains: it evens out how much of them there is, but not their mixture.
@pytest.mark.parametrize(("method", "eosin", "alike"), [("macenko", 1.3, 2.0), ("reinhard", 0.9, 6.0)])
def test_one_tissue_stained_by_two_laboratories_becomes_alike(method: str, eosin: float, alike: float) -> None:
    amounts = concentrations()
    target = PUBLISHED[method]
    strong = stained(amounts * [1.5, 1.5], OTHER.stains)
    weak = stained(amounts * [0.8, eosin], ((0.55, 0.75, 0.36), (0.2, 0.9, 0.38)))
    assert np.abs(strong.astype(int) - weak).mean() > 20
    same = [apply(fit(rgb, target, "slide"), rgb[None])[0].astype(int) for rgb in (strong, weak)]
    assert np.abs(same[0] - same[1]).mean() < alike


def test_a_stronger_stain_is_weakened_to_the_targets() -> None:
    target = PUBLISHED["macenko"]
    assert isinstance(target, Macenko)
    rgb = stained(concentrations() * 1.5, OTHER.stains)
    again = measure(apply(fit(rgb, target, "slide"), rgb[None])[0], "macenko")
    assert isinstance(again, Macenko)
    for found, expected in zip(again.stains, target.stains, strict=True):
        assert angle_deg(found, expected) < 2
    np.testing.assert_allclose(again.concentrations, target.concentrations, rtol=0.08)


@pytest.mark.parametrize("method", METHODS)
def test_glass_and_what_is_left_out_of_the_mask_do_not_count(method: str) -> None:
    rgb = stained(concentrations(), OTHER.stains)
    glass = np.random.default_rng(0).integers(228, 256, (40_000, 3), np.uint8)
    assert measure(np.concatenate([rgb, glass]), method) == measure(rgb, method)


def test_glass_stays_glass() -> None:
    made = fit(stained(concentrations(), OTHER.stains), PUBLISHED["macenko"], "slide")
    glass = np.repeat(np.arange(238, 256, dtype=np.uint8)[:, None], 3, axis=1)
    assert apply(made, glass[None]).min() >= 230


@pytest.mark.parametrize("method", METHODS)
def test_any_colour_in_any_shape_gives_a_colour(method: str) -> None:
    """A pixel's result depends on nothing but the pixel; black, as of unreadable patches, is no error."""
    made = fit(stained(concentrations(), OTHER.stains), PUBLISHED[method], "slide")
    corners = np.array([[r, g, b] for r in (0, 1, 255) for g in (0, 1, 255) for b in (0, 1, 255)], np.uint8)
    others = np.random.default_rng(1).integers(0, 256, (37, 3), np.uint8)
    patches = np.concatenate([corners, others]).reshape(2, 4, 8, 3)
    before = patches.copy()
    whole = apply(made, patches)
    assert whole.dtype == np.uint8
    assert whole.shape == patches.shape
    np.testing.assert_array_equal(patches, before)
    for i in range(2):
        np.testing.assert_array_equal(apply(made, patches[i]), whole[i])
    np.testing.assert_array_equal(apply(made, patches[:, :, ::-1]), whole[:, :, ::-1])


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_survive_a_file(method: str) -> None:
    made = fit(stained(concentrations(), OTHER.stains), PUBLISHED[method], "slide")
    assert StainFit.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("values", [{}, {"slide": {"method": "macenko"}, "target": {}}, {"slide": 3, "target": 4}])
def test_other_values_are_no_fit(values: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError)):
        StainFit.from_json(values)


# --- what cannot be normalised ---------------------------------------------------------------------------------------


def refused(rgb: Rgb, method: str) -> str:
    with pytest.raises(StainError) as caught:
        fit(rgb, PUBLISHED[method], "a.svs")
    message = str(caught.value)
    assert message.startswith(f"a.svs: its stain cannot be normalised by {method}: ")
    assert "'stain: none'" in message
    return message


def noisy(colours: Floats, deviation: float = 3.0) -> Rgb:
    noise = np.random.default_rng(2).normal(0, deviation, colours.shape)
    return np.clip(np.rint(colours + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("method", METHODS)
def test_too_little_tissue(method: str) -> None:
    rgb = np.full((50_000, 3), 245, np.uint8)
    assert "only 0 of 50000 pixels" in refused(rgb, method)
    rgb[:999] = stained(concentrations(999) + 0.5, OTHER.stains)
    assert "999 of 50000 pixels are stained, expected at least 1000" in refused(rgb, method)
    assert "only 0 of 0 pixels" in refused(rgb[:0], method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("colour", [(120, 60, 140), (128, 128, 128), (0, 0, 0)])
def test_one_colour(method: str, colour: tuple[int, int, int]) -> None:
    assert "(nearly)" in refused(np.full((5000, 3), colour, np.uint8), method)


@pytest.mark.parametrize("strength", [0.7, 1.0, 1.5])
def test_one_stain_with_the_cameras_noise(strength: float) -> None:
    """Haematoxylin alone, in any concentration."""
    amounts = concentrations() * [strength, 0]
    amounts[:, 0] += 0.3
    pure = 240 * np.exp(-amounts @ np.asarray(OTHER.stains))
    assert "single stain" in refused(noisy(pure), "macenko")


def test_stains_of_one_colour() -> None:
    close = ((0.56, 0.72, 0.41), (0.53, 0.73, 0.42))
    assert "a single stain" in refused(stained(concentrations(), close), "macenko")


def test_a_gray_picture() -> None:
    gray = np.repeat(np.random.default_rng(0).integers(20, 200, (5000, 1), np.uint8), 3, axis=1)
    assert "single stain" in refused(gray, "macenko")
    assert "(nearly) a single colour" in refused(gray, "reinhard")


def test_ink_is_no_stain() -> None:
    """Two inks, one of which lets more light through than there is glass: its density would be negative."""
    inks = np.array([[200, 20, 20], [20, 200, 60], [20, 40, 200]], float)
    rng = np.random.default_rng(0)
    assert "not those of two stains" in refused(noisy(inks[rng.integers(0, 3, 5000)], 8.0), "macenko")


def test_traces_of_stain_are_not_enlarged() -> None:
    """Tissue that is hardly stained, but for some dust."""
    pale = np.tile(np.array([[236, 204, 228]], np.uint8), (300_000, 1))
    pale[:1500] = stained(concentrations(1500) + 0.5, OTHER.stains)
    assert "one stain is nearly absent" in refused(pale, "macenko")


def test_stains_of_different_methods_are_different() -> None:
    stains: list[Stain] = [*PUBLISHED.values(), OTHER]
    assert len({json.dumps(stain.to_json()) for stain in stains}) == 3
    assert {stain.method for stain in stains} == set(METHODS)
