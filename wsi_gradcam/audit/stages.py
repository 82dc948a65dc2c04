"""Auditing slides: the stages, their order for a slide, and the workload that executors run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from wsi_gradcam.audit.disagreement import has_overlap, write_spread
from wsi_gradcam.audit.folder import AUDIT, AuditFolder, write_arrays
from wsi_gradcam.audit.measurements import SLIDE, arrays_of
from wsi_gradcam.audit.questions import question_named
from wsi_gradcam.audit.vocabulary import QUESTIONS
from wsi_gradcam.errors import StoreError
from wsi_gradcam.results.manifest import Manifest, SlideStatus
from wsi_gradcam.run.context import Exclusive
from wsi_gradcam.run.types import Processed, SlideJob, SlideRecord, Stage, Task
from wsi_gradcam.run.workload import failed_record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.folder import Arrays
    from wsi_gradcam.audit.measures.subject import Subject
    from wsi_gradcam.audit.patch_data import PatchData
    from wsi_gradcam.audit.plan import AuditPlan
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.context import Context
    from wsi_gradcam.run.plan import RunPlan


@dataclass(frozen=True)
class AuditWorkload:
    """Auditing the slides of a sample.

    Attributes:
        plan: the plan of the audit.
        subject: the model under audit in this process.
    """

    name: ClassVar[str] = AUDIT
    plan: AuditPlan
    subject: Exclusive[Subject] = field(default_factory=Exclusive, repr=False, compare=False)

    @property
    def patches(self) -> int:
        """The number of patches in the sample."""
        return sum(len(sample.patches) for sample in self.plan.samples.values())

    @property
    def run(self) -> RunPlan:
        """The plan of the run that is audited."""
        return self.plan.run

    def job(self, slide: SlideEntry) -> SlideJob:
        """Return the phases of a slide; see `Workload.job`."""
        overlap = self.plan.settings.asks("stability") and has_overlap(self.plan)
        return audit_job(slide, self.plan.samples[slide.id].batches, overlap)


def audit_job(slide: SlideEntry, batches: int, spread: bool) -> SlideJob:
    """Measure the batches of a slide's sample, and where its patches disagree; see `Workload.job`."""
    started = time.monotonic()
    try:
        measured = [Task(MEASURE, slide, (i,)) for i in range(batches)]
        results = yield [measured, [Task(SPREAD, slide)] if spread else []]
    except Exception as error:
        return failed_record(slide, error, time.monotonic() - started)
    done = [result for result in results if isinstance(result, Processed)]
    patches, unreadable = sum(each.patches for each in done), sum(each.unreadable for each in done)
    return SlideRecord(slide, SlideStatus.OK, "", patches, unreadable, time.monotonic() - started)


def measure_batch(context: Context[AuditWorkload], entry: SlideEntry, number: int) -> Processed:
    """Measure a batch of a slide's sample and store the measurements, unless that was done."""
    plan = context.workload.plan
    part = plan.samples[entry.id].batch(number)
    place = AuditFolder(plan.run.out / AUDIT).batch(entry.id, plan.audit_digest(), number)
    if place.is_file():
        return Processed(part.stop - part.start)
    from wsi_gradcam.audit.batch import subject_of  # torch, which a client need not have
    from wsi_gradcam.audit.patch_data import read_batch

    def make() -> Subject:
        return subject_of(plan, context.model().model)

    started = time.perf_counter()
    data = read_batch(context, plan, entry, number)
    read = time.perf_counter()
    subject = context.workload.subject
    with subject.used(make) as model:
        begun, idle_since = time.perf_counter(), max(started, subject.free_since)
        arrays = measure_patches(plan, model, data, entry.id, number)
        model_s = time.perf_counter() - begun
    write_arrays(place, arrays)
    unreadable = int((arrays["base/readable"] == 0).sum())
    return Processed(part.stop - part.start, unreadable, max(0.0, read - idle_since), model_s, read - started)


def write_slide_spread(context: Context[AuditWorkload], entry: SlideEntry) -> None:
    """Store where overlapping patches of a slide disagree, unless that was done."""
    plan = context.workload.plan
    folder = AuditFolder(plan.run.out / AUDIT)
    if (folder.read_spread(entry.id) or {}).get("audit") != plan.audit_digest():
        slide_plan = Manifest(context.folder(entry).manifest).plan()
        if slide_plan is None:
            raise StoreError(f"{context.folder(entry).manifest}: has no plan; run explain again")
        write_spread(folder, plan, entry.id, slide_plan, context.patch_store(entry))


def measure_patches(plan: AuditPlan, subject: Subject, data: PatchData, slide_id: str, number: int) -> Arrays:
    """Return the measurements of batch `number` of a slide, by name; NaN for a patch that cannot be read any more."""
    from wsi_gradcam.audit.batch import Batch, describe  # torch, which a client need not have

    batch = Batch.of(plan, subject, data, number < plan.samples[slide_id].deep)
    found = arrays_of(describe(batch, slide_id, number))
    for name in QUESTIONS:
        if plan.settings.asks(name):
            question = question_named(name)
            if (record := question.measure(batch)) is not None:
                found |= arrays_of(record, np.float32)
            if number == 0 and question.measure_slide and (record := question.measure_slide(batch)) is not None:
                found |= {key: values[None] for key, values in arrays_of(record).items()}
    return {key: _trimmed(key, values, data) for key, values in found.items()}


def _trimmed(key: str, values: NDArray[Any], data: PatchData) -> NDArray[Any]:
    """Return an array without what fills the batch up, and NaN for patches that could not be read."""
    if key.startswith(SLIDE):
        return values
    found = values[: data.count].copy()
    if np.issubdtype(found.dtype, np.floating) and key != "base/weight":
        found[~data.readable[: data.count]] = np.nan
    return found


MEASURE = Stage("audit", measure_batch, needs_model=True)
SPREAD = Stage("spread", write_slide_spread)
