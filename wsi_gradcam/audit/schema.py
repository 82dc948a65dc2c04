"""The content of `metrics.json` as types; `metrics_schema` returns its published JSON Schema."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from wsi_gradcam.cam.facts import METHOD_INFO

# The module of each question, with its `QUESTION` or the name behind the colon, in the order of the report.
QUESTIONS: dict[str, str] = {
    "faithfulness": "wsi_gradcam.audit.questions.faithfulness",
    "sanity": "wsi_gradcam.audit.questions.sanity",
    "stability": "wsi_gradcam.audit.questions.stability",
    "locality": "wsi_gradcam.audit.questions.gradients:LOCALITY",
    "saturation": "wsi_gradcam.audit.questions.gradients:SATURATION",
    "shortcuts": "wsi_gradcam.audit.questions.shortcuts",
    "plausibility": "wsi_gradcam.audit.questions.plausibility",
}
# The same for slide-level models, with slides in place of patches.
BAG_QUESTIONS: dict[str, str] = {
    "faithfulness": "wsi_gradcam.audit.questions.bag_orders:FAITHFULNESS",
    "sufficiency": "wsi_gradcam.audit.questions.bag_orders:SUFFICIENCY",
    "sanity": "wsi_gradcam.audit.questions.bag_trust:SANITY",
    "stability": "wsi_gradcam.audit.questions.bag_trust:STABILITY",
    "agreement": "wsi_gradcam.audit.questions.bag_orders:AGREEMENT",
    "shortcuts": "wsi_gradcam.audit.questions.bag_trust:SHORTCUTS",
    "plausibility": "wsi_gradcam.audit.questions.bag_trust:PLAUSIBILITY",
}
Unit = Literal["patch", "slide"]  # of which the questions are asked
# Maps that know nothing of the model.
RANDOM, EDGES, CONSTANT, CENTRE, PROBABILITY = "random", "edges", "constant", "centre", "probability"
CONTROLS = (RANDOM, EDGES, CONSTANT, CENTRE, PROBABILITY)
RANDOM_ORDER = "random_order"  # of a slide's patches
PEN, GLASS, BLUR, BORDER = "pen", "glass", "blur", "border"  # regions that should not decide
RESEMBLING = 0.95  # a map resembles another that is more like it than this share of its cells' permutations
GUIDED, INTEGRATED = "guided_backprop", "integrated_gradients"
ATTENTION, SINGLE = "attention", "single"  # maps that all slide-level models have, or nearly all
# Methods that run the model dozens of times for a map: nothing that needs many maps is measured of them.
EXPENSIVE = frozenset(
    name for name, info in METHOD_INFO.items() if info.asks == "model" and name not in ("gradient", GUIDED)
)
BAG_TITLES = {
    "gradient_x_input": "gradient x input",
    "lrp": "LRP",
    "one_removed": "one patch removed",
    "shapley": "Shapley values",
    SINGLE: "single patches",
    ATTENTION: "attention",
}
CONTROL_TITLES = {
    RANDOM: "noise (control)",
    EDGES: "edges (control)",
    CONSTANT: "random pixels (control)",
    CENTRE: "centre first (control)",
    PROBABILITY: "neighbouring probabilities (control)",
    RANDOM_ORDER: "random order (control)",
}


class Keys(TypedDict, total=False):
    """The subject of a row, see `wsi_gradcam.audit.schema.Keyed`."""

    method: str
    control: str
    other_method: str
    baseline: str
    change: str
    suspect: str
    label: str
    order: str


@dataclass(frozen=True)
class Measure:
    """A number that the audit reports.

    Attributes:
        name: stable, for programs.
        what: in words, with the keys that it names in braces; `{map}` is the method or the control.
        unit: of it.
        of: its subject in words, likewise.
        against: the reference of a comparison, likewise; `{reference}` is the control or the other method.
        evidence: its words beside a verdict, if they differ from `what`.
    """

    name: str
    what: str
    unit: str = ""
    of: str = "{map}"
    against: str = "{reference}"
    evidence: str = ""

    def texts(self, keys: Keys) -> dict[str, str]:
        """Return `of` and `what` of a row."""
        return {"of": fill(self.of, keys), "what": fill(self.what, keys)}


def fill(text: str, keys: Any) -> str:
    """Return a text of a `Measure` with its keys filled in."""
    either = {
        "map": keys.get("method", keys.get("control")),
        "reference": keys.get("control", keys.get("other_method")),
    }
    return text.format(**either, **keys)


def questions_of(unit: Unit) -> dict[str, str]:
    """Return the questions about patches, or about slides."""
    return BAG_QUESTIONS if unit == "slide" else QUESTIONS


def map_keys(name: str) -> Keys:
    """Return the key of a map: of a control, or else of a method."""
    return Keys(control=name) if name in (*CONTROLS, RANDOM_ORDER) else Keys(method=name)


def method_title(name: str) -> str:
    """Return a method's name for readers; that of a control says that it is one."""
    if name in METHOD_INFO:
        return METHOD_INFO[name].title
    return {**BAG_TITLES, **CONTROL_TITLES}.get(name, name)


def change_title(name: str) -> str:
    """Return the name of a change of the patch for readers."""
    return {"jpeg": "JPEG", "half": "half of the patches"}.get(name, name)


def row_title(row: EstimateRow | ComparisonRow | CurveRow | VerdictRow) -> str:
    """Return what a row is about, in words."""
    names = [row.suspect] if row.suspect and row.method else []
    if row.method:
        names.append(method_title(row.method))
        if row.question == "agreement" and row.other_method:
            names[-1] += f" and {method_title(row.other_method)}"
    elif row.control in CONTROL_TITLES:
        names.append(CONTROL_TITLES[row.control])
    if row.change and (names or row.question == "stability"):
        names.append(change_title(row.change))
    return ", ".join(name for name in names if name) or row.of


def reference_title(row: ComparisonRow) -> str:
    """Return the reference of a comparison, in words."""
    if row.other_method:
        return method_title(row.other_method)
    return {**CONTROL_TITLES, ATTENTION: BAG_TITLES[ATTENTION]}.get(row.control or "", row.against)


@dataclass(frozen=True)
class Words:
    """A question in plain words, for readers who are not statisticians.

    Attributes:
        title: as a heading.
        how: how it is answered.
        not_proven: what a verdict that holds does not prove.
        source: papers.
    """

    title: str
    how: str
    not_proven: str
    source: str


@dataclass(frozen=True)
class CurvesFigure:
    """A figure of curves, side by side.

    Attributes:
        panels: each a title, and curves with their names.
        description: for readers who cannot see it.
        reference: a height to compare them with, and its name.
    """

    panels: Sequence[tuple[str, Sequence[tuple[str, CurveRow]]]]
    description: str
    reference: float | None = None
    reference_name: str = "chance (control)"


@dataclass(frozen=True)
class IntervalsFigure:
    """A figure of estimates with their intervals, one line each.

    Attributes:
        rows: with their names.
        axis: the name of the x axis.
        description: for readers who cannot see it.
        reference: a value to compare them with.
        left: where the x axis begins.
    """

    rows: Sequence[tuple[str, EstimateRow]]
    axis: str
    description: str
    reference: float | None = None
    left: float | None = None


Figure = CurvesFigure | IntervalsFigure


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_known)]
"""A number; null where there is none."""


def _text(value: Any) -> Any:
    """Return a text in which names that are not Unicode are shown as well as possible."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_text)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Keyed(_Strict):
    """The subject of a row, for programs; null where it does not apply. The row's other texts are for display only.

    Attributes:
        question: of the audit.
        method: the method of the map.
        control: something independent of the model that replaces the map, or is compared with it: `random`, `edges`,
            `constant`, `centre`, `probability`; of a slide-level model `random_order`, `attention`; `random_weights`,
            `equal_noise`, `equal_area`, `share_of_area`.
        other_method: the method that it is compared with.
        baseline: what replaces removed pixels: `mean`, `blur`, `background`, `road`.
        change: of the patch, such as `stain`.
        suspect: a region that should not affect the answer, such as `pen`.
        label: of a class or target.
        order: the order in which weights become random, or patches are removed.
    """

    question: str
    method: str | None = None
    control: str | None = None
    other_method: str | None = None
    baseline: str | None = None
    change: str | None = None
    suspect: str | None = None
    label: str | None = None
    order: str | None = None


class EstimateRow(Keyed):
    """A weighted mean over patches, with its 95% interval from a bootstrap.

    Attributes:
        measure: its stable name.
        of: its method, control, suspect or change.
        what: the measure in words.
        unit: the unit of value, low and high.
        patches, slides: the numbers of those that count.
        missing: the number of patches without a value.
        resampled: what is resampled: slides, or patches if there are fewer than six slides; for random weights, their
            draws.
    """

    measure: str
    of: str
    what: str
    unit: str
    value: Number
    low: Number
    high: Number
    patches: int
    slides: int
    missing: int
    resampled: Literal["slide", "patch", "draw"]


class ComparisonRow(Keyed):
    """Two numbers of the same patches: the difference with its interval, p, effect, and how often the first is larger.

    Attributes:
        measure: its stable name.
        p: two-sided p-value of a sign-flipping test, not corrected for multiple testing.
        effect: mean over standard deviation of the differences (Cohen's d of pairs).
        better: share of the patches where the first is larger; ties count half.
    """

    measure: str
    of: str
    against: str
    what: str
    unit: str
    difference: Number
    low: Number
    high: Number
    p: Number
    effect: Number
    better: Number
    patches: int
    slides: int


class CurveRow(Keyed):
    """A mean curve over patches, or over slides; `measure` is its stable name."""

    measure: str
    of: str
    what: str
    x_name: str
    y_name: str
    x: list[float]
    y: list[Number]
    low: list[Number] | None = None
    high: list[Number] | None = None


class VerdictRow(Keyed):
    """An answer in plain words.

    Attributes:
        measures: stable names of the numbers that it is based on, in rows with the same method, baseline, change and
            suspect.
        of: the method, suspect or change that it is about.
        asked: the question as a reader would ask it.
        p, p_adjusted: p-value of its test, and the same corrected over all verdicts (Holm); null if the verdict is
            based on finding nothing.
        evidence: the same numbers in words.
    """

    measures: list[str]
    of: str
    asked: str
    outcome: Literal["holds", "fails", "unclear"]
    words: str
    p: Number
    p_adjusted: Number
    evidence: list[str]


class ConclusionRow(_Strict):
    """The verdicts' conclusion: a sentence that follows from them by rule.

    Attributes:
        method: the method whose map it is about, the first of the run.
        outcome: `holds`: the map can be believed where it is hot; `fails`: it cannot be believed; `unclear`.
        words: the sentence.
    """

    method: str
    outcome: Literal["holds", "fails", "unclear"]
    words: str


class QuadrantRow(_Strict):
    """Faithfulness and plausibility of a method, on the `patches` for which there is an annotation."""

    method: str
    patches: int
    faithful: Literal["holds", "fails", "unclear"]
    plausible: Literal["holds", "fails", "unclear"]
    meaning: str


class UntestedRow(_Strict):
    """A part of the audit that was not tested, or a slide that was not audited, and the reason."""

    what: Text
    why: Text


class StrataRow(Keyed):
    """A number compared between sites, scanners, labels or classes, with p of the Kruskal-Wallis test."""

    measure: str
    by: str
    of: str
    what: str
    groups: dict[str, Number]
    p: Number


class SampleFacts(_Strict):
    """Facts of the sample of patches."""

    asked: int
    patches: int
    deep: int
    unreadable: int
    slides: int
    slides_of_run: int
    patches_of_run: int
    seed: int
    strata: dict[str, int]


class RunFacts(_Strict):
    """Facts of the run that was audited.

    Attributes:
        unit: what the questions are about: patches, or the slides of a slide-level model. If it is the slide, `patches`
            of a row are slides too.
    """

    out: Text
    run_digest: str
    audit_digest: str
    model: str
    model_digest: str
    layer: str
    classes: list[str]
    target: str
    methods: list[str]
    questions: list[str]
    annotations: Text
    regions: Text
    versions: dict[str, str]
    unit: Literal["patch", "slide"] = "patch"


class AgainstFacts(_Strict):
    """Another audit that this one is compared with, on the patches that they have in common."""

    out: Text
    model: str
    audit_digest: str
    patches: int
    only_there: int
    comparisons: list[ComparisonRow]


class Metrics(_Strict):
    """All findings of an audit, for the archive or for a slide."""

    format: Literal["wsi-gradcam audit 1"] = "wsi-gradcam audit 1"
    slide: Text = Field(default="", description="id of the slide that it is about; empty for the archive")
    run: RunFacts
    sample: SampleFacts
    verdicts: list[VerdictRow]
    quadrants: list[QuadrantRow]
    estimates: list[EstimateRow]
    comparisons: list[ComparisonRow]
    curves: list[CurveRow]
    strata: list[StrataRow]
    not_tested: list[UntestedRow]
    not_audited: list[UntestedRow]
    against: AgainstFacts | None = None
    conclusion: ConclusionRow | None = None

    def failed(self, questions: tuple[str, ...] = ()) -> list[VerdictRow]:
        """Return the verdicts that fail, for some questions or for all."""
        return [v for v in self.verdicts if v.outcome == "fails" and (not questions or v.question in questions)]


def metrics_schema() -> dict[str, Any]:
    """Return the JSON Schema of metrics.json."""
    schema = Metrics.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
