"""Slides that are read by processes of their own, limited in memory, time and rights: what is in them costs no more.

`IsolatedSlide` is a `Slide` like others; its process has the file open, and several threads. Pixels come back through
memory that both see. A process that dies is replaced; after a few the slide is given up.
"""

from __future__ import annotations

import builtins
import logging
import math
import mmap
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fcntl import F_ADD_SEALS, fcntl
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from wsi_gradcam import errors
from wsi_gradcam.errors import (
    ConfigError,
    SlideError,
    SlideFormatError,
    SlideMemoryError,
    SlideReadError,
    WsiGradcamError,
    is_out_of_memory,
)
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.urls import is_url, redact_url
from wsi_gradcam.slides.base import MAX_SIDE_PX, Level, SlideInfo
from wsi_gradcam.slides.opening import open_file, open_url
from wsi_gradcam.slides.tiff_reader import TiffSlide
from wsi_gradcam.system.confinement import (
    Confined,
    ConfinementServer,
    Limits,
    Link,
    can_confine,
    cpu_seconds,
    linked,
)
from wsi_gradcam.system.processes import keep_freed_memory, limit_arenas

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides.base import Slide

T = TypeVar("T")

LOG = logging.getLogger("wsi_gradcam")

MOST_DEATHS = 3  # of processes of one slide
PATIENCE = 10  # times as long may a process wait as work
KEPT_BYTES = 8 << 20  # of memory for pixels, from one read of a thread to the next
MOST_CAUSES = 4
_LATE = "the limit of time"
ALMOST = 0.8  # of a processor gets what works
SEALS = 0x1 | 0x2 | 0x4  # of memory that both see: no further seals, it stays as large as it is
_LOCK = threading.Lock()
_SERVERS: list[ConfinementServer] = []  # none or one
_SAID: set[str] = set()


class IsolatedSlide:
    """A `Slide` in another process."""

    def __init__(self, source: _Source, info: SlideInfo, scaled: bool = False) -> None:
        self._source, self._info, self._scaled = source, info, scaled

    @property
    def info(self) -> SlideInfo:
        """The slide's metadata."""
        return self._info

    def read_level(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return `region` of a level as RGB uint8 [height, width, 3]; outside the slide: background.

        Raises:
            SlideReadError: as of the reader in the process, or it needed more memory than it may have.
            SlideMemoryError: processes that read it were killed again and again.
            SlideError: they crashed or took too long again and again.
        """
        what = f"reading level {level}, y {region.y}, x {region.x}, {region.height} x {region.width} px"
        return self._source.call(what, lambda process: process.read(level, region, self._scaled))

    def with_reductions(self) -> IsolatedSlide:
        """Return the slide with levels that are made while tiles are decoded, where its reader can do that."""
        reply = self._source.call("making levels", lambda process: process.ask({"do": "reduce"}))
        return IsolatedSlide(self._source, _info_of(reply["info"]), scaled=True)

    def close(self) -> None:
        """End the process."""
        self._source.close()


def open_isolated(path: str | Path, limits: Limits, **options: Any) -> IsolatedSlide:
    """Return the slide at a path or URL, opened by a process of its own; options as of `open_slide`.

    Raises:
        ConfigError: not on this system.
        SlideError: as of `open_slide`, or it needed more memory or time than it may have.
    """
    if not can_confine():
        raise ConfigError("slides can be read in processes of their own on Linux only; use --isolate off")
    source = _Source(str(path), limits, options)
    return IsolatedSlide(source, source.info)


class _DiedError(Exception):
    """A process has died, or must: `why` says why if not by a signal."""

    def __init__(self, why: str = "") -> None:
        super().__init__(why)
        self.why = why


class _Source:
    """A slide and the process that has it open; another one if that dies."""

    def __init__(self, path: str, limits: Limits, options: Mapping[str, Any]) -> None:
        self._path, self._limits, self._options = path, limits, options
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._deaths = 0
        self._given_up: SlideError | None = None
        self._closed = False
        self.name = redact_url(path) if is_url(path) else path
        try:
            self._process, self.info = self._open()
        except _DiedError as died:
            raise self._error("opening it", died.why, opening=True) from None

    def call(self, what: str, work: Callable[[_Process], T]) -> T:
        """Return the result of work by the process, of another one if it dies meanwhile."""
        while True:
            process = self._current(what)
            try:
                return work(process)
            except _DiedError as died:
                self._lose(process, what, died)
            except MemoryError:
                raise SlideReadError(f"{self.name}: {self._too_much(what)}") from None

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.end()

    def _current(self, what: str) -> _Process:
        with self._lock:
            if self._given_up is not None:
                raise self._given_up
            if self._closed:
                raise SlideReadError(f"{self.name}: was closed before {what}")
            if self._process is None:
                try:
                    self._process, info = self._open()
                except _DiedError as died:
                    self._given_up = self._error("opening it again", died.why)
                    raise self._given_up from None
                if info != self.info:
                    self._given_up = SlideFormatError(f"{self.name}: is another file now; let it not change in a run")
                    raise self._given_up
            return self._process

    def _lose(self, process: _Process, what: str, died: _DiedError) -> None:
        """End a process for good, and give the slide up after a few; all of its threads come here, the first counts."""
        with self._lock:
            if self._process is not process:
                return
            self._process = None
            ended = process.end()
            why = died.why or ended
            self._deaths += 1
            LOG.warning("%s: %s ended the process that read it, while %s", self.name, why, what)
            if self._deaths >= MOST_DEATHS:
                self._given_up = self._error(what, why)
                raise self._given_up

    def _open(self) -> tuple[_Process, SlideInfo]:
        process = _Process(self._limits, network=is_url(self._path))
        try:
            cwd = str(Path.cwd())
        except OSError:  # it is gone
            cwd = "/"
        environment = dict(os.environ) if is_url(self._path) else {}
        request = {"do": "open", "path": self._path, "cwd": cwd, "environment": environment, "options": self._options}
        try:
            reply = process.ask(request)
            for lacking in reply["lacking"]:
                _warn_once(f"this system cannot refuse {lacking} to processes that read slides; see SECURITY.md")
            return process, _info_of(reply["info"])
        except MemoryError:
            process.end()
            raise SlideFormatError(f"{self.name}: {self._too_much('opening it')}") from None
        except _DiedError as died:
            ended = process.end()
            raise _DiedError(died.why or ended) from None
        except BaseException:
            process.end()
            raise

    def _too_much(self, what: str) -> str:
        return (
            f"needed more than {self._limits.memory_mib:,} MiB of memory while {what}; if the file is no stranger's, "
            "give --isolate-memory more"
        )

    def _error(self, what: str, why: str, opening: bool = False) -> SlideError:
        times = "" if opening else f" (after {self._deaths} processes)" if self._deaths else ""
        if why == _LATE:
            text = (
                f"{self.name}: took more than {self._limits.seconds:g} s while {what}{times}; it is damaged, or made "
                "to take long: if it is no stranger's, give --isolate-seconds more"
            )
            return SlideFormatError(text) if opening else SlideError(text)
        text = (
            f"{self.name}: {why} ended the process that read it, while {what}{times}; the file is damaged in a way "
            f"that a decoder does not survive, or it needs more than {self._limits.memory_mib:,} MiB (--isolate-memory)"
        )
        return SlideMemoryError(text) if why == "SIGKILL" else SlideFormatError(text) if opening else SlideError(text)


class _Process:
    """A process that has a slide open, as seen from the one that asks."""

    def __init__(self, limits: Limits, *, network: bool) -> None:
        self._limits = limits
        self._server, self._confined = _start(limits, network=network)
        self._lock, self._asking = threading.Lock(), threading.Lock()
        self._idle: list[_Lane] = []
        self._busy = 0
        self._ended: str | None = None

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a message.

        Raises:
            _DiedError: the process died, or takes too long.
            Exception: as it was raised there.
        """
        with self._asking, self._at_work():
            return self._answer(self._confined.link, message)

    def read(self, level: int, region: Region, scaled: bool) -> NDArray[np.uint8]:
        """Return a region of a level, RGB uint8 [height, width, 3]; errors as of `ask`."""
        shape = (region.height, region.width, 3)
        with self._at_work():
            lane = self._lane()
            new = lane.reserve(math.prod(shape))
            message = {
                "level": level,
                "region": [int(side) for side in (region.y, region.x, region.height, region.width)],
                "scaled": scaled,
            }
            try:
                self._answer(lane.link, message, new)
            except _DiedError:
                lane.close()
                raise
            except Exception:
                self._return(lane)
                raise
            pixels = np.frombuffer(lane.memory, np.uint8, math.prod(shape)).reshape(shape).copy()
            self._return(lane)
        return pixels

    def end(self) -> str:
        """End the process and return what had ended it before: the name of a signal, or its exit."""
        with self._lock:
            if self._ended is None:
                status = self._server.end(self._confined)
                number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                self._ended = signal.Signals(number).name if number else "an error"
                for lane in self._idle:
                    lane.close()
                self._idle.clear()
            return self._ended

    def _lane(self) -> _Lane:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        lane = _Lane()
        with self._asking, lane.theirs:
            self._answer(self._confined.link, {"do": "lane"}, lane.theirs.fileno())
        return lane

    def _return(self, lane: _Lane) -> None:
        lane.shrink()
        with self._lock:
            if self._ended is None:
                self._idle.append(lane)
                return
        lane.close()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    def _answer(self, link: Link, message: Mapping[str, Any], descriptor: int | None = None) -> dict[str, Any]:
        try:
            link.send(message, () if descriptor is None else (descriptor,))
            self._wait(link)
            reply, _ = link.receive()
        except (OSError, EOFError):
            raise _DiedError from None
        for level, text in reply.get("log", ()):
            LOG.log(int(level), "%s", text)
        if "error" in reply:
            raise _error_of(reply["error"])
        return reply

    def _wait(self, link: Link) -> None:
        """Wait for an answer. Time counts by the process's work, and by looks: while all stand still, none passes."""
        pid, limit = self._confined.pid, self._limits.seconds
        step = min(1.0, limit / 4)
        before, waited = cpu_seconds(pid), 0.0
        while not link.waits(step):
            waited += step
            if waited >= limit * PATIENCE or (
                waited >= limit and cpu_seconds(pid) - before >= limit * max(1, self._busy) * ALMOST
            ):
                raise _DiedError(_LATE)


class _Lane:
    """A link for one read at a time, and the memory through which pixels come."""

    def __init__(self) -> None:
        self.link, self.theirs = linked()
        self._descriptor, self.memory = -1, mmap.mmap(-1, 1)

    def reserve(self, count: int) -> int | None:
        """Make the memory large enough; return its descriptor where it is new."""
        if self._descriptor >= 0 and len(self.memory) >= count:
            return None
        self._forget()
        size = max(1 << 20, 1 << max(0, count - 1).bit_length()) if count <= KEPT_BYTES else count
        self._descriptor = os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._descriptor, size)
        fcntl(self._descriptor, F_ADD_SEALS, SEALS)
        self.memory = mmap.mmap(self._descriptor, size)
        return self._descriptor

    def shrink(self) -> None:
        """Give much memory back."""
        if len(self.memory) > KEPT_BYTES:
            self._forget()

    def close(self) -> None:
        """Close all."""
        self.link.close()
        self._forget()

    def _forget(self) -> None:
        self.memory.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _start(limits: Limits, *, network: bool) -> tuple[ConfinementServer, Confined]:
    """Start a confined process by this process's own server, which is started where there is none."""
    for _ in range(2):
        with _LOCK:
            if _SERVERS and _SERVERS[0].owner != os.getpid():  # this process was forked
                _SERVERS.clear()
            if not _SERVERS:
                _SERVERS.append(ConfinementServer(__name__, serve_slide.__name__))
            server = _SERVERS[0]
        try:
            return server, server.start(limits, network=network)
        except EOFError:
            server.close()
            with _LOCK, suppress(ValueError):
                _SERVERS.remove(server)
    raise SlideError("the process that starts readers of slides ends at once; use --isolate off, and report it")


def _warn_once(text: str) -> None:
    if text not in _SAID:
        _SAID.add(text)
        LOG.warning("%s", text)


KNOWN = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError)


def _told(error: BaseException) -> list[list[Any]]:
    """Return an error and its causes, as JSON can hold them."""
    if _lacks_memory(error):
        return [["MemoryError", []]]
    told: list[list[Any]] = []
    cause: BaseException | None = error
    while cause is not None and len(told) < MOST_CAUSES:
        system = isinstance(cause, OSError) and cause.errno is not None
        filename = None if not system or cause.filename is None else str(cause.filename)  # type: ignore[attr-defined]
        values = [cause.errno, cause.strerror, filename] if system else [str(cause)]  # type: ignore[attr-defined]
        told.append([type(cause).__name__, values])
        cause = cause.__cause__
    return told


def _lacks_memory(error: BaseException) -> bool:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if is_out_of_memory(found):
            return True
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return False


def _error_of(told: Any) -> Exception:
    """Return the error that `_told` described."""
    error: Exception | None = None
    for name, values in reversed(told[:MOST_CAUSES]):
        made = _made(str(name), values)
        made.__cause__ = error
        error = made
    return error or RuntimeError("an error without a name")


def _made(name: str, values: Any) -> Exception:
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, (WsiGradcamError, *KNOWN)):
        with suppress(TypeError):
            return kind(*values)
    return RuntimeError(f"{name}: {values[0] if values else ''}")


def _info_of(values: Any) -> SlideInfo:
    """Return metadata that another process has told; its sizes are bounded as those of any slide."""
    try:
        levels = tuple(_level_of(**level) for level in values["levels"])
        mpp, bounds, objective = values["mpp"], values["bounds"], values["objective"]
        red, green, blue = (int(value) for value in values["background"])
        return SlideInfo(
            path=str(values["path"]),
            levels=levels,
            mpp=None if mpp is None else (float(mpp[0]), float(mpp[1])),
            mpp_problem=str(values["mpp_problem"]),
            vendor=str(values["vendor"]),
            background=(red, green, blue),
            bounds=None if bounds is None else Region(**{key: int(value) for key, value in bounds.items()}),
            digest=str(values["digest"]),
            objective=None if objective is None else float(objective),
            images=tuple(str(image) for image in values["images"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SlideFormatError(f"the process that reads a slide has told nonsense of it ({error!r})") from error


def _level_of(height: int, width: int, downsample_y: float, downsample_x: float, problem: str, shift: float) -> Level:
    if not (0 < height <= MAX_SIDE_PX and 0 < width <= MAX_SIDE_PX):
        raise ValueError("a level of an impossible size")
    return Level(int(height), int(width), float(downsample_y), float(downsample_x), str(problem), float(shift))


# ---- in the confined process


class _Remembering(logging.Handler):
    """Keeps what is logged for the next answer."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._kept: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's level and text."""
        self._kept.append((record.levelno, record.getMessage()))

    def taken(self) -> list[tuple[int, str]]:
        """Return what was kept, and forget it."""
        kept, self._kept = self._kept, []
        return kept


class _Reader:
    """The slide of a confined process, as it is and with levels that are made while tiles are decoded."""

    def __init__(self, lacking: list[str]) -> None:
        self._lacking = lacking
        self._slides: dict[bool, Slide] = {}
        self._log = _Remembering()
        LOG.setLevel(logging.INFO)
        LOG.propagate = False
        LOG.addHandler(self._log)

    def obey(self, link: Link) -> NoReturn:
        """Do what messages say: open the slide, and serve the threads that want to read it."""
        while True:
            message, descriptors = link.receive()
            if message["do"] == "lane":
                lane = Link(socket.socket(fileno=descriptors[0]))
                threading.Thread(target=self._serve, args=(lane,), daemon=True).start()
                link.send({})
            else:
                work = partial(self._open, message) if message["do"] == "open" else self._reduce
                link.send(self._reply(work))

    def _open(self, message: Mapping[str, Any]) -> dict[str, Any]:
        os.chdir(message["cwd"])
        path, options = message["path"], message["options"]
        if is_url(path):
            os.environ.clear()
            os.environ.update(message["environment"])
            self._slides[False] = open_url(path, **_with_tuples(options))
        else:
            self._slides[False] = open_file(Path(path), **_with_tuples(options))
        return {"info": asdict(self._slides[False].info), "lacking": self._lacking}

    def _reduce(self) -> dict[str, Any]:
        slide = self._slides[False]
        self._slides[True] = slide.with_reductions() if isinstance(slide, TiffSlide) else slide
        return {"info": asdict(self._slides[True].info)}

    def _serve(self, lane: Link) -> None:
        memory = mmap.mmap(-1, 1)
        try:
            while True:
                message, descriptors = lane.receive()
                if descriptors:
                    memory.close()
                    memory = mmap.mmap(descriptors[0], 0)
                    os.close(descriptors[0])
                lane.send(self._reply(partial(self._read, message, memory)))
        except EOFError:
            memory.close()
            lane.close()
        except BaseException:  # else nobody would answer
            os._exit(1)

    def _read(self, message: Mapping[str, Any], memory: mmap.mmap) -> dict[str, Any]:
        region = Region(*message["region"])
        pixels = self._slides[message["scaled"]].read_level(message["level"], region)
        np.frombuffer(memory, np.uint8, pixels.size).reshape(pixels.shape)[...] = pixels
        return {}

    def _reply(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            reply = work()
        except Exception as error:
            reply = {"error": _told(error)}
        if log := self._log.taken():
            reply["log"] = log
        return reply


def _with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def serve_slide(link: Link, lacking: list[str]) -> None:
    """Serve one slide until the other side closes the link, in a process that is confined."""
    keep_freed_memory()
    limit_arenas()
    with suppress(EOFError, OSError):
        _Reader(lacking).obey(link)
