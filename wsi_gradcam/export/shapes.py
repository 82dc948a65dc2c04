"""Outlines for other programs: DSA and HistomicsUI, ASAP, OMERO, Cytomine.

Coordinates are level-0 px from the corner of the whole slide, as these programs open it; OMERO's are from the corner of
the scanned part, as Bio-Formats does. Where a format has no holes, they are outlines of a group of their own.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsi_gradcam.errors import as_text
from wsi_gradcam.export.job import Job, blocks, ome_colour, slug
from wsi_gradcam.export.outlines import HotRegions, hot_regions
from wsi_gradcam.results.heatmap import EXPLAINED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.results.display import ChannelInfo

    Points = list[tuple[float, float]]

MAX_POINTS = 50_000  # of a heatmap in a browser
SIDE = 2048
COLOURS = 11  # of a colour map in a browser, evenly
DIGITS = 3  # of coordinates in text: a thousandth of a pixel
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
    """Return x, y, z and value of the pixels that are shown, at their centres; None where there are too many."""
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
    """Return text without the characters that XML cannot hold (XML 1.0, 2.2)."""
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
    """Add the size of the slide that Bio-Formats shows: of the scanned part."""
    scanned = job.slide.scanned if job.origin != (0, 0) else None
    height, width = (scanned.height, scanned.width) if scanned else job.slide.size_px
    sizes = {"SizeX": width, "SizeY": height, "SizeZ": 1, "SizeC": 3, "SizeT": 1}
    um = {"PhysicalSizeX": repr(float(job.slide.mpp[1])), "PhysicalSizeY": repr(float(job.slide.mpp[0]))}
    about = {"ID": "Pixels:0", "DimensionOrder": "XYCZT", "Type": "uint8"}
    pixels = ET.SubElement(image, f"{{{OME}}}Pixels", {**about, **{k: str(v) for k, v in sizes.items()}, **um})
    ET.SubElement(pixels, f"{{{OME}}}Channel", {"ID": "Channel:0:0", "SamplesPerPixel": "3"})
    ET.SubElement(pixels, f"{{{OME}}}MetadataOnly")


def write_cytomine(job: Job) -> list[Path]:
    """Write a file for each chosen channel: a list of regions in WKT, whose y goes up from the slide's lower edge."""
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
