"""Explain slides on a SLURM cluster: each worker is a job; this program, on the login node, is their scheduler.

    python pipelines/slurm.py --partition gpu --gres gpu:1 --workers 8 --hours 8 \\
        slides/ --model oral-tumour --target tumour --device cuda --out /shared/results

What --help does not list are arguments of `wsi-gradcam explain`. With --print the job script is printed, and nothing
is submitted. Needs `pip install 'wsi-gradcam[cluster]'` in an environment that all nodes see, and slides, model file
and --out at the same paths everywhere.

Jobs that end, or are preempted, are replaced while the run goes on. A worker leaves some 15 minutes before its job's
time is over; what it had in hand is done by another. After Ctrl-C, or when the login node went down, give the same
command again.

Scheduler and workers answer those alone that have a key, made for this run in a folder of the working folder that
nobody else may read; so start it in a folder that all nodes see.
"""

from __future__ import annotations

import argparse

from dask_jobqueue.slurm import SLURMCluster
from distributed import Client, Security

import certificates
import explaining

QUEUE_S = 86_400  # the queue may let a run wait for workers so long
# Dask's processes import from their folder for scratch files, which must not be one that others made.
SCRATCH = ["export DASK_TEMPORARY_DIRECTORY=$(mktemp -d)", "trap 'rm -rf \"$DASK_TEMPORARY_DIRECTORY\"' EXIT"]


def main() -> int:
    """Explain the slides, and return the exit status of `wsi-gradcam explain`."""
    given, explain = parsed()
    with certificates.made_for_this_run(given.dashboard), make_cluster(given) as cluster:
        if given.print:
            print(cluster.job_script())
            return 0
        cluster.adapt(minimum=given.minimum, maximum=given.workers)
        page = f", dashboard {cluster.dashboard_link}" if given.dashboard else ""
        print(f"scheduler {cluster.scheduler_address}{page}; waiting for a worker", flush=True)
        with Client(cluster, set_as_default=False) as client:
            client.wait_for_workers(1)  # as long as the queue is
        return explaining.explain(explain, cluster.scheduler_address, QUEUE_S)


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this program, and those of `explain`."""
    parser = argparse.ArgumentParser(description="Explain slides on a SLURM cluster.", allow_abbrev=False)
    parser.add_argument("--partition", help="SLURM's name of the queue")
    parser.add_argument("--account", help="whom SLURM charges")
    parser.add_argument("--workers", type=int, default=2, help="jobs, one worker each (default 2)")
    parser.add_argument(
        "--minimum", type=int, help="keep that many jobs only while there is little to do (default: all)"
    )
    parser.add_argument("--gres", help="what a job gets besides cores and memory, such as gpu:1")
    parser.add_argument("--cpus", type=int, default=4, help="cores of a job (default 4)")
    parser.add_argument("--memory", default="8GiB", help="memory of a job (default 8GiB)")
    parser.add_argument("--hours", type=int, default=4, help="time of a job in whole hours (default 4)")
    parser.add_argument("--interface", help="network that the nodes share, such as ib0")
    parser.add_argument(
        "--dashboard", default="", help="address of Dask's page, such as 127.0.0.1:8787 (default: none)"
    )
    parser.add_argument("--logs", default="slurm-logs", help="folder for what jobs print (default slurm-logs)")
    parser.add_argument("--print", action="store_true", help="print the job script and submit nothing")
    given, explain = parser.parse_known_args()
    given.minimum = given.workers if given.minimum is None else given.minimum
    if given.hours < 1 or not 1 <= given.minimum <= given.workers:
        parser.error("expected --hours of 1 or more, and 1 <= --minimum <= --workers")
    return given, explain


def make_cluster(given: argparse.Namespace) -> SLURMCluster:
    """A scheduler here, that submits jobs when told to.

    Two threads a worker: one has patches read for the other. Five beside a GPU, of which two are for it.
    """
    # No limit of Dask's: a worker it pauses waits for ever, as torch never gives memory back. SLURM's limit holds.
    worker = ["--memory-limit", "0", "--lifetime", f"{60 * given.hours - 15}m", "--lifetime-stagger", "5m"]
    return SLURMCluster(
        queue=given.partition,
        account=given.account,
        walltime=f"{given.hours:02d}:00:00",
        cores=5 if given.gres else 2,  # Dask's word for threads
        processes=1,
        job_cpu=given.cpus,
        memory=given.memory,
        interface=given.interface,
        protocol="tls://",
        security=Security(),  # the files that Dask's configuration names
        scheduler_options=certificates.scheduler_options(given.dashboard),
        job_script_prologue=SCRATCH,
        job_name="wsi-gradcam",
        log_directory=given.logs,
        job_extra_directives=[f"--gres={given.gres}"] if given.gres else [],
        worker_extra_args=[*worker, "--resources", "GPU=1,CPU=3"] if given.gres else worker,
    )


if __name__ == "__main__":
    raise SystemExit(main())
