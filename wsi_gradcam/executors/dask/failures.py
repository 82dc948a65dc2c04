"""What is made of tasks that fail on Dask."""

from __future__ import annotations

from distributed.scheduler import KilledWorker, NoValidWorkerError

from wsi_gradcam.errors import SlideMemoryError, WorkerError, one_line
from wsi_gradcam.executors.dask.workers import AGAIN
from wsi_gradcam.run.failures import is_transient
from wsi_gradcam.run.types import FatalError, Performed, Task


def may_pass(error: BaseException) -> bool:
    """Whether the same work may succeed a moment later, or elsewhere: another node may see a file that one does not."""
    return is_transient(error) or isinstance(error, FileNotFoundError)


def lost(what: str) -> FatalError:
    """The run cannot go on, through no fault of its own."""
    return FatalError(WorkerError(f"{what} and {AGAIN}"))


def failed(error: BaseException, worker: str = "", again: bool = False) -> Performed:
    """What the observer is told of an attempt that failed."""
    text = "the worker that had it in hand died" if isinstance(error, KilledWorker) else one_line(error)
    return Performed(None, worker=worker, error=text, again=again)


def explained(error: BaseException, task: Task) -> BaseException:
    """The error of a task, in words that help."""
    if isinstance(error, KilledWorker):
        return SlideMemoryError(
            f"{task.slide.path}: workers died repeatedly on '{task}' alone, mostly for lack of memory; give workers "
            "more memory, or lower --batch-size"
        )
    if isinstance(error, NoValidWorkerError):
        return WorkerError(f"no worker can run the task: {error}")
    if isinstance(error, MemoryError):
        return SlideMemoryError(
            f"{task.slide.path}: not enough memory on a worker; give it more, or lower --batch-size"
        )
    return error
