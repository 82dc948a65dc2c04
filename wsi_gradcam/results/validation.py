"""Validation of results: they must agree with their manifest, with the specification, and with their slide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import yaozarrs

from wsi_gradcam.errors import ConfigError, WsiGradcamError, one_line
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.results.heatmap import LABEL, HeatmapStore
from wsi_gradcam.results.manifest import (
    DONE,
    Manifest,
    SlideDone,
    SlideStatus,
    block_name,
    digest_of,
    sha256_of,
    span_name,
)
from wsi_gradcam.results.patch_store import OK, STATUS_NAMES, PatchStore, StoredTable
from wsi_gradcam.results.run import planned_slides
from wsi_gradcam.results.run_files import RunFolder, RunRecord, SlideFolder, read_run
from wsi_gradcam.results.slide_tables import read_slides
from wsi_gradcam.slides import open_slide

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan

METADATA, CHUNKS = "zarr.json", "c"  # in the folder of an array
UNFINISHED = "is not finished; run the same explain command again"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a slide's result ("" for the run itself)."""

    slide: str
    problem: str


def validate(out: StoragePathLike) -> list[Finding]:
    """Return all that is wrong with the results in `out`; empty if everything is right.

    For each slide that is finished: the stores hold exactly the values that the manifest recorded, span by span and
    block by block; the heatmap obeys OME-Zarr 0.5 and lies over the whole slide at the right scale on every level;
    the table has a row a patch with the stored values; the files beside are as they were made; the slide is still
    the same file. A slide that was planned_slides and neither finished nor failed is a finding.

    Raises:
        ConfigError: `out` is no result.
    """
    folder = RunFolder(storage_path(out))
    stored = read_run(folder.run)
    if stored is None:
        raise ConfigError(f"{folder.place}: no run.yaml there, expected a folder that 'wsi-gradcam explain' made")
    run = RunRecord.from_json(stored)
    rows = read_slides(folder.slides)
    findings = [] if rows else [Finding("", "slides.csv is missing or empty; run explain again to finish")]
    for name, row in rows.items():
        if row["status"] != SlideStatus.FAILED or (folder.slide(name).manifest / DONE).is_file():
            findings += [Finding(name, problem) for problem in _checked(folder.slide(name), row, run)]
    return findings + [Finding(name, UNFINISHED) for name in planned_slides(folder) if name not in rows]


def failed_slides(out: StoragePathLike) -> list[str]:
    """Return the ids of the slides that failed: their files are not at fault, but not all are there."""
    rows = read_slides(RunFolder(storage_path(out)).slides)
    return [name for name, row in rows.items() if row["status"] == SlideStatus.FAILED]


def _checked(folder: SlideFolder, row: dict[str, str], run: RunRecord) -> Iterator[str]:
    try:
        yield from _check(folder, row, run)
    except WsiGradcamError as error:
        yield one_line(error)
    except Exception as error:  # damaged files may raise anything; each is a finding, not a crash
        yield f"cannot be read: {one_line(error)}"


def _check(folder: SlideFolder, row: dict[str, str], run: RunRecord) -> Iterator[str]:
    manifest = Manifest(folder.manifest)
    plan, done = manifest.plan(), manifest.done()
    if plan is None or done is None:
        yield UNFINISHED
        return
    if plan.run_digest != run.run_digest:
        yield "was made by another model or configuration than run.yaml says"
    yield from _check_spans(folder, plan, done)
    yield from _check_heatmap(folder, plan, done)
    yield from _check_table(folder, plan, run)
    for name, digest in done.files.items():
        if not (place := folder.place / name).is_file():
            yield f"{name} is missing"
        elif sha256_of(place) != digest:
            yield f"{name} differs from what was made"
    yield from _check_slide(row, plan, run.reader)


def _check_spans(folder: SlideFolder, plan: SlidePlan, done: SlideDone) -> Iterator[str]:
    store = PatchStore(folder.cams)
    for number, ((start, stop), digest) in enumerate(zip(plan.spans, store.digests(plan.spans), strict=True)):
        name = span_name(number)
        if name not in done.spans:
            yield f"span {number} is not in the manifest"
        elif digest != done.spans[name]:
            yield f"span {number} (patches {start} to {stop}) of cams.zarr differs from what was computed"


def _check_heatmap(folder: SlideFolder, plan: SlidePlan, done: SlideDone) -> Iterator[str]:
    try:
        _check_specification(folder.heatmap)
    except Exception as error:  # its own error types differ between releases
        yield f"heatmap.ome.zarr is not valid OME-Zarr: {one_line(error)}"
        return
    heatmap = HeatmapStore(folder.heatmap)
    if heatmap.shapes != plan.level_shapes:
        yield f"heatmap.ome.zarr has levels {heatmap.shapes}, expected {plan.level_shapes} for this slide"
        return
    ome = heatmap.attributes["ome"]
    label = json.loads((folder.heatmap / "labels" / LABEL / METADATA).read())
    yield from _check_scales("heatmap.ome.zarr", ome, plan)
    yield from _check_scales(f"label {LABEL}", label["attributes"]["ome"], plan)
    count = len(ome["omero"]["channels"])
    for level in range(len(plan.level_shapes)):
        for number, block in enumerate(plan.blocks(level)):
            found = [digest_of((heatmap.read(level, channel, block),)) for channel in range(count)]
            found.append(digest_of((heatmap.read_flags(level, block),)))
            if done.blocks.get(block_name(level, number)) != found:
                yield f"level {level} of heatmap.ome.zarr, block {number}, differs from what was computed"


def _check_specification(heatmap: StoragePath) -> None:
    """Validate a copy of what yaozarrs reads, as it knows no object stores of ours; raises whatever it raises."""
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "heatmap.ome.zarr"
        _copy_metadata(heatmap, copy)
        yaozarrs.validate_zarr_store(copy)


def _copy_metadata(place: StoragePath, folder: Path) -> None:
    folder.mkdir()
    for name in place.file_names():
        (folder / name).write_bytes((place / name).read())
    for name in place.folder_names():
        if name != CHUNKS:
            _copy_metadata(place / name, folder / name)


def _check_scales(name: str, ome: dict[str, Any], plan: SlidePlan) -> Iterator[str]:
    datasets = ome["multiscales"][0]["datasets"]
    if len(datasets) != len(plan.level_shapes):
        yield f"{name} names {len(datasets)} levels, expected {len(plan.level_shapes)}"
    for level, dataset in enumerate(datasets):
        expected = [mpp * plan.stride * 2**level for mpp in plan.slide_mpp]
        transforms = dataset["coordinateTransformations"]
        if len(transforms) != 1 or not np.allclose(transforms[0]["scale"][-2:], expected, rtol=1e-9, atol=0):
            yield f"level {level} of {name} has {transforms}, expected only the scale {expected} um"


def _check_table(folder: SlideFolder, plan: SlidePlan, run: RunRecord) -> Iterator[str]:
    table = StoredTable(folder.table, plan.patches).read()
    store = PatchStore(folder.cams)
    yx = store.yx()
    if not (np.array_equal(table["y"], yx[:, 0]) and np.array_equal(table["x"], yx[:, 1])):
        yield "patches.parquet has other positions than cams.zarr"
    if not np.array_equal(table["tissue"], store.share("tissue")):
        yield "patches.parquet has other shares of tissue than cams.zarr"
    ok = np.asarray(table["status"]) == STATUS_NAMES[OK]
    if not np.array_equal(ok, store.status() == OK):
        yield "patches.parquet has another status of some patches than cams.zarr"
    logits = store.logits(0, plan.patches)
    for i, name in enumerate(run.model.classes):
        if not np.array_equal(np.asarray(table[f"logit_{name}"])[ok], logits[ok, i]):
            yield f"patches.parquet has other logits of {name} than cams.zarr"


def _check_slide(row: dict[str, str], plan: SlidePlan, reader: str) -> Iterator[str]:
    slide = open_slide(row["path"], plan.slide_mpp, reader)
    try:
        if slide.info.digest != plan.slide_digest:
            yield f"{row['path']} is another file now than when it was explained"
        elif (slide.info.height, slide.info.width) != plan.slide_px:
            yield f"{row['path']} is {slide.info.height} x {slide.info.width} px, expected {plan.slide_px}"
    finally:
        slide.close()
