"""Reaching a scheduler that others have started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distributed import Client
from distributed.comm.addressing import resolve_address

from wsi_gradcam.errors import WorkerError, one_line

ANSWER_S = 10


def connect(where: Any, timeout_s: float) -> Client:
    """A client of the scheduler at an address, or of a cluster.

    Raises:
        WorkerError: no scheduler answers.
    """
    try:
        if isinstance(where, str):
            resolve_address(where)  # a client that is given nonsense may wait for ever
        return Client(where, set_as_default=False, timeout=timeout_s)
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        raise WorkerError(
            f"no Dask scheduler answers at {where}: {one_line(error)}; check the address, such as tcp://10.0.0.1:8786"
        ) from error


def ask_workers(
    scheduler: str, function: Callable[..., Any], *arguments: Any, timeout_s: float = ANSWER_S
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the scheduler knows of each worker, and what `function` returns there, by the worker's address.

    What it raises on a worker is among the answers, also that the worker does not have the function.

    Raises:
        WorkerError: no scheduler answers.
    """
    with connect(scheduler, timeout_s) as client:
        workers = dict(client.scheduler_info(n_workers=-1)["workers"])
        return workers, client.run(function, *arguments, workers=list(workers), on_error="return")
