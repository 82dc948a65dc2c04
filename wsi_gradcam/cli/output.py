"""The output of commands: summaries of runs and audits, tables, and descriptions of slides and models."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wsi_gradcam.api import Outcome, Preview
from wsi_gradcam.audit.plan import check_questions
from wsi_gradcam.audit.schema import BAG_QUESTIONS, QUESTIONS
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.cli import given, say
from wsi_gradcam.errors import ConfigError, SlideError, counted, printable, quoted
from wsi_gradcam.inputs.find import SlideEntry, search_slides
from wsi_gradcam.io.object_stores import S3
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.io.urls import is_url, redact_url, url_name
from wsi_gradcam.mil.spec import BAG_METHODS, is_slide_model, read_slide_model
from wsi_gradcam.models.spec import read_spec
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.run_files import RunFolder
from wsi_gradcam.run.examining import examine_model
from wsi_gradcam.run.progress import cause_of
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.slides import SUFFIXES, is_zarr, open_slide
from wsi_gradcam.slides.patch_reader import open_entry
from wsi_gradcam.system.processes import format_duration
from wsi_gradcam.tissue.annotations import check_mask, read_regions
from wsi_gradcam.tissue.masks import slide_masks, write_mask_preview

if TYPE_CHECKING:
    import argparse

    from wsi_gradcam.audit.running import AuditOutcome
    from wsi_gradcam.audit.schema import VerdictRow
    from wsi_gradcam.cam.facts import Layout
    from wsi_gradcam.demo.run import Agreement
    from wsi_gradcam.evidence.findings import KindRow
    from wsi_gradcam.evidence.running import EvidenceOutcome
    from wsi_gradcam.export import Exported
    from wsi_gradcam.mil.aggregators import LoadedAggregator
    from wsi_gradcam.mil.spec import SlideModelSpec
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.results.run_files import SlideFolder
    from wsi_gradcam.results.validation import Validation
    from wsi_gradcam.run.plan import Pace
    from wsi_gradcam.run.types import RunListener
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.tissue.stain import Stain

MIB, GIB = 1 << 20, 1 << 30
MAX_SLIDES = 5  # slides that are named for one cause
MAX_LISTED = 20  # classes, layers
MOST_LOOKED_AT_PX = 1 << 28  # pixels of a slide's smallest level: a few seconds
ANY = "any"  # for --fail-on


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """Print the end of a run: the number of slides of each status, and the causes of failures."""
    if as_json:
        records = [asdict(record) for record in outcome.records]
        for record in records:
            del record["slide"]["url"]  # it may contain secrets; the path is what may be shown
        print(json.dumps({"out": str(outcome.out), "slides": records}, indent=1))
        return
    counts = {s: sum(r.status == s for r in outcome.records) for s in {r.status for r in outcome.records}}
    summary = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in sorted(counts.items()))
    say(f"{summary}; results in {outcome.out}")
    if outcome.failed:
        _print_failures(outcome)


def _print_failures(outcome: Outcome) -> None:
    """Print a line for each cause: a folder of wrong files has the same cause a thousand times."""
    causes: dict[str, list[str]] = {}
    for record in outcome.failed:
        causes.setdefault(cause_of(record), []).append(record.slide.id)
    say("failed:", error=True)
    for cause, slides in causes.items():
        more = f" and {len(slides) - MAX_SLIDES} more" if len(slides) > MAX_SLIDES else ""
        say(f"  {', '.join(slides[:MAX_SLIDES])}{more}: {cause}", error=True)
    if len(outcome.failed) > MAX_SLIDES:
        say(f"  all of them are in {outcome.out / 'slides.csv'}", error=True)
    if before := sum(record.skipped and record.lasting for record in outcome.failed):
        say(f"  {before} of them failed before and were not retried; use --retry-failed to retry them", error=True)


def print_preview(found: Preview, as_json: bool) -> None:
    """Print what a run would do: a row for each slide, and the sum."""
    rows = [{**asdict(e), "slide": e.slide.id} for e in found.estimates]
    errors = {entry.id: error for entry, error in found.errors}
    if as_json:
        values = {"slides": rows, "errors": errors, "time": _time(found.pace), "remarks": found.remarks}
        print(json.dumps(values, indent=1))
        return
    table = Table("slide", "patches", "spans", "blocks", "store", "memory")
    for e in found.estimates:
        store, memory = f"{e.store_bytes / MIB:.1f} MiB", f"{e.memory_bytes / GIB:.2f} GiB"
        table.add_row(Text(printable(e.slide.id)), f"{e.patches:,}", f"{e.spans:,}", f"{e.blocks:,}", store, memory)
    Console().print(table)
    patches, size = sum(e.patches for e in found.estimates), sum(e.store_bytes for e in found.estimates)
    say(
        f"{counted(len(rows), 'slide')}, {patches:,} patches, at most {size / MIB:.1f} MiB before compression; memory "
        "is an estimate for each process"
    )
    pace = found.pace
    say(
        f"about {format_duration(pace.seconds)} for the {pace.patches:,} remaining patches, at "
        f"{pace.patches_per_s:.3g} patches/s: {pace.basis}"
    )
    for remark in found.remarks:
        say(remark, error=True)
    for note in found.run.facts.notes:
        say(f"model {found.run.facts.name}: {note}")
    for slide, error in errors.items():
        say(f"cannot be planned: {slide}: {error}", error=True)


def _time(pace: Pace) -> dict[str, Any]:
    return {**asdict(pace), "seconds": round(pace.seconds, 1)}


def print_results(run: RunFolder, slide: SlideFolder) -> None:
    """Print the files of a slide's results, and the command that shows them."""
    say("", f"  picture  {slide.overview}", f"  heatmap  {slide.heatmap}", f"  table    {slide.table}")
    command = sys.argv[0] if Path(sys.argv[0]).name == "wsi-gradcam" else "wsi-gradcam"  # `make` has it in .venv
    say(f"  to look  {command} view {run.place}")


def print_agreement(found: Agreement) -> None:
    """Print how well the demo's heatmap agrees with a truth, by channel and part of the slide."""
    say("", f"agreement with {found.truth}, ROC AUC per 16 px:")
    width = max(map(len, found.auc))
    say(f"  {'':{width}}  " + "  ".join(found.where))
    for label, values in found.auc.items():
        columns = (f"{value:{len(where)}.3f}" for value, where in zip(values, found.where, strict=True))
        say(f"  {label:{width}}  " + "  ".join(columns))
    say(f"  {found.note}")


def questions_to_fail_on(names: Sequence[str]) -> tuple[str, ...]:
    """Return the questions that `--fail-on` names.

    Raises:
        ConfigError: a name is not a question.
    """
    if ANY in names:
        return tuple({**QUESTIONS, **BAG_QUESTIONS})
    check_questions(names)
    return tuple(names)


def print_audit(outcome: AuditOutcome, failures: Sequence[VerdictRow], as_json: bool) -> None:
    """Print the conclusion, the verdicts, the path of the report, and the verdicts that `--fail-on` refuses."""
    metrics = outcome.metrics
    if as_json:
        values = {
            "out": str(outcome.out),
            "conclusion": None if metrics.conclusion is None else metrics.conclusion.model_dump(),
            "verdicts": [verdict.model_dump(mode="json") for verdict in metrics.verdicts],
            "failed_on": [f"{verdict.question}: {verdict.of}" for verdict in failures],
            "not_audited": [row.model_dump() for row in metrics.not_audited],
        }
        print(json.dumps(values, indent=1))
    else:
        say(*([] if metrics.conclusion is None else [metrics.conclusion.words, ""]))
        for verdict in metrics.verdicts:
            say(f"{verdict.outcome:>7}  {verdict.question} ({verdict.of}): {verdict.words}")
        sample = metrics.sample
        slides = "1 slide" if sample.slides == 1 else f"{sample.slides} slides"
        say("", f"{sample.patches} patches of {slides}, seed {sample.seed}; report: {outcome.out / 'report.html'}")
    for record in outcome.failed:
        say(f"not audited: {record.slide.id}: {record.error}", error=True)
    for verdict in failures:
        say(f"--fail-on: {verdict.question} ({verdict.of}) fails: {verdict.words}", error=True)


def run_evidence(arguments: argparse.Namespace, listener: RunListener) -> bool:
    """Do what `evidence` is asked for and print it; return whether something failed, or `--fail-on` has found it."""
    from wsi_gradcam.evidence import EvidenceSettings
    from wsi_gradcam.evidence.running import evidence_run

    names = (*(field.name for field in fields(EvidenceSettings)), "model", "against")
    options = given(arguments, *names, "workers", "scheduler", "wait_for_workers", "overwrite")
    options |= {name: getattr(arguments, name) for name in ("trust_code", "remote_slides")}
    outcome = evidence_run(arguments.out, listener=listener, **options)
    shortcuts = outcome.evidence.shortcuts if arguments.fail_on else []
    print_evidence(outcome, shortcuts, arguments.json)
    return bool(outcome.failed or shortcuts)


def print_evidence(outcome: EvidenceOutcome, shortcuts: Sequence[KindRow], as_json: bool) -> None:
    """Print the findings, the path of the report, and the kinds that `--fail-on` refuses."""
    evidence = outcome.evidence
    if as_json:
        values = {
            "out": str(outcome.out),
            "worth_sorting": evidence.worth_sorting,
            "findings": [finding.model_dump() for finding in evidence.findings],
            "against": None if evidence.against is None else evidence.against.words,
            "failed_on": [kind.number for kind in shortcuts],
            "not_read": evidence.not_read,
        }
        print(json.dumps(values, indent=1))
    else:
        for sort, words in evidence.statements:
            say(f"{sort:>8}  {words}")
        slides = "1 slide" if evidence.slides == 1 else f"{evidence.slides} slides"
        say(f"{evidence.places} places of {slides}, seed {evidence.seed}; {outcome.out / 'report.html'}")
    for record in outcome.failed:
        say(f"not read: {record.slide.id}: {record.error}", error=True)
    for kind in shortcuts:
        say(f"--fail-on: cluster {kind.number} looks like a shortcut", error=True)


def slide_info(path: str) -> dict[str, Any]:
    """Describe a slide, or a folder of slides."""
    if is_url(path) and path.endswith("/") and not path.rstrip("/").endswith(".zarr"):
        return _folder_info(path)
    if not is_url(path) and Path(path).is_dir() and not is_zarr(Path(path)):
        return _folder_info(path)
    slide = open_slide(path)
    info = slide.info
    try:
        area = _areas(slide)
    finally:
        slide.close()
    unsure = {True: ", used only if its pixels line up", False: ""}
    levels = [f"{o.width} x {o.height} (1/{o.downsample_y:g}{unsure[bool(o.problem)]})" for o in info.levels]
    return {
        "slide": info.path,
        "format": info.vendor,
        "size": f"{info.width} x {info.height} px",
        "levels": ", ".join(levels),
        "mpp (x, y)": f"{info.mpp[1]:g}, {info.mpp[0]:g} um" if info.mpp else f"unusable: {info.mpp_problem}",
        "background": "#" + bytes(info.background).hex(),
        "bounds": "whole slide" if info.bounds is None else str(info.bounds),
        "area": area,
        "digest": info.digest,
        **({"images": ", ".join(info.images)} if info.images else {}),
    }


def result_info(path: str) -> dict[str, Any]:
    """Describe the results in a folder, with the answers of a slide-level model; empty if there are none."""
    if not is_result(path):
        return {}
    result = open_result(path)
    record, slides = result.record, list(result)
    bag_methods = record.settings.get("bag_method", ()) if record.is_slide_level else ()
    counts = Counter(str(slide.status) for slide in slides)
    answers = {f"answer {slide.id}": slide.answer for slide in slides if slide.answer}
    more = len(answers) - MAX_LISTED
    return {
        "results": result.out,
        "model": record.model.name,
        "classes": _shortened(result.classes, ", "),
        "layer": record.model.layer,
        "methods": ", ".join(record.settings.get("method", ())),
        **({"bag methods": ", ".join(bag_methods)} if bag_methods else {}),
        "slides": ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items())),
        **dict(list(answers.items())[:MAX_LISTED]),
        **({"more answers": f"{more:,}, in slides.csv"} if more > 0 else {}),
    }


def is_result(path: str) -> bool:
    """Return whether a folder, local or in an object store, contains results."""
    if Path(path).suffix.lower() in SUFFIXES or (is_url(path) and not path.startswith(f"{S3}:")):
        return False
    return RunFolder(storage_path(path)).run.is_file()


def _folder_info(path: str) -> dict[str, Any]:
    """Describe a folder: the slides that a search finds, and what it leaves out."""
    found = search_slides([path])
    kinds = Counter(Path(entry.path).suffix.lower() for entry in found.entries)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return {
        "folder": redact_url(path) if is_url(path) else path,
        "slides": f"{len(found.entries):,} ({listed})",
        "first": ", ".join(entry.id for entry in found.entries[:MAX_SLIDES]),
        **{f"remark {number}": remark for number, remark in enumerate(found.remarks, 1)},
    }


def _areas(slide: Slide) -> str:
    """Return how much of a slide is tissue, glass and the rest, in words."""
    smallest = slide.info.levels[-1]
    if slide.info.mpp is None:
        return "not measured: the mpp is not known"
    if smallest.height * smallest.width > MOST_LOOKED_AT_PX:
        return "not measured, because the slide has no small level; use --mask-out to measure it"
    try:
        shares = slide_masks(slide).shares()
    except SlideError as error:
        return f"not measured: {error}"
    words = {"tissue": "tissue", "glass": "glass", "unscanned": "not scanned", "pen": "ink", "shadow": "shadows"}
    return ", ".join(f"{word} {shares[name]:.1%}" for name, word in words.items())


def mask_info(path: str, out: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Write the picture of a slide's masks, see `write_mask_preview`, and describe it.

    `values` are settings: `mpp`, `replace_mpp`, `tissue`, `mask`, `include`, `exclude`, `mask_frame`.
    """
    settings = make_settings(**values)
    check_mask(settings.mask, settings.include, settings.exclude, 1)
    name = url_name(path) if is_url(path) else Path(path).name
    regions = read_regions(settings.mask, name, settings.include, settings.exclude, path)
    slide = open_entry(SlideEntry(name, path), settings)
    try:
        shares = write_mask_preview(out, slide, settings.tissue, regions, settings.mask_frame)
    finally:
        slide.close()
    colours = {"tissue": "tissue outlined in green", "pen": "ink orange", "shadow": "shadows and lines blue"}
    if regions is not None:
        colours["excluded"] = "left out by the mask dark gray"
    colours |= {"glass": "bare glass", "unscanned": "not scanned"}
    return {"picture": str(out), "it shows": ", ".join(f"{text} {shares[key]:.1%}" for key, text in colours.items())}


def model_info(model: str, layer: str | None, trust_code: bool = False) -> dict[str, Any]:
    """Describe a model, with the layers that can be explained and the self-test of the one that would be.

    For a model whose loading runs code, only what can be found out without loading it, unless loading is allowed.
    """
    if is_slide_model(model):
        return _slide_model_info(read_slide_model(model).trusting(trust_code), layer)
    spec = read_spec(model).trusting(trust_code)
    if spec.runs_code and not spec.trusted:
        return _unloaded(spec)
    explainer = examine_model(spec, make_settings(layer=layer, engine="eager", precision="float32"), [])
    facts, refused = explainer.facts, explainer.refused_methods()
    return {
        "model": facts.name,
        "source": facts.source,
        "loading it": "runs code that it contains, as allowed" if spec.runs_code else "runs no code",
        "digest": facts.digest,
        "license": facts.license or "not stated",
        "classes": _shortened(facts.classes, ", "),
        "patch": f"{facts.patch_px[0]} x {facts.patch_px[1]} px at {facts.mpp or '?'} um/px",
        "input": f"{explainer.input_px[0]} x {explainer.input_px[1]} px",
        "mean, std": f"{facts.mean}, {facts.std}",
        "stain": _stain(facts.stain),
        "activation": facts.activation,
        "parameters": f"{facts.parameters:,}",
        "weights": spec.weights or "from the source",
        **({"notes": "; ".join(facts.notes)} if facts.notes else {}),
        "layers": _shortened([f"{found.name} {_shape(found.layout)}" for found in explainer.layers()[::-1]], "; "),
        "layer": ", ".join(f"{found.name} {_shape(found.layout)}" for found in facts.layers),
        "self-test": "head(trunk(x)) equals model(x)",
        "methods": ", ".join(method for method in METHOD_INFO if method not in refused),
        **{f"not {method}": reason.removeprefix(f"{facts.name}: ") for method, reason in refused.items()},
    }


def _slide_model_info(spec: SlideModelSpec, layer: str | None) -> dict[str, Any]:
    """Describe a slide-level model: its aggregator, and the encoder whose layers are explained."""
    from wsi_gradcam.mil.aggregators import load_aggregator

    about: dict[str, Any] = {"model": spec.name, "aggregator": spec.aggregator.source}
    if spec.runs_code and not spec.trusted:
        return {**about, "loading it": "runs code that it contains, so it was not loaded; --trust-code allows that"}
    aggregator = load_aggregator(spec)
    reasons = {method: _why_not(aggregator, method) for method in BAG_METHODS}
    about |= {
        "loading it": "runs code that it contains, as allowed" if spec.runs_code else "runs no code",
        "classes": _shortened(aggregator.classes, ", "),
        "activation": spec.activation,
        "features": f"{aggregator.network.feature_dim} of each patch",
        "aggregator's weights": spec.aggregator.weights or "from the source",
        "aggregator's parameters": f"{sum(p.numel() for p in aggregator.network.parameters()):,}",
        "bag methods": ", ".join(method for method, reason in reasons.items() if not reason),
        **{f"not {method}": reason for method, reason in reasons.items() if reason},
        **({"notes": "; ".join(aggregator.notes)} if aggregator.notes else {}),
    }
    if spec.encoder is None:
        return {**about, "license": spec.license or "not stated", "encoder": "none: its features are made elsewhere"}
    settings = make_settings(layer=layer, engine="eager", precision="float32")
    explainer = examine_model(spec, settings, [])
    facts, refused = explainer.facts, explainer.refused_methods()
    return {
        **about,
        "attention": ", ".join(facts.bag.attention) or "none" if facts.bag else "none",
        "encoder": spec.encoder.source,
        "encoder's weights": spec.encoder.weights or "from the source",
        "encoder's parameters": f"{facts.parameters:,}",
        "digest": facts.digest,
        "license": facts.license or "not stated",
        "patch": f"{facts.patch_px[0]} x {facts.patch_px[1]} px at {facts.mpp or '?'} um/px",
        "input": f"{explainer.input_px[0]} x {explainer.input_px[1]} px",
        "mean, std": f"{facts.mean}, {facts.std}",
        "stain": _stain(facts.stain),
        "layers": _shortened([f"{found.name} {_shape(found.layout)}" for found in explainer.layers()[::-1]], "; "),
        "layer": ", ".join(f"{found.name} {_shape(found.layout)}" for found in facts.layers),
        "self-test": "head(trunk(x)) equals model(x)",
        "methods": ", ".join(method for method in METHOD_INFO if method not in {*refused, "finercam"}),
        **{f"not {method}": reason.removeprefix(f"{facts.name}: ") for method, reason in refused.items()},
    }


def _why_not(aggregator: LoadedAggregator, method: str) -> str:
    """Return why an aggregator does not have a bag method; "" if it does."""
    from wsi_gradcam.mil.attribution import check_methods

    try:
        check_methods(aggregator.network, [method])
    except ConfigError as error:
        return str(error).removeprefix(f"{method}: ")
    return ""


def _unloaded(spec: ModelSpec) -> dict[str, Any]:
    """Describe a model from its model file and its file's digest only."""
    from wsi_gradcam.models.load import check_files

    digest = check_files(spec, always=True)
    told = spec.model_dump(mode="json", exclude_unset=True, exclude={"name", "source", "sha256", "provenance"})
    return {
        "model": spec.name,
        "source": spec.source,
        "loading it": "runs code that it contains, so it was not loaded; --trust-code allows that and shows the rest",
        "sha256": f"{digest}, as the model file says" if spec.sha256 else digest,
        **{key: value if isinstance(value, str | float) else quoted(value) for key, value in told.items()},
    }


def _stain(target: Stain | None) -> str:
    if target is None:
        return "as it is"
    values = target.to_json()
    return f"{values.pop('method')}, to {', '.join(f'{key} {value}' for key, value in values.items())}"


def _shape(layout: Layout) -> str:
    tokens = f" tokens after {layout.prefix} others" if layout.axes == "bnk" else ""
    return f"({layout.channels} x {layout.height} x {layout.width}{tokens})"


def _shortened(texts: Sequence[str], between: str) -> str:
    more = f"{between}... ({len(texts)} in all)" if len(texts) > MAX_LISTED else ""
    return between.join(texts[:MAX_LISTED]) + more


def print_validation(out: str, validation: Validation, as_json: bool) -> None:
    """Print what `validate` found, and what it could not check."""
    findings = validation.findings
    if as_json:
        print(json.dumps([finding.__dict__ for finding in findings]))
    else:
        for finding in findings:
            say(f"{finding.slide or out}: {finding.problem}")
        say(f"{counted(len(findings), 'problem')} found" if findings else f"{out}: valid")
    for note in validation.notes:
        say(f"note: {note}", error=as_json)
    if failed := validation.failed:
        say(
            f"{counted(len(failed), 'slide')} of the run failed and left no results to check: "
            f"{', '.join(failed[:5])}{' ...' if len(failed) > 5 else ''}; slides.csv says why",
            error=as_json,
        )


def print_exported(done: Exported) -> None:
    """Print the files of an export, or why there are none."""
    if done.error:
        say(f"error: {done.slide}: {done.error}", error=True)
    for path in done.paths:
        say(path)


def print_window_progress(done: int, total: int) -> None:
    """Print a line now and then while the run's window is computed, which takes a while for an archive."""
    if done % 100 == 0:
        say(f"computing the run's display window: {done} of {total} slides read", error=True)


def parse_window(text: str) -> tuple[float, float]:
    """Return the two ends of a window, "LOW,HIGH".

    Raises:
        ConfigError: it is anything else.
    """
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise ConfigError(f"--window is {text!r}, expected run, slide, or two numbers LOW,HIGH") from error
    return low, high
