"""`run.yaml` and `slides.csv`: what a run was, and how each of its slides ended."""

from __future__ import annotations

import csv
import io
import platform
import time
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import yaml

from wsi_gradcam.cam.facts import Choice
from wsi_gradcam.errors import ResumeError, StoreError
from wsi_gradcam.io.paths import StoragePathLike, storage_path

if TYPE_CHECKING:
    from wsi_gradcam.run.plan import RunPlan

COLUMNS = (
    "id",
    "path",
    "status",
    "error",
    "patches",
    "unreadable",
    "seconds",
    "mpp_y",
    "mpp_x",
    "slide_digest",
    "model_digest",
    "label",
    "site",
    "scanner",
    "tried",
)
OLDEST = 11  # columns that every version had, the first ones
PACKAGES = (
    "wsi-gradcam",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "openslide-python",
    "openslide-bin",
    "tifffile",
    "zarr",
    "dask",
    "distributed",
    "scikit-image",
    "pillow",
    "openvino",
)


NAMES = "surrogateescape"  # file names on Linux are bytes: one that is not UTF-8 must not stop an archive


def write_run(place: StoragePathLike, run: RunPlan) -> None:
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
        "spec": run.spec.model_dump(mode="json", exclude_unset=True, exclude={"provenance"}),
        "folder": str(run.spec.folder),
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
    storage_path(place).write(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


def read_run(place: StoragePathLike) -> dict[str, Any] | None:
    """What `write_run` wrote; None when there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        values = yaml.safe_load(storage_path(place).read().decode())
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StoreError(f"{place}: damaged; choose another --out, or use --overwrite") from error
    if not isinstance(values, dict) or not {"run_digest", "identity", "model"} <= values.keys():
        raise StoreError(f"{place}: not a run.yaml of wsi_gradcam; choose another --out")
    return values


def choice_from(stored: dict[str, Any]) -> Choice | None:
    """The engine and precision in what `read_run` gave; None where an older version wrote it."""
    try:
        return Choice.from_json(stored["choice"])
    except (KeyError, TypeError):
        return None


def check_same_run(place: StoragePathLike, run: RunPlan) -> None:
    """Refuse to mix results.

    Raises:
        ResumeError: OUT was made by another model or configuration; says what differs.
    """
    stored = read_run(place)
    if stored is None or stored["run_digest"] == run.digest():
        return
    differences = _differences(stored["identity"], run.identity())
    raise ResumeError(
        f"{storage_path(place).parent}: holds results of another model or configuration ({differences}); choose "
        "another --out, or recompute everything with --overwrite"
    )


def read_slides(place: StoragePathLike) -> dict[str, dict[str, str]]:
    """Rows of slides.csv by slide id; empty when there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return _parsed(place, storage_path(place).read())
    except FileNotFoundError:
        return {}


def _parsed(place: StoragePathLike, data: bytes) -> dict[str, dict[str, str]]:
    text = data.decode("utf-8", NAMES)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = list(reader)
    names = tuple(reader.fieldnames or ())
    ours = len(names) >= OLDEST and names == COLUMNS[: len(names)]
    if ((rows or text) and not ours) or any(None in row.values() for row in rows):
        raise StoreError(f"{place}: damaged; delete it and run the same command again, finished slides stay finished")
    return {row["id"]: {**dict.fromkeys(COLUMNS, ""), **row} for row in rows}


def write_slides(place: StoragePathLike, rows: dict[str, dict[str, Any]]) -> None:
    """Write slides.csv, sorted by id.

    Raises:
        StoreError: the folder cannot be written.
    """
    storage_path(place).write(_encoded(rows))


def _encoded(rows: dict[str, dict[str, Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows[key] for key in sorted(rows))
    return buffer.getvalue().encode("utf-8", NAMES)


class SlideTable:
    """Adds rows to slides.csv; other processes may add theirs to the same file.

    The file is written whole each time, so for a large archive not after every slide: rows wait until writing costs
    less than a twentieth of the time. Rows lost with a killed process are made again from the manifests.
    """

    def __init__(self, place: StoragePathLike) -> None:
        self._place = storage_path(place)
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
            self._place.update(self._with_waiting)
            self._waiting = {}

    def _with_waiting(self, data: bytes | None) -> bytes:
        return _encoded({**({} if data is None else _parsed(self._place, data)), **self._waiting})


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
