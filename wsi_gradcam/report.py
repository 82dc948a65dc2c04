"""What the command line shows: progress, tables, descriptions."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from wsi_gradcam.annotations import check_mask, regions_of
from wsi_gradcam.api import Listener, Outcome, Preview
from wsi_gradcam.config import make_settings
from wsi_gradcam.inputs import SlideEntry
from wsi_gradcam.mask_picture import write_mask_picture
from wsi_gradcam.models.spec import read_spec
from wsi_gradcam.plan import RunPlan
from wsi_gradcam.reading import open_entry
from wsi_gradcam.slides import open_slide
from wsi_gradcam.stages import Pending, Task, examine_model
from wsi_gradcam.urls import is_url, name_of
from wsi_gradcam.workflow import SlideRecord

if TYPE_CHECKING:
    from wsi_gradcam.cam.choice import Choice
    from wsi_gradcam.cam.layout import Layout
    from wsi_gradcam.stain import Stain

MIB, GIB = 1 << 20, 1 << 30
NAMED = 5  # slides of one cause
LISTED = 20  # classes, layers
LINE_EVERY_S = 30.0


class Quiet(Listener):
    """Says nothing; knows whether the work has begun."""

    began = False

    def begun(self, run: RunPlan, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """From now on an error leaves something finished behind."""
        self.began = True


class Lines(Quiet):
    """Progress as plain lines on standard error, for logs."""

    def __init__(self) -> None:
        self.slides = self.slides_done = self.patches = self.patches_done = 0
        self.started = self.last_line = time.monotonic()

    def begun(self, run: RunPlan, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """Say what will be done."""
        super().begun(run, slides, dashboard)
        self.slides = len(slides)
        labels = ", ".join(target.label for target in run.targets)
        self.say(f"{len(slides)} slides, model {run.facts.name}, layer {run.facts.layer}, targets {labels}")
        self.say(_engine_line(run.facts.choice))
        if dashboard:
            self.say(f"dashboard {dashboard}")

    def task_done(self, task: Task, result: Any) -> None:
        """Count patches."""
        if isinstance(result, Pending):
            self.patches += result.left
            self.say(f"{task.slide.id}: {result.patches} patches, {result.left} to do")
        elif task.stage == "explain":
            self.patches_done += result
            if time.monotonic() - self.last_line > LINE_EVERY_S:
                self.say(f"{self.patches_done} patches, {self.rate():.0f} patches/s")

    def slide_done(self, record: SlideRecord) -> None:
        """Say how it ended."""
        self.slides_done += 1
        end = f"{record.status}, {record.seconds:.1f} s" + (f": {record.error}" if record.error else "")
        self.say(f"[{self.slides_done}/{self.slides}] {record.slide.id}: {end}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.last_line = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Patches per second since the start."""
        return self.patches_done / max(1e-9, time.monotonic() - self.started)


class Bars(Lines):
    """Progress as bars on a terminal."""

    def __init__(self, bars: Progress) -> None:
        super().__init__()
        self._bars = bars
        self._slide_bar = bars.add_task("slides", total=None, rate="")
        self._patch_bar = bars.add_task("patches", total=None, rate="")

    def begun(self, run: RunPlan, slides: Sequence[SlideEntry], dashboard: str) -> None:
        """Set the number of slides."""
        super().begun(run, slides, dashboard)
        self._bars.update(self._slide_bar, total=len(slides))

    def task_done(self, task: Task, result: Any) -> None:
        """Advance the patches."""
        super().task_done(task, result)
        rate = f"{self.rate():.0f} patches/s" if self.patches_done else ""
        self._bars.update(self._patch_bar, total=self.patches or None, completed=self.patches_done, rate=rate)

    def slide_done(self, record: SlideRecord) -> None:
        """Advance the slides; only what went wrong is worth a line beside the bars."""
        if record.error:
            super().slide_done(record)
        else:
            self.slides_done += 1
        self._bars.update(self._slide_bar, completed=self.slides_done)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, style="dim", highlight=False, markup=False)


@contextmanager
def progress(quiet: bool) -> Iterator[Quiet]:
    """A listener that suits where standard error goes: bars, plain lines, or nothing."""
    if quiet:
        yield Quiet()
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as bars:
            yield Bars(bars)
    else:
        yield Lines()


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """The end of a run: how many slides of each status, and a table of those that failed."""
    if as_json:
        records = [asdict(record) for record in outcome.records]
        for record in records:
            del record["slide"]["url"]  # it may hold secrets; what is shown of it is the path
        print(json.dumps({"out": str(outcome.out), "slides": records}, indent=1))
        return
    counts = {s: sum(r.status == s for r in outcome.records) for s in {r.status for r in outcome.records}}
    summary = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in sorted(counts.items()))
    print(f"{summary}; results in {outcome.out}")
    if outcome.failed:
        _print_failures(outcome)


def _engine_line(choice: Choice) -> str:
    """What runs the model, and how what was not taken did."""
    tried = []
    for trial in choice.trials:
        if (trial.engine, trial.precision) != (choice.engine, choice.precision):
            rate = "" if trial.patches_per_s is None else f"{trial.patches_per_s:.0f}/s"
            tried.append(f"{trial.engine} {trial.precision} {', '.join(filter(None, (rate, trial.remark)))}".rstrip())
    taken = [t.patches_per_s for t in choice.trials if (t.engine, t.precision) == (choice.engine, choice.precision)]
    speed = f" {taken[0]:.0f} patches/s" if taken and taken[0] else ""
    return f"engine {choice.engine} {choice.precision}{speed}" + (f" (also tried: {'; '.join(tried)})" if tried else "")


def _print_failures(outcome: Outcome) -> None:
    """Which slides failed and why, a line a cause: a folder of wrong files has one cause a thousand times."""
    causes: dict[str, list[str]] = {}
    for record in outcome.failed:
        cause = record.error.replace(f"{record.slide.path}: ", "").replace(record.slide.path, "the file")
        causes.setdefault(cause, []).append(record.slide.id)
    print("failed:", file=sys.stderr)
    for cause, slides in causes.items():
        more = f" and {len(slides) - NAMED} more" if len(slides) > NAMED else ""
        print(f"  {', '.join(slides[:NAMED])}{more}: {cause}", file=sys.stderr)
    if len(outcome.failed) > NAMED:
        print(f"  all of them are in {outcome.out / 'slides.csv'}", file=sys.stderr)


def print_preview(found: Preview, as_json: bool) -> None:
    """What a run would do, a row a slide and a sum."""
    rows = [{**asdict(e), "slide": e.slide.id} for e in found.estimates]
    errors = {entry.id: error for entry, error in found.errors}
    if as_json:
        print(json.dumps({"slides": rows, "errors": errors}, indent=1))
        return
    table = Table("slide", "patches", "spans", "blocks", "store", "memory")
    for e in found.estimates:
        store, memory = f"{e.store_bytes / MIB:.1f} MiB", f"{e.memory_bytes / GIB:.2f} GiB"
        table.add_row(Text(e.slide.id), f"{e.patches:,}", f"{e.spans:,}", f"{e.blocks:,}", store, memory)
    Console().print(table)
    patches, size = sum(e.patches for e in found.estimates), sum(e.store_bytes for e in found.estimates)
    print(
        f"{len(rows)} slides, {patches:,} patches, at most {size / MIB:.1f} MiB before compression; memory is an "
        "estimate for each process"
    )
    for slide, error in errors.items():
        print(f"cannot be planned: {slide}: {error}", file=sys.stderr)


def slide_info(path: str) -> dict[str, Any]:
    """What is known of a slide, as plain values."""
    slide = open_slide(path)
    info = slide.info
    slide.close()
    levels = [f"{level.height} x {level.width} (1/{level.downsample_y:g})" for level in info.levels]
    return {
        "slide": info.path,
        "format": info.vendor,
        "size": f"{info.height} x {info.width} px",
        "levels": ", ".join(levels),
        "mpp (y, x)": f"{info.mpp[0]:g}, {info.mpp[1]:g} um" if info.mpp else f"unusable: {info.mpp_problem}",
        "background": "#" + bytes(info.background).hex(),
        "bounds": "whole slide" if info.bounds is None else str(info.bounds),
        "digest": info.digest,
    }


def mask_info(path: str, out: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Write the picture of a slide's masks, see `write_mask_picture`; what it shows, as plain values.

    `values` are settings: `mpp`, `replace_mpp`, `tissue`, `mask`, `include`, `exclude`.
    """
    settings = make_settings(**values)
    check_mask(settings.mask, settings.include, settings.exclude, 1)
    name = name_of(path) if is_url(path) else Path(path).name
    regions = regions_of(settings.mask, name, settings.include, settings.exclude)
    slide = open_entry(SlideEntry(name, path), settings)
    try:
        shares = write_mask_picture(out, slide, settings.tissue, regions)
    finally:
        slide.close()
    colours = {"tissue": "tissue outlined in green", "pen": "ink orange", "shadow": "shadows and lines blue"}
    if regions is not None:
        colours["excluded"] = "left out by the mask dark gray"
    return {"picture": str(out), "it shows": ", ".join(f"{text} {shares[key]:.1%}" for key, text in colours.items())}


def model_info(model: str, layer: str | None) -> dict[str, Any]:
    """What is known of a model: its layers that can be explained, and the self-test of the one that would be."""
    from wsi_gradcam.cam.names import METHOD_INFO

    spec = read_spec(model)
    explainer = examine_model(spec, make_settings(layer=layer, engine="eager", precision="float32"), [])
    facts = explainer.facts
    return {
        "model": facts.name,
        "source": facts.source,
        "loading it": "runs code in it: load only what you trust" if spec.runs_code else "runs no code",
        "digest": facts.digest,
        "license": facts.license or "not stated",
        "classes": _shortened(facts.classes, ", "),
        "patch": f"{facts.patch_px[0]} x {facts.patch_px[1]} px at {facts.mpp or '?'} um/px",
        "input": f"{explainer.input_px[0]} x {explainer.input_px[1]} px",
        "mean, std": f"{facts.mean}, {facts.std}",
        "stain": _stain(facts.stain),
        "activation": facts.activation,
        "parameters": f"{facts.parameters:,}",
        "weights": spec.weights or "the source's own",
        "layers": _shortened([f"{found.name} {_shape(found.layout)}" for found in explainer.layers()[::-1]], "; "),
        "layer": ", ".join(f"{found.name} {_shape(found.layout)}" for found in facts.layers),
        "self-test": "head(trunk(x)) equals model(x)",
        "methods": ", ".join(METHOD_INFO),
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
    more = f"{between}... ({len(texts)} in all)" if len(texts) > LISTED else ""
    return between.join(texts[:LISTED]) + more
