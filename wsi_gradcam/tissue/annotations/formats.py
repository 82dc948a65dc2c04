"""Formats of annotation files: QuPath's GeoJSON, XML from ASAP (`ASAP_Annotations`) and ImageScope, label PNGs.

GeoJSON (RFC 7946) as QuPath writes it: coordinates are level-0 pixels, classes are under `properties`.

XML is read as a stream by expat, so that no tree of the file is built in memory. A document type declaration is
refused: these programs do not write one, and entities are how a small XML file becomes a large one.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn
from xml.parsers import expat

import imagecodecs
import numpy as np
from PIL import Image

from wsi_gradcam.errors import AnnotationError, one_line
from wsi_gradcam.geometry import Region
from wsi_gradcam.tissue.annotations.areas import (
    BACKGROUND,
    MAX_MASK_PX,
    Annotations,
    Area,
    box,
    ellipse,
    make_annotations,
    make_outline,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from wsi_gradcam.tissue.annotations.areas import Block

GEOJSON_OPEN = frozenset({"Point", "MultiPoint", "LineString", "MultiLineString"})
EXPECTED_GEOJSON = "expected a GeoJSON FeatureCollection, Feature, list of these, or geometry"

Attributes = dict[str, str]
MAX_DEPTH = 64  # levels of nested elements; these formats need seven

# ASAP's types that enclose an area; a Spline's points are joined by straight lines here.
ASAP_CLOSED = frozenset({"Polygon", "Rectangle", "Spline"})
NO_GROUP = "None"  # as ASAP writes it
# The names that ImageScope gives to layers.
NUMBERED = re.compile(r"(?:layer|annotation)?\s*\d*", re.IGNORECASE)
# ImageScope's type numbers. An ellipse is stored as the corners of its box.
FREEHAND, RECTANGLE, ELLIPSE = "0", "1", "2"
IMAGESCOPE_NAMES = {"3": "arrow", "4": "ruler", "5": "counter"}


def read_geojson(path: Path, data: bytes) -> Annotations:
    """Return the areas of a GeoJSON file; points and lines are counted and left out.

    A class is the `name` of the `classification`, or `a: b` if QuPath lists several `names`; otherwise the object's own
    `name`.

    Raises:
        AnnotationError: not GeoJSON, damaged, or without an area.
    """
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
        raise AnnotationError(f"{path}: not a JSON file: {' '.join(str(error).split())}; {EXPECTED_GEOJSON}") from error
    areas: list[Area] = []
    ignored: list[str] = []
    for number, (geometry, name) in enumerate(_geojson_features(path, values)):
        for part in _simple_geometries(path, geometry, number):
            if part["type"] in GEOJSON_OPEN:
                ignored.append(part["type"])
            else:
                areas += _polygon_areas(path, part, name, f"feature {number}")
    return make_annotations(path, areas, ignored)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON")


def _geojson_features(path: Path, values: Any) -> Iterator[tuple[Any, str]]:
    """Yield (geometry, class) of each feature."""
    if isinstance(values, list):
        for item in values:
            yield from _geojson_features(path, _check_type(path, item, {"Feature", "FeatureCollection"}))
        return
    kind = _type_of(values)
    if kind == "FeatureCollection" and isinstance(values.get("features"), list):
        for item in values["features"]:
            yield from _geojson_features(path, _check_type(path, item, {"Feature"}))
    elif kind == "Feature":
        if values.get("geometry") is not None:  # RFC 7946 section 3.2: a feature may have none
            yield values["geometry"], _class_name(values.get("properties"))
    elif kind in GEOJSON_OPEN | {"Polygon", "MultiPolygon", "GeometryCollection"}:
        yield values, ""
    else:
        raise AnnotationError(f"{path}: holds {_describe(values)}; {EXPECTED_GEOJSON}")


def _type_of(item: Any) -> str:
    """Return the type that a GeoJSON object states; "" if it states none."""
    found = item.get("type") if isinstance(item, dict) else None
    return found if isinstance(found, str) else ""


def _check_type(path: Path, item: Any, kinds: set[str]) -> Any:
    if _type_of(item) not in kinds:
        raise AnnotationError(f"{path}: holds {_describe(item)} among its features; {EXPECTED_GEOJSON}")
    return item


def _class_name(properties: Any) -> str:
    if not isinstance(properties, dict):
        return ""
    found = properties.get("classification")
    if isinstance(found, dict):
        names = found.get("names")
        if isinstance(names, list) and names:
            return ": ".join(map(str, names))
        found = found.get("name")
    if isinstance(found, str) and found:
        return found
    name = properties.get("name")
    return name if isinstance(name, str) else ""


def _simple_geometries(path: Path, geometry: Any, number: int) -> Iterator[dict[str, Any]]:
    """Yield the geometry, or the geometries of a collection."""
    kind = _type_of(geometry)
    inner = geometry.get("geometries") if kind == "GeometryCollection" else None
    if isinstance(inner, list):
        for part in inner:
            if _type_of(part) == "GeometryCollection":  # section 3.1.8: SHOULD be avoided
                raise AnnotationError(f"{path}: feature {number} nests collections; expected plain geometries")
            yield from _simple_geometries(path, part, number)
    elif kind in GEOJSON_OPEN | {"Polygon", "MultiPolygon"} and isinstance(geometry.get("coordinates"), list):
        yield geometry
    else:
        raise AnnotationError(f"{path}: feature {number} has {_describe(geometry)} for a geometry; expected a Polygon")


def _polygon_areas(path: Path, geometry: dict[str, Any], name: str, what: str) -> Iterator[Area]:
    polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    for rings in polygons:
        if not isinstance(rings, list) or not rings:
            raise AnnotationError(f"{path}: {what} has a polygon without a ring; expected lists of points")
        outlines = [make_outline(path, what, ring) for ring in rings]
        yield Area(name, outlines[0], tuple(outlines[1:]))


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object of type {str(value.get('type'))[:40]!r}"
    return f"a {type(value).__name__}"


def read_xml(path: Path, data: bytes) -> Annotations:
    """Return the areas of an ASAP or ImageScope file, distinguished by the root element.

    Raises:
        AnnotationError: neither, damaged, or without an area.
    """
    reader = _Reader(path)
    parser = expat.ParserCreate()
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.StartDoctypeDeclHandler = reader.doctype
    try:
        parser.Parse(data, True)
    except AnnotationError:
        raise
    except (expat.ExpatError, ValueError, LookupError) as error:  # the last two: encodings
        raise AnnotationError(f"{path}: damaged or not XML: {error}; expected annotations of ASAP or ImageScope") from (
            error
        )
    assert reader.format is not None  # a document without a root element is an ExpatError
    areas, ignored = reader.format.result()
    return make_annotations(path, areas, ignored)


class _Reader:
    """Detects the format and passes the elements on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._depth = 0
        self.format: _Asap | _ImageScope | None = None

    def start(self, tag: str, attributes: Attributes) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise AnnotationError(f"{self._path}: more than {MAX_DEPTH} nested elements, which no annotation file has")
        if self.format is not None:
            self.format.start(tag, attributes)
        elif tag in FORMATS:
            self.format = FORMATS[tag](self._path)
        else:
            raise AnnotationError(
                f"{self._path}: XML of {tag[:40]!r}, expected ASAP_Annotations (ASAP) or Annotations (ImageScope)"
            )

    def end(self, tag: str) -> None:
        assert self.format is not None  # set by the first start
        self._depth -= 1
        self.format.end(tag)

    def doctype(self, *declared: object) -> None:
        raise AnnotationError(f"{self._path}: declares a document type, which annotation files do not have; refused")


class _Asap:
    """`Annotation` elements with `Type`, `PartOfGroup`, and `Coordinate` elements with `Order`, `X`, `Y`.

    The class is the group, as in ASAP's own conversion to masks; without one, it is the annotation's name. `Group`
    elements, which come last, say which other groups contain a group.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._areas: list[Area] = []
        self._ignored: list[str] = []
        self._about: Attributes = {}
        self._points: list[tuple[float, str | None, str | None]] = []
        self._above: dict[str, set[str]] = {}  # the group that contains a group

    def start(self, tag: str, attributes: Attributes) -> None:
        if tag == "Annotation":
            self._about, self._points = attributes, []
        elif tag == "Coordinate":
            order = attributes.get("Order", "")
            place = float(order) if order.isdecimal() and len(order) < 16 else float(len(self._points))
            self._points.append((place, attributes.get("X"), attributes.get("Y")))
        elif tag == "Group":
            self._above.setdefault(attributes.get("Name", ""), set()).add(attributes.get("PartOfGroup", NO_GROUP))

    def _groups(self, name: str) -> tuple[str, ...]:
        """Return the groups that contain a group, from the inside out, stopping at a name that occurs twice."""
        found: list[str] = []
        while len(above := self._above.get(name, set())) == 1 and len(found) < MAX_DEPTH:
            (name,) = above
            if name in (NO_GROUP, "", *found):
                break
            found.append(name)
        return tuple(found)

    def end(self, tag: str) -> None:
        if tag != "Annotation":
            return
        kind, group = self._about.get("Type", "Polygon"), self._about.get("PartOfGroup", NO_GROUP)
        name = self._about.get("Name", "")
        if kind not in ASAP_CLOSED:
            self._ignored.append(kind)
            return
        points = [(x, y) for _, x, y in sorted(self._points, key=lambda point: point[0])]
        self._areas.append(
            Area(name if group in (NO_GROUP, "") else group, make_outline(self._path, f"annotation {name!r}", points))
        )

    def result(self) -> tuple[list[Area], list[str]]:
        return [replace(area, groups=self._groups(area.name)) for area in self._areas], self._ignored


@dataclass
class _Layer:
    """An `Annotation` element of ImageScope: regions with one name and colour, each with its text.

    If a layer has a name of its own, that is the class, and a region's text is a further name by which to choose it. If
    it has none, or only the number that ImageScope gives it, the text is the class.
    """

    name: str
    positive: list[tuple[str, NDArray[np.float64]]] = field(default_factory=list)
    negative: list[NDArray[np.float64]] = field(default_factory=list)

    def areas(self) -> list[Area]:
        """Return the areas inside positive regions, with negative ones as holes."""
        areas = [self._area(text, outline) for text, outline in self.positive]
        if not self.negative:
            return areas
        low = np.array([hole.min(axis=0) for hole in self.negative])
        high = np.array([hole.max(axis=0) for hole in self.negative])
        return [replace(area, holes=self._touching(area.outline, low, high)) for area in areas]

    def _area(self, text: str, outline: NDArray[np.float64]) -> Area:
        named = self.name and not NUMBERED.fullmatch(self.name)
        name, *others = dict.fromkeys(filter(None, (self.name, text) if named else (text, self.name))) or [""]
        return Area(name, outline, groups=tuple(others))

    def _touching(
        self, outline: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], ...]:
        near = ((low <= outline.max(axis=0)) & (high >= outline.min(axis=0))).all(axis=1)
        return tuple(self.negative[i] for i in np.flatnonzero(near))


class _ImageScope:
    """`Annotation` layers of `Region` elements with `Type`, `NegativeROA`, and `Vertex` elements with `X`, `Y`.

    Coordinates are level-0 pixels. The class is the layer's name or the region's `Text`, see `_Layer`. A region with
    `NegativeROA="1"` is cut out of the others of its layer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._layers: list[_Layer] = []
        self._ignored: list[str] = []
        self._about: Attributes = {}
        self._points: list[tuple[str | None, str | None]] = []
        self._inside = False  # those of a region, which has attributes too

    def start(self, tag: str, attributes: Attributes) -> None:
        if tag == "Annotation":
            self._layers.append(_Layer(attributes.get("Name", "").strip()))
        elif tag == "Attribute" and self._layers and not self._inside and attributes.get("Name") == "Description":
            self._layers[-1].name = self._layers[-1].name or attributes.get("Value", "").strip()
        elif tag == "Region":
            self._about, self._points, self._inside = attributes, [], True
        elif tag in ("Vertex", "V"):
            self._points.append((attributes.get("X"), attributes.get("Y")))

    def end(self, tag: str) -> None:
        if tag != "Region":
            return
        self._inside = False
        kind = self._about.get("Type", FREEHAND)
        if kind not in (FREEHAND, RECTANGLE, ELLIPSE):
            self._ignored.append(IMAGESCOPE_NAMES.get(kind, f"region of type {kind}"))
            return
        if not self._layers:
            raise AnnotationError(f"{self._path}: a Region outside an Annotation; expected ImageScope's annotations")
        layer = self._layers[-1]
        outline = self._outline(kind, f"region {self._about.get('Id', '?')} of {layer.name!r}")
        if self._about.get("NegativeROA", "0").lower() in ("1", "true"):
            layer.negative.append(outline)
        else:
            layer.positive.append((self._about.get("Text", "").strip(), outline))

    def _outline(self, kind: str, what: str) -> NDArray[np.float64]:
        points = self._points
        if kind == FREEHAND:
            return make_outline(self._path, what, points)
        # Two opposite corners are enough for a box; repeating a point makes it pass as an outline.
        corners = make_outline(self._path, what, [*points, *points] if len(points) == 2 else points)
        return box(corners) if kind == RECTANGLE else ellipse(corners)

    def result(self) -> tuple[list[Area], list[str]]:
        alone = ["negative region without another"] * sum(len(la.negative) for la in self._layers if not la.positive)
        return [area for layer in self._layers for area in layer.areas()], [*self._ignored, *alone]


FORMATS: dict[str, Callable[[Path], _Asap | _ImageScope]] = {"ASAP_Annotations": _Asap, "Annotations": _ImageScope}


SIGNATURE = b"\x89PNG\r\n\x1a\n"
ALPHA_MODES = ("LA", "RGBA")
ROWS = 256  # pixels of a strip
RGB = 3


def values_of(labels: NDArray[Any]) -> frozenset[int]:
    """Return the labels that occur."""
    if labels.dtype.kind == "u" and labels.dtype.itemsize <= 2:
        return frozenset(np.flatnonzero(np.bincount(labels.ravel())).tolist())
    return frozenset(np.unique(labels).tolist())


def packed(samples: NDArray[Any], alpha: bool) -> NDArray[Any]:
    """Return a label for each colour of samples [h, w, n]; grey stays as it is, and what alpha hides is background."""
    colours = samples.shape[2] - alpha
    labels = samples[..., 0]
    if colours == RGB:
        bits = 8 * samples.dtype.itemsize
        red, green, blue = (samples[..., i].astype(np.int64) for i in range(RGB))
        labels = (red << 2 * bits) | (green << bits) | blue
    return np.where(samples[..., -1] > 0, labels, labels.dtype.type(BACKGROUND)) if alpha else labels


def colour_name(bits: int) -> Callable[[int], str]:
    """Return the function that names a packed colour: its grey value, or else a name such as `#ff0000`."""

    def name(label: int) -> str:
        red, green, blue = (label >> shift & (1 << bits) - 1 for shift in (2 * bits, bits, 0))
        digits = bits // 4
        return str(red) if red == green == blue else f"#{red:0{digits}x}{green:0{digits}x}{blue:0{digits}x}"

    return name


class PngPixels:
    """The pixels of a PNG, which is decoded as a whole and labelled in strips.

    Raises:
        AnnotationError: not a PNG, damaged, or too large.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 26:
            raise AnnotationError(f"{path}: not a PNG; expected a PNG mask of the whole slide")
        width, height, bits, kind = struct.unpack(">IIBB", data[16:26])
        if width * height > MAX_MASK_PX:
            raise AnnotationError(
                f"{path}: {width} x {height} px, expected at most {MAX_MASK_PX:,} px for a PNG; a sixteenth of the "
                "slide's resolution is as fine as a mask is used, and a tiled TIFF may be larger"
            )
        self.sizes: list[tuple[int, int]] = [(height, width)]
        self.name: Callable[[int], str] = str
        try:
            self._image, self._table = self._decoded(data, bits == 16 and kind not in (0, 3))
        except (OSError, SyntaxError, ValueError, struct.error, imagecodecs.PngError) as error:
            raise AnnotationError(f"{path}: damaged: {one_line(error)}; write the mask again") from error

    def _decoded(self, data: bytes, deep: bool) -> tuple[Image.Image | NDArray[Any], NDArray[Any] | None]:
        """Return the picture and, for a palette, the labels of its indices."""
        if deep:  # 16-bit colours, half of which Pillow would drop
            self.name = colour_name(16)
            return imagecodecs.png_decode(data), None
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            opened.load()
            image: Image.Image = opened
        if image.mode == "P":
            return image, self._of_palette(image)
        if image.mode in ("L", "RGB") and "transparency" in image.info:
            image = image.convert("LA" if image.mode == "L" else "RGBA")
        if image.mode in ("RGB", "RGBA"):
            self.name = colour_name(8)
        return image, None

    def _of_palette(self, image: Image.Image) -> NDArray[np.int64]:
        """Return the label of each palette index: the index itself.

        If an index other than 0 is black and used, and 0 is not, indices mean nothing: the label is then the colour.
        """
        colours = np.zeros((256, RGB), np.int64)
        palette = np.asarray(image.getpalette() or [], np.int64).reshape(-1, RGB)
        colours[: len(palette)] = palette
        by_colour = colours @ (1 << 16, 1 << 8, 1)
        used = np.asarray(image.histogram()) > 0
        mixed = bool(by_colour[0] != BACKGROUND and ((by_colour == BACKGROUND) & used).any())
        labels = by_colour if mixed else np.arange(256)
        if mixed:
            self.name = colour_name(8)
        clear = image.info.get("transparency", b"")
        numbers = [clear] if isinstance(clear, int) else [i for i, alpha in enumerate(clear) if not alpha]
        labels[numbers] = BACKGROUND
        return labels

    def blocks(self, level: int) -> Iterator[Block]:
        """Yield strips."""
        height, width = self.sizes[level]
        for top in range(0, height, ROWS):
            region = Region(top, 0, min(ROWS, height - top), width)
            labels = self.read(level, region)
            yield region, labels, values_of(labels)

    def read(self, level: int, region: Region) -> NDArray[Any]:
        """Return the labels in a region."""
        if isinstance(self._image, np.ndarray):
            samples = self._image[region.slices]
            return packed(samples, samples.shape[2] in (2, 4))
        samples = np.asarray(self._image.crop((region.x, region.y, region.right, region.bottom)))
        if self._table is not None:
            labels: NDArray[Any] = self._table[samples]
            return labels
        if samples.ndim == 2:
            # Pillow's True may be any byte but 0.
            return (samples.view(np.uint8) > 0).view(np.uint8) if samples.dtype == np.bool_ else samples
        return packed(samples, self._image.mode in ALPHA_MODES)
