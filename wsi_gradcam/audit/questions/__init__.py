"""The questions of the audit, a module each: what is measured, how it is judged, which figures and words it has.

To add one, write a module with a `QUESTION`, and add it to `wsi_gradcam.audit.schema.QUESTIONS`; those that are
asked of the slides of slide-level models are in `BAG_QUESTIONS`. The modules import no torch: what measures is imported
from `wsi_gradcam.audit.measures` where it is called, on workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wsi_gradcam.audit.schema import questions_of

if TYPE_CHECKING:
    from wsi_gradcam.audit.findings import Findings
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.schema import Figure, Measure, Metrics, Unit, Words


@dataclass(frozen=True)
class Scope:
    """Facts of the audited run that statements depend on.

    Attributes:
        methods: of the run.
        classes: of the model.
        positive: the class that bare glass must not be called; "" where none is known.
        is_class: whether a class is explained, which has a probability.
        overlaps: whether patches of the run overlap; None without a run.
        disagreement: of overlapping patches, over the size of the map, by target and slide.
    """

    methods: tuple[str, ...]
    classes: tuple[str, ...]
    positive: str
    is_class: bool
    overlaps: bool | None
    disagreement: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def _nothing(*_: object) -> list[Any]:
    return []


@dataclass(frozen=True)
class Question:
    """A question of the audit.

    Attributes:
        words: for the report.
        measure: measure a batch of patches (`Batch`), or a slide (`SlideBag`), on a worker: a record, see
            `wsi_gradcam.audit.measurements`, or None.
        assess: add what the measurements of all patches say.
        figures: which rows make which figure.
        remarks: sentences that the report says below the figures.
        untested: (what, why) of what could not be tested.
        measures: all that it reports.
        in_depth: whether it is measured on the patches alone that are measured in depth.
        measure_slide: measure what is of the whole slide, with its first batch.
        no_numbers: why there may be no number at all.
    """

    words: Words
    measure: Callable[[Any], object | None]
    assess: Callable[[Findings, Scope], None]
    measures: Sequence[Measure]
    figures: Callable[[Metrics], list[Figure]] = _nothing
    remarks: Callable[[Metrics], list[str]] = _nothing
    untested: Callable[[Measurements, Scope], list[tuple[str, str]]] = _nothing
    in_depth: bool = False
    measure_slide: Callable[[Any], object | None] | None = None
    no_numbers: str = "nothing could be measured"


def question_named(name: str, unit: Unit = "patch") -> Question:
    """Return a question that is asked of patches, or of slides."""
    module, _, attribute = questions_of(unit)[name].partition(":")
    found: Question = getattr(import_module(module), attribute or "QUESTION")
    return found
