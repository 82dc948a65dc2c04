"""The public functions: `explain` an archive, `preview` its cost, `encode` it, `validate` a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.cam.facts import NO_METHOD
from wsi_gradcam.errors import ConfigError, ModelError, StoreError, one_line
from wsi_gradcam.executors import open_executor
from wsi_gradcam.inputs.find import SlideEntry, choose_slides, search_slides
from wsi_gradcam.io.paths import S3Path, StoragePath, StoragePathLike, storage_path
from wsi_gradcam.io.urls import allowed_hosts, allowing
from wsi_gradcam.mil.feature_arrays import FeatureFolder
from wsi_gradcam.mil.spec import SlideModelSpec, encoder_of, is_slide_model, read_slide_model
from wsi_gradcam.models.spec import ModelSpec, read_spec
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.run_files import RunFolder, read_run
from wsi_gradcam.results.slide_tables import assign_ids, read_slide_records, read_slides
from wsi_gradcam.results.validation import validate
from wsi_gradcam.run.driver import MEAN, Command
from wsi_gradcam.run.examining import SLIDES_TRIED
from wsi_gradcam.run.plan import (
    Estimate,
    Pace,
    RunPlan,
    check_bag_methods,
    check_features,
    check_methods,
    estimate,
    open_given,
    plan_run,
)
from wsi_gradcam.run.plan import plan_slide as make_plan
from wsi_gradcam.run.settings import Settings, make_settings
from wsi_gradcam.run.types import Executor, RunListener, SlideRecord
from wsi_gradcam.run.workload import ExplainWorkload
from wsi_gradcam.slides import check_reader
from wsi_gradcam.slides.patch_reader import open_entry
from wsi_gradcam.tissue.annotations import check_masks, entry_regions

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import Choice
    from wsi_gradcam.models.load import Model

__all__ = ["Estimate", "Outcome", "RunListener", "SlideRecord", "encode", "explain", "preview", "validate"]

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: its folder (a `Path` if on a disk), and a record per slide, in order of finishing."""

    out: Path | S3Path
    records: tuple[SlideRecord, ...]

    @property
    def failed(self) -> tuple[SlideRecord, ...]:
        """The slides that failed."""
        return tuple(record for record in self.records if record.status == SlideStatus.FAILED)


def explain(
    slides: Paths,
    model: str | PathLike[str] | ModelSpec | SlideModelSpec | Model,
    out: StoragePathLike,
    settings: Settings | None = None,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    wait_for_workers: float | None = None,
    overwrite: bool = False,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    retry_failed: bool = False,
    log_tasks: bool = False,
    trust_code: bool = False,
    listener: RunListener | None = None,
    **options: Any,
) -> Outcome:
    """Explain slides and write the results to `out`; slides finished before are not computed again.

    Slides that failed before for a reason of their own are not tried again either, as long as their file, the settings
    and the versions are the same. While a run is active, another one on the same `out` is refused.

    Args:
        slides: slide files, folders, patterns, URLs and lists of slides, see `find_slides`.
        model: anything that `--model` accepts, a `ModelSpec` or `SlideModelSpec`, or a loaded `Model`, such as
            `model_of` makes from a network in Python; a loaded model runs in this process, on the device where it is.
        out: folder for the results, or s3://BUCKET/KEY.
        settings: how slides are explained; or give single settings as keyword arguments (`options`).
        workers: number of processes on this machine; by default, this process does the work.
        scheduler: address of a Dask cluster to run on instead.
        wait_for_workers: seconds to wait for missing workers, at the start or later (default 50); set it higher for a
            queue that may start none for hours.
        overwrite: recompute finished slides, even if `out` holds results of another model, file or configuration. To
            continue an overwriting run that was stopped, leave it out.
        only: patterns of ids, such as "2023/**"; of the slides found, only those that match are explained.
        skip: patterns of ids to leave out.
        retry_failed: retry all slides that failed before.
        log_tasks: write a line to the run's log for each task, not only for each slide.
        trust_code: allow code in the model (see `ModelSpec.runs_code`) and in targets that are functions to run; use it
            only if you trust their authors. The permission is not stored.
        listener: an object that is notified of what happens.

    Returns:
        A record for each slide, with the cause if it failed.

    Raises:
        WsiGradcamError: nothing could be done (wrong settings, no such model, an `out` that cannot be written, holds
            other results or is in use), or the run had to stop, for example because the disk is full; a `StoppedError`
            if the command line was asked to stop.
    """
    settings, folder = _settings(settings, options), RunFolder(storage_path(out).absolute())
    entries, remarks = _chosen(slides, folder, only, skip, settings)
    spec, loaded = _prepared(entries, model, settings, trust_code)
    settings = _seeing(spec, settings)
    opened = partial(open_executor, workers, scheduler, settings, loaded, wait_for_workers)
    told = listener or RunListener()
    command = Command(folder, entries, remarks, settings, told, overwrite, retry_failed, log_tasks, opened)
    from_mean = settings.bag_baseline == MEAN and isinstance(spec, SlideModelSpec)
    if isinstance(spec, SlideModelSpec) and from_mean and settings.features is None:
        command.encode_first(encoder_of(spec))

    def plan(executor: Executor, choice: Choice | None) -> RunPlan:
        made = _plan(executor, folder.place, spec, settings, entries, choice)
        return replace(made, baseline=command.mean_feature(made)) if from_mean else made

    return Outcome(_shown(out), command.run(plan, ExplainWorkload))


def encode(
    slides: Paths,
    model: str | PathLike[str] | ModelSpec | SlideModelSpec,
    out: StoragePathLike,
    settings: Settings | None = None,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    wait_for_workers: float | None = None,
    overwrite: bool = False,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    retry_failed: bool = False,
    log_tasks: bool = False,
    trust_code: bool = False,
    listener: RunListener | None = None,
    **options: Any,
) -> Outcome:
    """Compute the features of all patches of slides into `out`, without explaining them; existing ones are kept.

    `explain` with the same `out`, encoder and patch settings continues from them; `export` writes them for other
    programs.

    Args:
        model: the file of a slide-level model, whose encoder is used, or of a patch model, which is used without its
            head.

    The other arguments are those of `explain`.

    Returns:
        A record for each slide, as for `explain`.

    Raises:
        WsiGradcamError: as for `explain`.
    """
    settings, folder = _settings(settings, options), RunFolder(storage_path(out).absolute())
    if settings.features is not None:
        raise ConfigError("features are given, so there is nothing left to encode; use them with explain")
    entries, remarks = _chosen(slides, folder, only, skip, settings)
    settings = settings.model_copy(update={"method": (NO_METHOD,)})
    spec = _prepared_encoder(entries, model, settings, trust_code)
    opened = partial(open_executor, workers, scheduler, settings, None, wait_for_workers)
    told = listener or RunListener()
    command = Command(folder, entries, remarks, settings, told, overwrite, retry_failed, log_tasks, opened)
    return Outcome(_shown(out), command.encode(spec))


@dataclass(frozen=True)
class Preview:
    """The outcome of a dry run: estimates for slides that can be planned, errors for the others, and the time.

    `remarks` say what the search for slides left out, one line each.
    """

    run: RunPlan
    estimates: tuple[Estimate, ...]
    errors: tuple[tuple[SlideEntry, str], ...]
    pace: Pace
    remarks: tuple[str, ...] = ()


def preview(
    slides: Paths,
    model: str | PathLike[str] | ModelSpec | SlideModelSpec | Model,
    out: StoragePathLike,
    settings: Settings | None = None,
    *,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    trust_code: bool = False,
    **options: Any,
) -> Preview:
    """Plan everything and write nothing; arguments and errors as for `explain`."""
    from wsi_gradcam.executors import SerialExecutor

    settings, folder = _settings(settings, options), RunFolder(storage_path(out).absolute())
    entries, remarks = _chosen(slides, folder, only, skip, settings)
    spec, loaded = _prepared(entries, model, settings, trust_code)
    settings = _seeing(spec, settings)
    # How the model will be run does not change any estimate, and finding out takes time.
    plain = settings.model_copy(update={"engine": "eager", "precision": "float32"})
    executor = SerialExecutor(loaded)
    run = _plan(executor, folder.place, spec, plain, entries, None)
    estimates, errors = [], []
    place = settings.features
    folder_of_features = None if place is None else FeatureFolder(place, [entry.id for entry in entries])
    for entry in entries:
        try:
            slide = open_entry(entry, settings)
            try:
                regions = entry_regions(entry, settings)
                given = (
                    None if folder_of_features is None else open_given(folder_of_features, entry.id, slide.info, run)
                )
                with given or nullcontext():
                    plan, _, _ = make_plan(slide, run, regions, given)
            finally:
                slide.close()
            estimates.append(estimate(entry, plan, run))
        except Exception as error:  # as in a run: a bad slide never hides the others
            errors.append((entry, one_line(error)))
    pace = _pace(folder, run, estimates, partial(executor.rate, run))
    return Preview(run, tuple(estimates), tuple(errors), pace, remarks)


def _pace(folder: RunFolder, run: RunPlan, estimates: Sequence[Estimate], measure: Callable[[], float]) -> Pace:
    """Return the time for the remaining patches, at the rate of this model in `out`, or else as measured now."""
    try:
        rows, stored = read_slides(folder.slides), read_run(folder.run)
    except StoreError:  # reported by the run
        rows, stored = {}, None
    same = stored is not None and stored["identity"]["settings"].get("method") == list(run.settings.method)
    ok = [row for row in rows.values() if row["status"] == SlideStatus.OK and row["model_digest"] == run.facts.digest]
    ended = {name for name, row in rows.items() if row["status"] in (SlideStatus.OK, SlideStatus.NO_TISSUE)}
    left = sum(each.patches for each in estimates if each.slide.id not in ended)
    done, seconds = sum(int(row["patches"]) for row in ok), sum(float(row["seconds"]) for row in ok)
    if same and done and seconds:
        return Pace(
            left, done / seconds, f"the rate of the {done:,} patches already in {folder.place}, one slide at a time"
        )
    basis = (
        f"measured just now on noise, with engine eager in float32 on {run.settings.device} in one process; reading "
        "slides may slow it down, and the engine that the run chooses may speed it up"
    )
    return Pace(left, measure(), basis)


def _settings(settings: Settings | None, options: dict[str, Any]) -> Settings:
    if settings is None:
        settings = make_settings(**options)
    elif options:
        settings = make_settings(**{**settings.model_dump(), "allow_hosts": settings.allow_hosts, **options})
    return settings.model_copy(update={"allow_hosts": settings.allow_hosts or allowed_hosts()})


def _chosen(
    slides: Paths, folder: RunFolder, only: str | Sequence[str], skip: str | Sequence[str], settings: Settings
) -> tuple[list[SlideEntry], tuple[str, ...]]:
    """Return the slides to explain, with their ids in a run that is being continued, and remarks on the search."""
    with allowing(settings.allow_hosts):
        found = search_slides([slides] if isinstance(slides, str | PathLike) else slides, str(folder.place))
    patterns = [[given] if isinstance(given, str) else given for given in (only, skip)]
    chosen = choose_slides(assign_ids(found.entries, read_slide_records(folder.record)), *patterns)
    if inside := next((entry.path for entry in chosen if entry.path == str(folder.slide(entry.id).place)), None):
        raise ConfigError(
            f"{inside}: is where the slide's own results would be; choose another --out, such as {folder.place}/results"
        )
    return chosen, found.remarks


def _prepared(
    entries: Sequence[SlideEntry],
    model: str | PathLike[str] | ModelSpec | SlideModelSpec | Model,
    settings: Settings,
    trust_code: bool,
) -> tuple[ModelSpec | SlideModelSpec, Model | None]:
    """Return the model's specification, and the model itself if it is loaded already."""
    check_reader(settings.reader)
    check_methods(settings.method)
    check_masks(entries, settings)
    if isinstance(model, SlideModelSpec) or (isinstance(model, str | PathLike) and is_slide_model(fspath(model))):
        return _prepared_slide_model(model, settings, trust_code), None
    check_features(settings, is_slide_level=False)
    if not isinstance(model, str | PathLike | ModelSpec):
        if settings.patch_px not in (None, model.patch_px):
            raise ConfigError(f"{model.name}: patch_px of a loaded model is fixed; pass it to load_model or model_of")
        return model.spec.trusting(trust_code), model
    spec = (model if isinstance(model, ModelSpec) else read_spec(fspath(model))).trusting(trust_code)
    spec.check_trusted()  # it is checked again where it is loaded; no worker is started for it here
    spec = spec.model_copy(update={"folder": spec.folder.absolute()})  # workers may run in another folder
    if settings.patch_px is not None:
        spec = spec.model_copy(update={"patch_px": settings.patch_px})
    return spec, None


def _prepared_encoder(
    entries: Sequence[SlideEntry],
    model: str | PathLike[str] | ModelSpec | SlideModelSpec,
    settings: Settings,
    trust_code: bool,
) -> ModelSpec:
    """Return the specification of the encoder: that of a slide-level model, or a patch model without its head."""
    if isinstance(model, SlideModelSpec) or (isinstance(model, str | PathLike) and is_slide_model(fspath(model))):
        given = model if isinstance(model, SlideModelSpec) else read_slide_model(fspath(model))
        model = encoder_of(given)
    elif not isinstance(model, str | PathLike | ModelSpec):
        raise ConfigError(
            f"{model.name}: features are computed with a model that workers can load themselves; give a "
            "model file, for example"
        )
    explaining = settings.model_copy(update={"method": ("gradcam",)})  # the checks do not depend on it
    spec, _ = _prepared(entries, model, explaining, trust_code)
    assert isinstance(spec, ModelSpec)
    return spec.as_encoder()


def _prepared_slide_model(
    model: str | PathLike[str] | SlideModelSpec, settings: Settings, trust_code: bool
) -> SlideModelSpec:
    spec = (model if isinstance(model, SlideModelSpec) else read_slide_model(fspath(model))).trusting(trust_code)
    spec.check_trusted()
    check_features(settings, is_slide_level=True)
    check_bag_methods(settings)
    encoder = None if settings.features is not None and not settings.methods else spec.encoder
    if encoder is None and settings.features is None:
        raise ModelError(
            f"{spec.name}: has no 'encoder:', so it cannot compute features; add one to the model file, or give "
            "existing features with --features"
        )
    if settings.features is not None:
        FeatureFolder(settings.features)  # checked here, not slide by slide
    if encoder is not None:
        encoder.check_trusted()
        if settings.patch_px is not None:
            encoder = encoder.model_copy(update={"patch_px": settings.patch_px})
    return spec.model_copy(update={"encoder": encoder}).resolved()


def _seeing(spec: ModelSpec | SlideModelSpec, settings: Settings) -> Settings:
    """Return the settings of a run, without methods for pixels if no network of the model sees pixels."""
    blind = isinstance(spec, SlideModelSpec) and spec.encoder is None
    return settings.model_copy(update={"method": (NO_METHOD,)}) if blind else settings


def _shown(out: StoragePathLike) -> Path | S3Path:
    place = storage_path(out)
    return place if isinstance(place, S3Path) else Path(str(place))


def _plan(
    executor: Executor,
    out: StoragePath,
    spec: ModelSpec | SlideModelSpec,
    settings: Settings,
    entries: Sequence[SlideEntry],
    choice: Choice | None,
) -> RunPlan:
    facts = executor.examine(spec, settings, entries[:SLIDES_TRIED], choice)
    return plan_run(out, spec, facts, settings)
