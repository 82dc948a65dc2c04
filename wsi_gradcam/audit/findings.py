"""What is found of a question, as rows of metrics.json: estimates, comparisons and curves, each with its keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from wsi_gradcam.audit.schema import ComparisonRow, CurveRow, EstimateRow, Keyed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.estimates import Comparison, Estimate
    from wsi_gradcam.audit.gathered import Gathered


class Keys(TypedDict, total=False):
    """What a row is about, see `wsi_gradcam.audit.schema.Keyed`."""

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
        against: of a comparison: what it is held against, likewise; `{reference}` is the control or the other method.
        evidence: what it is called beside a verdict, where that is not `what`.
    """

    name: str
    what: str
    unit: str = ""
    of: str = "{map}"
    against: str = "{reference}"
    evidence: str = ""

    def texts(self, keys: Keys) -> dict[str, str]:
        """`of` and `what` of a row."""
        return {"of": _filled(self.of, keys), "what": _filled(self.what, keys)}

    def evidence_of(self, row: Keyed) -> str:
        """What a row of this measure is called beside a verdict."""
        return _filled(self.evidence or self.what, row.model_dump(exclude_none=True))


def _filled(text: str, keys: Any) -> str:
    either = {
        "map": keys.get("method", keys.get("control")),
        "reference": keys.get("control", keys.get("other_method")),
    }
    return text.format(**either, **keys)


@dataclass(frozen=True)
class Findings:
    """The rows of a question."""

    question: str
    gathered: Gathered
    estimates: list[EstimateRow] = field(default_factory=list)
    comparisons: list[ComparisonRow] = field(default_factory=list)
    curves: list[CurveRow] = field(default_factory=list)

    def estimate(self, measure: Measure, values: NDArray[Any], **keys: Unpack[Keys]) -> Estimate:
        """Estimate a number of the patches, and add the row; of what was measured on some only, these are all."""
        found = self.gathered.estimate(values)
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
        """Compare two numbers of the patches, and add the row."""
        found = self.gathered.compare(first, second)
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
        """Add the mean of curves [N, Q] of the patches, with its interval where that is wanted."""
        y = self.gathered.mean(values)
        low = high = None
        if interval:
            points = [self.gathered.estimate(values[:, i]) for i in range(values.shape[1])]
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


def comparison_row(question: str, measure: Measure, found: Comparison, **keys: Unpack[Keys]) -> ComparisonRow:
    """A comparison as a row of metrics.json."""
    gap = found.difference
    return ComparisonRow(
        question=question,
        measure=measure.name,
        **keys,
        **measure.texts(keys),
        against=_filled(measure.against, keys),
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
