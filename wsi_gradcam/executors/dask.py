"""Many processes through Dask: on this machine, or on a cluster that a scheduler address names.

Futures, not collections: a task is a slide and a few numbers, a window of them is in flight, workers keep the model
between tasks and write their own results. Several slides are in flight, so that no worker waits at a slide's end.
The only module that imports distributed.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dask
from distributed import Client, Future, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker
from distributed.scheduler import KilledWorker, NoValidWorkerError

from wsi_gradcam.errors import WorkerError
from wsi_gradcam.inputs import SlideEntry
from wsi_gradcam.stages import Context, Task, examine_model, perform
from wsi_gradcam.workflow import Observer, SlideJob, SlideRecord, slide_job

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.plan import RunPlan

NO_WORKER_S = 60
TASKS_PER_THREAD = 3  # in flight: one running, one waiting, one arriving
SLIDES_AHEAD = 2  # begun beyond the number of threads


class RunPlugin(WorkerPlugin):
    """Gives every worker, also those that join later, the run's context."""

    def __init__(self, name: str, run: RunPlan, overwrite: bool, torch_threads: int | None) -> None:
        self.name = name
        self._make = (run, overwrite)
        self._torch_threads = torch_threads
        self.context: Context | None = None

    def setup(self, worker: Worker) -> None:
        """Called on the worker."""
        _use_threads(self._torch_threads or worker.state.nthreads)
        self.context = Context(*self._make)

    def teardown(self, worker: Worker) -> None:
        """Called on the worker at the end of the run."""
        if self.context is not None:
            self.context.close()


@dataclass
class _Running:
    """A slide's job and the phase it is in."""

    job: SlideJob
    number: int
    waiting: deque[tuple[int, Task]] = field(default_factory=deque)
    results: list[Any] = field(default_factory=list)
    in_flight: int = 0
    error: BaseException | None = None
    phase: int = 0


class DaskExecutor:
    """Runs jobs on Dask workers."""

    def __init__(self, workers: int | None = None, scheduler: str | None = None, torch_threads: int | None = None):
        self._cluster = None if scheduler else _local_cluster(workers or 1)
        self._torch_threads = torch_threads
        if self._cluster is not None and torch_threads is None:
            self._torch_threads = max(1, (os.cpu_count() or 1) // (workers or 1))
        try:
            self._client = Client(scheduler or self._cluster, set_as_default=False, timeout=NO_WORKER_S)
        except (OSError, TimeoutError) as error:
            raise WorkerError(f"no Dask scheduler answers at {scheduler}: {error}; check the address") from error
        try:
            self._client.wait_for_workers(1, timeout=NO_WORKER_S)
        except TimeoutError as error:
            self.close()
            raise WorkerError(
                f"no Dask worker joined {scheduler or 'the local cluster'} within {NO_WORKER_S} s; start some with "
                "'dask worker ADDRESS'"
            ) from error

    @property
    def dashboard(self) -> str:
        """Address of Dask's own page."""
        return str(self._client.dashboard_link)

    def examine(self, *model: Any) -> ModelFacts:
        """`stages.examine_model`, on a worker: this process never loads torch."""
        facts: ModelFacts = self._client.submit(examine_model, *model, pure=False).result()
        return facts

    def run(
        self, run: RunPlan, slides: Iterable[SlideEntry], overwrite: bool, observe: Observer
    ) -> Iterator[SlideRecord]:
        """The record of each slide as it is finished, in the order in which they finish.

        Raises:
            FatalError: the run cannot go on.
        """
        name = f"wsi-gradcam-{uuid.uuid4().hex[:8]}"
        self._client.register_plugin(RunPlugin(name, run, overwrite, self._torch_threads))
        try:
            yield from _Flow(self._client, name, run.settings.max_unreadable, observe).run(slides)
        finally:
            self._client.unregister_worker_plugin(name)

    def close(self) -> None:
        """Leave the cluster; the local one is stopped."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


class _Flow:
    """Keeps a window of tasks in flight, the oldest slides first."""

    def __init__(self, client: Client, name: str, max_unreadable: float, observe: Observer) -> None:
        self._client, self._name = client, name
        self._max_unreadable, self._observe = max_unreadable, observe
        self._active: list[_Running] = []
        self._futures: dict[Future[Any], tuple[_Running, int, Task]] = {}
        self._finished: deque[SlideRecord] = deque()

    def run(self, slides: Iterable[SlideEntry]) -> Iterator[SlideRecord]:
        """Records as slides finish."""
        left = enumerate(slides)
        completed = as_completed(loop=self._client.loop)
        try:
            while True:
                self._fill(left, completed)
                yield from self._drain()
                if not self._futures:
                    if not self._active:
                        return
                    continue
                self._take(next(completed))
                yield from self._drain()
        finally:
            if self._futures:
                self._client.cancel(list(self._futures))

    def _fill(self, left: Iterator[tuple[int, SlideEntry]], completed: Any) -> None:
        threads = max(1, sum(self._client.nthreads().values()))
        while len(self._futures) < threads * TASKS_PER_THREAD:
            running = next((r for r in self._active if r.waiting), None)
            if running is None:
                entry = next(left, None) if len(self._active) < threads + SLIDES_AHEAD else None
                if entry is None:
                    return
                number, slide = entry
                running = _Running(slide_job(slide, self._max_unreadable), number)
                self._active.append(running)
                self._advance(running, first=True)
                continue
            self._submit(running, completed)

    def _submit(self, running: _Running, completed: Any) -> None:
        position, task = running.waiting.popleft()
        key = f"{self._name}-{task.stage}-{running.number}-{running.phase}-{position}"
        # A slide that began first is finished first, so that results come out steadily.
        future = self._client.submit(_perform_here, self._name, task, key=key, pure=False, priority=-running.number)
        self._futures[future] = running, position, task
        running.in_flight += 1
        completed.add(future)

    def _take(self, future: Future[Any]) -> None:
        running, position, task = self._futures.pop(future)
        running.in_flight -= 1
        error = future.exception()
        if error is None:
            running.results[position] = future.result()
            self._observe(task, running.results[position])
        elif running.error is None:
            running.error = _explained(error, task)
            running.waiting.clear()
        if not running.waiting and not running.in_flight:
            self._advance(running)

    def _advance(self, running: _Running, first: bool = False) -> None:
        """Into the next phase that has tasks, or to the end of the job."""
        results: list[Any] | None = None if first else running.results
        try:
            while True:
                if running.error is not None:
                    error, running.error = running.error, None
                    tasks = running.job.throw(error)
                else:
                    tasks = next(running.job) if results is None else running.job.send(results)
                if tasks:
                    break
                results = []
        except StopIteration as end:
            self._active.remove(running)
            self._finished.append(end.value)
            return
        running.phase += 1
        running.results = [None] * len(tasks)
        running.waiting = deque(enumerate(tasks))

    def _drain(self) -> Iterator[SlideRecord]:
        while self._finished:
            yield self._finished.popleft()


def _perform_here(name: str, task: Task) -> Any:
    """On a worker: perform a task with the context that the plugin made."""
    plugin = get_worker().plugins[name]
    assert isinstance(plugin, RunPlugin)
    assert plugin.context is not None  # setup comes before any task
    return perform(plugin.context, task)


def _explained(error: BaseException, task: Task) -> BaseException:
    if isinstance(error, KilledWorker):
        where = " ".join([task.stage, *map(str, task.index)])
        return RuntimeError(
            f"{task.slide.path}: workers died repeatedly on '{where}', mostly for lack of memory; give workers more "
            "memory, or lower --batch-size"
        )
    if isinstance(error, NoValidWorkerError):
        return WorkerError(f"no worker can run the task: {error}")
    return error


def _use_threads(count: int) -> None:
    """Set the threads of numerical libraries before torch is loaded; and of torch, where it is already."""
    import sys

    os.environ["OMP_NUM_THREADS"] = str(count)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(count)


def _local_cluster(workers: int) -> LocalCluster:
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with dask.config.set({"distributed.scheduler.no-workers-timeout": NO_WORKER_S}):
        return LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1",
            dashboard_address="127.0.0.1:0", silence_logs=logging.ERROR,
        )  # fmt: skip
