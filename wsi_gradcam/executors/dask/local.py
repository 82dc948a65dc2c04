"""Workers on this machine: processes that share its cores, or one for each GPU."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Nanny, Scheduler, Security, SpecCluster, Worker
from distributed.deploy.cluster import Cluster
from distributed.system import MEMORY_LIMIT

from wsi_gradcam.errors import WorkerError

THREADS = 2  # of a worker: one has patches read while the model works for the other
# Of a worker with a GPU: the orders that it has in hand for it, see `workers.GPU_SHARE`. Planning, stitching and
# finishing are work of Python's own, which would keep these from running: helpers do it, processes of one thread.
GPU_THREADS = 4
GPU_RESOURCES, HELPER_RESOURCES = {"GPU": 1}, {"CPU": 1}
CORES_A_HELPER = 3  # the others read, and feed the GPUs
# Where dask-cuda starts the workers there are no helpers.
WHOLE_THREADS, WHOLE_RESOURCES = 7, {"GPU": 1, "CPU": 3}
HOST = "127.0.0.1"
NO_WORKER_S = 60
SETTINGS = {
    "distributed.scheduler.no-workers-timeout": NO_WORKER_S,
    "distributed.scheduler.allowed-failures": 1,  # a trial gets another chance, alone
    # A worker that dies again while it starts anew is not lost: after 15 s it would be given up for good.
    "distributed.deploy.lost-worker-timeout": "1 day",
    # Nothing of ours can be spilled, and a worker that Dask pauses would wait for ever, as torch never gives memory
    # back: one that eats its share of the machine is ended and started anew, and its task is tried again.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
}


def helpers(cores: int = CPU_COUNT) -> int:
    """Return the number of processes beside workers with a GPU that plan, stitch and finish slides."""
    return max(1, cores // CORES_A_HELPER)


def threads_each(workers: int) -> int:
    """Return the number of threads for each worker's model: the cores are shared."""
    return max(1, CPU_COUNT // workers)


class _Unseen:
    """A part of a cluster without Dask's HTTP server, which has no password and tells everyone of slides and errors."""

    def start_http_server(self, *_: Any, **__: Any) -> None:
        """Listen nowhere."""


class UnseenScheduler(_Unseen, Scheduler):
    """A scheduler that listens for Dask's own connections alone."""


class UnseenWorker(_Unseen, Worker):
    """A worker that listens for Dask's own connections alone."""


@contextmanager
def local_cluster(workers: int, device: str) -> Iterator[Cluster]:
    """Start worker processes for a model on `device`, as a context.

    No other user of this machine can use them, or make them load code: scheduler, nannies and workers answer those
    alone that have the key, made for this run. It is kept in memory and reaches workers through the pipes that
    start them. Dask's folder for scratch files, from which its processes import, is this user's own.

    Raises:
        WorkerError: "cuda" is asked for, and there are fewer GPUs than workers.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what fails is reported with its slide
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
    """Yield the name of each worker process, and what sets it apart: threads, memory, resources, environment.

    On a GPU each sees one of `gpus`, which is `cuda` to it; torch is not loaded before its environment is set.
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
    """Start a process for each GPU through dask-cuda, which also picks the cores near each; its HTTP has no pages."""
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
        WorkerError: there are not so many.
    """
    gpus = visible_gpus()
    if not gpus:
        raise WorkerError(
            "--device cuda, but no NVIDIA GPU is found here (by CUDA_VISIBLE_DEVICES or nvidia-smi); try --device cpu"
        )
    if workers > len(gpus):
        raise WorkerError(
            f"--workers {workers} with --device cuda wants a GPU for each, but there are {len(gpus)} "
            f"({', '.join(gpus)}); give --workers {len(gpus)}"
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
    """Called by Dask in a new worker's process: ignore a terminal's Ctrl-C, which reaches all processes of a command.

    A worker would print a traceback and die with its work; the client lets it finish that, and then ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
