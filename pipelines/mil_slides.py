"""Slides of which only a label is known, made from annotated crops of H&E.

A crop is cut into windows with tumour (more than half of the mask) and free of it (not a single pixel). A slide is a
mosaic of windows on glass: one with tumour has windows of both kinds, one without has only those free of tumour. Both
come from the same crops, so that neither stain nor scanner gives them away.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo_training import Mask, Rgb
from wsi_gradcam.demo.slide import GLASS_RGB, write_slide

WINDOW_PX = 64  # of a crop, which is what a patch covers
FRAME_PX = 64  # glass around the tissue
GLASS = 225  # the darkest channel of glass
FEWEST = 4  # windows of a kind, for slides to differ
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
PLACE = re.compile(r"(?P<patient>.+?)[_-]r\d+[_-]?c\d+$")  # 1009009_r18c0: a slide, row and column in it


@dataclass(frozen=True)
class Crop:
    """A crop of a slide with its mask of tumour; of crops whose patient is not known each is a patient."""

    name: str
    patient: str
    rgb: Rgb
    mask: Mask


def read_crops(folder: Path) -> list[Crop]:
    """The crops in ``folder``/images, each with the mask of its name in ``folder``/masks (JPEG, hence the threshold).

    Raises:
        FileNotFoundError: there are none, or one has no mask.
        ValueError: a crop and its mask differ in size, or a crop is smaller than a window.
    """
    images = sorted(path for path in (folder / "images").glob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise FileNotFoundError(f"no images in {folder / 'images'}; expected {', '.join(sorted(SUFFIXES))}")
    masks = {path.stem: path for path in (folder / "masks").glob("*") if path.suffix.lower() in SUFFIXES}
    return [_read_crop(path, masks.get(path.stem), folder / "masks") for path in images]


def _read_crop(path: Path, mask_path: Path | None, masks: Path) -> Crop:
    if mask_path is None:
        raise FileNotFoundError(f"{path}: has no mask; expected a picture named {path.stem} in {masks}")
    rgb, levels = np.array(Image.open(path).convert("RGB")), np.array(Image.open(mask_path).convert("L"))
    if levels.shape != rgb.shape[:2]:
        raise ValueError(f"{path}: is {rgb.shape[:2]} px, its mask {levels.shape}; expected the same (height, width)")
    if min(levels.shape) < WINDOW_PX:
        raise ValueError(f"{path}: is {levels.shape} px, expected at least {WINDOW_PX} px on each side")
    place = PLACE.match(path.stem)
    patient = place["patient"] if place else path.stem
    return Crop(path.stem, patient, rgb, levels > (127 if levels.max() > 1 else 0))


def windows(crop: Crop, tumour: bool, count: int, random: np.random.Generator) -> list[Rgb]:
    """Up to ``count`` windows [64, 64, 3] of a kind, turned and mirrored; none where the crop has too few places.

    Windows that are mostly glass are left out.
    """
    share, tissue = _share(crop.mask), _share(crop.rgb.min(axis=2) < GLASS)
    places = np.argwhere(((share > 0.5) if tumour else (share == 0)) & (tissue > 0.5))
    if len(places) < FEWEST:
        return []
    chosen = places[random.choice(len(places), min(count, len(places)), replace=False)]
    return [_turned(crop.rgb[y : y + WINDOW_PX, x : x + WINDOW_PX], random) for y, x in chosen]


def _share(mask: Mask) -> NDArray[np.float64]:
    """The share of the window at each place that is true."""
    total = np.pad(mask.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    side = WINDOW_PX
    inside = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    shares: NDArray[np.float64] = inside / side**2
    return shares


def _turned(window: Rgb, random: np.random.Generator) -> Rgb:
    turned = np.rot90(window, int(random.integers(4)))
    return turned[:, ::-1].copy() if random.integers(2) else turned.copy()


@dataclass(frozen=True)
class Drawn:
    """A slide as rows of the pools of windows: ``rows`` [n], and whether each of them is of tumour [n]."""

    rows: NDArray[np.int64]
    is_tumour: Mask

    @property
    def label(self) -> bool:
        """True for a slide with tumour."""
        return bool(self.is_tumour.any())


def draw_slides(
    pools: tuple[Sequence[NDArray[np.int64]], Sequence[NDArray[np.int64]]],
    count: int,
    random: np.random.Generator,
    sizes: tuple[int, int] = (24, 64),
) -> Iterator[Drawn]:
    """Draw ``count`` slides, every second with tumour in 5 to 60% of its windows.

    Args:
        pools: rows of windows free of tumour, and of tumour, a list of crops each; a slide takes windows of all.
        count: slides.
        random: source of chance.
        sizes: fewest and most windows of a slide.
    """
    for number in range(count):
        size = int(random.integers(sizes[0], sizes[1] + 1))
        of_tumour = max(1, round(size * random.uniform(0.05, 0.6))) if number % 2 else 0
        kinds = np.arange(size) < of_tumour
        of_kind = [pools[int(kind)] for kind in kinds]
        rows = [int(random.choice(crops[int(random.integers(len(crops)))])) for crops in of_kind]
        yield Drawn(np.array(rows), kinds)


def mosaic(pieces: Sequence[Rgb], kinds: Mask, random: np.random.Generator) -> tuple[Rgb, Mask]:
    """Windows in random order as near to a square as they go, on glass, and where tumour is."""
    columns = int(np.ceil(np.sqrt(len(pieces))))
    rows = -(-len(pieces) // columns)
    rgb, mask = _glass((rows * WINDOW_PX, columns * WINDOW_PX))
    for place, number in enumerate(random.permutation(len(pieces))):
        y, x = (FRAME_PX + WINDOW_PX * each for each in divmod(place, columns))
        rgb[y : y + WINDOW_PX, x : x + WINDOW_PX] = pieces[number]
        mask[y : y + WINDOW_PX, x : x + WINDOW_PX] = kinds[number]
    return rgb, mask


def _glass(size: tuple[int, ...]) -> tuple[Rgb, Mask]:
    height, width = size[0] + 2 * FRAME_PX, size[1] + 2 * FRAME_PX
    random = np.random.default_rng(0)
    noise = np.rint(random.normal(GLASS_RGB, 1.5, (height, width, 3)))
    return np.clip(noise, 0, 255).astype(np.uint8), np.zeros((height, width), np.bool_)


def save_slide(path: Path, rgb: Rgb, mask: Mask, mpp: float) -> None:
    """Write a slide as a pyramidal TIFF, and its mask beside it as NAME-mask.png."""
    write_slide(path, rgb, mpp=mpp)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path.with_name(f"{path.stem}-mask.png"))
