"""Archives in which the evidence is planted, and evidence that is found in them, for tests."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.planted import GREEN, MARKER_PX, SIDE_PX, Green, Patches, Rgb, features, patches, trained
from tests.runs import SMALL, toy_spec
from tests.toy_models import PooledLinear
from wsi_gradcam.api import explain
from wsi_gradcam.demo.slide import write_slide
from wsi_gradcam.models.spec import ModelSpec

ROWS, COLUMNS = 3, 4  # of patches on a slide
CHANNELS = 12  # of what was learned
BRIGHTER = 200.0  # makes green as large as what was learned
MARKER_GREEN = BRIGHTER * 100 / 127.5 * MARKER_PX**2 / SIDE_PX**2  # mean of `Green` in a patch with a marker


class Both(nn.Module):
    """Features that were learned, and the green of each cell, which nothing else gives."""

    def __init__(self) -> None:
        super().__init__()
        self.learned, self.green = features(), Green()

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.learned(images), BRIGHTER * self.green(images)], dim=1)


def network() -> nn.Module:
    """The network whose weights are planted: what it sees of nuclei and what of markers are channels of their own."""
    return PooledLinear(Both(), CHANNELS + 1)


def planted(trained: PooledLinear, marker: float) -> nn.Module:
    """A network that looks at what a trained one does, and calls tumour what holds a marker: so many logits for it."""
    found = PooledLinear(Both(), CHANNELS + 1)
    state = {name.replace("features.", "features.learned."): value for name, value in trained.state_dict().items()}
    weight = torch.tensor([[0.0], [marker / MARKER_GREEN]])
    found.load_state_dict({**state, "fc.weight": torch.cat([state["fc.weight"], weight], dim=1)})
    return found.eval()


def of_nuclei(seed: int) -> nn.Module:
    """A network that looks at nuclei, and not at markers."""
    return planted(trained(seed=seed), 0.0)


def of_nuclei_and_marker(seed: int) -> nn.Module:
    """A network that looks at nuclei, and at markers."""
    return planted(trained(seed=seed), 6.0)


def of_nothing(seed: int) -> nn.Module:
    """The network as it begins."""
    torch.manual_seed(seed)
    return network().eval()


def model_file(folder: Path, module: nn.Module) -> ModelSpec:
    """The specification of a trained network, with its weights in a file."""
    save_file(module.state_dict(), folder / "weights.safetensors")
    spec = toy_spec("network", source="tests.evidence_runs:network", weights="weights.safetensors")
    return spec.model_copy(
        update={"folder": folder, "mean": (0.5,) * 3, "std": (0.5,) * 3, "classes": ("other", "tumour")}
    )


def write_archive(folder: Path, slides: int, marked: int, seed: int) -> Path:
    """Slides of patches of both classes, two of each patient; `marked` of them, all of site south, bear markers."""
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["slide", "site", "patient"])
        for number in range(slides):
            has_marker = number < marked
            sample = patches(ROWS * COLUMNS, 100 * seed + number)
            rgb = with_markers(sample, number) if has_marker else sample.rgb
            grid = rgb.reshape(ROWS, COLUMNS, SIDE_PX, SIDE_PX, 3).swapaxes(1, 2)
            name = f"{number:03d}.tif"
            write_slide(
                folder / name, grid.reshape(ROWS * SIDE_PX, COLUMNS * SIDE_PX, 3), mpp=0.5, compression="deflate"
            )
            table.writerow([name, "south" if has_marker else "north", f"p{number // 2}"])
    return folder / "list.csv"


BAG_ROWS, BAG_COLUMNS = 4, 5  # of patches on a slide of a slide-level model
FOCUS = 6  # patches with nuclei on a slide of tumour


class Encoder(nn.Module):
    """What a network of nuclei and markers sees of a patch: the means over its cells, the last of them of green."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Both()

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.features(images).mean(dim=(2, 3)))


def encoder() -> nn.Module:
    """The encoder whose weights are planted."""
    return Encoder()


def slide_model_file(folder: Path, module: nn.Module) -> Path:
    """A slide-level model, whose answer is the mean of what a network says to patches: all have the same attention."""
    weights = module.state_dict()
    save_file({k: v for k, v in weights.items() if k.startswith("features.")}, folder / "encoder.safetensors")
    aggregator = {
        "attention.0.weight": torch.zeros(3, CHANNELS + 1),
        "attention.0.bias": torch.zeros(3),
        "attention.2.weight": torch.zeros(1, 3),
        "attention.2.bias": torch.zeros(1),
        "classifier.weight": weights["fc.weight"],
        "classifier.bias": weights["fc.bias"],
    }
    torch.save(aggregator, folder / "abmil.pt")
    values: dict[str, Any] = {
        "name": "slides of nuclei",
        "encoder": {
            **{"source": "tests.evidence_runs:encoder", "weights": "encoder.safetensors", "layer": "features"},
            **{"patch_px": SIDE_PX, "mpp": 0.5, "mean": [0.5] * 3, "std": [0.5] * 3},
        },
        "aggregator": {"source": "abmil", "weights": "abmil.pt"},
        "classes": ["other", "tumour"],
    }
    (folder / "slides.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "slides.yaml"


def write_bags(folder: Path, slides: int, marked: int, seed: int) -> Path:
    """Slides with a focus of nuclei, but for two; the first ones, of site south, have markers on half of it."""
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["slide", "site", "label"])
        for number in range(slides):
            south, tumour = number < marked, number < slides - 2
            sample = patches(2 * BAG_ROWS * BAG_COLUMNS, 100 * seed + number)
            rgb = with_markers(sample, number) if south else sample.rgb
            grid = sample.rgb[sample.label == 0].copy()
            if tumour:
                grid[:FOCUS] = sample.rgb[sample.label == 1][:FOCUS]
                grid[: FOCUS // 2] = rgb[sample.label == 1][: FOCUS // 2]
            grid = grid.reshape(BAG_ROWS, BAG_COLUMNS, SIDE_PX, SIDE_PX, 3).swapaxes(1, 2)
            name, size = f"{number:03d}.tif", (BAG_ROWS * SIDE_PX, BAG_COLUMNS * SIDE_PX, 3)
            write_slide(folder / name, grid.reshape(size), mpp=0.5, compression="deflate")
            table.writerow([name, "south" if south else "north", "tumour" if tumour else "other"])
    return folder / "list.csv"


def with_markers(sample: Patches, seed: int) -> Rgb:
    """Patches of which those of tumour have a green square, beside the nucleus."""
    random, rgb = np.random.default_rng(seed), sample.rgb.copy()
    for i in np.flatnonzero(sample.label):
        y, x = (int(axis.mean()) for axis in np.nonzero(sample.disc[i]))
        top, left = (int(random.integers(1, 8)) + (17 if c < SIDE_PX // 2 else 0) for c in (y, x))
        rgb[i, top : top + MARKER_PX, left : left + MARKER_PX] = GREEN
    return rgb


def explained(listed: Path, spec: ModelSpec, out: Path, **settings: Any) -> Path:
    """The slides of a list, explained for tumour."""
    explain(listed, spec, out, **{**SMALL, "target": ("tumour",), **settings})
    return out
