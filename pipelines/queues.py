"""The part that recipes for clusters with a queue share: each worker is a job; the recipe is their scheduler.

A recipe (slurm.py, pbs.py, lsf.py, sge.py, htcondor.py) defines what its queue is told and how it is asked. Job scripts
are dask-jobqueue's. Jobs are looked after here, because dask-jobqueue waits for ever for jobs that never come:

- Jobs are submitted once `explain` has checked its arguments and reached the scheduler.
- If the queue refuses the first job, the run ends with the queue's own message. Later jobs are tried again.
- The queue is asked for its jobs again and again. The reasons why jobs wait are reported. A job that has ended, or
  whose worker is gone, is reported with the last lines of its log and replaced; if job after job ends without a worker,
  the run ends.
- At the end, and after Ctrl-C or SIGTERM, all jobs are cancelled. If this process is killed, workers exit on their own.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import dask
from distributed import Scheduler, Security, SpecCluster

import certificates
import explaining
from amounts import directive, duration, memory, positive

QUEUE_S = 86_400  # how long the queue may let a run wait for workers
COMMAND_S = 120  # for a command of the queue; SLURM's commands wait about 10 s for an unreachable controller
ASKED_S = (2.0, 30.0)  # between two questions to the queue: the first after something happened, and the last
GONE_S = 20.0  # a job that continues without its worker for this long is replaced, such as one on a lost node
YOUNG_S = 60.0  # a worker that lived for less does not count as a success
LONGEST_PAUSE_S = 300.0  # before a job is replaced, after many that ended at once
TRIES = 2  # jobs beyond those wanted that may end without a worker before the run is given up
LOG_LINES, LOG_BYTES = 5, 8192
HERE = Path(__file__).parent
EACH_GPU = HERE / "each_gpu.py"
# Dask's processes import from their scratch folder, which must not be one that others made.
SCRATCH = ("export DASK_TEMPORARY_DIRECTORY=`mktemp -d`", "trap 'rm -rf \"$DASK_TEMPORARY_DIRECTORY\"' EXIT")


def imported() -> ModuleType:
    """Return dask-jobqueue, imported without two side effects of its import.

    It makes Ctrl-C end the process with status 0 (`dask_jobqueue.runner`), and writes a file into the home folder.
    """
    handler, ensure_file = signal.getsignal(signal.SIGINT), dask.config.ensure_file
    dask.config.ensure_file = lambda **_: None
    try:
        import dask_jobqueue
    finally:
        dask.config.ensure_file = ensure_file
        signal.signal(signal.SIGINT, handler)
    return dask_jobqueue


dask_jobqueue = imported()
WAITS, RUNS, OVER = "waits", "runs", "over"


@dataclass(frozen=True)
class Seen:
    """What the queue says about a job: whether it waits, runs or is over, in its own words, and can never run."""

    state: str
    words: str = ""
    hopeless: bool = False


class QueueError(Exception):
    """The queue refuses, or does not answer; with its own message."""


class System(ABC):
    """A queueing system, as far as needed: what it is told about a job, and what it says about jobs."""

    name: str
    job: Any  # dask-jobqueue's class, which writes the job script
    submit: tuple[str, ...]  # reads the script from standard input
    cancel: tuple[str, ...]  # ids follow
    logs: str  # default folder
    job_id = r"(\d+)"  # in what `submit` prints
    forgotten = r"$^"  # what the queue says, as an error, of jobs that it no longer knows

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that only this system has."""
        parser.add_argument(
            "--gpus", type=positive, default=0, help="GPUs per job, with one worker each (default none)"
        )

    def gpus(self, given: argparse.Namespace) -> int:
        """Return the number of a job's GPUs."""
        return int(given.gpus)

    @abstractmethod
    def options(self, given: argparse.Namespace, log: Path) -> dict[str, Any]:
        """Return what the system's class of dask-jobqueue is told, beside the worker's command; `log` is a file."""

    def log(self, folder: Path, name: str) -> Path:
        """Return the log of a job, with %j for its id where the system knows it then; `name` is that of the job."""
        return folder / f"wsi-gradcam-{name}.log"

    @abstractmethod
    def question(self, ids: Sequence[str]) -> list[str]:
        """Return the command that asks for jobs."""

    @abstractmethod
    def answer(self, text: str) -> dict[str, Seen]:
        """Return what the answer says of each job, by its id; of others too. Jobs may be missing that are over."""

    def scratch(self) -> Sequence[str]:
        """Return the lines before the worker's command."""
        return SCRATCH


def parsed(system: System, description: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments of a recipe, and those of `explain`."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--partition", "--queue", dest="queue", help=f"name of the queue in {system.name}")
    add("--account", help="account that the queue charges")
    add("--workers", type=positive, default=2, metavar="JOBS", help="jobs (default 2); one worker each, or one per GPU")
    add("--minimum", type=positive, help="keep only this many jobs while there is little to do (default: all)")
    add("--cpus", type=positive, default=4, help="cores per job (default 4)")
    add("--memory", type=memory, default="8GiB", help="memory per job (default 8GiB)")
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--hours", type=positive, help="time per job in whole hours (default 4)")
    times.add_argument("--time", type=duration, help="the same in SLURM's format, to the second: 0:30:00, 90, 1-12")
    add(
        "--directive",
        type=directive,
        action="append",
        default=[],
        help="another directive for the queue; may be repeated",
    )
    system.add_arguments(parser)
    add("--interface", help="network interface that the nodes share, such as ib0")
    add("--dashboard", default="", help="address for Dask's dashboard, such as 127.0.0.1:8787 (default: none)")
    add("--logs", type=Path, default=Path(system.logs), help=f"folder for the output of jobs (default {system.logs})")
    add("--python", default=sys.executable, help="the nodes' Python (default: this one's path)")
    add("--print", action="store_true", help="print the job script; submit and write nothing")
    given, explain = parser.parse_known_args()
    given.seconds = given.time or 3600 * (given.hours or 4)
    given.minimum = given.minimum or given.workers
    if given.minimum > given.workers:
        parser.error(f"--minimum {given.minimum} is more than --workers {given.workers}")
    return given, explain


def script(system: System, given: argparse.Namespace, name: str, address: str, key: Path, log: Path) -> str:
    """Return the script of a job, whose worker has the key of a folder.

    There are two threads per worker: one has patches read for the other; with a GPU there are seven, four of which
    serve it. A worker leaves before its job's time is over, 15 minutes before the end unless that is too much.
    """
    gpus, margin = system.gpus(given), min(900, given.seconds // 4)
    # No limit by Dask: a paused worker would wait for ever, because torch never returns memory. The queue's limit
    # applies.
    worker = [
        "--memory-limit",
        "0",
        "--lifetime",
        f"{given.seconds - margin}s",
        "--lifetime-stagger",
        f"{margin // 3}s",
    ]
    worker += ["--no-dashboard", "--protocol", "tls://", *certificates.flags(key)]
    worker += ["--resources", "GPU=1,CPU=3"] if gpus else []
    launcher = [given.python, str(EACH_GPU), str(gpus)] if gpus > 1 else [given.python]
    made = system.job(
        address,
        name=name,
        job_name="wsi-gradcam",
        python=shlex.join(launcher),
        cores=7 if gpus else 2,  # Dask's name for threads
        processes=1,
        death_timeout=60,
        memory=given.memory,
        interface=given.interface,
        job_script_prologue=list(system.scratch()),
        worker_extra_args=[shlex.quote(word) for word in worker],
        **system.options(given, log),
    )
    return str(made.job_script())


def asked(command: Sequence[str], text: str = "", forgotten: str = r"$^") -> str:
    """Return what a command of the queue prints, whatever Ctrl-C does meanwhile; `forgotten` is not an error.

    Raises:
        QueueError: there is no such command, it takes too long, or it fails, with its last output.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=COMMAND_S, check=True, start_new_session=True
        )
    except FileNotFoundError:
        raise QueueError(
            f"{command[0]}: there is no such command here; start this where jobs can be submitted"
        ) from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{command[0]} did not answer within {COMMAND_S} s") from None
    except (OSError, subprocess.CalledProcessError) as error:
        output, lines = getattr(error, "stdout", ""), getattr(error, "stderr", "").strip().splitlines()
        if lines and all(re.search(forgotten, line) for line in lines):
            return str(output)
        words = "; ".join(line.strip() for line in [*lines, *output.splitlines()] if line.strip()) or str(error)
        raise QueueError(words if words.startswith(command[0]) else f"{command[0]}: {words}") from None
    return done.stdout


@dataclass
class Job:
    """A submitted job, and what is known about it.

    Attributes:
        name: of its worker; workers of several GPUs are NAME.0, NAME.1, ...
        came: when its first worker came; None before that.
        gone: since when it has had no worker any more.
        unknown: how many times in a row the queue has not listed it.
    """

    name: str
    id: str
    log: Path
    came: float | None = None
    gone: float | None = None
    unknown: int = 0


class Jobs:
    """The jobs of a run, as a context: submitted, asked about, replaced; and cancelled at the end."""

    def __init__(self, system: System, given: argparse.Namespace, cluster: SpecCluster, key: Path) -> None:
        self._system, self._given, self._cluster, self._key = system, given, cluster, key
        self._scheduler: Any = cluster.scheduler
        self._run = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._jobs: list[Job] = []
        self._wanted, self._fewer, self._sized_at = int(given.minimum), 0, 0.0
        self._number = self._failed = self._refused = 0
        self._not_before, self._ask_at = 0.0, math.inf
        self._pause = ASKED_S[0]
        self._submitted = self._came = False
        self._told: set[str] = set()
        self._silent = ""

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *error: object) -> None:
        self._cancel(self._jobs)

    def tend(self) -> None:
        """Look after the jobs once; this must be called again and again.

        Raises:
            NothingBegunError: the first job is refused, or no job produces a worker, and there has been none.
            QueueError: the same, after there had been workers.
        """
        clients, names = self._cluster.sync(self._look)
        if not clients and not self._submitted:  # `explain` has yet to check its arguments
            return
        now = time.monotonic()
        self._compare(names, now)
        if self._jobs and now >= self._ask_at:
            self._ask(now)
        self._size(now)
        if len(self._jobs) < self._wanted and time.monotonic() >= self._not_before:
            self._submit()

    async def _look(self) -> tuple[int, set[str]]:
        """Return how many clients the scheduler has besides its own, and the names of jobs that have workers."""
        scheduler = self._scheduler
        clients = [name for name in scheduler.clients if name != "fire-and-forget"]
        return len(clients), {str(worker.name).partition(".")[0] for worker in scheduler.workers.values()}

    def _compare(self, names: set[str], now: float) -> None:
        """Find out which jobs have workers now."""
        for job in self._jobs:
            if job.name in names:
                if job.came is None:
                    job.came, self._came, self._failed = now, True, 0
                    self._soon(now)
                job.gone = None
            elif job.came is not None and job.gone is None:
                job.gone = now
                self._soon(now)

    def _soon(self, now: float) -> None:
        """Ask the queue soon, because something has happened."""
        self._pause = ASKED_S[0]
        self._ask_at = min(self._ask_at, now + self._pause)

    def _ask(self, now: float) -> None:
        """Ask the queue what has become of the jobs."""
        self._ask_at, self._pause = now + self._pause, min(ASKED_S[1], 1.5 * self._pause)
        try:
            question = self._system.question([job.id for job in self._jobs])
            seen = self._system.answer(asked(question, forgotten=self._system.forgotten))
        except QueueError as error:
            if not self._silent:
                say(f"the queue does not list its jobs ({error}); trying again")
            self._silent = str(error)
            return
        if self._silent:
            say("the queue answers again")
            self._silent, self._pause = "", ASKED_S[0]
            self._soon(now)
        now = time.monotonic()
        for job in list(self._jobs):
            self._judge(job, seen.get(job.id), now)
        waiting = [found for job in self._jobs if (found := seen.get(job.id)) is not None and found.state == WAITS]
        self._tell_why(waiting)

    def _judge(self, job: Job, found: Seen | None, now: float) -> None:
        """Replace a job that is over, or that runs without its worker."""
        job.unknown = job.unknown + 1 if found is None else 0
        if job.unknown >= 2 or (found is not None and found.state == OVER):  # one listing may be too early
            self._over(job, found.words if found is not None and found.words else "the queue no longer lists it", now)
        elif job.gone is not None and now - job.gone > GONE_S:
            self._cancel([job])
            self._over(job, f"its worker has been gone for {GONE_S:g} s, so it is cancelled", now)

    def _over(self, job: Job, words: str, now: float) -> None:
        """Report a job that is over, and set when it may be replaced."""
        self._jobs.remove(job)
        lived = 0.0 if job.came is None else (job.gone or now) - job.came
        if job.came is not None and lived > YOUNG_S:
            say(f"job {job.id} has ended: {words}; it will be replaced")
            return
        self._failed += 1
        self._not_before = now + min(LONGEST_PAUSE_S, 2.0 ** max(0, self._failed - self._wanted))
        told = f"job {job.id} has ended {'at once' if job.came else 'without a worker'}: {words}"
        say(told + last_lines(job.log))
        if self._failed >= self._wanted + TRIES and not any(job.came and not job.gone for job in self._jobs):
            self._give_up(f"{self._failed} jobs in a row ended like this; the last: {told}; its log is {job.log}")

    def _tell_why(self, waiting: list[Seen]) -> None:
        """Report each new reason why jobs wait; if all have one that never goes away, none can ever run."""
        for words in dict.fromkeys(found.words for found in waiting):
            if words and words not in self._told:
                self._told.add(words)
                count = sum(found.words == words for found in waiting)
                say(f"{count} {'job waits' if count == 1 else 'jobs wait'} in the queue: {words}")
        if waiting and len(waiting) == len(self._jobs) and all(found.hopeless for found in waiting):
            self._give_up(f"the jobs can never run: {waiting[0].words}")

    def _give_up(self, words: str) -> None:
        raise QueueError(words) if self._came else explaining.NothingBegunError(words)

    def _size(self, now: float) -> None:
        """Have as many jobs as there is work for, if fewer are allowed; reduce them only after some time."""
        if self._given.minimum == self._given.workers or now < self._sized_at:
            return
        self._sized_at = now + 5
        workers = max(1, self._system.gpus(self._given))
        target = -(-self._cluster.sync(self._target) // workers)
        target = max(self._given.minimum, min(self._given.workers, target))
        self._fewer = self._fewer + 1 if target < len(self._jobs) else 0
        self._wanted = target if target > self._wanted or self._fewer >= 3 else self._wanted
        surplus = len(self._jobs) - self._wanted
        if surplus > 0 and self._fewer >= 3:
            idle = [job for job in self._jobs if job.came is None]
            names = self._cluster.sync(self._retired, max(0, surplus - len(idle)) * workers)
            ending = [*idle[:surplus], *(job for job in self._jobs if job.name in names)]
            self._jobs = [job for job in self._jobs if job not in ending]
            self._cancel(ending)

    async def _target(self) -> int:
        """Return how many workers Dask would use for the present work."""
        return int(self._scheduler.adaptive_target())

    async def _retired(self, count: int) -> set[str]:
        """Let this many idle workers leave; return the names of their jobs."""
        scheduler = self._scheduler
        if not count:
            return set()
        closing = scheduler.workers_to_close(
            n=count, key=lambda worker: str(worker.name).partition(".")[0], minimum=self._given.minimum
        )
        names = {str(scheduler.workers[address].name).partition(".")[0] for address in closing}
        await scheduler.retire_workers(workers=closing, close_workers=True)
        return names

    def _submit(self) -> None:
        """Submit the required jobs; if the first one is refused, everything ends; later ones are tried again."""
        self._given.logs.mkdir(parents=True, exist_ok=True)
        while len(self._jobs) < self._wanted:
            self._number += 1
            name = f"{self._run}-{self._number}"
            log = self._system.log(self._given.logs.absolute(), name)
            text = script(self._system, self._given, name, self._cluster.scheduler_address, self._key, log)
            try:
                answer = asked(self._system.submit, text)
                found = re.search(self._system.job_id, answer)
                if found is None:
                    raise QueueError(f"{self._system.submit[0]} answered {answer.strip()!r}, without the id of a job")
            except QueueError as error:
                self._refuse(error)
                return
            self._submitted, self._refused = True, 0
            self._jobs.append(Job(name, found[1], Path(str(log).replace("%j", found[1]))))
            self._soon(time.monotonic())

    def _refuse(self, error: QueueError) -> None:
        """Report a submission that failed."""
        if not self._submitted:
            raise explaining.NothingBegunError(str(error)) from error
        self._refused += 1
        pause = min(LONGEST_PAUSE_S, 2.0**self._refused)
        self._not_before = time.monotonic() + pause
        if self._refused == 1:
            say(f"a job was not accepted ({error}); trying again")

    def _cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel jobs; if that fails, say how to do it."""
        if not jobs:
            return
        command = [*self._system.cancel, *(job.id for job in jobs)]
        try:
            asked(command)
        except QueueError as error:
            say(f"jobs could not be cancelled ({error}); do it yourself: {shlex.join(command)}")


def say(text: str) -> None:
    """Print a message for the user."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def last_lines(log: Path) -> str:
    """Return the last lines of a job's log, each on a line of its own, after one that names the log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return f"; it has no log {log}"
    return "".join(f"\n    {line}" for line in [f"{log}:", *lines[-LOG_LINES:]])


@contextmanager
def scheduler(given: argparse.Namespace) -> Iterator[SpecCluster]:
    """Start a Dask scheduler in this process, as a context."""
    options = {
        "protocol": "tls://",
        "interface": given.interface,
        "security": Security(),  # the files that Dask's configuration names
        **certificates.scheduler_options(given.dashboard),
    }
    with SpecCluster(scheduler={"cls": Scheduler, "options": options}, silence_logs="error") as cluster:
        page = f", dashboard {cluster.dashboard_link}" if given.dashboard else ""
        print(f"scheduler {cluster.scheduler_address}{page}", flush=True)
        yield cluster


def main(system: System, description: str) -> int:
    """Explain the slides, and return the exit status of `wsi-gradcam explain`, or 2 if no job produces a worker."""
    given, explain = parsed(system, description)
    if given.print:
        key = Path.cwd() / ".wsi-gradcam-tls-RUN"
        log = system.log(given.logs.absolute(), "RUN-1")
        print(script(system, given, "RUN-1", "tls://THIS_MACHINE:PORT", key, log), end="")
        return 0
    try:
        with (
            explaining.STOPS.handled(),
            certificates.made_for_this_run(given.dashboard) as key,
            scheduler(given) as cluster,
            Jobs(system, given, cluster, key) as jobs,
        ):
            return explaining.explain(explain, cluster.scheduler_address, QUEUE_S, jobs.tend)
    except explaining.NothingBegunError as error:
        say(f"{Path(sys.argv[0]).name}: error: {error}")
        return 2
    except QueueError as error:
        say(f"{Path(sys.argv[0]).name}: error: {error}; then give the same command again")
        return 1
