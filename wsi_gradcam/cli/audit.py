"""What the command line says of an audit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wsi_gradcam.audit.plan import QUESTIONS, check_questions

if TYPE_CHECKING:
    from wsi_gradcam.audit.running import AuditOutcome
    from wsi_gradcam.audit.schema import VerdictRow

ANY = "any"


def failing(names: Sequence[str]) -> tuple[str, ...]:
    """The questions that `--fail-on` names.

    Raises:
        ConfigError: a name that is no question.
    """
    if ANY in names:
        return QUESTIONS
    check_questions(names)
    return tuple(names)


def print_audit(outcome: AuditOutcome, failures: Sequence[VerdictRow], as_json: bool) -> None:
    """The verdicts, where the report is, and what `--fail-on` has found."""
    metrics = outcome.metrics
    if as_json:
        values = {
            "out": str(outcome.out),
            "verdicts": [verdict.model_dump(mode="json") for verdict in metrics.verdicts],
            "failed_on": [f"{verdict.question}: {verdict.of}" for verdict in failures],
            "not_audited": [row.model_dump() for row in metrics.not_audited],
        }
        print(json.dumps(values, indent=1))
    else:
        for verdict in metrics.verdicts:
            print(f"{verdict.outcome:>7}  {verdict.question} ({verdict.of}): {verdict.words}")
        sample = metrics.sample
        slides = "1 slide" if sample.slides == 1 else f"{sample.slides} slides"
        print(f"{sample.patches} patches of {slides}, seed {sample.seed}; {outcome.out / 'report.html'}")
    for record in outcome.failed:
        print(f"not audited: {record.slide.id}: {record.error}", file=sys.stderr)
    for verdict in failures:
        print(f"--fail-on: {verdict.question} ({verdict.of}) fails: {verdict.words}", file=sys.stderr)
