"""Explain slides on a cluster with Grid Engine (SGE, Altair): each worker is a job; like slurm.py for SLURM.

    python pipelines/sge.py --queue gpu.q --pe smp --gpus 1 --workers 8 --hours 8 \\
        slides/ --model oral-tumour --target tumour --device cuda --out /shared/results

Sites name memory and GPUs as they like: `--resources` says how, with CPUS, MB (per core) and GPUS in place of the
numbers. Tested are the job script and the reading of Grid Engine's answers.
"""

from __future__ import annotations

import argparse
import getpass
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import queues
from amounts import clock, megabytes
from queues import RUNS, WAITS, Seen, System


class Sge(System):
    """Grid Engine."""

    name = "Grid Engine"
    job = queues.dask_jobqueue.sge.SGEJob
    submit = ("qsub", "-terse")
    cancel = ("qdel",)
    logs = "sge-logs"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that only Grid Engine has."""
        super().add_arguments(parser)
        parser.add_argument("--pe", default="smp", help="parallel environment of the cores of one node (default smp)")
        parser.add_argument("--resources", help="default h_vmem=MBM, and with GPUs h_vmem=MBM,gpu=GPUS")

    def options(self, given: argparse.Namespace, log: Path) -> dict[str, Any]:
        """Return the directives. Memory is requested per core; the queue itself does not restart jobs."""
        wanted = given.resources or ("h_vmem=MBM,gpu=GPUS" if given.gpus else "h_vmem=MBM")
        numbers = {"CPUS": given.cpus, "MB": -(-megabytes(given.memory) // given.cpus), "GPUS": given.gpus}
        for word, number in numbers.items():
            wanted = wanted.replace(word, str(number))
        return {
            "queue": given.queue,
            "project": given.account,
            "resource_spec": wanted,
            "walltime": clock(given.seconds),
            "job_extra_directives": [f"-pe {given.pe} {given.cpus}", f'-o "{log}"', "-r n", *given.directive],
        }

    def question(self, ids: Sequence[str]) -> list[str]:
        """Ask for the jobs of the user."""
        return ["qstat", "-u", getpass.getuser()]

    def answer(self, text: str) -> dict[str, Seen]:
        """Read a table: id, priority, name, user, state, ...; jobs that are over are not in it."""
        rows = [line.split() for line in text.splitlines()]
        return {row[0]: seen(row[4]) for row in rows if len(row) > 4 and row[0].isdecimal()}


def seen(state: str) -> Seen:
    """Return what Grid Engine says about a job."""
    if "E" in state:
        return Seen(WAITS, f"{state}: it could not be started (qstat -j ID says why)", hopeless=True)
    if "q" in state or "w" in state:
        return Seen(WAITS, state if "h" in state else "")
    return Seen(RUNS)


if __name__ == "__main__":
    raise SystemExit(queues.main(Sge(), "Explain slides on a cluster with Grid Engine."))
