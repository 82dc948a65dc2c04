"""Explain slides on a cluster with PBS (OpenPBS, PBS Professional): each worker is a job; like slurm.py for SLURM.

    python pipelines/pbs.py --queue gpuq --gpus 1 --workers 8 --hours 8 \\
        slides/ --model oral-tumour --target tumour --device cuda --out /shared/results

Tested are the job script and the reading of PBS's answers; `--resources` replaces what is requested, as for Torque.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import queues
from amounts import clock, megabytes
from queues import OVER, RUNS, WAITS, Seen, System


class Pbs(System):
    """PBS."""

    name = "PBS"
    job = queues.dask_jobqueue.pbs.PBSJob
    submit = ("qsub",)
    cancel = ("qdel",)
    logs = "pbs-logs"
    job_id = r"(\d+\S*)"
    forgotten = "Unknown Job Id|has finished"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what PBS alone has."""
        super().add_arguments(parser)
        parser.add_argument("--resources", help="in place of select=1:ncpus=CPUS:mem=MEMORY:ngpus=GPUS")

    def options(self, given: argparse.Namespace, log: Path) -> dict[str, Any]:
        """Return the directives; PBS is not to start a job again by itself, as a lost one is replaced here."""
        gpus = f":ngpus={given.gpus}" if given.gpus else ""
        chunk = f"select=1:ncpus={given.cpus}:mem={megabytes(given.memory)}mb{gpus}"
        return {
            "queue": given.queue,
            "account": given.account,
            "resource_spec": given.resources or chunk,
            "walltime": clock(given.seconds),
            "job_extra_directives": ["-j oe", f'-o "{log}"', "-r n", *given.directive],
        }

    def question(self, ids: Sequence[str]) -> list[str]:
        """Ask for the jobs, in full: for why they wait."""
        return ["qstat", "-f", *ids]

    def answer(self, text: str) -> dict[str, Seen]:
        """Read a block a job: `Job Id: ID`, then lines of NAME = VALUE; long values go on after a tab."""
        blocks = re.split(r"^Job Id:\s*", text.replace("\n\t", ""), flags=re.MULTILINE)[1:]
        return {block.split()[0]: seen(block) for block in blocks}


def seen(block: str) -> Seen:
    """Return what PBS says of a job."""
    values = dict(re.findall(r"^\s+(\w+) = (.*)$", block, flags=re.MULTILINE))
    state, why = values.get("job_state", ""), values.get("comment", "").strip()
    if state in ("Q", "H", "W", "T", "M"):
        return Seen(WAITS, why or {"H": "it is held"}.get(state, ""))
    if state in ("F", "C", "X"):
        return Seen(OVER, "; ".join(filter(None, [f"exit status {values.get('Exit_status', 'unknown')}", why])))
    return Seen(RUNS)


if __name__ == "__main__":
    raise SystemExit(queues.main(Pbs(), "Explain slides on a cluster with PBS."))
