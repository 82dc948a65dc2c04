"""Explain slides on machines that `ssh` can reach: this program is the scheduler, and workers are started over ssh.

    python pipelines/ssh.py --hosts node1,node2 --per-host 2 --gpus \\
        slides/ --model oral-tumour --target tumour --device cuda --out /shared/results

Arguments that --help does not list are passed to `wsi-gradcam explain`. With --print, the command lines are printed,
and nothing is started. `ssh HOST` must work without a password (keys, an agent, ~/.ssh/config), and the hosts must see
this environment, the slides, the model file and --out at the same paths, and be able to reach this machine's port 8786.

The scheduler and the workers answer only those who have a key, which is made for this run in a folder of the working
directory that nobody else can read; so start this in a directory that all hosts can see.

The system's own ssh is used, not distributed's SSHCluster: your configuration applies, and commands can be shown.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from distributed import Client, LocalCluster
from distributed.utils import get_ip

import certificates
import explaining

FIRST_WORKER_S, END_S = 120, 30
# Dask's processes import from their scratch folder, which must not be one that others made.
SCRATCH = "export DASK_TEMPORARY_DIRECTORY=$(mktemp -d)"


def main() -> int:
    """Explain the slides, and return the exit status of `wsi-gradcam explain`."""
    given, explain = parsed()
    with certificates.made_for_this_run(given.dashboard) as key:
        return run(given, explain, key)


def run(given: argparse.Namespace, explain: list[str], key: Path) -> int:
    """Start workers that have the key of a folder, and explain the slides."""
    address = f"tls://{given.address}:{given.port}"
    commands = [command(host, number, address, key, given) for host in given.hosts for number in range(given.per_host)]
    if given.print:
        print("\n".join(map(shlex.join, commands)))
        return 0
    with ExitStack() as started:
        processes: list[subprocess.Popen[bytes]] = []
        started.callback(end, processes)  # after the cluster is closed: workers end with their scheduler
        options = certificates.scheduler_options(given.dashboard)
        where = {"host": given.address, "scheduler_port": given.port, "protocol": "tls", "scheduler_kwargs": options}
        cluster = started.enter_context(LocalCluster(n_workers=0, **where))
        # In sessions of their own: Ctrl-C ends `explain`, which still needs workers then.
        processes += [subprocess.Popen(line, stdin=subprocess.DEVNULL, start_new_session=True) for line in commands]
        page = f", dashboard {cluster.dashboard_link}" if given.dashboard else ""
        print(f"scheduler {address}{page}; waiting for a worker", flush=True)
        with Client(cluster, set_as_default=False) as client:
            try:
                client.wait_for_workers(1, timeout=FIRST_WORKER_S)
            except TimeoutError:
                raise SystemExit(
                    f"no worker appeared within {FIRST_WORKER_S} s; can all hosts see {key.parent}?"
                ) from None
        return explaining.explain(explain, address)


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this program, and those of `explain`."""
    parser = argparse.ArgumentParser(description="Explain slides on machines that ssh reaches.", allow_abbrev=False)
    parser.add_argument(
        "--hosts", required=True, type=lambda text: text.split(","), help="host names, separated by commas"
    )
    parser.add_argument(
        "--per-host", type=int, default=1, help="workers per host (default 1); with --gpus, one per GPU"
    )
    parser.add_argument("--gpus", action="store_true", help="give each worker of a host a GPU of its own")
    parser.add_argument("--address", default=get_ip(), help="this machine's address, as the hosts know it")
    parser.add_argument("--port", type=int, default=8786, help="port of the scheduler (default 8786)")
    parser.add_argument(
        "--dashboard", default="", help="address for Dask's dashboard, such as 127.0.0.1:8787 (default: none)"
    )
    parser.add_argument("--python", default=sys.executable, help="the hosts' Python (default: this one's path)")
    parser.add_argument("--print", action="store_true", help="print the command lines and start nothing")
    return parser.parse_known_args()


def command(host: str, number: int, address: str, key: Path, given: argparse.Namespace) -> list[str]:
    """Return the command that starts worker `number` of a host.

    There are two threads: one has patches read while the model works for the other; with a GPU there are seven, four of
    which serve it.
    """
    threads = "7" if given.gpus else "2"
    # No memory limit by Dask: a paused worker would wait for ever, because torch never returns memory.
    worker = [given.python, "-m", "dask", "worker", address, "--nthreads", threads, "--memory-limit", "0"]
    worker += ["--death-timeout", "60", "--no-dashboard", *certificates.flags(key)]
    if given.gpus:
        worker = ["env", f"CUDA_VISIBLE_DEVICES={number}", *worker, "--resources", "GPU=1,CPU=3"]
    folder = shlex.quote(str(Path.cwd()))
    return ["ssh", "-o", "BatchMode=yes", host, f"cd {folder} && {SCRATCH} && exec {shlex.join(worker)}"]


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for workers, which end with their scheduler, but not for ever."""
    for process in processes:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.terminate()


if __name__ == "__main__":
    raise SystemExit(main())
