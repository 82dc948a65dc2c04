"""`audit_run`: reopen a run, draw a sample, measure it batch by batch on any executor, assess it and report."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.audit.archive import (
    ExplainedRun,
    annotated_slide,
    audited_target,
    draw_sample,
    draw_slides,
    ground_of,
    open_run,
)
from wsi_gradcam.audit.comparing import OtherAudit, compare_audits, open_audit, shared_sample
from wsi_gradcam.audit.measurements import read_measurements
from wsi_gradcam.audit.metrics import ArchiveFacts, metrics_of, to_bytes
from wsi_gradcam.audit.plan import (
    AUDIT,
    PATCHES,
    SLIDES,
    AuditFolder,
    AuditPlan,
    AuditScope,
    AuditSettings,
    Frame,
    asked_questions,
    check_questions,
)
from wsi_gradcam.audit.report.page import write_reports
from wsi_gradcam.audit.schema import Metrics, UntestedRow
from wsi_gradcam.audit.stages import AuditWorkload
from wsi_gradcam.errors import ResultError, ResumeError, StoreError, as_text, counted
from wsi_gradcam.executors import open_executor
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.mil.spec import SlideModelSpec, is_slide_model, read_slide_model
from wsi_gradcam.models.spec import ModelSpec, read_spec
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.run_files import MARK, is_name
from wsi_gradcam.results.seals import is_account, sealed_json, write_listing
from wsi_gradcam.results.slide import check_named
from wsi_gradcam.results.slide_tables import read_slide_records
from wsi_gradcam.run.driver import RunSession
from wsi_gradcam.run.types import RunListener, SlideRecord
from wsi_gradcam.system.isolation import CRASHES

if TYPE_CHECKING:
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.results.run import Result


@dataclass(frozen=True)
class Judged:
    """The outcome of assessing a run.

    Attributes:
        out: the folder of the findings, such as OUT/audit.
        records: those of the slides in the sample.
    """

    out: StoragePath
    records: tuple[SlideRecord, ...]

    @property
    def failed(self) -> tuple[SlideRecord, ...]:
        """The slides of the sample that failed."""
        return tuple(record for record in self.records if record.status == SlideStatus.FAILED)


@dataclass(frozen=True)
class AuditOutcome(Judged):
    """The outcome of an audit.

    Attributes:
        metrics: of the archive.
    """

    metrics: Metrics


def audit_run(
    out: StoragePathLike,
    *,
    patches: int = PATCHES,
    seed: int = 0,
    slides: int = SLIDES,
    only: Sequence[str] = (),
    target: str = "",
    annotations: str | PathLike[str] | None = None,
    include: Sequence[str] = (),
    regions: str | PathLike[str] | None = None,
    mask_frame: Frame = "auto",
    model: str | PathLike[str] | ModelSpec | SlideModelSpec | Model | None = None,
    against: StoragePathLike | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    wait_for_workers: float | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    remote_slides: bool = False,
    listener: RunListener | None = None,
) -> AuditOutcome:
    """Audit the explained archive in `out`; existing measurements are not repeated.

    Everything is written to `out`/audit: measurements batch by batch, then metrics.json and report.html.

    Args:
        out: folder or s3:// URL that was given to `explain`; slides and model must not have moved.
        patches: approximate number of patches to audit, over all slides.
        seed: seed of the sample and of all random numbers.
        slides: for slide-level models, whose unit is the slide: approximate number of slides to audit, each with all
            its patches.
        only: the questions to ask, see `wsi_gradcam.audit.schema.QUESTIONS`, and `BAG_QUESTIONS` for slide-level
            models; all by default.
        target: which of the run's targets to audit; by default each patch's predicted class if that was explained, else
            the run's first target.
        annotations: areas that show the target's class: a file, or a folder with a file per slide.
        include: names of the annotation classes to use; all by default.
        regions: the same for areas that should not affect the answer, such as rulers, folds and pen; each class is
            hidden and compared with hiding as much elsewhere.
        mask_frame: what annotations and regions were drawn on, for slides that were only partly scanned: "slide" or
            "bounds"; "auto" detects it, and refuses if both are possible.
        model: the run's model, if the run does not say how to load it, or its files have moved.
        against: another run with a finished audit; its patches are audited here too, and the two audits are compared.
        workers: as for `explain`.
        scheduler: as for `explain`.
        wait_for_workers: as for `explain`.
        overwrite: measure everything again, even if there is an audit with other settings.
        trust_code: as for `explain`; also needed if the run's own model runs code when it is loaded.
        remote_slides: contact other machines for slides whose URLs are in the results, see `open_result`.
        listener: an object that is notified of what happens.

    Raises:
        WsiGradcamError: nothing could be done, or the audit had to stop; existing measurements are not lost.
    """
    check_questions(only)
    drawn, hidden = (None if path is None else Path(path).absolute() for path in (annotations, regions))
    settings = AuditSettings(patches, seed, tuple(only), target, drawn, tuple(include), hidden, mask_frame, slides)
    result = open_result(storage_path(out).absolute())
    given, loaded = given_model(model)
    folder = AuditFolder(result.folder.place / AUDIT)
    _check_room(folder, result)
    run = open_run(result, given, trust_code, held=loaded is not None)
    settings = replace(settings, only=asked_questions(only, run.unit))
    other = None if against is None else open_audit(against)
    scope = _scope(run, settings, other)
    entries = allowed_slides([run.entries[name] for name in scope.samples], result, remote_slides)
    # Checked again where OUT is claimed: before any worker starts and any model is loaded.
    plan_before(folder, scope.audit_identity(), overwrite)
    records: list[SlideRecord] = []
    session = RunSession(
        result.folder.place, listener or RunListener(), lambda: report_rows(records), place=folder.place
    )
    with session, open_executor(workers, scheduler, run.settings, loaded, wait_for_workers) as executor:
        facts = executor.examine(run.spec, run.model_settings, [], None)
        eager = run.plan(facts)
        plan = scope.planned(eager, audited_target(eager.targets, eager.facts.classes, target, annotations is not None))
        session.claim()
        _settle(folder, plan, result.ids, overwrite)
        folder.remove_partial_files(plan.samples)
        workload = AuditWorkload(plan)
        session.begin(workload, entries, executor.dashboard)
        session.process(executor, workload, entries, records.append)
        metrics = _finish(folder, plan, run, records, other)
    return AuditOutcome(folder.place, tuple(records), metrics)


def given_model(
    model: str | PathLike[str] | ModelSpec | SlideModelSpec | Model | None,
) -> tuple[ModelSpec | SlideModelSpec | None, Model | None]:
    """Return the specification of a given model, with absolute paths, and the model itself if it is loaded."""
    if model is None:
        return None, None
    if isinstance(model, str | PathLike):
        path = fspath(model)
        model = read_slide_model(path) if is_slide_model(path) else read_spec(path)
    if isinstance(model, SlideModelSpec):
        return model.resolved(), None
    loaded, spec = (None, model) if isinstance(model, ModelSpec) else (model, model.spec)
    return spec.model_copy(update={"folder": spec.folder.absolute()}), loaded


def allowed_slides(slides: list[SlideEntry], result: Result, remote_slides: bool) -> list[SlideEntry]:
    """Return the slides; raises SlideAccessError if one must not be opened, see `check_named`."""
    for slide in slides:
        check_named(slide.path, result.out, remote_slides)
    return slides


def report_rows(records: Sequence[SlideRecord]) -> dict[str, dict[str, str]]:
    """Return the slides that have ended, for the report of the run."""
    return {
        record.slide.id: {
            "status": record.status,
            "patches": str(record.patches),
            "error": record.error,
            "path": as_text(record.slide.path),
        }
        for record in records
    }


def _scope(run: ExplainedRun, settings: AuditSettings, other: OtherAudit | None) -> AuditScope:
    """Return what to audit, with its sample; raises an error if the arguments do not allow it."""
    classes = run.result.record.model.classes
    target = audited_target(run.targets, classes, settings.target, settings.annotations is not None)
    if other is not None:
        samples = shared_sample(run.candidates, other, run.unit)
    else:
        samples = (draw_slides if run.unit == "slide" else draw_sample)(run.candidates, settings)
    if not samples:
        raise ResultError(f"{run.result.out}: no patch could be read by explain, so there is nothing to audit")
    return AuditScope(
        run_digest=run.result.record.run_digest,
        settings=settings,
        target=target,
        samples=samples,
        annotation_digests=drawn_digests(run, settings, settings.annotations, settings.include, samples),
        region_digests=drawn_digests(run, settings, settings.regions, (), samples),
        unit=run.unit,
    )


def drawn_digests(
    run: ExplainedRun,
    settings: AuditSettings,
    path: Path | None,
    include: tuple[str, ...],
    samples: Container[str],
) -> dict[str, str]:
    """Return sha256 of the sampled slides' files of annotations, by slide id."""
    found: dict[str, str] = {}
    if path is None:
        return found
    for candidate in run.candidates:
        if candidate.entry.id in samples:
            ground = ground_of(candidate.slide.plan, candidate.slide.folder, settings)
            size, own = candidate.slide.size_px, candidate.entry.path
            annotated = annotated_slide(path, candidate.entry.id, include, size, own, ground)
            if annotated is not None:
                annotated.regions.drawn(size)  # rejects now what no batch could use
                found[candidate.entry.id] = annotated.regions.digest
    return found


def _check_room(folder: AuditFolder, result: Result) -> None:
    """Refuse an OUT/audit in which older versions have stored slides' results.

    Raises:
        ResultError: there are some.
    """
    names = {*result.ids, *read_slide_records(result.folder.record)}
    there = [path for name in sorted(names) if _is_inside(path := result.folder.path_of(name))]
    if there:
        first = there[0].split("/")[0]
        raise ResultError(
            f"{result.folder.place}: an older version put the results of {counted(len(there), 'slide')} "
            f"({there[0]}, ...) where the audit belongs; rename {first} to {first}{MARK}, where "
            "they are found as well, and try again"
        )


def _is_inside(path: str) -> bool:
    return path.partition("/")[0].casefold() == AUDIT


def plan_before(
    folder: AuditFolder, identity: dict[str, Any], overwrite: bool, what: str = "an audit"
) -> tuple[dict[str, Any] | None, bool]:
    """Return the plan of an existing audit, and whether it has this identity and is continued.

    Raises:
        ResumeError: the measurements are those of another audit.
    """
    try:
        before = folder.read_plan()
    except StoreError:
        if not overwrite:
            raise
        before = None
    anew = overwrite and not (CRASHES.causes or CRASHES.finished_before)  # not the work of this same command
    if before is not None and before.get("identity") == identity and not anew:
        return before, True
    if before is not None and not overwrite:
        there = before.get("identity") or {}
        changed = [
            f"{key}: {short(there.get(key))} there, {short(value)} now"
            for key, value in identity.items()
            if there.get(key) != value and key != "sample"  # it mostly follows from the others
        ]
        which = ", ".join(changed) or "other patches"
        raise ResumeError(f"{folder.place}: holds {what} with other settings ({which}); --overwrite replaces it")
    return before, False


def write_plan(
    folder: AuditFolder,
    identity: dict[str, Any],
    digest: str,
    samples: Mapping[str, dict[str, Any]],
    old: Iterable[str],
) -> None:
    """Write the plan of an audit after deleting what an old one wrote about its slides; samples are plain values."""
    # The plan first: an audit that is half deleted is not an audit.
    for place in (folder.plan, folder.listing, folder.metrics, folder.report):
        place.remove()
    for name in old:
        folder.forget(name)
    values = {"identity": identity, "digest": digest, "samples": samples}
    folder.plan.write(sealed_json(values, indent=1))


def _settle(folder: AuditFolder, plan: AuditPlan, slides: Sequence[str], overwrite: bool) -> None:
    """Write the plan unless it exists; with `overwrite`, all measurements are deleted.

    Args:
        slides: of the run; an older audit whose plan is damaged may have been about any of them.

    Raises:
        ResumeError: the existing numbers belong to another audit.
    """
    before, same = plan_before(folder, plan.audit_identity(), overwrite)
    if not same:
        old = audited_slides(before, slides if overwrite else ())
        samples = {name: sample.to_json() for name, sample in plan.samples.items()}
        write_plan(folder, plan.audit_identity(), plan.audit_digest(), samples, old)


def audited_slides(plan: dict[str, Any] | None, otherwise: Iterable[str]) -> list[str]:
    """Return the slides of an audit from its plan, or those that they may be if the plan does not say."""
    samples = (plan or {}).get("samples")
    return [name for name in (samples if isinstance(samples, dict) else otherwise) if is_name(name)]


def short(value: object) -> str:
    """Return a value in a few characters."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _finish(
    folder: AuditFolder, plan: AuditPlan, run: ExplainedRun, records: Sequence[SlideRecord], other: OtherAudit | None
) -> Metrics:
    """Assess the measurements, and write the result."""
    failed = {record.slide.id: record.error for record in records if record.status == SlideStatus.FAILED}
    slides = [name for name in plan.samples if name not in failed]
    if not slides:
        cause = next(iter(failed.values()), "")
        raise ResultError(f"{folder.place}: no slide could be audited; the first: {cause}")
    archive = ArchiveFacts(
        slides_of_run=len(run.candidates),
        patches_of_run=sum(candidate.patches for candidate in run.candidates),
        not_audited=(*run.left_out, *(UntestedRow(what=name, why=why) for name, why in failed.items())),
        groups=run.groups,
        spreads={name: found["maps"] for name in slides if (found := folder.read_spread(name)) is not None},
    )
    data = read_measurements(folder, plan.audit_digest(), plan.samples, plan.settings.seed, slides)
    metrics = metrics_of(data, plan, archive)
    if other is not None:
        against = compare_audits(data, plan.samples, plan.methods, other)
        metrics = metrics.model_copy(update={"against": against})
    folder.metrics.remove()
    write_reports(folder, plan, data, metrics, archive)
    numbers = to_bytes(metrics)
    if folder.is_listed:
        write_listing(folder.place, {folder.metrics.name: numbers}, is_account)
    folder.metrics.write(numbers)  # the last: if it exists, everything does
    return metrics
