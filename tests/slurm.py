"""A real SLURM of two nodes on this machine, of Debian's packages; without munge, systemd, cgroups or root.

python -m tests.slurm FOLDER      start one, say how to use it, and end it with Ctrl-C
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.runs import ROOT, SMALL, contents, flags, rows_of, toy_file
from tests.synthetic import write_marker_slide
from tests.toy_models import SLOWNESS_S
from wsi_gradcam.api import explain

NODES, CORES, MEMORY_MB, GPUS = ("n1", "n2"), 8, 32_000, 4
STARTED_S, LONG_S = 60, 120
HAS_SLURM = all(
    shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("slurmctld", "slurmd", "sbatch")
)
CONTROLLER = "slurmctld"
# SlurmdTimeout: how soon a node whose slurmd is away is said to be down. MinJobAge: how long squeue names ended jobs.
CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=20
KillWait=5
MinJobAge=30
GresTypes=gpu
JobSubmitPlugins=lua
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cores} RealMemory={memory} \
Gres=gpu:{gpus} State=UNKNOWN
PartitionName=cpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n[1-2] MaxTime=10 State=UP
"""
# An administrator's limit on submitted jobs wants a database; this does the same.
LUA = """\
function slurm_job_submit(description, partitions, user)
  local file = io.open("{folder}/refuse", "r")
  if file ~= nil then
    file:close()
    slurm.log_user("no more than one job for you")
    return 2050
  end
  return slurm.SUCCESS
end
function slurm_job_modify(description, record, partitions, user)
  return slurm.SUCCESS
end
return slurm
"""


@dataclass
class Slurm:
    """A SLURM whose files are in a folder.

    Attributes:
        daemons: processes of `slurmctld` and of the nodes' `slurmd`, by name.
    """

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What commands of SLURM want."""
        path = f"{os.environ['PATH']}:/usr/sbin"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}

    def start(self, name: str) -> None:
        """Start a daemon that does not run."""
        conf = str(self.folder / "slurm.conf")
        node = [] if name == CONTROLLER else ["-N", name]
        self.daemons[name] = subprocess.Popen(
            [CONTROLLER if name == CONTROLLER else "slurmd", "-D", "-f", conf, *node],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self, name: str) -> None:
        """Kill a daemon."""
        self.daemons[name].kill()
        self.daemons[name].wait()

    def crash(self, node: str) -> None:
        """Kill all processes of a node at once: its slurmd, what it started for jobs, and these."""
        victims = [self.daemons[node].pid, *(process.pid for process in self.steps(node, True))]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons[node].wait()

    def steps(self, node: str = "", itself: bool = False) -> list[psutil.Process]:
        """Processes of jobs on a node, or on all: what slurmstepd started, and if wanted `itself`."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                at = environment.get("SLURMD_NODENAME", "")
                if environment.get("SLURM_CONF") == str(self.folder / "slurm.conf") and at and at == (node or at):
                    found[process.pid] = process
                    parent = process.parent()
                    if itself and parent is not None and "slurmstepd" in parent.name():
                        found[parent.pid] = parent
        return list(found.values())

    def said(self, *command: str) -> str:
        """What a command of SLURM prints."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def jobs(self) -> dict[str, str]:
        """State of each job that is not over, by its id."""
        return dict(line.split() for line in self.said("squeue", "-h", "-o", "%i %T").splitlines())

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until there is no job any more."""
        deadline = time.monotonic() + seconds
        while jobs := self.jobs():
            assert time.monotonic() < deadline, f"jobs are left: {jobs}"
            time.sleep(0.2)

    def wait_for_nodes(self) -> None:
        """Wait until all nodes can take jobs."""
        deadline = time.monotonic() + STARTED_S
        while time.monotonic() < deadline:
            with suppress(subprocess.CalledProcessError):
                if self.said("sinfo", "-h", "-N", "-p", "cpu", "-t", "idle,mix,alloc", "-o", "%N").split() == [*NODES]:
                    return
            time.sleep(0.1)
        raise AssertionError(f"SLURM has not started: {self.folder}/*.log")

    def close(self) -> None:
        """End all jobs and daemons."""
        for name in list(self.daemons):
            self.kill(name)
        for process in self.steps(itself=True):
            with suppress(psutil.Error):
                process.kill()


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that are free."""
    for first in range(20_000 + os.getpid() % 10_000, 60_000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


def devices() -> str:
    """Device files that SLURM takes for GPUs: any do, if their names end in numbers."""
    for kind in ("tty", "loop", "ram"):
        if all(Path(f"/dev/{kind}{number}").exists() for number in range(GPUS)):
            return f"/dev/{kind}[0-{GPUS - 1}]"
    pytest.skip("this machine has no numbered devices that could stand for GPUs")


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A SLURM, with fake GPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", *NODES):
        (folder / name).mkdir()
    port = free_ports(1 + len(NODES))
    values: Mapping[str, object] = {
        "user": getpass.getuser(),
        "folder": folder,
        "port": port,
        "first": port + 1,
        "last": port + len(NODES),
        "cores": CORES,
        "memory": MEMORY_MB,
        "gpus": GPUS,
    }
    (folder / "slurm.conf").write_text(CONF.format(**values), encoding="utf-8")
    (folder / "job_submit.lua").write_text(LUA.format(folder=folder), encoding="utf-8")
    (folder / "gres.conf").write_text(f"Name=gpu File={devices()}\n", encoding="utf-8")
    made = Slurm(folder)
    try:
        for name in (CONTROLLER, *NODES):
            made.start(name)
        made.wait_for_nodes()
        yield made
    finally:
        made.close()


# --- the recipe on it ------------------------------------------------------------------------------------------------

TIMED = {"seconds": "", "row_digest": ""}  # differs from run to run


def made_slides(folder: Path, count: int) -> Path:
    """A folder with slides, a model that takes its time, and its results in this process."""
    (folder / "slides").mkdir(parents=True)
    for number in range(count):
        path = folder / f"slides/{number}.tif"
        write_marker_slide(path, 390, 500, mpp=0.25, markers=[(200, 200)], marker_px=16, seed=number)
    model = str(toy_file(folder, "slow_linear"))
    explain(folder / "slides", model, folder / "serial", trust_code=True, **SMALL)
    return folder


class Driver:
    """The recipe in a process of its own, and what it has said."""

    def __init__(self, running: Slurm, at: Path, *arguments: str, slowness_s: float = 0.0) -> None:
        at.mkdir(exist_ok=True)
        self.said_file = at / "said"
        command = [sys.executable, str(ROOT / "pipelines/slurm.py"), "--cpus", "1", "--memory", "2GiB", *arguments]
        environment = {**running.environment, "OMP_NUM_THREADS": "1", SLOWNESS_S: str(slowness_s)}
        self.began = time.monotonic()
        with self.said_file.open("wb") as file:
            self.process = subprocess.Popen(command, cwd=at, env=environment, stdout=file, stderr=file)

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self.said_file.read_text(encoding="utf-8")

    def wait(self, seconds: float) -> int:
        """Its exit status, within so many seconds from now."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {seconds} s:\n{self.said}") from None

    def until(self, what: Callable[[], object], seconds: float = LONG_S) -> None:
        """Waits until something holds, within so many seconds."""
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, f"it has ended with {self.process.returncode}:\n{self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)


@contextmanager
def driver(running: Slurm, at: Path, *arguments: str, slowness_s: float = 0.0) -> Iterator[Driver]:
    """A recipe that is killed at the end if it has not ended."""
    made = Driver(running, at, *arguments, slowness_s=slowness_s)
    try:
        yield made
    finally:
        for child in psutil.Process(made.process.pid).children(recursive=True) if made.process.poll() is None else []:
            with suppress(psutil.Error):
                child.kill()
        made.process.kill()
        made.process.wait()


def explaining(made: Path, out: Path) -> list[str]:
    """Arguments of `explain`."""
    model = ["--trust-code", "--model", str(made / "slow_linear.yaml")]
    return [str(made / "slides"), *model, "--out", str(out), *flags(SMALL)]


def differences(out: Path, expected: Path) -> list[str]:
    """Names of results that differ; slides come in any order."""
    found, wanted = contents(out), contents(expected)
    names = {*found, *wanted} - {"slides.csv"}
    rows = [{name: {**row, **TIMED} for name, row in rows_of(folder).items()} for folder in (out, expected)]
    return [name for name in sorted(names) if found.get(name) != wanted.get(name)] + ["rows"] * (rows[0] != rows[1])


def ours(running: Slurm) -> dict[str, str]:
    """States of the recipe's jobs by id."""
    lines = running.said("squeue", "-h", "-n", "wsi-gradcam", "-o", "%i %T").splitlines()
    return dict(line.split() for line in lines)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with slurm(Path(sys.argv[1]).absolute()) as running, suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={running.folder}/slurm.conf", flush=True)
        signal.pause()
