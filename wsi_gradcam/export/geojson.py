"""GeoJSON for QuPath: a detection for each patch with its measurements, an annotation for each hot region.

Coordinates are x, y in level-0 px as in QuPath: from the corner of the slide, or of its scanned part if the file
records one (OpenSlide's bounds). Files are written feature by feature.

The format `qupath` is a folder with a script that puts overlay, patches and hot regions on the open slide. The overlay
is the finest level of the heatmap that fits into memory as one image, divided into PNGs that a BufferedImageOverlay
places in level-0 px.
"""

from __future__ import annotations

import csv
import json
import math
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsi_gradcam.errors import ResultError, as_text
from wsi_gradcam.evidence.labels import open_clusters
from wsi_gradcam.export.job import BOUNDS, SLIDE, Job, blocks, save_png, slug
from wsi_gradcam.export.shapes import hot_regions, mask_polygons, regions_of
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.heatmap import COLOURS

if TYPE_CHECKING:
    from pathlib import Path

    from wsi_gradcam.evidence.labels import Clusters
    from wsi_gradcam.export.shapes import Mask
    from wsi_gradcam.io.documents import safe_cell
from wsi_gradcam.io.documents import safe_cell
from wsi_gradcam.results.display import ChannelInfo

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
    """Write a FeatureCollection, one feature per line."""
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


def write_clusters(job: Job) -> list[Path]:
    """Write DEST/SLIDE.clusters.geojson: an annotation around each region of a kind of evidence, by the kind's name."""
    return [_write(job, job.path("clusters.geojson"), cluster_features(job))]


def cluster_features(job: Job) -> Iterator[Feature]:
    """Yield an annotation for each region of a kind of evidence.

    Raises:
        ResultError: the slide has no label image.
    """
    found = open_clusters(job.slide)
    if found is None:
        raise ResultError(f"{job.slide.id}: has no label image of clusters; run evidence without --skip-labels")
    um2 = job.slide.mpp[0] * job.slide.mpp[1]
    for kind in found.kinds:
        polygons, level = regions_of(job, partial(_is_of, found, kind.number))
        about = {"name": kind.title, "color": list(bytes.fromhex(kind.colour))}
        for number, polygon in enumerate(polygons):
            placed = shapely.transform(polygon, lambda xy: xy - job.origin[::-1])
            measured = {"cluster": kind.number, "area µm²": polygon.area * um2, "traced on level": level}
            name = f"cluster {kind.number} {number}"
            yield _feature(job, name, json.loads(shapely.to_geojson(placed)), "annotation", about, measured)


def _is_of(found: Clusters, number: int, level: int, band: Region) -> Mask:
    """Return which pixels of a region are of a kind."""
    return np.asarray(found.read(level, band) == number)


def write_marks(job: Job) -> list[Path]:
    """Write DEST/SLIDE.geojson: people's marks, classified by kind, in the form that `audit --regions DEST` reads."""
    top, left = job.origin
    features = []
    for mark in job.slide.marks():
        ring = [[x - left, y - top] for y, x in (*mark.outline, mark.outline[0])]
        properties = {"objectType": "annotation", "classification": {"name": mark.kind}, "name": mark.text or mark.kind}
        about = {name: value for name, value in (("by", mark.by), ("made", mark.made), ("patch", mark.patch)) if value}
        geometry = {"type": "Polygon", "coordinates": [ring]}
        properties |= {"metadata": {name: str(value) for name, value in about.items()}}
        features.append(
            {"type": "Feature", "id": str(uuid.UUID(mark.id)), "geometry": geometry, "properties": properties}
        )
    return [_write(job, job.path("geojson"), features)]


def write_marks_csv(job: Job) -> list[Path]:
    """Write DEST/SLIDE.marks.csv: a row per mark, with the box (x, y, width, height) of its outline in level-0 px."""
    path = job.path("marks.csv")
    with job.atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("slide", "kind", "text", "by", "made", "patch", "x", "y", "width", "height", "id"))
        for mark in job.slide.marks():
            low, high = np.min(mark.outline, axis=0), np.max(mark.outline, axis=0)
            box = [low[1], low[0], *(high - low)[::-1]]
            patch = "" if mark.patch is None else mark.patch
            texts = [safe_cell(text) for text in (as_text(job.slide.id), mark.kind, mark.text, mark.by, mark.made)]
            rows.writerow((*texts, patch, *(f"{value:g}" for value in box), mark.id))
    return [path]


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


def annotation_features(mask: Mask, name: str) -> list[Feature]:
    """Return annotations of class `name` around the True pixels of a slide's level 0, bool [H, W], as drawn by hand.

    Raises:
        TooManyRunsError: the mask is too ragged.
    """
    properties = {"objectType": "annotation", "classification": {"name": name}}
    return [
        {"type": "Feature", "geometry": shapely.geometry.mapping(polygon), "properties": properties}
        for polygon in mask_polygons(mask)
    ]


# QuPath


MAX_PX = 1 << 25  # 128 MB in QuPath
SIDE = 2048
WHOLE = "whole-slide"  # features in the frame of the whole slide, if only a part was scanned
SCRIPT = "show_in_qupath.groovy"


def write_qupath(job: Job) -> list[Path]:
    """Write a folder for each chosen channel."""
    return [_write_qupath(job, channel) for channel in job.drawn_channels]


def _write_qupath(job: Job, channel: ChannelInfo) -> Path:
    path = job.path(f"{slug(channel)}.qupath")
    with job.atomic_path(path) as partial:
        partial.mkdir()
        tiles = _write_overlay(job, channel, partial)
        for name, frame in _frames(job):
            (partial / name).mkdir(exist_ok=True)
            framed = replace(job, options=replace(job.options, frame=frame))
            write_features(partial / name / "patches.geojson", patch_features(framed))
            write_features(partial / name / "regions.geojson", region_features(framed, channel))
        (partial / SCRIPT).write_text(script(job, channel, path, tiles), encoding="utf-8")
    return path


def _frames(job: Job) -> list[tuple[str, str]]:
    """Return the folder of features and the frame of each image that QuPath may show: the scanned part, or all."""
    return [("", BOUNDS), (WHOLE, SLIDE)] if job.slide.scanned else [("", SLIDE)]


def _write_overlay(job: Job, channel: ChannelInfo, folder: Path) -> list[tuple[str, int, int, int, int]]:
    """Write the overlay, and return name, x, y, width, height in level-0 px of each part that is not empty."""
    levels, colouring = job.slide.levels, job.colouring(channel)
    level = next((i for i, (h, w) in enumerate(levels) if h * w <= MAX_PX), len(levels) - 1)
    step = job.slide.stride_px * 2**level
    parts: list[tuple[str, int, int, int, int]] = []
    for region, values, flags in blocks(job.slide, channel, level, SIDE):
        rgba = colouring.rgba(values, flags)
        if rgba.any():
            name = f"overlay-{len(parts)}.png"
            save_png(rgba, folder / name)
            parts.append((name, region.x * step, region.y * step, region.width * step, region.height * step))
    return parts


def script(job: Job, channel: ChannelInfo, folder: Path, tiles: list[tuple[str, int, int, int, int]]) -> str:
    """Return the script, with paths and names quoted."""
    height, width = job.slide.size_px
    scanned = job.slide.scanned
    shown = [_image(Region(0, 0, height, width), WHOLE if scanned else ".")]
    if scanned:
        shown.insert(0, _image(scanned, "."))
    listed = ",\n".join(f"    [{_quoted(name)}, {x}, {y}, {w}, {h}]" for name, x, y, w, h in tiles)
    return TEMPLATE.format(
        title=" ".join(f"{channel.label} of {job.slide.id}".encode("ascii", "replace").decode().split()),
        folder=_quoted(str(folder.absolute())),
        width=width,
        height=height,
        tiles=listed,
        images="\n".join(shown),
        script=_quoted(SCRIPT),
    )


def _image(part: Region, features: str) -> str:
    """Return the lines that recognise an image of a part of the slide by its size."""
    return (
        f"if (server.getWidth() == {part.width} && server.getHeight() == {part.height})\n"
        f"    image = [{part.x}, {part.y}, {_quoted(features)}]"
    )


def _quoted(text: str) -> str:
    """Return a single-quoted string of Groovy, in which $ has no meaning."""
    return "'" + json.dumps(text)[1:-1].replace("'", "\\'").replace('\\"', '"') + "'"


TEMPLATE = """\
// wsi_gradcam: {title}
// In QuPath: open the slide, then drag this file onto the window, or Automate > Script editor > Open, and Run.
import javafx.application.Platform
import javax.imageio.ImageIO
import qupath.lib.gui.viewer.overlays.BufferedImageOverlay
import qupath.lib.io.PathIO
import qupath.lib.regions.ImageRegion

def folder = new File({folder})
def tiles = [  // file, and x, y, width, height in pixels of the slide
{tiles}
]

if (!new File(folder, 'regions.geojson').exists())  // the folder was moved
    folder = promptForFile('groovy')?.getParentFile()
if (folder == null)
    throw new IOException('Choose ' + {script} + ' in the folder that wsi-gradcam export made')

def server = getCurrentServer()
if (server == null)
    throw new IllegalStateException('Open the slide first')
def image = null  // x and y of its corner on the slide, and the folder of the features in its pixels
{images}
if (image == null)
    throw new IllegalStateException('This result is of a slide of {width} x {height} px, ' +
        'the open image has ' + server.getWidth() + ' x ' + server.getHeight())
def features = new File(folder, image[2])

// Patches and regions; what an earlier run of this script has added is replaced.
def objects = ['patches.geojson', 'regions.geojson'].collectMany {{ PathIO.readObjects(new File(features, it)) }}
def ids = objects.collect {{ it.getID() }} as Set
removeObjects(getAllObjects(false).findAll {{ ids.contains(it.getID()) }}, true)
addObjects(objects)

// The overlay.
def images = [:]
tiles.each {{ name, x, y, w, h ->
    images[ImageRegion.createInstance(x - image[0], y - image[1], w, h, 0, 0)] = ImageIO.read(new File(folder, name))
}}
def viewer = getCurrentViewer()
if (viewer != null)
    Platform.runLater {{
        viewer.setCustomPixelLayerOverlay(new BufferedImageOverlay(viewer, images))
        viewer.getOverlayOptions().setShowPixelClassification(true)
        viewer.repaint()
    }}
println 'Laid ' + objects.size() + ' objects and ' + images.size() + ' pictures on the slide'
"""
