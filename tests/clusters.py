"""Dask schedulers and workers as processes of their own, in another folder than the tests'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.runs import ROOT


@contextmanager
def process(folder: Path, *arguments: str, module: str = "dask") -> Iterator[subprocess.Popen[bytes]]:
    """`dask ARGUMENTS`, or another module, in another folder than the tests'."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    started = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait(10)


@contextmanager
def scheduler(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A Dask scheduler and its address."""
    file = folder / "scheduler.json"
    with process(
        folder, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)
    ) as started:
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text(encoding="utf-8").strip():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield started, json.loads(file.read_text(encoding="utf-8"))["address"]


def worker(address: str, threads: int = 1, resources: str = "") -> list[str]:
    """Arguments of `dask` for a worker; `resources` such as GPU=1."""
    declared = ["--resources", resources] if resources else []
    return [
        "worker",
        address,
        "--nthreads",
        str(threads),
        "--no-dashboard",
        "--no-nanny",
        "--host",
        "127.0.0.1",
        *declared,
    ]
