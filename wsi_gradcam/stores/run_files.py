"""`run.yaml` and `slides.csv`: what a run was, and how each of its slides ended."""

from __future__ import annotations

import csv
import io
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from wsi_gradcam.cam.choice import Choice
from wsi_gradcam.errors import ResumeError, StoreError
from wsi_gradcam.stores.files import PARTIAL, storing, write_atomic

if TYPE_CHECKING:
    from wsi_gradcam.plan import RunPlan

LOCK = ".lock"
COLUMNS = (
    "id", "path", "status", "error", "patches", "unreadable", "seconds", "mpp_y", "mpp_x", "slide_digest",
    "model_digest", "label", "site", "scanner", "tried",
)  # fmt: skip
OLDEST = 11  # columns that every version had, the first ones
PACKAGES = (
    "wsi-gradcam", "torch", "torchvision", "timm", "numpy", "openslide-python", "openslide-bin", "tifffile", "zarr",
    "dask", "distributed", "scikit-image", "pillow", "openvino",
)  # fmt: skip


NAMES = "surrogateescape"  # file names on Linux are bytes: one that is not UTF-8 must not stop an archive


def write_run(path: Path, run: RunPlan) -> None:
    """Write `run.yaml`: the resolved configuration, versions and digests.

    Raises:
        StoreError: the folder cannot be written.
    """
    facts = run.facts
    model = {
        "name": facts.name,
        "source": facts.source,
        "digest": facts.digest,
        "license": facts.license,
        "classes": list(facts.classes),
        "activation": facts.activation,
        "patch_px": list(facts.patch_px),
        "mpp": run.mpp,
        "mean": list(facts.mean),
        "std": list(facts.std),
        "stain": None if facts.stain is None else facts.stain.to_json(),
        "layer": facts.layer,
        "view": list(facts.view),
        "batch_size": facts.batch_size,
        "cam_shape": list(facts.cam_shape),
        "weights": run.spec.weights or "the source's own",
        "provenance": run.spec.provenance,
    }
    values = {
        "run_digest": run.digest(),
        "identity": run.identity(),
        "settings": run.settings.model_dump(mode="json"),
        "model": model,
        "targets": [asdict(target) for target in run.targets],
        "choice": facts.choice.to_json(),
        "versions": versions(),
    }
    write_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


def read_run(path: Path) -> dict[str, Any] | None:
    """What `write_run` wrote; None when there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; choose another --out") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: damaged; choose another --out, or use --overwrite") from error
    if not isinstance(values, dict) or not {"run_digest", "identity", "model"} <= values.keys():
        raise StoreError(f"{path}: not a run.yaml of wsi_gradcam; choose another --out")
    return values


def choice_from(stored: dict[str, Any]) -> Choice | None:
    """The engine and precision in what `read_run` gave; None where an older version wrote it."""
    try:
        return Choice.from_json(stored["choice"])
    except (KeyError, TypeError):
        return None


def check_same_run(path: Path, run: RunPlan) -> None:
    """Refuse to mix results.

    Raises:
        ResumeError: OUT was made by another model or configuration; says what differs.
    """
    stored = read_run(path)
    if stored is None or stored["run_digest"] == run.digest():
        return
    differences = _differences(stored["identity"], run.identity())
    raise ResumeError(
        f"{path.parent}: holds results of another model or configuration ({differences}); choose another --out, "
        "or recompute everything with --overwrite"
    )


def read_slides(path: Path) -> dict[str, dict[str, str]]:
    """Rows of slides.csv by slide id; empty when there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        text = path.read_bytes().decode("utf-8", NAMES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; choose another --out") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = list(reader)
    names = tuple(reader.fieldnames or ())
    ours = len(names) >= OLDEST and names == COLUMNS[: len(names)]
    if ((rows or text) and not ours) or any(None in row.values() for row in rows):
        raise StoreError(f"{path}: damaged; delete it and run the same command again, finished slides stay finished")
    return {row["id"]: {**dict.fromkeys(COLUMNS, ""), **row} for row in rows}


def write_slides(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write slides.csv, sorted by id.

    Raises:
        StoreError: the folder cannot be written.
    """
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows[key] for key in sorted(rows))
    write_atomic(path, buffer.getvalue().encode("utf-8", NAMES))


class SlideTable:
    """Adds rows to slides.csv; other processes may add theirs to the same file.

    The file is written whole each time, so for a large archive not after every slide: rows wait until writing costs
    less than a twentieth of the time. Rows lost with a killed process are made again from the manifests.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: dict[str, dict[str, Any]] = {}
        self._next = 0.0

    def add(self, row: dict[str, Any]) -> None:
        """Take a row, and write all that wait if it is time."""
        self._waiting[row["id"]] = row
        started = time.monotonic()
        if started >= self._next:
            self.flush()
            now = time.monotonic()
            self._next = now + 20 * (now - started)

    def flush(self) -> None:
        """Write the rows that wait.

        Raises:
            StoreError: the folder cannot be written.
        """
        if self._waiting:
            with locked(self._path.parent):
                write_slides(self._path, {**read_slides(self._path), **self._waiting})
            self._waiting = {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold OUT's lock file, as far as the system and the file system know locks."""
    with storing(folder), (folder / LOCK).open("w") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half-written of the files directly in OUT."""
    for name in ("run.yaml", "slides.csv", "slides.jsonl", "claim.json", "status.json", "run.html"):
        for path in folder.glob(f"{name}.{'[0-9a-f]' * 32}{PARTIAL}"):
            path.unlink(missing_ok=True)


@cache
def versions() -> dict[str, str]:
    """Of Python and of all packages that results may depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    flat_old, flat_new = ({**i["settings"], "model": i["model"], "format": i["format"]} for i in (old, new))
    changed = [key for key in sorted({*flat_old, *flat_new}) if flat_old.get(key) != flat_new.get(key)]

    def shown(value: object) -> str:
        text = str(value)
        return text if len(text) <= 40 else text[:12] + "..."

    return ", ".join(f"{key}: {shown(flat_old.get(key))} there, {shown(flat_new.get(key))} now" for key in changed)
