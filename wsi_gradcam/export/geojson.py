"""GeoJSON for QuPath: a detection for each patch with its measurements, an annotation for each hot region.

Coordinates are x, y in level-0 px as in QuPath: from the corner of the slide, or of its scanned part where the file
records one (OpenSlide's bounds). Files are written feature by feature.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsi_gradcam.export.job import Job, slug
from wsi_gradcam.export.regions import hot_regions
from wsi_gradcam.results.heatmap import COLOURS

if TYPE_CHECKING:
    from pathlib import Path

    from wsi_gradcam.results.channels import ChannelInfo

BATCH_ROWS = 1 << 12  # patches in memory at once
NOT_MEASURED = frozenset({"y", "x", "status", "cause"})
GRAY = (128, 128, 128)

Feature = dict[str, Any]


def write(job: Job) -> list[Path]:
    """Write DEST/SLIDE.patches.geojson, and a file with the hot regions of each chosen channel."""
    regions = [(job.path(f"{slug(channel)}.regions.geojson"), channel) for channel in job.drawn_channels]
    return [
        _write(job, job.path("patches.geojson"), patch_features(job)),
        *(_write(job, path, region_features(job, channel)) for path, channel in regions),
    ]


def _write(job: Job, path: Path, features: Iterable[Feature]) -> Path:
    with job.atomic_path(path) as partial:
        write_features(partial, features)
    return path


def write_features(path: Path, features: Iterable[Feature]) -> None:
    """Write a FeatureCollection, one feature a line."""
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):
            file.write((",\n" if number else "\n") + json.dumps(feature, ensure_ascii=True, allow_nan=False))
        file.write("\n]}\n")


def patch_features(job: Job) -> Iterator[Feature]:
    """Yield a detection for each patch, classified as its most probable class; unreadable ones have no measurements."""
    (height, width), (top, left) = job.slide.plan.footprint, job.origin
    classes = _Classes(job)
    number = 0
    for batch in job.slide.table_batches(BATCH_ROWS):
        for row in batch.to_pylist():
            x, y = row["x"] - left, row["y"] - top
            ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
            geometry = {"type": "Polygon", "coordinates": [ring]}
            yield _feature(job, f"patch {number}", geometry, "detection", classes.of(row), _measurements(row))
            number += 1


def region_features(job: Job, channel: ChannelInfo) -> Iterator[Feature]:
    """Yield an annotation for each hot region."""
    found = hot_regions(job, channel)
    um2 = job.slide.mpp[0] * job.slide.mpp[1]
    colour = _Classes(job).colour(channel.target) or list(bytes.fromhex(channel.colour))
    for number, polygon in enumerate(found.polygons):
        measured = {"area µm²": polygon.area * um2, "threshold": found.threshold, "traced on level": found.level}
        yield _feature(
            job,
            f"{channel.label} {number}",
            json.loads(shapely.to_geojson(shapely.transform(polygon, lambda xy: xy - job.origin[::-1]))),
            "annotation",
            {"name": f"{channel.target} hot", "color": colour},
            measured,
        )


class _Classes:
    """The names and colours of the classes."""

    def __init__(self, job: Job) -> None:
        self._names: list[str] = list(job.slide.classes)

    def of(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the classification of a patch."""
        if row["status"] != "ok":
            return {"name": "unreadable", "color": list(GRAY)}
        best = self._names[int(np.argmax([row[f"logit_{name}"] for name in self._names]))]
        return {"name": best, "color": self.colour(best)}

    def colour(self, name: str) -> list[int] | None:
        """Return red, green, blue of a class; None for a target that is not a class."""
        if name not in self._names:
            return None
        return list(bytes.fromhex(COLOURS[self._names.index(name) % len(COLOURS)]))


def _measurements(row: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row; JSON has no NaN."""
    numbers = {name: value for name, value in row.items() if name not in NOT_MEASURED and value is not None}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _feature(
    job: Job, name: str, geometry: dict[str, Any], kind: str, classification: dict[str, Any], measured: dict[str, float]
) -> Feature:
    """Return a feature as QuPath reads it; the same object has the same id in each export."""
    plan = job.slide.plan
    properties: Feature = {"objectType": kind, "classification": classification}
    if kind == "annotation":
        properties |= {"name": name, "isLocked": True}
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{plan.slide_digest} {plan.run_digest} {name}")),
        "geometry": geometry,
        "properties": {**properties, "measurements": measured},
    }
