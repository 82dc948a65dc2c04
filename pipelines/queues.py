"""What recipes for clusters with a queue share: each worker is a job; the recipe is their scheduler.

A recipe (slurm.py, pbs.py, lsf.py, sge.py, htcondor.py) says what its queue is told and how it is asked. Job scripts
are dask-jobqueue's. What happens to jobs is seen to here, as dask-jobqueue waits for ever for jobs that never come:

- Jobs are submitted once `explain` has found its arguments right and reached the scheduler.
- A first job that the queue refuses ends the run with the queue's own words. Later ones are tried again.
- The queue is asked for its jobs again and again. Why jobs wait is told. One that ended, or whose worker is gone, is
  told with the last lines of its log and replaced; and where job after job ends without a worker, the run ends.
- At the end, and after Ctrl-C or SIGTERM, all jobs are cancelled. If this process is killed workers end by themselves.
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

QUEUE_S = 86_400  # the queue may let a run wait for workers so long
COMMAND_S = 120  # for a command of the queue; SLURM's wait some 10 s for a controller that is away
ASKED_S = (2.0, 30.0)  # between two questions to the queue: the first after something happened, and the last
GONE_S = 20.0  # a job that runs on without its worker for so long is replaced, such as one on a lost node
YOUNG_S = 60.0  # a worker that lived for less is no success
LONGEST_PAUSE_S = 300.0  # before a job is replaced, after many that ended at once
TRIES = 2  # jobs beyond those wanted that may end without a worker before the run is given up
LOG_LINES, LOG_BYTES = 5, 8192
HERE = Path(__file__).parent
EACH_GPU = HERE / "each_gpu.py"
# Dask's processes import from their folder for scratch files, which must not be one that others made.
SCRATCH = ("export DASK_TEMPORARY_DIRECTORY=`mktemp -d`", "trap 'rm -rf \"$DASK_TEMPORARY_DIRECTORY\"' EXIT")


def imported() -> ModuleType:
    """Return dask-jobqueue, imported without two things that its import does besides.

    It has Ctrl-C end the process with 0 (`dask_jobqueue.runner`), and writes a file into the home folder.
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
    """What the queue says of a job: that it waits, runs, or is over; in its own words; and whether it can never run."""

    state: str
    words: str = ""
    hopeless: bool = False


class QueueError(Exception):
    """The queue refuses, or does not answer; in its own words."""


class System(ABC):
    """A queueing system, as far as it is needed: what it is told of a job, and what it says of jobs."""

    name: str
    job: Any  # dask-jobqueue's class, which writes the job script
    submit: tuple[str, ...]  # reads the script from standard input
    cancel: tuple[str, ...]  # ids follow
    logs: str  # default folder
    job_id = r"(\d+)"  # in what `submit` prints
    forgotten = r"$^"  # what the queue says, as an error, of jobs that it no longer knows

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments that only this system has."""
        parser.add_argument("--gpus", type=positive, default=0, help="GPUs of a job, one worker each (default none)")

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
    add("--partition", "--queue", dest="queue", help=f"{system.name}'s name of the queue")
    add("--account", help="whom the queue charges")
    add("--workers", type=positive, default=2, metavar="JOBS", help="jobs (default 2); one worker each, or one a GPU")
    add("--minimum", type=positive, help="keep that many jobs only while there is little to do (default: all)")
    add("--cpus", type=positive, default=4, help="cores of a job (default 4)")
    add("--memory", type=memory, default="8GiB", help="memory of a job (default 8GiB)")
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--hours", type=positive, help="time of a job in whole hours (default 4)")
    times.add_argument("--time", type=duration, help="the same to the second, as SLURM reads it: 0:30:00, 90, 1-12")
    add("--directive", type=directive, action="append", default=[], help="one more line for the queue; may be repeated")
    system.add_arguments(parser)
    add("--interface", help="network that the nodes share, such as ib0")
    add("--dashboard", default="", help="address of Dask's page, such as 127.0.0.1:8787 (default: none)")
    add("--logs", type=Path, default=Path(system.logs), help=f"folder for what jobs print (default {system.logs})")
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

    Two threads a worker: one has patches read for the other. Seven beside a GPU, of which four are for it. A worker
    leaves before its job's time is over, 15 minutes before it if that is not too much.
    """
    gpus, margin = system.gpus(given), min(900, given.seconds // 4)
    # No limit of Dask's: a worker it pauses waits for ever, as torch never gives memory back. The queue's limit holds.
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
        cores=7 if gpus else 2,  # Dask's word for threads
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
    """Return what a command of the queue prints, whatever Ctrl-C does meanwhile; `forgotten` is no error.

    Raises:
        QueueError: there is no such command, it takes too long, or it fails; with its own last words.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=COMMAND_S, check=True, start_new_session=True
        )
    except FileNotFoundError:
        raise QueueError(f"{command[0]}: there is no such command here; start this where jobs are submitted") from None
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
    """A job that was submitted, and what is known of it.

    Attributes:
        name: of its worker; workers of several GPUs are NAME.0, NAME.1, ...
        came: when its first worker came, None before.
        gone: since when it has had none any more.
        unknown: how often in a row the queue has not named it.
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
        """See to the jobs, once; to be called again and again.

        Raises:
            NothingBegunError: the first job is refused, or no job brings a worker; and none has come.
            QueueError: the same, after workers had come.
        """
        clients, names = self._cluster.sync(self._look)
        if not clients and not self._submitted:  # `explain` has still to find its arguments right
            return
        now = time.monotonic()
        self._compare(names, now)
        if self._jobs and now >= self._ask_at:
            self._ask(now)
        self._size(now)
        if len(self._jobs) < self._wanted and time.monotonic() >= self._not_before:
            self._submit()

    async def _look(self) -> tuple[int, set[str]]:
        """Return how many clients the scheduler has beside its own, and the names of jobs that have workers."""
        scheduler = self._scheduler
        clients = [name for name in scheduler.clients if name != "fire-and-forget"]
        return len(clients), {str(worker.name).partition(".")[0] for worker in scheduler.workers.values()}

    def _compare(self, names: set[str], now: float) -> None:
        """See which jobs have workers now."""
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
        """Ask the queue soon, as something has happened."""
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
                say(f"the queue cannot be asked for jobs ({error}); it is asked again")
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
        """Replace a job that is over, or runs without its worker."""
        job.unknown = job.unknown + 1 if found is None else 0
        if job.unknown >= 2 or (found is not None and found.state == OVER):  # one listing may be too early
            self._over(job, found.words if found is not None and found.words else "it is gone from the queue", now)
        elif job.gone is not None and now - job.gone > GONE_S:
            self._cancel([job])
            self._over(job, f"its worker has been gone for {GONE_S:g} s; it is cancelled", now)

    def _over(self, job: Job, words: str, now: float) -> None:
        """Tell of a job that is over, and when it may be replaced."""
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
            self._give_up(f"{self._failed} jobs in a row have ended so; the last: {told}; its log is {job.log}")

    def _tell_why(self, waiting: list[Seen]) -> None:
        """Tell each new reason for which jobs wait; none can ever run where all have a reason that does not pass."""
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
        """Have as many jobs as there is work for, where there may be fewer; fewer only when that is so for long."""
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
        """Return how many workers Dask would have for the work that there is."""
        return int(self._scheduler.adaptive_target())

    async def _retired(self, count: int) -> set[str]:
        """Let so many idle workers leave; return the names of their jobs."""
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
        """Submit the jobs that are wanted; the first one that is refused ends all, later ones are tried again."""
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
                    raise QueueError(f"{self._system.submit[0]} says {answer.strip()!r}, which names no job")
            except QueueError as error:
                self._refuse(error)
                return
            self._submitted, self._refused = True, 0
            self._jobs.append(Job(name, found[1], Path(str(log).replace("%j", found[1]))))
            self._soon(time.monotonic())

    def _refuse(self, error: QueueError) -> None:
        """Tell of a submission that failed."""
        if not self._submitted:
            raise explaining.NothingBegunError(str(error)) from error
        self._refused += 1
        pause = min(LONGEST_PAUSE_S, 2.0**self._refused)
        self._not_before = time.monotonic() + pause
        if self._refused == 1:
            say(f"a job was not taken ({error}); it is tried again")

    def _cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel jobs; where that fails, tell how to."""
        if not jobs:
            return
        command = [*self._system.cancel, *(job.id for job in jobs)]
        try:
            asked(command)
        except QueueError as error:
            say(f"jobs could not be cancelled ({error}); see to it yourself: {shlex.join(command)}")


def say(text: str) -> None:
    """Tell the user something."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def last_lines(log: Path) -> str:
    """Return the last lines of a job's log, one a line after a first that names it; "" where there is none."""
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
    """Explain the slides, and return the exit status of `wsi-gradcam explain`; or 2 where no job brings a worker."""
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
