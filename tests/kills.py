"""Kills `explain`, `audit`, `evidence` and `export` at random, and looks whether the same command makes the same bytes.

    python -m tests.chaos --command explain|explain-slide-level|audit|evidence|export [--kills 100] [--store s3]

Each command is begun in a fresh process and killed (SIGKILL), again and again; then it may end, and what it has made is
compared with what an undisturbed one makes: every byte, nothing half-written left, and `validate` is silent.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.audits import QUICK, metrics_in, pieces_in, reports_in
from tests.evidence_runs import explained, model_file, of_nuclei_and_marker, write_archive
from tests.made_results import Made, make, steps
from tests.mirror import bring, send, url_of
from tests.runs import SMALL, differing, toy_spec
from tests.synthetic import write_marker_slide
from tests.test_mil_runs import write_model
from wsi_gradcam.api import explain, validate
from wsi_gradcam.results.seals import is_account

SLIDE_LEVEL = "explain-slide-level"
COMMANDS = ("explain", SLIDE_LEVEL, "audit", "evidence", "export")
FORMATS = ("deepzoom", "ome-zarr-0.4", "geojson", "ome-tiff", "png")
PER_TURN = 10  # kills, before the command may end
END_S = 600.0
ASK: dict[str, Any] = {**QUICK, "only": ["saturation"]}


def carry_out(command: str, given: dict[str, Any], environment: dict[str, str]) -> None:
    """Do a command in a process that is about to be killed."""
    os.environ.update(environment)
    if command == "explain":
        explain(given["slides"], toy_spec("pooled_linear"), given["out"], **SMALL)
    elif command == SLIDE_LEVEL:
        explain(given["slides"], given["model"], given["out"], trust_code=True, **SMALL)
    elif command == "audit":
        from wsi_gradcam import audit_run

        audit_run(given["out"], trust_code=True, **ASK)
    elif command == "evidence":
        from wsi_gradcam import evidence_run

        evidence_run(given["out"], trust_code=True, places=320, seed=1)
    else:
        from wsi_gradcam.export import export

        done = export(given["out"], given["to"], given["dest"], window="slide")
        assert {each.error for each in done} == {""}, done


@dataclass
class Command:
    """A command to be killed, what it begins with, and how what it made is judged.

    Attributes:
        folder: for all of it.
        remote: OUT is in the object store that the environment tells of.
    """

    name: str
    folder: Path
    remote: bool
    killed: int = 0
    problems: list[str] = field(default_factory=list)
    lasts_s: float = 0.0

    def __post_init__(self) -> None:
        slides = self.folder / "slides"
        slides.mkdir(parents=True)
        for number in range(2):
            write_marker_slide(
                slides / f"{number}.tif", 200, 264, mpp=0.25, markers=[(60, 60)], marker_px=16, seed=number
            )
        self.start, self.expected = self.folder / "start", self.folder / "expected"
        if self.name == "export":
            make(self.start, {f"{n}.svs": Made((900, 1300), steps((57, 82), seed=n)) for n in range(2)})
            if self.remote:
                send(self.start)
        elif self.name == SLIDE_LEVEL:
            write_model(self.folder / "model")
        elif self.name == "audit":
            explain(slides, toy_spec("pooled_linear"), self.start, **SMALL)
        elif self.name == "evidence":
            archive, network = self.folder / "archive", self.folder / "network"
            archive.mkdir()
            network.mkdir()
            explained(write_archive(archive, 8, 2, seed=3), model_file(network, of_nuclei_and_marker(0)), self.start)
        self._whole("deepzoom")

    def kill_until(self, kills: int, dice: random.Random, tell: Callable[[str], None]) -> None:
        """Kill it so many times, in turns, each of which ends with a comparison."""
        turn = 0
        while self.killed < kills:
            before, began = self.killed, time.monotonic()
            to = FORMATS[turn % len(FORMATS)]
            if self.name == "export" and turn:
                self._whole(to)
            out = self.folder / f"turn-{turn}"
            self._prepare(out)
            while self.killed - before < min(PER_TURN, kills - before) and self._killed_once(out, to, dice):
                self.killed += 1
                if self._had_ended(out):
                    break
            if not self._had_ended(out):
                self._end(out, to)
            found = self._judged(out)
            self.problems += [f"turn {turn}: {problem}" for problem in found]
            tell(f"turn {turn}: {self.killed - before} kills, {len(found)} problems, {time.monotonic() - began:.0f} s")
            shutil.rmtree(out, ignore_errors=True)
            turn += 1

    def _whole(self, to: str) -> None:
        """Make what an undisturbed command makes."""
        shutil.rmtree(self.expected, ignore_errors=True)
        self._prepare(self.expected)
        self._end(self.expected, to)
        self.lasts_s = self._seconds(self.expected, to)
        if self.remote and self.name != "export":
            bring(self.expected)

    def _seconds(self, out: Path, to: str) -> float:
        """Return how long the command takes, without the start of a process."""
        began, again = time.monotonic(), self.folder / "timed"
        self._prepare(again)
        self._end(again, to)
        lasts = time.monotonic() - began
        shutil.rmtree(again, ignore_errors=True)
        return lasts

    def _prepare(self, out: Path) -> None:
        if self.name in ("audit", "evidence"):
            shutil.copytree(self.start, out)
            if self.remote:
                send(out)

    def _process(self, out: Path, to: str) -> Any:
        shown = url_of(out) if self.remote else str(out)
        given: dict[str, Any] = {"slides": str(self.folder / "slides"), "out": shown, "to": to}
        given["model"] = str(self.folder / "model" / "slides.yaml")
        if self.name == "export":
            given |= {"out": url_of(self.start) if self.remote else str(self.start), "dest": str(out)}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.doomed", "tests.kills"])
        names = [name for name in os.environ if name.startswith("AWS_")]
        process = context.Process(target=carry_out, args=(self.name, given, {name: os.environ[name] for name in names}))
        process.start()
        return process

    def _killed_once(self, out: Path, to: str, dice: random.Random) -> bool:
        """Begin the command and kill it at some moment; False where it had ended before."""
        process = self._process(out, to)
        process.join(dice.uniform(0, self.lasts_s))
        alive: bool = process.is_alive()
        if alive:
            with suppress(ProcessLookupError):  # it ends just now
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        if not alive and process.exitcode:
            self.problems.append(f"ended with {process.exitcode}")
        return alive and process.exitcode == -signal.SIGKILL

    def _had_ended(self, out: Path) -> bool:
        """Return True where the last one was killed when nothing was left to do: an export takes no files twice."""
        return self.name == "export" and bool(_files(out)) and not list(out.glob(".export.*"))

    def _end(self, out: Path, to: str) -> None:
        process = self._process(out, to)
        process.join(END_S)
        if process.exitcode:
            self.problems.append(f"the command ended with {process.exitcode} when nothing killed it")
        process.close()

    def _judged(self, out: Path) -> list[str]:
        """Return what is wrong with what was made."""
        place: Any = out
        if self.remote and self.name != "export":
            bring(out)
            place = url_of(out)
        wrong = [f"{path} is left" for path in out.rglob("*") if ".partial" in path.name or path.name == "claim.json"]
        if self.name == "export":
            one, other = _files(out), _files(self.expected)
            return wrong + [f"{name} differs" for name in {*one, *other} if one.get(name) != other.get(name)]
        wrong += [f"validate: {finding}" for finding in validate(place)]
        if self.name == "evidence":
            one, other = (_files(folder / "evidence") for folder in (out, self.expected))
            names = {name for name in {*one, *other} if not is_account(name)}
            return wrong + [f"{name} differs" for name in names if one.get(name) != other.get(name)]
        if self.name == "audit":
            for read in (pieces_in, metrics_in, reports_in):
                wrong += [] if read(out) == read(self.expected) else [f"{read.__name__} differ"]
            return wrong
        return wrong + [f"{name} differs" for name in differing(out, self.expected)]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_command(name: str, folder: Path, kills: int, seed: int, remote: bool = False, tell: Any = print) -> list[str]:
    """Kill a command so many times; return the problems that were found."""
    command = Command(name, folder, remote)
    command.kill_until(kills, random.Random(seed), tell)
    where = "in the object store" if remote else "on a disk"
    tell(f"{name} {where}: {command.killed} kills, {len(command.problems)} problems")
    return command.problems
