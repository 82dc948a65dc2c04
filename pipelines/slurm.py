"""Explain slides on a SLURM cluster: each worker is a job, and this program, on the login node, is their scheduler.

    python pipelines/slurm.py --partition gpu --gres gpu:1 --workers 8 --hours 8 \\
        slides/ --model oral-tumour --target tumour --device cuda --out /shared/results

Arguments that --help does not list are passed to `wsi-gradcam explain`. With --print, the job script is printed, and
nothing is submitted or written. This needs `pip install 'wsi-gradcam[cluster]'` in an environment that all nodes can
see, and slides, model file and --out at the same paths everywhere.

Jobs that end, or are preempted, are replaced during the run; the reasons why jobs wait or end are reported (queues.py).
A worker leaves about 15 minutes before its job's time is over, and others take over its tasks. After Ctrl-C, or if the
login node went down, give the same command again.

The scheduler and the workers answer only those who have a key, which is made for this run in a folder of the working
directory that nobody else can read; so start this in a directory that all nodes can see.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import queues
from amounts import clock
from queues import OVER, RUNS, WAITS, Seen, System


class Slurm(System):
    """SLURM."""

    name = "SLURM"
    job = queues.dask_jobqueue.slurm.SLURMJob
    submit = ("sbatch", "--parsable")
    cancel = ("scancel",)
    logs = "slurm-logs"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that only SLURM has."""
        parser.add_argument("--gres", type=gres, help="resources per job besides cores and memory: gpu:1, gpu:a100:4")
        parser.add_argument("--qos", help="quality of service")
        parser.add_argument("--constraint", help="features that nodes must have")

    def gpus(self, given: argparse.Namespace) -> int:
        """Return the GPUs that --gres asks for."""
        return gpus_of(given.gres or "")

    def log(self, folder: Path, name: str) -> Path:
        """Return the log, named by the job's id."""
        return folder / "wsi-gradcam-%j.log"

    def options(self, given: argparse.Namespace, log: Path) -> dict[str, Any]:
        """Return the directives. SLURM must not restart jobs itself, because lost ones are replaced here."""
        named = {"gres": given.gres, "qos": given.qos, "constraint": given.constraint}
        lines = [f'--output="{log}"', "--no-requeue", *(f"--{key}={value}" for key, value in named.items() if value)]
        return {
            "queue": given.queue,
            "account": given.account,
            "walltime": clock(given.seconds),
            "job_cpu": given.cpus,
            "job_extra_directives": [*lines, *given.directive],
        }

    def question(self, ids: Sequence[str]) -> list[str]:
        """Ask for all jobs of the user: an id that SLURM has forgotten would be an error."""
        return ["squeue", "--noheader", "--me", "--states=all", "--format=%i|%T|%r"]

    def answer(self, text: str) -> dict[str, Seen]:
        """Read lines of id, state and reason."""
        rows = [line.strip().split("|", 2) for line in text.splitlines() if line.count("|") >= 2]
        return {number: seen(state, reason) for number, state, reason in rows}


# SLURM's reasons for which a job waits until an administrator, or its user, changes something.
HOPELESS = {
    "PartitionTimeLimit": "its time is above the partition's limit; give a shorter --time, or another --partition",
    "PartitionNodeLimit": "the partition does not have that many nodes",
    "BadConstraints": "no node has everything that was asked for",
    "AccountNotAllowed": "give another --account",
    "QOSNotAllowed": "give another --qos",
    "InvalidAccount": "give another --account",
    "InvalidQOS": "give another --qos",
    "AssocMaxWallDurationPerJobLimit": "give a shorter --time",
    "QOSMaxWallDurationPerJobLimit": "give a shorter --time",
}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}


def seen(state: str, reason: str) -> Seen:
    """Return what SLURM says about a job."""
    reason = "" if reason in ("None", "(null)") else reason
    if state in WAITING:
        mend = HOPELESS.get(reason)
        return Seen(WAITS, f"{reason} ({mend})" if mend else reason, mend is not None)
    if state in RUNNING:
        return Seen(RUNS)
    return Seen(OVER, f"{state}, {reason}" if reason and reason not in state else state)


def gres(text: str) -> str:
    """Return a valid value for --gres."""
    if not re.fullmatch(r"[\w:.,=/\[\]()-]+", text):
        raise argparse.ArgumentTypeError(f"expected names and numbers such as gpu:a100:4, not {text!r}")
    return text


def gpus_of(asked: str) -> int:
    """Return the number of GPUs that --gres asks for."""
    counts = [
        re.fullmatch(r"(?:gres[:/])?gpu(?:[:=][A-Za-z][\w.-]*)?(?:[:=](\d+))?", part) for part in asked.split(",")
    ]
    return sum(int(found[1] or 1) for found in counts if found)


if __name__ == "__main__":
    raise SystemExit(queues.main(Slurm(), "Explain slides on a SLURM cluster."))
