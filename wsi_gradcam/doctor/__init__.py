"""Checks before a run: of this machine, of the folder of the results, and of a cluster's workers.

`checks` has those of this process and those of workers; they return `Check`s, which the command line prints. The
room may try whatever a run will need (readers, stores, models, workers), and leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wsi_gradcam.doctor.checks import check_folder, check_machine, check_workers
from wsi_gradcam.doctor.environment import (
    FAIL,
    OK,
    WARN,
    Check,
    Status,
    format_check,
    loading_problem,
    run_check,
    worst,
)
from wsi_gradcam.io.paths import StoragePath, storage_path

if TYPE_CHECKING:
    from wsi_gradcam.doctor.environment import AnySpec

__all__ = ["FAIL", "OK", "WARN", "Check", "Status", "examine", "format_check", "worst"]


def examine(
    out: str | None = None, scheduler: str | None = None, model: str | None = None, *, trust_code: bool = False
) -> Iterator[Check]:
    """Return an iterator over the checks, each made when it is reached; an exception is a check that failed.

    Args:
        out: folder of the results, also tried from the workers; it need not exist, and is left as it was.
        scheduler: address of a Dask scheduler, whose workers are checked.
        model: a model as for `explain`, which is loaded here, and on each worker.
        trust_code: allow the code in the model to run.

    Raises:
        ConfigError: `out` is neither a folder nor s3://BUCKET/KEY.
        ModelError: no such model, or one whose loading runs code that is not allowed.
    """
    folder = None if out is None else storage_path(out)
    spec = None if model is None else _spec(model, trust_code)
    return _examine(folder, scheduler, spec)


def _examine(out: StoragePath | None, scheduler: str | None, spec: AnySpec | None) -> Iterator[Check]:
    yield from check_machine()
    if spec is not None:
        problem = loading_problem(spec)
        page = "docs/slide_level.md" if hasattr(spec, "aggregator") else "docs/models.md"
        good, bad = Check("model", OK, f"{spec.name} loads"), Check("model", FAIL, problem, f"see {page}")
        yield bad if problem else good
    if out is not None:
        yield from run_check("OUT", check_folder, out)
    if scheduler is not None:
        yield from run_check("scheduler", check_workers, scheduler, out, spec)


def _spec(model: str, trust_code: bool) -> AnySpec:
    from wsi_gradcam.mil.spec import is_slide_model, read_slide_model
    from wsi_gradcam.models.spec import read_spec

    if is_slide_model(model):
        of_slides = read_slide_model(model).trusting(trust_code)
        of_slides.check_trusted()
        if of_slides.encoder is not None:
            of_slides.encoder.check_trusted()
        return of_slides.resolved()
    spec = read_spec(model).trusting(trust_code)
    spec.check_trusted()
    return spec.model_copy(update={"folder": spec.folder.absolute()})  # workers may run in another folder
