"""Executors run the workloads of a run: `serial` is the reference, and `dask` does the same in many processes.

They know the room `run` and those below it; `audit` and `api` give them workloads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wsi_gradcam.errors import ConfigError, from_extra

if TYPE_CHECKING:
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.run.settings import Settings
    from wsi_gradcam.run.types import Executor


def check_workers(workers: int | None, scheduler: str | None) -> None:
    """Refuse fewer than one worker, and workers in two places.

    Raises:
        ConfigError: fewer than one worker, or both are given.
    """
    if workers is not None and scheduler is not None:
        raise ConfigError("workers and scheduler are both given; give only one")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}, expected 1 or more; omit it to run in this process")


@contextmanager
def open_executor(
    workers: int | None, scheduler: str | None, settings: Settings, loaded: Model | None, wait_s: float | None
) -> Iterator[Executor]:
    """Open an executor, as a context: this process, worker processes on this machine, or a cluster.

    Args:
        workers: how many processes to start on this machine; None: none, but one for a GPU ("cuda").
        scheduler: address of a Dask scheduler; None: none.
        settings: the run's settings, which say where the model runs and with how many threads.
        loaded: a model that is loaded in this process.
        wait_s: how long to wait for missing workers.

    Raises:
        ConfigError: two places are given, or a loaded model would have to run in another process.
        MissingExtraError: Dask is not installed.
        WorkerError: no scheduler answers, or no worker appears.
    """
    check_workers(workers, scheduler)
    if loaded is not None and (workers, scheduler) != (None, None):
        raise ConfigError(
            f"{loaded.name}: a loaded model exists only in this process; for workers, give what they can load "
            "themselves, such as a file from torch.export.save, or module:function"
        )
    if settings.device == "cuda" and loaded is None and scheduler is None:
        workers = workers or 1  # in this process planning and stitching would keep the GPU waiting
    if workers is None and scheduler is None:
        from wsi_gradcam.executors.serial import SerialExecutor

        if settings.torch_threads:
            import torch

            torch.set_num_threads(settings.torch_threads)
        yield SerialExecutor(loaded)
    else:
        with from_extra("cluster", "running in other processes (--workers, --scheduler, --device cuda)"):
            from wsi_gradcam.executors.dask import DaskExecutor

        executor = DaskExecutor(workers, scheduler, settings.torch_threads, settings.device, wait_s)
        try:
            yield executor
        finally:
            executor.close()
