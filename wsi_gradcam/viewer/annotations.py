"""Annotations over a slide and its maps: their outlines by class, and how well each channel agrees with them.

Agreement is measured on the whole slide, on each pixel of the heatmap: everything explained that lies in a class
against everything else that was explained. FROC counts lesions that are found, as CAMELYON16 did, and places outside
them that look just as hot.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from wsi_gradcam.errors import AnnotationError, NotShownError, one_line
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.results.display import OUTLINE_COLOURS
from wsi_gradcam.results.heatmap import EXPLAINED
from wsi_gradcam.tissue.annotations import check_mask, class_outlines, find_mask
from wsi_gradcam.viewer.archive import valid_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.tissue.annotations import Drawn
    from wsi_gradcam.viewer.archive import Archive, ServedSlide

    Floats = NDArray[np.float64]
    Mask = NDArray[np.bool_]

KEPT = 16  # slides whose annotations stay in memory
ENCODED_BYTES = 64 << 20
MAX_POINTS = 200_000  # of all outlines of a slide drawn by the page
MAX_PX = 1 << 22  # of the level on which agreement is measured: a second or two
MAX_DETECTIONS = 5000
CURVE_POINTS = 61
UNNAMED = "region"
FROC_RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per slide, as in CAMELYON16
ALL_AROUND = np.ones((3, 3), np.bool_)  # pixels that touch at a corner belong to one lesion


@dataclass(frozen=True, eq=False)
class Annotation:
    """The annotations of one slide, or why they cannot be shown.

    Attributes:
        file: name of the file.
        drawn: the classes; None with a `problem`.
        outlines: by class; (y, x) in level-0 px, float64 [n, 2] each.
        simplified: by how many level-0 px outlines may deviate from what was drawn.
        problem: "" if there is none.
        key: distinguishes this state of the file from others.
    """

    file: str
    drawn: Drawn | None
    outlines: dict[str, list[Floats]]
    simplified: float = 0.0
    problem: str = ""
    key: str = ""


class AnnotationFiles:
    """Finds and reads the annotations of slides; those used most recently are kept until their file changes."""

    def __init__(self, archive: Archive, given: Path | None, frame: str = "auto") -> None:
        """Look for the slides' files at `given`, a file or a folder.

        Raises:
            ConfigError: there is no such file, or one file for several slides.
        """
        check_mask(given, (), (), len(archive.slides()), "--annotations")
        self._given, self._frame = given, frame
        self._known: Cache[tuple[object, ...], Annotation] = Cache(KEPT)
        self._encoded: Cache[str, bytes] = Cache(ENCODED_BYTES, len)

    def of(self, slide: ServedSlide) -> Annotation | None:
        """Return the annotations of a slide; None if there are none for it."""
        try:
            path = self._path(slide.result)
        except AnnotationError as error:
            return Annotation("", None, {}, problem=one_line(error))
        if path is None:
            return None
        about = path.stat()
        state = f"{path} {about.st_mtime_ns} {about.st_size}"
        return self._known.get((slide.key, slide.version, state), lambda: self._read(slide.result, path, state))

    def encoded(self, slide: ServedSlide) -> bytes:
        """Return the annotations of a slide as JSON, see `annotation_facts`; cached, as they may be large."""
        found = self.of(slide)
        if found is None or not found.key:
            return json.dumps(annotation_facts(found)).encode()
        return self._encoded.get(
            f"{slide.key} {slide.version} {found.key}", lambda: json.dumps(annotation_facts(found)).encode()
        )

    def _path(self, result: SlideResult) -> Path | None:
        given = self._given
        return find_mask(given, result.id, result.path) if given is not None and given.is_dir() else given

    def _read(self, result: SlideResult, path: Path, state: str) -> Annotation:
        from wsi_gradcam.audit.archive import Ground, annotated_slide

        try:
            plan = result.plan
            ground = Ground(*plan.slide_px, plan.scanned, result.folder.tissue, self._frame)
            found = annotated_slide(path, result.id, (), plan.slide_px, result.path, ground)
            assert found is not None
            drawn = found.regions.drawn(plan.slide_px)
            outlines, simplified = _bounded(class_outlines(drawn, plan.slide_px))
        except AnnotationError as error:
            return Annotation(path.name, None, {}, problem=one_line(error))
        return Annotation(path.name, drawn, outlines, simplified, key=state)


def _bounded(outlines: dict[str, list[Floats]]) -> tuple[dict[str, list[Floats]], float]:
    """Return outlines with at most `MAX_POINTS` points, and by how many px they were simplified to achieve that."""
    from skimage.measure import approximate_polygon

    count = sum(len(ring) for rings in outlines.values() for ring in rings)
    tolerance = 0.0
    while count > MAX_POINTS and tolerance < 1 << 20:
        tolerance = max(1.0, 2 * tolerance)
        outlines = {
            name: [approximate_polygon(np.concatenate([ring, ring[:1]]), tolerance)[:-1] for ring in rings]
            for name, rings in outlines.items()
        }
        count = sum(len(ring) for rings in outlines.values() for ring in rings)
    return outlines, tolerance


def annotation_facts(found: Annotation | None) -> dict[str, Any]:
    """Return annotations as JSON values: outlines are flat lists y, x, y, x, ... in level-0 px."""
    if found is None:
        return {"file": None, "problem": None, "simplified_px": 0, "classes": []}
    return {
        "file": valid_text(found.file),
        "problem": valid_text(found.problem) or None,
        "simplified_px": found.simplified,
        "classes": [
            {
                "name": valid_text(name),
                "label": valid_text(name) or UNNAMED,
                "colour": f"#{OUTLINE_COLOURS[number % len(OUTLINE_COLOURS)]}",
                "outlines": [ring.round(1).ravel().tolist() for ring in rings],
            }
            for number, (name, rings) in enumerate(found.outlines.items())
        ],
    }


class Agreements:
    """Measures how well the channels of a slide agree with a class of its annotations; measurements are cached."""

    def __init__(self, files: AnnotationFiles) -> None:
        self._files = files
        self._known: Cache[tuple[object, ...], dict[str, Any]] = Cache(256)

    def of(self, slide: ServedSlide, name: str) -> dict[str, Any]:
        """Return the agreement of each channel with class `name`, as JSON values.

        Raises:
            NotShownError: the slide has no such annotation, or no heatmap.
        """
        found = self._files.of(slide)
        if found is None or found.drawn is None or name not in found.outlines:
            raise NotShownError(f"no annotations of class {name[:100]!r} on this slide")
        drawn = found.drawn
        if not slide.is_final:
            raise NotShownError("the slide is not finished; agreement is measured once its map is complete")
        return self._known.get(
            (slide.key, slide.version, id(found), name), lambda: agreement(slide.result, drawn, name)
        )


def agreement(result: SlideResult, drawn: Drawn, name: str) -> dict[str, Any]:
    """Return how well each channel of a slide agrees with a class, on the finest level with at most `MAX_PX` pixels."""
    last = len(result.levels) - 1
    level = next((i for i, (h, w) in enumerate(result.levels) if h * w <= MAX_PX), last)
    (height, width), step = result.levels[level], result.stride_px * 2**level
    whole = Region(0, 0, height, width)
    known = (result.read_coverage(level, whole) & EXPLAINED) > 0
    inside = drawn.cut({name}, (0.0, 0.0, float(height * step), float(width * step)), (height, width)) & known
    reach = max(1, round(min(result.plan.footprint) / step / 2))
    lesions, count = ndimage.label(inside, ALL_AROUND)
    channels = []
    for channel in result.channels:
        values = result.read(channel, level, whole)
        row = agreement_of(values[known], inside[known], channel.window)
        row["froc"] = froc(*detections(values, known, lesions, reach), count)
        channels.append({"label": valid_text(channel.label), **row})
    return {
        "class": valid_text(name),
        "um_per_px": step * result.mpp[0],
        "pixels": int(known.sum()),
        "annotated": int(inside.sum()),
        "lesions": int(count),
        "channels": channels,
    }


def agreement_of(values: NDArray[np.float32], inside: Mask, window: tuple[float, float]) -> dict[str, Any]:
    """Return the agreement of values [n] with where a class is, bool [n]; None if either side is empty.

    `auroc` is the area under the ROC curve, and `ap` the average precision, sum of (R_i - R_(i-1)) P_i over all
    distinct values, as computed by scikit-learn; by chance they are 0.5 and `chance`. `dice` is the largest over all
    thresholds, 2 TP / (2 TP + FP + FN) for values at or above `threshold`; `curve` holds [threshold, Dice] along the
    window and beyond it.
    """
    positive, negative = int(inside.sum()), int((~inside).sum())
    names = ("auroc", "ap", "chance", "dice", "threshold")
    if not positive or not negative:
        return {**dict.fromkeys(names), "curve": []}
    order = np.argsort(-values, kind="stable")
    ranked, hits = values[order].astype(np.float64), np.cumsum(inside[order])
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # the last of equal values
    true, false, at = hits[ends], ends + 1 - hits[ends], ranked[ends]
    recall, precision = true / positive, true / (ends + 1)
    dice = 2 * true / (ends + 1 + positive)
    auroc = float(np.trapezoid(np.append(0, recall), np.append(0, false / negative)))
    best = int(dice.argmax())
    low, high = min(window[0], float(ranked[-1])), max(window[1], float(ranked[0]))
    curve = []
    for threshold in np.linspace(low, high, CURVE_POINTS).tolist():
        place = int(np.searchsorted(-at, -threshold, side="right")) - 1
        curve.append([threshold, float(dice[place]) if place >= 0 else 0.0])
    ap = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    chance = positive / (positive + negative)
    return {**dict(zip(names, (auroc, ap, chance, float(dice[best]), float(at[best])), strict=True)), "curve": curve}


def detections(
    values: NDArray[np.float32], known: Mask, lesions: NDArray[np.int32], reach: int
) -> tuple[Floats, NDArray[np.int32]]:
    """Return the values of the places that stand out, highest first, and the lesion each lies in, 0 for none.

    A place stands out if no explained pixel up to `reach` away in y and x is higher; touching pixels with the same
    value are represented by the middle one in row order. Nothing stands out where a map is at its lowest.
    """
    seen = np.where(known, values, -np.inf)
    highest = (ndimage.maximum_filter(seen, 2 * reach + 1, mode="constant", cval=-np.inf) == seen) & known
    if known.any():
        highest &= seen > seen[known].min()
    groups, count = ndimage.label(highest, ALL_AROUND)
    flat = np.flatnonzero(groups)
    order = flat[np.argsort(groups.ravel()[flat], kind="stable")]
    sizes = np.bincount(groups.ravel()[flat], minlength=count + 1)[1:]
    middle = order[np.cumsum(sizes) - sizes + sizes // 2] if count else order
    ranked = middle[np.argsort(-values.ravel()[middle], kind="stable")][:MAX_DETECTIONS]
    return values.ravel()[ranked].astype(np.float64), lesions.ravel()[ranked]


def froc(values: Floats, lesions: NDArray[np.int32], count: int) -> dict[str, Any] | None:
    """Return the free-response ROC of a slide with `count` lesions; None without any.

    At a threshold, sensitivity is the share of lesions with a detection at or above it, and false positives are
    detections at or above it that lie in no lesion. `sensitivity` is the largest with at most the number of false
    positives in `FROC_RATES`, and `score` their mean (Ehteshami Bejnordi 2017, doi 10.1001/jama.2017.14585, for one
    slide).
    """
    if not count:
        return None
    first_hit = np.zeros(len(values), np.bool_)
    first_hit[np.unique(lesions, return_index=True)[1]] = True
    found = np.cumsum(first_hit & (lesions > 0)) / count
    false = np.cumsum(lesions == 0)
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1) if len(values) else np.zeros(0, np.int64)
    sensitivity = [float(max(found[ends][false[ends] <= rate], default=0.0)) for rate in FROC_RATES]
    return {"rates": list(FROC_RATES), "sensitivity": sensitivity, "score": float(np.mean(sensitivity))}
