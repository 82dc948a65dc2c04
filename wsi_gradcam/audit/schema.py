"""`metrics.json`: what it holds, as types; `metrics_schema` is the published JSON Schema of it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_known)]
"""A number; null where there is none."""


def _text(value: Any) -> Any:
    """Return file names that are not Unicode, as well as they can be shown."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_text)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Keyed(_Strict):
    """The subject of a row, for programs; null where it does not apply. The row's other texts are for display alone.

    Attributes:
        question: of the audit.
        method: whose map it is of.
        control: what knows nothing of the model, and stands in for the map or beside it: `random`, `edges`, `constant`,
            `centre`, `probability`; of a slide-level model `random_order`, `attention`; `random_weights`,
            `equal_noise`, `equal_area`, `share_of_area`.
        other_method: that the method is compared with.
        baseline: what fills the gaps: `mean`, `blur`, `background`, `road`.
        change: of the patch, such as `stain`.
        suspect: region that should not decide, such as `pen`.
        label: of a class or target.
        order: in which weights become random, or patches are taken away.
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
    """A weighted mean over patches, with its 95 % interval from a bootstrap.

    Attributes:
        measure: its stable name.
        of: method, control, suspect or change that it is of.
        what: the measure in words.
        unit: of value, low and high.
        patches, slides: that count.
        missing: patches without a number.
        resampled: slides, or patches where there are fewer than six slides; for random weights, their draws.
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
        p: two-sided, of a test that flips signs; not corrected for being one of many.
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
        measures: stable names of the numbers it rests on; of rows with the same method, baseline, change and suspect.
        of: the method, suspect or change that it is about.
        asked: the question as a reader would ask it.
        p, p_adjusted: of the test behind it, and corrected over all verdicts (Holm); null where the verdict rests on
            finding nothing.
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
    """What the verdicts say together: a sentence that follows from them by rule.

    Attributes:
        method: the method whose map it is about, the first of the run.
        outcome: `holds`: the map can be believed where it is hot; `fails`: it cannot be believed; `unclear`.
        words: the sentence.
    """

    method: str
    outcome: Literal["holds", "fails", "unclear"]
    words: str


class QuadrantRow(_Strict):
    """Faithful and plausible together, for a method, on the `patches` of which the annotation tells."""

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
    """A number compared between sites, scanners, labels or classes: p of Kruskal and Wallis' test."""

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
        unit: of which the questions were asked: of patches, or of the slides of a slide-level model. Where it is the
            slide, `patches` of a row are slides too.
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
    """Another audit that this one is compared with, on the patches that both have."""

    out: Text
    model: str
    audit_digest: str
    patches: int
    only_there: int
    comparisons: list[ComparisonRow]


class Metrics(_Strict):
    """All of an audit, of the archive or of a slide."""

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
        """Return verdicts that fail, of some questions or of all."""
        return [v for v in self.verdicts if v.outcome == "fails" and (not questions or v.question in questions)]


def metrics_schema() -> dict[str, Any]:
    """Return the JSON Schema of metrics.json."""
    schema = Metrics.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
