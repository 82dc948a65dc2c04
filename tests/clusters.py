"""Dask schedulers and workers as processes of their own, in another folder than the tests'; and what recipes print."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

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


def printed(name: str, at: Path, *arguments: str, printing: Sequence[str] = ("--print",)) -> tuple[int, str, str]:
    """Runs a recipe that only prints, in a folder and this process: its exit status, what it prints, what it says."""
    out, said = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [name, *arguments, *printing]))
        stack.enter_context(mock.patch.object(sys, "path", [str(ROOT / "pipelines"), *sys.path]))
        for context in (chdir(at), redirect_stdout(out), redirect_stderr(said)):
            stack.enter_context(context)
        try:
            runpy.run_path(str(ROOT / f"pipelines/{name}.py"), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue(), said.getvalue()
    raise AssertionError(f"{name} has not exited")
