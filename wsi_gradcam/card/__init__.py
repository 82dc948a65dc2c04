"""A model card as Markdown and HTML: the numbers of a run's tables and of its audit, and what was not measured.

This room reads results and loads the model, to be sure that the card is about that model; it writes nothing to OUT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_gradcam.audit.plan import AUDIT, AuditFolder
from wsi_gradcam.audit.schema import Metrics, VerdictRow
from wsi_gradcam.card.performance import (
    ANSWERS,
    CALIBRATION,
    FEWEST,
    Performance,
    calibrated_rows,
    interval_text,
    number,
    performance_of,
)
from wsi_gradcam.errors import ModelError, ResultError, StoreError, counted, one_line
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.io.local import wrap_write_errors, write_atomic
from wsi_gradcam.pages import render
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.slide_tables import read_slide_records
from wsi_gradcam.run.settings import make_settings

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.io.paths import StoragePathLike
    from wsi_gradcam.results.run import Result
    from wsi_gradcam.results.slide import SlideResult

HEADINGS = {"holds": "What holds", "fails": "What fails", "unclear": "What these {} do not tell"}


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
    """Write the card of the model used for `out`, and return the paths of the Markdown and the HTML file.

    Args:
        model: anything that `--model` accepts; it is loaded, and must be the one used for the run.
        out: the folder or s3:// URL of a run, with its audit if there is one.
        dest: folder for NAME.card.md and NAME.card.html.
        overwrite: replace existing cards.
        trust_code: allow the code in the model to run.

    Raises:
        ModelError: there is no such model, or it is not the run's.
        ResultError: `out` contains no run, or a card exists and may not be replaced.
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
    performance, unlabelled = performance_of(finished, result, facts.activation)
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
        limits=tuple(_limits(result, finished, performance, audit)),
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
    has_encoder = bool(record.model.layer)
    yield "kind", "slide-level model (bags of patches)" if record.is_slide_level else "patch model"
    yield "source", facts.source
    yield "digest", facts.digest
    yield "licence", facts.license or "not stated"
    yield "classes", ", ".join(facts.classes)
    if facts.bag is not None:
        yield "answer", f"{ANSWERS[facts.activation]}, for the whole slide"
        yield "input", f"feature vectors of {counted(facts.bag.feature_dim, 'number')}, one for each patch"
    if has_encoder:
        yield "patches" if facts.bag else "input", f"{width} x {height} px at {record.model.mpp:g} um per pixel"
    whose = "" if facts.bag is None else "encoder's " if has_encoder else "aggregator's "
    yield f"{whose}parameters", f"{facts.parameters:,}"
    if has_encoder:
        yield "explained at layer", record.model.layer
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
    if result.record.model.layer:
        yield "patch overlap", f"{result.record.settings.get('overlap', 0):g}"
    if (patients := _patients(result, finished)) is not None:
        yield "patients", f"{patients:,}"


def _patients(result: Result, finished: Sequence[SlideResult]) -> int | None:
    """Return how many patients the slides are from; None unless the list states it for each."""
    records = read_slide_records(result.folder.record)
    found = [str(records.get(slide.id, {}).get("patient") or "") for slide in finished]
    return len(set(found)) if found and all(found) else None


def _counts(finished: Sequence[SlideResult]) -> Iterator[tuple[str, str, str, int]]:
    """Yield the number of slides of each site, scanner and label; nothing if no list stated them."""
    keys = Counter(tuple(slide.row.get(name) or "" for name in ("site", "scanner", "label")) for slide in finished)
    if any(any(key) for key in keys):
        for (site, scanner, label), count in sorted(keys.items()):
            yield site, scanner, label, count


# --- evidence, audit and limits --------------------------------------------------------------------------------------


def _looks_at(result: Result) -> Iterator[str]:
    """Yield the findings of the run's evidence in words; nothing if there is none.

    Raises:
        ResultError: it was made with a different model than the present results.
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
        ResultError: it is not an audit of the present results.
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


def _limits(
    result: Result, finished: Sequence[SlideResult], performance: Sequence[Performance], audit: Metrics | None
) -> Iterator[str]:
    yield "Research use: nothing here shows that the model is fit for diagnosis."
    yield "A heatmap shows what moves this model's output, not what is true of the tissue."
    if performance:
        yield from _dependence(result, finished)
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


def _dependence(result: Result, finished: Sequence[SlideResult]) -> Iterator[str]:
    """Yield what follows for the intervals from slides of the same patient."""
    patients, slides = _patients(result, finished), len(finished)
    if patients is None:
        yield "Slides count as independent cases; where several are from one patient, intervals are too narrow."
    elif patients < slides:
        yield (
            f"Slides count as independent cases, but the {counted(slides, 'slide')} are from "
            f"{counted(patients, 'patient')}: intervals are too narrow."
        )


def verdicts(card: Card) -> dict[str, list[VerdictRow]]:
    """Return the audit's verdicts by heading, those that hold first; empty if there is no audit."""
    if card.audit is None:
        return {}
    rows, units = card.audit.verdicts, _units(card.audit)
    by_heading = {words.format(units): [row for row in rows if row.outcome == key] for key, words in HEADINGS.items()}
    return {heading: found for heading, found in by_heading.items() if found}


def _units(audit: Metrics) -> str:
    return "slides" if audit.run.unit == "slide" else "patches"


def sampled(audit: Metrics) -> str:
    """Return the basis of the verdicts as a sentence."""
    sample = audit.sample
    slides, patches = counted(sample.slides, "slide"), counted(sample.patches, "patch").replace("patchs", "patches")
    found = f"{slides} with {patches}" if audit.run.unit == "slide" else f"{patches} of {slides}"
    return f"The audit examined {found}; p-values are corrected over all verdicts."


# --- what is written -------------------------------------------------------------------------------------------------


def page(card: Card) -> str:
    """Return the card as an HTML page that needs no other files and no scripts."""
    return render(
        "card/card.html",
        card=card,
        verdicts=verdicts(card),
        sampled=sampled,
        calibrated=calibrated_rows,
        calibration=CALIBRATION,
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
    yield from _table(("score", "site", "slides with / without", "AUROC", "95% interval"), rows)
    if found.unscored:
        yield from ["", f"{counted(found.unscored, 'slide')} without any explained patch: not counted."]
    if found.calibrated:
        yield from ["", "Calibration of the slide's probability (a Brier score of 0 is perfect):", ""]
        yield from _table(CALIBRATION, calibrated_rows(found))
    if found.bins:
        yield from ["", *_table(("mean probability", "observed share", "slides"), [one.row for one in found.bins])]


def _audit_lines(card: Card) -> Iterator[str]:
    yield from ["## What the audit found", ""]
    if card.audit is None:
        yield "The explanations of this run were not audited."
        return
    yield sampled(card.audit)
    for heading, rows in verdicts(card).items():
        yield from ["", f"### {heading}", ""]
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
