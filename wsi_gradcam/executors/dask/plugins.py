"""A run's plugins in the workers and in the scheduler, and how a worker performs batches of tasks."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NoReturn

from distributed import Scheduler, SchedulerPlugin, Worker, WorkerPlugin, get_worker
from distributed.http.scheduler.api import CheckIdleHandler

from wsi_gradcam.errors import DeviceError, WorkerError, device_errors, one_line
from wsi_gradcam.run.context import Context, perform
from wsi_gradcam.run.failures import may_succeed_soon
from wsi_gradcam.run.types import Performed, Task, Workload
from wsi_gradcam.system.processes import release_freed_memory

if TYPE_CHECKING:
    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.cam.facts import ModelFacts
    from wsi_gradcam.run.examining import Blind
    from wsi_gradcam.run.plan import RunPlan

# What a scheduler's HTTP server answers if its configuration names this module (pipelines/kubernetes.py): whether there
# is work, so that Dask's operator ends an idle cluster. Dask's full API would let anybody retire workers.
routes: list[tuple[str, Any, dict[str, Any]]] = [("/api/v1/check_idle", CheckIdleHandler, {})]
REPORT_S = 0.1  # for a few bytes to the scheduler, before the process may end


@dataclass(frozen=True)
class TaskBatch:
    """Tasks of a slide that a worker performs one after another: all that is sent to it.

    Attributes:
        run: name of the run's plugin.
        alone: whether nothing else of the run may be active in that process meanwhile.
    """

    run: str
    tasks: tuple[Task, ...]
    alone: bool = False


@dataclass
class BatchResult:
    """The result of a batch.

    Attributes:
        worker: address of the worker that performed it.
        results: those of the first tasks, as many as succeeded.
        error: that of the next task; None if none failed.
        may_succeed: whether that task may succeed a moment later, or on another worker.
    """

    worker: str
    results: list[Performed] = field(default_factory=list)
    error: BaseException | None = None
    may_succeed: bool = False


class RunWorkerPlugin(WorkerPlugin):
    """A plugin that gives every worker, including later ones, the run's context."""

    def __init__(self, name: str, workload: Workload, torch_threads: int | None) -> None:
        self.name = name
        self._workload = workload
        self._torch_threads = torch_threads
        self.stopped = False
        self.context: Context[Any] | None = None
        self.lock: SharedLock | None = None

    def setup(self, worker: Worker) -> None:
        """Called on the worker."""
        use_threads(self._torch_threads or worker.state.nthreads)
        self.context, self.lock = Context(self._workload, EXAMINED.take(self._workload.run)), SharedLock()

    def teardown(self, worker: Worker) -> None:
        """Called on the worker at the end of the run; running tasks keep the context until they end."""
        self.stopped = True
        if self.context is not None:
            self.context.close()
        self.context = None
        release_freed_memory()


class ExaminedModel:
    """The model that this process last examined, so that a run with it need not load and compile it again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[str, Explainer | Blind] | None = None

    def keep(self, explainer: Explainer | Blind, device: str) -> None:
        """Keep an explainer for the run for which it was examined, which begins soon; an earlier one is forgotten."""
        with self._lock:
            self._kept = device, explainer

    def take(self, run: RunPlan) -> Explainer | Blind | None:
        """Return the kept explainer, if it is the run's, and forget it."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None or kept[0] != run.settings.device or _loaded(kept[1].facts) != _loaded(run.facts):
            return None
        return kept[1]


def _loaded(facts: ModelFacts) -> tuple[object, ...]:
    """Return everything in which two explainers may differ: the weights, their digest, and what is made of them."""
    return facts.digest, facts.layers, facts.traced, facts.batch_size, facts.choice.engine, facts.choice.precision


EXAMINED = ExaminedModel()


class SharedLock:
    """A lock that many tasks of a process can hold together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0
        self._taken = False

    @contextmanager
    def held(self, alone: bool) -> Iterator[None]:
        """Hold the lock as a context: wait until none holds it alone or, to hold it `alone`, until none holds it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken)
            if alone:
                self._taken = True
                self._changed.wait_for(lambda: not self._working)
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                if alone:
                    self._taken = False
                self._changed.notify_all()


def perform_batch(batch: TaskBatch) -> BatchResult:
    """Perform tasks on a worker, with the plugin's context, until one fails or the run is stopped."""
    worker = get_worker()
    plugin, result = worker.plugins.get(batch.run), BatchResult(worker.address)
    if not isinstance(plugin, RunWorkerPlugin) or plugin.context is None or plugin.lock is None:
        result.error = WorkerError("the worker has lost the run, for example after a lost connection")
        return result
    context = plugin.context
    with plugin.lock.held(batch.alone):
        if batch.alone:
            _report_begun(worker, batch.run)
        for task, upcoming in zip_longest(batch.tasks, batch.tasks[1:]):
            if plugin.stopped:
                break
            try:
                if task.stage.needs_model:
                    check_device(context.run.settings.device, worker.address)
                result.results.append(perform(context, task, upcoming))
            except DeviceError as error:
                _end_process(worker, batch.run, error)
            except Exception as error:
                # Another node may see a file that this one does not.
                result.error = portable(error)
                result.may_succeed = may_succeed_soon(error) or isinstance(error, FileNotFoundError)
                break
    return result


def _report_begun(worker: Worker, run: str) -> None:
    """Tell the client that, from now on, only this batch can end the process."""
    worker.log_event(run, {"alone": str(worker.get_current_task())})
    time.sleep(REPORT_S)


def _end_process(worker: Worker, run: str, error: DeviceError) -> NoReturn:
    """End a process that can no longer use its GPU, with all its work, and tell the client why.

    Its nanny starts another one, and Dask gives its tasks to others, as when it dies on its own.
    """
    cause = one_line(error if error.__cause__ is None else error.__cause__)
    worker.log_event(run, {"lost": str(worker.get_current_task()), "worker": worker.address, "cause": cause})
    time.sleep(REPORT_S)
    os._exit(1)  # nothing can be closed: libraries would wait for the GPU


def portable(error: Exception) -> Exception:
    """Return the error, or one with the same message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(error))
    return error


def check_device(device: str, address: str) -> None:
    """Make sure that the model can run on a worker, before a slide is blamed.

    Raises:
        DeviceError: it has failed since the process began.
        WorkerError: the device cannot be used there.
    """
    if device == "cpu":
        return
    import torch

    try:
        with device_errors():
            torch.empty(0, device=device)
    except DeviceError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise WorkerError(
            f"worker {address} declares a GPU, but --device {device} cannot be used there ({one_line(error)}); start "
            "it where there is a GPU and a torch that supports it, or without --resources GPU=1"
        ) from error


def use_threads(count: int) -> None:
    """Set the threads of numerical libraries before torch is loaded, and of torch if it is already loaded."""
    import sys

    # Dask gives workers 1 of each; torch takes MKL's number for its own.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        import torch  # which waits for a thread that is loading it

        torch.set_num_threads(count)


def stop_here(name: str, dask_worker: Worker) -> None:
    """Make a worker begin no further tasks of a run."""
    plugin = dask_worker.plugins.get(name)
    if isinstance(plugin, RunWorkerPlugin):
        plugin.stopped = True


class RunSchedulerPlugin(SchedulerPlugin):
    """Looks after a run in the scheduler: hints are only hints, and a client that is gone leaves nothing behind.

    A batch that asks for a worker (`workers=[address]`) goes there if it can, and is then as free as any other. Dask
    itself would keep it from all other workers for ever: a batch sent to a worker that is gone would wait, and idle
    workers could not take over any. Its `allow_other_workers` is no help: it drops resource requirements too, so that
    work for a GPU goes where there is none; and a batch that finds no worker at all is not given to one that comes
    later. When the run's client is gone, for whatever reason, its plugin is removed from all workers, and this one too.
    """

    def __init__(self, run: str, client: str) -> None:
        self.name = f"{run}-scheduler-plugin"
        self._run, self._client = run, client
        self._scheduler: Any = None

    async def start(self, scheduler: Scheduler) -> None:
        """Called on the scheduler when the plugin is registered."""
        self._scheduler = scheduler

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Called on the scheduler for each task that was placed, or could not be."""
        if finish not in ("processing", "no-worker") or not isinstance(key, str) or self._run not in key:
            return
        task = self._scheduler.tasks[key]
        if task.worker_restrictions:
            task.worker_restrictions = None
            if finish == "no-worker":
                self._scheduler.loop.add_callback(self._place, key)

    def _place(self, key: str) -> None:
        """Let Dask look for a worker again; if there is none, it does so when one comes."""
        task = self._scheduler.tasks.get(key)
        if task is not None and task.state == "no-worker":
            self._scheduler.transitions({key: "processing"}, stimulus_id=self.name)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Called on the scheduler when a client leaves, or its connection ends."""
        if client == self._client:
            scheduler.loop.add_callback(self._clean_up, scheduler)

    async def _clean_up(self, scheduler: Scheduler) -> None:
        with suppress(ValueError):  # removed already
            await scheduler.unregister_worker_plugin(comm=None, name=self._run)
        with suppress(ValueError):
            scheduler.remove_plugin(self.name)
