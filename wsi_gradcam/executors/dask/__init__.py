"""Many processes through Dask: on this machine, or on a cluster given by its scheduler's address.

This uses futures, not collections: a task is a slide and a few numbers, a limited number of tasks is in flight, and
workers keep the model between tasks and write their own results. Several slides are in flight, so that no worker waits
at the end of a slide. Only the modules of this package import distributed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from distributed import get_worker
from distributed.scheduler import KilledWorker, NoValidWorkerError

from wsi_gradcam.errors import ConfigError, DeviceError, WorkerError, one_line
from wsi_gradcam.executors.dask.plugins import EXAMINED, RunSchedulerPlugin, RunWorkerPlugin, check_device, use_threads
from wsi_gradcam.executors.dask.scheduling import SlideScheduler
from wsi_gradcam.executors.dask.workers import (
    NO_WORKER_S,
    WAIT_S,
    MissingWorkerTimer,
    Workers,
    ask_workers,
    connect,
    local_cluster,
    threads_each,
    workers_of,
)
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.run.examining import examine_for_run
from wsi_gradcam.run.failures import PAUSES_S
from wsi_gradcam.run.types import Observer, SlideRecord, Workload
from wsi_gradcam.system.isolation import POLL_S, STOP

__all__ = ["DaskExecutor", "ask_workers"]

if TYPE_CHECKING:
    from distributed import Client, Future

    from wsi_gradcam.cam.facts import Choice, ModelFacts
    from wsi_gradcam.mil.spec import SlideModelSpec
    from wsi_gradcam.models.spec import ModelSpec
    from wsi_gradcam.run.settings import Settings

LOG = logging.getLogger("wsi_gradcam")
END_S = 0.5  # for an error to reach the client
WORKERS_POLLED_S = 2.0  # how often the scheduler is asked for its workers while any are missing


class DaskExecutor:
    """Runs workloads on Dask workers.

    Args:
        workers: how many to start on this machine; on its GPUs if `device` is "cuda".
        scheduler: address of a scheduler that has workers already, or will have.
        torch_threads: threads of the model in each worker.
        device: where the model runs; other than "cpu", on workers that declare the resource GPU.
        wait_s: how long to wait for missing workers, at the start and later; None: not for long.

    Raises:
        WorkerError: no scheduler answers, or no worker comes.
        ConfigError: waiting for a negative time.
    """

    def __init__(
        self,
        workers: int | None = None,
        scheduler: str | None = None,
        torch_threads: int | None = None,
        device: str = "cpu",
        wait_s: float | None = None,
    ) -> None:
        if wait_s is not None and not wait_s >= 0:
            raise ConfigError(f"wait_for_workers is {wait_s}, expected a number of seconds, 0 or more")
        self._device, self._wait_s = device, WAIT_S if wait_s is None else wait_s
        self._scheduler = scheduler or "ADDRESS"
        self._torch_threads = torch_threads
        if scheduler is None and torch_threads is None:
            self._torch_threads = threads_each(workers or 1)
        with ExitStack() as opened, STOP.graceful():
            where = opened.enter_context(local_cluster(workers or 1, device)) if scheduler is None else scheduler
            self._client: Client = opened.enter_context(connect(where, NO_WORKER_S))
            self._wait()
            self._opened = opened.pop_all()

    @property
    def dashboard(self) -> str:
        """Address of Dask's own pages; "" if its scheduler has none, as on this machine."""
        try:
            has_pages = self._client.run_on_scheduler(_has_pages)
        except Exception as error:  # whatever an import there raises: a run does not need to know
            LOG.debug("cannot tell whether the scheduler has a dashboard (%s)", one_line(error))
            return ""
        return str(self._client.dashboard_link) if has_pages else ""

    def workers(self) -> Workers:
        """Return the present workers.

        Raises:
            WorkerError: the scheduler does not answer.
        """
        return Workers.of(workers_of(self._client), self._device, self._scheduler)

    def examine(
        self,
        spec: ModelSpec | SlideModelSpec,
        settings: Settings,
        slides: Sequence[SlideEntry],
        choice: Choice | None = None,
    ) -> ModelFacts:
        """Return what `examine_for_run` finds out about the model, on a worker: this process never loads torch.

        Raises:
            WorkerError: the workers die doing this, or are gone.
            StoppedError: the process was told to stop.
        """
        try:
            with STOP.graceful():
                return self._examined(spec, settings, slides, choice)
        except KilledWorker as error:
            raise WorkerError("workers died while loading the model; give them more memory") from error
        except (NoValidWorkerError, CancelledError) as error:
            raise WorkerError("the workers are gone; start new ones and run the same command again") from error

    def _examined(self, *model: Any) -> ModelFacts:
        """Have the model examined; if a worker's GPU fails, by another worker, or by the same one once restarted."""
        pauses_s = iter(PAUSES_S)
        while True:
            needs = self.workers().needs.model
            future = self._client.submit(
                _examine, self._device, self._torch_threads, *model, pure=False, resources=needs
            )
            try:
                facts: ModelFacts = self._result(future)
                return facts
            except DeviceError as error:
                if (pause_s := next(pauses_s, None)) is None:
                    raise
                LOG.warning("%s", one_line(error))
                STOP.wait(pause_s)
                self._wait()

    def run(self, workload: Workload, slides: Iterable[SlideEntry], observe: Observer) -> Iterator[SlideRecord]:
        """Yield the record of each slide as it is finished, in the order in which they finish.

        Raises:
            FatalError: the run cannot go on.
        """
        name = f"wsi-gradcam-{uuid.uuid4().hex[:8]}"
        scheduler_plugin = RunSchedulerPlugin(name, self._client.id)
        hints = True
        try:
            self._client.register_plugin(scheduler_plugin)
        except Exception as error:  # whatever an import there raises
            LOG.warning("the scheduler cannot monitor the run (%s)", one_line(error))
            hints = False
        self._client.register_plugin(RunWorkerPlugin(name, workload, self._torch_threads))
        scheduler = SlideScheduler(
            self._client, name, workload, observe, self.workers, MissingWorkerTimer(self._wait_s), hints
        )
        try:
            with STOP.graceful():
                yield from scheduler.run(slides)
        finally:
            if self._client.status == "running":
                with suppress(Exception):  # after Ctrl-C, the cluster may be half gone: what matters is on disk
                    self._client.unregister_worker_plugin(name)
                with suppress(Exception):
                    self._client.unregister_scheduler_plugin(scheduler_plugin.name)

    def close(self) -> None:
        """Leave the cluster; a local one is stopped."""
        self._opened.close()

    def _wait(self) -> None:
        """Wait until there are workers that can run the model."""
        timer = MissingWorkerTimer(self._wait_s)
        while missing := self.workers().missing:
            timer.check(missing)
            STOP.wait(min(WORKERS_POLLED_S, max(POLL_S, self._wait_s / 10)))
            STOP.check()

    def _result(self, future: Future[Any]) -> Any:
        """Return the result of a future, unless its workers disappear or the process is told to stop."""
        timer, polled = MissingWorkerTimer(self._wait_s), time.monotonic()
        while not future.done():
            STOP.wait(POLL_S)
            STOP.check()
            if time.monotonic() - polled > WORKERS_POLLED_S:
                timer.check(self.workers().missing)
                polled = time.monotonic()
        return future.result()


def _has_pages(dask_scheduler: Any) -> bool:
    """Return whether a scheduler shows pages to browsers; all have an HTTP server, with --no-dashboard too."""
    return bool(getattr(getattr(dask_scheduler, "http_application", None), "applications", ()))


def _examine(device: str, torch_threads: int | None, *model: Any) -> ModelFacts:
    """Examine the model on a worker, where it stays for the run, with as many threads; the facts are small."""
    worker = get_worker()
    use_threads(torch_threads or worker.state.nthreads)
    try:
        check_device(device, worker.address)
        explainer = examine_for_run(*model)
        EXAMINED.keep(explainer, device)
        return explainer.facts
    except DeviceError:
        threading.Timer(END_S, os._exit, (1,)).start()  # when the client knows why
        raise
