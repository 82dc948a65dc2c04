"""`evidence_run`: three passes over a sample of places, and the findings.

In the first pass the model explains patches, and places are drawn from them; kinds are found; in the second, all places
are sorted, and tables and label images are written; in the third, kinds are covered in some patches, and pictures of
examples are taken. Tasks carry coordinates; results are in pieces on disk.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.audit.archive import audited_target, draw_shares, open_run
from wsi_gradcam.audit.findings import Verdict
from wsi_gradcam.audit.measurements import FEWEST_SLIDES
from wsi_gradcam.audit.plan import Arrays, Frame, read_arrays
from wsi_gradcam.audit.running import (
    Judged,
    allowed_slides,
    audited_slides,
    drawn_digests,
    given_model,
    plan_before,
    report_rows,
    write_plan,
)
from wsi_gradcam.cam.targets import PREDICTED
from wsi_gradcam.errors import ConfigError, ResultError
from wsi_gradcam.evidence import (
    PIECE,
    PLACES,
    EvidenceFolder,
    EvidencePlan,
    EvidenceSettings,
    SlideShare,
    is_given,
)
from wsi_gradcam.evidence.clusters import NO_TISSUE, Choice, Piece, find_kinds, need_library, shown_of
from wsi_gradcam.evidence.comparing import OtherEvidence, carry_names, compare_evidence, open_evidence
from wsi_gradcam.evidence.findings import Covered, Evidence, Facts, KindRow, find, is_worth_sorting
from wsi_gradcam.evidence.page import write_report
from wsi_gradcam.evidence.stages import EvidenceWorkload
from wsi_gradcam.evidence.tables import Tally, measured, tally, weights_of
from wsi_gradcam.executors import open_executor
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.marks import Marks
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.seals import is_account, write_listing
from wsi_gradcam.run.claims import EVIDENCE
from wsi_gradcam.run.driver import RunSession
from wsi_gradcam.run.types import RunListener, SlideRecord

if TYPE_CHECKING:
    from wsi_gradcam.audit.archive import ExplainedRun
    from wsi_gradcam.audit.plan import AuditSettings
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.mil.spec import SlideModelSpec
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.models.spec import ModelSpec


LEARNED = "Has the model learned to tell these slides apart?"
READ = 100_000  # measured places in which kinds are found


@dataclass(frozen=True)
class EvidenceOutcome(Judged):
    """The outcome: what was found."""

    evidence: Evidence


def evidence_run(
    out: StoragePathLike,
    *,
    places: int = PLACES,
    seed: int = 0,
    target: str = "",
    annotations: str | PathLike[str] | None = None,
    regions: str | PathLike[str] | None = None,
    mask_frame: Frame = "auto",
    skip_labels: bool = False,
    model: str | PathLike[str] | ModelSpec | SlideModelSpec | Model | None = None,
    against: StoragePathLike | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    wait_for_workers: float | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    remote_slides: bool = False,
    listener: RunListener | None = None,
) -> EvidenceOutcome:
    """Find out what the model looks at across the explained archive in `out`; earlier measurements are kept.

    Everything is written to `out`/evidence: report.html, evidence.json, clusters.parquet, and, for each slide, a label
    image and tables of its places and patches.

    Args:
        out: folder or s3:// URL that was given to `explain`; slides and model must not have moved.
        places: approximate number of cells of the explained layer to draw, over all slides.
        seed: seed of the sample and of all random numbers.
        target: whose evidence to find: one of the run's targets; by default the first.
        annotations: areas with whose classes kinds are compared: a file, or a folder with a file per slide.
        regions, mask_frame: as for `audit_run`.
        skip_labels: write no label images and no tables of patches, for which each patch has to be read twice.
        model: the run's model, if its files have moved or the run does not say how to load it.
        against: another run with finished evidence; its patches are measured here too, and what the two models look at
            is compared.
        workers, scheduler, wait_for_workers: as for `explain`.
        overwrite: measure everything again; without this, existing evidence with other settings is an error.
        trust_code: allow code in the model to run.
        remote_slides: contact other machines for slides whose URLs are in the results.
        listener: an object that is notified of what happens.

    Raises:
        WsiGradcamError: nothing could be done, or it had to stop; existing measurements are not lost.
    """
    drawn, hidden = (None if path is None else Path(path).absolute() for path in (annotations, regions))
    settings = EvidenceSettings(places, seed, target, drawn, hidden, mask_frame, skip_labels)
    need_library()
    result = open_result(storage_path(out).absolute())
    given, loaded = given_model(model)
    run = open_run(result, given, trust_code, held=loaded is not None)
    other = None if against is None else open_evidence(against)
    shares = shares_of(run, settings, other)
    folder = EvidenceFolder(result.folder.place / EVIDENCE)
    entries = allowed_slides([run.entries[name] for name in shares], result, remote_slides)
    records: list[SlideRecord] = []
    session = RunSession(
        result.folder.place, listener or RunListener(), lambda: report_rows(records), place=folder.place, work=EVIDENCE
    )
    with session, open_executor(workers, scheduler, run.settings, loaded, wait_for_workers) as executor:
        eager = run.plan(executor.examine(run.spec, run.model_settings, [], None))
        aim = audited_target(eager.targets, eager.facts.classes, target or eager.targets[0].label, False)
        if aim.label == PREDICTED:
            raise ConfigError(f"target {PREDICTED!r} is another class for each patch; name one class")
        plan = EvidencePlan(
            run=eager, run_digest=result.record.run_digest, settings=settings, target=aim, shares=shares, unit=run.unit
        )
        if other is not None:
            plan = replace(plan, against=(other.out, other.digest), others=len(other.evidence.kinds))
        drawings = _given(run, settings.drawings(), plan)
        session.claim()
        _settle(folder, plan, result.ids, overwrite)
        folder.remove_partial_files(shares)
        session.begin(EvidenceWorkload(plan), entries, executor.dashboard)

        def perform(step: EvidencePlan, slides: list[SlideEntry], again: bool = True) -> list[SlideRecord]:
            """Perform a pass; return the records of slides that did not fail, in the plan's order."""
            ended: list[SlideRecord] = []
            workload = EvidenceWorkload(step)
            session.process(executor, workload, slides, ended.append, again, workload.part)
            records.extend(one for one in ended if not again or one.status == SlideStatus.FAILED)
            good = {record.slide.id: record for record in ended if record.status == SlideStatus.OK}
            if not good and slides:
                raise ResultError(f"{folder.place}: no slide could be read; the first: {ended[0].error}")
            return [good[entry.id] for entry in slides if entry.id in good]

        evidence = _passes(folder, plan, run, entries, drawings, perform, records, other)
    return EvidenceOutcome(folder.place, tuple(records), evidence)


def shares_of(run: ExplainedRun, settings: EvidenceSettings, other: OtherEvidence | None) -> dict[str, SlideShare]:
    """Return what to draw from each slide, by its id: the patches of the other evidence, or a sample.

    Raises:
        ConfigError: the run has none of the other run's slides.
    """
    if other is not None:
        if settings.skip_labels:
            raise ConfigError("against compares label images, which skip_labels leaves out; omit one of them")
        return other.shares(run.candidates)
    drawings = settings.drawings()
    if run.unit == "slide":
        drawings = replace(drawings, patches=settings.places)
    chosen = draw_shares(run.candidates, drawings)
    return {one.slide.id: SlideShare(each, weight) for one, each, weight in chosen}


def _passes(
    folder: EvidenceFolder,
    plan: EvidencePlan,
    run: ExplainedRun,
    entries: list[SlideEntry],
    drawings: str,
    perform: Callable[..., list[SlideRecord]],
    records: list[SlideRecord],
    other: OtherEvidence | None,
) -> Evidence:
    """Perform the three passes; each uses the slides that the one before could read."""
    measured = perform(plan, entries, again=False)
    plan = replace(plan, counts={record.slide.id: record.patches for record in measured if record.patches})
    if not plan.counts:
        none = f"{run.result.out}: no patch could be read when it was explained, so there is no evidence"
        raise ResultError(none) if other is None else other.nothing_shared()
    read, ids = [record.slide for record in measured if record.patches], list(plan.counts)
    learned = learned_of(folder, plan, ids)
    choice = None
    if is_worth_sorting(learned, plan.unit):
        choice = find_kinds(drawn_pieces(folder, plan, ids), plan.settings.seed)
    if choice is None:
        return _finish(folder, plan, run, records, _Found(None, _unsorted(folder, plan, ids), learned))
    names = {i + 1: NO_TISSUE[what - 1] for i, what in choice.kinds.shows.items()}
    names |= carry_names(folder, choice.kinds)
    single = len(read) < FEWEST_SLIDES
    second = replace(plan, step="sort", kinds=choice.kinds, names=names, given=drawings, single=single)
    ids = [record.slide.id for record in perform(second, read)]
    summed = ((name, read_arrays(folder.batch(name, second.sums_digest, 0))) for name in ids)
    sums, shown = tally(summed, len(choice.kinds))
    third = replace(second, step="show", shown=shown)
    if shown:
        perform(third, [entry for entry in read if entry.id in shown])
    compared = (read_arrays(folder.batch(name, second.compared_digest, 0)) for name in ids if other is not None)
    return _finish(
        folder, third, run, records, _Found(choice, sums, learned, other, dict(zip(ids, compared, strict=False)))
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """What the passes yielded: kinds, sums, whether the model has learned anything, and what another model looks at."""

    choice: Choice | None
    sums: Tally
    learned: Verdict
    other: OtherEvidence | None = None
    compared: Mapping[str, Arrays] = field(default_factory=dict)


def _settle(folder: EvidenceFolder, plan: EvidencePlan, slides: Sequence[str], overwrite: bool) -> None:
    """Write the plan unless it exists; with `overwrite`, all measurements are deleted.

    Args:
        slides: of the run; if the existing plan is damaged, it may have been about any of them.

    Raises:
        ResumeError: the existing numbers are from other settings.
    """
    before, same = plan_before(folder, plan.identity, overwrite, "evidence")
    if not same:
        folder.clusters.remove()
        old = audited_slides(before, slides if overwrite else ())
        shares = {name: share.to_json() for name, share in plan.shares.items()}
        write_plan(folder, plan.identity, plan.digest, shares, old)


def _given(run: ExplainedRun, settings: AuditSettings, plan: EvidencePlan) -> str:
    """Return the sha256 of everything people have drawn on the slides of the sample."""
    paths = (settings.annotations, settings.regions)
    drawn = [drawn_digests(run, settings, path, (), plan.shares) for path in paths]
    marks = [asdict(mark) for mark in Marks(run.result.folder.place).all() if mark.slide in plan.shares]
    return hashlib.sha256(json.dumps([drawn, marks], sort_keys=True).encode()).hexdigest()


def drawn_pieces(folder: EvidenceFolder, plan: EvidencePlan, slides: Sequence[str]) -> Iterator[Piece]:
    """Yield the places in which kinds are found: all, or those of randomly drawn pieces if there are many."""
    patches = np.array([plan.counts[slide] for slide in slides], np.int64)
    ends = np.cumsum(-(-patches // PIECE))
    order = np.random.default_rng(plan.settings.seed).permutation(int(ends[-1]))
    slide = np.searchsorted(ends, order, side="right")
    number = order - np.concatenate([[0], ends])[slide]
    places = plan.drawn * np.minimum(PIECE, patches[slide] - number * PIECE)
    read = np.flatnonzero(np.cumsum(places) - places < READ)
    for i in read[np.argsort(order[read])].tolist():
        arrays = read_arrays(folder.batch(slides[slide[i]], plan.digest, int(number[i])))
        if len(arrays["patch/number"]):
            yield arrays["place/features"], arrays["place/value"], weights_of(arrays), shown_of(arrays)


def learned_of(folder: EvidenceFolder, plan: EvidencePlan, slides: Sequence[str]) -> Verdict:
    """Return whether the model has learned anything about such patches or slides, as judged by the audit."""
    from wsi_gradcam.audit.questions.sanity import answer_spread, has_learned

    own, others = [], []
    for slide in slides:
        if plan.probed(slide):
            arrays = read_arrays(folder.batch(slide, plan.digest, 0))
            if "probe/answers" in arrays:
                others.append(arrays["probe/answers"])
                own.append(arrays["probe/own" if "probe/own" in arrays else "patch/logits"][: len(others[-1])])
    if not own:
        raise ResultError(f"{folder.place}: no patch of the sample could be read, so there is no evidence")
    if plan.unit == "slide" and len(own) < FEWEST_SLIDES:
        return Verdict(LEARNED, "unclear", f"Nothing can be told of it from fewer than {FEWEST_SLIDES} slides.", {})
    spread = float(answer_spread(np.concatenate(own)))
    return has_learned(spread, answer_spread(np.moveaxis(np.concatenate(others), 1, 0)), plan.unit)


def _unsorted(folder: EvidenceFolder, plan: EvidencePlan, slides: Sequence[str]) -> Tally:
    """Return the number of places for a model whose places are not sorted."""
    patches = places = 0
    for slide in slides:
        for arrays in measured(folder, plan, slide):
            patches, places = patches + len(arrays["patch/number"]), places + len(arrays["place/value"])
    none = np.zeros((0, 0))
    return Tally(np.array(slides, np.str_), none, none, none, none, {}, np.zeros(0), places, patches)


def _finish(
    folder: EvidenceFolder, plan: EvidencePlan, run: ExplainedRun, records: Sequence[SlideRecord], found: _Found
) -> Evidence:
    """Count and test what was measured, and write the findings."""
    failed = {record.slide.id: record.error for record in records if record.status == SlideStatus.FAILED}
    looked = [(name, arrays) for name in plan.shown if name not in failed for arrays in _shown(folder, plan, name)]
    facts = Facts(
        model=plan.run.facts.name,
        model_digest=plan.run.facts.digest,
        run=plan.run_digest,
        layer=plan.run.facts.layer,
        target=plan.target.label,
        seed=plan.settings.seed,
        level=plan.unit,
        bag_method=plan.run.settings.bag_method[0] if plan.unit == "slide" else "",
        patches_of_run=sum(candidate.patches for candidate in run.candidates),
        slides_of_run=len(run.candidates),
        learned=found.learned,
        groups=run.groups | {"patient": {name: one.patient for name, one in run.entries.items() if one.patient}},
        names=plan.names,
        not_read={**{row.what: row.why for row in run.left_out}, **failed},
    )
    evidence = find(found.sums, found.choice, covered_by_kind(looked), facts)
    if found.other is not None and found.compared:
        evidence = evidence.model_copy(update={"against": compare_evidence(found.compared, evidence, found.other)})
    folder.metrics.remove()
    folder.clusters.write(_parquet([_flat(kind) for kind in evidence.kinds]))
    factor = next((one.factor for one in plan.run.maps), 1)
    write_report(folder.report, evidence, looked, factor)
    numbers = evidence.model_dump_json(indent=1).encode()
    write_listing(folder.place, {folder.metrics.name: numbers}, lambda name: is_account(name) or is_given(name))
    folder.metrics.write(numbers)  # the last: if it exists, everything does
    return evidence


def _shown(folder: EvidenceFolder, plan: EvidencePlan, slide: str) -> Iterator[Arrays]:
    for number in range(plan.pieces(slide)):
        yield read_arrays(folder.batch(slide, plan.shown_digest, number))


def covered_by_kind(looked: Sequence[tuple[str, Arrays]]) -> dict[int, Covered]:
    """Return what covering changed, by kind, from the pieces of the third pass, each with its slide."""
    parts: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    for slide, arrays in looked:
        if "cover/change" in arrays:
            changes = zip(arrays["shown/kind"], arrays["cover/change"], arrays["cover/elsewhere"], strict=True)
            for kind, change, elsewhere in changes:
                if np.isfinite(change) and np.isfinite(elsewhere):
                    parts[int(kind)].append((float(change), float(elsewhere), slide))
    return {
        kind: Covered(
            np.array([one for one, _, _ in rows]),
            np.array([other for _, other, _ in rows]),
            np.array([slide for *_, slide in rows], np.str_),
            np.ones(len(rows)),
        )
        for kind, rows in parts.items()
    }


def _flat(kind: KindRow) -> dict[str, Any]:
    """Return a kind as a row of a table."""
    row: dict[str, Any] = {"cluster": kind.number, "name": kind.name, "side": kind.side}
    for name, share in (("share", kind.share), ("area", kind.area)):
        row |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
    row |= {"lift": kind.lift, "slides": kind.slides, "of_slides": kind.of_slides, "probability": kind.probability}
    row |= {f"on_{name}": value for name, value in kind.suspects.items()}
    row |= {f"p_{one.by}": one.p_adjusted for one in kind.spread}
    if kind.covering is not None:
        row |= {"change": kind.covering.change.value, "elsewhere": kind.covering.elsewhere.value}
        row |= {"p_covering": kind.covering.p_adjusted}
    return {**row, "shortcut": kind.shortcut}


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), buffer)
    return buffer.getvalue()
