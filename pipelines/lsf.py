"""Explain slides on a cluster with LSF: each worker is a job; like slurm.py for SLURM.

    python pipelines/lsf.py --queue gpu --gpus 1 --workers 8 --hours 8 \\
        slides/ --model oral-tumour --target tumour --device cuda --out /shared/results

Tested are the job script and the reading of LSF's answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import queues
from queues import OVER, RUNS, WAITS, Seen, System


class Lsf(System):
    """LSF."""

    name = "LSF"
    job = queues.dask_jobqueue.lsf.LSFJob
    submit = ("bsub",)
    cancel = ("bkill",)
    logs = "lsf-logs"
    job_id = r"Job <(\d+)>"
    forgotten = "is not found|[Nn]o .*job found"

    def options(self, given: argparse.Namespace, log: Path) -> dict[str, Any]:
        """Return the directives; LSF does not know seconds. Its unit of memory is that of lsf.conf."""
        minutes = -(-given.seconds // 60)
        gpus = [f'-gpu "num={given.gpus}"'] if given.gpus else []
        return {
            "queue": given.queue,
            "project": given.account,
            "ncpus": given.cpus,
            "walltime": f"{minutes // 60:02d}:{minutes % 60:02d}",
            "job_extra_directives": [f'-o "{log}"', "-rn", *gpus, *given.directive],
        }

    def question(self, ids: Sequence[str]) -> list[str]:
        """Ask for the jobs, including those that are over."""
        return ["bjobs", "-a", "-noheader", "-o", "jobid stat exit_code pend_reason delimiter='|'", *ids]

    def answer(self, text: str) -> dict[str, Seen]:
        """Read lines of id, state, exit status and reason for waiting; "-" stands for nothing."""
        rows = [line.strip().split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
        return {number: seen(*("" if word == "-" else word for word in rest)) for number, *rest in rows}


def seen(state: str, code: str, why: str) -> Seen:
    """Return what LSF says about a job."""
    if state in ("PEND", "PSUSP", "WAIT"):
        return Seen(WAITS, why)
    if state in ("DONE", "EXIT", "ZOMBI"):
        return Seen(OVER, f"{state}, exit status {code}" if code else state)
    return Seen(RUNS)


if __name__ == "__main__":
    raise SystemExit(queues.main(Lsf(), "Explain slides on a cluster with LSF."))
