"""`report.html` of an audit: one page for the archive and one for each slide, which need nothing else and no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from wsi_gradcam.audit.folder import REPORT
from wsi_gradcam.audit.judging_faithfulness import fractions_of
from wsi_gradcam.audit.measured import MAIN
from wsi_gradcam.audit.report.figures import SMALL_PANEL, curves_figure
from wsi_gradcam.audit.report.numbers import number
from wsi_gradcam.audit.report.parts import pill, question_part, square, verdict_list
from wsi_gradcam.audit.report.pictures import legend, overlay, patch_picture
from wsi_gradcam.audit.report.style import AUDIT_STYLE
from wsi_gradcam.audit.report.words import HOW_TO_READ, WORDS
from wsi_gradcam.audit.schema import CurveRow
from wsi_gradcam.cam.names import METHOD_INFO
from wsi_gradcam.pages.parts import Html, document, facts, paragraph, section, table, text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.folder import Numbers
    from wsi_gradcam.audit.schema import Metrics

SHOWN = 4  # example patches of a slide
UNITS = {"logit": "in logits, as in the heatmap", "arbitrary": "in a unit of the method's own"}


@dataclass(frozen=True, eq=False)
class Example:
    """An example patch.

    Attributes:
        title: which patch it is.
        rgb: uint8 [h, w, 3].
        map: float32 [h, w] of the first method, as heatmaps show it.
        leaky: the same with a backward that leaks through ReLUs; None where it is not known.
        curves: of deletion and insertion, by the map's name: (deletion [Q], insertion [Q]).
    """

    title: str
    rgb: NDArray[np.uint8]
    map: NDArray[np.float32]
    leaky: NDArray[np.float32] | None
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def archive_page(metrics: Metrics, slides: Sequence[str], examples: Sequence[Example], scale: float) -> bytes:
    """The page of the archive; `slides` have pages of their own."""
    title = f"Can these explanations be believed? {metrics.run.model}"
    links = [(_link(name, f"{name}/{REPORT}"),) for name in slides]
    more = section("Slides of the sample", table(("each has a page of its own",), links), "slides") if links else ""
    return _page(title, metrics, examples, scale, "", more)


def slide_page(metrics: Metrics, examples: Sequence[Example], scale: float, overview: Html) -> bytes:
    """The page of a slide."""
    up = "../" * (metrics.slide.count("/") + 1) + REPORT
    back = paragraph(Html(f'<a href="{text(up)}">The whole archive</a>: with more patches, more can be told.'))
    return _page(metrics.slide, metrics, examples, scale, section("The slide", f"{overview}{back}", "slide"), "")


def _page(title: str, metrics: Metrics, examples: Sequence[Example], scale: float, first: str, last: str) -> bytes:
    asked = [name for name in WORDS if name in metrics.run.questions]
    parts = [
        _head(title, metrics),
        first,
        section("What was found", paragraph(HOW_TO_READ) + verdict_list(metrics), "verdicts"),
        section("Faithful and plausible are two things", square(metrics.quadrants), "square"),
        section("Example patches", _examples(metrics, examples, scale), "examples"),
        *(section(WORDS[name].title, question_part(metrics, name), name) for name in asked),
        *([section("Sites, scanners, labels", _strata(metrics), "strata")] if metrics.strata else []),
        *([section("Compared with another audit", _against(metrics), "against")] if metrics.against else []),
        section("What was not tested", _untested(metrics), "untested"),
        last,
        section("Sample and versions", _sample(metrics), "sample"),
    ]
    return document(title, AUDIT_STYLE, "".join(parts))


def _head(title: str, metrics: Metrics) -> str:
    counts = Counter(verdict.outcome for verdict in metrics.verdicts)
    pills = " ".join(f"{counts[name]} {pill(name)}" for name in ("holds", "fails", "unclear") if counts[name])
    run = metrics.run
    told = facts(
        {
            "Model": f"{run.model} ({run.model_digest[:12]}), layer {run.layer}",
            "Audited": "each patch's predicted class" if run.target == "predicted" else run.target,
            "Methods": ", ".join(METHOD_INFO[name].title for name in run.methods),
            "Patches": _counted(metrics),
            "Annotations": run.annotations or "none",
            "Regions": run.regions,
        }.items()
    )
    return f"<header><h1>{text(title)}</h1><p>{pills or 'no verdict'}</p>{told}</header>\n"


def _counted(metrics: Metrics) -> str:
    sample = metrics.sample
    slides = "the run's slide" if sample.slides_of_run == 1 else f"{sample.slides:,} of {sample.slides_of_run:,} slides"
    return f"{sample.patches:,} of {sample.patches_of_run:,}, of {slides}"


def _examples(metrics: Metrics, examples: Sequence[Example], scale: float) -> str:
    if not examples:
        return paragraph("No patch could be read.")
    method = metrics.run.methods[0]
    note = (
        f"Left what the model saw, right the map of {METHOD_INFO[method].title} over it; all patches share one scale, "
        "so that weak maps look weak. Below, how the logit changes as pixels are taken away (deletion) or given back "
        "(insertion) in the order of the map and of controls."
    )
    if any(example.leaky is not None for example in examples):
        note += " The picture on the far right is the map with a backward that leaks through units that are off."
    cards = "".join(_card(example, scale) for example in examples)
    return f'{paragraph(note)}{legend(scale, UNITS[METHOD_INFO[method].unit])}<div class="patches">{cards}</div>'


def _card(example: Example, scale: float) -> str:
    pair = patch_picture(example.rgb, f"{example.title}: the patch") + overlay(
        example.rgb, example.map, scale, f"{example.title}: its map"
    )
    if example.leaky is not None:
        pair += overlay(example.rgb, example.leaky, scale, f"{example.title}: its map with a leaky backward")
    drawn = _patch_curves(example) if example.curves else ""
    kind = "" if example.leaky is None else ' class="three"'
    return f"<figure{kind}><figcaption>{text(example.title)}</figcaption>{pair}{drawn}</figure>"


def _patch_curves(example: Example) -> str:
    panels = []
    for i, way in enumerate(("deletion", "insertion")):
        rows = [
            CurveRow(
                question="faithfulness",
                measure=way,
                of=name,
                what=way,
                x_name="share of the pixels",
                y_name="logit",
                x=list(fractions_of(MAIN)),
                y=pair[i].tolist(),
            )
            for name, pair in example.curves.items()
        ]
        panels.append((way, rows))
    return curves_figure(panels, f"{example.title}: curves of deletion and insertion", SMALL_PANEL)


def _strata(metrics: Metrics) -> str:
    lines = [
        (row.by, row.of, row.what, ", ".join(f"{k}: {number(v)}" for k, v in row.groups.items()), number(row.p))
        for row in metrics.strata
    ]
    note = "A small p says that the groups differ; it does not say why."
    return paragraph(note) + table(("by", "of", "number", "means", "p"), lines)


def _against(metrics: Metrics) -> str:
    there = metrics.against
    assert there is not None
    note = (
        f"{there.patches} patches that both have; there: {there.model} in {there.out}. A positive difference means "
        f"more here. {there.only_there} patches of the other audit are not in this run."
    )
    lines = [
        (
            r.of,
            r.against,
            r.what,
            f"{number(r.difference)} ({number(r.low)} to {number(r.high)})",
            r.unit,
            number(r.p),
            number(r.effect),
        )
        for r in there.comparisons
    ]
    return paragraph(note) + table(
        ("here", "there", "measure", "difference (95 % range)", "unit", "p", "effect (d)"), lines
    )


def _untested(metrics: Metrics) -> str:
    lines = [(row.what, row.why) for row in metrics.not_tested]
    slides = [(row.what, row.why) for row in metrics.not_audited]
    parts = [table(("what", "why"), lines) if lines else paragraph("Every question was asked.")]
    if slides:
        parts.append("<h3>Slides that were not audited</h3>" + table(("slide", "why"), slides))
    return "".join(parts)


def _sample(metrics: Metrics) -> str:
    sample, run = metrics.sample, metrics.run
    strata = ", ".join(f"{name}: {count}" for name, count in sample.strata.items())
    return facts(
        {
            "Patches": f"{sample.patches} ({sample.asked} were asked for); {sample.unreadable} could not be read",
            "Measured in depth": f"{sample.deep} patches: randomisation, finite steps, other ways to fill gaps",
            "Drawn as": strata,
            "Seed": sample.seed,
            "Run": run.run_digest[:16],
            "Audit": run.audit_digest[:16],
            "Model": run.model_digest[:16],
            "Versions": ", ".join(f"{name} {number}" for name, number in run.versions.items()),
        }.items()
    )


def examples_of(
    numbers: Numbers, slide: str, method: str, factor: int, classes: Sequence[str], wanted: int = SHOWN
) -> list[Example]:
    """Example patches of a slide's first piece: those of the highest and the lowest score, and between.

    `factor` is from raw maps to what heatmaps show.
    """
    known = [i for i in range(len(numbers["base/number"])) if numbers["base/readable"][i]]
    if not known:
        return []
    order = sorted(known, key=lambda i: (-float(np.nan_to_num(numbers["base/logit"][i])), i))
    chosen = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(wanted, len(order)))]
    return [_example(numbers, slide, method, factor, classes, i) for i in dict.fromkeys(chosen)]


def _example(numbers: Numbers, slide: str, method: str, factor: int, classes: Sequence[str], i: int) -> Example:
    title = f"{slide}, patch {int(numbers['base/number'][i])}"
    if "base/probability" in numbers:
        label = classes[int(numbers["base/class"][i])]
        title += f", probability of {label} {float(numbers['base/probability'][i]):.2f}"
    curves = {}
    for name in (method, "random", "edges"):
        keys = [f"faithfulness/{MAIN}/{name}/{way}" for way in ("deletion", "insertion")]
        if keys[0] in numbers:
            curves[name] = (numbers[keys[0]][i], numbers[keys[1]][i])
    own, leaky = numbers[f"map/{method}"][i], numbers.get(f"leaky/{method}")
    other = None if leaky is None else leaky[i] * np.float32(factor)
    return Example(title, numbers["shown/rgb"][i], own * np.float32(factor), other, curves)


def _link(name: str, path: str) -> Html:
    return Html(f'<a href="./{text(quote(path.encode("utf-8", "surrogateescape")))}">{text(name)}</a>')
