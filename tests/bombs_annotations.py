"""Annotations of more outlines, holes and vertices than people draw, each also larger and smaller than pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bombs import BOMBS, Random, bomb, side

SIDE = 100_000.0  # of the slide
MOST = 30 << 20


def square(y: float, x: float, edge: float) -> list[list[float]]:
    """Return the ring of a square."""
    return [[x, y], [x + edge, y], [x + edge, y + edge], [x, y + edge], [x, y]]


def polygon(rings: list[Any]) -> str:
    """Return a feature."""
    return json.dumps({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}, "properties": {}})


def holed(name: str, edge: Callable[[Random], float], count: Callable[[Random], int]) -> None:
    """Enter an area that fills the slide, with holes of an edge, all over it."""

    def make(folder: Path, rng: Random) -> Path:
        corners = rng.uniform(0, SIDE * 0.9, (count(rng), 2)).round().tolist()
        wide = edge(rng)
        data = polygon([square(0, 0, SIDE), *(square(y, x, wide) for y, x in corners)])
        (folder / "a.geojson").write_text(data[: 2 * MOST])
        return folder / "a.geojson"

    BOMBS[f"annotations: {name}"] = make


holed("many large holes", lambda rng: rng.uniform(0.5, 1) * SIDE, lambda rng: side(rng, 3, 4))
holed("very many large holes", lambda rng: rng.uniform(0.5, 1) * SIDE, lambda rng: side(rng, 5, 5.2))
holed("very many holes", lambda rng: rng.uniform(50, 500), lambda rng: side(rng, 5, 5.3))
holed("very many tiny holes", lambda rng: rng.uniform(1, 9), lambda rng: side(rng, 5, 5.3))


@bomb("annotations: very many areas")
def areas(folder: Path, rng: Random) -> Path:
    corners = rng.uniform(0, SIDE * 0.9, (side(rng, 4.9, 5.2), 2)).round().tolist()
    (folder / "a.geojson").write_text("[" + ",".join(polygon([square(y, x, 90)]) for y, x in corners) + "]")
    return folder / "a.geojson"


@bomb("annotations: a million vertices")
def vertices(folder: Path, rng: Random) -> Path:
    ring = rng.uniform(0, SIDE, (side(rng, 5.8, 6.1), 2)).round().astype(int).tolist()
    (folder / "a.geojson").write_text(polygon([[*ring, ring[0]]]))
    return folder / "a.geojson"


@bomb("annotations: a comb")
def comb(folder: Path, rng: Random) -> Path:
    teeth = side(rng, 5, 5.5)
    x = np.repeat(np.linspace(0, SIDE, teeth), 2).round(1)
    y = np.tile([0.0, SIDE, SIDE, 0.0], teeth)[: 2 * teeth]
    (folder / "a.geojson").write_text(polygon([np.stack([x, y], 1).tolist()]))
    return folder / "a.geojson"


@bomb("annotations: nested collections")
def nested(folder: Path, rng: Random) -> Path:
    depth = side(rng, 3, 5)
    opening = '{"type": "GeometryCollection", "geometries": ['
    (folder / "a.geojson").write_text(opening * depth + "]}" * depth)
    return folder / "a.geojson"


@bomb("annotations: lists in lists")
def lists(folder: Path, rng: Random) -> Path:
    depth = int(rng.integers(300, 990))
    (folder / "a.geojson").write_text("[" * depth + "]" * depth)
    return folder / "a.geojson"


@bomb("annotations: ImageScope of many vertices")
def imagescope(folder: Path, rng: Random) -> Path:
    points = "".join(
        f'<Vertex X="{x}" Y="{y}"/>' for y, x in rng.integers(0, int(SIDE), (side(rng, 5.5, 5.8), 2)).tolist()
    )
    (folder / "a.xml").write_text(
        f'<Annotations><Annotation Id="1"><Regions><Region Id="1" Type="0"><Vertices>{points}</Vertices></Region>'
        "</Regions></Annotation></Annotations>"
    )
    return folder / "a.xml"


@bomb("annotations: ASAP of many groups")
def asap(folder: Path, rng: Random) -> Path:
    count = side(rng, 4.4, 4.7)
    groups = "".join(f'<Group Name="g{i}" PartOfGroup="g{i + 1}" Color="#000"/>' for i in range(count))
    corners = enumerate(((1, 1), (1, 900), (900, 900)))
    points = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (y, x) in corners)
    some = "".join(
        f'<Annotation Name="a" Type="Polygon" PartOfGroup="g{i}"><Coordinates>{points}</Coordinates></Annotation>'
        for i in range(count)
    )
    (folder / "a.xml").write_text(
        f"<ASAP_Annotations><Annotations>{some}</Annotations><AnnotationGroups>{groups}</AnnotationGroups></ASAP_Annotations>"
    )
    return folder / "a.xml"


@bomb("annotations: entities")
def entities(folder: Path, rng: Random) -> Path:
    more = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, int(rng.integers(9, 14))))
    (folder / "a.xml").write_text(f'<!DOCTYPE x [<!ENTITY a0 "aaaaaaaaaa">{more}]><Annotations>&a8;</Annotations>')
    return folder / "a.xml"
