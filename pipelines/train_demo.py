"""Retrain the bundled models from scratch on a CPU, and write their weights, model files and cards.

python pipelines/train_demo.py oral-tumour --data ../shared/data/tiles
python pipelines/train_demo.py ihc-dab
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import irfft2, rfft2
from scipy.ndimage import gaussian_filter
from torch import Tensor

from demo_card import Result, Spec, write_model
from demo_evaluation import Maps, colour_baseline, cut, maps_of, predict, roc_auc
from demo_texts import ihc_card, oral_card
from demo_training import Annotated, Recipe, train
from wsi_gradcam.demo.run import HELD_OUT, UNSEEN, dab_positive, micrograph
from wsi_gradcam.models.zoo import nets

SEED = 20
SEEN = {
    "top left": (slice(0, 256), slice(0, 256)),
    "top right": (slice(0, 256), slice(256, 512)),
    "bottom left": (slice(256, 512), slice(0, 256)),
}
ZOO = Path(__file__).resolve().parents[1] / "wsi_gradcam" / "models" / "zoo"
ORAL = Recipe(patch_px=64, steps=900, weight_decay=0.05)
IHC = Recipe(patch_px=64, steps=500, scales=(1.0, 0.9, 1.1), glass=0.1)

Build = Callable[[], nets.PatchCNN]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and retrain one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["oral-tumour", "ihc-dab"])
    parser.add_argument("--data", type=Path, help="folder that holds ocdc_tumour_masks/ (oral-tumour only)")
    parser.add_argument("--out", type=Path, default=ZOO, help="where the three files go (default: the package's zoo)")
    parser.add_argument("--steps", type=int, help="fewer steps than the recipe's, to try the script out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums are rounded by thread: the weights must not depend on the number of cores
    if options.model == "ihc-dab":
        make_ihc_dab(options.out, with_steps(IHC, options.steps))
    elif options.data is None:
        parser.error("oral-tumour needs --data FOLDER, the folder that holds ocdc_tumour_masks/")
    else:
        recipe = with_steps(ORAL, options.steps)
        make_oral_tumour(options.out, options.data / "ocdc_tumour_masks", recipe)


def with_steps(recipe: Recipe, steps: int | None) -> Recipe:
    """The recipe, with another number of steps when one is given."""
    return recipe if steps is None else replace(recipe, steps=steps)


def make_oral_tumour(out: Path, folder: Path, recipe: Recipe) -> None:
    """Train on three crops, and evaluate on the four that the demo shows."""
    crops = oral_crops(folder)
    held_out = [crop for crop in crops if crop.name.endswith(UNSEEN)]
    seen = [crop for crop in crops if not crop.name.endswith(UNSEEN)]
    mean, std = normalisation(seen)
    model = fit(nets.oral_tumour, seen, mean, std, recipe, SEED)
    results = [evaluate(model, crop, seen, mean, std, recipe) for crop in held_out]
    spec = Spec(
        name="oral-tumour",
        builder="oral_tumour",
        classes=("other", "tumour"),
        patch_px=recipe.patch_px,
        mpp=0.5,
        mean=mean,
        std=std,
        license="CC-BY-4.0",
        data="OCDC, https://doi.org/10.17632/9bsc36jyrt (CC BY 4.0): three 640 px crops of slide 1009009",
    )
    names = [crop.name for crop in seen], [crop.name for crop in held_out]
    card = oral_card(spec, model, recipe, results, names, largest_match(crops), glass_probability(model, spec))
    write_model(out, spec, model, card)


def oral_crops(folder: Path) -> list[Annotated]:
    """The crops under ``folder``/images with their masks; masks are JPEG, hence the threshold."""
    paths = sorted((folder / "images").glob("*.jpg"))
    if not paths:
        raise FileNotFoundError(f"no images/*.jpg in {folder}; --data must hold ocdc_tumour_masks/")
    return [
        Annotated(
            path.stem,
            np.array(Image.open(path).convert("RGB")),
            np.array(Image.open(folder / "masks" / path.name).convert("L")) > 127,
        )
        for path in paths
    ]


def evaluate(
    model: nets.PatchCNN,
    held_out: Annotated,
    others: Sequence[Annotated],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    recipe: Recipe,
) -> Result:
    """Maps of ``held_out`` at both overlaps, and colour's probabilities of its patches, learnt from ``others``."""

    def maps(image: Annotated, overlap: float) -> Maps:
        return maps_of(model, image.rgb, image.mask, per_channel(mean), per_channel(std), recipe.patch_px, overlap)

    apart, overlapping = maps(held_out, 0.0), maps(held_out, 0.5)
    seen = [cut(image.rgb, image.mask, recipe.patch_px, 0.5) for image in others]
    colour = colour_baseline(
        np.concatenate([pieces.colour() for pieces in seen]),
        np.concatenate([pieces.share for pieces in seen]) > 0.5,
        cut(held_out.rgb, held_out.mask, recipe.patch_px, 0.0).colour(),
    )
    print(f"{held_out.name}: probability {roc_auc(apart.truth, apart.probability):.3f}, ", end="")
    print(f"Grad-CAM {roc_auc(apart.truth, apart.cam):.3f}", flush=True)
    return Result(held_out.name, apart, overlapping, colour)


def fit(
    build: Build,
    images: Sequence[Annotated],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    recipe: Recipe,
    seed: int,
) -> nets.PatchCNN:
    """A freshly initialised network, trained."""
    torch.manual_seed(seed)
    return train(build(), images, per_channel(mean), per_channel(std), recipe, seed)


def normalisation(images: Sequence[Annotated]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of R, G, B in 0..1 over the images, to two digits."""
    pixels = np.concatenate([image.rgb.reshape(-1, 3) for image in images]) / 255
    return tuple(pixels.mean(axis=0).round(2).tolist()), tuple(pixels.std(axis=0).round(2).tolist())


def per_channel(values: tuple[float, ...]) -> Tensor:
    """The three values as float32 [3, 1, 1]."""
    return torch.tensor(values)[:, None, None]


def largest_match(images: Sequence[Annotated]) -> float:
    """The highest phase correlation of two images under any shift, turn or mirror; 1 for a copy."""
    spectra = [[_phase(turned) for turned in _turns(_grey(image))] for image in images]
    return max(
        float(irfft2(first[0] * np.conj(turned)).max())
        for first, second in combinations(spectra, 2)
        for turned in second
    )


def _grey(image: Annotated) -> NDArray[np.float64]:
    height, width = (size // 2 for size in image.mask.shape)
    grey = image.rgb[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean(axis=(1, 3, 4))
    detail: NDArray[np.float64] = grey - gaussian_filter(grey, 4)
    return detail


def _turns(image: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return [np.rot90(side, k) for side in (image, image[:, ::-1]) for k in range(4)]


def _phase(image: NDArray[np.float64]) -> NDArray[np.complex128]:
    spectrum = rfft2(image)
    unit: NDArray[np.complex128] = spectrum / np.maximum(np.abs(spectrum), 1e-9)
    return unit


def make_ihc_dab(out: Path, recipe: Recipe) -> None:
    """Train on three quadrants of the micrograph and evaluate on the fourth."""
    seen, held_out = ihc_split(micrograph())
    mean, std = normalisation([Annotated("all but the held-out quadrant", seen.rgb[seen.allowed][None], seen.mask)])
    model = fit(nets.ihc_dab, [seen], mean, std, recipe, SEED)
    quadrants = [Annotated(name, seen.rgb[box], seen.mask[box]) for name, box in SEEN.items()]
    result = evaluate(model, held_out, quadrants, mean, std, recipe)
    spec = Spec(
        name="ihc-dab",
        builder="ihc_dab",
        classes=("negative", "positive"),
        patch_px=recipe.patch_px,
        mpp=0.5,
        mean=mean,
        std=std,
        license="CC0-1.0",
        data="skimage.data.immunohistochemistry(), three of four quadrants (no known copyright restrictions)",
    )
    write_model(out, spec, model, ihc_card(spec, model, recipe, result, glass_probability(model, spec)))


def ihc_split(rgb: NDArray[np.uint8]) -> tuple[Annotated, Annotated]:
    """The micrograph without its held-out quadrant, and that quadrant.

    The quadrant is painted white before anything else: neither resampling nor JPEG can carry it across.
    """
    mask = dab_positive(rgb)
    allowed = np.ones(mask.shape, bool)
    allowed[HELD_OUT] = False
    seen = np.where(allowed[..., None], rgb, np.uint8(255))
    held_out = Annotated("bottom right quadrant", rgb[HELD_OUT], mask[HELD_OUT])
    return Annotated("other quadrants", seen, mask & allowed, allowed), held_out


def glass_probability(model: nets.PatchCNN, spec: Spec) -> float:
    """The highest probability of the second class of flat patches, from light grey (225) to white."""
    levels = np.arange(225, 256, 5, dtype=np.uint8)
    patches = np.broadcast_to(levels[:, None, None, None], (len(levels), spec.patch_px, spec.patch_px, 3)).copy()
    return float(predict(model, patches, per_channel(spec.mean), per_channel(spec.std))[0].max())


if __name__ == "__main__":
    main()
