"""Checks before a run: of this machine, of the folder for the results, and of a cluster's workers.

This module has the results of checks, and the environment of a process: versions, the program's own files, devices.
`checks` has the checks of this process and of workers; they return `Check`s, which the command line prints. The room
may try anything a run will need (readers, stores, models, workers), and leaves everything as it was.
"""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from wsi_gradcam.errors import one_line

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.mil.spec import SlideModelSpec
    from wsi_gradcam.models.spec import ModelSpec

    AnySpec = ModelSpec | SlideModelSpec

PROGRAM = "wsi-gradcam"
# Packages on which values and messages between processes depend.
PACKAGES = ("torch", "numpy", "openslide-python", "openslide-bin", "tifffile", "imagecodecs", "zarr")
# Packages from extras: the extra, and what cannot be done without it.
OPTIONAL = {
    "dask": ("cluster", "--workers, --scheduler and --device cuda need it"),
    "distributed": ("cluster", "--workers, --scheduler and --device cuda need it"),
    "timm": ("timm", "models of timm need it"),
    "torchvision": ("timm", "models of torchvision need it"),
    "transformers": ("hf", "Hugging Face folders of transformers need it"),
    "h5py": ("features", "features in HDF5 need it"),
    "obstore": ("remote", "s3:// and https:// need it"),
    "uvicorn": ("viewer", "wsi-gradcam view needs it"),
    "xarray": ("xarray", "heatmaps in Python need it"),
    "openvino": ("engines", "it makes networks faster on CPUs"),
    "numba": ("fast", "it makes slides faster to read"),
    "scikit-learn": ("evidence", "wsi-gradcam evidence needs it"),
}
LOW_PRECISION = ("avx512_bf16", "amx_bf16", "amx_fp16")  # flags of processors


class Status(StrEnum):
    """The result of a check, worst last."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


OK, WARN, FAIL = Status


@dataclass(frozen=True)
class Check:
    """The name of a check, its status, what was found, and how to fix it."""

    name: str
    status: Status
    found: str
    mend: str = ""


def run_check(name: str, check: Callable[..., Iterable[Check]], *arguments: Any) -> Iterator[Check]:
    """Yield the checks of `check(*arguments)`; an exception becomes a check that failed."""
    try:
        yield from check(*arguments)
    except Exception as error:  # a broken installation can raise anything; the other checks continue
        yield Check(name, FAIL, one_line(error), "the message says what is missing or broken")


def format_check(check: Check) -> str:
    """Return a check on one line, with the fix after it."""
    return f"{check.status:>4}  {check.name}: {check.found}{f' -> {check.mend}' if check.mend else ''}"


def worst(checks: Iterable[Check]) -> Status:
    """Return the worst status of all checks."""
    return max((check.status for check in checks), key=list(Status).index, default=OK)


class Facts(TypedDict):
    """The environment of a process, in plain values that processes with other versions of the program can send.

    `files` is the sha256 of the program's modules; `versions` has None for packages that are not installed; `devices`
    are the GPUs that torch can use.
    """

    host: str
    python: str
    pid: int
    files: str
    versions: dict[str, str | None]
    devices: list[str]


class WorkerFacts(Facts):
    """The environment of a worker, and its problems with OUT and the model; "" for none."""

    out: str
    model: str


def facts() -> Facts:
    """Return the environment of this process."""
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "pid": os.getpid(),
        "files": files_digest(Path(__file__).parents[1]),
        "versions": {name: version_of(name) for name in (PROGRAM, *PACKAGES, *OPTIONAL)},
        "devices": [name for name, _, _ in gpus()[0]],
    }


def inspect_worker(probe: StoragePath | None, token: str, model: AnySpec | None) -> WorkerFacts:
    """Return a worker's environment, its problem with the file `probe`, and its problem with the model.

    Runs on the worker. The file must contain `token`; another one is written beside it, named after this process.
    """
    return {**facts(), "out": _exchange(probe, token) if probe else "", "model": loading_problem(model)}


def loading_problem(model: AnySpec | None) -> str:
    """Return the reason why a model does not load here; "" if it does, or there is none."""
    if model is None:
        return ""
    try:
        from wsi_gradcam.mil.aggregators import load_aggregator
        from wsi_gradcam.models.load import load_model
        from wsi_gradcam.models.spec import ModelSpec
        from wsi_gradcam.run.examining import examine_model
        from wsi_gradcam.run.settings import make_settings

        if isinstance(model, ModelSpec):
            load_model(model)
        elif model.encoder is None:
            load_aggregator(model)
        else:  # both, and whether one accepts what the other provides
            examine_model(model, make_settings(engine="eager", precision="float32"), [])
    except Exception as error:  # the model's own code may raise anything
        return one_line(error)
    return ""


def files_digest(folder: Path) -> str:
    """Return the sha256 of the names and contents of all modules below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def version_of(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def required_of(name: str) -> SpecifierSet:
    """Return the versions of a package, or of Python, that this program requires."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    ours = metadata(PROGRAM)
    if name == "python":
        return SpecifierSet(ours["Requires-Python"], prereleases=True)
    requirements = [Requirement(text) for text in ours.get_all("Requires-Dist") or []]
    found = next((one.specifier for one in requirements if one.name.lower() == name), SpecifierSet())
    found.prereleases = True
    return found


def differences(here: Facts, there: Facts) -> dict[str, tuple[str, str]]:
    """Return the differences between two environments in what must be equal: values here and there, by name.

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
    """Return (name, bytes, support of bfloat16) of each GPU that torch can use, and torch's warnings about others.

    Apple's GPU uses the machine's memory: its bytes are 0.
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


def low_precision(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return the processor's instructions for bfloat16 and float16; none if the system does not list them."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return [name for name in LOW_PRECISION if name in flags]


def _exchange(probe: StoragePath, token: str) -> str:
    """Read what another process wrote, and write something for it; return the problem, "" for none."""
    try:
        if probe.read() != token.encode():
            return f"{probe} does not contain what was written: this path is a different folder there"
        (probe.parent / f"{platform.node()}-{os.getpid()}").write(token.encode())
    except OSError as error:
        return one_line(error)
    return ""
