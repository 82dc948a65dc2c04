"""What a process runs with: versions, the program's own files, devices. Plain values, to compare between processes.

A check and how it ended.
"""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import one_line

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath


PROGRAM = "wsi-gradcam"
# What values and messages between processes depend on.
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "openslide-python",
    "openslide-bin",
    "tifffile",
    "imagecodecs",
    "zarr",
    "dask",
    "distributed",
    "obstore",
)
OPTIONAL = ("openvino",)
LOW_PRECISION = ("avx512_bf16", "amx_bf16", "amx_fp16")  # flags of processors


def facts() -> dict[str, Any]:
    """What this process runs with.

    `host`, `pid`, `python`, `files` (sha256 of the program's modules), `versions` by package (None where it is not
    installed), and `devices`, the GPUs that torch can use.
    """
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "pid": os.getpid(),
        "files": files_digest(Path(__file__).parents[1]),
        "versions": {name: version_of(name) for name in (PROGRAM, *PACKAGES, *OPTIONAL)},
        "devices": [name for name, _, _ in gpus()[0]],
    }


def visit(probe: StoragePath | None, token: str, model: Any) -> dict[str, Any]:
    """On a worker: its facts, what it makes of the file `probe`, and whether the model of a specification loads.

    `out` and `model` are the problems, "" where there are none: the file must hold `token`, and another is written
    beside it, named after this process.
    """
    return {**facts(), "out": _exchange(probe, token) if probe else "", "model": load(model)}


def load(model: Any) -> str:
    """Why the model of a specification does not load here; "" where it does, or there is none."""
    if model is None:
        return ""
    try:
        from wsi_gradcam.models.load import load_model

        load_model(model)
    except Exception as error:  # the model's own code may raise anything
        return one_line(error)
    return ""


def files_digest(folder: Path) -> str:
    """sha256 of the names and contents of all modules below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def version_of(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def differences(here: dict[str, Any], there: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Where the facts of two processes differ in what must be equal: what it is, here and there.

    Only the first two numbers of Python's version count; builds of one version (2.6.0+cpu, 2.6.0+cu124) are equal.
    """
    sides = [
        {
            "python": facts["python"].rpartition(".")[0],
            "files of wsi_gradcam": facts["files"][:12],
            **{name: (found or "none").partition("+")[0] for name, found in facts["versions"].items()},
        }
        for facts in (here, there)
    ]
    return {name: (sides[0][name], other) for name, other in sides[1].items() if sides[0].get(name) != other}


def gpus() -> tuple[list[tuple[str, int, bool]], str]:
    """(name, bytes, whether it calculates in bfloat16) of each GPU that torch can use, and torch's remarks on others.

    Apple's has the machine's memory: its bytes are 0.
    """
    import torch

    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        found = []
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            of = torch.cuda.get_device_properties(number)
            with torch.cuda.device(number):
                found.append((f"cuda:{number} {of.name}", of.total_memory, torch.cuda.is_bf16_supported()))
        if torch.backends.mps.is_available():
            found.append(("mps", 0, True))
    return found, " ".join(" ".join(str(remark.message).split()) for remark in remarks)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def low_precision(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What the processor offers for bfloat16 and float16; where the system does not tell, nothing."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return [name for name in LOW_PRECISION if name in flags]


def _exchange(probe: StoragePath, token: str) -> str:
    """Read what another process wrote, and write for it."""
    try:
        if probe.read() != token.encode():
            return f"{probe} holds something else than was written: another folder at the same path"
        (probe.parent / f"{platform.node()}-{os.getpid()}").write(token.encode())
    except OSError as error:
        return one_line(error)
    return ""


OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is "ok", "warn" or "fail", what was found, and how to mend it."""

    name: str
    status: str
    found: str
    mend: str = ""


def guarded(name: str, check: Callable[..., Iterable[Check]], *arguments: Any) -> Iterator[Check]:
    """The checks of `check(*arguments)`; what it raises is one that failed."""
    try:
        yield from check(*arguments)
    except Exception as error:  # a broken installation raises anything; the other checks go on
        yield Check(name, FAIL, one_line(error), "the message says what is missing or broken")


def shown(check: Check) -> str:
    """A check on one line, its mend behind it."""
    return f"{check.status:>4}  {check.name}: {check.found}{f' -> {check.mend}' if check.mend else ''}"


def worst(checks: Iterable[Check]) -> str:
    """The gravest status of all."""
    return max((check.status for check in checks), key=(OK, WARN, FAIL).index, default=OK)
