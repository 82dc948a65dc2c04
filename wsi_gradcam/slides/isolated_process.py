"""The process that reads one slide for `isolated_reader`: it obeys messages, and reports errors and metadata as JSON.

It is not trusted: the asking process rebuilds errors and metadata from its reports, within bounds.
"""

from __future__ import annotations

import builtins
import logging
import mmap
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from pydantic import TypeAdapter, ValidationError

from wsi_gradcam import errors
from wsi_gradcam.errors import SlideFormatError, WsiGradcamError, is_out_of_memory, one_line
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.urls import is_url
from wsi_gradcam.slides.base import MAX_SIDE_PX, SlideInfo
from wsi_gradcam.slides.opening import open_file, open_url
from wsi_gradcam.system.confinement import Link
from wsi_gradcam.system.processes import keep_freed_memory, limit_arenas

if TYPE_CHECKING:
    from wsi_gradcam.slides.base import Slide

LOG = logging.getLogger("wsi_gradcam")
MOST_CAUSES = 4
KNOWN = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError)


def told(error: BaseException) -> list[list[Any]]:
    """Return an error and its causes in a form that fits into JSON."""
    if _lacks_memory(error):
        return [["MemoryError", []]]
    chain: list[list[Any]] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < MOST_CAUSES:
        system = isinstance(cause, OSError) and cause.errno is not None
        filename = None if not system or cause.filename is None else str(cause.filename)  # type: ignore[attr-defined]
        values = [cause.errno, cause.strerror, filename] if system else [str(cause)]  # type: ignore[attr-defined]
        chain.append([type(cause).__name__, values])
        cause = cause.__cause__
    return chain


def _lacks_memory(error: BaseException) -> bool:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if is_out_of_memory(found):
            return True
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return False


def error_of(chain: Any) -> Exception:
    """Return the error that `told` describes."""
    error: Exception | None = None
    for name, values in reversed(chain[:MOST_CAUSES]):
        made = _made(str(name), values)
        made.__cause__ = error
        error = made
    return error or RuntimeError("an unnamed error")


def _made(name: str, values: Any) -> Exception:
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, (WsiGradcamError, *KNOWN)):
        with suppress(TypeError):
            return kind(*values)
    return RuntimeError(f"{name}: {values[0] if values else ''}")


def info_of(values: Any) -> SlideInfo:
    """Return metadata that another process reported; its sizes are bounded as for any slide."""
    try:
        info = TypeAdapter(SlideInfo).validate_python(values)
    except ValidationError as error:
        raise SlideFormatError(f"the process that reads a slide sent an invalid reply: {one_line(error)}") from error
    if not info.levels or not all(0 < side <= MAX_SIDE_PX for x in info.levels for side in (x.height, x.width)):
        raise SlideFormatError("the process that reads a slide reported impossible sizes")
    return info


class _Remembering(logging.Handler):
    """A log handler that keeps records for the next answer."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._kept: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's level and text."""
        self._kept.append((record.levelno, record.getMessage()))

    def taken(self) -> list[tuple[int, str]]:
        """Return the kept records, and forget them."""
        kept, self._kept = self._kept, []
        return kept


class _Reader:
    """The slide of a confined process, as it is and with levels made by reduced decoding."""

    def __init__(self, lacking: list[str]) -> None:
        self._lacking = lacking
        self._slides: dict[bool, Slide] = {}
        self._log = _Remembering()
        LOG.setLevel(logging.INFO)
        LOG.propagate = False
        LOG.addHandler(self._log)

    def obey(self, link: Link) -> NoReturn:
        """Do what the messages say: open the slide, and serve the threads that want to read it."""
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
        reduced: Callable[[], Slide] = getattr(slide, "with_reductions", lambda: slide)
        self._slides[True] = reduced()
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
        except BaseException:  # otherwise nobody would answer
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
            reply = {"error": told(error)}
        if log := self._log.taken():
            reply["log"] = log
        return reply


def _with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def serve_slide(link: Link, lacking: list[str]) -> None:
    """Serve one slide from a confined process, until the other side closes the link."""
    keep_freed_memory()
    limit_arenas()
    with suppress(EOFError, OSError):
        _Reader(lacking).obey(link)
