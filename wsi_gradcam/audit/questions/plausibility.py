"""Does the map highlight what was annotated? This is kept separate from faithfulness, and never mixed with it.

All measures take maps [P, h, w] and masks bool [P, h, w] on the same grid and return a number per patch, NaN if the
question has no answer: a mask that is empty or full, a map that is constant or not finite. Counting those as hits would
be flattering.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from wsi_gradcam.audit.findings import Findings, Verdict, interval_p, percent
from wsi_gradcam.audit.measurements import Estimate, stored
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.schema import RANDOM, Figure, IntervalsFigure, Measure, Words, map_keys, row_title

if TYPE_CHECKING:
    from wsi_gradcam.audit.batch import Batch
    from wsi_gradcam.audit.schema import Metrics

Maps = NDArray[np.float32]
Masks = NDArray[np.bool_]
Floats = NDArray[np.float64]

CHANCE = 0.5  # of the area under a ROC curve

ANNOTATED_SHARE = Measure("annotated_share", "annotated share of the patch", "share", of="chance")
AUROC = Measure("auroc", "auroc", "0 to 1", evidence="area under the ROC curve")
IOU = Measure("iou", "iou", "0 to 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreement:
    """Agreement of a map with the annotation, [N] each."""

    auroc: Floats
    iou: Floats
    pointing_game: Floats
    relevance_mass: Floats
    relevance_rank: Floats


AGREEMENT = {part.name: Measure(part.name, part.name, "0 to 1") for part in fields(Agreement)} | {
    "auroc": AUROC,
    "iou": IOU,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Plausibility:
    """Maps compared with annotations.

    Attributes:
        share: [N] share of the patch that is annotated.
        chance: [N] share of its cells that are.
        maps: those of methods and controls.
    """

    share: Floats = stored("plausibility/share")
    chance: Floats = stored("plausibility/chance")
    maps: Mapping[str, Agreement] = stored("plausibility/{}", Agreement)


def measure(batch: Batch) -> Plausibility | None:
    """Measure the agreement of maps, and controls, with the annotation; None without annotation."""
    if batch.data.annotated is None:
        return None
    from wsi_gradcam.audit.measures.shortcuts import cover

    cells = cover(batch.input_masks(batch.data.annotated), batch.grid)
    masks = cells >= 0.5
    maps = {}
    for name, map_ in (batch.maps | batch.controls).items():
        values = np.ascontiguousarray(map_.float().cpu().numpy())
        maps[name] = Agreement(**{part: of(values, masks) for part, of in PLAUSIBILITY.items()})
    return Plausibility(share=cells.mean(axis=(1, 2)), chance=chance(masks), maps=maps)


def assess(findings: Findings, scope: Scope) -> None:
    """Add the agreement of maps with the annotation, and a verdict for each method."""
    found = findings.measurements.of(Plausibility)
    if found is None or not found.maps:
        return
    first = next(iter(found.maps.values()))
    answered = np.isfinite(first.auroc) | np.isfinite(found.maps[RANDOM].auroc)
    findings.estimate(ANNOTATED_SHARE, np.where(answered, found.chance, np.nan))
    for name, agreement in found.maps.items():
        for part, one in AGREEMENT.items():
            findings.estimate(one, getattr(agreement, part), **map_keys(name))
    for method in scope.methods:
        auroc = found.maps[method].auroc
        area = findings.measurements.estimate(auroc)
        if area.patches:
            findings.conclude(method, plausible(area), interval_p(area, CHANCE), AUROC, method=method)
        findings.compare(AUROC, auroc, found.maps[RANDOM].auroc, method=method, control=RANDOM)


def plausible(area: Estimate) -> Verdict:
    """Return whether the map highlights what was annotated: `auroc`, 0.5 by chance."""
    question = "Does the map highlight what was annotated?"
    evidence = {"auroc": area}
    if area.low > CHANCE:
        words = f"In {percent(area.value)} of all pairs, an annotated place is hotter than one outside the annotation."
        return Verdict(question, "holds", words, evidence)
    if area.high < CHANCE:
        words = "Annotated places are colder than places outside the annotation: the model looks elsewhere."
        return Verdict(question, "fails", words, evidence)
    return Verdict(question, "unclear", "The map matches the annotation no better than chance.", evidence)


def figures(metrics: Metrics) -> list[Figure]:
    """Return figures of the agreement of maps with annotations."""
    rows = [(row_title(row), row) for row in metrics.estimates if row.measure == AUROC.name]
    axis = "area under the ROC curve; chance is 0.5"
    return [IntervalsFigure(rows, axis, "How well maps match annotations", reference=CHANCE)] if rows else []


def pointing_game(maps: Maps, masks: Masks) -> Floats:
    """Return whether the highest cell lies in the mask, 1 or 0; for several highest cells, their share.

    (Zhang 2016, arXiv 1608.00507.)
    """
    flat, inside = _flat(maps, masks)
    highest = flat == flat.max(axis=1, keepdims=True)
    return _answered((highest & inside).sum(axis=1) / np.maximum(highest.sum(axis=1), 1), maps, masks)


def relevance_mass(maps: Maps, masks: Masks) -> Floats:
    """Return the share of the positive relevance that lies in the mask, 0 to 1 (Arras 2022, arXiv 2003.07258).

    It is NaN, too, if nothing is positive. By chance, it is the mask's share of the area.
    """
    flat, inside = _flat(maps, masks)
    positive = np.maximum(flat, 0).astype(np.float64)
    total = positive.sum(axis=1)
    share = np.divide((positive * inside).sum(axis=1), total, out=np.full(len(maps), np.nan), where=total > 0)
    return _answered(share, maps, masks)


def relevance_rank(maps: Maps, masks: Masks) -> Floats:
    """Return the share of the n highest cells that lie in a mask of n cells, 0 to 1 (Arras 2022, arXiv 2003.07258).

    Cells that tie for the n-th place count as if drawn at random. By chance, it is the mask's share of the area.
    """
    flat, inside = _flat(maps, masks)
    size = inside.sum(axis=1)
    last = np.sort(flat, axis=1)[np.arange(len(flat)), -np.maximum(size, 1)][:, None]
    above, tied = flat > last, flat == last
    free = size - above.sum(axis=1)
    hits = (above & inside).sum(axis=1) + free * (tied & inside).sum(axis=1) / np.maximum(tied.sum(axis=1), 1)
    return _answered(hits / np.maximum(size, 1), maps, masks)


def auroc(maps: Maps, masks: Masks) -> Floats:
    """Return the probability that a cell in the mask is higher than one outside, ties counting half; 0.5 by chance."""
    flat, inside = _flat(maps, masks)
    size = inside.sum(axis=1).astype(np.float64)
    others = inside.shape[1] - size
    ranks = (rankdata(flat, axis=1) * inside).sum(axis=1)
    return _answered((ranks - size * (size + 1) / 2) / np.maximum(size * others, 1), maps, masks)


def iou(maps: Maps, masks: Masks, threshold: float = 0.0) -> Floats:
    """Return the intersection over union of the mask and the area where the map is above `threshold`, 0 to 1.

    Above 0, a raw map is evidence for the class; for methods that are never negative, give a threshold.
    """
    flat, inside = _flat(maps, masks)
    above = flat > threshold
    return _answered((above & inside).sum(axis=1) / np.maximum((above | inside).sum(axis=1), 1), maps, masks)


PLAUSIBILITY: dict[str, Callable[[Maps, Masks], Floats]] = {
    "pointing_game": pointing_game,
    "relevance_mass": relevance_mass,
    "relevance_rank": relevance_rank,
    "auroc": auroc,
    "iou": iou,
}


def chance(masks: Masks) -> Floats:
    """Return the value of pointing game, mass and rank by chance: the mask's share of the area [P]."""
    share: Floats = masks.reshape(len(masks), -1).mean(axis=1)
    return share


def _flat(maps: Maps, masks: Masks) -> tuple[Maps, Masks]:
    if maps.shape != masks.shape or masks.dtype != np.bool_:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} {masks.dtype}; expected bool masks of equal shape")
    return maps.reshape(len(maps), -1), masks.reshape(len(masks), -1)


def _answered(values: Floats, maps: Maps, masks: Masks) -> Floats:
    from wsi_gradcam.audit.measures.sanity import is_constant

    share = chance(masks)
    return np.where((share > 0) & (share < 1) & ~is_constant(maps), values, np.nan)


QUESTION = Question(
    Words(
        title="Does the map highlight what was annotated?",
        how="On patches that the border of an annotation crosses, the map is compared with the annotated area.",
        not_proven="A map that looks right does not prove that the model uses what it shows: read this together with "
        "faithfulness.",
        source="pointing game: Zhang 2016 (arXiv 1608.00507); mass and rank: Arras 2022 (arXiv 2003.07258)",
    ),
    measure,
    assess,
    measures=(ANNOTATED_SHARE, *AGREEMENT.values()),
    figures=figures,
    no_numbers="no patch of the sample is partly annotated; give --annotations",
)
