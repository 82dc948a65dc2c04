"""What workers there are, which of them can do what, and how long to wait for those that are missing.

Reaching a scheduler that others have started.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distributed import Client
from distributed.comm.addressing import resolve_address

from wsi_gradcam.errors import WorkerError, one_line

LOG = logging.getLogger("wsi_gradcam")
WAIT_S = 50.0  # all told an error comes within a minute
GPU, CPU = "GPU", "CPU"  # names of the resources that workers declare
AGAIN = "run the same command again, nothing finished is lost"


@dataclass(frozen=True)
class Workers:
    """The workers of a moment, seen by a run.

    Attributes:
        addresses: of all.
        needs: resources that a piece of work asks for, where the model runs and elsewhere.
        able: how many pieces of work each worker that has those does at once.
        slots: how many pieces of work can run at once, where the model runs and elsewhere.
        lacking: what is missing, and how to mend it; empty where nothing is.
    """

    addresses: tuple[str, ...]
    needs: Mapping[bool, dict[str, float]]
    able: Mapping[bool, Mapping[str, int]]
    slots: Mapping[bool, int]
    lacking: str

    @classmethod
    def of(cls, told: Mapping[str, Any], device: str, scheduler: str = "ADDRESS") -> Workers:
        """From what the scheduler tells of each; `device` is where the model runs."""
        declares_cpu = any(worker.get("resources", {}).get(CPU) for worker in told.values())
        needs: dict[bool, dict[str, float]] = {
            True: {} if device == "cpu" else {GPU: 1},
            False: {CPU: 1} if declares_cpu else {},
        }
        able, slots = {}, {}
        for model, need in needs.items():
            counts = {address: _slots(worker, need) for address, worker in told.items()}
            able[model] = {address: count for address, count in counts.items() if count}
            slots[model] = sum(counts.values())
        return cls(tuple(told), needs, able, slots, _lacking(told, bool(able[True]), device, scheduler))


def _slots(worker: Mapping[str, Any], need: Mapping[str, float]) -> int:
    """How many pieces of work with this need a worker does at once."""
    resources = worker.get("resources", {})
    return int(min([worker["nthreads"], *(resources.get(name, 0) / amount for name, amount in need.items())]))


def _lacking(told: Mapping[str, Any], has_device: bool, device: str, scheduler: str) -> str:
    if not told:
        return "there is no worker; start some with " + (
            f"'dask worker {scheduler}'" if device == "cpu" else f"'dask worker {scheduler} --resources {GPU}=1'"
        )
    if not has_device:
        return (
            f"--device {device} needs workers that declare a GPU, and none of the {len(told)} there are does; start "
            f"some with 'dask worker {scheduler} --resources {GPU}=1' where GPUs are, or give --device cpu"
        )
    if all(worker.get("status", "running") == "paused" for worker in told.values()):
        return "all workers are paused for lack of memory; give them more, or start fewer on a machine"
    return ""


class Patience:
    """Waits so long for what is lacking, and says so when that begins."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._since: float | None = None

    def look(self, lacking: str) -> None:
        """Take note of what is lacking now, if anything is.

        Raises:
            WorkerError: something has been for too long.
        """
        if not lacking:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()
            LOG.warning("waiting up to %g s: %s", self._wait_s, lacking)
        if self._since is not None and time.monotonic() - self._since >= self._wait_s:
            raise WorkerError(f"waited {self._wait_s:g} s: {lacking}; then {AGAIN}")


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
