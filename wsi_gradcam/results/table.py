"""`patches.parquet`: a row a patch, streamed from the patch store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.models.activation import probabilities
from wsi_gradcam.results.patch_store import OK, SHARES, PatchStore

if TYPE_CHECKING:
    from wsi_gradcam.results.slide_plan import SlidePlan
    from wsi_gradcam.run.plan import Map, RunPlan

ROWS = 1 << 16  # in a row group


def write_table(
    place: StoragePathLike, run: RunPlan, plan: SlidePlan, store: PatchStore, causes: dict[int, str]
) -> None:
    """Write the table of a slide; `causes` says by patch number why a patch could not be read.

    Columns: `y`, `x` (level-0 px of the top left), `tissue`, `pen`, `glass` (shares), `blur` (see `quality.blur_of`),
    `status` (ok, unreadable), `cause`, `logit_CLASS`, `probability_CLASS`, `cam_mean_TARGET`, `cam_max_TARGET`; for a
    second method and those after it `METHOD_mean_TARGET`, `METHOD_max_TARGET`. The CAM's statistics are in the
    heatmap's unit, for Grad-CAM logits: with global average pooling and a linear layer, cam_mean + bias = logit.
    Numbers of unreadable patches are null, also `blur`, which patches of one colour do not have either.
    """
    schema = _schema(run)
    with storage_path(place).atomic_writer() as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        step = max(1, ROWS // plan.span) * plan.span
        for start in range(0, plan.patches, step):
            writer.write_table(_rows(run, store, start, min(start + step, plan.patches), causes, schema))


def column(run: RunPlan, shown: Map, kind: str) -> str:
    """Name of a column with a statistic of a map's patches."""
    method = "cam" if shown.method == run.settings.method[0] else shown.method
    return f"{method}_{kind}_{shown.target.label}"


def _schema(run: RunPlan) -> pa.Schema:
    names = [f"{kind}_{label}" for kind in ("logit", "probability") for label in run.facts.classes]
    names += [column(run, m, kind) for kind in ("mean", "max") for m in run.maps]
    fields = [
        ("y", pa.int64()),
        ("x", pa.int64()),
        *((name, pa.float32()) for name in (*SHARES, "blur")),
        ("status", pa.string()),
        ("cause", pa.string()),
        *((name, pa.float32()) for name in names),
    ]
    units = {column(run, m, "*"): m.info.unit for m in run.maps}
    about = {"units": units, "y, x": "level-0 px of the patch's top left", **run.identity()}
    return pa.schema(fields, metadata={"wsi_gradcam": json.dumps(about, sort_keys=True)})


def _rows(
    run: RunPlan, store: PatchStore, start: int, stop: int, causes: dict[int, str], schema: pa.Schema
) -> pa.Table:
    yx, status, logits = store.yx(start, stop), store.status(start, stop), store.logits(start, stop)
    missing = status != OK
    shares = probabilities(logits, run.facts.activation)
    columns: list[Any] = [yx[:, 0], yx[:, 1], *(store.share(name, start, stop) for name in SHARES)]
    blur = store.blur(start, stop)
    columns.append(pa.array(blur, pa.float32(), mask=np.isnan(blur)))
    columns.append(np.where(missing, "unreadable", "ok"))
    columns.append([causes.get(i) for i in range(start, stop)])
    numbers = [*logits.T, *shares.T]
    cams = [store.cams(start, stop, i) * np.float32(m.factor) for i, m in enumerate(run.maps)]
    numbers += [cam.mean(axis=(1, 2)) for cam in cams] + [cam.max(axis=(1, 2)) for cam in cams]
    columns += [pa.array(values, pa.float32(), mask=missing) for values in numbers]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)
