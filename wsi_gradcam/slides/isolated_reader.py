"""Slides read by separate processes, limited in memory, time and permissions: a bad file can do no more harm.

`IsolatedSlide` is a `Slide` like any other; its process has the file open and runs several threads. Pixels come back
through shared memory. A process that dies is replaced; after a few deaths the slide is given up.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fcntl import F_ADD_SEALS, fcntl
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from wsi_gradcam.errors import (
    SlideError,
    SlideFormatError,
    SlideMemoryError,
    SlideReadError,
)
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.urls import ALLOW_HOSTS, allowed_hosts, is_url, redact_url
from wsi_gradcam.slides import isolated_process
from wsi_gradcam.slides.isolated_process import error_of, info_of, serve_slide
from wsi_gradcam.system.confinement import (
    Confined,
    ConfinementServer,
    Limits,
    Link,
    cpu_seconds,
    linked,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.slides.base import SlideInfo

T = TypeVar("T")

LOG = logging.getLogger("wsi_gradcam")

MOST_DEATHS = 3  # deaths of processes of one slide
PATIENCE = 10  # how many times longer a process may wait than work
KEPT_BYTES = 8 << 20  # of memory for pixels, from one read of a thread to the next
_LATE = "the time limit"
ALMOST = 0.8  # share of a processor that a working process gets
SEALS = 0x1 | 0x2 | 0x4  # of shared memory: no further seals, and its size stays fixed
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
            SlideReadError: as raised by the reader in the process, or it needed more memory than it is allowed.
            SlideMemoryError: processes that read the slide were killed repeatedly.
            SlideError: they crashed or took too long repeatedly.
        """
        what = f"reading level {level}, x {region.x}, y {region.y}, {region.width} x {region.height} px"
        return self._source.call(what, lambda process: process.read(level, region, self._scaled))

    def with_reductions(self) -> IsolatedSlide:
        """Return the slide with levels made by reduced decoding, if its reader can do that."""
        reply = self._source.call("making levels", lambda process: process.ask({"do": "reduce"}))
        return IsolatedSlide(self._source, info_of(reply["info"]), scaled=True)

    def close(self) -> None:
        """End the process."""
        self._source.close()


def open_isolated(path: str, limits: Limits, options: Mapping[str, Any]) -> IsolatedSlide:
    """Return the slide at a path or URL, opened by a separate process; options as for `open_slide`.

    Raises:
        SlideError: as for `open_slide`, or it needed more memory or time than it is allowed.
    """
    source = _Source(path, limits, options)
    return IsolatedSlide(source, source.info)


class _DiedError(Exception):
    """A process has died, or must be ended: `why` gives the reason, unless it was a signal."""

    def __init__(self, why: str = "") -> None:
        super().__init__(why)
        self.why = why


class _Source:
    """A slide and the process that has it open, which is replaced if it dies."""

    def __init__(self, path: str, limits: Limits, options: Mapping[str, Any]) -> None:
        self._path, self._limits, self._options = path, limits, options
        # Credentials, and the servers that this thread may contact.
        self._environment = {**os.environ, ALLOW_HOSTS: ",".join(allowed_hosts())} if is_url(path) else {}
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
        """Return the result of the process's work, or of its replacement's if it dies meanwhile."""
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
                    self._given_up = SlideFormatError(
                        f"{self.name}: has been replaced by another file; do not change slides during a run"
                    )
                    raise self._given_up
            return self._process

    def _lose(self, process: _Process, what: str, died: _DiedError) -> None:
        """End a process for good, and give up on the slide after a few; only its first thread to get here counts."""
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
        request = {"do": "open", "path": self._path, "cwd": cwd, "options": self._options}
        request["environment"] = self._environment
        try:
            reply = process.ask(request)
            for lacking in reply["lacking"]:
                _warn_once(f"this system cannot deny {lacking} to processes that read slides; see SECURITY.md")
            return process, info_of(reply["info"])
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
            f"needed more than {self._limits.memory_mib:,} MiB of memory while {what}; if you trust the file, raise "
            "--isolate-memory"
        )

    def _error(self, what: str, why: str, opening: bool = False) -> SlideError:
        times = "" if opening else f" (after {self._deaths} processes)" if self._deaths else ""
        if why == _LATE:
            text = (
                f"{self.name}: took more than {self._limits.seconds:g} s while {what}{times}; it is damaged, or "
                "crafted to take long; if you trust the file, raise --isolate-seconds"
            )
            return SlideFormatError(text) if opening else SlideError(text)
        text = (
            f"{self.name}: {why} ended the process that read it, while {what}{times}; the file is damaged in a way "
            f"that crashes a decoder, or it needs more than {self._limits.memory_mib:,} MiB (--isolate-memory)"
        )
        return SlideMemoryError(text) if why == "SIGKILL" else SlideFormatError(text) if opening else SlideError(text)


class _Process:
    """A process that has a slide open, as seen by the process that uses it."""

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
            Exception: as raised there.
        """
        with self._asking, self._at_work():
            return self._answer(self._confined.link, message)

    def read(self, level: int, region: Region, scaled: bool) -> NDArray[np.uint8]:
        """Return a region of a level, RGB uint8 [height, width, 3]; errors as for `ask`."""
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
        """End the process and return what had ended it already: the name of a signal, or its exit status."""
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
        try:
            with self._asking, lane.theirs:
                self._answer(self._confined.link, {"do": "lane"}, lane.theirs.fileno())
        except BaseException:
            lane.close()
            raise
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
            raise error_of(reply["error"])
        return reply

    def _wait(self, link: Link) -> None:
        """Wait for an answer. Time counts in work and in polls: none passes while the machine is asleep."""
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
    """A link for one read at a time, and the shared memory for its pixels."""

    def __init__(self) -> None:
        self.link, self.theirs = linked()
        self._descriptor, self.memory = -1, mmap.mmap(-1, 1)

    def reserve(self, count: int) -> int | None:
        """Make the memory large enough; return its descriptor if it is new."""
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
        """Give back memory, if there is much."""
        if len(self.memory) > KEPT_BYTES:
            self._forget()

    def close(self) -> None:
        """Close the link and give back the memory."""
        self.link.close()
        self._forget()

    def _forget(self) -> None:
        self.memory.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _start(limits: Limits, *, network: bool) -> tuple[ConfinementServer, Confined]:
    """Start a confined process through this process's own server, which is started if there is none."""
    for _ in range(2):
        with _LOCK:
            if _SERVERS and _SERVERS[0].owner != os.getpid():  # this process was forked
                _SERVERS.clear()
            if not _SERVERS:
                _SERVERS.append(ConfinementServer(isolated_process.__name__, serve_slide.__name__))
            server = _SERVERS[0]
        try:
            return server, server.start(limits, network=network)
        except EOFError:
            server.close()
            with _LOCK, suppress(ValueError):
                _SERVERS.remove(server)
    raise SlideError("the process that starts slide readers exits at once; omit --isolate, and report this as a bug")


def _warn_once(text: str) -> None:
    if text not in _SAID:
        _SAID.add(text)
        LOG.warning("%s", text)
