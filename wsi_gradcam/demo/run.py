"""`wsi-gradcam demo`: the main job on real tissue, with a trained model, and nothing to download.

How well a heatmap agrees with a truth mask.

The micrograph of the demo: real immunohistochemistry from scikit-image, with a pixel truth by colour.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import skimage.data
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata
from skimage.color import rgb2hed

from wsi_gradcam.api import explain
from wsi_gradcam.cli.report import print_outcome
from wsi_gradcam.cli.terminal import progress
from wsi_gradcam.demo.layout import Layout, lay_out
from wsi_gradcam.demo.slide import write_slide
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.local import LocalPath, wrap_write_errors
from wsi_gradcam.results.heatmap import EXPLAINED, HeatmapStore
from wsi_gradcam.results.layout import RunFolder

if TYPE_CHECKING:
    from wsi_gradcam.results.layout import SlideFolder


def majority(mask: NDArray[np.bool_], stride: int) -> NDArray[np.bool_]:
    """Whether most of each `stride` x `stride` cell is True, bool [ceil(h / stride), ceil(w / stride)]."""
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % stride), (0, -width % stride)))
    cells = padded.reshape(padded.shape[0] // stride, stride, padded.shape[1] // stride, stride)
    share: NDArray[np.float64] = cells.mean(axis=(1, 3))
    return share > 0.5


def roc_auc(scores: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of flat `scores` for flat `truth`, ties counting half; nan with one class alone.

    >>> roc_auc(np.array([0.1, 0.4, 0.4, 0.9], np.float32), np.array([False, False, True, True]))
    0.875
    """
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


HELD_OUT = (slice(256, 512), slice(256, 512))
"""Rows and columns of the quadrant that the bundled model never saw: bottom right, a gland in stroma."""

DAB_SIGMA_PX = 3.0
"""Smoothing of the DAB density, so that unstained nuclei (about 10 px wide) belong to their stained cells."""

DAB_THRESHOLD = 0.035
"""Least smoothed density that is positive: the valley between stroma, glass (0.01) and epithelium (0.08)."""

_MAX_DENSITY = 0.3  # pure black decomposes to 1.5 and would spread; the 99th percentile is 0.19


def micrograph() -> NDArray[np.uint8]:
    """RGB, uint8 [512, 512, 3]: colonic glands, FHL2 in brown (DAB), haematoxylin, bare glass at the left.

    Acquired at the Center for Microscopy and Molecular Imaging; no known copyright restrictions. The file
    is in the scikit-image wheel: nothing is downloaded. Its pixel size is not known; the demo takes 0.5 mpp.
    """
    return cast(NDArray[np.uint8], skimage.data.immunohistochemistry())


def dab_positive(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """True where there is DAB, bool [H, W], of an RGB image, uint8 [H, W, 3].

    The DAB channel of colour deconvolution (Ruifrok and Johnston 2001; scikit-image's matrix and units),
    smoothed by ``DAB_SIGMA_PX`` and cut at ``DAB_THRESHOLD``. White has no density and is negative.
    """
    density = np.clip(rgb2hed(rgb)[..., 2], 0.0, _MAX_DENSITY)
    smooth = gaussian_filter(density, DAB_SIGMA_PX)
    return cast(NDArray[np.bool_], smooth > DAB_THRESHOLD)


SIDE_PX, MPP = 8192, 0.5  # the micrograph's pixel size is not known: 0.5 um is assumed
SLIDE_NAME = "ihc-demo.tiff"


def run_demo(slide: str | None, out: Path, workers: int | None = None, mpp: float | None = None) -> bool:
    """Explain `slide` (H&E) with `oral-tumour`, or a slide laid out of an IHC micrograph with `ihc-dab`.

    Everything is written below `out`; prints where, and for the laid-out slide how well the heatmap agrees with
    the truth. Returns whether all went well.

    Raises:
        StoreError: the output cannot be written.
        SlideNotFoundError: there is no such slide.
    """
    started = time.monotonic()
    layout = None
    if slide is None:
        print(f"laying out an IHC slide of {SIDE_PX} x {SIDE_PX} px ...", flush=True)
        path, layout = lay_out_slide(out / SLIDE_NAME)
        model, target, overlap = "ihc-dab", "positive", 0.25
    else:
        path, model, target, overlap = Path(slide), "oral-tumour", "tumour", 0.5
    results = RunFolder(LocalPath(out / model))
    with progress(quiet=False) as listener:
        outcome = explain(
            path,
            model,
            results.place,
            workers=workers,
            overwrite=True,
            listener=listener,
            target=[target],
            overlap=overlap,
            mpp=mpp,
            replace_mpp=mpp is not None,
        )
    print_outcome(outcome, as_json=False)
    if outcome.failed:
        return False
    folder = results.slide(outcome.records[0].slide.id)
    print(f"\n  picture  {folder.overview}\n  heatmap  {folder.heatmap}\n  table    {folder.table}")
    print(f"  to look  {_command()} view {results.place}")
    if layout is not None:
        _print_agreement(folder, layout)
    print(f"\nall of it took {time.monotonic() - started:.0f} s")
    return True


def lay_out_slide(path: Path) -> tuple[Path, Layout]:
    """Write the demo's slide to `path`: the micrograph on glass, a tiled pyramidal TIFF."""
    rgb, layout = lay_out(micrograph(), (SIDE_PX, SIDE_PX))
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_slide(path, rgb, mpp=MPP)
    return path, layout


def _command() -> str:
    """The command line as this user calls it: `make` has it in `.venv`."""
    return sys.argv[0] if Path(sys.argv[0]).name == "wsi-gradcam" else "wsi-gradcam"


def _print_agreement(folder: SlideFolder, layout: Layout) -> None:
    print("\nagreement with the DAB stain (truth by colour deconvolution), ROC AUC per 16 px:")
    rows = agreement(folder, layout)
    width = max(len(label) for label in rows)
    print(f"  {'':{width}}  held-out quadrant  all tissue")
    for label, (held_out, everywhere) in rows.items():
        print(f"  {label:{width}}  {held_out:17.3f}  {everywhere:10.3f}")
    print("  the model never saw the held-out quadrant of the micrograph")


def agreement(folder: SlideFolder, layout: Layout) -> dict[str, tuple[float, float]]:
    """By channel: ROC AUC against the truth where the tissue shows the held-out quadrant, and everywhere."""
    heatmap = HeatmapStore(folder.heatmap)
    whole = Region(0, 0, *heatmap.shapes[0])
    stride = -(-layout.size[0] // whole.height)
    held_out_source = np.zeros(layout.source_size, np.bool_)
    held_out_source[HELD_OUT] = True
    truth = _cells(layout, dab_positive(micrograph()), stride)
    tissue = majority(layout.tissue(), stride) & ((heatmap.read_flags(0, whole) & EXPLAINED) > 0)
    held_out = tissue & _cells(layout, held_out_source, stride)
    labels = [channel["label"] for channel in heatmap.attributes["ome"]["omero"]["channels"]]
    rows = {}
    for number, label in enumerate(labels):
        values = heatmap.read(0, number, whole)
        rows[label] = roc_auc(values[held_out], truth[held_out]), roc_auc(values[tissue], truth[tissue])
    return rows


def _cells(layout: Layout, source: NDArray[np.bool_], stride: int) -> NDArray[np.bool_]:
    painted: NDArray[np.bool_] = layout.paint(source, False)
    return majority(painted, stride)
