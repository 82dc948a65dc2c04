"""The stage of an audit: the numbers of some patches of a slide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_gradcam.audit.folder import AUDIT, AuditFolder, write_numbers
from wsi_gradcam.audit.plan import AuditPlan
from wsi_gradcam.audit.spreading import has_overlap, write_spread
from wsi_gradcam.errors import StoreError
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.run.context import Audited

if TYPE_CHECKING:
    from wsi_gradcam.audit.measures.subject import Subject
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.context import Context


def audit_spread(context: Context, entry: SlideEntry) -> bool:
    """Store where overlapping patches of a slide disagree, unless that was done; whether they overlap at all."""
    run = context.run
    assert isinstance(run, AuditPlan)
    folder = AuditFolder(run.out / AUDIT)
    if not has_overlap(run):
        return False
    if (folder.read_spread(entry.id) or {}).get("audit") != run.audit_digest():
        plan = Manifest(context.folder(entry).manifest).plan()
        if plan is None:
            raise StoreError(f"{context.folder(entry).manifest}: has no plan; run explain again")
        write_spread(folder, run, entry.id, plan, context.patch_store(entry))
    return True


def audit_piece(context: Context, entry: SlideEntry, number: int) -> Audited:
    """Measure a piece of a slide's sample and store the numbers, unless that was done."""
    run = context.run
    assert isinstance(run, AuditPlan)
    sample = run.samples[entry.id]
    part = sample.piece(number)
    place = AuditFolder(run.out / AUDIT).piece(entry.id, run.audit_digest(), number)
    if place.is_file():
        return Audited(part.stop - part.start)
    from wsi_gradcam.audit.patch_data import read_piece
    from wsi_gradcam.audit.piece import measure, subject_of  # torch, which a client need not have

    def made() -> Subject:
        return subject_of(run, context.model().model)

    data = read_piece(context, run, entry, number)
    with context.alone(made) as subject:
        numbers = measure(run, subject, data, entry.id, number)
    write_numbers(place, numbers)
    return Audited(part.stop - part.start, int((numbers["base/readable"] == 0).sum()))
