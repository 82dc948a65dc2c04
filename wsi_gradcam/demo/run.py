"""`wsi-gradcam demo`: the main job on real tissue, with a trained model, and nothing to download."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.api import explain
from wsi_gradcam.demo.agreement import majority, roc_auc
from wsi_gradcam.demo.ihc import HELD_OUT, dab_positive, micrograph
from wsi_gradcam.demo.layout import Layout, lay_out
from wsi_gradcam.demo.slide import write_slide
from wsi_gradcam.geometry import Region
from wsi_gradcam.report import print_outcome
from wsi_gradcam.stores.files import storing
from wsi_gradcam.stores.heatmap import EXPLAINED, HeatmapStore
from wsi_gradcam.stores.layout import RunFolder
from wsi_gradcam.stores.places import LocalPlace
from wsi_gradcam.terminal import progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.stores.layout import SlideFolder

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
    results = RunFolder(LocalPlace(out / model))
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
    with storing(path):
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
