"""DICOM: valid by dicom3tools, and read by highdicom and wsidicom: whose it is, where it lies, and every value."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import shapely
from highdicom.spatial import PixelToReferenceTransformer
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage
from skimage.draw import polygon2mask
from skimage.measure import label
from wsidicom.graphical_annotations import AnnotationInstance

from tests.made_results import Flags, Made, Values, make, steps
from tests.vendors import half, tissue, write_dicom
from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.export import Options, dicom_regions, export
from wsi_gradcam.export.dicom import own_code
from wsi_gradcam.export.dicom_source import MapLevel, matched_levels
from wsi_gradcam.export.job import Job
from wsi_gradcam.export.shapes import hot_regions
from wsi_gradcam.geometry import Region
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.results.run import open_result
from wsi_gradcam.slides import open_slide

SIZE, STRIDE, MARKER = (1500, 2100), 16, (40, 77)  # the marker is one pixel of the heatmap
PATIENT = {"PatientName": "Ångström^Änne", "PatientID": "P1", "PatientBirthDate": "19500101", "PatientSex": "F"}
TURN, ORIGIN = [0, -1, 0, -1, 0, 0], (20.0, 40.0)
THRESHOLD = 0.25
OURS = ("dicom-parametric-map", "dicom-segmentation", "dicom-labelmap", "dicom-annotations", "dicom-sr")


def marked(shape: tuple[int, int]) -> Any:
    """Hills that are cold, and one hot pixel."""
    hills = steps(shape)

    def draw(region: Region) -> tuple[Values, Flags]:
        values, flags = hills(region)
        values = np.minimum(values, 0)
        y, x = MARKER[0] - region.y, MARKER[1] - region.x
        if 0 <= y < region.height and 0 <= x < region.width:
            values[:, y, x], flags[y, x] = 5, 3
        return values, flags

    return draw


def place(data: Dataset) -> None:
    """Give a level a patient, and a place on the slide."""
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = map(str, ORIGIN)
    origin.ZOffsetInSlideCoordinateSystem = "0"
    data.SpecificCharacterSet = "ISO_IR 100"
    for name, value in PATIENT.items():
        setattr(data, name, value)
    data.StudyInstanceUID, data.FrameOfReferenceUID, data.AccessionNumber = "1.2.3.4", "1.2.3.5", "A7"
    data.ContainerIdentifier = "C1"
    data.ImageOrientationSlide, data.TotalPixelMatrixOriginSequence = TURN, [origin]


@dataclass(frozen=True)
class Exports:
    """A DICOM slide `a/0.dcm` and another one, `b.svs`, with their exports by format."""

    out: Path
    slide: Path
    dest: Path

    def level(self, slide: str, to: str, number: int = 0) -> Path:
        (folder,) = self.dest.glob(f"{slide}*.{to}")
        return folder / f"level-{number}.dcm"

    def annotations(self, slide: str) -> Path:
        return self.dest / f"{slide}.annotations.dcm"

    def report(self, slide: str) -> Path:
        return self.dest / f"{slide}.sr.dcm"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    root = tmp_path_factory.mktemp("dicom")
    levels = [tissue(*SIZE)]
    while len(levels) < 6:
        levels.append(half(levels[-1]))
    (root / "slides").mkdir()
    path, _ = write_dicom(root / "slides", levels=tuple(levels))
    for file in (root / "slides").iterdir():
        data = pydicom.dcmread(file)
        place(data)
        data.save_as(file)
    slide = open_slide(path)
    about: dict[str, Any] = {"size": SIZE, "draw": marked((94, 132)), "mpp": slide.info.mpp_yx}
    made = {"a/0.dcm": Made(**about, path=str(path), digest=slide.info.digest), "b.svs": Made(**about)}
    slide.close()
    out = make(root / "out", made)
    given = {"slides": {"b.svs": {"PatientID": "B9", "StudyInstanceUID": "1.2.9", "SpecimenIdentifier": "S2"}}}
    for to in OURS:
        done = export(out, to, root / "dest", threshold=THRESHOLD, dicom_attributes=given)
        assert {each.error for each in done} == {""}
    return Exports(out, path, root / "dest")


def job_of(exports: Exports, name: str) -> Job:
    return Job(open_result(exports.out)[name], exports.dest / name, Options(threshold=THRESHOLD))


def read_map(path: Path) -> tuple[Any, Any]:
    found = highdicom.pm.ParametricMap.from_dataset(pydicom.dcmread(path))
    return found, found.get_total_pixel_matrix(dtype=np.float32)


def errors(file: Path, known: Path | None = None) -> list[str]:
    """What dciodvfy of 2022 calls an error; label maps, which it does not know yet, as other segmentations."""
    if not shutil.which("dciodvfy"):
        pytest.skip("needs dciodvfy: apt-get install dicom3tools")
    if (data := pydicom.dcmread(file)).get("SegmentationType") == "LABELMAP":
        known = Path(f"{file}.known")
        as_fractions(data).save_as(known)
    told = subprocess.run(["dciodvfy", str(known or file)], capture_output=True, text=True, check=False).stderr
    assert told.splitlines()[:1], file
    return [line for line in told.splitlines() if line.startswith("Error")]


def as_fractions(data: Dataset) -> Dataset:
    """A label map without what is new in it: class, background, padding, and frames of all segments at once."""
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SegmentationStorage
    data.SegmentationType, data.SegmentationFractionalType, data.MaximumFractionalValue = "FRACTIONAL", "OCCUPANCY", 255
    background, *data.SegmentSequence = data.SegmentSequence
    assert background.SegmentNumber == data.PixelPaddingValue == 0
    del data.PixelPaddingValue
    identified = Dataset()
    identified.ReferencedSegmentNumber = 1
    data.SharedFunctionalGroupsSequence[0].SegmentIdentificationSequence = [identified]
    return data


def test_objects_are_valid(exports: Exports) -> None:
    files = sorted(exports.dest.rglob("*.dcm"))
    # Three formats of levels, of 64 px and more: two of a, one of b; annotations and a report of each.
    assert len(files) == 3 * (2 + 1) + 2 + 2
    assert {file.name: found for file in files if (found := errors(file))} == {}


@pytest.mark.parametrize("number", [0, 1])
def test_maps_match_levels_of_the_slide_and_hold_every_value(exports: Exports, number: int) -> None:
    found, values = read_map(exports.level("a/0.dcm", "dicom-parametric-map", number))
    level = pydicom.dcmread(exports.slide.parent / f"{4 + number}.dcm", stop_before_pixels=True)
    assert (found.TotalPixelMatrixRows, found.TotalPixelMatrixColumns) == values.shape
    for name in ("TotalPixelMatrixRows", "TotalPixelMatrixColumns", "ImageOrientationSlide"):
        assert found[name].value == level[name].value
    spacing = [each.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing for each in (found, level)]
    assert spacing[0] == pytest.approx(spacing[1], rel=1e-9)
    slide = open_result(exports.out)["a/0.dcm"]
    if number < len(slide.levels):
        whole = Region(0, 0, *slide.levels[number])
        np.testing.assert_array_equal(values, slide.read("tumour", number, whole)[: values.shape[0], : values.shape[1]])


def test_patient_study_and_frame_of_reference_are_the_slide_s(exports: Exports) -> None:
    for path in exports.dest.rglob("a/**/*.dcm"):
        found = pydicom.dcmread(path)
        assert {name: str(found[name].value) for name in PATIENT} == PATIENT
        assert (found.StudyInstanceUID, found.AccessionNumber) == ("1.2.3.4", "A7")
        if found.Modality == "SR":  # says the rest in its tree
            continue
        assert (found.FrameOfReferenceUID, found.ContainerIdentifier) == ("1.2.3.5", "C1")
        (series,) = found.ReferencedSeriesSequence
        assert len(series.ReferencedInstanceSequence) == 6 or found.Modality == "ANN"


def test_what_is_not_known_is_given_or_empty(exports: Exports) -> None:
    for path in exports.dest.rglob("b.svs*/*.dcm"):
        found = pydicom.dcmread(path)
        assert (found.PatientID, found.StudyInstanceUID, str(found.PatientName)) == ("B9", "1.2.9", "")
        assert (found.PatientSex, found.StudyDate, found.AccessionNumber) == ("", "", "")
        assert found.SpecimenDescriptionSequence[0].SpecimenIdentifier == "S2"
        assert "ReferencedSeriesSequence" not in found


def test_identifiers_are_unlike_within_and_alike_between_exports(exports: Exports) -> None:
    heads = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(exports.dest.rglob("*.dcm"))]
    assert len({head.SOPInstanceUID for head in heads}) == len(heads)
    assert len({head.SeriesInstanceUID for head in heads}) == 10  # five formats of two slides
    assert all(len(head.SOPInstanceUID) <= 64 for head in heads)


@pytest.mark.parametrize("name", ["a/0.dcm", "b.svs"])
def test_segments_are_what_was_explained_and_what_is_hot(exports: Exports, name: str) -> None:
    found = highdicom.seg.segread(exports.level(name, "dicom-segmentation"))
    masks = found.get_total_pixel_matrix(segment_numbers=[1, 2])
    slide = open_result(exports.out)[name]
    whole = Region(0, 0, *masks.shape[:2])
    explained = slide.read_coverage(0, whole) & 2 > 0
    np.testing.assert_array_equal(masks[..., 0], explained)
    np.testing.assert_array_equal(masks[..., 1], explained & (slide.read("tumour", 0, whole) >= THRESHOLD))
    assert masks[..., 1].sum() == 1
    labels = [found.get_segment_description(number).segment_label for number in (1, 2)]
    assert labels == ["explained", "hot gradcam: tumour"]


@pytest.fixture(scope="module")
def hilly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with regions of many sizes, some with holes, in two channels that overlap."""
    return make(
        tmp_path_factory.mktemp("hilly") / "out", {"a.svs": Made((3000, 4200), steps((188, 263)), mpp=(0.25, 0.3))}
    )


@pytest.mark.parametrize("name", ["a/0.dcm", "b.svs"])
def test_labels_are_the_segments(exports: Exports, name: str) -> None:
    labels = highdicom.seg.segread(exports.level(name, "dicom-labelmap"))
    assert labels.segmentation_type == highdicom.seg.SegmentationTypeValues.LABELMAP
    found = labels.get_total_pixel_matrix(combine_segments=True)
    masks = highdicom.seg.segread(exports.level(name, "dicom-segmentation")).get_total_pixel_matrix()
    np.testing.assert_array_equal(found, np.where(masks[..., 1], 2, masks[..., 0]))
    assert labels.get_segment_description(2).segment_label == "hot gradcam: tumour"


def test_of_two_hot_channels_the_higher_above_its_threshold_counts(hilly: Path, tmp_path: Path) -> None:
    channels = [channel.label for channel in open_result(hilly)["a.svs"].channels[:2]]
    options: dict[str, Any] = {"threshold": -0.5, "window": (-2.0, 3.0), "channel": tuple(channels)}
    kinds = ("dicom-labelmap", "dicom-segmentation")
    for to in kinds:
        (done,) = export(hilly, to, tmp_path, **options)
        assert done.error == ""
    of_labels, of_masks = (highdicom.seg.segread(tmp_path / f"a.svs.{to}/level-0.dcm") for to in kinds)
    labels, masks = of_labels.get_total_pixel_matrix(combine_segments=True), of_masks.get_total_pixel_matrix()
    slide = open_result(hilly)["a.svs"]
    first, second = (slide.read(name, 0, Region(0, 0, *labels.shape)) for name in channels)
    expected = np.where(masks[..., 2] & (~masks[..., 1].astype(bool) | (second > first)), 3, masks[..., 1] * 2)
    np.testing.assert_array_equal(labels, np.where(expected, expected, masks[..., 0]))
    assert (masks[..., 1] & masks[..., 2]).any()


@pytest.mark.parametrize("number", [0, 1])
def test_small_regions_are_not_in_segments(hilly: Path, tmp_path: Path, number: int) -> None:
    """By connected components of scikit-image, whose areas are counted pixel by pixel."""
    least = 3_000.0
    for name, area in (("all", 0.0), ("large", least)):
        (done,) = export(hilly, "dicom-segmentation", tmp_path / name, threshold=-0.5, min_area=area)
        assert done.error == ""
    whole, large = (
        highdicom.seg.segread(tmp_path / name / f"a.svs.dicom-segmentation/level-{number}.dcm")
        .get_total_pixel_matrix(segment_numbers=[2])[..., 0]
        .astype(bool)
        for name in ("all", "large")
    )
    regions = label(whole, connectivity=1)
    um2 = 0.25 * 0.3 * (STRIDE * 2**number) ** 2
    areas = np.bincount(regions.ravel()) * um2
    kept = np.unique(regions[large])
    if number == 0:
        np.testing.assert_array_equal(large, whole & (areas[regions] >= least))
    assert set(np.flatnonzero(areas >= 2 * least)[1:]) <= set(kept)
    assert (whole & ~large).any()


def read_report(path: Path) -> Any:
    return highdicom.sr.srread(path).content


def test_a_report_measures_each_region(hilly: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_regions, "MAX_REPORTED", 3)
    (done,) = export(hilly, "dicom-sr", tmp_path, threshold=-0.5, simplify=0)
    assert errors(done.paths[0]) == []
    report = read_report(done.paths[0])
    slide = open_result(hilly)["a.svs"]
    found = hot_regions(Job(slide, tmp_path, Options(threshold=-0.5, simplify=0)), slide.channel("tumour")).polygons
    largest = sorted(found, key=lambda polygon: -polygon.area)[:3]
    hot, hole = (own_code(name).CodeValue for name in ("hot", "hole"))
    groups = report.get_planar_roi_measurement_groups()
    assert (
        [group.finding_type.value for group in groups].count(hole) == sum(len(each.interiors) for each in largest) > 0
    )
    scale, values = np.array([0.3, 0.25]) / 1000, slide.read("tumour", 0, Region(0, 0, 188, 263))
    for polygon, group in zip(largest, (g for g in groups if g.finding_type.value == hot), strict=True):
        drawn = shapely.Polygon(group.roi.value[:, :2] / scale + 0.5, [ring.coords for ring in polygon.interiors])
        assert drawn.symmetric_difference(polygon).area < 1  # float32
        area, mean, most = (float(measured.value) for measured in group.get_measurements())
        assert area == pytest.approx(polygon.area * 0.25 * 0.3, rel=1e-6)
        within = polygon2mask(values.shape, np.array(polygon.exterior.coords)[:, ::-1] / STRIDE - 0.5)
        for ring in polygon.interiors:
            within &= ~polygon2mask(values.shape, np.array(ring.coords)[:, ::-1] / STRIDE - 0.5)
        assert mean == pytest.approx(values[within].mean(), rel=0.05)
        assert most == pytest.approx(values[within].max(), rel=1e-6)
    (whole,) = report.get_image_measurement_groups()
    count, area = (float(measured.value) for measured in whole.get_measurements())
    assert count == len(found)
    assert area == pytest.approx(sum(polygon.area for polygon in found) * 0.25 * 0.3, rel=1e-6)
    assert f"{len(found)} regions, 3 listed" in whole.tracking_identifier


def on_slide(found: Any, row: float, column: float) -> Any:
    """Where a point of an image lies on the slide, in mm, by highdicom; the first pixel goes from 0 to 1."""
    origin = found.TotalPixelMatrixOriginSequence[0]
    transform = PixelToReferenceTransformer(
        image_position=[float(origin.XOffsetInSlideCoordinateSystem), float(origin.YOffsetInSlideCoordinateSystem), 0],
        image_orientation=[float(each) for each in found.ImageOrientationSlide],
        pixel_spacing=found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing,
    )
    return transform(np.array([[round(column - 0.5), round(row - 0.5)]]))[0, :2]


@pytest.mark.parametrize("name", ["a/0.dcm", "b.svs"])
def test_a_marker_lies_in_its_place_by_foreign_code(exports: Exports, name: str) -> None:
    """The one hot pixel of the heatmap, in map, segmentation, outline and report, to a pixel of the heatmap."""
    found, values = read_map(exports.level(name, "dicom-parametric-map"))
    assert np.argwhere(values >= THRESHOLD).tolist() == [list(MARKER)]
    in_map = on_slide(found, MARKER[0] + 0.5, MARKER[1] + 0.5)
    pixel_mm = float(found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing[0])
    (group,) = next(iter(AnnotationInstance.open([exports.annotations(name)]))).groups
    (outline,) = group.annotations
    drawn = shapely.Polygon(outline.geometry.to_coords())
    assert drawn.area == pytest.approx(pixel_mm**2, rel=1e-3)
    (reported,) = read_report(exports.report(name)).get_planar_roi_measurement_groups()
    assert drawn.symmetric_difference(shapely.Polygon(reported.roi.value[:, :2])).area < 1e-3 * drawn.area
    assert np.abs(np.subtract(drawn.centroid.coords[0], in_map)).max() <= pixel_mm / 2
    if name == "a/0.dcm":  # the same place on the slide's own finest level
        level = pydicom.dcmread(exports.slide, stop_before_pixels=True)
        own = on_slide(level, (MARKER[0] + 0.5) * STRIDE, (MARKER[1] + 0.5) * STRIDE)
        assert np.abs(np.subtract(drawn.centroid.coords[0], own)).max() <= pixel_mm / STRIDE


def test_outlines_are_the_regions_with_holes_apart(exports: Exports, tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"a.svs": Made(SIZE, steps((94, 132)), mpp=(0.25, 0.3))})
    (done,) = export(out, "dicom-annotations", tmp_path / "dest", threshold=-0.5)
    found = highdicom.ann.annread(done.paths[0])
    regions = hot_regions(Job(open_result(out)["a.svs"], tmp_path, Options(threshold=-0.5)), _channel(out))
    outer, holes = found.get_annotation_groups()
    assert (outer.label, holes.label) == ("hot gradcam: tumour", "holes in gradcam: tumour")
    assert len(regions.polygons) == outer.NumberOfAnnotations
    scale = np.array([0.3, 0.25]) / 1000
    drawn = [shapely.Polygon(ring[:, :2] / scale + 0.5) for ring in outer.get_graphic_data("3D")]
    for one, polygon in zip(drawn, regions.polygons, strict=True):
        assert one.symmetric_difference(shapely.Polygon(polygon.exterior)).area < 1  # float32
    cut = [shapely.Polygon(ring[:, :2] / scale + 0.5).area for ring in holes.get_graphic_data("3D")]
    assert sum(cut) == pytest.approx(
        sum(shapely.Polygon(r).area for p in regions.polygons for r in p.interiors), rel=1e-4
    )
    (_, measured, (unit,)) = outer.get_measurements()
    assert unit.meaning == "square micrometer"
    np.testing.assert_allclose(measured[:, 0], [polygon.area * 0.25 * 0.3 for polygon in regions.polygons], rtol=1e-5)


def _channel(out: Path) -> Any:
    return open_result(out)["a.svs"].channel("tumour")


def test_a_slide_without_hot_regions_has_no_annotations(exports: Exports, tmp_path: Path) -> None:
    done = export(exports.out, "dicom-annotations", tmp_path, threshold=99)
    assert [(each.paths, each.error) for each in done] == [((), "")] * 2


def test_levels_that_do_not_match_are_made_of_the_next_finer(exports: Exports) -> None:
    """A slide of factors 1, 4, 64: the heatmap's values are repeated on that of 4, and sampled for that of 64."""

    def head(size: tuple[int, int], factor: int) -> Dataset:
        data, measures, shared = Dataset(), Dataset(), Dataset()
        data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = size
        measures.PixelSpacing = [0.0005 * factor] * 2
        shared.PixelMeasuresSequence = [measures]
        data.SharedFunctionalGroupsSequence = [shared]
        return data

    own = [MapLevel((94, 132), (16.0, 16.0)), MapLevel((47, 66), (32.0, 32.0))]
    heads = [head((1500, 2100), 1), head((375, 525), 4), head((24, 33), 64)]
    found = matched_levels(heads, STRIDE, own)
    assert [(level.size, round(level.factor[0])) for level in found] == [((375, 525), 4), ((24, 33), 64)]
    assert [level.size for level in matched_levels(heads, 64, own)] == [(24, 33)]
    huge = [head((400_000, 400_000), 1), head((100_000, 100_000), 4), head((6250, 6250), 64)]
    assert [level.size for level in matched_levels(huge, STRIDE, own)] == [(94, 132), (6250, 6250)]
    assert matched_levels([], STRIDE, own) == own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PatientAddress: x", "'PatientAddress' is not taken; expected PatientName"),
        ("PatientID: 7", "PatientID is 7; expected text, in quotation marks"),
        ("StudyInstanceUID: one", "StudyInstanceUID is 'one', which DICOM does not take"),
        ("- x", "expected keywords of DICOM with their values"),
        ("slides: [a]", "slides: expected ids of slides"),
        ("PatientID: [", "cannot be read as attributes"),
        ("PatientID: P2", "its PatientID is 'P1', but 'P2' is given"),
    ],
)
def test_attributes_that_cannot_be_are_refused(
    exports: Exports, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given.yaml").write_text(text)
    command = ["export", str(exports.out), "--to", "dicom-annotations", "--dest", str(tmp_path / "dest")]
    assert main([*command, "--slide", "a/0.dcm", "--dicom-attributes", str(tmp_path / "given.yaml")]) in (1, 2)
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be read as attributes"):
        export(exports.out, "dicom-annotations", tmp_path, dicom_attributes=tmp_path / "none.yaml")


def test_a_dicom_slide_that_is_gone_is_refused(exports: Exports, tmp_path: Path) -> None:
    made = Made(SIZE, steps((94, 132)), path=str(tmp_path / "gone.dcm"))
    (done,) = export(make(tmp_path / "out", {"gone.dcm": made}), "dicom-parametric-map", tmp_path / "dest")
    assert "is gone, which says whose slide it is; put it back" in done.error


def test_objects_are_no_slides(exports: Exports, tmp_path: Path) -> None:
    shutil.copytree(exports.dest, tmp_path / "all")
    shutil.copy(exports.slide, tmp_path / "all")
    assert [slide.id for slide in find_slides([tmp_path / "all"])] == ["0.dcm"]


@pytest.mark.parametrize("name", ["highdicom-sm_image", "gcp-multi_frame_jpeg_camelyon_challenge_image"])
def test_real_slides(shared_data: Path, tmp_path: Path, name: str) -> None:
    path = shared_data / f"slides/dicom/{name}/{name}.dcm"
    slide = open_slide(path, (0.5, 0.5))
    size, digest = (slide.info.height, slide.info.width), slide.info.digest
    slide.close()
    shape = -(-size[0] // STRIDE), -(-size[1] // STRIDE)
    made = Made(size, steps(shape), mpp=(0.5, 0.5), path=str(path), digest=digest)
    out = make(tmp_path / "out", {path.name: made})
    source = pydicom.dcmread(path, stop_before_pixels=True)
    for to in OURS:
        (done,) = export(out, to, tmp_path / "dest", threshold=-0.5)
        assert done.error == ""
    for file in (tmp_path / "dest").rglob("*.dcm"):
        found = pydicom.dcmread(file)
        assert found.StudyInstanceUID == source.StudyInstanceUID
        assert found.get("FrameOfReferenceUID", source.FrameOfReferenceUID) == source.FrameOfReferenceUID
        assert str(found.PatientName) == str(source.get("PatientName", ""))
        assert errors(file) == []
