"""Workers on this machine: processes that share its cores, or one for each GPU."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import LocalCluster, Nanny, Scheduler, SpecCluster, Worker
from distributed.deploy.cluster import Cluster
from distributed.system import MEMORY_LIMIT

from wsi_gradcam.errors import WorkerError

THREADS = 2  # of a worker: one has patches read while the model works for the other
# Of a worker with a GPU, which explains a slide in less time than one thread plans and stitches it. One is the GPU's.
GPU_THREADS = 4
GPU_RESOURCES = {"GPU": 1, "CPU": GPU_THREADS - 1}
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


def threads_each(workers: int) -> int:
    """Return the number of threads for each worker's model: the cores are shared."""
    return max(1, CPU_COUNT // workers)


@contextmanager
def local_cluster(workers: int, device: str) -> Iterator[Cluster]:
    """Start worker processes for a model on `device`, as a context.

    Raises:
        WorkerError: "cuda" is asked for, and there are fewer GPUs than workers.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what fails is reported with its slide
    gpus = gpus_for(workers) if device == "cuda" else None
    options: dict[str, Any] = {"memory_limit": MEMORY_LIMIT // workers, "preload": [__name__]}
    if device != "cpu":
        options["resources"] = GPU_RESOURCES
    with dask.config.set(SETTINGS), _started(workers, gpus, options) as cluster:
        yield cluster


def _started(workers: int, gpus: list[str] | None, options: dict[str, Any]) -> Cluster:
    return _on_cores(workers, options) if gpus is None else _on_gpus(gpus, options)


def _on_cores(workers: int, options: dict[str, Any]) -> Cluster:
    threads = GPU_THREADS if "resources" in options else THREADS
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=threads,
        processes=True,
        host=HOST,
        dashboard_address=f"{HOST}:0",
        silence_logs=logging.CRITICAL,
        **options,
    )


def _on_gpus(gpus: list[str], options: dict[str, Any]) -> Cluster:
    """Start a process for each GPU, through dask-cuda where it is installed: it also picks the cores near each GPU."""
    if find_spec("dask_cuda") is not None:
        cluster: Cluster = import_module("dask_cuda").LocalCUDACluster(
            CUDA_VISIBLE_DEVICES=gpus,
            n_workers=len(gpus),
            threads_per_worker=GPU_THREADS,
            host=HOST,
            dashboard_address=f"{HOST}:0",
            silence_logs=logging.CRITICAL,
            **options,
        )
        return cluster
    scheduler = {"host": HOST, "port": 0, "dashboard": True, "dashboard_address": f"{HOST}:0"}
    return SpecCluster(
        scheduler={"cls": Scheduler, "options": scheduler},
        workers={i: _worker_on(gpu, options) for i, gpu in enumerate(gpus)},
        silence_logs=logging.CRITICAL,
    )


def _worker_on(gpu: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return a worker that sees one GPU, which is `cuda` to it; torch is not loaded before its environment is set."""
    environment = {"CUDA_VISIBLE_DEVICES": gpu}
    common = {"host": HOST, "nthreads": GPU_THREADS, "dashboard": False, "silence_logs": logging.CRITICAL}
    return {"cls": Nanny, "options": {**common, **options, "env": environment}}


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
