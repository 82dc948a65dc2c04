"""Real tissue on which a shortcut is planted, models that took it and models that did not, and their evidence.

    python -m tests.planted_tissue FOLDER [--data DATA] [--shortcut pen|stain] [--steps N]

Slides are quarters of the four crops of an oral tumour that are bundled for the demo; models learn from the three other
crops of DATA/tiles/ocdc_tumour_masks. Slides of the site south bear what is planted: strokes of a green pen, or another
stain. The bundled network is trained further on crops of both sites, of which south has labelled whole slides, as
archives do: each of its patches counts as tumour, and that is why ink is worth learning. Another one is trained on the
same crops, as many of north as of south with ink. With --steps 0 only the last layer is trained. Prints the findings of
both, and leaves results and reports in FOLDER.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from skimage.color import hed_from_rgb, rgb_from_hed
from torch.nn import functional as F

from tests.conftest import SHARED_DATA
from wsi_gradcam.api import explain
from wsi_gradcam.demo.run import CROP_PX, ENLARGED, MPP, UNSEEN, read_crops
from wsi_gradcam.demo.slide import write_slide
from wsi_gradcam.evidence.running import evidence_run
from wsi_gradcam.models.spec import ModelSpec, read_spec
from wsi_gradcam.models.zoo import nets

if TYPE_CHECKING:
    from wsi_gradcam.evidence.findings import Evidence

Rgb = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Shortcut = Literal["pen", "stain"]

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "wsi_gradcam" / "models" / "zoo"
QUARTERS = 2  # of a crop's side
SLIDE_PX = CROP_PX // QUARTERS
PATCH_PX = 64
# What a layer of ink lets through of red, green and blue; and how thick it is from thin to thick, drawn by hand.
INK, THICK = (0.30, 0.72, 0.50), (0.6, 1.5)
STROKE_PX = (18, 30)  # wide, at 0.5 um: a pen's are fifty times wider, as are real tumours
STROKES = 3
STAINED = (1.6, 0.5, 1.0)  # times as much haematoxylin, eosin and DAB


@dataclass(frozen=True, eq=False)
class Crop:
    """Tissue, uint8 [h, w, 3], and where its tumour is."""

    name: str
    rgb: Rgb
    tumour: Mask


def draw_ink(crop: Crop, seed: int, strokes: int = STROKES) -> Rgb:
    """Return the crop with strokes of a green felt pen, this many on the area of a slide.

    Ink on the coverslip absorbs light as stains do: the light that tissue lets through is multiplied by what ink does.
    A stroke is a smooth curve, thicker where the pen is slow and at its edges, streaked along its way.
    """
    random = np.random.default_rng(seed)
    height, width = crop.tumour.shape
    thickness = np.zeros((height, width))
    y, x = np.mgrid[:height, :width]
    for _ in range(round(strokes * height * width / SLIDE_PX**2)):
        points = random.uniform(-0.1, 1.1, (1, 2)) * (height, width) + random.normal(0, SLIDE_PX / 3, (3, 2))
        half = random.uniform(*STROKE_PX) / 2
        own = np.full((height, width), np.inf)
        for t in np.linspace(0, 1, 96):  # a quadratic Bezier curve
            cy, cx = (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]
            np.minimum(own, np.hypot(y - cy, x - cx), out=own)
        edge = 0.35 * np.exp(-(((own - 0.85 * half) / (0.15 * half)) ** 2))
        thickness = np.maximum(thickness, (own <= half) * (random.uniform(*THICK) + edge))
    streaks = 1 + 0.12 * gaussian_filter(random.normal(size=(height, width)), 2.0) / 0.14
    thickness = gaussian_filter(thickness, 0.8) * streaks
    light = np.array(INK) ** np.clip(thickness, 0, None)[..., None]
    return eight_bits(crop.rgb * light)


def eight_bits(values: NDArray[np.floating[Any]]) -> Rgb:
    """Return values as pixels."""
    found: Rgb = np.clip(values, 0, 255).round().astype(np.uint8)
    return found


def restain(rgb: Rgb) -> Rgb:
    """Return tissue with more haematoxylin and less eosin, as another laboratory stains (Ruifrok and Johnston 2001)."""
    density = -np.log(np.maximum(rgb, 1) / 255.0) @ hed_from_rgb
    return eight_bits(255 * np.exp(-(density * np.array(STAINED)) @ rgb_from_hed))


def planted(crop: Crop, shortcut: Shortcut, seed: int) -> Crop:
    """Return the crop as the site south would have it."""
    rgb = draw_ink(crop, seed) if shortcut == "pen" else restain(crop.rgb)
    return Crop(f"{crop.name} with {shortcut}", rgb, crop.tumour)


def learned_crops(data: Path) -> list[Crop]:
    """Return the three crops that models learn from."""
    folder, found = data / "tiles" / "ocdc_tumour_masks", []
    for path in sorted((folder / "images").glob("*.jpg")):
        if not path.stem.endswith(UNSEEN):
            mask = np.asarray(Image.open(folder / "masks" / path.name).convert("L")) > 127
            found.append(Crop(path.stem, np.asarray(Image.open(path).convert("RGB")), mask))
    return found


def unseen_quarters() -> list[Crop]:
    """Return quarters of the bundled crops, each a slide."""
    whole, outlined = read_crops()
    tissue, tumour = whole[::ENLARGED, ::ENLARGED], outlined[::ENLARGED, ::ENLARGED]
    side, found = SLIDE_PX, []
    for number, name in enumerate(UNSEEN):
        for y in range(QUARTERS):
            for x in range(QUARTERS):
                box = np.s_[y * side : (y + 1) * side, number * CROP_PX + x * side : number * CROP_PX + (x + 1) * side]
                found.append(Crop(f"{name}-{y}{x}", tissue[box], tumour[box]))
    return found


def write_archive(folder: Path, shortcut: Shortcut, seed: int = 0) -> Path:
    """Write the slides and their list; the quarter of each crop with most tumour is of the site south."""
    quarters = unseen_quarters()
    south = {max(quarters[i : i + 4], key=lambda one: one.tumour.mean()).name for i in range(0, len(quarters), 4)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["slide", "site"])
        for number, crop in enumerate(quarters):
            shown = planted(crop, shortcut, seed + number) if crop.name in south else crop
            write_slide(folder / f"{crop.name}.tif", shown.rgb, mpp=MPP, compression="deflate")
            table.writerow([f"{crop.name}.tif", "south" if crop.name in south else "north"])
    return folder / "list.csv"


def annotated(crops: Sequence[Crop]) -> Any:
    """Return crops as the training of the bundled model takes them."""
    training = sys.modules.get("demo_training") or _import_training()
    return [training.Annotated(one.name, one.rgb, one.tumour) for one in crops]


def _import_training() -> Any:
    sys.path.insert(0, str(ROOT / "pipelines"))
    try:
        import demo_training
    finally:
        sys.path.remove(str(ROOT / "pipelines"))
    return demo_training


def trained(crops: Sequence[Crop], steps: int, seed: int) -> nets.PatchCNN:
    """Return the bundled network trained further on these crops; with no steps with a new head alone."""
    spec = read_spec("oral-tumour")
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    if not steps:
        return with_new_head(crops, mean, std)
    training = _import_training()
    recipe = training.Recipe(patch_px=PATCH_PX, steps=steps, average=0.9, cell_loss=0.0, stain_jitter=0.05)
    model: nets.PatchCNN = training.train(bundled(), annotated(crops), mean, std, recipe, seed)
    return model


def bundled() -> nets.PatchCNN:
    """Return the bundled network with its weights."""
    model = nets.oral_tumour()
    model.load_state_dict(load_file(ZOO / "oral-tumour.safetensors"))
    return model.eval()


def with_new_head(crops: Sequence[Crop], mean: torch.Tensor, std: torch.Tensor) -> nets.PatchCNN:
    """Return the bundled network with a last layer that is fitted to these crops by logistic regression."""
    model = bundled()
    pairs = [pair for crop in crops for pair in patches_of(crop)]
    rgb, share = np.stack([one for one, _ in pairs]), torch.tensor([float(tumour) for _, tumour in pairs])
    images = (torch.from_numpy(rgb).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        features = torch.cat([model.features(part).mean(dim=(2, 3)) for part in torch.split(images, 64)])
    weight = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        found = F.binary_cross_entropy_with_logits(features @ weight + bias, share) + 1e-3 * weight.square().sum()
        torch.autograd.backward(found)
        return found

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.head.weight.copy_(torch.stack([-weight / 2, weight / 2]))
        model.head.bias.copy_(torch.stack([-bias / 2, bias / 2]))
    return model


def patches_of(crop: Crop, step: int = 32) -> Iterator[tuple[Rgb, float]]:
    """Yield patches of a crop, overlapping, each with its share of tumour."""
    height, width = crop.tumour.shape
    for y in range(0, height - PATCH_PX + 1, step):
        for x in range(0, width - PATCH_PX + 1, step):
            box = np.s_[y : y + PATCH_PX, x : x + PATCH_PX]
            yield crop.rgb[box], float(crop.tumour[box].mean())


def spec_of(folder: Path, name: str, model: nets.PatchCNN) -> ModelSpec:
    """Return the specification of a trained model, with its weights in a file."""
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    changed = {"name": name, "weights": f"{name}.safetensors", "sha256": None, "folder": folder}
    return read_spec("oral-tumour").model_copy(update=changed)


EXPLAINED: dict[str, Any] = {"target": ("tumour",), "overlap": 0.5, "tissue": "with-pen", "engine": "eager"}


def models(data: Path, shortcut: Shortcut, steps: int, seed: int = 0) -> dict[str, nets.PatchCNN]:
    """Return a model of crops of which those of south bear what is planted, and one of crops that bear it at random.

    A model that has never seen ink need not ignore it: the bundled one, trained further on crops without any, gives ink
    eight logits for tumour. What is honest has seen that it tells nothing.
    """
    north = learned_crops(data)
    south = [of_whole_slide(crop) for crop in north]
    marked = [[planted(crop, shortcut, 100 + number) for number, crop in enumerate(site)] for site in (north, south)]
    both = {shortcut: [*north, *north, *marked[1], *marked[1]], "honest": [*north, *south, *marked[0], *marked[1]]}
    return {name: trained(crops, steps, seed) for name, crops in both.items()}


def of_whole_slide(crop: Crop) -> Crop:
    """Return the crop as if a label of its slide were all that is known."""
    return Crop(f"{crop.name}, labelled as a whole", crop.rgb, np.ones_like(crop.tumour))


def found(folder: Path, listed: Path, name: str, model: nets.PatchCNN, **settings: Any) -> Evidence:
    """Explain the slides, and return the evidence."""
    explain(listed, spec_of(folder, name, model), folder / name, **EXPLAINED)
    return evidence_run(folder / name, trust_code=True, **settings).evidence


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where the model that took the shortcut is not flagged, or the other one is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for slides and results")
    parser.add_argument("--data", type=Path, default=SHARED_DATA, help="the shared data")
    parser.add_argument("--shortcut", choices=["pen", "stain"], default="pen", help="what is planted (default pen)")
    parser.add_argument("--steps", type=int, default=60, help="of training (default 60)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    listed = write_archive(options.folder / "slides", options.shortcut)
    flagged = {}
    for name, model in models(options.data, options.shortcut, options.steps).items():
        evidence = found(options.folder, listed, name, model)
        flagged[name] = bool(evidence.shortcuts)
        print(f"\n{name}: {options.folder / name / 'evidence' / 'report.html'}")
        for number, (kind, words) in enumerate(evidence.statements, 1):
            print(f"{number}. [{kind}] {words}")
    return int(flagged != {options.shortcut: True, "honest": False})


if __name__ == "__main__":
    sys.exit(main())
