"""The examples of `wsi-gradcam demo`, and how well a heatmap agrees with what is known about them.

One is an H&E slide made from four crops of an oral tumour, on which pathologists outlined the tumour; one is an
immunohistochemistry slide made from scikit-image's micrograph, whose brown stain is the truth for each pixel; and one
is the user's own H&E slide.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata
from skimage.color import rgb2hed

from wsi_gradcam.api import explain
from wsi_gradcam.audit.running import audit_run
from wsi_gradcam.demo.slide import Layout, lay_out, paint_slide, plan_cores, write_slide
from wsi_gradcam.export.geojson import annotation_features, write_features
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.local import LocalPath, wrap_write_errors
from wsi_gradcam.results.heatmap import EXPLAINED, HeatmapStore
from wsi_gradcam.results.run_files import RunFolder

if TYPE_CHECKING:
    from wsi_gradcam.api import Outcome
    from wsi_gradcam.audit.running import AuditOutcome
    from wsi_gradcam.results.run_files import SlideFolder
    from wsi_gradcam.run.types import RunListener

CROPS = Path(__file__).parent / "crops"
CROP_PX, MPP = 640, 0.5  # neither the crops' pixel size nor the micrograph's is recorded: 0.5 um is assumed
ENLARGED = 2  # crops are laid out at 0.25 um, as most scanners see tissue
HE_NAME, HE_SIZE = "oral-cancer.tiff", (1536, 8192)
UNSEEN = ("r27c5", "r31c0", "r35c4", "r41c2")
"""The crops that the bundled model `oral-tumour` never saw."""

SIDE_PX, SLIDE_NAME = 8192, "ihc-demo.tiff"

HELD_OUT = (slice(256, 512), slice(256, 512))
"""Rows and columns of the quadrant that the bundled model never saw: bottom right, a gland in stroma."""

DAB_SIGMA_PX = 3.0
"""Smoothing of the DAB density, so that unstained nuclei (about 10 px wide) belong to their stained cells."""

DAB_THRESHOLD = 0.035
"""Least smoothed density that is positive: the valley between stroma, glass (0.01) and epithelium (0.08)."""

MAX_DENSITY = 0.3  # pure black decomposes to 1.5 and would spread; the 99th percentile is 0.19


@dataclass(frozen=True)
class Example:
    """A slide to explain, with the model and settings that suit it.

    Attributes:
        slide: the slide's file.
        out: the folder of the results.
        model, target: the bundled model and the class that is explained.
        overlap: share of a patch that its neighbour covers too.
        layout: layout of a slide that was made here; None for the user's own slide.
        outlines: GeoJSON of what pathologists outlined on it, if any.
    """

    slide: Path
    out: RunFolder
    model: str
    target: str
    overlap: float
    layout: Layout | None = None
    outlines: Path | None = None


@dataclass(frozen=True)
class Agreement:
    """How well the channels of a heatmap agree with a truth.

    Attributes:
        truth: what is taken as the truth, in words.
        where: names of the parts of the slide.
        auc: by channel, the area under the ROC curve in each part, with heatmap pixels as cases.
        note: what one must know to read it.
    """

    truth: str
    where: tuple[str, ...]
    auc: dict[str, tuple[float, ...]]
    note: str


def make_he_example(out: Path) -> Example:
    """Write the H&E slide and its outlines below `out`, and return it for the model that finds oral tumours.

    Raises:
        StoreError: the output cannot be written.
    """
    tissue, tumour = read_crops()
    layout = plan_cores(len(UNSEEN), CROP_PX * ENLARGED, HE_SIZE)
    path = out / HE_NAME
    outlines = path.with_suffix(".geojson")
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_slide(path, paint_slide(layout, tissue), mpp=MPP / ENLARGED)
        write_features(outlines, annotation_features(layout.paint(tumour, False), "tumour"))
    return Example(path, RunFolder(LocalPath(out / "oral-cancer")), "oral-tumour", "tumour", 0.5, layout, outlines)


def read_crops() -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the unseen crops side by side and enlarged, RGB uint8 [h, n * h, 3], and the mask of their tumour, bool.

    From the OCDC data set, https://doi.org/10.17632/9bsc36jyrt (CC BY 4.0); masks are JPEG, thresholded at half of 255.
    """
    side = CROP_PX * ENLARGED
    opened = [[Image.open(CROPS / f"{name}-{kind}.jpg") for name in UNSEEN] for kind in ("tissue", "mask")]
    tissue = [np.asarray(one.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for one in opened[0]]
    tumour = [np.asarray(one.convert("L").resize((side, side), Image.Resampling.BILINEAR)) > 127 for one in opened[1]]
    return np.concatenate(tissue, axis=1), np.concatenate(tumour, axis=1)


AUDITED = 60  # patches of a brief audit


def make_ihc_example(out: Path) -> Example:
    """Write the immunohistochemistry slide below `out`, and return it for the model that finds DAB.

    Raises:
        StoreError: the output cannot be written.
    """
    path, layout = lay_out_slide(out / SLIDE_NAME)
    return Example(path, RunFolder(LocalPath(out / "ihc-dab")), "ihc-dab", "positive", 0.25, layout)


def given_example(slide: Path, out: Path) -> Example:
    """Return the user's own H&E slide, for the model that finds oral tumours."""
    return Example(slide, RunFolder(LocalPath(out / "oral-tumour")), "oral-tumour", "tumour", 0.5)


def explain_example(example: Example, workers: int | None, mpp: float | None, listener: RunListener) -> Outcome:
    """Explain the slide, even if it was explained before; `mpp` replaces the micrometres per pixel of its file.

    Raises:
        StoreError: the output cannot be written.
        SlideNotFoundError: there is no such slide.
    """
    return explain(
        example.slide,
        example.model,
        example.out.place,
        workers=workers,
        overwrite=True,
        listener=listener,
        target=[example.target],
        overlap=example.overlap,
        mpp=mpp,
        replace_mpp=mpp is not None,
        outlines=example.outlines,
    )


def audit_example(example: Example) -> AuditOutcome:
    """Briefly audit the explanations of an outlined slide: are they faithful, and do they agree with the outlines?"""
    return audit_run(
        example.out.place,
        target=example.target,
        annotations=example.outlines,
        patches=AUDITED,
        only=("faithfulness", "plausibility"),
        overwrite=True,
    )


def lay_out_slide(path: Path) -> tuple[Path, Layout]:
    """Write the micrograph on glass as a tiled pyramidal TIFF, and return its path and layout."""
    rgb, layout = lay_out(micrograph(), (SIDE_PX, SIDE_PX))
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_slide(path, rgb, mpp=MPP)
    return path, layout


def micrograph() -> NDArray[np.uint8]:
    """Return the micrograph, RGB uint8 [512, 512, 3]: colonic glands, FHL2 in brown (DAB), haematoxylin, bare glass.

    Acquired at the Center for Microscopy and Molecular Imaging; no known copyright restrictions. The file is in the
    scikit-image wheel: nothing is downloaded. Its pixel size is not known; the demo assumes 0.5 mpp.
    """
    return cast(NDArray[np.uint8], skimage.data.immunohistochemistry())


def dab_positive(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return where there is DAB, bool [H, W], in an RGB image, uint8 [H, W, 3].

    The DAB channel of colour deconvolution (Ruifrok and Johnston 2001; scikit-image's matrix and units), smoothed by
    ``DAB_SIGMA_PX`` and thresholded at ``DAB_THRESHOLD``. White has no density and is negative.
    """
    density = np.clip(rgb2hed(rgb)[..., 2], 0.0, MAX_DENSITY)
    smooth = gaussian_filter(density, DAB_SIGMA_PX)
    return cast(NDArray[np.bool_], smooth > DAB_THRESHOLD)


def agreement(folder: SlideFolder, example: Example) -> Agreement | None:
    """Return how well the heatmap agrees with what is known about the slide; None for the user's own slide."""
    if example.layout is None:
        return None
    measure = agreement_with_stain if example.outlines is None else agreement_with_outlines
    return measure(folder, example.layout)


def agreement_with_outlines(folder: SlideFolder, layout: Layout) -> Agreement:
    """Return how well an H&E slide's heatmap agrees with the pathologists' outlines."""
    heatmap = HeatmapStore(folder.heatmap)
    whole = Region(0, 0, *heatmap.shapes[0])
    stride = -(-layout.size[0] // whole.height)
    truth = majority(layout.paint(read_crops()[1], False), stride)
    tissue = majority(layout.tissue(), stride) & ((heatmap.read_flags(0, whole) & EXPLAINED) > 0)
    auc: dict[str, tuple[float, ...]] = {}
    for number, channel in enumerate(heatmap.channels):
        auc[channel.label] = (roc_auc(heatmap.read(0, number, whole)[tissue], truth[tissue]),)
    return Agreement(
        "the pathologists' outlines of the tumour", ("all tissue",), auc, "the model never saw any of this tissue"
    )


def agreement_with_stain(folder: SlideFolder, layout: Layout) -> Agreement:
    """Return how well an IHC slide's heatmap agrees with the DAB stain."""
    heatmap = HeatmapStore(folder.heatmap)
    whole = Region(0, 0, *heatmap.shapes[0])
    stride = -(-layout.size[0] // whole.height)
    held_out_source = np.zeros(layout.source_size, np.bool_)
    held_out_source[HELD_OUT] = True
    truth = _cells(layout, dab_positive(micrograph()), stride)
    tissue = majority(layout.tissue(), stride) & ((heatmap.read_flags(0, whole) & EXPLAINED) > 0)
    held_out = tissue & _cells(layout, held_out_source, stride)
    auc: dict[str, tuple[float, ...]] = {}
    for number, channel in enumerate(heatmap.channels):
        values = heatmap.read(0, number, whole)
        auc[channel.label] = roc_auc(values[held_out], truth[held_out]), roc_auc(values[tissue], truth[tissue])
    return Agreement(
        "the DAB stain (truth by colour deconvolution)",
        ("held-out quadrant", "all tissue"),
        auc,
        "the model never saw the held-out quadrant of the micrograph",
    )


def _cells(layout: Layout, source: NDArray[np.bool_], stride: int) -> NDArray[np.bool_]:
    painted: NDArray[np.bool_] = layout.paint(source, False)
    return majority(painted, stride)


def majority(mask: NDArray[np.bool_], stride: int) -> NDArray[np.bool_]:
    """Return whether each `stride` x `stride` cell is mostly True, [ceil(h / stride), ceil(w / stride)]."""
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % stride), (0, -width % stride)))
    cells = padded.reshape(padded.shape[0] // stride, stride, padded.shape[1] // stride, stride)
    share: NDArray[np.float64] = cells.mean(axis=(1, 3))
    return share > 0.5


def roc_auc(scores: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve of flat `scores` for flat `truth`; ties count half; nan for one class.

    >>> roc_auc(np.array([0.1, 0.4, 0.4, 0.9], np.float32), np.array([False, False, True, True]))
    0.875
    """
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))
