"""What can be known before a run: whether this machine, the folder of the results and the workers are fit for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wsi_gradcam.doctor.cluster import workers
from wsi_gradcam.doctor.environment import FAIL, OK, WARN, Check, guarded, load, shown, worst
from wsi_gradcam.doctor.folder import folder_of_results
from wsi_gradcam.doctor.machine import this_machine
from wsi_gradcam.io.paths import StoragePath, storage_path

if TYPE_CHECKING:
    from wsi_gradcam.models.spec import ModelSpec

__all__ = ["FAIL", "OK", "WARN", "Check", "examine", "shown", "worst"]


def examine(out: str | None = None, scheduler: str | None = None, model: str | None = None) -> Iterator[Check]:
    """Checks, each as it is done; what raises is a check that failed.

    Args:
        out: folder of the results, also tried from the workers; it need not exist, and is left as it was.
        scheduler: address of a Dask scheduler, whose workers are looked at.
        model: a model as for `explain`, which is loaded here, and on each worker.

    Raises:
        ConfigError: `out` is neither a folder nor s3://BUCKET/KEY.
        ModelError: no such model.
    """
    folder = None if out is None else storage_path(out)
    spec = None if model is None else _spec(model)
    return _examine(folder, scheduler, spec)


def _examine(out: StoragePath | None, scheduler: str | None, spec: ModelSpec | None) -> Iterator[Check]:
    yield from this_machine()
    if spec is not None:
        problem = load(spec)
        yield (
            Check("model", FAIL, problem, "see docs/models.md") if problem else Check("model", OK, f"{spec.name} loads")
        )
    if out is not None:
        yield from guarded("OUT", folder_of_results, out)
    if scheduler is not None:
        yield from guarded("scheduler", workers, scheduler, out, spec)


def _spec(model: str) -> ModelSpec:
    from wsi_gradcam.models.spec import read_spec

    spec = read_spec(model)
    return spec.model_copy(update={"folder": spec.folder.absolute()})  # workers may run in another folder
