"""How well a model's answers fit the labels of slides: ROC curves, intervals and calibration, by class and by site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq

from wsi_gradcam.errors import canonical
from wsi_gradcam.results.slide import slide_scores

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from wsi_gradcam.results.run import Result
    from wsi_gradcam.results.slide import SlideResult

FEWEST = 6  # slides of either kind; with fewer, an interval or a curve would promise too much
BINS = 5  # of a calibration
Z = 1.959964  # of 95 %
SCORES = {
    "probability": "the slide's probability",
    "number": "the slide's answer",
    "share": "share of the patches given to it",
    "top": "mean probability of the ten highest patches",
}
# The answer of a slide-level model, by the function that turns its logits into the answer.
ANSWERS = {
    "softmax": "probabilities of classes that exclude each other",
    "sigmoid": "a probability of each class by itself",
    "hazard": "probabilities of surviving each interval",
    "none": "numbers that are no probabilities",
}
CALIBRATION = ("site", "mean probability", "observed share", "Brier score")
CLASSIFIED = ("softmax", "sigmoid")  # answers that are probabilities of classes


@dataclass(frozen=True)
class Roc:
    """The ROC curve of a score against labels, with each slide as a case.

    Attributes:
        score: the score in words.
        group: its site; "" for all.
        positive, negative: numbers of slides.
        brier: mean squared error of the slide's probability; None for a score that is not a probability.
        predicted: mean of the probability; None for other scores.
        auroc: area under the curve, with ties counting half; None if all slides have the same label.
        interval: its 95% interval; None if there are fewer than `FEWEST` slides with or without the class.
        curve: false and true positive rates, [n, 2], from (0, 0) to (1, 1).
    """

    score: str
    group: str
    positive: int
    negative: int
    auroc: float | None
    interval: tuple[float, float] | None
    curve: tuple[tuple[float, float], ...]
    predicted: float | None = None
    brier: float | None = None

    @property
    def observed(self) -> float:
        """The share of slides that belong to the class."""
        return self.positive / max(1, self.positive + self.negative)


@dataclass(frozen=True)
class CalibrationBin:
    """Slides of similar probability: the mean prediction, the observed share, and the number of slides."""

    predicted: float
    observed: float
    slides: int

    @property
    def row(self) -> tuple[str, str, int]:
        """The bin as a row of a table."""
        return number(self.predicted), number(self.observed), self.slides


@dataclass(frozen=True)
class Performance:
    """How well a class is separated from the others, according to the slides' labels.

    Attributes:
        label: the class.
        rocs: one per score for all slides, then by site.
        bins: bins of the calibration, lowest probabilities first; empty if scores are not probabilities.
        unscored: the number of slides without a score, because none of their patches was explained.
    """

    label: str
    rocs: tuple[Roc, ...]
    bins: tuple[CalibrationBin, ...]
    unscored: int = 0

    @property
    def drawn(self) -> Roc | None:
        """The curve that a card draws; None if no curve of the whole archive has both kinds of slides."""
        return next((roc for roc in self.rocs if not roc.group and roc.auroc is not None), None)

    @property
    def calibrated(self) -> tuple[Roc, ...]:
        """All slides, and those of each site, if the score is a probability."""
        return tuple(roc for roc in self.rocs if roc.brier is not None)


def performance_of(
    finished: Sequence[SlideResult], result: Result, activation: str
) -> tuple[tuple[Performance, ...], str]:
    """Return the performance by class, and "" or the reason why there is none; `activation` is that of the answer."""
    names = {canonical(name): name for name in result.classes}
    labels = [slide.row.get("label") or "" for slide in finished]
    pairs = [(slide, names.get(canonical(label))) for slide, label in zip(finished, labels, strict=True)]
    known = [(slide, label) for slide, label in pairs if label is not None]
    if not any(labels):
        return (), "The list of slides has no labels, so how often the model is right is unknown."
    if activation == "hazard":
        return (
            (),
            f"The model answers with {ANSWERS[activation]}, and a label does not say for how long anyone did.",
        )
    if len({label for _, label in known}) < 2:
        found = ", ".join(sorted(set(filter(None, labels)))[:5])
        classes = ", ".join(result.classes)
        return (), f"The labels of the slides ({found}) do not include two of the model's classes ({classes})."
    scores = [_scores(slide, result, activation) for slide, _ in known]
    sites, truths = [slide.row.get("site") or "" for slide, _ in known], [label for _, label in known]
    exclusive = len(result.classes) == 2 and activation == "softmax"  # one determines the other
    shown = result.classes[1:] if exclusive else result.classes
    return tuple(_of_class(name, scores, truths, sites) for name in shown), ""


def _scores(slide: SlideResult, result: Result, activation: str) -> Mapping[str, Mapping[str, float]]:
    """Return a slide's scores by class and by score: the model's answer for it, or otherwise those of its patches.

    Empty for a slide none of whose patches was explained.
    """
    if result.record.is_slide_level:
        kind = "probability" if activation in CLASSIFIED else "number"
        return {name: {kind: share} for name, share in slide.slide_probabilities.items()}
    return slide_scores(slide, result.classes)


def _of_class(
    name: str, scores: Sequence[Mapping[str, Mapping[str, float]]], truths: Sequence[str], sites: Sequence[str]
) -> Performance:
    rocs: list[Roc] = []
    bins: tuple[CalibrationBin, ...] = ()
    truth, of_site = np.array([label == name for label in truths]), np.array(sites)
    of_class = [each.get(name, {}) for each in scores]
    for kind in dict.fromkeys(kind for each in of_class for kind in each):
        values = np.array([each.get(kind, np.nan) for each in of_class])
        rocs.append(_roc_of(kind, values, truth, ""))
        several = sorted(set(sites) - {""}) if len(set(sites)) > 1 else ()
        rocs += [_roc_of(kind, values[of_site == site], truth[of_site == site], site) for site in several]
        if kind == "probability":
            scored = ~np.isnan(values)
            bins = calibration(values[scored], truth[scored])
    return Performance(name, tuple(sorted(rocs, key=lambda found: bool(found.group))), bins, of_class.count({}))


def _roc_of(kind: str, values: NDArray[np.float64], truth: NDArray[np.bool_], site: str) -> Roc:
    """Return the curve of a score, with its Brier score if it is a probability."""
    found = roc(values, truth, SCORES[kind], site)
    if kind != "probability" or np.isnan(values).all():
        return found
    return replace(found, predicted=float(np.nanmean(values)), brier=float(np.nanmean((values - truth) ** 2)))


def roc(values: ArrayLike, truth: ArrayLike, score: str = "", group: str = "") -> Roc:
    """Return the ROC curve of scores [n] for truths [n]; scores that are NaN do not count.

    >>> found = roc([0.1, 0.4, 0.4, 0.9], [False, False, True, True])
    >>> found.auroc, found.interval, found.curve
    (0.875, None, ((0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)))
    """
    scores, positive = np.asarray(values, np.float64), np.asarray(truth, np.bool_)
    scores, positive = scores[~np.isnan(scores)], positive[~np.isnan(scores)]
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return Roc(score, group, n, m, None, None, ())
    levels = np.unique(scores)[::-1]
    curve = [(0.0, 0.0)]
    curve += [(float((scores[~positive] >= t).mean()), float((scores[positive] >= t).mean())) for t in levels]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve))
    interval = auroc_interval(area, n, m) if min(n, m) >= FEWEST else None
    return Roc(score, group, n, m, area, interval, tuple(curve))


def auroc_interval(area: float, positive: int, negative: int) -> tuple[float, float]:
    """Return the 95% interval of an AUROC for given numbers of positive and negative cases.

    Method 5 of Newcombe 2006 (Statistics in Medicine, doi 10.1002/sim.2324): the areas whose standard error by Hanley
    and McNeil, with both numbers of cases replaced by their mean, leaves the one that was found within 1.96 of it. It
    stays within 0 and 1, and does not collapse if the area is 1.
    """

    def excess(theta: float) -> float:
        many = (positive + negative) / 2 - 1
        inner = 1 + many * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (area - theta) ** 2 - Z**2 * theta * (1 - theta) * inner / (positive * negative)

    below, above = max(area - 1e-9, 0.0), min(area + 1e-9, 1.0)  # at an area of 0 or 1 the excess itself is 0
    return float(brentq(excess, 0.0, below)), float(brentq(excess, above, 1.0))


def calibration(values: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[CalibrationBin, ...]:
    """Return slides in bins of about equal numbers by probability; fewer bins for fewer slides than `FEWEST` a bin."""
    count = min(BINS, len(values) // FEWEST)
    if count < 2:
        return ()
    order = np.argsort(values, kind="stable")
    parts = np.array_split(order, count)
    return tuple(CalibrationBin(float(values[p].mean()), float(truth[p].mean()), len(p)) for p in parts)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with this many decimals; a dash for none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def interval_text(found: Roc) -> str:
    """Return the interval of a curve's area, such as "0.712 to 0.934"."""
    return "–" if found.interval is None else f"{number(found.interval[0])} to {number(found.interval[1])}"


def calibrated_rows(found: Performance) -> list[tuple[str, ...]]:
    """Return how well probabilities fit the labels, for all slides and for each site, as rows of `CALIBRATION`."""
    return [
        (one.group or "all", number(one.predicted), number(one.observed), number(one.brier)) for one in found.calibrated
    ]
