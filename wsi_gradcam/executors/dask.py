"""Many processes through Dask: on this machine, or on a cluster that a scheduler address names.

Futures, not collections: a task is a slide and a few numbers, a window of them is in flight, workers keep the model
between tasks and write their own results. Several slides are in flight, so that no worker waits at a slide's end.
The only module that imports distributed.
"""

from __future__ import annotations

import logging
import os
import queue
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, Worker, WorkerPlugin, get_worker
from distributed.client import ClosedClientError
from distributed.comm.addressing import resolve_address
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker, NoValidWorkerError

from wsi_gradcam.errors import SlideMemoryError, WorkerError, one_line
from wsi_gradcam.inputs import SlideEntry
from wsi_gradcam.stages import Context, Performed, Task, examine_model, perform
from wsi_gradcam.workflow import FatalError, Observer, SlideJob, SlideRecord, slide_job

if TYPE_CHECKING:
    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.plan import RunPlan

NO_WORKER_S = 60
ANSWER_S = 10
THREADS = 2  # of a local worker: one has patches read while the model works for the other
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


@dataclass(frozen=True)
class _Sent:
    """A task of a slide's phase, on its way."""

    running: _Running
    position: int
    task: Task
    alone: bool = False


def _examine(*model: Any) -> ModelFacts:
    """On a worker: what it learns is small, the model stays there."""
    return examine_model(*model).facts


class DaskExecutor:
    """Runs jobs on Dask workers."""

    def __init__(self, workers: int | None = None, scheduler: str | None = None, torch_threads: int | None = None):
        self._torch_threads = torch_threads
        if scheduler is None and torch_threads is None:
            self._torch_threads = max(1, CPU_COUNT // (workers or 1))
        with ExitStack() as opened:
            where = opened.enter_context(_local_cluster(workers or 1)) if scheduler is None else _address(scheduler)
            try:
                self._client = opened.enter_context(Client(where, set_as_default=False, timeout=NO_WORKER_S))
            except (OSError, ValueError) as error:  # a TimeoutError is an OSError
                raise _silent(scheduler, error) from error
            try:
                self._client.wait_for_workers(1, timeout=NO_WORKER_S)
            except TimeoutError as error:
                raise WorkerError(
                    f"no Dask worker joined {scheduler or 'the local cluster'} within {NO_WORKER_S} s; start some with "
                    "'dask worker ADDRESS'"
                ) from error
            self._opened = opened.pop_all()

    @property
    def dashboard(self) -> str:
        """Address of Dask's own page."""
        return str(self._client.dashboard_link)

    def examine(self, *model: Any) -> ModelFacts:
        """`stages.examine_model`, on a worker: this process never loads torch."""
        try:
            facts: ModelFacts = self._client.submit(_examine, *model, pure=False).result()
        except KilledWorker as error:
            raise WorkerError("workers died while they loaded the model; give them more memory") from error
        except (NoValidWorkerError, CancelledError) as error:
            raise WorkerError("the workers are gone; start some and run the same command again") from error
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
            if self._client.status == "running":
                with suppress(Exception):  # after Ctrl-C the cluster may be half gone: what matters is on disk
                    self._client.unregister_worker_plugin(name)

    def close(self) -> None:
        """Leave the cluster; the local one is stopped."""
        self._opened.close()


class _Flow:
    """Keeps a window of tasks in flight, the oldest slides first.

    Dask blames all tasks of a worker that dies. A task so blamed too often runs once more, alone: if that kills
    workers too, it is the culprit, and its slide has failed.
    """

    def __init__(self, client: Client, name: str, max_unreadable: float, observe: Observer) -> None:
        self._client, self._name = client, name
        self._max_unreadable, self._observe = max_unreadable, observe
        self._active: list[_Running] = []
        self._futures: dict[Future[Any], _Sent] = {}
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._suspects: deque[_Sent] = deque()
        self._finished: deque[SlideRecord] = deque()

    def run(self, slides: Iterable[SlideEntry]) -> Iterator[SlideRecord]:
        """Records as slides finish."""
        left = enumerate(slides)
        try:
            while True:
                self._fill(left)
                yield from self._drain()
                if self._futures:
                    self._take(self._next())
                    yield from self._drain()
                elif not self._active:
                    return
        except (CancelledError, CommClosedError, ClosedClientError) as error:
            raise _lost("the connection to the Dask scheduler is lost; start it anew") from error
        finally:
            if self._futures and self._client.status == "running":
                self._client.cancel(list(self._futures))

    def _fill(self, left: Iterator[tuple[int, SlideEntry]]) -> None:
        if self._suspects:
            if not self._futures:
                self._submit(replace(self._suspects.popleft(), alone=True))
            return  # whatever the suspect does, nothing else is on its worker
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
            self._submit(_Sent(running, *running.waiting.popleft()))
            running.in_flight += 1

    def _next(self) -> Future[Any]:
        """The next future that is done, or lost."""
        while True:
            try:
                return self._done.get(timeout=NO_WORKER_S)
            except queue.Empty:
                if self._client.status != "running" or not self._client.nthreads():
                    raise _lost(f"no worker is left and none has come for {NO_WORKER_S} s; start some") from None
                if not any(state == "running" for state in self._worker_states()):
                    raise _lost("all workers are paused for lack of memory; give them more, or start fewer") from None

    def _worker_states(self) -> list[str]:
        """What each worker says of itself: running, paused, closing."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        return [str(worker.get("status", "")) for worker in workers.values()]

    def _submit(self, sent: _Sent) -> None:
        running, task = sent.running, sent.task
        key = f"{self._name}-{task.stage}-{running.number}-{running.phase}-{sent.position}{'-alone' * sent.alone}"
        # A slide that began first is finished first, so that results come out steadily.
        future = self._client.submit(_perform_here, self._name, task, key=key, pure=False, priority=-running.number)
        self._futures[future] = sent
        future.add_done_callback(self._done.put)

    def _take(self, future: Future[Any]) -> None:
        sent = self._futures.pop(future)
        running, task = sent.running, sent.task
        error = future.exception()
        if isinstance(error, KilledWorker) and not sent.alone and running.error is None:
            self._suspects.append(sent)
            self._observe(task, _failed(error, again=True))
            return
        running.in_flight -= 1
        if error is None:
            performed = future.result()
            running.results[sent.position] = performed.result
            self._observe(task, performed)
        elif running.error is None:
            running.error = _explained(error, task)
            self._observe(task, _failed(error))
            running.waiting.clear()
            innocent = [other for other in self._suspects if other.running is not running]
            running.in_flight -= len(self._suspects) - len(innocent)
            self._suspects = deque(innocent)
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


def ask_workers(
    scheduler: str, function: Callable[..., Any], *arguments: Any, timeout_s: float = ANSWER_S
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the scheduler knows of each worker, and what `function` returns there, by the worker's address.

    What it raises on a worker is among the answers, also that the worker does not have the function.

    Raises:
        WorkerError: no scheduler answers.
    """
    try:
        client = Client(_address(scheduler), set_as_default=False, timeout=timeout_s)
    except (OSError, ValueError) as error:
        raise _silent(scheduler, error) from error
    with client:
        workers = dict(client.scheduler_info(n_workers=-1)["workers"])
        return workers, client.run(function, *arguments, workers=list(workers), on_error="return")


def _perform_here(name: str, task: Task) -> Performed:
    """On a worker: perform a task with the context that the plugin made."""
    plugin = get_worker().plugins[name]
    assert isinstance(plugin, RunPlugin)
    assert plugin.context is not None  # setup comes before any task
    return perform(plugin.context, task)


def _failed(error: BaseException, again: bool = False) -> Performed:
    if isinstance(error, KilledWorker):
        return Performed(None, error="the worker that had it in hand died", again=again)
    return Performed(None, error=one_line(error), again=again)


def _lost(what: str) -> FatalError:
    return FatalError(WorkerError(f"{what} and run the same command again, nothing finished is lost"))


def _explained(error: BaseException, task: Task) -> BaseException:
    if isinstance(error, KilledWorker):
        where = " ".join([task.stage, *map(str, task.index)])
        return SlideMemoryError(
            f"{task.slide.path}: workers died repeatedly on '{where}' alone, mostly for lack of memory; give workers "
            "more memory, or lower --batch-size"
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


def _address(scheduler: str) -> str:
    try:
        resolve_address(scheduler)  # a client that is given nonsense may wait for ever
    except (OSError, ValueError) as error:
        raise _silent(scheduler, error) from error
    return scheduler


def _silent(scheduler: str | None, error: Exception) -> WorkerError:
    return WorkerError(
        f"no Dask scheduler answers at {scheduler}: {one_line(error)}; check the address, such as tcp://10.0.0.1:8786"
    )


@contextmanager
def _local_cluster(workers: int) -> Iterator[LocalCluster]:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what fails is reported with its slide
    patience = {
        "distributed.scheduler.no-workers-timeout": NO_WORKER_S,
        "distributed.scheduler.allowed-failures": 1,  # a suspect gets another chance, alone
        # A worker that dies again while it starts anew is not lost: after 15 s it would be given up for good.
        "distributed.deploy.lost-worker-timeout": "1 day",
    }
    with dask.config.set(patience), LocalCluster(
        n_workers=workers, threads_per_worker=THREADS, processes=True, host="127.0.0.1",
        dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL,
        # No limit: torch never gives memory back, so a worker that Dask pauses would wait for ever.
        memory_limit=0,
    ) as cluster:  # fmt: skip
        yield cluster
