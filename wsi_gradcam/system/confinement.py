"""Processes with few permissions: limited memory, no network, no files to write. Linux only.

A server, which has imported what they need and does nothing else, forks them at a cost of a few milliseconds each. They
end with it, and it ends with the process that started it. They send only JSON: nothing that they send is run.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from select import POLLIN, poll
from typing import Any, TypeAlias

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.system.isolation import die_with

Message: TypeAlias = Mapping[str, Any]

HEADER = struct.Struct("!I")
MOST_BYTES = 1 << 22  # bytes of a message
MOST_DESCRIPTORS = 2
AT_ONCE = 1 << 16
LOOK_UP_S = 5.0  # until the server notices that its owner is gone
END_S = 5.0  # for a process that is killed; one that waits for a disk may take longer
QUIET = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # for a working process to obey


@dataclass(frozen=True)
class Limits:
    """The resources that a process may use to open a slide, or to read one region of it.

    Attributes:
        memory_mib: in addition to what it has at its start.
        seconds: of work; ten times as long if it only waits.
    """

    memory_mib: int = 2048
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.memory_mib < 1 or not 0 < self.seconds < float("inf"):
            raise ConfigError(f"limits of {self.memory_mib} MiB and {self.seconds:g} s; expected both above 0")


ISOLATE = "WSI_GRADCAM_ISOLATE"  # MiB and seconds, joined by a comma; child processes inherit it


def can_confine() -> bool:
    """Return whether this system can confine processes."""
    return sys.platform == "linux"


def check_can_confine(limits: Limits | None) -> None:
    """Raise a ConfigError if limits are requested and this system cannot confine processes."""
    if limits is not None and not can_confine():
        raise ConfigError("slides can be read in separate processes only on Linux; omit --isolate")


@contextmanager
def isolating(limits: Limits | None) -> Iterator[None]:
    """Have slides read by confined processes in this context, unless None, and in processes started in it.

    Raises:
        ConfigError: this system cannot confine processes.
    """
    check_can_confine(limits)
    before = os.environ.get(ISOLATE)
    if limits is not None:
        os.environ[ISOLATE] = f"{limits.memory_mib},{limits.seconds}"
    try:
        yield
    finally:
        if limits is not None:
            os.environ.pop(ISOLATE)
            os.environ.update({} if before is None else {ISOLATE: before})


def limits_here() -> Limits | None:
    """Return the limits for slide readers here; None if slides are read by this process.

    Raises:
        ConfigError: the environment variable is invalid.
    """
    text = os.environ.get(ISOLATE, "")
    if not text:
        return None
    try:
        memory, seconds = text.split(",")
        return Limits(int(memory), float(seconds))
    except ValueError as error:
        raise ConfigError(f"{ISOLATE} is {text!r}, expected MiB and seconds such as 2048,60") from error


class Link:
    """One end of a socket between two processes, for messages and file descriptors."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message; the descriptors arrive with it.

        Raises:
            OSError: the other side is gone.
        """
        data = json.dumps(message, default=lambda number: number.item()).encode()  # NumPy's
        data = HEADER.pack(len(data)) + data
        if descriptors:
            socket.send_fds(self._socket, [data[:1]], list(descriptors), socket.MSG_NOSIGNAL)
            data = data[1:]
        self._socket.sendall(data, socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Return the next message, and file descriptors for the caller to close.

        Raises:
            EOFError: the other side is gone, or what arrives is not a message.
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, AT_ONCE, MOST_DESCRIPTORS)
            data += self._exactly(HEADER.size - len(data))
            (size,) = HEADER.unpack(data[: HEADER.size])
            if size > MOST_BYTES:
                raise EOFError
            message = json.loads(data[HEADER.size :] + self._exactly(size - len(data) + HEADER.size))
        except (OSError, ValueError, RecursionError) as error:
            raise EOFError from error
        if not isinstance(message, dict):
            raise EOFError
        return message, descriptors

    def waits(self, seconds: float) -> bool:
        """Return True if a message, or the end, arrives within so many seconds."""
        poller = poll()
        poller.register(self._socket, POLLIN)
        return bool(poller.poll(seconds * 1000))

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            if not (part := self._socket.recv(min(count - len(data), AT_ONCE))):
                raise EOFError
            data += part
        return bytes(data)


def linked() -> tuple[Link, socket.socket]:
    """Return a link, and its other end to pass on."""
    ours, theirs = socket.socketpair()
    return Link(ours), theirs


@dataclass(frozen=True)
class Confined:
    """A confined process: the link to it, and its process id."""

    link: Link
    pid: int


class ConfinementServer:
    """Starts and ends confined processes, each of which calls a function with its link and what could not be denied."""

    def __init__(self, module: str, function: str) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._link, theirs = linked()
        values = [sys.path, module, function, theirs.fileno()]
        program = (
            "import json, sys; path, *rest = json.loads(sys.argv[1]); sys.path[:] = path; "
            f"from {__name__} import serve; serve(*rest)"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, json.dumps(values)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        atexit.register(self.close)

    def start(self, limits: Limits, *, network: bool) -> Confined:
        """Start a process.

        Raises:
            EOFError: the server has ended.
            OSError: the system cannot start a process.
        """
        ours, theirs = linked()
        try:
            with theirs, self._lock:
                reply = self._ask({"memory": limits.memory_mib << 20, "network": network}, [theirs.fileno()])
            if "pid" not in reply:
                raise OSError(*reply["errno"])
        except BaseException:
            ours.close()
            raise
        return Confined(ours, reply["pid"])

    def end(self, confined: Confined) -> int:
        """End a process and return its status as `os.waitpid` gives it; 0 if that cannot be known."""
        confined.link.close()
        if os.getpid() != self.owner:
            return 0
        with self._lock, suppress(EOFError):
            return int(self._ask({"end": confined.pid})["status"])
        return 0

    def close(self) -> None:
        """End the server and all its processes."""
        if os.getpid() == self.owner:
            self._link.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
            atexit.unregister(self.close)

    def _ask(self, message: Message, descriptors: Sequence[int] = ()) -> dict[str, Any]:
        try:
            self._link.send(message, descriptors)
        except OSError as error:
            raise EOFError from error
        return self._link.receive()[0]


def serve(module: str, function: str, descriptor: int) -> None:
    """Fork processes for the other end of the descriptor, until it is closed."""
    for number in QUIET:
        signal.signal(number, signal.SIG_IGN)
    parent, link = os.getppid(), Link(socket.socket(fileno=descriptor))
    work: Callable[[Link, list[str]], None] = getattr(importlib.import_module(module), function)
    children: set[int] = set()
    with suppress(EOFError):
        while os.getppid() == parent:
            if not link.waits(LOOK_UP_S):
                continue
            message, descriptors = link.receive()
            if "end" in message:
                link.send({"status": _end(message["end"], children)})
                continue
            reply = _fork(message, descriptors, link, work)
            children.update({reply["pid"]} if "pid" in reply else ())
            link.send(reply)
            for each in descriptors:
                os.close(each)


def _fork(
    message: Message, descriptors: Sequence[int], link: Link, work: Callable[[Link, list[str]], None]
) -> dict[str, Any]:
    server = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        return {"errno": [error.errno, error.strerror]}
    if child:
        return {"pid": child}
    try:
        link.close()
        own = Link(socket.socket(fileno=descriptors[0]))
        lacking = confine(message["memory"], network=message["network"])
        die_with(server)
        work(own, lacking)
    finally:
        os._exit(0)


def _end(pid: int, children: set[int]) -> int:
    """Kill a child and return its status, or the one it had already died with; 0 if it is no longer known."""
    if pid not in children:
        return 0
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        last = time.monotonic() + END_S
        while time.monotonic() < last:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.discard(pid)
                return status
            time.sleep(0.001)
    return 0


def cpu_seconds(pid: int) -> float:
    """Return how long a process has worked, over all its threads; 0 if it is gone."""
    with suppress(OSError):
        return time.clock_gettime(~pid << 3 | 2)  # computed as `clock_getcpuclockid` does
    return 0.0


PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
CLONE_THREAD, EPERM, ENOSYS = 0x10000, 1, 38
X32 = 0x40000000  # the same calls under other numbers, on x86-64
ALLOWED, REFUSED = 0x7FFF0000, 0x00050000  # return values of a filter, the second with an error number
# Instructions of classic BPF: load a word, return, and three jumps; offsets in the data that a filter sees.
LOAD, RETURN, IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT = 0x20, 0x06, 0x15, 0x35, 0x45
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
MOST_FILES = 256
LANDLOCK_CREATE, LANDLOCK_RESTRICT, LANDLOCK_VERSION = 444, 446, 1
# Landlock's rights to change files: write, remove, make; and move and truncate, by the versions that have them.
WRITING = 1 << 1 | sum(1 << bit for bit in range(4, 13))
WRITING_SINCE = {2: 1 << 13, 3: 1 << 14}


@dataclass(frozen=True)
class Calls:
    """The numbers of an architecture's system calls, and its own number."""

    architecture: int
    socket: int
    clone: int
    refused: tuple[int, ...]
    clone3: int = 435


# Denied: starting programs and processes, signalling or inspecting other processes; namespaces, mounts, kernel tracing,
# and io_uring, which could do all of that unseen.
CALLS = {
    "x86_64": Calls(
        0xC000003E,
        41,
        56,
        (57, 58, 59, 322, 62, 200, 129, 424, 438, 101, 310, 311, 272, 308, 165, 298, 321, 323, 425, 426, 427),
    ),
    "aarch64": Calls(
        0xC00000B7,
        198,
        220,
        (221, 281, 129, 130, 138, 424, 438, 117, 270, 271, 97, 268, 40, 241, 280, 282, 425, 426, 427),
    ),
}


def confine(memory_bytes: int, *, network: bool = False) -> list[str]:
    """Limit this process, which still has a single thread, for good; return in words what this system cannot deny.

    It may use so many bytes more than it has now, write no file, start no process, and open no socket unless `network`.
    """
    import resource

    status = Path("/proc/self/status").read_text(encoding="utf-8")
    used = int(status.partition("VmData:")[2].split()[0]) << 10
    wanted = {
        resource.RLIMIT_DATA: used + memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MOST_FILES,
    }
    for kind, limit in wanted.items():
        hard = resource.getrlimit(kind)[1]
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (most, most))
    system = ctypes.CDLL(None, use_errno=True)
    system.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    lacking = [] if _refuse_writing(system) else ["changing files"]
    if not _refuse_calls(system, network):
        lacking += ["starting programs"] if network else ["the network", "starting programs"]
    return lacking


def _refuse_writing(system: ctypes.CDLL) -> bool:
    """Deny all changes to files with Landlock; return True if the system does."""
    version = system.syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION)
    if version < 1:
        return False
    handled = ctypes.c_uint64(WRITING | sum(right for since, right in WRITING_SINCE.items() if version >= since))
    rules = system.syscall(LANDLOCK_CREATE, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    if rules < 0:
        return False
    done = bool(system.syscall(LANDLOCK_RESTRICT, rules, 0) == 0)
    os.close(rules)
    return done


def _refuse_calls(system: ctypes.CDLL, network: bool) -> bool:
    """Deny system calls with a seccomp filter; return True if the system does."""
    calls = CALLS.get(os.uname().machine)
    if calls is None or sys.maxsize < 1 << 32:
        return False

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    code = filter_of(calls, network)
    program = Program(len(code) // 8, code)
    return bool(system.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def filter_of(calls: Calls, network: bool) -> bytes:
    """Return the filter's program."""
    refused = [*calls.refused, *(() if network else (calls.socket,))]
    lines = [(LOAD, 0, 0, ARCHITECTURE), (IF_EQUAL, 1, 0, calls.architecture), (RETURN, 0, 0, REFUSED | EPERM)]
    lines += [(LOAD, 0, 0, NUMBER), (IF_AT_LEAST, 0, 1, X32), (RETURN, 0, 0, REFUSED | EPERM)]
    for number in refused:
        lines += [(IF_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSED | EPERM)]
    lines += [(IF_EQUAL, 0, 1, calls.clone3), (RETURN, 0, 0, REFUSED | ENOSYS)]  # threads are then made by `clone`
    lines += [(IF_EQUAL, 1, 0, calls.clone), (RETURN, 0, 0, ALLOWED), (LOAD, 0, 0, FIRST_ARGUMENT)]
    lines += [(IF_ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, REFUSED | EPERM), (RETURN, 0, 0, ALLOWED)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
