"""A model card as Markdown and HTML: the numbers of a run's tables and of its audit, and what was not measured.

This room reads results and loads the model, to be sure that the card is about this model; it writes nothing to OUT.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq

from wsi_gradcam.audit.plan import AUDIT, AuditFolder
from wsi_gradcam.audit.schema import Metrics, VerdictRow
from wsi_gradcam.errors import ModelError, ResultError, StoreError, canonical, one_line
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.io.local import wrap_write_errors, write_atomic
from wsi_gradcam.pages import render
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.slide import slide_scores
from wsi_gradcam.run.settings import make_settings

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.io.paths import StoragePathLike
    from wsi_gradcam.results.run import Result
    from wsi_gradcam.results.slide import SlideResult

FEWEST = 6  # slides of either kind, below which an interval or a curve would promise too much
BINS = 5  # of a calibration
Z = 1.959964  # of 95 %
HEADINGS = {"holds": "What holds", "fails": "What fails", "unclear": "What these patches do not tell"}
SCORES = {"share": "share of the patches given to it", "top": "mean probability of the ten highest patches"}


@dataclass(frozen=True)
class Roc:
    """The ROC curve of a score against labels, with each slide as a case.

    Attributes:
        score: the score in words.
        group: its site; "" for all.
        positive, negative: numbers of slides.
        auroc: area under the curve, with ties counting half; None if all slides have the same label.
        interval: its 95 % interval; None if there are fewer than `FEWEST` slides with or without the class.
        curve: false and true positive rates, [n, 2], from (0, 0) to (1, 1).
    """

    score: str
    group: str
    positive: int
    negative: int
    auroc: float | None
    interval: tuple[float, float] | None
    curve: tuple[tuple[float, float], ...]


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
        brier: mean squared error of the slide's probability; None if the model gives none for a slide.
        bins: bins of the calibration, lowest probabilities first.
    """

    label: str
    rocs: tuple[Roc, ...]
    brier: float | None
    bins: tuple[CalibrationBin, ...]

    @property
    def drawn(self) -> Roc | None:
        """The curve that a card draws; None if no curve of the whole archive has both kinds of slides."""
        return next((roc for roc in self.rocs if not roc.group and roc.auroc is not None), None)


@dataclass(frozen=True)
class Card:
    """The content of a card, as plain values.

    Attributes:
        name: of the model.
        model, data: facts as (name, value).
        counts: rows of (site, scanner, label, slides), if the list of slides states them.
        performance: by class; if empty, `unlabelled` says why.
        looks_at: sentences of OUT/evidence on what the model looks at, if it exists.
        audit: the audit's records; None if there is no audit.
        limits: sentences.
        made: the date.
    """

    name: str
    model: tuple[tuple[str, str], ...]
    data: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, str, str, int], ...]
    performance: tuple[Performance, ...]
    unlabelled: str
    looks_at: tuple[str, ...]
    audit: Metrics | None
    limits: tuple[str, ...]
    made: str


def write_card(
    model: str | PathLike[str],
    out: StoragePathLike,
    dest: str | PathLike[str] = ".",
    *,
    overwrite: bool = False,
    trust_code: bool = False,
) -> tuple[Path, Path]:
    """Write the card of the model that `out` was made with, and return the paths of the Markdown and the HTML file.

    Args:
        model: anything that `--model` accepts; it is loaded, and must be the one that the run was made with.
        out: the folder or s3:// URL of a run, with its audit if there is one.
        dest: folder for NAME.card.md and NAME.card.html.
        overwrite: replace existing cards.
        trust_code: allow the code in the model to run.

    Raises:
        ModelError: there is no such model, or it is not the run's.
        ResultError: `out` holds no run, or a card exists and may not be replaced.
        StoreError: `dest` cannot be written.
    """
    result = open_result(out)
    facts = _same_model(fspath(model), result, trust_code)
    card = make_card(result, facts)
    folder = Path(dest)
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in card.name)[:80] or "model"
    paths = folder / f"{stem}.card.md", folder / f"{stem}.card.html"
    for path in paths:
        if path.exists() and not overwrite:
            raise ResultError(f"{path}: already exists; use --overwrite, or another --dest")
    with wrap_write_errors(paths[0]):
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, (markdown(card), page(card)), strict=True):
            write_atomic(path, text.encode())
    return paths


def make_card(result: Result, facts: ModelFacts) -> Card:
    """Return the card of a run's model."""
    finished = [slide for slide in result if slide.is_finished]
    performance, unlabelled = _performance(finished, result)
    audit = _audit(result)
    return Card(
        name=facts.name,
        model=tuple(_model_facts(result, facts)),
        data=tuple(_data_facts(result, finished)),
        counts=tuple(_counts(finished)),
        performance=performance,
        unlabelled=unlabelled,
        looks_at=tuple(_looks_at(result)),
        audit=audit,
        limits=tuple(_limits(result, performance, audit)),
        made=datetime.now(UTC).date().isoformat(),
    )


def _same_model(model: str, result: Result, trust_code: bool) -> ModelFacts:
    """Load a model, and return its facts.

    Raises:
        ModelError: it is not the run's model.
    """
    from wsi_gradcam.mil.spec import is_slide_model, read_slide_model
    from wsi_gradcam.models.spec import read_spec
    from wsi_gradcam.run.examining import examine_for_run

    spec = (read_slide_model(model) if is_slide_model(model) else read_spec(model)).trusting(trust_code)
    spec.check_trusted()
    stored = result.record.settings
    kept = {name: stored[name] for name in ("layer", "method", "bag_method") if stored.get(name)}
    settings = make_settings(**kept, engine="eager", precision="float32")
    facts: ModelFacts = examine_for_run(spec, settings, []).facts
    if facts.digest != result.record.model.digest:
        raise ModelError(
            f"{model}: not the model that {result.out} was made with ({result.record.model.name}, digest "
            f"{result.record.model.digest[:12]}; this one {facts.digest[:12]}); give that one, or explain with this one"
        )
    return facts


def _model_facts(result: Result, facts: ModelFacts) -> Iterator[tuple[str, str]]:
    record = result.record
    height, width = record.model.patch_px
    yield "kind", "slide-level model (bags of patches)" if record.is_slide_level else "patch model"
    yield "source", facts.source
    yield "digest", facts.digest
    yield "licence", facts.license or "not stated"
    yield "classes", ", ".join(facts.classes)
    yield "input", f"{width} x {height} px at {record.model.mpp:g} um per pixel"
    yield "parameters", f"{facts.parameters:,}"
    yield "explained at layer", record.model.layer or "none"
    yield "methods", ", ".join(record.settings.get("method", ()))
    if record.is_slide_level:
        yield "methods of bags", ", ".join(record.settings.get("bag_method", ()))
    for note in facts.notes:
        yield "note", note


def _data_facts(result: Result, finished: Sequence[SlideResult]) -> Iterator[tuple[str, str]]:
    counts = Counter(slide.status for slide in result)
    yield "slides", ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items()))
    yield "patches", f"{sum(int(slide.row['patches'] or 0) for slide in finished):,}"
    mpps = sorted({f"{slide.mpp[0]:.3g}" for slide in finished})
    yield "resolution of the slides", f"{', '.join(mpps[:5])}{', ...' if len(mpps) > 5 else ''} um per pixel"
    yield "patch overlap", f"{result.record.settings.get('overlap', 0):g}"


def _counts(finished: Sequence[SlideResult]) -> Iterator[tuple[str, str, str, int]]:
    """Yield the number of slides of each site, scanner and label; nothing if no list stated them."""
    keys = Counter(tuple(slide.row.get(name) or "" for name in ("site", "scanner", "label")) for slide in finished)
    if any(any(key) for key in keys):
        for (site, scanner, label), count in sorted(keys.items()):
            yield site, scanner, label, count


# --- performance -----------------------------------------------------------------------------------------------------


def _performance(finished: Sequence[SlideResult], result: Result) -> tuple[tuple[Performance, ...], str]:
    """Return the performance by class, or the reason why there is none."""
    names = {canonical(name): name for name in result.classes}
    labels = [slide.row.get("label") or "" for slide in finished]
    pairs = [(slide, names.get(canonical(label))) for slide, label in zip(finished, labels, strict=True)]
    known = [(slide, label) for slide, label in pairs if label is not None]
    if not any(labels):
        return (), "The list of slides has no labels, so how often the model is right is unknown."
    if len({label for _, label in known}) < 2:
        found = ", ".join(sorted(set(filter(None, labels)))[:5])
        classes = ", ".join(result.classes)
        return (), f"The labels of the slides ({found}) do not include two of the model's classes ({classes})."
    scores = [_scores(slide, result) for slide, _ in known]
    sites, truths = [slide.row.get("site") or "" for slide, _ in known], [label for _, label in known]
    shown = result.classes[1:] if len(result.classes) == 2 else result.classes
    return tuple(_of_class(name, scores, truths, sites) for name in shown), ""


def _scores(slide: SlideResult, result: Result) -> Mapping[str, Mapping[str, float]]:
    """Return a slide's scores by class and by score: the model's answer for it, or else those of its patches."""
    if result.record.is_slide_level:
        return {name: {"answer": share} for name, share in slide.slide_probabilities.items()}
    return slide_scores(slide, result.classes)


def _of_class(
    name: str, scores: Sequence[Mapping[str, Mapping[str, float]]], truths: Sequence[str], sites: Sequence[str]
) -> Performance:
    rocs, kinds = [], list(scores[0].get(name, {})) if scores else []
    truth = np.array([label == name for label in truths])
    for kind in kinds:
        values = np.array([each.get(name, {}).get(kind, np.nan) for each in scores])
        words = "the slide's probability" if kind == "answer" else SCORES[kind]
        rocs.append(roc(values, truth, words))
        rocs += [
            roc(values[chosen], truth[chosen], words, site)
            for site in sorted(set(sites) - {""})
            if len(set(sites)) > 1 and (chosen := np.array([one == site for one in sites])).any()
        ]
    brier: float | None = None
    bins: tuple[CalibrationBin, ...] = ()
    if "answer" in kinds:
        values = np.array([each[name]["answer"] for each in scores])
        brier, bins = float(np.mean((values - truth) ** 2)), calibration(values, truth)
    return Performance(name, tuple(sorted(rocs, key=lambda found: bool(found.group))), brier, bins)


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
    """Return the 95 % interval of an AUROC for given numbers of positive and negative cases.

    Method 5 of Newcombe 2006 (Statistics in Medicine, doi 10.1002/sim.2324): the areas whose standard error by Hanley
    and McNeil, with both numbers of cases replaced by their mean, leaves the one that was found within 1.96 of it. It
    stays within 0 and 1, and does not collapse where the area is 1.
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


# --- evidence, audit and limits --------------------------------------------------------------------------------------


def _looks_at(result: Result) -> Iterator[str]:
    """Yield the findings of the run's evidence in words; nothing if there is none.

    Raises:
        ResultError: it was made with another model than the present results.
        StoreError: it is damaged.
    """
    place = result.folder.place / "evidence" / "evidence.json"
    try:
        found = read_json(place.read(SMALL_BYTES))
        of_model, learned = found["model_digest"], found["worth_sorting"]
        words = [str(finding["words"]) for finding in found["findings"]]
        about = f"Explained target: {found['target']}, on {found['patches']:,} patches of {found['slides']:,} slides."
        why = str(found["learned"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{place}: damaged ({one_line(error)}); make it again with --overwrite") from error
    if of_model != result.record.model.digest:
        raise ResultError(f"{result.out}: its evidence is from another model; make it again with --overwrite")
    yield about
    yield from words if learned else [why]


def _audit(result: Result) -> Metrics | None:
    """Return the records of the run's audit; None if there is none.

    Raises:
        ResultError: it is an audit of other results than the present ones.
    """
    found = AuditFolder(result.folder.place / AUDIT).read_metrics()
    if found is None:
        return None
    try:
        metrics = Metrics.model_validate(found)
    except ValueError as error:
        raise StoreError(f"{result.out}: its audit is damaged or of another version; audit it again") from error
    if metrics.run.run_digest != result.record.run_digest:
        raise ResultError(f"{result.out}: its audit is of different results; audit it again with --overwrite")
    return metrics


def _limits(result: Result, performance: Sequence[Performance], audit: Metrics | None) -> Iterator[str]:
    yield "Research use: nothing here shows that the model is fit for diagnosis."
    yield "A heatmap shows what moves this model's output, not what is true of the tissue."
    if performance:
        yield "Slides count as independent cases; where several are from one patient, intervals are too narrow."
        yield "The card cannot know whether the model was trained on these slides; if it was, say so."
    if performance and not result.record.is_slide_level:
        yield "The model answers for patches: a slide's score is derived from its patches, and is not a probability."
    small = [f.group or f.score for p in performance for f in p.rocs if f.auroc is not None and f.interval is None]
    if small:
        yield f"No interval (a class has fewer than {FEWEST} slides): {', '.join(dict.fromkeys(small))}."
    if audit is None:
        yield f"The explanations were not audited; `wsi-gradcam audit {result.out}` does that."
    elif (slides := audit.sample.slides) < FEWEST:
        yield f"The audit saw {slides} slide{'s' * (slides > 1)}, and its verdicts apply to no others."


def verdicts(card: Card) -> dict[str, list[VerdictRow]]:
    """Return the audit's verdicts by outcome, those that hold first; empty if there is no audit."""
    rows = card.audit.verdicts if card.audit else []
    return {outcome: found for outcome in HEADINGS if (found := [row for row in rows if row.outcome == outcome])}


# --- what is written -------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with this many decimals; a dash for none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def interval_text(found: Roc) -> str:
    """Return the interval of a curve's area, such as "0.712 to 0.934"."""
    return "–" if found.interval is None else f"{number(found.interval[0])} to {number(found.interval[1])}"


def page(card: Card) -> str:
    """Return the card as an HTML page that needs no other file and no script."""
    return render(
        "card/card.html",
        card=card,
        verdicts=verdicts(card),
        headings=HEADINGS,
        number=number,
        interval=interval_text,
        points=_points,
    )


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    """Return points of a unit square for an SVG of 200 px."""
    return " ".join(f"{200 * x:.1f},{200 - 200 * y:.1f}" for x, y in pairs)


def markdown(card: Card) -> str:
    """Return the card as Markdown, in which names from files are never interpreted as markup."""
    parts = [
        [f"# Model card: {_escaped(card.name)}", "", f"Made on {card.made} by wsi_gradcam from a run over slides."],
        ["## Model", "", *(f"- **{name}**: {_escaped(value)}" for name, value in card.model)],
        ["## Data", "", *(f"- **{name}**: {_escaped(value)}" for name, value in card.data)],
        _table(("site", "scanner", "label", "slides"), card.counts) if card.counts else [],
        ["## Performance against labels", "", *([_escaped(card.unlabelled)] if card.unlabelled else [])],
        *(list(_performance_lines(found)) for found in card.performance),
        ["## What it looks at", "", *(f"- {_escaped(words)}" for words in card.looks_at)] if card.looks_at else [],
        list(_audit_lines(card)),
        ["## Limits", "", *(f"- {_escaped(limit)}" for limit in card.limits)],
    ]
    return "\n\n".join("\n".join(part).strip() for part in parts if part) + "\n"


def _performance_lines(found: Performance) -> Iterator[str]:
    yield from [f"### {_escaped(found.label)} against the rest", ""]
    rows = [
        (one.score, one.group or "all", f"{one.positive} / {one.negative}", number(one.auroc), interval_text(one))
        for one in found.rocs
    ]
    yield from _table(("score", "site", "slides with / without", "AUROC", "95 % interval"), rows)
    if found.brier is not None:
        yield from ["", f"Brier score of the slide's probability: {number(found.brier)}."]
    if found.bins:
        yield from ["", *_table(("mean probability", "observed share", "slides"), [one.row for one in found.bins])]


def _audit_lines(card: Card) -> Iterator[str]:
    yield from ["## What the audit found", ""]
    if card.audit is None:
        yield "The explanations of this run were not audited."
        return
    sample = card.audit.sample
    yield f"Patches: {sample.patches:,}, from slides: {sample.slides:,}; p-values are corrected over all verdicts."
    for outcome, rows in verdicts(card).items():
        yield from ["", f"### {HEADINGS[outcome]}", ""]
        yield from (f"- **{row.question}** ({_escaped(row.of)}): {_escaped(row.words)}" for row in rows)
    if card.audit.not_tested:
        yield from ["", "### What was not tested", ""]
        yield from (f"- {_escaped(row.what)}: {_escaped(row.why)}" for row in card.audit.not_tested)


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return [
        f"| {' | '.join(_escaped(cell) if line is not lines[1] else str(cell) for cell in line)} |" for line in lines
    ]


def _escaped(text: object) -> str:
    """Return text as one line without active Markdown or HTML."""
    line = " ".join(str(text).split())
    for mark in "\\`*_[]<>|#":
        line = line.replace(mark, f"\\{mark}")
    return line
