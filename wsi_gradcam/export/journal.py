"""The journal of an export: a file in DEST that says what is being written, and what the same command has finished.

It is removed when the export has ended well. One that was killed, or broke off, leaves it: the next export into DEST
deletes the half-written files that it names, and what it finished counts as finished where the same is asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wsi_gradcam.io.local import PARTIAL, wrap_write_errors
from wsi_gradcam.results.run_files import is_name
from wsi_gradcam.system.processes import Process, this_process
from wsi_gradcam.system.timer import PeriodicTimer

NAME = re.compile(rf"\.export\.([0-9a-f]{{32}}){re.escape(PARTIAL)}")
TOUCHED_S = 10.0
SILENT_S = 60.0  # an export elsewhere whose journal is older counts as dead
# Of the folders that exports make, by their endings: the files in them.
CONTENTS = {
    ".ome.zarr": re.compile(
        r"(.*/)?\.z(array|attrs|group|metadata)|(labels/[^/]+/)?[0-9]+(/[0-9]+)+|OME/METADATA\.ome\.xml"
    ),
    "_files": re.compile(r"[0-9]+/[0-9]+_[0-9]+\.png"),
    ".qupath": re.compile(r"overlay-[0-9]+\.png|(patches|regions)\.geojson|show_in_qupath\.groovy"),
}

Line = dict[str, Any]


class Journal:
    """The journal of an export into `dest`, as a context; before that it only gives names."""

    def __init__(self, dest: Path) -> None:
        self._dest, self._mark = dest, uuid.uuid4().hex
        self._file = dest / f".export.{self._mark}{PARTIAL}"
        self._before: list[Line] = []  # of exports that did not end
        self._is_open, self._is_new = False, False
        self._ticker = PeriodicTimer(TOUCHED_S, self._touch, "journal")

    def __enter__(self) -> Self:
        """Clear up after exports that did not end.

        Raises:
            StoreError: DEST cannot be written.
        """
        with wrap_write_errors(self._dest):
            self._is_new = not self._dest.exists()
            self._dest.mkdir(parents=True, exist_ok=True)
            self._is_open = True
            self._add({"process": asdict(this_process())})
            for place in self._others():
                self._clear_up(place)
        self._ticker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticker.__exit__(kind, error, trace)
        with suppress(OSError):
            if error is None:
                self._file.unlink(missing_ok=True)
                if self._is_new:
                    self._dest.rmdir()  # where nothing was made
            else:  # the same command goes on from here
                self._add({"ended": True})

    def partial(self, path: Path) -> Path:
        """Return where a file or folder is written until it is whole, after noting that it is begun."""
        self._add({"begun": self._name(path)})
        return _beside(path, self._mark)

    def replaced(self, path: Path) -> Path:
        """Return where a folder is put until another has taken its place."""
        return _beside(path, self._mark, ".old")

    def made(self, path: Path, job: str) -> None:
        """Note that a file or folder of a job is whole."""
        self._add({"made": self._name(path), "job": job})

    def done(self, paths: list[Path], job: str) -> None:
        """Note that all of a job is there."""
        self._add({"done": [self._name(path) for path in paths], "job": job})

    def was_made(self, path: Path, job: str) -> bool:
        """Return whether an export that did not end has made this for the same job."""
        return {"made": self._name(path), "job": job} in self._before

    def was_done(self, job: str) -> list[Path] | None:
        """Return the files of a job that such an export has finished, where they are still there; else None."""
        for line in self._before:
            if "done" in line and line["job"] == job:
                paths = [self._dest / name for name in line["done"]]
                return paths if all(path.exists() for path in paths) else None
        return None

    def _name(self, path: Path) -> str:
        return path.relative_to(self._dest).as_posix()

    def _add(self, *lines: Line) -> None:
        if not self._is_open:
            return
        with wrap_write_errors(self._file), self._file.open("a", encoding="ascii") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def _touch(self) -> None:
        with suppress(OSError):
            os.utime(self._file)

    def _others(self) -> Iterator[Path]:
        """Yield the journals of exports that did not end."""
        now = self._file.stat().st_mtime  # by the clock of the file system
        for place in sorted(self._dest.iterdir()):
            if NAME.fullmatch(place.name) and place != self._file and place.is_file():
                lines = _lines(place)
                process = _process(lines)
                alive = None if process is None else process.alive()
                silent = alive is None and now - place.stat().st_mtime > SILENT_S
                if alive is False or silent or any("ended" in line for line in lines):
                    yield place

    def _clear_up(self, place: Path) -> None:
        mark, lines = place.name.split(".")[2], _lines(place)
        for line in lines:
            if is_name(str(line.get("begun", ""))):
                path = self._dest / line["begun"]
                remove(_beside(path, mark))
                settle(_beside(path, mark, ".old"), path)
        kept = [line for line in lines if {"made", "done"} & line.keys()]
        self._before += kept
        self._add(*kept)
        place.unlink(missing_ok=True)


def settle(old: Path, path: Path) -> None:
    """Delete a folder that another at `path` has replaced; files that no export makes move there.

    Where nothing is at `path` the old folder goes back there.
    """
    if not os.path.lexists(old):
        return
    if not path.exists():
        old.rename(path)
        return
    if not old.is_symlink():
        for file in _foreign(old, path.name):
            place = path / file.relative_to(old)
            place.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(place):
                file.rename(place)
    remove(old)


def _foreign(folder: Path, name: str) -> list[Path]:
    """Return the files of a folder of this name that are not of an export."""
    ours = [contents for ending, contents in CONTENTS.items() if name.endswith(ending)]
    files = [Path(here, name) for here, _, names in os.walk(folder) for name in names]
    return [file for file in files if ours and not ours[0].fullmatch(file.relative_to(folder).as_posix())]


def remove(path: Path) -> None:
    """Delete a file or folder that was ours alone, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _beside(path: Path, mark: str, kind: str = "") -> Path:
    return path.with_name(f"{path.name}{kind}.{mark}{PARTIAL}")


def _lines(place: Path) -> list[Line]:
    """Return the lines of a journal, without one that was cut short."""
    found = []
    for text in place.read_text(encoding="ascii", errors="replace").splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            found += [line] if isinstance(line, dict) else []
    return found


def _process(lines: list[Line]) -> Process | None:
    with suppress(KeyError, TypeError, IndexError):
        return Process(**lines[0]["process"])
    return None
