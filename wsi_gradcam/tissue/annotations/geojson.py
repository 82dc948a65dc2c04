"""GeoJSON (RFC 7946) as QuPath writes it: coordinates are level-0 pixels, classes stand under `properties`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from wsi_gradcam.errors import AnnotationError
from wsi_gradcam.tissue.annotations.areas import Annotations, Area, make_annotations, make_outline

if TYPE_CHECKING:
    from pathlib import Path

OPEN = frozenset({"Point", "MultiPoint", "LineString", "MultiLineString"})
EXPECTED = "expected a GeoJSON FeatureCollection, Feature, list of these, or geometry"


def read_geojson(path: Path, data: bytes) -> Annotations:
    """Return the areas of a GeoJSON file; points and lines are counted and left out.

    A class is the `name` of the `classification`, `a: b` where QuPath lists several `names`; else the object's own
    `name`.

    Raises:
        AnnotationError: not GeoJSON, damaged, or without an area.
    """
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise AnnotationError(f"{path}: not a JSON file: {' '.join(str(error).split())}; {EXPECTED}") from error
    areas: list[Area] = []
    ignored: list[str] = []
    for number, (geometry, name) in enumerate(_features(path, values)):
        for part in _simple_geometries(path, geometry, number):
            if part["type"] in OPEN:
                ignored.append(part["type"])
            else:
                areas += _areas(path, part, name, f"feature {number}")
    return make_annotations(path, areas, ignored)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _features(path: Path, values: Any) -> Iterator[tuple[Any, str]]:
    """Yield (geometry, class) of each feature."""
    if isinstance(values, list):
        for item in values:
            yield from _features(path, _kind(path, item, {"Feature", "FeatureCollection"}))
        return
    kind = values.get("type") if isinstance(values, dict) else None
    if kind == "FeatureCollection" and isinstance(values.get("features"), list):
        for item in values["features"]:
            yield from _features(path, _kind(path, item, {"Feature"}))
    elif kind == "Feature":
        if values.get("geometry") is not None:  # RFC 7946 section 3.2: a feature may have none
            yield values["geometry"], _name(values.get("properties"))
    elif kind in OPEN | {"Polygon", "MultiPolygon", "GeometryCollection"}:
        yield values, ""
    else:
        raise AnnotationError(f"{path}: holds {_describe(values)}; {EXPECTED}")


def _kind(path: Path, item: Any, kinds: set[str]) -> Any:
    if not isinstance(item, dict) or item.get("type") not in kinds:
        raise AnnotationError(f"{path}: holds {_describe(item)} among its features; {EXPECTED}")
    return item


def _name(properties: Any) -> str:
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
    """Yield the geometry, or those of a collection."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    inner = geometry.get("geometries") if kind == "GeometryCollection" else None
    if isinstance(inner, list):
        for part in inner:
            if isinstance(part, dict) and part.get("type") == "GeometryCollection":  # section 3.1.8: SHOULD be avoided
                raise AnnotationError(f"{path}: feature {number} nests collections; expected plain geometries")
            yield from _simple_geometries(path, part, number)
    elif kind in OPEN | {"Polygon", "MultiPolygon"} and isinstance(geometry.get("coordinates"), list):
        yield geometry
    else:
        raise AnnotationError(f"{path}: feature {number} has {_describe(geometry)} for a geometry; expected a Polygon")


def _areas(path: Path, geometry: dict[str, Any], name: str, what: str) -> Iterator[Area]:
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
