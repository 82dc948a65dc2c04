"""Processes and threads: identities that show whether a process still runs, memory, environment, timers."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec


PROC = Path("/proc")
# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
ARENAS = 2
MIB = 1 << 20


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Process:
    """The identity of a process.

    Attributes:
        boot: of the machine's current boot and its namespace of process ids; "" if the system does not say.
        start: clock ticks from the boot to the start of the process, as ids are reused; "" if it has ended.
    """

    host: str
    pid: int
    boot: str
    start: str

    def alive(self) -> bool | None:
        """Return whether the process is running; None if that cannot be known from here, as on another machine."""
        if not self.boot or self.boot != _boot():
            return None
        return _start(self.pid) == self.start


def this_process() -> Process:
    """Return the identity of the calling process."""
    pid = os.getpid()
    return Process(socket.gethostname(), pid, _boot(), _start(pid))


def _boot() -> str:
    """Return ids of the machine's boot and of the namespace of process ids: each container has its own."""
    if sys.platform != "linux":
        return ""
    try:
        return f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start(pid: int) -> str:
    """Return the start of a process in clock ticks since boot; "" if there is none, or it has ended.

    This is the kernel's own count, which changes to the clock do not affect.
    """
    try:
        state, *values = (PROC / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else values[18]


def limit_arenas() -> None:
    """Make threads share a few memory arenas, if the allocator has them (glibc); call before they start.

    Otherwise each of the threads that read, decode and compute keeps the memory that it has freed to itself (15 MiB of
    1240, ResNet-18).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def keep_freed_memory() -> None:
    """Make the allocator keep up to 64 MiB of freed memory, as glibc itself does after the first 32 MiB are freed.

    Until then, it returns the memory of every tile to the system, and decoding takes far longer (JPEG of 256 px: 490
    instead of 300 us).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
            library.mallopt(M_TRIM_THRESHOLD, 64 * MIB)


def release_freed_memory() -> None:
    """Return freed memory to the system, if the allocator can (glibc).

    The allocator keeps much of one stage's large arrays for later stages, whose sizes differ: without this, a run's
    peak is that of all stages together (ResNet-18: a tenth more).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


def make_sums_deterministic() -> None:
    """Ask MKL for matrix products that do not depend on the number of threads; call before torch is first used.

    Workers have fewer threads than a single process, and results must agree to the last bit: with MKL's default,
    VGG-11's logits differ between 1 and 2 threads. STRICT mode exists for AVX2 and later; elsewhere MKL falls back to
    its compatible mode. Convolutions do not go through MKL; they agree if batches have the same size.
    """
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")


def spare_triton() -> None:
    """Keep torch from loading Triton, its compiler for GPUs, in a process that has no GPU: 75 MiB.

    torchvision loads `torch._dynamo`, and that loads Triton if it is installed. torch looks for it once and remembers
    the answer.
    """
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available() or "triton" in sys.modules:
        return
    with suppress(ImportError, AttributeError):  # another version of torch
        from torch.utils._triton import has_triton_package

        sys.modules["triton"] = None  # type: ignore[assignment]  # makes its import fail
        try:
            has_triton_package()
        finally:
            del sys.modules["triton"]


FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only() -> Iterator[None]:
    """Allow `torch.load` in this context to create only tensors and plain containers, in the whole process.

    torchvision, `torch.export.load` and others call it with `weights_only=False`; PyTorch's own environment variable
    takes precedence. Other threads that load a pickled model meanwhile would be refused, which errs on the safe side.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def module_file(module: str) -> str | None:
    """Return the file that `import module` would run, or has run; nothing is run to find it, not even parents."""
    path: Sequence[str] | None = None
    file: str | None = None
    names = module.split(".")
    for i in range(len(names)):
        name = ".".join(names[: i + 1])
        if (loaded := sys.modules.get(name)) is not None:
            path, file = list(getattr(loaded, "__path__", ())), getattr(loaded, "__file__", None)
            continue
        found = _spec_of(name, path)
        if found is None:
            return None
        path, file = list(found.submodule_search_locations or ()), found.origin if found.has_location else None
    return file


def _spec_of(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Ask Python's finders for a module; unlike `importlib.util.find_spec`, this does not import its parents."""
    for finder in sys.meta_path:
        find: Callable[..., ModuleSpec | None] | None = getattr(finder, "find_spec", None)
        if find is not None and (found := find(name, path, None)) is not None:
            return found
    return None


@contextmanager
def searching(folders: Sequence[Path]) -> Iterator[None]:
    """Let modules be imported from these folders too, after all installed ones, none of which is replaced."""
    added = [str(folder.resolve()) for folder in folders]
    sys.path += added
    try:
        yield
    finally:
        for folder in added:  # from the end: the user's own path may contain them too
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


class PeriodicTimer:
    """Calls a function, which must not raise, every `interval_s` seconds as long as its context lasts."""

    def __init__(self, interval_s: float, function: Callable[[], None], name: str) -> None:
        self._interval_s, self._function = interval_s, function
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; when this returns, no call is in progress."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._function()


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> format_duration(59.4), format_duration(61), format_duration(7300), format_duration(200_000)
    ('59 s', '1 min 1 s', '2 h 1 min', '2 d 7 h')
    """
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"
