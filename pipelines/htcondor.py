"""Explain slides on a cluster with HTCondor: each worker is a job; like slurm.py for SLURM.

    python pipelines/htcondor.py --gpus 1 --workers 8 --hours 8 \\
        slides/ --model oral-tumour --target tumour --device cuda --out /shared/results

The nodes must see this environment, the slides, the model file and --out at the same paths. `--directive 'NAME =
VALUE'` adds a line. HTCondor has no queues and does not limit time: workers leave on their own. Tested are what is
submitted and the reading of HTCondor's answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import queues
from amounts import memory
from queues import OVER, RUNS, WAITS, Seen, System

IDLE, RUNNING, REMOVED, COMPLETED, HELD = "12345"  # its JobStatus


class HTCondor(System):
    """HTCondor."""

    name = "HTCondor"
    job = queues.dask_jobqueue.htcondor.HTCondorJob
    submit = ("condor_submit",)
    cancel = ("condor_rm",)
    logs = "htcondor-logs"
    job_id = r"submitted to cluster (\d+)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that only HTCondor has."""
        super().add_arguments(parser)
        parser.add_argument("--disk", type=memory, default="1GiB", help="scratch space of a job (default 1GiB)")

    def options(self, given: argparse.Namespace, log: Path) -> dict[str, Any]:
        """Return the lines of what is submitted."""
        lines = {
            "Output": str(log),
            "Error": str(log),
            "Stream_Output": "True",
            "Stream_Error": "True",
            "RequestCpus": str(given.cpus),
            **({"RequestGpus": str(given.gpus)} if given.gpus else {}),
            **({"accounting_group": given.account} if given.account else {}),
        }
        more = [line.partition("=") for line in given.directive]
        return {
            "disk": given.disk,
            "job_extra_directives": lines | {name.strip(): value.strip() for name, _, value in more},
        }

    def question(self, ids: Sequence[str]) -> list[str]:
        """Ask for the jobs; those that are over are not in the answer."""
        return ["condor_q", *ids, "-af:,", "ClusterId", "JobStatus", "HoldReason"]

    def answer(self, text: str) -> dict[str, Seen]:
        """Read lines of id, status and why it is held."""
        rows = [[part.strip() for part in line.split(",", 2)] for line in text.splitlines() if line.count(",") >= 2]
        return {number: seen(status, why) for number, status, why in rows}


def seen(status: str, why: str) -> Seen:
    """Return what HTCondor says about a job."""
    if status == HELD:
        return Seen(WAITS, f"held: {why}")
    if status == IDLE:
        return Seen(WAITS)
    return Seen(OVER) if status in (REMOVED, COMPLETED) else Seen(RUNS)


if __name__ == "__main__":
    raise SystemExit(queues.main(HTCondor(), "Explain slides on a cluster with HTCondor."))
