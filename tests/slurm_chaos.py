"""Kills driver, jobs, nodes and controller of a real SLURM at random moments, and looks whether anything is lost.

    python -m tests.slurm_chaos [--kills 30] [--slides 12] [--seed 0] [--keep FOLDER]

Slides are explained by the recipe with two jobs. What is killed of SLURM is started again after some seconds, as an
administrator's systemd would; the driver by its user, with the same command. In the end all results must be those of an
undisturbed run, byte for byte, and no job may be left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from tests.slurm import CONTROLLER, NODES, Driver, Slurm, differences, explaining, made_slides, ours, slurm

VICTIMS = ("driver", "cancelled job", "workers", "node", "slurmd", CONTROLLER)
BETWEEN_S, AWAY_S = (2.0, 8.0), (1.0, 8.0)
RUN_S, LEFT_S = 1200.0, 120.0
SLOWNESS = 0.5  # seconds a batch: some 40 s a slide


class Killer(threading.Thread):
    """Kills something every few seconds, and has it started again."""

    def __init__(self, running: Slurm, kills: int, dice: random.Random) -> None:
        super().__init__()
        self._slurm, self._kills, self._dice = running, kills, dice
        self._over = threading.Event()
        self.driver: Driver | None = None
        self.killed: list[str] = []

    def run(self) -> None:
        """Until all kills are done, or `stop`."""
        while len(self.killed) < self._kills and not self._over.wait(self._dice.uniform(*BETWEEN_S)):
            kind = self._dice.choice(VICTIMS)
            with suppress(subprocess.SubprocessError, psutil.Error):
                if self._kill(kind):
                    self.killed.append(kind)

    def _kill(self, kind: str) -> bool:
        """Kill one; whether it was there."""
        if kind == "driver":
            if self.driver is None or self.driver.process.poll() is not None or not ours(self._slurm):
                return False
            self.driver.process.kill()
        elif kind == "cancelled job":
            jobs = sorted(ours(self._slurm))
            if not jobs:
                return False
            self._slurm.said("scancel", self._dice.choice(jobs))
        elif kind == "workers":
            found = self._slurm.steps(self._dice.choice(NODES))
            for process in found:
                process.kill()
            return bool(found)
        elif kind == "node":
            self._away(self._dice.choice(NODES), crash=True)
        else:
            self._away(CONTROLLER if kind == CONTROLLER else self._dice.choice(NODES))
        return True

    def _away(self, name: str, crash: bool = False) -> None:
        """Kill a daemon, or all of a node, and start it again after a while."""
        (self._slurm.crash if crash else self._slurm.kill)(name)
        self._over.wait(self._dice.uniform(*AWAY_S))
        self._slurm.start(name)

    def stop(self) -> None:
        """No more."""
        self._over.set()
        self.join()


def disturbed(folder: Path, running: Slurm, made: Path, kills: int, dice: random.Random) -> tuple[list[str], list[str]]:
    """Give the command again and again until all is done; returns what was killed, and what is wrong then."""
    killer, turn = Killer(running, kills, dice), 0
    arguments = explaining(made, folder / "out")
    end = time.monotonic() + RUN_S
    folder.mkdir()
    killer.start()
    try:
        status = -1
        while status != 0:
            killer.driver = Driver(running, folder / f"driver-{turn}", *arguments, slowness_s=SLOWNESS)
            turn += 1
            try:
                status = killer.driver.process.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                killer.driver.process.kill()
                return killer.killed, [f"not done after {RUN_S:g} s; see {folder}"]
    finally:
        killer.stop()
        if killer.driver is not None:
            killer.driver.process.kill()
    running.wait_for_nodes()
    try:
        running.wait_until_idle(LEFT_S)
    except AssertionError as error:
        return killer.killed, [str(error)]
    return killer.killed, [f"{name} differs" for name in differences(folder / "out", made / "serial")]


def main() -> int:
    """Run with kills until there were enough; print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--slides", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for everything, which is kept")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        folder = (given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        made = made_slides(folder / "made", given.slides)
        running = stack.enter_context(slurm(folder / "slurm"))
        killed: list[str] = []
        wrong: list[str] = []
        for turn in range(given.kills):
            began = time.monotonic()
            dice = random.Random(given.seed + turn)
            kills = min(given.kills - len(killed), max(1, given.kills // 2))
            found, problems = disturbed(folder / f"run-{turn}", running, made, kills, dice)
            killed, wrong = killed + found, wrong + problems
            print(f"run {turn}: killed {', '.join(found)}; {time.monotonic() - began:.0f} s", flush=True)
            print("".join(f"  {problem}\n" for problem in problems), end="", flush=True)
            if len(killed) >= given.kills:
                break
    print(f"{len(killed)} kills ({dict(Counter(killed))}), {len(wrong)} problems")
    return 1 if wrong or len(killed) < given.kills else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
