"""Kills workers, the scheduler and the client at random moments, and looks whether anything is lost.

    python -m tests.chaos [--kills 30] [--slides 20] [--seed 0] [--store s3]

An archive of real and synthetic slides, one that kills every worker which explains it and one that is damaged, is
explained on three worker processes. Whatever is killed is started again, as SLURM or Kubernetes would; the client by
its user, with the same command. In the end all arrays and tables must be those of an undisturbed run, byte for byte,
the two bad slides must be named with their causes, and no span may have been computed after its record was there.
With `--store s3`, OUT is in a local S3 server behind a proxy that fails 5 % of all requests.

    python -m tests.chaos --command explain|explain-slide-level|audit|evidence|export [--kills 100] [--store s3]

kills one command again and again, without a cluster: see `tests.kills`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.chaos_journal import BEGUN, JOURNAL
from tests.kills import COMMANDS, kill_command
from tests.mirror import bring, url_of
from tests.runs import ROOT, contents, flags, rows_of, toy_file, toy_spec
from tests.s3_proxy import Proxy, at_random, passing
from tests.servers import CREDENTIALS, s3_server
from tests.synthetic import truncate, write_marker_slide
from tests.toy_models import POISON
from wsi_gradcam.api import explain

REAL = ROOT.parent / "shared/data/slides"
WORKERS = 3
POISONED, DAMAGED = "poison.tif", "damaged.tif"
TIMED = {"seconds": "", "row_digest": ""}  # differs from run to run
CAUSES = {POISONED: "workers died repeatedly", DAMAGED: "damaged"}
SETTINGS: dict[str, Any] = {
    "min_tissue": 0.0,
    "heatmap_stride": 8,
    "batch_size": 16,
    "span_patches": 48,
    "engine": "eager",
    "precision": "float32",
    "mpp": 0.5,
}
VICTIMS = ("worker", "scheduler", "client", "worker")
BETWEEN_S = (1.0, 6.0)
COMMAND_S = 900.0


def write_archive(folder: Path, count: int, real: Path = REAL) -> Path:
    """A folder of `count` slides, the two bad ones among them, real ones as far as they are there."""
    folder.mkdir()
    write_marker_slide(folder / POISONED, 390, 500, mpp=0.25, markers=[(200, 200)], marker_px=16)
    whole = write_marker_slide(folder / "whole-0.tif", 700, 900, mpp=0.25, markers=[], marker_px=16).path
    truncate(whole, folder / DAMAGED, 0.5)
    known = [real / "aperio/CMU-1-Small-Region.svs", *sorted((real / "tiff").glob("*rgb-u8.tif"))]
    for path in [path for path in known if path.exists()][: max(1, count // 5)]:
        (folder / path.name).symlink_to(path.resolve())
    dice = random.Random(count)
    for number in range(1, 1 + count - len(list(folder.iterdir()))):
        size = dice.randrange(300, 1500), dice.randrange(300, 1500)
        write_marker_slide(folder / f"whole-{number}.tif", *size, mpp=0.25, markers=[], marker_px=16, seed=number)
    return folder


@dataclass
class Machine:
    """Processes by name; while it is `tended`, those that died are started again."""

    folder: Path
    environment: dict[str, str]
    commands: dict[str, list[str]] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str) -> None:
        """Start a process; what it says is kept in a file of its name."""
        with self.log(name) as log:
            self.running[name] = subprocess.Popen(
                self.commands[name], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    def log(self, name: str) -> IO[bytes]:
        """The file for what a process says."""
        return (self.folder / f"{name}.log").open("ab")

    def kill(self, name: str) -> bool:
        """Kill a process; whether it was there."""
        with self.lock:
            process = self.running.get(name)
            if process is None or process.poll() is not None:
                return False
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True

    @contextmanager
    def tended(self) -> Iterator[None]:
        """Start all, start again what dies, and end all."""
        over = threading.Event()

        def tend() -> None:
            while not over.wait(0.3):
                with self.lock:
                    for name in self.commands:
                        if self.running[name].poll() is not None:
                            self.start(name)

        for name in self.commands:
            self.start(name)
        thread = threading.Thread(target=tend)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            for process in self.running.values():
                process.kill()
                process.wait()


def cluster(folder: Path, journal: Path) -> tuple[Machine, str]:
    """A scheduler and three workers that die of poison, and the scheduler's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    values = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
        POISON: "always",
        JOURNAL: str(journal),
        "OMP_NUM_THREADS": "1",
    }
    dask, address = [sys.executable, "-m", "dask"], f"tcp://127.0.0.1:{port}"
    machine = Machine(folder, values)
    machine.commands["scheduler"] = [*dask, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    for number in range(WORKERS):
        machine.commands[f"worker-{number}"] = [
            *dask,
            "worker",
            address,
            "--nthreads",
            "2",
            "--no-nanny",
            "--no-dashboard",
            "--host",
            "127.0.0.1",
            "--preload",
            "tests.chaos_journal",
            "--death-timeout",
            "60",
        ]
    return machine, address


class Killer(threading.Thread):
    """Kills something every few seconds, so many times."""

    def __init__(self, machine: Machine, kills: int, dice: random.Random) -> None:
        super().__init__()
        self._machine, self._kills, self._dice = machine, kills, dice
        self._over = threading.Event()
        self.killed: list[str] = []

    def run(self) -> None:
        """Until all kills are done, or `stop`."""
        while len(self.killed) < self._kills and not self._over.wait(self._dice.uniform(*BETWEEN_S)):
            kind = VICTIMS[len(self.killed) % len(VICTIMS)]
            name = f"worker-{self._dice.randrange(WORKERS)}" if kind == "worker" else kind
            if self._machine.kill(name):
                self.killed.append(name)

    def stop(self) -> None:
        """No more."""
        self._over.set()
        self.join()


def disturbed(arguments: list[str], machine: Machine, kills: int, dice: random.Random) -> list[str]:
    """Run the command again and again until it ends by itself with all done; returns what was killed."""
    command = [sys.executable, "-m", "wsi_gradcam.cli", *arguments]
    environment = {key: value for key, value in machine.environment.items() if key != POISON}
    killer = Killer(machine, kills, dice)
    end = time.monotonic() + COMMAND_S
    with machine.tended():
        killer.start()
        try:
            while time.monotonic() < end:
                with machine.log("client") as log:
                    client = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
                machine.running["client"] = client
                code = client.wait()
                said = (machine.folder / "client.log").read_text(encoding="utf-8").splitlines()[-1:]
                if code >= 0 and said and re.fullmatch(r"  .*|.* ok; results in .*", said[0]) and not _stopped(said[0]):
                    return killer.killed
        finally:
            killer.stop()
            machine.running.pop("client", None)
    raise AssertionError(f"the command had not ended after {COMMAND_S:.0f} s; see {machine.folder}")


def _stopped(line: str) -> bool:
    return "run the same command again" in line


def computed_twice(journal: Path) -> list[str]:
    """Spans whose work began after their record was there."""
    done: dict[tuple[str, int], float] = {}
    begun: list[tuple[tuple[str, int], float]] = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        event, slide, span, moment, _ = json.loads(line)
        if event == BEGUN:
            begun.append(((slide, span), moment))
        else:
            done[slide, span] = min(moment, done.get((slide, span), moment))
    return [f"{slide} {span}" for (slide, span), moment in begun if moment > done.get((slide, span), moment)]


def problems(out: Path, expected: Path) -> list[str]:
    """What is wrong with the results of a disturbed run."""
    found, wanted = (
        {name: data for name, data in contents(folder).items() if "/" in name and not name.startswith(POISONED)}
        for folder in (out, expected)
    )
    wrong = [f"{name} differs" for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    rows, good = rows_of(out), rows_of(expected)
    for name in sorted({*rows, *good}):
        row, cause = rows.get(name), CAUSES.get(name)
        if row is None:
            wrong.append(f"{name} has no row in slides.csv")
        elif cause is not None and (row["status"] != "failed" or cause not in row["error"]):
            wrong.append(f"{name} should have failed of {cause!r}: {row['status']} {row['error']}")
        elif cause is None and {**row, **TIMED} != {**good.get(name, {}), **TIMED}:
            wrong.append(f"{name} has another row: {row}")
    return wrong


@dataclass(frozen=True)
class Finding:
    """What a disturbed run showed."""

    killed: list[str]
    spans: int
    problems: list[str]


def try_out(folder: Path, archive: Path, expected: Path, kills: int, seed: int, remote: bool = False) -> Finding:
    """One run with so many kills; `remote`: OUT is in the object store that the environment tells of."""
    folder.mkdir()
    journal, out = folder / "journal", folder / "out"
    journal.touch()
    machine, address = cluster(folder / "machine", journal)
    target = url_of(out) if remote else str(out)
    model = toy_file(folder, "poisoned")
    arguments = [
        "explain",
        str(archive),
        "--trust-code",
        "--model",
        str(model),
        "--out",
        target,
        "--scheduler",
        address,
    ]
    killed = disturbed([*arguments, *flags(SETTINGS)], machine, kills, random.Random(seed))
    if remote:
        bring(out)
    twice = [f"{span} was computed again" for span in computed_twice(journal)]
    spans = journal.read_text(encoding="utf-8").count(BEGUN)
    return Finding(killed, spans, problems(out, expected) + twice)


@contextmanager
def flaky_store(seed: int) -> Iterator[Proxy]:
    """An S3 server that fails 5 % of its requests, for this process and those that it starts."""
    with s3_server() as url, passing(url) as proxy:
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=proxy.url)
        proxy.passed.fails = at_random(0.05, seed)
        yield proxy


def undisturbed(folder: Path, archive: Path) -> Path:
    """The results of a run in one process, which nothing kills."""
    explain(archive, toy_spec("poisoned"), folder, **SETTINGS)
    return folder


def _alone(arguments: argparse.Namespace) -> int:
    with ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        remote = arguments.store == "s3"
        if remote:
            os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=stack.enter_context(s3_server()))
        wrong = kill_command(arguments.command, folder, arguments.kills, arguments.seed, remote)
    print("\n".join(wrong))
    return 1 if wrong else 0


def main() -> int:
    """Runs with kills until there were enough; prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=("disk", "s3"), default="disk")
    parser.add_argument("--keep", type=Path, help="a folder for everything, which is kept")
    parser.add_argument("--command", choices=COMMANDS, help="kill this alone, without a cluster")
    arguments = parser.parse_args()
    if arguments.command:
        return _alone(arguments)
    with ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        archive = write_archive(folder / "archive", arguments.slides)
        expected = undisturbed(folder / "expected", archive)
        remote = arguments.store == "s3"
        if remote:
            stack.enter_context(flaky_store(arguments.seed))
        killed: list[str] = []
        wrong: list[str] = []
        for turn in range(arguments.kills):
            if len(killed) >= arguments.kills:
                break
            started = time.monotonic()
            kills, seed = max(1, arguments.kills // 2), arguments.seed + turn
            found = try_out(folder / f"run-{turn}", archive, expected, kills, seed, remote)
            killed += found.killed
            wrong += found.problems
            seconds = time.monotonic() - started
            print(f"run {turn}: {len(found.killed)} kills, {found.spans} spans begun, {seconds:.0f} s", flush=True)
            print("\n".join(f"  {problem}" for problem in found.problems), flush=True)
    kinds = {kind: sum(name.startswith(kind) for name in killed) for kind in ("worker", "scheduler", "client")}
    print(f"{len(killed)} kills ({kinds}), {len(wrong)} problems")
    return 1 if wrong or len(killed) < arguments.kills else 0


if __name__ == "__main__":
    sys.exit(main())
