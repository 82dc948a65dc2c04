"""The workers of a scheduler, what each can run, and waiting for missing ones; and workers on this machine."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import dask
from dask.system import CPU_COUNT
from distributed import Client, Nanny, Scheduler, Security, SpecCluster, Worker
from distributed.comm.addressing import resolve_address
from distributed.comm.core import CommClosedError
from distributed.deploy.cluster import Cluster
from distributed.system import MEMORY_LIMIT

from wsi_gradcam.errors import AGAIN, WorkerError, one_line

LOG = logging.getLogger("wsi_gradcam")
T = TypeVar("T")

WAIT_S = 50.0  # including the time to connect, an error comes within a minute
TOLD_S = 3.0  # before missing workers are reported: a moment is not worth a message
GPU, CPU = "GPU", "CPU"  # names of the resources that workers declare
# This many batches share a GPU: while the patches of one are read, and the maps of others written, the model works for
# another, and the next slides are already open.
GPU_SHARE = 0.25
ANSWER_S = 10  # for a scheduler's answer about its workers
LOST = "the connection to the Dask scheduler is lost; restart it"
CERTIFICATES = (
    "give the files in DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__TLS__CLIENT__CERT and ...__TLS__CLIENT__KEY, or in "
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
    """The workers at one moment.

    Attributes:
        addresses: the addresses of all workers.
        needs: resources that a batch asks for.
        able: how many batches each worker with those resources runs at once, by its address.
        slots: how many batches can run at once on all workers together.
        missing: what is missing, and how to fix it; empty if nothing is.
    """

    addresses: tuple[str, ...]
    needs: Pools[dict[str, float]]
    able: Pools[dict[str, int]]
    slots: Pools[int]
    missing: str

    @classmethod
    def of(cls, info: Mapping[str, Any], device: str, scheduler: str = "ADDRESS") -> Workers:
        """Return the workers from the scheduler's information about each; `device` is where the model runs."""
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
    """Return how many batches with these needs a worker runs at once."""
    resources = worker.get("resources", {})
    return int(min([worker["nthreads"], *(resources.get(name, 0) / amount for name, amount in need.items())]))


def _missing_workers(info: Mapping[str, Any], has_device: bool, device: str, scheduler: str) -> str:
    if not info:
        return "there are no workers; start some with " + (
            f"'dask worker {scheduler}'" if device == "cpu" else f"'dask worker {scheduler} --resources {GPU}=1'"
        )
    if not has_device:
        return (
            f"--device {device} needs workers that declare a GPU, but none of the {len(info)} workers does; start some "
            f"with 'dask worker {scheduler} --resources {GPU}=1' where there are GPUs, or use --device cpu"
        )
    if all(worker.get("status", "running") == "paused" for worker in info.values()):
        return "all workers are paused for lack of memory; give them more, or start fewer per machine"
    return ""


class MissingWorkerTimer:
    """A timer that limits how long workers may be missing, and logs that they are after a moment."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._since: float | None = None
        self._told = False

    def check(self, missing: str) -> None:
        """Check the time, given what is missing now; "" if nothing is.

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
    """Return the scheduler's present information on each worker, by address.

    `Client.scheduler_info` stores the answer where the client's own refresh, which leaves out workers, may overwrite it
    before it is read: 3 of 62,689 calls had no workers. And if no answer comes, it returns the last one.

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
    """Return a client for the scheduler at an address, or for a cluster.

    Raises:
        WorkerError: no scheduler answers.
    """
    try:
        if isinstance(where, str):
            resolve_address(where)  # a client that is given an invalid address may wait for ever
            _check_certificates(where)
        return Client(where, set_as_default=False, timeout=timeout_s)
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        raise WorkerError(
            f"no Dask scheduler answers at {where}: {one_line(error)}; check the address, such as tls://10.0.0.1:8786, "
            "and that this process has the cluster's certificates (docs/clusters.md)"
        ) from error


def _check_certificates(address: str) -> None:
    """Check that there are certificates for an address that needs them; Dask would only report a missing context.

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
        raise WorkerError(f"{address}: a scheduler with TLS requires a certificate, and none is set; {CERTIFICATES}")


def ask_workers(
    scheduler: str, function: Callable[..., Any], *arguments: Any, timeout_s: float = ANSWER_S
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the scheduler's information about each worker, and the result of `function` there, both by address.

    An exception on a worker is returned as its result, even if the worker does not have the function.

    Raises:
        WorkerError: no scheduler answers.
    """
    with connect(scheduler, timeout_s) as client:
        workers = workers_of(client)
        return workers, client.run(function, *arguments, workers=list(workers), on_error="return")


THREADS = 2  # threads of a worker: one has patches read while the model works for the other
# For a worker with a GPU: the batches that share the GPU, see `GPU_SHARE`. Planning, stitching and finishing run in
# Python itself, which would keep these from running, so helpers do them, processes with one thread.
GPU_THREADS = 4
GPU_RESOURCES, HELPER_RESOURCES = {"GPU": 1}, {"CPU": 1}
CORES_A_HELPER = 3  # the others read patches and feed the GPUs
# If dask-cuda starts the workers, there are no helpers.
WHOLE_THREADS, WHOLE_RESOURCES = 7, {"GPU": 1, "CPU": 3}
HOST = "127.0.0.1"
NO_WORKER_S = 60
SETTINGS = {
    "distributed.scheduler.no-workers-timeout": NO_WORKER_S,
    "distributed.scheduler.allowed-failures": 1,  # then the task is tried alone
    # A worker that dies again while it restarts is not lost: otherwise it would be given up for good after 15 s.
    "distributed.deploy.lost-worker-timeout": "1 day",
    # None of our data can be spilled, and a worker that Dask pauses would wait for ever, because torch never returns
    # memory: a worker that uses up its share of the machine is restarted, and its task is tried again.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
}


def helpers(cores: int = CPU_COUNT) -> int:
    """Return the number of helper processes that plan, stitch and finish slides beside workers with a GPU."""
    return max(1, cores // CORES_A_HELPER)


def threads_each(workers: int) -> int:
    """Return the number of threads for each worker's model: the cores are shared."""
    return max(1, CPU_COUNT // workers)


class _Unseen:
    """A part of a cluster without Dask's HTTP server, which has no password and shows everyone slides and errors."""

    def start_http_server(self, *_: Any, **__: Any) -> None:
        """Listen nowhere."""


class UnseenScheduler(_Unseen, Scheduler):
    """A scheduler that accepts only Dask's own connections."""


class UnseenWorker(_Unseen, Worker):
    """A worker that accepts only Dask's own connections."""


@contextmanager
def local_cluster(workers: int, device: str) -> Iterator[Cluster]:
    """Start worker processes for a model on `device`, as a context.

    No other user of this machine can use them, or make them load code: scheduler, nannies and workers answer only those
    that have the key, which is made for this run. It is kept in memory and reaches workers through the pipes that start
    them. Dask's folder for scratch files, from which its processes import, is this user's own.

    Raises:
        WorkerError: "cuda" is requested, and there are fewer GPUs than workers.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # failures are reported with their slides
    gpus = gpus_for(workers) if device == "cuda" else None
    with private_scratch(), dask.config.set(SETTINGS), _started(workers, device, gpus) as cluster:
        yield cluster


@contextmanager
def private_scratch() -> Iterator[None]:
    """Let Dask keep its scratch files in a folder of this user, as a context.

    By default it is `dask-scratch-space` in the folder for temporary files, whoever made it, and Dask puts it first in
    `sys.path`: another user could have modules imported from it.
    """
    with ExitStack() as opened:
        folder = opened.enter_context(TemporaryDirectory(prefix="wsi-gradcam-", ignore_cleanup_errors=True))
        opened.enter_context(dask.config.set({"temporary-directory": folder}))
        yield


def _started(workers: int, device: str, gpus: list[str] | None) -> Cluster:
    security = Security.temporary()
    if gpus is not None and find_spec("dask_cuda") is not None:
        return _of_dask_cuda(gpus, security)
    shared = {"host": HOST, "protocol": "tls", "security": security, "preload": [__name__]}
    shared |= {"worker_class": UnseenWorker, "silence_logs": logging.CRITICAL}
    scheduler = {"host": HOST, "port": 0, "protocol": "tls", "security": security, "dashboard": False}
    return SpecCluster(
        scheduler={"cls": UnseenScheduler, "options": scheduler},
        workers={name: {"cls": Nanny, "options": {**shared, **o}} for name, o in worker_options(workers, device, gpus)},
        security=security,
        silence_logs=logging.CRITICAL,
    )


def worker_options(workers: int, device: str, gpus: list[str] | None) -> Iterator[tuple[int | str, dict[str, Any]]]:
    """Yield the name of each worker process and its options: threads, memory, resources, environment.

    With GPUs, each sees only one of `gpus`, as its `cuda`; torch is not loaded before the environment is set.
    """
    if device == "cpu":
        for number in range(workers):
            yield number, {"nthreads": THREADS, "memory_limit": MEMORY_LIMIT // workers}
        return
    half = MEMORY_LIMIT // 2
    for number in range(workers):
        seen = {} if gpus is None else {"env": {"CUDA_VISIBLE_DEVICES": gpus[number]}}
        about = {"nthreads": GPU_THREADS, "memory_limit": half // workers, "resources": GPU_RESOURCES}
        yield number, {**about, **seen}
    for number in range(helpers()):
        about = {"nthreads": 1, "memory_limit": half // helpers(), "resources": HELPER_RESOURCES}
        yield f"helper-{number}", {**about, "env": {"CUDA_VISIBLE_DEVICES": ""}}


def _of_dask_cuda(gpus: list[str], security: Security) -> Cluster:
    """Start a process for each GPU through dask-cuda, which also picks the cores near each; without HTTP pages."""
    with dask.config.set({f"distributed.{part}.http.routes": [] for part in ("scheduler", "worker")}):
        cluster: Cluster = import_module("dask_cuda").LocalCUDACluster(
            CUDA_VISIBLE_DEVICES=gpus,
            n_workers=len(gpus),
            threads_per_worker=WHOLE_THREADS,
            resources=WHOLE_RESOURCES,
            memory_limit=MEMORY_LIMIT // len(gpus),
            preload=[__name__],
            host=HOST,
            protocol="tls",
            security=security,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": f"{HOST}:0"},
            silence_logs=logging.CRITICAL,
        )
    return cluster


def gpus_for(workers: int) -> list[str]:
    """Return the names of GPUs, one for each worker.

    Raises:
        WorkerError: there are not enough.
    """
    gpus = visible_gpus()
    if not gpus:
        raise WorkerError(
            "--device cuda, but no NVIDIA GPU is found here (by CUDA_VISIBLE_DEVICES or nvidia-smi); use --device cpu"
        )
    if workers > len(gpus):
        raise WorkerError(
            f"--workers {workers} with --device cuda needs a GPU for each, but there are {len(gpus)} "
            f"({', '.join(gpus)}); use --workers {len(gpus)}"
        )
    return gpus[:workers]


def visible_gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as in CUDA_VISIBLE_DEVICES: "0", "GPU-...", "MIG-..."."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in given.split(",")]
        return names[: next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))]
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return told.stdout.split()


def dask_setup(worker: Worker) -> None:
    """Ignore a terminal's Ctrl-C, which reaches all processes of a command; called by Dask in a new worker's process.

    A worker would print a traceback and die with its work; the client lets it finish its work, and then ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
