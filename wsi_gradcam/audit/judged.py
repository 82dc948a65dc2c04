"""Verdicts of an audit together: many tests find something by chance, so each must stand when corrected for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from wsi_gradcam.audit.estimates import LEVEL, Estimate, holm
from wsi_gradcam.audit.findings import Keys, Measure
from wsi_gradcam.audit.schema import VerdictRow
from wsi_gradcam.audit.verdict import ALPHA, Verdict

UNSURE = "It does not stand when corrected for the number of verdicts."


@dataclass(frozen=True)
class Judged:
    """A verdict on its way into the report.

    Attributes:
        question: of the audit.
        of: what it is about.
        p: of the test behind it; NaN without one.
        found: whether the outcome rests on the test having found something; else on its having found nothing, which
            no correction takes back.
        measures: that it rests on.
        keys: of the rows that it rests on.
    """

    question: str
    of: str
    verdict: Verdict
    p: float
    found: bool
    measures: tuple[Measure, ...] = ()
    keys: Keys = field(default_factory=Keys)


def corrected(judged: Sequence[Judged]) -> list[VerdictRow]:
    """The verdicts, with p corrected over all of them (Holm 1979); a finding that is none any more is unclear."""
    tested = [i for i, one in enumerate(judged) if not np.isnan(one.p)]
    adjusted = dict(zip(tested, holm([judged[i].p for i in tested]), strict=True))
    return [_row(one, adjusted.get(i, float("nan"))) for i, one in enumerate(judged)]


def interval_p(found: Estimate, reference: float) -> float:
    """Two-sided p that an estimate is `reference`, from its interval taken as Student's; NaN without a value.

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


def _row(one: Judged, adjusted: float) -> VerdictRow:
    verdict = one.verdict
    outcome, words = verdict.outcome, verdict.words
    if one.found and outcome != "unclear" and adjusted >= ALPHA:
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
