"""What a worker keeps of a run between its tasks, and how it performs them."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from wsi_gradcam.errors import WorkerError, one_line
from wsi_gradcam.executors.dask.failures import may_pass
from wsi_gradcam.run.context import Context, perform
from wsi_gradcam.run.types import Performed, Task, Workload
from wsi_gradcam.system.processes import release_freed_memory

TELLING_S = 0.1  # for a few bytes to the scheduler, before what may be the end


@dataclass(frozen=True)
class Order:
    """Some tasks of a slide, for one worker, one after the other: all that travels to it.

    Attributes:
        run: name of the run's plugin.
        alone: nothing else of the run may be at work in that process meanwhile.
    """

    run: str
    tasks: tuple[Task, ...]
    alone: bool = False


@dataclass
class Answer:
    """What came of an order.

    Attributes:
        worker: address of who did it.
        results: what came of the first tasks, as many as succeeded.
        error: what the next one ended with; None where nothing went wrong.
        may_pass: whether that may succeed a moment later, or elsewhere.
    """

    worker: str
    results: list[Performed] = field(default_factory=list)
    error: BaseException | None = None
    may_pass: bool = False


class RunPlugin(WorkerPlugin):
    """Gives every worker, also those that join later, the run's context."""

    def __init__(self, name: str, workload: Workload, torch_threads: int | None) -> None:
        self.name = name
        self._workload = workload
        self._torch_threads = torch_threads
        self.stopped = False
        self.context: Context[Any] | None = None
        self.floor: Floor | None = None

    def setup(self, worker: Worker) -> None:
        """Called on the worker."""
        use_threads(self._torch_threads or worker.state.nthreads)
        self.context, self.floor = Context(self._workload), Floor()

    def teardown(self, worker: Worker) -> None:
        """Called on the worker at the end of the run; what tasks are at work keep the context until they end."""
        self.stopped = True
        if self.context is not None:
            self.context.close()
        self.context = None
        release_freed_memory()


class Floor:
    """Where tasks of a run work side by side in a process, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0
        self._taken = False

    @contextmanager
    def entered(self, alone: bool) -> Iterator[None]:
        """Work while this lasts; wait until whoever is alone has left, and to be alone, until all have."""
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


def perform_order(order: Order) -> Answer:
    """On a worker: perform tasks with the context that the plugin made, until one fails or the run is stopped."""
    worker = get_worker()
    plugin, answer = worker.plugins.get(order.run), Answer(worker.address)
    if not isinstance(plugin, RunPlugin) or plugin.context is None or plugin.floor is None:
        answer.error = WorkerError("the worker has forgotten the run, as after a lost connection")
        return answer
    context = plugin.context
    with plugin.floor.entered(order.alone):
        if order.alone:
            _tell_begun(worker, order.run)
        for task, upcoming in zip_longest(order.tasks, order.tasks[1:]):
            if plugin.stopped:
                break
            try:
                if task.stage.needs_model:
                    check_device(context.run.settings.device, worker.address)
                answer.results.append(perform(context, task, upcoming))
            except Exception as error:
                answer.error, answer.may_pass = portable(error), may_pass(error)
                break
    return answer


def _tell_begun(worker: Worker, run: str) -> None:
    """Have the client know that from now on only this order can be what kills the process."""
    worker.log_event(run, {"alone": str(worker.get_current_task())})
    time.sleep(TELLING_S)


def portable(error: Exception) -> Exception:
    """The error, or one that says the same, where it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(error))
    return error


def check_device(device: str, address: str) -> None:
    """Make sure that the model can run on a worker, before a slide is blamed.

    Raises:
        WorkerError: the device cannot be used there.
    """
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WorkerError(
            f"worker {address} declares a GPU, but --device {device} cannot be used there ({one_line(error)}); start "
            "it where a GPU and a torch that knows it are, or without --resources GPU=1"
        ) from error


def use_threads(count: int) -> None:
    """Set the threads of numerical libraries before torch is loaded; and of torch, where it is already."""
    import sys

    # Dask gives workers 1 of each; torch takes MKL's number for its own.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(count)


def stop_here(name: str, dask_worker: Worker) -> None:
    """On a worker: begin no further task of a run."""
    plugin = dask_worker.plugins.get(name)
    if isinstance(plugin, RunPlugin):
        plugin.stopped = True
