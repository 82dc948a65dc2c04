"""Whole runs on toy models, for tests: what to run, how to stop it, how to compare what it leaves."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
import zarr

from wsi_gradcam.io.paths import S3Path
from wsi_gradcam.models.spec import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("other", "marker")
LOADING = ("explain", "audit", "evidence", "info", "doctor", "card")  # commands that load models
OF_ITSELF = {"claim.json", "status.json", "run.html", ".lock"}
# Patches of 32 x 32 px at 0.5 um on slides of 0.25: 64 level-0 px, 8 pixels of the heatmap.
SMALL: dict[str, Any] = {
    "min_tissue": 0.0,
    "heatmap_stride": 8,
    "batch_size": 4,
    "span_patches": 12,
    # What `auto` finds out takes longer than these runs, and depends on how busy the machine is.
    "engine": "eager",
    "precision": "float32",
}


def toy_values(name: str, **changes: Any) -> dict[str, Any]:
    """Keys of the model file of a network in `toy_models`."""
    values: dict[str, Any] = {
        "name": name,
        "source": f"tests.toy_models:{name}",
        "classes": list(CLASSES),
        "patch_px": 32,
        "mpp": 0.5,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "layer": "features",
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def toy_spec(name: str, **changes: Any) -> ModelSpec:
    """The specification of a network in `toy_models`, whose code may run."""
    return ModelSpec(**toy_values(name, **changes)).trusting()


def toy_file(folder: Path, name: str, **changes: Any) -> Path:
    """A model file of a network in `toy_models`."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(toy_values(name, **changes)), encoding="utf-8")
    return path


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags of the command line."""
    return [text for key, value in settings.items() for text in (f"--{key.replace('_', '-')}", str(value))]


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `wsi-gradcam ARGUMENTS` as a user does, where `tests.toy_models` can be imported and may run."""
    trusting = ["--trust-code"] if arguments[0] in LOADING else []
    return subprocess.run(
        [sys.executable, "-m", "wsi_gradcam.cli", *map(str, arguments), *trusting],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def contents(out: Path) -> dict[str, bytes]:
    """Every result below `out` by name; of slides.csv without the seconds, the one thing that may differ.

    Nor with the digests of the rows, which cover them.

    What a run tells of itself is no result.
    """
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return _results(files)


def _results(files: dict[str, bytes]) -> dict[str, bytes]:
    files = {name: data for name, data in files.items() if name not in OF_ITSELF and not name.startswith("log/")}
    if "slides.csv" in files:
        rows = list(csv.DictReader(io.StringIO(files["slides.csv"].decode())))
        files["slides.csv"] = json.dumps([{**row, "seconds": "", "row_digest": ""} for row in rows]).encode()
    return files


def _without_origin(run_yaml: bytes) -> bytes:
    values = yaml.safe_load(run_yaml)
    del values["model"]["spec"], values["model"]["folder"], values["sha256_of_the_rest"]
    return yaml.safe_dump(values, sort_keys=False).encode()


def objects(out: str) -> dict[str, bytes]:
    """As `contents`, of a folder in an object store."""
    place = S3Path.from_url(out)
    keys = [item["path"] for item in place.bucket.store.list(f"{place.key}/").collect()]
    files = {key.removeprefix(f"{place.key}/"): bytes(place.bucket.store.get(key).bytes()) for key in keys}
    return _results(files)


def differing(out: Path, expected: Path, model_moved: bool = False) -> list[str]:
    """Names of the files that only one folder has, or that differ; with `model_moved` but for where the model is."""
    found, wanted = contents(out), contents(expected)
    if model_moved:
        for files in (found, wanted):
            files["run.yaml"] = _without_origin(files["run.yaml"])
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    """Rows of slides.csv by slide id."""
    with (out / "slides.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


class Heatmap:
    """A heatmap read with zarr alone, through its metadata."""

    def __init__(self, slide_folder: Path) -> None:
        self.group: Any = zarr.open_group(slide_folder / "heatmap.ome.zarr", mode="r")
        attributes: dict[str, Any] = self.group.attrs.asdict()
        self.ome: dict[str, Any] = attributes["ome"]
        self.datasets: list[Any] = self.ome["multiscales"][0]["datasets"]
        self.labels: list[str] = [channel["label"] for channel in self.ome["omero"]["channels"]]

    def level(self, number: int, label: str) -> npt.NDArray[np.float32]:
        """A channel of a level."""
        image: npt.NDArray[np.float32] = self.group[self.datasets[number]["path"]][self.labels.index(label)]
        return image

    def scale_um(self, number: int) -> npt.NDArray[np.float64]:
        """(y, x) micrometres per pixel of a level."""
        (transform,) = self.datasets[number]["coordinateTransformations"]
        return np.asarray(transform["scale"][1:], np.float64)

    def flags(self, number: int) -> npt.NDArray[np.uint8]:
        """The coverage label of a level."""
        return np.asarray(self.group[f"labels/coverage/{number}"])


def stored(slide_folder: Path, name: str) -> npt.NDArray[Any]:
    """An array of cams.zarr."""
    return np.asarray(zarr.open_group(slide_folder / "cams.zarr", mode="r")[name])


def start(
    slides: Sequence[Path],
    model: str,
    out: Path | str,
    *,
    die_at_change: int | None = None,
    slowness_s: float = 0.0,
    environment: dict[str, str] | None = None,
) -> Any:
    """A process that explains `slides` with a toy model, or a model file, to be killed.

    It is forked from one that has torch loaded.

    It kills itself when it is about to change the folder for the `die_at_change`-th time, counted from 0; the model
    `slow_linear` sleeps for `slowness_s` in each batch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.doomed"])
    from tests.doomed import explain_and_die

    arguments = (list(map(str, slides)), model, str(out), die_at_change, slowness_s, environment or {})
    process = context.Process(target=explain_and_die, args=arguments)
    process.start()
    return process
