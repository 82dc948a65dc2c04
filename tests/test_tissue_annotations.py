"""Annotations of four programs become the same areas and exact masks; damaged and hostile files one clear error."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.errors import AnnotationError
from wsi_gradcam.tissue import quality as raster
from wsi_gradcam.tissue.annotations import Annotations, Area, rasterise, read_annotations
from wsi_gradcam.tissue.annotations import areas as base
from wsi_gradcam.tissue.annotations.regions import Regions, parse

Mask = npt.NDArray[np.bool_]
Points = list[tuple[float, float]]  # x, y
SQUARE: Points = [(10, 20), (50, 20), (50, 40), (10, 40)]
HOLE: Points = [(20, 25), (30, 25), (30, 35), (20, 35)]


def feature(coordinates: Any, name: str = "tumour", kind: str = "Polygon", **properties: Any) -> dict[str, Any]:
    about = {"objectType": "annotation", "classification": {"name": name, "color": [200, 0, 0]}, **properties}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": about}


def asap(*annotations: tuple[str, str, Points], name: str = "Annotation 0") -> str:
    """An ASAP file of (type, group, points); points are written last first, as `Order` says."""
    parts = []
    for kind, group, points in annotations:
        rows = [f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(points)]
        parts.append(
            f'<Annotation Name="{name}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58"><Coordinates>'
            f"{''.join(reversed(rows))}</Coordinates></Annotation>"
        )
    groups = '<AnnotationGroups><Group Name="g" PartOfGroup="None" /></AnnotationGroups>'
    return (
        f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{"".join(parts)}</Annotations>{groups}</ASAP_Annotations>'
    )


def imagescope(*layers: tuple[str, list[tuple[str, str, Points]]]) -> str:
    """An ImageScope file of layers (name, [(type, NegativeROA, points)])."""
    parts = []
    for number, (name, regions) in enumerate(layers, 1):
        shapes = []
        for i, (kind, negative, points) in enumerate(regions, 1):
            vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
            shapes.append(
                f'<Region Id="{i}" Type="{kind}" Zoom="1" Text="" NegativeROA="{negative}" DisplayId="{i}">'
                f"<Attributes/><Vertices>{vertices}</Vertices></Region>"
            )
        shown = "".join(shapes)
        parts.append(
            f'<Annotation Id="{number}" Name="{name}" ReadOnly="0" LineColor="65280"><Attributes><Attribute '
            f'Name="Description" Id="0" Value=""/></Attributes><Regions><RegionAttributeHeaders/>{shown}</Regions>'
            "<Plots/></Annotation>"
        )
    return f'<Annotations MicronsPerPixel="0.252">{"".join(parts)}</Annotations>'


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(path: Path, content: Any) -> Annotations:
    return read_annotations(written(path, content))


def slow_mask(areas: tuple[Area, ...] | list[Area], shape: tuple[int, int], scale: float = 1.0) -> Mask:
    """Winding numbers of pixel centres by summing angles; independent of edges and rows."""
    y, x = np.indices(shape) + 0.5

    def inside(outline: npt.NDArray[np.float64]) -> Mask:
        a = outline[:, :, None, None] * scale - np.stack([y, x])
        b = np.roll(a, -1, axis=0)
        turn = np.arctan2(a[:, 1] * b[:, 0] - a[:, 0] * b[:, 1], (a * b).sum(axis=1)).sum(axis=0)
        return np.asarray(np.abs(turn) > np.pi)

    mask = np.zeros(shape, np.bool_)
    for area in areas:
        own = inside(area.outline)
        for hole in area.holes:
            own &= ~inside(hole)
        mask |= own
    return mask


class TestFormats:
    """The same square with the same hole from every program."""

    EXPECTED = np.zeros((60, 80), np.bool_)
    EXPECTED[20:40, 10:50] = True
    EXPECTED[25:35, 20:30] = False

    FILES: ClassVar[dict[str, Any]] = {
        "collection.geojson": {"type": "FeatureCollection", "features": [feature([SQUARE, HOLE])]},
        "feature.geojson": feature([SQUARE, HOLE]),
        "list.json": [feature([SQUARE, HOLE])],
        "multi.geojson": feature([[SQUARE, HOLE]], kind="MultiPolygon"),
        "z.geojson": feature([[(*p, 0.0) for p in SQUARE], HOLE]),
        "closed.geojson": feature([[*SQUARE, SQUARE[0]], [*HOLE, HOLE[0]]]),
        "old.geojson": feature([SQUARE, HOLE], "Other", classification={"name": "tumour", "colorRGB": -3670016}),
        "named.geojson": feature([SQUARE, HOLE], classification=None) | {"properties": {"name": "tumour"}},
        "gathered.geojson": {
            "type": "Feature",
            "properties": {"classification": {"names": ["tumour"]}},
            "geometry": {"type": "GeometryCollection", "geometries": [feature([SQUARE, HOLE])["geometry"]]},
        },
        "imagescope.xml": imagescope(("tumour", [("0", "0", SQUARE), ("0", "1", HOLE)])),
        "boxes.xml": imagescope(("tumour", [("1", "0", SQUARE), ("1", "1", HOLE[::2])])),
    }

    @pytest.mark.parametrize("name", FILES)
    def test_areas_with_holes(self, tmp_path: Path, name: str) -> None:
        found = read(tmp_path / name, self.FILES[name])
        assert found.names == ("tumour",)
        np.testing.assert_array_equal(rasterise(found.areas, (60, 80), (60, 80)), self.EXPECTED)

    @pytest.mark.parametrize("kind", ["Polygon", "Rectangle", "Spline"])
    def test_asap(self, tmp_path: Path, kind: str) -> None:
        found = read(tmp_path / "a.xml", asap((kind, "tumour", SQUARE), ("Polygon", "None", HOLE)))
        assert found.names == ("Annotation 0", "tumour")
        np.testing.assert_array_equal(found.areas[0].outline, np.array(SQUARE)[:, ::-1])

    def test_geometry_alone_has_no_name(self, tmp_path: Path) -> None:
        assert read(tmp_path / "a.json", {"type": "Polygon", "coordinates": [SQUARE]}).names == ("",)

    def test_classes_of_several_names_are_joined_as_qupath_shows_them(self, tmp_path: Path) -> None:
        made = feature([SQUARE], classification={"names": ["Tumor", "Positive"]})
        assert read(tmp_path / "a.json", made).names == ("Tumor: Positive",)

    def test_an_ellipse_fills_its_box_as_far_as_ellipses_do(self, tmp_path: Path) -> None:
        found = read(tmp_path / "a.xml", imagescope(("x", [("2", "0", [(100, 100), (500, 300)])])))
        mask = rasterise(found.areas, (400, 600), (400, 600))
        assert mask.sum() == pytest.approx(np.pi * 200 * 100, rel=0.002)
        assert mask[200, 101]
        assert mask[101, 300]
        assert not mask[110, 110]

    def test_what_is_cut_out_of_a_layer_leaves_other_layers(self, tmp_path: Path) -> None:
        made = imagescope(("a", [("0", "0", SQUARE), ("0", "1", HOLE)]), ("b", [("0", "0", HOLE)]))
        first, second = read(tmp_path / "a.xml", made).areas
        assert (len(first.holes), len(second.holes)) == (1, 0)

    def test_a_hole_far_away_is_not_kept(self, tmp_path: Path) -> None:
        far: Points = [(900, 900), (950, 900), (950, 950)]
        (area,) = read(tmp_path / "a.xml", imagescope(("a", [("0", "0", SQUARE), ("0", "1", [*far])]))).areas
        assert area.holes == ()

    def test_points_and_lines_are_counted_and_left_out(self, tmp_path: Path) -> None:
        made = [feature([SQUARE]), feature([1, 2], kind="Point"), feature(SQUARE, kind="LineString")]
        found = read(tmp_path / "a.json", [*made, {**made[0], "geometry": None}])
        assert (len(found.areas), found.ignored) == (1, {"Point": 1, "LineString": 1})
        shapes = imagescope(("a", [("0", "0", SQUARE), ("4", "0", SQUARE[:2]), ("9", "0", [])]))
        assert read(tmp_path / "a.xml", shapes).ignored == {"ruler": 1, "region of type 9": 1}
        assert read(tmp_path / "b.xml", asap(("Dot", "g", SQUARE[:1]), ("Polygon", "g", SQUARE))).ignored == {"Dot": 1}


class TestRealFiles:
    @pytest.mark.parametrize("name", ["brush", "ellipse", "polygon", "rectangle", "wand"])
    def test_qupath(self, shared_data: Path, name: str) -> None:
        path = shared_data / f"annotations/wsidicom/qupath_geojson/qupath-{name}.json"
        (area,) = read_annotations(path).areas
        assert area.name == name
        expected = np.array(json.loads(path.read_text(encoding="utf-8"))["geometry"]["coordinates"][0])[:, ::-1]
        np.testing.assert_array_equal(area.outline, expected)

    @pytest.mark.parametrize("name", ["line", "multipoint", "point", "polyline"])
    def test_qupath_shapes_that_enclose_nothing_are_refused(self, shared_data: Path, name: str) -> None:
        path = shared_data / f"annotations/wsidicom/qupath_geojson/qupath-{name}.json"
        with pytest.raises(AnnotationError, match=rf"qupath-{name}\.json: holds 1 .*, which enclose nothing; expected"):
            read_annotations(path)

    def test_qupath_cells_and_collections(self, shared_data: Path) -> None:
        cells = read_annotations(
            shared_data / "annotations/wsidicom/qupath_geojson_advanced/qupath-polygon-cell-classified.json"
        )
        assert cells.names == ("Cell", "Nucleus")
        found = read_annotations(shared_data / "annotations/dlup/qupath05.geojson")
        assert sorted(area.name for area in found.areas) == ["I", "I", "UT"]

    def test_asap(self, shared_data: Path) -> None:
        folder = shared_data / "annotations/wsidicom/asap"
        (area,) = read_annotations(folder / "asap-polygon.xml").areas
        assert area.name == "Annotation 0"
        assert area.outline[1].tolist() == [16669.7832, 22693.1875]
        for kind in ("Dot", "PointSet"):
            with pytest.raises(AnnotationError, match=f"holds 1 {kind}, which enclose nothing"):
                read_annotations(folder / f"asap-{kind.lower()}.xml")


# Never on a line through a pixel's centre, where sides are a matter of rounding.
eighths = st.integers(-24, 120).map(lambda n: n / 8)
points = st.tuples(eighths.map(lambda y: y + 0.012345678), eighths.map(lambda x: x + 0.037891234))
outlines = st.lists(points, min_size=3, max_size=9).map(np.array)


class TestMasks:
    @given(st.lists(st.tuples(outlines, st.lists(outlines, max_size=2)), min_size=1, max_size=3))
    def test_equal_winding_numbers_by_angles(self, made: list[tuple[Any, list[Any]]]) -> None:
        areas = [Area("", outline, tuple(holes)) for outline, holes in made]
        expected = slow_mask(areas, (12, 11))
        alone = [slow_mask([Area("", area.outline)], (12, 11)) for area in areas]
        found = rasterise(areas, (12, 11), (12, 11))
        if all(mask.any() for mask in alone):
            np.testing.assert_array_equal(found, expected)
        assert not (expected & ~found).any()

    @given(outlines, st.integers(1, 40))
    def test_the_memory_bound_changes_nothing(self, outline: npt.NDArray[np.float64], crossings: int) -> None:
        expected = raster.fill(outline, (12, 11))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(raster, "CROSSINGS", crossings)
            np.testing.assert_array_equal(raster.fill(outline, (12, 11)), expected)

    def test_scale_with_the_slide(self) -> None:
        area = Area("", np.array(SQUARE, float)[:, ::-1] * 16)
        mask = rasterise([area], (60 * 16, 80 * 16), (60, 80))
        assert mask.sum() == 20 * 40
        assert mask[20:40, 10:50].all()
        wide = rasterise([area], (60 * 16, 80 * 16), (30, 80))
        assert wide.sum() == 10 * 40

    def test_a_loop_is_filled(self) -> None:
        twice = np.array([(0, 0), (0, 10), (10, 10), (10, 0)] * 2, float)
        assert rasterise([Area("", twice)], (10, 10), (10, 10)).all()

    def test_what_is_smaller_than_a_pixel_is_not_lost(self) -> None:
        tiny = np.array([(70.1, 130.1), (70.1, 130.4), (70.4, 130.4)])
        mask = rasterise([Area("", tiny)], (1600, 1600), (100, 100))
        assert np.argwhere(mask).tolist() == [[4, 8]]

    @pytest.mark.parametrize("shift", [-500, 500])
    def test_what_lies_beside_the_slide_is_nowhere(self, shift: int) -> None:
        assert not rasterise([Area("", np.array(SQUARE, float) + shift)], (80, 80), (80, 80)).any()

    def test_absurdly_many_outlines_are_refused_at_once(self) -> None:
        large = Area("", np.array([(0, 0), (0, 1e5), (1e5, 1e5), (1e5, 0)]))
        started = time.monotonic()
        with pytest.raises(AnnotationError, match=r"a\.xml: its outlines cover the slide too many times"):
            rasterise([Area("", large.outline, (large.outline,) * 2000)] * 9, (10**5, 10**5), (2048, 2048), "a.xml")
        assert time.monotonic() - started < 5


BAD_JSON: dict[str, tuple[Any, str]] = {
    "not valid JSON": ("{", "not a JSON file"),
    "not a number": ('{"type": "Polygon", "coordinates": [[[NaN, 1], [2, 3], [4, 5]]]}', "not a JSON file: NaN"),
    "deep": ("[" * 100_000, "not a JSON file"),
    "text": ('"text"', "holds a str; expected a GeoJSON"),
    "another object": ({"a": 1}, "holds an object of type 'None'"),
    "topology": ({"type": "Topology"}, "holds an object of type 'Topology'"),
    "a list of numbers": ([1], "holds a int among its features"),
    "no features": ({"type": "FeatureCollection", "features": []}, "holds no annotation; expected polygons"),
    "features that are none": ({"type": "FeatureCollection", "features": [{"type": "Polygon"}]}, "among its features"),
    "no geometry": ({"type": "Feature", "geometry": 3}, "feature 0 has a int for a geometry"),
    "a circle": (feature([SQUARE], kind="Circle"), "an object of type 'Circle' for a geometry"),
    "no coordinates": (feature(None), "for a geometry"),
    "no ring": (feature([]), "feature 0 has a polygon without a ring"),
    "two points": (feature([SQUARE[:2]]), "feature 0 has 2 points, expected 3 or more"),
    "words": (feature([[["a", "b"]] * 3]), "points that are not pairs of numbers"),
    "one number": (feature([[[1]] * 3]), "points that are not pairs of numbers"),
    "flat": (feature([[1, 2, 3]]), "points that are not pairs of numbers"),
    "huge": (feature([[(1e300, 1), (2, 3), (4, 5)]]), "not level-0 pixels of any slide"),
    "infinite": (feature([[("inf", 1), (2, 3), (4, 5)]]), "not level-0 pixels of any slide"),
    "nested": (
        {"type": "GeometryCollection", "geometries": [{"type": "GeometryCollection", "geometries": []}]},
        "nests collections",
    ),
}
BAD_XML = {
    "no XML": ("{}", "damaged or not XML"),
    "cut": (asap(("Polygon", "g", SQUARE))[:-30], "damaged or not XML"),
    "another": ("<svg/>", "XML of 'svg', expected ASAP_Annotations"),
    "empty": ("<Annotations/>", "holds no annotation; expected polygons"),
    "no points": (asap(("Polygon", "g", [])), "annotation 'Annotation 0' has 0 points"),
    "no numbers": (
        '<Annotations><Annotation><Region Id="7"><Vertex X="a" Y="1"/></Region></Annotation></Annotations>',
        "region 7 of '' has points that are not pairs",
    ),
    "missing": ('<Annotations><Annotation><Region><Vertex X="1"/></Region></Annotation></Annotations>', "not pairs"),
    "stray": ("<Annotations><Region/></Annotations>", "a Region outside an Annotation"),
    "one corner": (imagescope(("a", [("2", "0", SQUARE[:1])])), "has 1 points"),
    "bomb": (
        '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;">]><Annotations>&y;</Annotations>',
        "declares a document type",
    ),
    "deep": ("<Annotations>" + "<a>" * 100_000, "more than 64 nested elements"),
    "encoding": ('<?xml version="1.0" encoding="no-such"?><Annotations/>', "damaged or not XML"),
}


class TestBadFiles:
    @pytest.mark.parametrize("name", BAD_JSON)
    def test_json(self, tmp_path: Path, name: str) -> None:
        content, problem = BAD_JSON[name]
        with pytest.raises(AnnotationError, match=r"a\.json: ") as caught:
            read(tmp_path / "a.json", content)
        assert problem in str(caught.value)

    @pytest.mark.parametrize("name", BAD_XML)
    def test_xml(self, tmp_path: Path, name: str) -> None:
        content, problem = BAD_XML[name]
        with pytest.raises(AnnotationError, match=r"a\.xml: ") as caught:
            read(tmp_path / "a.xml", content)
        assert problem in str(caught.value)

    @given(st.sampled_from([".json", ".xml"]), st.data())
    def test_mutations_give_areas_or_a_clear_error(self, ending: str, data: st.DataObject) -> None:
        good = json.dumps([feature([SQUARE, HOLE])]) if ending == ".json" else imagescope(("a", [("0", "0", SQUARE)]))
        content = bytearray(good.encode())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(1, len(content)))
        try:
            found = parse(Path(f"a{ending}"), bytes(content[:cut]))
        except AnnotationError as error:
            problem = str(error)
        else:
            assert found.areas
            return
        assert problem.startswith(f"a{ending}: ")

    def test_a_file_that_is_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = written(tmp_path / "a.json", feature([SQUARE]))
        monkeypatch.setattr("wsi_gradcam.tissue.annotations.regions.MAX_BYTES", path.stat().st_size - 1)
        with pytest.raises(AnnotationError, match="larger than 0 MiB, more than anyone draws by hand"):
            read_annotations(path)
        assert base.MAX_BYTES == 32 << 20

    def test_another_ending_and_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(AnnotationError, match=r"a\.csv: not an annotation file; expected \.geojson"):
            read_annotations(written(tmp_path / "a.csv", ""))
        with pytest.raises(AnnotationError, match=r"b\.xml: cannot be read: No such file"):
            read_annotations(tmp_path / "b.xml")


SQUARES = [[(x, 0), (x + 9, 0), (x + 9, 9), (x, 9)] for x in range(0, 100, 20)]
Layers = list[tuple[str, list[tuple[str, str, list[tuple[int, int]]]]]]


def texts_file(folder: Path, layers: Layers, description: str = "") -> Path:
    """An ImageScope file of layers (name, [(Text, NegativeROA, points)])."""
    parts = []
    for name, regions in layers:
        inner = ""
        for text, negative, points in regions:
            vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points)
            inner += (
                f'<Region Id="1" Type="0" Text="{text}" NegativeROA="{negative}"><Attributes><Attribute '
                f'Name="Description" Value="of a region"/></Attributes><Vertices>{vertices}</Vertices></Region>'
            )
        told = f'<Attributes><Attribute Name="Description" Id="0" Value="{description}"/></Attributes>'
        parts.append(f'<Annotation Id="1" Name="{name}">{told}<Regions>{inner}</Regions></Annotation>')
    path = folder / "a.xml"
    path.write_text(f'<Annotations MicronsPerPixel="0.25">{"".join(parts)}</Annotations>')
    return path


def shown(path: Path, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[int]:
    """The numbers of the squares that lie in the regions."""
    mask = Regions(path, path.read_bytes(), include, exclude).mask((10, 100), (10, 100))
    return [number for number in range(5) if mask[4, 20 * number + 4]]


@pytest.mark.parametrize("name", ["", "Layer 1", "Annotation 2", "3"])
def test_regions_of_layers_without_a_name_have_their_text_for_a_class(tmp_path: Path, name: str) -> None:
    regions = [("tumor", "0", SQUARES[0]), ("stroma", "0", SQUARES[1]), ("", "0", SQUARES[2])]
    path = texts_file(tmp_path, [(name, regions)])
    assert set(read_annotations(path).names) == {"tumor", "stroma", name}
    assert shown(path, ("tumor",)) == [0]
    assert shown(path, (), ("stroma",)) == [0, 2]
    assert shown(path, ("stroma", "tumor")) == [0, 1]
    if name:
        assert shown(path, (name,)) == [0, 1, 2]


def test_a_layer_s_own_name_is_the_class_and_texts_choose_in_it(tmp_path: Path) -> None:
    layers: Layers = [
        ("Tumor", [("solid", "0", SQUARES[0]), ("loose", "0", SQUARES[1])]),
        ("Other", [("solid", "0", SQUARES[2])]),
    ]
    path = texts_file(tmp_path, layers, "not the name")
    assert read_annotations(path).names == ("Other", "Tumor")
    assert [shown(path, (name,)) for name in ("Tumor", "solid", "loose")] == [[0, 1], [0, 2], [1]]
    assert shown(path, ("Tumor",), ("solid",)) == [1]
    with pytest.raises(AnnotationError, match="no annotation is called 'Solid'; there are 'Other', 'Tumor', 'loo"):
        shown(path, ("Solid",))
    described = texts_file(tmp_path, [("", [("", "0", SQUARES[0])])], "Tumor bed")
    assert read_annotations(described).names == ("Tumor bed",)


def test_negative_regions_are_cut_out_of_all_texts_of_their_layer(tmp_path: Path) -> None:
    whole = [(0, 0), (99, 0), (99, 9), (0, 9)]
    layers: Layers = [("", [("tumor", "0", whole), ("", "1", SQUARES[1])]), ("rest", [("", "0", SQUARES[3])])]
    assert shown(texts_file(tmp_path, layers)) == [0, 2, 3, 4]
    assert shown(texts_file(tmp_path, layers), ("tumor",)) == [0, 2, 3, 4]
    with pytest.raises(AnnotationError, match="holds 1 negative region without another, which enclose nothing"):
        read_annotations(texts_file(tmp_path, [("x", [("", "1", whole)])]))


def nested(folder: Path, groups: dict[str, str], placed: list[str]) -> Path:
    """An ASAP file of groups (name: the group that it is part of), and of squares in groups."""
    inner = "".join(f'<Group Name="{name}" PartOfGroup="{above}"/>' for name, above in groups.items())
    drawn = "".join(
        f'<Annotation Name="Annotation {number}" Type="Polygon" PartOfGroup="{group}"><Coordinates>'
        + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(SQUARES[number]))
        + "</Coordinates></Annotation>"
        for number, group in enumerate(placed)
    )
    path = folder / "a.xml"
    path.write_text(
        f"<ASAP_Annotations><Annotations>{drawn}</Annotations><AnnotationGroups>{inner}</AnnotationGroups>"
        "</ASAP_Annotations>"
    )
    return path


def test_groups_in_groups_give_names_to_choose_by(tmp_path: Path) -> None:
    groups = {"Tumor": "Tissue", "_0": "Tumor", "_1": "Tumor", "Tissue": "None", "_2": "None"}
    path = nested(tmp_path, groups, ["_0", "_1", "_2", "Tumor", "None"])
    assert read_annotations(path).names == ("Annotation 4", "Tumor", "_0", "_1", "_2")
    assert [shown(path, (name,)) for name in ("Tumor", "Tissue", "_0")] == [[0, 1, 3], [0, 1, 3], [0]]
    assert shown(path, ("Tissue",), ("_1",)) == [0, 3]
    assert shown(path, (), ("Tissue", "_2")) == [4]
    assert shown(nested(tmp_path, groups, ["_0", "_1"]), (), ("Tumor",)) == [2, 3, 4]  # the rest, as of a class


def test_groups_that_contain_themselves_end(tmp_path: Path) -> None:
    path = nested(tmp_path, {"a": "b", "b": "a", "c": "c"}, ["a", "c"])
    assert [shown(path, (name,)) for name in ("a", "b", "c")] == [[0], [0], [1]]
    text = nested(tmp_path, {"x": "y"}, ["x"]).read_text()
    path.write_text(text.replace("</AnnotationGroups>", '<Group Name="x" PartOfGroup="z"/></AnnotationGroups>'))
    assert shown(path) == [0]
    with pytest.raises(AnnotationError, match="no annotation is called 'y'; there are 'x'"):  # which x is in y?
        shown(path, ("y",))
