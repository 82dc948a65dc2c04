"""The questions of the audit, one module each: what is measured, how it is judged, its figures and its words.

To add one, write a module with a `QUESTION`, and add it to `wsi_gradcam.audit.schema.QUESTIONS`; questions about the
slides of slide-level models are in `BAG_QUESTIONS`. The modules do not import torch: measures are imported from
`wsi_gradcam.audit.measures` where they are called, on workers.
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
    """Facts about the audited run on which statements depend.

    Attributes:
        methods: those of the run.
        classes: those of the model.
        positive: the class that bare glass must not be given; "" if unknown.
        is_class: whether a class is explained, which has a probability.
        overlaps: whether patches of the run overlap; None without a run.
        disagreement: that of overlapping patches, relative to the size of the map, by target and slide.
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
        words: texts for the report.
        measure: measures a batch of patches (`Batch`), or a slide (`SlideBag`), on a worker: a record, see
            `wsi_gradcam.audit.measurements`, or None.
        assess: adds what the measurements of all patches show.
        figures: which rows make which figure.
        remarks: sentences that the report has below the figures.
        untested: (what, why) for what could not be tested.
        measures: everything that it reports.
        in_depth: whether it is measured only on the patches that are measured in depth.
        measure_slide: measures what concerns the whole slide, with its first batch.
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
    """Return the question with this name, about patches or about slides."""
    module, _, attribute = questions_of(unit)[name].partition(":")
    found: Question = getattr(import_module(module), attribute or "QUESTION")
    return found
