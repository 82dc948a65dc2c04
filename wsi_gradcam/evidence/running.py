"""`evidence_run`: two passes over a sample of places, and what is made of them.

In the first pass the model explains patches and places are drawn from them; kinds are found; in the second the kinds
are covered in some patches, and examples are taken. Tasks carry coordinates, results lie in pieces on disk.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.audit.archive import audited_target, draw_sample, open_run
from wsi_gradcam.audit.plan import Arrays, AuditSettings, read_arrays
from wsi_gradcam.audit.running import allowed_slides, given_model, report_rows, short
from wsi_gradcam.cam.targets import PREDICTED
from wsi_gradcam.errors import (
    ConfigError,
    DocumentError,
    ResultError,
    ResumeError,
    StoreError,
)
from wsi_gradcam.evidence import (
    PLACES,
    EvidenceFolder,
    EvidencePlan,
    EvidenceSettings,
    Shown,
    is_given,
)
from wsi_gradcam.evidence.clusters import Choice, Kinds, Piece, find_kinds, need_library
from wsi_gradcam.evidence.findings import Covered, Evidence, Facts, KindRow, Places, find
from wsi_gradcam.evidence.page import write_report
from wsi_gradcam.evidence.stages import DRAWN, EvidenceWorkload, choose_shown
from wsi_gradcam.executors import open_executor
from wsi_gradcam.io.documents import MAX_BYTES, read_yaml
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.seals import is_account, sealed_json, write_listing
from wsi_gradcam.run.claims import EVIDENCE
from wsi_gradcam.run.driver import RunSession
from wsi_gradcam.run.types import RunListener, SlideRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.archive import ExplainedRun
    from wsi_gradcam.audit.findings import Verdict
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.mil.spec import SlideModelSpec
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.models.spec import ModelSpec


@dataclass(frozen=True)
class EvidenceOutcome:
    """The outcome: where it lies, what was found, and the records of the slides."""

    out: StoragePath
    evidence: Evidence
    records: tuple[SlideRecord, ...]

    @property
    def failed(self) -> tuple[SlideRecord, ...]:
        """The slides of the sample that could not be read."""
        return tuple(record for record in self.records if record.status == SlideStatus.FAILED)


def evidence_run(
    out: StoragePathLike,
    *,
    places: int = PLACES,
    seed: int = 0,
    target: str = "",
    model: str | PathLike[str] | ModelSpec | SlideModelSpec | Model | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    wait_for_workers: float | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    remote_slides: bool = False,
    listener: RunListener | None = None,
) -> EvidenceOutcome:
    """Find out what the model looks at, across the explained archive in `out`; what was measured before is kept.

    Everything is written to `out`/evidence: report.html, evidence.json, clusters.parquet, and the places of each slide.

    Args:
        out: folder or s3:// URL that `explain` was given; slides and model must be where they were.
        places: about so many cells of the explained layer are drawn, of all slides together.
        seed: of the sample and of all random numbers.
        target: whose evidence: one of the run's targets; nothing given: the first.
        model: the run's model, where its files have moved or a program alone has it.
        workers, scheduler, wait_for_workers: as of `explain`.
        overwrite: measure all anew; evidence with other settings is refused without it.
        trust_code: let code in the model run.
        remote_slides: open slides at addresses that the results name.
        listener: is told what happens.

    Raises:
        WsiGradcamError: nothing could be done at all, or it had to stop; what was measured is not lost.
    """
    settings = EvidenceSettings(places, seed, target)
    need_library()
    result = open_result(storage_path(out).absolute())
    given, loaded = given_model(model)
    run = open_run(result, given, trust_code, held=loaded is not None)
    if run.unit == "slide":
        raise ConfigError(
            f"{result.out}: is of a slide-level model, and evidence is sorted for models of patches alone; explain the "
            "same slides with a model of patches"
        )
    samples = draw_sample(run.candidates, AuditSettings(patches=max(1, -(-places // DRAWN)), seed=seed))
    if not samples:
        raise ResultError(f"{result.out}: no patch could be read when it was explained, so there is no evidence")
    folder = EvidenceFolder(result.folder.place / EVIDENCE)
    entries = allowed_slides([run.entries[name] for name in samples], result, remote_slides)
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
            run=eager, run_digest=result.record.run_digest, settings=settings, target=aim, samples=samples
        )
        session.claim()
        _settle(folder, plan, overwrite)
        folder.remove_partial_files(samples)
        workload = EvidenceWorkload(plan)
        session.begin(workload, entries, executor.dashboard)
        session.process(executor, workload, entries, records.append)
        good = {record.slide.id for record in records if record.status == SlideStatus.OK}
        read = [entry for entry in entries if entry.id in good]  # in the plan's order, whichever ended first
        if not read:
            raise ResultError(f"{folder.place}: no slide could be read; the first: {records[0].error}")
        found = _first_pass(folder, plan, [entry.id for entry in read])
        if found.shown:
            second = replace(plan, kinds=found.kinds, shown=found.shown)
            wanted = [entry for entry in read if entry.id in found.shown]
            again: list[SlideRecord] = []
            session.process(executor, EvidenceWorkload(second), wanted, again.append, again=True)
            records += [record for record in again if record.status == SlideStatus.FAILED]
        else:
            second = plan
        evidence = _finish(folder, second, run, records, found)
    return EvidenceOutcome(folder.place, evidence, tuple(records))


def _settle(folder: EvidenceFolder, plan: EvidencePlan, overwrite: bool) -> None:
    """Write the plan, unless it stands there; with `overwrite` all that was measured is forgotten.

    Raises:
        ResumeError: the numbers there are of other settings.
    """
    try:
        before = folder.read_plan()
    except StoreError:
        if not overwrite:
            raise
        before = None
    identity = plan.identity()
    if before is not None and before.get("identity") == identity and not overwrite:
        return
    if before is not None and not overwrite:
        there = before.get("identity") or {}
        changed = [
            f"{key}: {short(there.get(key))} there, {short(value)} now"
            for key, value in identity.items()
            if there.get(key) != value and key != "sample"
        ]
        what = ", ".join(changed) or "other patches"
        raise ResumeError(f"{folder.place}: holds evidence with other settings ({what}); --overwrite replaces it")
    for place in (folder.plan, folder.listing, folder.metrics, folder.report, folder.clusters):
        place.remove()
    for name in (before or {}).get("samples", plan.samples):
        folder.forget(name)
    values = {
        "identity": identity,
        "digest": plan.digest(),
        "samples": {name: sample.to_json() for name, sample in plan.samples.items()},
    }
    folder.plan.write(sealed_json(values, indent=1))


@dataclass(frozen=True, eq=False)
class _First:
    """What the first pass gave: kinds, places, and the patches of the second pass."""

    choice: Choice | None
    places: Places
    learned: Verdict
    shown: dict[str, tuple[Shown, ...]]
    slides: tuple[str, ...]

    @property
    def kinds(self) -> Kinds | None:
        return None if self.choice is None else self.choice.kinds


def _first_pass(folder: EvidenceFolder, plan: EvidencePlan, slides: Sequence[str]) -> _First:
    """Find kinds among the places that were measured, and choose patches to look at again."""

    def pieces() -> Iterator[Piece]:
        for _, arrays in _measured(folder, plan, slides):
            yield arrays["place/features"], arrays["place/value"], _weights(arrays)

    learned = _learned(folder, plan, slides)
    choice = find_kinds(pieces, plan.settings.seed) if learned.outcome == "holds" else None
    kept: dict[str, list[NDArray[Any]]] = defaultdict(list)
    suspects: dict[str, list[NDArray[Any]]] = defaultdict(list)
    patches = 0
    for slide, arrays in _measured(folder, plan, slides):
        features, values = arrays["place/features"], arrays["place/value"]
        kinds = np.full(len(values), -1) if choice is None else choice.kinds.sort(features, values)
        likeness = np.zeros(len(values), np.float32)
        if choice is not None and len(values):
            likeness = np.take_along_axis(choice.kinds.likeness(features), np.maximum(kinds, 0)[:, None], axis=1)[:, 0]
        for name, array in {
            "kind": kinds,
            "likeness": likeness,
            "value": values,
            "weight": _weights(arrays),
            "patch": arrays["place/patch"] + patches,
            "slide": np.full(len(arrays["patch/number"]), slide),
            "number": arrays["patch/number"],
            "yx": arrays["patch/yx"],
            "patch_weight": arrays["patch/weight"],
            "probability": arrays.get("patch/probability", np.zeros(0)),
        }.items():
            kept[name].append(array)
        for name, array in arrays.items():
            if name.startswith("suspect/"):
                suspects[name.removeprefix("suspect/")].append(array)
        patches += len(arrays["patch/number"])
    whole = {name: np.concatenate(parts) for name, parts in kept.items()}
    found = Places(
        whole["kind"],
        whole["value"],
        whole["weight"],
        whole["patch"],
        {name: np.concatenate(parts) for name, parts in suspects.items()},
        whole["slide"],
        whole["probability"] if len(whole["probability"]) == patches else None,
    )
    shown = {} if choice is None else choose_shown(found, whole, len(choice.kinds), plan.settings.seed)
    return _First(choice, found, learned, shown, tuple(slides))


def _measured(folder: EvidenceFolder, plan: EvidencePlan, slides: Sequence[str]) -> Iterator[tuple[str, Arrays]]:
    """Yield the pieces of the first pass that have places, with their slide."""
    first = replace(plan, kinds=None)
    for slide in slides:
        for number in range(first.pieces(slide)):
            arrays = read_arrays(folder.batch(slide, first.digest(), number))
            if len(arrays["patch/number"]):
                yield slide, arrays


def _weights(arrays: Arrays) -> NDArray[np.float64]:
    """Return how many places of the archive each place stands for."""
    weights: NDArray[np.float64] = arrays["place/weight"] * arrays["patch/weight"][arrays["place/patch"]]
    return weights


def _learned(folder: EvidenceFolder, plan: EvidencePlan, slides: Sequence[str]) -> Verdict:
    """Return whether the model has learned anything of such patches, as the audit judges it."""
    from wsi_gradcam.audit.questions.sanity import answer_spread, has_learned

    own, others = [], []
    for _, arrays in _measured(folder, plan, slides):
        if "probe/answers" in arrays:
            others.append(arrays["probe/answers"])
            own.append(arrays["patch/logits"][: len(others[-1])])
    if not own:
        raise ResultError(f"{folder.place}: no patch of the sample could be read, so there is no evidence")
    spread = float(answer_spread(np.concatenate(own)))
    return has_learned(spread, answer_spread(np.moveaxis(np.concatenate(others), 1, 0)))


def _finish(
    folder: EvidenceFolder, plan: EvidencePlan, run: ExplainedRun, records: Sequence[SlideRecord], first: _First
) -> Evidence:
    """Count and test what was measured, and write it."""
    failed = {record.slide.id: record.error for record in records if record.status == SlideStatus.FAILED}
    looked = [(name, arrays) for name in plan.shown if name not in failed for arrays in _shown(folder, plan, name)]
    facts = Facts(
        model=plan.run.facts.name,
        model_digest=plan.run.facts.digest,
        run=plan.run_digest,
        layer=plan.run.facts.layer,
        target=plan.target.label,
        seed=plan.settings.seed,
        patches_of_run=sum(candidate.patches for candidate in run.candidates),
        slides_of_run=len(run.candidates),
        learned=first.learned,
        groups=run.groups,
        names=read_names(folder.names),
        not_read={**{row.what: row.why for row in run.left_out}, **failed},
    )
    evidence = find(first.places, first.choice, covered_by_kind(looked), facts)
    folder.metrics.remove()
    _write_places(folder, plan, run, first)
    folder.clusters.write(_parquet([_flat(kind) for kind in evidence.kinds]))
    factor = next((one.factor for one in plan.run.maps), 1)
    write_report(folder.report, evidence, looked, factor)
    numbers = evidence.model_dump_json(indent=1).encode()
    write_listing(folder.place, {folder.metrics.name: numbers}, lambda name: is_account(name) or is_given(name))
    folder.metrics.write(numbers)  # the last: where it is, all is
    return evidence


def _shown(folder: EvidenceFolder, plan: EvidencePlan, slide: str) -> Iterator[Arrays]:
    for number in range(plan.pieces(slide)):
        yield read_arrays(folder.batch(slide, plan.shown_digest(), number))


def covered_by_kind(looked: Sequence[tuple[str, Arrays]]) -> dict[int, Covered]:
    """Return what covering has changed, by kind, from the pieces of the second pass, each with its slide."""
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


def read_names(place: StoragePath) -> dict[int, str]:
    """Return the names of kinds that the user has given, by number.

    Raises:
        ConfigError: the file is no mapping of numbers to names.
    """
    try:
        values = read_yaml(place.read(MAX_BYTES))
    except FileNotFoundError:
        return {}
    except DocumentError as error:
        raise ConfigError(f"{place}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, int) and isinstance(v, str) for k, v in values.items()):
        raise ConfigError(f"{place}: expected a line NUMBER: NAME for each named cluster, such as '3: mitoses'")
    return dict(values)


def _write_places(folder: EvidenceFolder, plan: EvidencePlan, run: ExplainedRun, first: _First) -> None:
    """Write a table a slide of its places: patch, centre in level-0 px, kind (0 for none), contribution, weight."""
    height, width = plan.run.facts.cam_shape
    views = {one.slide.id: one.slide.plan.view for one in run.candidates}
    for slide in first.slides:
        rows: dict[str, list[NDArray[Any]]] = defaultdict(list)
        for _, arrays in _measured(folder, plan, [slide]):
            features, values = arrays["place/features"], arrays["place/value"]
            kinds = np.full(len(values), -1) if first.kinds is None else first.kinds.sort(features, values)
            top, left, tall, wide = views[slide]
            cell, patch = np.divmod(arrays["place/cell"], width), arrays["place/patch"]
            yx = arrays["patch/yx"][patch]
            rows["patch"].append(arrays["patch/number"][patch])
            rows["y"].append(yx[:, 0] + top + (cell[0] + 0.5) * tall / height)
            rows["x"].append(yx[:, 1] + left + (cell[1] + 0.5) * wide / width)
            rows["cluster"].append(kinds + 1)
            rows["contribution"].append(values)
            rows["weight"].append(_weights(arrays))
        if rows:
            folder.places(slide).write(_parquet({name: np.concatenate(parts) for name, parts in rows.items()}))


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


def _parquet(rows: Sequence[Mapping[str, Any]] | Mapping[str, NDArray[Any]]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    if isinstance(rows, Mapping):
        table = pa.table({name: pa.array(values) for name, values in rows.items()})
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()
