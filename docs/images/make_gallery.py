"""Makes the pictures of docs/gallery.md: `make demo`, then `python docs/images/make_gallery.py demo-output`.

All are of the demo's slide and of the bundled model, by the package's own functions; small PNGs of few colours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

import wsi_gradcam
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.results.display import Colouring
from wsi_gradcam.results.heatmap import EXPLAINED
from wsi_gradcam.results.overview import COLOURS, OPACITY, TISSUE_GRAY, round_length
from wsi_gradcam.results.slide import SlideResult
from wsi_gradcam.slides.resample import read_region

HERE = Path(__file__).parent
METHODS = ("gradcam", "layercam", "eigencam", "gradient", "integrated_gradients", "guided_backprop")
PATCH_PX, MPP = 256, 0.5
FIELD = (320, 640, 768, 768)  # y, x, height, width in level-0 px: a border of the tumour in the first piece
HIGHEST = 4.0  # logits, of the colours of all maps in logits


def main(out: str) -> None:
    """Write methods.png, overlap.png and patches.png beside this file."""
    result = wsi_gradcam.open_result(Path(out) / "oral-cancer")
    slide = result["oral-cancer.tiff"]
    draw_methods(slide)
    draw_overlap(slide, Path(out) / "oral-cancer.tiff", Path(out) / "gallery")
    draw_patches(slide)


def draw_methods(slide: SlideResult) -> None:
    """Draw one field of tissue by six methods, each in its own window."""
    model = wsi_gradcam.load_model("oral-tumour")
    pixels = pixels_of(slide, *place_of_border(slide), PATCH_PX, PATCH_PX)
    images = model.prepare(torch.from_numpy(pixels.copy())[None])
    found = wsi_gradcam.GradCAM(model, method=",".join(METHODS))(images, targets="tumour")
    figure, axes = plt.subplots(1, len(METHODS) + 1, figsize=(14, 2.4))
    show_tissue(axes[0], pixels, "tissue")
    for axis, method in zip(axes[1:], METHODS, strict=True):
        values = found.by_method[method][0, 0].numpy()
        show_map(axis, pixels, values, float(np.quantile(np.abs(values), 0.995)), METHOD_INFO[method].title)
    save(figure, axes, "methods.png")


def pixels_of(slide: SlideResult, y: float, x: float, height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Return tissue at `MPP` from level-0 px (y, x) on."""
    opened = slide.open_slide()
    try:
        return read_region(opened, y, x, height_px, width_px, MPP)
    finally:
        opened.close()


def place_of_border(slide: SlideResult) -> tuple[float, float]:
    """Return level-0 px of a field's corner around the patch whose map varies most: there tumour ends."""
    patches = slide.patches
    row = patches.loc[(patches["cam_max_tumour"] - patches["cam_mean_tumour"]).idxmax()]
    half = PATCH_PX * MPP / slide.mpp[0] / 2
    return float(row["y"]) - half, float(row["x"]) - half


def draw_overlap(slide: SlideResult, path: Path, out: Path) -> None:
    """Draw a field of the slide, and its heatmap without and with overlap."""
    y, x, height, width = FIELD
    scale = slide.mpp[0] / MPP
    pixels = pixels_of(slide, y, x, round(height * scale), round(width * scale))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.7))
    show_tissue(axes[0], pixels, "tissue")
    for axis, overlap in zip(axes[1:], (0.0, 0.5), strict=True):
        folder = out / f"overlap-{overlap}"
        wsi_gradcam.explain(path, "oral-tumour", folder, target="tumour", overlap=overlap)
        shown = wsi_gradcam.open_result(folder)[path.name]
        step = shown.stride_px
        heat = shown.heatmap("tumour")[y // step : (y + height) // step, x // step : (x + width) // step]
        show_map(axis, pixels, np.asarray(heat, np.float32), HIGHEST, f"--overlap {overlap:g}")
    add_colour_bar(figure, axes)
    save(figure, axes, "overlap.png")


def draw_patches(slide: SlideResult, count: int = 8) -> None:
    """Draw patches with high logits, each above its own map."""
    numbers = slide.patches.nlargest(40, "logit_tumour").index[:: 40 // count]
    figure, axes = plt.subplots(2, count, figsize=(13, 3.4))
    for column, number in enumerate(numbers):
        pixels, cam = slide.patch_image(int(number)), slide.cam(int(number), "tumour")
        show_tissue(axes[0, column], pixels, f"{slide.patches.loc[number, 'logit_tumour']:.1f} logits", column == 0)
        show_map(axes[1, column], pixels, np.asarray(cam, np.float32), HIGHEST, "")
    add_colour_bar(figure, axes)
    save(figure, axes.ravel(), "patches.png")


def show_tissue(axis: Axes, pixels: NDArray[np.uint8], title: str, bar: bool = True) -> None:
    """Show tissue at `MPP`, with a scale bar below it."""
    axis.imshow(pixels)
    axis.set_title(title, fontsize=9)
    if bar:
        height, width = pixels.shape[:2]
        length_um = round_length(width * MPP / 3)
        y = height * 1.035
        axis.plot([0, length_um / MPP], [y, y], color="black", linewidth=2.5, solid_capstyle="butt", clip_on=False)
        axis.text(length_um / MPP + width * 0.02, y, f"{length_um:g} µm", fontsize=8, va="center", clip_on=False)
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)


def show_map(axis: Axes, pixels: NDArray[np.uint8], values: NDArray[np.float32], high: float, title: str) -> None:
    """Show a map in the colours of overview.png, over the tissue in gray."""
    height, width = pixels.shape[:2]
    place = (0, width, height, 0)
    axis.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=255, extent=place)
    flags = np.full(values.shape, EXPLAINED, np.uint8)
    axis.imshow(colouring(high).rgba(values, flags), extent=place, interpolation="nearest")
    axis.set_title(title, fontsize=9)


def colouring(high: float) -> Colouring:
    """Return the colours of values from 0 to `high`."""
    return Colouring(COLOURS.name, 0.0, high, alpha=OPACITY)


def add_colour_bar(figure: Figure, axes: NDArray[np.object_]) -> None:
    """Add a bar of the colours of logits, as they look over gray tissue."""
    values = np.linspace(0, HIGHEST, 256, dtype=np.float32)[:, None]
    rgba = colouring(HIGHEST).rgba(values, np.full(values.shape, EXPLAINED, np.uint8))[:, 0] / 255
    seen = rgba[:, :3] * rgba[:, 3:] + TISSUE_GRAY / 255 * (1 - rgba[:, 3:])
    norm = Normalize(0, HIGHEST)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(seen)), ax=axes, extend="both", pad=0.015, aspect=25)
    bar.set_label("logits", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def save(figure: Figure, axes: Sequence[Axes] | NDArray[np.object_], name: str) -> None:
    """Write a figure without ticks, in 256 colours."""
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(HERE / name, dpi=100, bbox_inches="tight")
    plt.close(figure)
    keep(Image.open(HERE / name), name, 1400)


def keep(picture: Image.Image, name: str, wide: int) -> None:
    """Write a picture no wider than `wide` px, in 256 colours: a third of the bytes."""
    picture = picture.convert("RGB")
    picture.thumbnail((wide, wide))
    picture.quantize(256).save(HERE / name, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
