"""Outlines for other programs by their own schemas, and one marker that every export shows in its place."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import jsonschema
import numpy as np
import ome_types
import openslide
import pydicom
import pytest
import shapely
import tifffile
import zarr
from PIL import Image
from shapely.affinity import affine_transform
from tissuumaps_schema import current
from tissuumaps_schema.utils import MAJOR_SCHEMA_VERSION_MODULES, get_major_version, guess_schema_version
from wsidicom.graphical_annotations import AnnotationInstance

from tests.made_results import Flags, Made, Values, make, steps
from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.export import ALL, OF_HEATMAPS, Options, export, shapes
from wsi_gradcam.export.job import Job
from wsi_gradcam.export.shapes import HotRegions, hot_regions
from wsi_gradcam.geometry import Region
from wsi_gradcam.results.run import open_result
from wsi_gradcam.tissue.annotations.regions import read_annotations

SIZE, SHAPE, STRIDE, MPP = (1500, 2100), (94, 132), 16, (0.25, 0.3)
MARKER, HOT = (40, 77), 5.0  # one pixel of the heatmap
OURS = ("dsa", "asap-xml", "omero-rois", "cytomine")
THRESHOLD = -0.5  # what lies above has holes
LABEL = "gradcam: tumour"


def marked(region: Region) -> tuple[Values, Flags]:
    values, flags = steps(SHAPE)(region)
    values = np.minimum(values, 0)
    y, x = MARKER[0] - region.y, MARKER[1] - region.x
    if 0 <= y < region.height and 0 <= x < region.width:
        values[:, y, x], flags[y, x] = HOT, 3
    return values, flags


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "out", {"a.svs": Made(SIZE, steps(SHAPE), mpp=MPP)})


@pytest.fixture(scope="module")
def files(out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    dest, found = tmp_path_factory.mktemp("dest"), {}
    for to in OURS:
        (done,) = export(out, to, dest, threshold=THRESHOLD)
        (found[to],) = done.paths
    return found


@pytest.fixture(scope="module")
def regions(out: Path) -> HotRegions:
    slide = open_result(out)["a.svs"]
    return hot_regions(Job(slide, Path("x"), Options(threshold=THRESHOLD)), slide.channel("tumour"))


def same(found: list[shapely.Polygon], expected: list[shapely.Polygon]) -> None:
    """Each polygon but for rounding."""
    assert len(found) == len(expected) >= 3
    for one, other in zip(found, expected, strict=True):
        assert one.symmetric_difference(other).area < 0.01 * other.length


def dsa_schema() -> Any:
    """The schema of DSA's own server, of its package's source: the package itself needs a server's libraries."""
    spec = importlib.util.find_spec("girder_large_image_annotation")
    if spec is None or spec.origin is None:
        pytest.skip("needs girder-large-image-annotation, which `make` installs without what it depends on")
    tree = ast.parse((Path(spec.origin).parent / "models" / "annotation.py").read_text())
    wanted = [node for node in tree.body if getattr(node, "name", "") in ("extendSchema", "AnnotationSchema")]
    names: dict[str, Any] = {"copy": copy}
    exec(compile(ast.Module(wanted, []), "annotation.py", "exec"), names)
    return names["AnnotationSchema"].annotationSchema


def test_dsa_takes_regions_and_heatmap(files: dict[str, Path], regions: HotRegions, out: Path) -> None:
    hot, heat = json.loads(files["dsa"].read_text())
    for document in (hot, heat):
        jsonschema.Draft6Validator(dsa_schema()).validate(document)
    drawn = [
        shapely.Polygon([p[:2] for p in e["points"]], [[p[:2] for p in ring] for ring in e["holes"]])
        for e in hot["elements"]
    ]
    same(drawn, regions.polygons)
    assert any(element["holes"] for element in hot["elements"])
    areas = [element["user"]["area_um2"] for element in hot["elements"]]
    assert areas == pytest.approx([polygon.area * MPP[0] * MPP[1] for polygon in regions.polygons])
    (element,) = heat["elements"]
    slide, whole = open_result(out)["a.svs"], Region(0, 0, *SHAPE)
    values, explained = slide.read("tumour", 0, whole), slide.read_coverage(0, whole) & 2 > 0
    assert len(element["points"]) == (explained & (values >= THRESHOLD)).sum()
    for x, y, _, value in element["points"]:
        assert values[int(y / STRIDE), int(x / STRIDE)] == value >= THRESHOLD
        assert (y / STRIDE % 1, x / STRIDE % 1) == (0.5, 0.5)


def test_a_heatmap_of_too_many_points_is_that_of_a_coarser_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out", {"a.svs": Made((3000, 4200), steps((188, 263)))})
    points = []
    for most in (10**6, 10_000):
        monkeypatch.setattr(shapes, "MAX_POINTS", most)
        (done,) = export(out, "dsa", tmp_path / str(most), threshold=THRESHOLD)
        _, heat = json.loads(done.paths[0].read_text())
        points.append((len(heat["elements"][0]["points"]), heat["elements"][0]["radius"]))
    (fine, step), (coarse, wider) = points
    assert (step, wider) == (STRIDE, 2 * STRIDE)
    assert coarse <= 10_000 < fine
    assert "level 1 of the heatmap" in heat["description"]


def test_asap_takes_outlines_and_holes_apart(files: dict[str, Path], regions: HotRegions) -> None:
    assert files["asap-xml"].name == "a.xml"
    root = ET.parse(files["asap-xml"]).getroot()
    rings: dict[str, list[shapely.Polygon]] = {}
    for drawn in root.iter("Annotation"):
        corners = [(float(c.attrib["X"]), float(c.attrib["Y"])) for c in drawn.iter("Coordinate")]
        rings.setdefault(drawn.attrib["PartOfGroup"], []).append(shapely.Polygon(corners))
    assert list(rings) == [group.attrib["Name"] for group in root.iter("Group")] == [f"{LABEL} hot", f"{LABEL} holes"]
    same(rings[f"{LABEL} hot"], [shapely.Polygon(polygon.exterior) for polygon in regions.polygons])
    same(rings[f"{LABEL} holes"], [shapely.Polygon(r) for polygon in regions.polygons for r in polygon.interiors])
    assert read_annotations(files["asap-xml"])  # what `--annotations` reads


def test_omero_s_model_takes_outlines(files: dict[str, Path], regions: HotRegions) -> None:
    found = ome_types.from_xml(files["omero-rois"].read_text(encoding="utf-8"), validate=False)
    (image,) = found.images
    assert (image.pixels.size_y, image.pixels.size_x) == SIZE
    assert (image.pixels.physical_size_y, image.pixels.physical_size_x) == MPP
    assert [reference.id for reference in image.roi_refs] == [roi.id for roi in found.rois]
    drawn: dict[str, list[shapely.Polygon]] = {}
    for roi in found.rois:
        (polygon,) = roi.union
        corners = [tuple(map(float, pair.split(","))) for pair in polygon.points.split()]
        drawn.setdefault(str(roi.name), []).append(shapely.Polygon(corners))
    same(drawn[f"{LABEL} hot"], [shapely.Polygon(polygon.exterior) for polygon in regions.polygons])
    assert len(drawn[f"{LABEL} holes"]) == sum(len(polygon.interiors) for polygon in regions.polygons)


def test_cytomine_s_y_goes_up(files: dict[str, Path], regions: HotRegions) -> None:
    """Turned as in Cytomine's own examples: y' = height - y."""
    found = json.loads(files["cytomine"].read_text())
    down = [affine_transform(shapely.from_wkt(each["location"]), [1, 0, 0, -1, 0, SIZE[0]]) for each in found]
    same(down, regions.polygons)
    assert {each["term"] for each in found} == {f"{LABEL} hot"}


@pytest.mark.parametrize("box", [Region(0, 0, 94, 132), Region(30, 20, 11, 40), Region(5, 130, 60, 2)])
def test_filled_polygons_have_the_pixels_whose_centres_lie_in_them(regions: HotRegions, box: Region) -> None:
    y, x = np.mgrid[box.y : box.bottom, box.x : box.right] + 0.5
    for polygon in (*regions.polygons, shapely.Point(701.3, 502.7).buffer(411.1)):
        expected = shapely.contains_xy(polygon, x * STRIDE, y * STRIDE)
        clear = shapely.distance(polygon.boundary, shapely.points(x * STRIDE, y * STRIDE)) > 1e-6
        np.testing.assert_array_equal(shapes.filled(polygon, box, STRIDE)[clear], expected[clear])


@pytest.mark.parametrize("to", [*OURS, "geojson"])
def test_small_regions_are_left_out_and_outlines_simplified(out: Path, tmp_path: Path, to: str) -> None:
    def size(name: str, **options: Any) -> int:
        (done,) = export(out, to, tmp_path / name, threshold=THRESHOLD, **options)
        assert done.error == ""
        return sum(path.stat().st_size for path in done.paths)

    whole = size("whole")
    assert size("exact", simplify=0) > whole > size("coarse", simplify=3)
    assert size("large", min_area=20_000) < whole


def test_the_least_area_is_in_square_micrometres(out: Path, regions: HotRegions) -> None:
    slide, um2 = open_result(out)["a.svs"], MPP[0] * MPP[1]
    exact = hot_regions(Job(slide, Path("x"), Options(threshold=THRESHOLD, simplify=0)), slide.channel("tumour"))
    areas = sorted(polygon.area * um2 for polygon in exact.polygons)
    least = areas[len(areas) // 2]
    options = Options(threshold=THRESHOLD, simplify=0, min_area=least)
    kept = hot_regions(Job(slide, Path("x"), options), slide.channel("tumour")).polygons
    assert sorted(polygon.area * um2 for polygon in kept) == [area for area in areas if area >= least]
    assert 0 < len(kept) < len(regions.polygons)


@pytest.mark.parametrize(("option", "value"), [("min_area", -1.0), ("simplify", -0.5), ("simplify", 101.0)])
def test_wrong_bounds_are_refused(out: Path, tmp_path: Path, option: str, value: float) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ConfigError, match=f"{option} is {value:g}, expected 0"):
        export(out, "dsa", tmp_path, **options)


def test_all_and_several_formats(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(out), "--dest", str(tmp_path / "two"), "--min-area", "10", "--simplify", "1", "--to"]
    assert main([*command, "dsa, png"]) == 0
    assert len(list((tmp_path / "two").glob("a.svs.*"))) == 2
    assert main([*command, "dsa,jpeg"]) == 2
    assert "format 'jpeg' is not known; expected one of ome-zarr-0.4" in capsys.readouterr().err
    done = export(out, ALL, tmp_path / "all", threshold=THRESHOLD)
    assert [each.error for each in done] == [""] * len(done)
    assert len(done) == len(OF_HEATMAPS) - 1
    assert list((tmp_path / "all").glob("*.tiff"))  # those of `tissuumaps`


# Where the one hot pixel is, (y, x) in level-0 px, by foreign code.
Place = tuple[float, float]


def brightest(values: Any, step: float = STRIDE) -> Place:
    y, x = np.unravel_index(int(np.argmax(values)), np.shape(values))
    return (float(y) + 0.5) * step, (float(x) + 0.5) * step


def centre(polygons: list[Any]) -> Place:
    (polygon,) = polygons
    return float(polygon.centroid.y), float(polygon.centroid.x)


def in_tiff(paths: list[Path]) -> Place:
    with openslide.OpenSlide(paths[0]) as slide:
        rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(int)
        step = float(slide.properties["openslide.mpp-x"]) / MPP[1]
    hot = np.asarray(Image.new("RGB", (1, 1), (252, 255, 164)))[0, 0]  # the end of inferno
    return brightest(-np.abs(rgb - hot).sum(2), step)


def in_tissuumaps(paths: list[Path]) -> Place:
    """As TissUUmaps opens a project: by the schema of its version, which is then brought to the newest."""
    state = json.loads(paths[0].read_text())
    known = MAJOR_SCHEMA_VERSION_MODULES[get_major_version(guess_schema_version(state))]
    project = current.Project.upgrade(known.Project.model_validate(state))
    slide, layer = project.model_dump(by_alias=True)["layers"]
    assert (slide["x"], slide["y"], layer["x"], layer["y"]) == (0, 0, 0, 0)
    y, x = in_tiff([paths[0].parent / layer["tileSource"].removesuffix(".dzi")])
    scale = layer["scale"] / slide["scale"]
    return y / STRIDE * scale, x / STRIDE * scale


def in_asap(paths: list[Path]) -> Place:
    with tifffile.TiffFile(paths[0]) as file:
        gray = file.pages[0].asarray()
    return brightest(gray, SIZE[1] // gray.shape[1])


def in_deep_zoom(paths: list[Path]) -> Place:
    about = json.loads(next(p for p in paths if p.suffix == ".json").read_text())
    picture = ET.parse(next(p for p in paths if p.suffix == ".dzi")).getroot()
    side, (height, width) = int(picture.attrib["TileSize"]), (int(picture[0].attrib[n]) for n in ("Height", "Width"))
    finest = max(next(p for p in paths if p.name.endswith("_files")).iterdir(), key=lambda level: int(level.name))
    whole = np.zeros((height + side, width + side), int)
    for tile in finest.iterdir():
        column, row = map(int, tile.stem.split("_"))
        alpha = np.asarray(Image.open(tile).convert("RGBA"))[..., 3]
        whole[row * side :, column * side :][: alpha.shape[0], : alpha.shape[1]] = alpha
    return brightest(whole, about["width"] * SIZE[1] / width)


def in_qupath(paths: list[Path]) -> Place:
    found = json.loads((paths[0] / "regions.geojson").read_text())
    return centre([shapely.from_geojson(json.dumps(each["geometry"])) for each in found["features"]])


def in_geojson(paths: list[Path]) -> Place:
    found = json.loads(next(p for p in paths if "regions" in p.name).read_text())
    return centre([shapely.from_geojson(json.dumps(each["geometry"])) for each in found["features"]])


def in_dsa(paths: list[Path]) -> Place:
    hot, heat = json.loads(paths[0].read_text())
    ((x, y, _, value),) = heat["elements"][0]["points"]
    assert value == HOT
    (element,) = hot["elements"]
    place = centre([shapely.Polygon([p[:2] for p in element["points"]])])
    assert place == (y, x)
    return place


def in_asap_xml(paths: list[Path]) -> Place:
    corners = [(float(c.attrib["X"]), float(c.attrib["Y"])) for c in ET.parse(paths[0]).getroot().iter("Coordinate")]
    return centre([shapely.Polygon(corners)])


def in_omero(paths: list[Path]) -> Place:
    (roi,) = ome_types.from_xml(paths[0].read_text(), validate=False).rois
    points: Any = roi.union[0]
    return centre([shapely.Polygon([tuple(map(float, pair.split(","))) for pair in points.points.split()])])


def in_cytomine(paths: list[Path]) -> Place:
    (each,) = json.loads(paths[0].read_text())
    return centre([affine_transform(shapely.from_wkt(each["location"]), [1, 0, 0, -1, 0, SIZE[0]])])


def in_map(paths: list[Path]) -> Place:
    found = highdicom.pm.ParametricMap.from_dataset(pydicom.dcmread(paths[0] / "level-0.dcm"))
    y_mm, x_mm = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    y, x = brightest(found.get_total_pixel_matrix(), 1)
    return y * float(y_mm) * 1000 / MPP[0], x * float(x_mm) * 1000 / MPP[1]


def in_segmentation(paths: list[Path]) -> Place:
    found = highdicom.seg.segread(paths[0] / "level-0.dcm")
    return brightest(found.get_total_pixel_matrix(segment_numbers=[2])[..., 0])


def in_labels(paths: list[Path]) -> Place:
    found = highdicom.seg.segread(paths[0] / "level-0.dcm")
    return brightest(found.get_total_pixel_matrix(combine_segments=True))


def in_report(paths: list[Path]) -> Place:
    report: Any = highdicom.sr.srread(paths[0]).content
    (group,) = report.get_planar_roi_measurement_groups()
    y, x = centre([shapely.Polygon(group.roi.value[:, :2])])
    return y * 1000 / MPP[0] + 0.5, x * 1000 / MPP[1] + 0.5


def in_annotations(paths: list[Path]) -> Place:
    (group,) = next(iter(AnnotationInstance.open(paths))).groups
    y, x = centre([shapely.Polygon(each.geometry.to_coords()) for each in group.annotations])
    return y * 1000 / MPP[0] + 0.5, x * 1000 / MPP[1] + 0.5  # (0, 0) mm is the centre of the slide's first pixel


READERS: dict[str, Callable[[list[Path]], Place]] = {
    "ome-zarr-0.4": lambda paths: brightest(zarr.open_group(paths[0], mode="r")["0"][0]),  # type: ignore[index]
    "ome-tiff": lambda paths: brightest(tifffile.imread(paths[0])[0]),
    "tiff": in_tiff,
    "asap": in_asap,
    "tissuumaps": in_tissuumaps,
    "geojson": in_geojson,
    "qupath": in_qupath,
    "deepzoom": in_deep_zoom,
    "dsa": in_dsa,
    "asap-xml": in_asap_xml,
    "omero-rois": in_omero,
    "cytomine": in_cytomine,
    "dicom-parametric-map": in_map,
    "dicom-segmentation": in_segmentation,
    "dicom-labelmap": in_labels,
    "dicom-annotations": in_annotations,
    "dicom-sr": in_report,
}


@pytest.fixture(scope="module")
def with_marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("marker") / "out", {"a.svs": Made(SIZE, marked, mpp=MPP)})


def test_each_format_but_the_figure_has_a_foreign_reader() -> None:
    assert {*READERS, "png"} == set(OF_HEATMAPS)


@pytest.mark.parametrize("to", READERS)
def test_a_marker_is_in_its_place(with_marker: Path, tmp_path: Path, to: str) -> None:
    """To half a pixel of the heatmap, by code that is not ours."""
    (done,) = export(with_marker, to, tmp_path, threshold=1.0, window=(0.0, HOT))
    assert done.error == ""
    expected = (np.array(MARKER) + 0.5) * STRIDE
    assert np.abs(np.subtract(READERS[to](list(done.paths)), expected)).max() <= STRIDE / 2
