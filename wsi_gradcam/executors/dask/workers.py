"""The workers of a scheduler: connecting to it, what each of them can run, and waiting for those that are missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from distributed import Client, Security
from distributed.comm.addressing import resolve_address
from distributed.comm.core import CommClosedError

from wsi_gradcam.errors import AGAIN, WorkerError, one_line

LOG = logging.getLogger("wsi_gradcam")
T = TypeVar("T")

WAIT_S = 50.0  # with the time to connect an error comes within a minute
TOLD_S = 3.0  # before it is told that workers are missing: a moment is not worth a word
GPU, CPU = "GPU", "CPU"  # names of the resources that workers declare
# So many batches share a GPU: while the patches of one are read, and the maps of others written, the model works for
# another, and the slides after it are open already.
GPU_SHARE = 0.25
ANSWER_S = 10  # of a scheduler that is asked for its workers
LOST = "the connection to the Dask scheduler is lost; start it anew"
CERTIFICATES = (
    "name the files in DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__TLS__CLIENT__CERT and ...__TLS__CLIENT__KEY, or in "
    "Dask's configuration (docs/clusters.md)"
)


@dataclass(frozen=True)
class Pools(Generic[T]):
    """A value for the workers that can run the model, and one for those that do the other work."""

    model: T
    other: T

    def of(self, needs_model: bool) -> T:
        """Return the value for tasks that need the model, or for the others."""
        return self.model if needs_model else self.other


@dataclass(frozen=True)
class Workers:
    """The workers that there are at a moment.

    Attributes:
        addresses: of all.
        needs: resources that a batch asks for.
        able: how many batches each worker that has those runs at once, by its address.
        slots: how many batches can run at once on all workers together.
        missing: what is missing, and how to mend it; empty where nothing is.
    """

    addresses: tuple[str, ...]
    needs: Pools[dict[str, float]]
    able: Pools[dict[str, int]]
    slots: Pools[int]
    missing: str

    @classmethod
    def of(cls, info: Mapping[str, Any], device: str, scheduler: str = "ADDRESS") -> Workers:
        """Return the workers in the scheduler's information on each; `device` is where the model runs."""
        declares_cpu = any(worker.get("resources", {}).get(CPU) for worker in info.values())
        model_needs: dict[str, float] = {} if device == "cpu" else {GPU: GPU_SHARE}
        other_needs: dict[str, float] = {CPU: 1} if declares_cpu else {}
        able = Pools(_able(info, model_needs), _able(info, other_needs))
        slots = Pools(sum(able.model.values()), sum(able.other.values()))
        missing = _missing_workers(info, bool(able.model), device, scheduler)
        return cls(tuple(info), Pools(model_needs, other_needs), able, slots, missing)


def _able(info: Mapping[str, Any], needs: Mapping[str, float]) -> dict[str, int]:
    """Return how many batches with these needs each worker runs at once; workers that run none are left out."""
    counts = {address: _slots(worker, needs) for address, worker in info.items()}
    return {address: count for address, count in counts.items() if count}


def _slots(worker: Mapping[str, Any], need: Mapping[str, float]) -> int:
    """Return how many batches with this need a worker runs at once."""
    resources = worker.get("resources", {})
    return int(min([worker["nthreads"], *(resources.get(name, 0) / amount for name, amount in need.items())]))


def _missing_workers(info: Mapping[str, Any], has_device: bool, device: str, scheduler: str) -> str:
    if not info:
        return "there is no worker; start some with " + (
            f"'dask worker {scheduler}'" if device == "cpu" else f"'dask worker {scheduler} --resources {GPU}=1'"
        )
    if not has_device:
        return (
            f"--device {device} needs workers that declare a GPU, and none of the {len(info)} there are does; start "
            f"some with 'dask worker {scheduler} --resources {GPU}=1' where GPUs are, or give --device cpu"
        )
    if all(worker.get("status", "running") == "paused" for worker in info.values()):
        return "all workers are paused for lack of memory; give them more, or start fewer on a machine"
    return ""


class MissingWorkerTimer:
    """Bounds the time for which workers may be missing, and logs when they have been for a moment."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._since: float | None = None
        self._told = False

    def check(self, missing: str) -> None:
        """Check the time, for what is missing now; "" where nothing is.

        Raises:
            WorkerError: something has been missing for too long.
        """
        now = time.monotonic()
        if not missing:
            self._since, self._told = None, False
            return
        self._since = now if self._since is None else self._since
        if not self._told and now - self._since >= min(TOLD_S, self._wait_s / 10):
            LOG.warning("waiting up to %g s: %s", self._wait_s, missing)
            self._told = True
        if now - self._since >= self._wait_s:
            raise WorkerError(f"waited {self._wait_s:g} s: {missing}; then {AGAIN}")


def workers_of(client: Client) -> dict[str, Any]:
    """Return what the scheduler itself says now of each worker, by address.

    `Client.scheduler_info` stores the answer where the client's own refresh, which leaves workers out, may write over
    it before it is read: of 62,689 calls 3 had no workers. And where none comes, it returns the last one.

    Raises:
        WorkerError: the scheduler does not answer.
    """
    try:
        if client.scheduler is None:
            raise CommClosedError(f"the client is {client.status}")
        return dict(client.sync(client.scheduler.identity, n_workers=-1)["workers"])
    except OSError as error:  # a CommClosedError is an OSError
        raise WorkerError(f"{LOST} and {AGAIN}") from error


def connect(where: Any, timeout_s: float) -> Client:
    """Return a client of the scheduler at an address, or of a cluster.

    Raises:
        WorkerError: no scheduler answers.
    """
    try:
        if isinstance(where, str):
            resolve_address(where)  # a client that is given nonsense may wait for ever
            _check_certificates(where)
        return Client(where, set_as_default=False, timeout=timeout_s)
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        raise WorkerError(
            f"no Dask scheduler answers at {where}: {one_line(error)}; check the address, such as tls://10.0.0.1:8786, "
            "and that this process has the certificates of its cluster (docs/clusters.md)"
        ) from error


def _check_certificates(address: str) -> None:
    """Check that there are certificates for an address that needs some; Dask itself would only miss a context.

    Raises:
        WorkerError: Dask's configuration names none, or files that cannot be read.
    """
    if not address.startswith("tls://"):
        return
    security = Security()
    try:
        complete = security.get_connection_args("client")["ssl_context"] is not None
    except OSError as error:  # an SSLError is an OSError
        raise WorkerError(f"{address}: the certificates cannot be used: {one_line(error)}; {CERTIFICATES}") from error
    if not complete:
        raise WorkerError(f"{address}: a scheduler with TLS wants a certificate, and none is set; {CERTIFICATES}")


def ask_workers(
    scheduler: str, function: Callable[..., Any], *arguments: Any, timeout_s: float = ANSWER_S
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the scheduler's information on each worker, and the result of `function` there, both by address.

    An exception on a worker is returned as its result, also that the worker does not have the function.

    Raises:
        WorkerError: no scheduler answers.
    """
    with connect(scheduler, timeout_s) as client:
        workers = workers_of(client)
        return workers, client.run(function, *arguments, workers=list(workers), on_error="return")
