"""Outlines for other programs: DSA and HistomicsUI, ASAP, OMERO, Cytomine.

Coordinates are level-0 px from the corner of the whole slide, as these programs open it; for OMERO, they are from the
corner of the scanned part, as in Bio-Formats. If a format has no holes, they are outlines in a group of their own.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsi_gradcam.errors import as_text
from wsi_gradcam.export.job import Job, blocks, ome_colour, slug
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.display import Colouring
from wsi_gradcam.results.heatmap import CHUNK, EXPLAINED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.results.display import ChannelInfo

    Points = list[tuple[float, float]]
    from wsi_gradcam.export.job import Job

    Mask = NDArray[np.bool_]
    Runs = NDArray[np.int64]


MAX_POINTS = 50_000  # points of a heatmap in a browser
SIDE = 2048
COLOURS = 11  # colours of a colour map in a browser, evenly spaced
DIGITS = 3  # decimals of coordinates in text: a thousandth of a pixel
ASAP_XML = ".xml"
OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def write_dsa(job: Job) -> list[Path]:
    """Write a file for each chosen channel with two annotations: its hot regions, and its heatmap as points."""
    paths = []
    for channel in job.drawn_channels:
        path = job.path(f"{slug(channel)}.dsa.json")
        with job.atomic_path(path) as partial:
            documents = [_dsa_regions(job, channel), _dsa_heatmap(job, channel)]
            partial.write_text(json.dumps(documents, allow_nan=False), encoding="ascii")
        paths.append(path)
    return paths


def _dsa_regions(job: Job, channel: ChannelInfo) -> dict[str, Any]:
    """Return an annotation of polylines in the schema of girder_large_image_annotation."""
    found = hot_regions(job, channel)
    um2 = job.slide.mpp[0] * job.slide.mpp[1]
    red, green, blue = bytes.fromhex(channel.colour)
    elements = [
        {
            "type": "polyline",
            "closed": True,
            "points": _xyz(polygon.exterior),
            "holes": [_xyz(ring) for ring in polygon.interiors],
            "lineColor": f"rgb({red}, {green}, {blue})",
            "fillColor": f"rgba({red}, {green}, {blue}, 0.2)",
            "lineWidth": 2,
            "group": channel.target,
            "label": {"value": f"{channel.label} {number}"},
            "user": {"area_um2": polygon.area * um2, "threshold": found.threshold},
        }
        for number, polygon in enumerate(found.polygons)
    ]
    about = f"Regions of {as_text(job.slide.id)} from {found.threshold:g} {channel.unit} on, by wsi_gradcam"
    return {"name": f"{channel.label}, hot regions", "description": about, "elements": elements}


def _xyz(ring: shapely.LinearRing) -> list[list[float]]:
    return [[x, y, 0.0] for x, y in _points(ring)]


def _points(ring: shapely.LinearRing) -> Points:
    """Return x, y of a ring's corners, the first not repeated."""
    xy = np.round(shapely.get_coordinates(ring)[:-1], DIGITS)
    return [(float(x), float(y)) for x, y in xy]


def _dsa_heatmap(job: Job, channel: ChannelInfo) -> dict[str, Any]:
    """Return an annotation with a point for each explained pixel of the finest level that has few enough."""
    level, points = next(
        (level, points)
        for level in range(len(job.slide.levels))
        if (points := _values_at(job, channel, level)) is not None
    )
    colouring, (low, high) = job.colouring(channel), job.window(channel)
    steps = np.linspace(low, high, COLOURS)
    rgba = colouring.rgba(steps[None].astype(np.float32), np.full((1, COLOURS), EXPLAINED, np.uint8))[0]
    element = {
        "type": "heatmap",
        "points": points,
        "radius": float(job.slide.stride_px * 2**level),
        "scaleWithZoom": True,
        "rangeValues": steps.tolist(),
        "colorRange": [f"rgba({r}, {g}, {b}, {a / 255:.3f})" for r, g, b, a in rgba.tolist()],
        "normalizeRange": False,
        "group": channel.target,
    }
    about = f"{channel.label} of {as_text(job.slide.id)} in {channel.unit}, level {level} of the heatmap"
    return {"name": f"{channel.label}, heatmap", "description": about, "elements": [element] if points else []}


def _values_at(job: Job, channel: ChannelInfo, level: int) -> list[list[float]] | None:
    """Return x, y, z and value of the pixels that are shown, at their centres; None if there are too many."""
    step, colouring, last = job.slide.stride_px * 2**level, job.colouring(channel), len(job.slide.levels) - 1
    found: list[list[float]] = []
    for region, values, flags in blocks(job.slide, channel, level, SIDE):
        y, x = np.nonzero(colouring.shown(values, flags))
        if len(found) + len(y) > MAX_POINTS and level < last:
            return None
        centres = (np.stack([x + region.x, y + region.y], axis=1) + 0.5) * step
        found += [[*xy, 0.0, float(value)] for xy, value in zip(centres.tolist(), values[y, x], strict=True)]
    return found


def write_asap(job: Job) -> list[Path]:
    """Write BASE.xml with the outlines of all chosen channels, which ASAP opens with the slide BASE.*."""
    root = ET.Element("ASAP_Annotations")
    drawn, groups = ET.SubElement(root, "Annotations"), ET.SubElement(root, "AnnotationGroups")
    for name, colour, rings in _groups(job):
        about = {"Name": name, "PartOfGroup": "None", "Color": f"#{colour}"}
        ET.SubElement(ET.SubElement(groups, "Group", about), "Attributes")
        for number, ring in enumerate(rings):
            about = {"Name": f"{name} {number}", "Type": "Polygon", "PartOfGroup": name, "Color": f"#{colour}"}
            corners = ET.SubElement(ET.SubElement(drawn, "Annotation", about), "Coordinates")
            for order, (x, y) in enumerate(_points(ring)):
                ET.SubElement(corners, "Coordinate", {"Order": str(order), "X": repr(x), "Y": repr(y)})
    return [_write_xml(job, job.named(job.base, ASAP_XML), root)]


def _groups(job: Job) -> Iterator[tuple[str, str, list[shapely.LinearRing]]]:
    """Yield name, colour and rings of each channel's outlines, and of the holes in them."""
    for channel in job.drawn_channels:
        polygons = hot_regions(job, channel).polygons
        name = xml_text(channel.label)
        yield f"{name} hot", channel.colour, [polygon.exterior for polygon in polygons]
        holes = [ring for polygon in polygons for ring in polygon.interiors]
        if holes:
            yield f"{name} holes", "808080", holes


def xml_text(text: str) -> str:
    """Return text without the characters that XML cannot contain (XML 1.0, 2.2)."""
    return re.sub(r"[^\t\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "_", as_text(text))


def _write_xml(job: Job, path: Path, root: ET.Element) -> Path:
    with job.atomic_path(path) as partial:
        partial.write_bytes(ET.tostring(root, encoding="UTF-8", xml_declaration=True))
    return path


def write_omero(job: Job) -> list[Path]:
    """Write one file of OME-XML: the slide's image without its pixels, and a ROI for each outline."""
    ET.register_namespace("", OME)
    root = ET.Element(f"{{{OME}}}OME")
    image = ET.SubElement(root, f"{{{OME}}}Image", {"ID": "Image:0", "Name": xml_text(job.slide.id)})
    _add_pixels(image, job)
    number, (top, left) = 0, job.origin
    for name, colour, rings in _groups(job):
        for ring in rings:
            about = {"ID": f"ROI:{number}", "Name": name}
            union = ET.SubElement(ET.SubElement(root, f"{{{OME}}}ROI", about), f"{{{OME}}}Union")
            corners = " ".join(f"{round(x - left, DIGITS)!r},{round(y - top, DIGITS)!r}" for x, y in _points(ring))
            shape = {"ID": f"Shape:{number}:0", "Text": name, "StrokeColor": str(ome_colour(colour)), "Points": corners}
            ET.SubElement(union, f"{{{OME}}}Polygon", shape)
            ET.SubElement(image, f"{{{OME}}}ROIRef", {"ID": f"ROI:{number}"})
            number += 1
    return [_write_xml(job, job.path("rois.ome.xml"), root)]


def _add_pixels(image: ET.Element, job: Job) -> None:
    """Add the size of the slide that Bio-Formats shows: that of the scanned part."""
    scanned = job.slide.scanned if job.origin != (0, 0) else None
    height, width = (scanned.height, scanned.width) if scanned else job.slide.size_px
    sizes = {"SizeX": width, "SizeY": height, "SizeZ": 1, "SizeC": 3, "SizeT": 1}
    um = {"PhysicalSizeX": repr(float(job.slide.mpp[1])), "PhysicalSizeY": repr(float(job.slide.mpp[0]))}
    about = {"ID": "Pixels:0", "DimensionOrder": "XYCZT", "Type": "uint8"}
    pixels = ET.SubElement(image, f"{{{OME}}}Pixels", {**about, **{k: str(v) for k, v in sizes.items()}, **um})
    ET.SubElement(pixels, f"{{{OME}}}Channel", {"ID": "Channel:0:0", "SamplesPerPixel": "3"})
    ET.SubElement(pixels, f"{{{OME}}}MetadataOnly")


def write_cytomine(job: Job) -> list[Path]:
    """Write a file for each chosen channel: a list of regions in WKT, with y upwards from the slide's lower edge."""
    paths = []
    for channel in job.drawn_channels:
        path, found = job.path(f"{slug(channel)}.cytomine.json"), hot_regions(job, channel)
        with job.atomic_path(path) as partial:
            partial.write_text(json.dumps(_cytomine(job, channel, found), indent=1), encoding="ascii")
        paths.append(path)
    return paths


def _cytomine(job: Job, channel: ChannelInfo, found: HotRegions) -> list[dict[str, Any]]:
    height, um2 = job.slide.size_px[0], job.slide.mpp[0] * job.slide.mpp[1]

    def upwards(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(xy * (1, -1) + (0, height))

    return [
        {
            "location": shapely.to_wkt(shapely.transform(polygon, upwards), rounding_precision=DIGITS),
            "term": f"{channel.label} hot",
            "properties": {"area_um2": polygon.area * um2, "threshold": found.threshold},
        }
        for polygon in found.polygons
    ]


MAX_RUNS = 250_000  # about 200 MB while polygons are made of them
TOLERANCE_PX = 0.75  # in traced pixels; turns a staircase of pixels into the line that it approximates
MIN_AREA_PX2 = 25  # smaller regions are not simplified: they could lose most of their area


class TooManyRunsError(Exception):
    """The outline has more runs than fit into bounded memory."""


def outlines(bands: Iterable[Mask], max_runs: int) -> list[shapely.Polygon]:
    """Return polygons, with holes, around the True pixels of an image given in `bands` of rows [n, w], top first.

    Coordinates are x, y in pixels; the first pixel extends from 0 to 1. Pixels that share a side are in one polygon.

    Raises:
        TooManyRunsError: there are more than `max_runs` runs.
    """
    flat, upright, count, top = [], [], 0, 0
    above: Mask | None = None
    for band in bands:
        above = np.zeros(band.shape[1], np.bool_) if above is None else above
        flat.append(_flat_runs(above, band, top))
        upright.append(_upright_runs(band, top))
        count += len(flat[-1]) + len(upright[-1])
        if count > max_runs:
            raise TooManyRunsError
        above, top = band[-1], top + len(band)
    if above is None:
        return []
    flat.append(_flat_runs(above, np.zeros((1, len(above)), np.bool_), top))
    return _faces(np.concatenate(flat), np.concatenate(upright))


def _flat_runs(above: Mask, band: Mask, top: int) -> Runs:
    """Return runs along the upper sides of a band's rows, [n, 4]: y, first x, last x, 1 if hot is below, else -1."""
    rows = np.concatenate([above[None], band]).astype(np.int8)
    return np.add(_runs(rows[1:] - rows[:-1]), (top, 0, 0, 0), dtype=np.int64)


def _upright_runs(band: Mask, top: int) -> Runs:
    """Return runs along the left and right sides of a band's pixels, [n, 4]: x, first y, last y, 1 if hot is right."""
    columns = np.pad(band, ((0, 0), (1, 1))).astype(np.int8)
    return np.add(_runs((columns[:, 1:] - columns[:, :-1]).T), (0, top, top, 0), dtype=np.int64)


def _runs(steps: NDArray[np.int8]) -> Runs:
    """Return runs of equal values other than 0 in rows, [n, 4]: row, first, end, value."""
    padded = np.pad(steps, ((0, 0), (1, 1)))
    rows, ends = np.nonzero(padded[:, 1:] != padded[:, :-1])
    value = padded[rows, ends + 1]
    begins = np.flatnonzero(value)
    return np.stack([rows[begins], ends[begins], ends[begins + 1], value[begins]], axis=1).astype(np.int64)


def _faces(flat: Runs, upright: Runs) -> list[shapely.Polygon]:
    """Return the hot faces of those that the runs enclose."""
    if not len(flat):
        return []
    y, first, end, _ = flat.T
    x, top, bottom, _ = upright.T
    lines = np.concatenate([np.stack([first, y, end, y], axis=1), np.stack([x, top, x, bottom], axis=1)])
    collection = shapely.polygonize(np.asarray(shapely.linestrings(lines.reshape(-1, 2, 2).astype(np.float64))))
    faces = shapely.get_parts(collection)
    # The pixel below the upper left corner of a face belongs to it: it is hot if such a run begins there.
    below = flat[flat[:, 3] == 1]
    hot = set(zip(below[:, 0].tolist(), below[:, 1].tolist(), strict=True))
    return [face for face in faces if _corner(face) in hot]


def _corner(face: shapely.Polygon) -> tuple[int, int]:
    """Return (y, x) of the leftmost of the uppermost corners."""
    ring = shapely.get_coordinates(face.exterior)
    x, y = ring[np.lexsort((ring[:, 0], ring[:, 1]))[0]]
    return int(y), int(x)


def mask_polygons(mask: Mask) -> list[shapely.Polygon]:
    """Return polygons around the True pixels of an image, bool [H, W], simplified, x, y in its pixels.

    Raises:
        TooManyRunsError: the mask is too ragged.
    """
    return [_simplified(polygon) for polygon in outlines([mask], MAX_RUNS)]


@dataclass(frozen=True)
class HotRegions:
    """Polygons around hot pixels.

    Attributes:
        polygons: with holes, x, y in level-0 px of the slide, valid, touching each other only at corners.
        level: the level of the heatmap that was traced, the finest without too many borders.
        threshold: the lowest value that is hot.
    """

    polygons: list[shapely.Polygon]
    level: int
    threshold: float


def hot_regions(job: Job, channel: ChannelInfo, *, simplified: bool = True) -> HotRegions:
    """Return polygons around explained pixels whose values reach the threshold, without those below `min_area`."""
    level, found = _traced(job, channel)
    tolerance = job.options.simplify if simplified else 0
    least = _least_px(job, level)
    polygons = [_in_slide(_simplified(face, tolerance), job, level) for face in found if face.area >= least]
    return HotRegions(polygons, level, job.threshold(channel))


def regions_by_area(job: Job, channel: ChannelInfo) -> tuple[HotRegions, HotRegions]:
    """Return the polygons from `min_area` upwards, and those below, both exactly along the borders of pixels."""
    level, found = _traced(job, channel)
    least = _least_px(job, level)
    parts: tuple[list[shapely.Polygon], list[shapely.Polygon]] = ([], [])
    for face in found:
        parts[face.area < least].append(_in_slide(_straight(face), job, level))
    kept, small = (HotRegions(part, level, job.threshold(channel)) for part in parts)
    return kept, small


def _least_px(job: Job, level: int) -> float:
    """Return the least area of a region in pixels of a level of the heatmap."""
    um_y, um_x = job.um_per_px(level)
    return job.options.min_area / (um_y * um_x)


def regions_of(job: Job, mask: Callable[[int, Region], Mask]) -> tuple[list[shapely.Polygon], int]:
    """Return polygons around the True pixels of masks, as in `HotRegions`, and the level that was traced.

    `mask` returns the mask of a region of a heatmap level.
    """
    level, found = _outlined(job, mask)
    least = _least_px(job, level)
    simplified = (_simplified(face, job.options.simplify) for face in found if face.area >= least)
    return [_in_slide(face, job, level) for face in simplified], level


def _traced(job: Job, channel: ChannelInfo) -> tuple[int, list[shapely.Polygon]]:
    """Return the finest level without too many borders, and polygons around what is hot there, in its pixels."""
    colouring = Colouring("gray", 0.0, 1.0, job.threshold(channel))

    def hot(level: int, band: Region) -> Mask:
        return colouring.shown(job.slide.read(channel, level, band), job.slide.read_coverage(level, band))

    return _outlined(job, hot)


def _outlined(job: Job, mask: Callable[[int, Region], Mask]) -> tuple[int, list[shapely.Polygon]]:
    last = len(job.slide.levels) - 1
    for level in range(last + 1):
        with suppress(TooManyRunsError):
            return level, outlines(_bands(job, mask, level), MAX_RUNS if level < last else 1 << 62)
    raise AssertionError("the last level has no limit")


def _bands(job: Job, mask: Callable[[int, Region], Mask], level: int) -> Iterator[Mask]:
    height, width = job.slide.levels[level]
    for y in range(0, height, CHUNK):
        yield mask(level, Region(y, 0, min(CHUNK, height - y), width))


def _straight(face: shapely.Polygon) -> shapely.Polygon:
    """Return the face without points on straight sides, which the division into bands has left behind."""
    return shapely.simplify(face, 0)


def _simplified(face: shapely.Polygon, tolerance_px: float = TOLERANCE_PX) -> shapely.Polygon:
    if face.area < MIN_AREA_PX2 or not tolerance_px:
        return _straight(face)
    found = shapely.simplify(face, tolerance_px)
    return found if found.is_valid else _straight(face)


def _in_slide(face: shapely.Polygon, job: Job, level: int) -> shapely.Polygon:
    """Return a face in level-0 px, cut at the slide's borders: the heatmap's last pixels may reach beyond."""
    step = job.slide.stride_px * 2**level
    height, width = job.slide.size_px
    placed = shapely.transform(face, lambda xy: np.minimum(xy * step, (width, height)))
    return shapely.orient_polygons(placed)


def filled(polygon: shapely.Polygon, box: Region, step: float) -> Mask:
    """Return which pixels of a region have their centres in a polygon with holes, bool [h, w].

    By scanlines: a pixel is inside if an odd number of edges crosses its row to the left of its centre.

    Args:
        polygon: x, y in level-0 px.
        box: in pixels of `step` level-0 px.
    """
    rings = [shapely.get_coordinates(ring) / step - (box.x + 0.5, box.y + 0.5) for ring in _rings(polygon)]
    edges = np.concatenate([np.concatenate([ring[:-1], ring[1:]], axis=1) for ring in rings])
    x, y, to_x, to_y = edges[edges[:, 1] != edges[:, 3]].T
    first, end = (np.ceil(pick(y, to_y)).clip(0, box.height).astype(np.int64) for pick in (np.minimum, np.maximum))
    count = end - first  # number of rows that each edge crosses
    edge = np.repeat(np.arange(len(count)), count)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    crossing = x[edge] + (row - y[edge]) * ((to_x - x) / (to_y - y))[edge]
    column = np.ceil(crossing).clip(0, box.width).astype(np.int64)
    crossed = np.bincount(row * (box.width + 1) + column, minlength=box.height * (box.width + 1))
    sums = np.cumsum(crossed.reshape(box.height, -1), axis=1)
    return np.asarray(sums[:, : box.width] % 2 == 1)


def _rings(polygon: shapely.Polygon) -> list[shapely.LinearRing]:
    return [polygon.exterior, *polygon.interiors]
