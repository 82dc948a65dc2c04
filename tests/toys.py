"""A reader, a method and a question of the audit, as the recipes of docs/architecture.md have them written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wsi_gradcam.audit.findings import HALF, Findings, Outcome, Verdict, interval_p, percent
from wsi_gradcam.audit.measurements import Estimate, stored
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.schema import Figure, IntervalsFigure, Measure, Words, row_title
from wsi_gradcam.cam.facts import MethodInfo
from wsi_gradcam.errors import SlideFormatError, one_line
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides.base import SlideInfo, content_digest, make_levels, pad_with_background

if TYPE_CHECKING:
    from torch import Tensor

    from wsi_gradcam.audit.batch import Batch
    from wsi_gradcam.audit.measures.subject import Aim, Subject
    from wsi_gradcam.audit.schema import Metrics

Rgb = NDArray[np.uint8]
Floats = NDArray[np.float64]

# --- a reader --------------------------------------------------------------------------------------------------------

WHITE = (255, 255, 255)


class ToySlide:
    """A `Slide` that is an .npz file of `pixels` uint8 [h, w, 3] and, if it is known, `mpp` (y, x)."""

    def __init__(self, path: Path, mpp: tuple[float, float] | None = None, trust_objective: bool = False) -> None:
        self._pixels, own = _parsed(path)
        self._info = SlideInfo(
            path=str(path),
            levels=make_levels([self._pixels.shape[:2]]),
            mpp=mpp or own,
            mpp_problem="" if mpp or own else "the file has no mpp; give the micrometres per pixel, such as --mpp 0.25",
            vendor="toy",
            background=WHITE,
            bounds=None,
            digest=content_digest(path),
        )

    @property
    def info(self) -> SlideInfo:
        """The slide's metadata."""
        return self._info

    def read_level(self, level: int, region: Region) -> Rgb:
        """Return the pixels of `region` as RGB uint8 [height, width, 3]; outside the picture: white."""
        return pad_with_background(region, self._info.levels[level], WHITE, lambda inside: self._pixels[inside.slices])

    def close(self) -> None:
        """Release the memory."""
        self._pixels = self._pixels[:0]


def write_toy_slide(path: Path, pixels: Rgb, mpp: float | None) -> None:
    """Write a slide of the toy format."""
    arrays = {"pixels": pixels} if mpp is None else {"pixels": pixels, "mpp": np.array([mpp, mpp])}
    np.savez(path, allow_pickle=False, **arrays)


def _parsed(path: Path) -> tuple[Rgb, tuple[float, float] | None]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:  # numpy leaves a damaged one open
            pixels, mpp = arrays["pixels"], [float(value) for value in arrays["mpp"]] if "mpp" in arrays else None
    except Exception as error:  # a damaged archive may raise anything
        raise SlideFormatError(f"{path}: no toy slide, or damaged ({one_line(error)}); copy it again") from error
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise SlideFormatError(f"{path}: pixels are {pixels.dtype} {pixels.shape}, expected uint8 (height, width, 3)")
    return pixels, None if mpp is None else (mpp[0], mpp[1])


# --- a method --------------------------------------------------------------------------------------------------------

ABSGRADCAM = MethodInfo("gradient", "layer", "one", "arbitrary", "|Grad-CAM|")


def absgradcam(A: Tensor, g: Tensor) -> Tensor:
    """|Grad-CAM|, |sum_k mean_hw(g)_k A_k|: where there is evidence, for or against (a toy, no paper)."""
    return (g.mean(dim=(2, 3))[:, :, None, None] * A).sum(dim=1).abs()


# --- a question of the audit -----------------------------------------------------------------------------------------

DARKER = 0.9  # of the light: less than slides of one scanner differ
FAR = 1.0  # logits
MOVED = Measure(
    "moved", "patches whose logit moves by more than 1 where a tenth of the light is missing", "share", "model"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Brightness:
    """What less light does to patches, [N]: 1 where the logit moves far, else 0."""

    moved: Floats = stored("brightness/moved")


def moved_by_darkness(subject: Subject, rgb: Rgb, aim: Aim) -> Floats:
    """Return 1.0 for each patch [P] of which |s(0.9 x) - s(x)| is more than `FAR`, else 0.0."""
    darker = (rgb * DARKER).round().astype(np.uint8)
    change = aim.logit(subject.answers(subject.images(darker))) - aim.logit(aim.logits)
    return (change.abs() > FAR).double().cpu().numpy()


def measure(batch: Batch) -> Brightness:
    """Which logits move with the light."""
    return Brightness(moved=moved_by_darkness(batch.subject, batch.data.rgb, batch.aim))


def assess(findings: Findings, scope: Scope) -> None:
    """How many do; one verdict."""
    if (found := findings.measurements.of(Brightness)) is None:
        return
    moved = findings.estimate(MOVED, found.moved)
    findings.conclude("model", independent(moved), interval_p(moved, HALF), MOVED)


def independent(moved: Estimate) -> Verdict:
    """Return whether logits stay with less light: `moved` is the share of the patches where they do not."""
    outcome: Outcome = "fails" if moved.low > HALF else "holds" if moved.high < HALF else "unclear"
    words = f"With a tenth less light the logit moves on {percent(moved.value)} of the patches."
    return Verdict("Does the logit stay when there is less light?", outcome, words, {"moved": moved})


def figures(metrics: Metrics) -> list[Figure]:
    """Return the share with its interval."""
    rows = [(row_title(row), row) for row in metrics.estimates if row.measure == MOVED.name and row.patches]
    return [IntervalsFigure(rows, "share of the patches", "Share of the patches moved by less light")] if rows else []


QUESTION = Question(
    Words(
        title="Does the logit hang on brightness?",
        how="A tenth of the light is taken from each patch, and the logit is asked for again.",
        not_proven="Colour and contrast may still decide.",
        source="a toy",
    ),
    measure,
    assess,
    measures=(MOVED,),
    figures=figures,
)
