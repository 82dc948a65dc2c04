"""Vocabulary of the audit's questions: names, measures, words and figures. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from wsi_gradcam.cam.facts import METHOD_INFO

if TYPE_CHECKING:
    from wsi_gradcam.audit.schema import ComparisonRow, CurveRow, EstimateRow, VerdictRow

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
        of: what it is of, in words, likewise.
        against: of a comparison: the reference, likewise; `{reference}` is the control or the other method.
        evidence: its words beside a verdict, where they are not `what`.
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
    """Return the questions that are asked of patches, or of slides."""
    return BAG_QUESTIONS if unit == "slide" else QUESTIONS


def map_keys(name: str) -> Keys:
    """Return the key of a map: of a control, or else of a method."""
    return Keys(control=name) if name in (*CONTROLS, RANDOM_ORDER) else Keys(method=name)


def method_title(name: str) -> str:
    """Return what a method is called; a control's name says that it is one."""
    if name in METHOD_INFO:
        return METHOD_INFO[name].title
    return {**BAG_TITLES, **CONTROL_TITLES}.get(name, name)


def change_title(name: str) -> str:
    """Return what a change of the patch is called."""
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
    """Return what a comparison is made with, in words."""
    if row.other_method:
        return method_title(row.other_method)
    return {**CONTROL_TITLES, ATTENTION: BAG_TITLES[ATTENTION]}.get(row.control or "", row.against)


@dataclass(frozen=True)
class Words:
    """A question in plain words, for readers who are not statisticians.

    Attributes:
        title: as a heading.
        how: how it is answered.
        not_proven: what an answer that holds leaves open.
        source: papers.
    """

    title: str
    how: str
    not_proven: str
    source: str


@dataclass(frozen=True)
class CurvesFigure:
    """Curves side by side.

    Attributes:
        panels: a title each, and curves with their names.
        description: for who cannot see it.
        reference: a height to compare them with, and its name.
    """

    panels: Sequence[tuple[str, Sequence[tuple[str, CurveRow]]]]
    description: str
    reference: float | None = None
    reference_name: str = "chance (control)"


@dataclass(frozen=True)
class IntervalsFigure:
    """Estimates with their intervals, a line each.

    Attributes:
        rows: with their names.
        axis: the name of the x axis.
        description: for who cannot see it.
        reference: a value to compare them with.
        left: where the x axis begins.
    """

    rows: Sequence[tuple[str, EstimateRow]]
    axis: str
    description: str
    reference: float | None = None
    left: float | None = None


Figure = CurvesFigure | IntervalsFigure
