"""The export of one slide: its options, and files that appear only when complete and replace others only on request."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wsi_gradcam.errors import ConfigError, StoreError
from wsi_gradcam.geometry import Region, tiles
from wsi_gradcam.io.local import PARTIAL, LocalPath, wrap_write_errors
from wsi_gradcam.results.display import ChannelInfo, Colouring, check_colormap
from wsi_gradcam.results.run_files import is_name
from wsi_gradcam.results.seals import (
    EXPORTS,
    JOURNAL,
    contents_of,
    export_digest,
    journal_lines,
    read_exports,
    sealed_json,
)
from wsi_gradcam.results.slide import SlideResult
from wsi_gradcam.system.processes import PeriodicTimer, Process, this_process

if TYPE_CHECKING:
    from numpy.typing import NDArray

MADE_BY = {"Software": "wsi_gradcam"}  # tells a search for slides that a picture is not one
SLIDE, RUN, BOUNDS = "slide", "run", "bounds"
MAX_SIMPLIFY_PX = 100
HALF = 0.5  # the share of the window at which regions begin without a threshold


# The journal of an export is a file in DEST, which is removed when everything has ended well. An export that was
# killed, or broke off, leaves it: the next one into DEST deletes the half-written files that it names, and does not
# write finished ones again if the same is requested. The journal also has the digests of what is done: they enter the
# listing at the end, for all slides at once, or when the next export reads the journal.
TOUCHED_S = 10.0
SILENT_S = 60.0  # seconds; an export elsewhere whose journal is older counts as dead

Line = dict[str, Any]


class Journal:
    """The journal of an export into `dest`, as a context; before that, it only provides names."""

    def __init__(self, dest: Path) -> None:
        self._dest, self._mark = dest, uuid.uuid4().hex
        self._file = dest / f".export.{self._mark}{PARTIAL}"
        self._before: list[Line] = []  # from exports that did not end
        self._digests: dict[str, str] = {}  # to be listed; "" for what was replaced by something unknown
        self._is_open, self._is_new = False, False
        self._ticker = PeriodicTimer(TOUCHED_S, self._touch, "journal")

    def __enter__(self) -> Self:
        """Clear up after exports that did not end.

        Raises:
            StoreError: DEST cannot be written, or its listing is damaged.
        """
        self._check_listing()
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
        try:
            self._write_listing()
        except (StoreError, OSError):
            self._break_off()
            if error is None:
                raise
            return
        if error is not None:
            self._break_off()
            return
        with suppress(OSError):
            self._file.unlink(missing_ok=True)
            if self._is_new:
                self._dest.rmdir()  # if nothing was made

    def _break_off(self) -> None:
        """Record that this export stops here, and that the same command continues it."""
        with suppress(StoreError, OSError):
            self._add({"ended": True})

    def _check_listing(self) -> dict[str, str]:
        try:
            return read_exports(LocalPath(self._dest / EXPORTS))
        except ValueError as error:
            raise StoreError(
                f"{self._dest / EXPORTS}: damaged, or none of ours; delete it, then `validate` does not know what was "
                "exported before"
            ) from error

    def _write_listing(self) -> None:
        """Write the digests of what was made into the listing, alongside those of other exports."""
        if not self._digests:
            return
        place = LocalPath(self._dest)

        def changed(_: bytes | None) -> bytes | None:  # nobody else writes it meanwhile
            for half in self._dest.glob(f"{EXPORTS}.*{PARTIAL}"):
                half.unlink(missing_ok=True)
            before = self._check_listing()
            kept = {name: text for name, text in before.items() if self._digests.get(name, text)}
            for name in before.keys() - kept.keys():  # a job that broke off may have left it unchanged
                if export_digest(place, name) == before[name]:
                    kept[name] = before[name]
            files = kept | {name: text for name, text in self._digests.items() if text}
            return None if files == before else sealed_json({"files": dict(sorted(files.items()))}, indent=1)

        (place / EXPORTS).update(changed)

    def partial(self, path: Path, job: str) -> Path:
        """Return where a file or folder of a job is written until it is complete, after recording that it was begun."""
        self._add({"begun": self._name(path), "job": job, "new": not path.exists() or self.was_made(path, job)})
        return _beside(path, self._mark)

    def replaced(self, path: Path) -> Path:
        """Return where a folder is kept until another has taken its place."""
        return _beside(path, self._mark, ".old")

    def done(self, paths: list[Path], job: str) -> None:
        """Record that everything of a job exists."""
        names = [self._name(path) for path in paths]
        files = {name: export_digest(LocalPath(self._dest), name) for name in names} if self._is_open else {}
        self._add({"done": names, "job": job, "files": files})

    def was_made(self, path: Path, job: str) -> bool:
        """Return whether an export that did not end has already made this for the same job."""
        return {"begun": self._name(path), "job": job, "new": True} in self._before

    def was_done(self, job: str) -> list[Path] | None:
        """Return the files of a job that such an export has finished, if they still exist; else None."""
        for line in self._before:
            if "done" in line and line.get("job") == job:
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
        for line in lines:
            if "begun" in line:
                self._digests[line["begun"]] = ""
            self._digests |= line.get("files", {})

    def _touch(self) -> None:
        with suppress(OSError):
            os.utime(self._file)

    def _others(self) -> Iterator[Path]:
        """Yield the journals of exports that did not end."""
        now = self._file.stat().st_mtime  # by the clock of the file system
        for place in sorted(self._dest.iterdir()):
            if JOURNAL.fullmatch(place.name) and place != self._file and place.is_file():
                lines = _lines(place)
                process = _process(lines)
                alive = None if process is None else process.alive()
                silent = alive is None and now - place.stat().st_mtime > SILENT_S
                if alive is False or silent or any("ended" in line for line in lines):
                    yield place

    def _clear_up(self, place: Path) -> None:
        mark, kept = place.name.split(".")[2], []
        for line in _lines(place):
            if "done" in line:
                kept.append(line)
            elif "begun" in line:
                path = self._dest / line["begun"]
                if not os.path.lexists(_beside(path, mark)):  # what is there now is complete
                    kept.append(line)
                remove(_beside(path, mark))
                settle(_beside(path, mark, ".old"), path)
        self._before += kept
        self._add(*kept)
        place.unlink(missing_ok=True)


def settle(old: Path, path: Path) -> None:
    """Delete a folder that another at `path` has replaced; files that no export makes are moved there.

    If nothing is at `path`, the old folder goes back there.
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
    """Return the files in a folder of this name that are not an export's."""
    ours = contents_of(name)
    files = [Path(here, name) for here, _, names in os.walk(folder) for name in names]
    return [file for file in files if ours and not ours.fullmatch(file.relative_to(folder).as_posix())]


def remove(path: Path) -> None:
    """Delete a file or folder that was ours alone, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _beside(path: Path, mark: str, kind: str = "") -> Path:
    return path.with_name(f"{path.name}{kind}.{mark}{PARTIAL}")


def _lines(place: Path) -> list[Line]:
    """Return the lines of a journal, except those that are not as they were written."""
    return [line for line in journal_lines(place) if _is_sound(line)]


def _is_sound(line: Line) -> bool:
    """Return whether a line of a journal names only paths below its folder."""
    files = line.get("files", {})
    done = line.get("done", [])
    if not (isinstance(files, dict) and isinstance(done, list) and isinstance(line.get("begun", "x"), str)):
        return False
    names = (line.get("begun", "x"), *done, *files, *files.values())
    return all(isinstance(name, str) and is_name(name) for name in names)


def _process(lines: list[Line]) -> Process | None:
    with suppress(KeyError, TypeError, IndexError):
        return Process(**lines[0]["process"])
    return None


@dataclass(frozen=True)
class Options:
    """The options of an export.

    Attributes:
        channel: labels, or names of classes; by default all, or the first explanation for formats that show one.
        colormap: a name that matplotlib knows.
        window: "run", one for all slides; "slide", one for each; or (low, high).
        threshold: lower values are not shown; regions are where values reach it.
        alpha: opacity of colours over the slide.
        size: longest side in pixels, of a PNG.
        overwrite: replace files that exist.
        frame: origin of coordinates in GeoJSON: "bounds", the corner of the scanned part, as in QuPath; or "slide".
        min_area: smaller regions are left out, in µm².
        simplify: how far outlines may be from the borders of pixels, in heatmap pixels; 0 follows them exactly.
        dicom_attributes: attributes of patient, study and specimen by their keywords, and under "slides" those of
            individual slides by id, for slides that are not DICOM; or the path of a file with them.
    """

    channel: tuple[str, ...] = ()
    colormap: str = "inferno"
    window: str | tuple[float, float] = RUN
    threshold: float | None = None
    alpha: float = 0.6
    size: int = 2000
    overwrite: bool = False
    frame: str = BOUNDS
    min_area: float = 0.0
    simplify: float = 0.75
    dicom_attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_colormap(self.colormap)
        if isinstance(self.window, str) and self.window not in (SLIDE, RUN):
            raise ConfigError(f"window is {self.window!r}, expected {SLIDE}, {RUN}, or LOW,HIGH")
        if not isinstance(self.window, str) and not self.window[0] < self.window[1]:
            raise ConfigError(f"window is {self.window[0]:g},{self.window[1]:g}; expected LOW below HIGH")
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha:g}, expected above 0 and at most 1")
        if self.frame not in (SLIDE, BOUNDS):
            raise ConfigError(f"frame is {self.frame!r}, expected {BOUNDS} or {SLIDE}")
        if not 0 <= self.min_area < math.inf:
            raise ConfigError(f"min_area is {self.min_area:g}, expected 0 or more square micrometres")
        if not 0 <= self.simplify <= MAX_SIMPLIFY_PX:
            raise ConfigError(f"simplify is {self.simplify:g}, expected 0 to {MAX_SIMPLIFY_PX} pixels of the heatmap")
        if not 16 <= self.size <= 20_000:
            raise ConfigError(f"size is {self.size}, expected 16 to 20000 pixels")


@dataclass(frozen=True)
class Job:
    """The export of one slide.

    Attributes:
        stem: path of the files to be made, without endings: DEST/SLIDE.
        windows: those of the run, by the channels' labels; empty for other windows.
        ids: those of all slides of the run.
        to: the format.
        journal: records what is written; None if it will not be continued.
    """

    slide: SlideResult
    stem: Path
    options: Options
    windows: dict[str, tuple[float, float]] = field(default_factory=dict)
    ids: frozenset[str] = frozenset()
    to: str = ""
    journal: Journal | None = None

    @cached_property
    def digest(self) -> str:
        """The sha256 of everything on which the files depend."""
        plan, options = self.slide.plan, replace(self.options, overwrite=False)
        values = (self.to, self.slide.id, plan.slide_digest, plan.run_digest, options, sorted(self.windows.items()))
        return hashlib.sha256(repr(values).encode("utf-8", "backslashreplace")).hexdigest()

    def atomic_path(self, path: Path) -> AbstractContextManager[Path]:
        """Provide a temporary path for a file or a folder of the job, see `atomic_path`."""
        return atomic_path(path, self.options.overwrite, self.journal, self.digest if self.journal else "")

    @cached_property
    def channels(self) -> tuple[ChannelInfo, ...]:
        """Return the chosen channels; all if none is named.

        Raises:
            UnknownNameError: the slide has no such channel.
        """
        return tuple(dict.fromkeys(map(self.slide.channel, self.options.channel))) or self.slide.channels

    @property
    def origin(self) -> tuple[int, int]:
        """(y, x) in level-0 px where coordinates of the frame begin."""
        scanned = self.slide.scanned if self.options.frame == BOUNDS else None
        return (scanned.y, scanned.x) if scanned else (0, 0)

    @property
    def drawn_channels(self) -> tuple[ChannelInfo, ...]:
        """Return the chosen channels; the first if none is named."""
        return self.channels if self.options.channel else self.slide.channels[:1]

    def path(self, ending: str) -> Path:
        """Return DEST/SLIDE.ENDING; slides may have dots in their names."""
        return self.named(self.stem.name, f".{ending}")

    def named(self, name: str, ending: str) -> Path:
        """Return DEST/FOLDERS/NAME with an ending; the name is cut if a disk would not accept it."""
        return self.stem.with_name(fitting(name, ending))

    @property
    def base(self) -> str:
        """The slide's name without its ending; with it, if another slide in that folder has the same name."""
        place = PurePosixPath(self.slide.id)
        named = [name for name in self.ids if PurePosixPath(name).with_suffix("") == place.with_suffix("")]
        return self.stem.name if len(named) > 1 else Path(self.stem.name).stem

    def window(self, channel: ChannelInfo) -> tuple[float, float]:
        """Return the values between which colours run."""
        if not isinstance(self.options.window, str):
            return self.options.window
        return self.windows.get(channel.label, channel.window) if self.options.window == RUN else channel.window

    def threshold(self, channel: ChannelInfo) -> float:
        """Return the value from which a region is hot: as given, else the middle of the window."""
        low, high = self.window(channel)
        return low + (high - low) * HALF if self.options.threshold is None else self.options.threshold

    def colouring(self, channel: ChannelInfo) -> Colouring:
        """Return the colours of a channel."""
        low, high = self.window(channel)
        return Colouring(self.options.colormap, low, high, self.options.threshold, self.options.alpha)

    def um_per_px(self, level: int) -> tuple[float, float]:
        """Return (y, x) micrometres per pixel of a level of the heatmap."""
        step = self.slide.stride_px * 2**level
        return self.slide.mpp[0] * step, self.slide.mpp[1] * step


MAX_NAME_BYTES = 255 - 48  # bytes that disks accept, minus what a name has in addition while the file is written
MAX_SLUG_BYTES = 80


def fitting(name: str, ending: str) -> str:
    """Return a name with an ending; if too long for a disk, the name is cut and followed by its digest.

    >>> fitting("a.svs", ".png"), fitting("a" * 250, ".png")[188:]
    ('a.svs.png', 'aa~3f3e35e0a775.png')
    """
    if len(os.fsencode(name + ending)) <= MAX_NAME_BYTES:
        return name + ending
    mark = f"~{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}{ending}"
    cut = os.fsencode(name)[: MAX_NAME_BYTES - len(os.fsencode(mark))]
    return cut.decode("utf-8", "ignore") + mark


def slug(channel: ChannelInfo) -> str:
    """Return a channel's label for file names; its number distinguishes labels that differ only in punctuation.

    >>> slug(ChannelInfo(2, "gradcam++: in situ", "gradcam++", "in situ", "", 0, 1, (0, 1), ""))
    '2-gradcam++-in-situ'
    """
    text = re.sub(r"[^\w.+-]+", "-", channel.label).strip("-")
    return f"{channel.number}-" + text.encode()[:MAX_SLUG_BYTES].decode(errors="ignore")


def save_png(rgba: NDArray[np.uint8], path: Path) -> None:
    """Write a picture as PNG, quickly."""
    about = PngInfo()
    for key, value in MADE_BY.items():
        about.add_text(key, value)
    Image.fromarray(rgba).save(path, format="PNG", compress_level=1, pnginfo=about)


def ome_colour(text: str) -> int:
    """Return OME's form of a colour of 6 hex digits: red, green, blue, alpha as a signed 32-bit number."""
    return int.from_bytes(bytes.fromhex(f"{text}FF"), "big", signed=True)


def blocks(
    slide: SlideResult, channel: ChannelInfo, level: int, side: int
) -> Iterator[tuple[Region, NDArray[np.float32], NDArray[np.uint8]]]:
    """Yield region, values and coverage of each block of a level, row by row, in bounded memory."""
    for region in tiles(*slide.levels[level], side):
        yield region, slide.read(channel, level, region), slide.read_coverage(level, region)


def padded(tile: NDArray[np.generic], side: int, fill: int = 0) -> NDArray[np.generic]:
    """Return a tile at the right or lower edge, padded to side x side."""
    height, width = tile.shape[:2]
    if (height, width) == (side, side):
        return tile
    return np.pad(tile, [(0, side - height), (0, side - width), *[(0, 0)] * (tile.ndim - 2)], constant_values=fill)


@contextmanager
def atomic_path(path: Path, overwrite: bool, journal: Journal | None = None, job: str = "") -> Iterator[Path]:
    """Provide a temporary path for a file or a folder, which is renamed to `path` if the context ends well.

    Args:
        path: the file or folder; what an export that did not end has made there for the same job is replaced.
        overwrite: replace whatever is there, except files in a folder that no export makes.
        journal: records what is done.
        job: digest of the job.

    Raises:
        StoreError: `path` exists and `overwrite` is not set, or the disk cannot be written.
    """
    journal = Journal(path.parent) if journal is None else journal
    if path.exists() and not (overwrite or journal.was_made(path, job)):
        raise StoreError(f"{path}: exists already; use --overwrite, or another --dest")
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = journal.partial(path, job)
        try:
            yield partial
            _replace(partial, path, journal.replaced(path))
        finally:
            remove(partial)


def _replace(partial: Path, path: Path, old: Path) -> None:
    """Rename a file or folder, in place of whatever is at `path`."""
    if not (path.is_dir() and partial.is_dir()):
        partial.replace(path)
        return
    path.rename(old)  # a folder cannot be replaced in one step
    partial.rename(path)
    settle(old, path)
