"""`wsi-gradcam validate OUT`: does a result agree with its manifest, with the specification, with its slide?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaozarrs

from wsi_gradcam.errors import ConfigError, WsiGradcamError, one_line
from wsi_gradcam.plan import SlidePlan
from wsi_gradcam.slides import open_slide
from wsi_gradcam.stages import block_name, span_name
from wsi_gradcam.stores.heatmap import HeatmapStore
from wsi_gradcam.stores.layout import RunFolder, SlideFolder
from wsi_gradcam.stores.manifest import Manifest, digest_of
from wsi_gradcam.stores.patch_store import PatchStore
from wsi_gradcam.stores.run_files import read_run, read_slides
from wsi_gradcam.workflow import FAILED


@dataclass(frozen=True)
class Finding:
    """Something wrong with a slide's result ("" for the run itself)."""

    slide: str
    problem: str


def validate(out: str | PathLike[str]) -> list[Finding]:
    """All that is wrong with the results in `out`; empty when everything is right.

    For each slide that slides.csv calls finished: the stores hold exactly the values that the manifest recorded,
    span by span and block by block; the heatmap obeys OME-Zarr 0.5 and lies over the whole slide at the right
    scale on every level; the table has a row a patch with the stored values; the slide is still the same file.

    Raises:
        ConfigError: `out` is no result.
    """
    folder = RunFolder(Path(out))
    run = read_run(folder.run)
    if run is None:
        raise ConfigError(f"{folder.path}: no run.yaml there, expected a folder that 'wsi-gradcam explain' made")
    rows = read_slides(folder.slides)
    findings = [] if rows else [Finding("", "slides.csv is missing or empty; run explain again to finish")]
    for name, row in rows.items():
        if row["status"] != FAILED:
            findings += [Finding(name, problem) for problem in _checked(folder.slide(name), row, run)]
    return findings


def _checked(folder: SlideFolder, row: dict[str, str], run: dict[str, Any]) -> Iterator[str]:
    try:
        yield from _check(folder, row, run)
    except WsiGradcamError as error:
        yield one_line(error)
    except Exception as error:  # damaged files may raise anything; each is a finding, not a crash
        yield f"cannot be read: {one_line(error)}"


def _check(folder: SlideFolder, row: dict[str, str], run: dict[str, Any]) -> Iterator[str]:
    manifest = Manifest(folder.manifest)
    stored, done = manifest.plan(), manifest.done()
    if stored is None or done is None:
        yield "is not finished: manifest/plan.json or done.json is missing; run explain again"
        return
    plan = SlidePlan.from_json(stored)
    if plan.run_digest != run["run_digest"]:
        yield "was made by another model or configuration than run.yaml says"
    yield from _check_spans(folder, plan, done)
    yield from _check_heatmap(folder, plan, done)
    yield from _check_table(folder, plan, run)
    if not folder.overview.is_file():
        yield "overview.png is missing"
    yield from _check_slide(row, plan)


def _check_spans(folder: SlideFolder, plan: SlidePlan, done: dict[str, Any]) -> Iterator[str]:
    store = PatchStore(folder.cams)
    for number, (start, stop) in enumerate(plan.spans):
        name = span_name(number)
        if name not in done["spans"]:
            yield f"span {number} is not in the manifest"
        elif store.read_span(start, stop).digest() != done["spans"][name]:
            yield f"span {number} (patches {start} to {stop}) of cams.zarr differs from what was computed"


def _check_heatmap(folder: SlideFolder, plan: SlidePlan, done: dict[str, Any]) -> Iterator[str]:
    try:
        yaozarrs.validate_zarr_store(str(folder.heatmap))
    except Exception as error:  # its own error types differ between releases
        yield f"heatmap.ome.zarr is not valid OME-Zarr: {one_line(error)}"
        return
    heatmap = HeatmapStore(folder.heatmap)
    if heatmap.shapes != plan.level_shapes:
        yield f"heatmap.ome.zarr has levels {heatmap.shapes}, expected {plan.level_shapes} for this slide"
        return
    ome = heatmap.attributes["ome"]
    for level, dataset in enumerate(ome["multiscales"][0]["datasets"]):
        expected = [mpp * plan.stride * 2**level for mpp in plan.slide_mpp]
        if not np.allclose(dataset["coordinateTransformations"][0]["scale"][1:], expected, rtol=1e-9):
            yield f"level {level} of heatmap.ome.zarr has another scale than {expected} um"
    count = len(ome["omero"]["channels"])
    for level in range(len(plan.level_shapes)):
        for number, block in enumerate(plan.blocks(level)):
            found = [digest_of((heatmap.read(level, channel, block),)) for channel in range(count)]
            found.append(digest_of((heatmap.read_flags(level, block),)))
            if done["blocks"].get(block_name(level, number)) != found:
                yield f"level {level} of heatmap.ome.zarr, block {number}, differs from what was computed"


def _check_table(folder: SlideFolder, plan: SlidePlan, run: dict[str, Any]) -> Iterator[str]:
    table = pq.read_table(folder.table)
    store = PatchStore(folder.cams)
    if table.num_rows != plan.patches:
        yield f"patches.parquet has {table.num_rows} rows, expected {plan.patches}"
        return
    yx = store.yx()
    if not (np.array_equal(table["y"], yx[:, 0]) and np.array_equal(table["x"], yx[:, 1])):
        yield "patches.parquet has other positions than cams.zarr"
    ok = np.asarray(table["status"]) == "ok"
    logits = store.logits(0, plan.patches)
    for i, name in enumerate(run["model"]["classes"]):
        if not np.array_equal(np.asarray(table[f"logit_{name}"])[ok], logits[ok, i]):
            yield f"patches.parquet has other logits of {name} than cams.zarr"


def _check_slide(row: dict[str, str], plan: SlidePlan) -> Iterator[str]:
    slide = open_slide(row["path"], plan.slide_mpp)
    try:
        if slide.info.digest != plan.slide_digest:
            yield f"{row['path']} is another file now than when it was explained"
        elif (slide.info.height, slide.info.width) != plan.slide_px:
            yield f"{row['path']} is {slide.info.height} x {slide.info.width} px, expected {plan.slide_px}"
    finally:
        slide.close()
