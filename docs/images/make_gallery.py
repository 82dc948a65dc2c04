"""Makes the pictures of docs/gallery.md: `make demo`, then `python docs/images/make_gallery.py demo-output`.

All are of the demo's slide and of the bundled model, by the package's own functions; small PNGs of few colours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import wsi_gradcam
from wsi_gradcam.results.slide import SlideResult
from wsi_gradcam.slides.resample import read_region

HERE = Path(__file__).parent
METHODS = ("gradcam", "layercam", "eigencam", "gradient", "integrated_gradients", "guided_backprop")
PATCH_PX, MPP = 256, 0.5
COLOURS = "magma"


def main(out: str) -> None:
    """Write methods.png, overlap.png and patches.png beside this file."""
    result = wsi_gradcam.open_result(Path(out) / "oral-cancer")
    slide = result["oral-cancer.tiff"]
    draw_methods(slide)
    draw_overlap(Path(out) / "oral-cancer.tiff", Path(out) / "gallery")
    draw_patches(slide)


def draw_methods(slide: SlideResult) -> None:
    """Draw one field of tissue by six methods, each in its own window."""
    model = wsi_gradcam.load_model("oral-tumour")
    opened = slide.open_slide()
    pixels = read_region(opened, *place_of_border(slide), PATCH_PX, PATCH_PX, MPP)
    opened.close()
    images = model.prepare(torch.from_numpy(pixels.copy())[None])
    found = wsi_gradcam.GradCAM(model, method=",".join(METHODS))(images, targets="tumour")
    figure, axes = plt.subplots(1, len(METHODS) + 1, figsize=(14, 2.4))
    axes[0].imshow(pixels)
    axes[0].set_title("tissue", fontsize=9)
    for axis, method in zip(axes[1:], METHODS, strict=True):
        values = found.by_method[method][0, 0].numpy()
        axis.imshow(pixels)
        high = np.quantile(np.abs(values), 0.995)
        place = (0, PATCH_PX, PATCH_PX, 0)
        axis.imshow(np.clip(values, 0, None), extent=place, cmap=COLOURS, vmin=0, vmax=high, alpha=0.6)
        axis.set_title(method, fontsize=9)
    save(figure, axes, "methods.png")


def place_of_border(slide: SlideResult) -> tuple[float, float]:
    """Return level-0 px of a field's corner around the patch whose map varies most: there tumour ends."""
    patches = slide.patches
    row = patches.loc[(patches["cam_max_tumour"] - patches["cam_mean_tumour"]).idxmax()]
    half = PATCH_PX * MPP / slide.mpp[0] / 2
    return float(row["y"]) - half, float(row["x"]) - half


def draw_overlap(slide: Path, out: Path) -> None:
    """Draw a part of the slide's heatmap without and with overlap."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, overlap in zip(axes, (0.0, 0.5), strict=True):
        folder = out / f"overlap-{overlap}"
        wsi_gradcam.explain(slide, "oral-tumour", folder, target="tumour", overlap=overlap)
        heat = wsi_gradcam.open_result(folder)[slide.name].heatmap("tumour", masked=True)
        axis.imshow(heat[:96, :140], cmap=COLOURS, vmin=0, vmax=4)
        axis.set_title(f"--overlap {overlap:g}", fontsize=9)
    save(figure, axes, "overlap.png")


def draw_patches(slide: SlideResult, count: int = 8) -> None:
    """Draw the patches with the highest logits, each above its own map."""
    numbers = slide.patches.nlargest(40, "logit_tumour").index[:: 40 // count]
    figure, axes = plt.subplots(2, count, figsize=(12, 3.2))
    for column, number in enumerate(numbers):
        pixels, cam = slide.patch_image(int(number)), slide.cam(int(number), "tumour")
        axes[0, column].imshow(pixels)
        axes[0, column].set_title(f"{slide.patches.loc[number, 'logit_tumour']:.1f} logits", fontsize=8)
        axes[1, column].imshow(cam, cmap=COLOURS, vmin=0, vmax=7)
    save(figure, axes.ravel(), "patches.png")


def save(figure: plt.Figure, axes: NDArray[np.object_], name: str) -> None:
    """Write a figure without ticks, in 128 colours."""
    for axis in axes:
        axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    figure.savefig(HERE / name, dpi=100, bbox_inches="tight")
    plt.close(figure)
    keep(Image.open(HERE / name), name, 1400)


def keep(picture: Image.Image, name: str, wide: int) -> None:
    """Write a picture no wider than `wide` px, in 128 colours: a third of the bytes."""
    picture = picture.convert("RGB")
    picture.thumbnail((wide, wide))
    picture.quantize(128).save(HERE / name, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
