"""The findings of a question: rows of estimates, comparisons and curves, and verdicts that are corrected together.

Controls set the standard: a map must beat maps that know nothing, and a cause must have more effect than an equal area
elsewhere. What these patches cannot decide is unclear. Many tests find something by chance, so each verdict must remain
significant after correction for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
from scipy import stats

from wsi_gradcam.audit.measurements import LEVEL, Comparison, Estimate, holm
from wsi_gradcam.audit.schema import ComparisonRow, CurveRow, EstimateRow, Keys, Measure, VerdictRow, fill

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.measurements import Measurements

Outcome = Literal["holds", "fails", "unclear"]
ALPHA = 0.05
HALF = 0.5
# With this many patches, a paired t test detects half a standard deviation in 4 of 5 samples (two-sided, 5%).
ENOUGH = 34
UNSURE = "This is not significant after correction for the number of verdicts."


@dataclass(frozen=True)
class Verdict:
    """An answer to one question of the audit.

    Attributes:
        question: as a reader would ask it.
        outcome: `holds`: the explanation, or the model, passes; `fails`; `unclear`: these patches cannot decide.
        words: why, in a sentence.
        evidence: the numbers behind it, by name.
    """

    question: str
    outcome: Outcome
    words: str
    evidence: Mapping[str, Comparison | Estimate | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Conclusion:
    """A verdict with the test behind it.

    Attributes:
        question: of the audit.
        of: what it is about.
        p: of the test behind it; NaN without one.
        is_finding: whether the outcome rests on the test having found something; otherwise on its having found nothing,
            which no correction changes.
        measures: those that it rests on.
        keys: of the rows that it rests on.
    """

    question: str
    of: str
    verdict: Verdict
    p: float
    is_finding: bool
    measures: tuple[Measure, ...] = ()
    keys: Keys = field(default_factory=Keys)


@dataclass(frozen=True)
class Findings:
    """The rows and verdicts of a question."""

    question: str
    measurements: Measurements
    estimates: list[EstimateRow] = field(default_factory=list)
    comparisons: list[ComparisonRow] = field(default_factory=list)
    curves: list[CurveRow] = field(default_factory=list)
    conclusions: list[Conclusion] = field(default_factory=list)

    def estimate(self, measure: Measure, values: NDArray[Any], **keys: Unpack[Keys]) -> Estimate:
        """Estimate a number of the patches, and add the row; if only some were measured, these count as all."""
        found = self.measurements.estimate(values)
        self.add(measure, found, **keys)
        return found

    def add(self, measure: Measure, found: Estimate, draws: bool = False, **keys: Unpack[Keys]) -> None:
        """Add an estimate; with `draws` its unit is the draw of random weights."""
        self.estimates.append(
            EstimateRow(
                question=self.question,
                measure=measure.name,
                **keys,
                **measure.texts(keys),
                unit=measure.unit,
                value=found.value,
                low=found.low,
                high=found.high,
                patches=found.patches,
                slides=found.slides,
                missing=found.missing,
                resampled="draw" if draws else found.unit,
            )
        )

    def compare(self, measure: Measure, first: NDArray[Any], second: NDArray[Any], **keys: Unpack[Keys]) -> Comparison:
        """Compare two numbers of the patches and add the row."""
        found = self.measurements.compare(first, second)
        self.add_comparison(measure, found, **keys)
        return found

    def add_comparison(self, measure: Measure, found: Comparison, **keys: Unpack[Keys]) -> None:
        """Add a comparison."""
        self.comparisons.append(comparison_row(self.question, measure, found, **keys))

    def curve(
        self,
        measure: Measure,
        axes: tuple[str, str],
        x: Iterable[float],
        values: NDArray[Any],
        interval: bool,
        **keys: Unpack[Keys],
    ) -> None:
        """Add the mean of curves [N, Q] of the patches, with its interval if requested."""
        y = self.measurements.mean(values)
        low = high = None
        if interval:
            points = [self.measurements.estimate(values[:, i]) for i in range(values.shape[1])]
            low, high = [point.low for point in points], [point.high for point in points]
        self.add_curve(measure, axes, x, y.tolist(), low, high, **keys)

    def add_curve(
        self,
        measure: Measure,
        axes: tuple[str, str],
        x: Iterable[float],
        y: Iterable[float],
        low: list[float] | None = None,
        high: list[float] | None = None,
        **keys: Unpack[Keys],
    ) -> None:
        """Add a mean curve; `axes` are the names of x and y."""
        self.curves.append(
            CurveRow(
                question=self.question,
                measure=measure.name,
                **keys,
                **measure.texts(keys),
                x_name=axes[0],
                y_name=axes[1],
                x=list(x),
                y=list(y),
                low=low,
                high=high,
            )
        )

    def conclude(
        self,
        of: str,
        verdict: Verdict,
        p: float,
        *measures: Measure,
        is_finding: bool = True,
        **keys: Unpack[Keys],
    ) -> None:
        """Add a verdict; see `Conclusion`."""
        self.conclusions.append(Conclusion(self.question, of, verdict, p, is_finding, measures, keys))


def comparison_row(question: str, measure: Measure, found: Comparison, **keys: Unpack[Keys]) -> ComparisonRow:
    """Return a comparison as a row of metrics.json."""
    gap = found.difference
    return ComparisonRow(
        question=question,
        measure=measure.name,
        **keys,
        **measure.texts(keys),
        against=fill(measure.against, keys),
        unit=measure.unit,
        difference=gap.value,
        low=gap.low,
        high=gap.high,
        p=found.p,
        effect=found.effect,
        better=found.better,
        patches=gap.patches,
        slides=gap.slides,
    )


def corrected(conclusions: Sequence[Conclusion]) -> list[VerdictRow]:
    """Return the verdicts with p corrected over all of them (Holm 1979); a finding without significance is unclear."""
    tested = [i for i, one in enumerate(conclusions) if not np.isnan(one.p)]
    adjusted = dict(zip(tested, holm([conclusions[i].p for i in tested]), strict=True))
    return [_verdict_row(one, adjusted.get(i, float("nan"))) for i, one in enumerate(conclusions)]


def _verdict_row(one: Conclusion, adjusted: float) -> VerdictRow:
    verdict = one.verdict
    outcome, words = verdict.outcome, verdict.words
    if one.is_finding and outcome != "unclear" and adjusted >= ALPHA:
        outcome, words = "unclear", f"{words} {UNSURE}"
    return VerdictRow(
        question=one.question,
        **one.keys,
        measures=[measure.name for measure in one.measures],
        of=one.of,
        asked=verdict.question,
        outcome=outcome,
        words=words,
        p=one.p,
        p_adjusted=adjusted,
        evidence=list(verdict.evidence),
    )


def interval_p(found: Estimate, reference: float) -> float:
    """Return the two-sided p that an estimate is `reference`, from its interval taken as Student's; NaN without value.

    >>> interval_p(Estimate(0.5, 0.0, 1.0, 9, 9, 0, "slide"), 0.5)
    1.0
    """
    if not found.patches or np.isnan(found.value):
        return float("nan")
    freedom = max(1, (found.slides if found.unit == "slide" else found.patches) - 1)
    deviation = (found.high - found.low) / (2 * stats.t.ppf((1 + LEVEL) / 2, freedom))
    if deviation == 0:
        return 1.0 if found.value == reference else 0.0
    return float(2 * stats.t.sf(abs(found.value - reference) / deviation, freedom))


def capitalised(text: str) -> str:
    """Return a text with the capital that begins a sentence."""
    return text[:1].upper() + text[1:]


def percent(share: float) -> str:
    """Return a share as text.

    >>> percent(0.257)
    '26%'
    """
    return f"{100 * share:.0f}%"
