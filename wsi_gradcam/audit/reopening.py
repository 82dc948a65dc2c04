"""Opening a run again, as what is on disk says: its settings, its model, its slides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from wsi_gradcam.audit.sample import Candidate
from wsi_gradcam.audit.schema import UntestedRow
from wsi_gradcam.cam.targets import PREDICTED, Target
from wsi_gradcam.errors import ConfigError, ModelError, ResultError, ResumeError, StoreError
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.models.spec import ModelSpec, explain_validation
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.slide_tables import read_slide_records
from wsi_gradcam.run.plan import RunPlan, plan_run
from wsi_gradcam.run.settings import Settings, make_settings

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.results.run import Result
    from wsi_gradcam.results.slide import SlideResult

OPTIONAL_KEYS = ("site", "scanner", "label")


@dataclass(frozen=True)
class Reopened:
    """A run as it is on disk.

    Attributes:
        settings: of the run.
        spec: of its model, as it was resolved.
        asked: the settings with which the model is examined: eager, float32, at the run's layer and batch size.
        candidates: the slides that can be audited.
        left_out: the others, and why.
        groups: what is told of slides, such as "site", by slide id.
    """

    result: Result
    settings: Settings
    spec: ModelSpec
    asked: Settings
    candidates: tuple[Candidate, ...]
    left_out: tuple[UntestedRow, ...]
    groups: dict[str, dict[str, str]]

    @property
    def entries(self) -> dict[str, SlideEntry]:
        """The slides by id."""
        return {one.entry.id: one.entry for one in self.candidates}

    def plan(self, facts: ModelFacts) -> RunPlan:
        """The run's plan, with the model as it is found now.

        Raises:
            ResumeError: it is not the model, or the settings, of which the results are.
        """
        run = self.result.record
        if run.choice is None:
            raise ResumeError(f"{self.result.out}: made by an older version; explain again to audit it")
        eager = plan_run(self.result.folder.place, self.spec, facts, self.settings)
        stored = replace(eager, facts=replace(facts, choice=run.choice))
        if stored.digest() != run.run_digest:
            what = "another model" if facts.digest != run.model.digest else "other settings or another version"
            raise ResumeError(
                f"{self.result.out}: its results are of {what} than are found now; give the model that it was "
                "explained with by --model, or explain again"
            )
        return eager


def reopen(result: Result, given: ModelSpec | None = None) -> Reopened:
    """A run, from its run.yaml, slides.jsonl and the slides' manifests.

    Args:
        given: the model, where the run does not say how it can be loaded, or where its file has moved.

    Raises:
        ResultError: no slide is finished, or an older version wrote it.
        ConfigError: the model is known to a program only.
    """
    run = result.record
    settings = make_settings(**run.settings)
    spec = given or _spec_of(result)
    if settings.patch_px is not None:
        spec = spec.model_copy(update={"patch_px": settings.patch_px})
    asked = settings.model_copy(
        update={"engine": "eager", "precision": "float32", "layer": run.model.layer, "batch_size": run.model.batch_size}
    )
    entries = _entries(result)
    candidates, left_out = [], []
    for slide in result:
        why = _why_not(slide, entries)
        if why:
            left_out.append(UntestedRow(what=slide.id, why=why))
        else:
            candidates.append(Candidate(slide, entries[slide.id], slide.plan.patches))
    if not candidates:
        raise ResultError(f"{result.out}: no slide is finished and has tissue, so nothing can be audited")
    groups = {
        key: {name: value for name, entry in entries.items() if (value := getattr(entry, key))} for key in OPTIONAL_KEYS
    }
    return Reopened(
        result, settings, spec, asked, tuple(candidates), tuple(left_out), {key: by for key, by in groups.items() if by}
    )


def audited_target(run: RunPlan, label: str, annotated: bool) -> Target:
    """The target that is audited.

    Args:
        label: of one of the run's, or "predicted"; "": each patch's predicted class where all classes were explained or
            `predicted` was, else the run's first; with annotations, the run's only class.

    Raises:
        ConfigError: it was not explained, or nothing says which class annotations show.
    """
    known = {target.label: target for target in run.targets}
    every = len([t for t in run.targets if t.index is not None and t.is_class]) == len(run.facts.classes)
    if every and len(run.facts.classes) > 1:
        known.setdefault(PREDICTED, Target(PREDICTED))
    if label:
        if label not in known:
            raise ConfigError(f"target {label!r} was not explained; expected one of {', '.join(known)}")
        return known[label]
    if annotated:
        named = [target for target in run.targets if target.index is not None and target.is_class]
        if len(named) != 1:
            raise ConfigError(
                f"annotations show one class, and the run explains {', '.join(known)}; say which with --target"
            )
        return named[0]
    return known.get(PREDICTED, run.targets[0])


def _spec_of(result: Result) -> ModelSpec:
    model = result.record.model
    if model.spec is None:
        raise ResultError(f"{result.out}/run.yaml does not say how its model is loaded; give it with --model")
    values: dict[str, Any] = {**model.spec, "folder": Path(model.folder)}
    try:
        spec = ModelSpec.model_validate(values)
    except ValidationError as error:
        raise ModelError(f"{result.out}/run.yaml: {explain_validation(error)}") from error
    if spec.kind == "live":
        raise ConfigError(
            f"{result.out}: its model was a network in a program, which cannot be loaded again; give audit_run the "
            "same as `model`"
        )
    return spec


def _entries(result: Result) -> dict[str, SlideEntry]:
    """The run's slides by id, as slides.jsonl tells of them."""
    found = {}
    for name, row in read_slide_records(result.folder.record).items():
        mpp = row.get("mpp")
        told = {key: str(row.get(key, "")) for key in ("mask", *OPTIONAL_KEYS)}
        found[name] = SlideEntry(name, row["path"], None if mpp is None else (mpp[0], mpp[1]), **told)
    return found


def _why_not(slide: SlideResult, entries: dict[str, SlideEntry]) -> str:
    if slide.status == SlideStatus.FAILED and not slide.is_finished:
        return f"failed: {slide.error}"
    if not slide.is_finished:
        return "is not finished; explain again to finish it"
    if slide.id not in entries:
        return "is not in slides.jsonl; explain again"
    try:
        patches = slide.plan.patches
    except StoreError as error:
        return str(error)
    return "" if patches else "no tissue was found on it"
