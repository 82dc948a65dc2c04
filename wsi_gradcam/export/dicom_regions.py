"""DICOM: regions as label maps (PS3.3 A.51), annotations (A.87) and measurement reports (A.35.13, TID 1500).

Polygons in DICOM have no holes, so holes are outlines of their own. Coordinates are millimetres on the slide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from pydicom.dataset import Dataset

from wsi_gradcam import __version__
from wsi_gradcam.errors import ResultError
from wsi_gradcam.evidence import NOTHING
from wsi_gradcam.evidence.labels import open_clusters
from wsi_gradcam.export.dicom import (
    OURS,
    PIXELS,
    Hot,
    add_frames,
    add_segments,
    add_tiled_image,
    algorithm,
    code,
    hot_segments,
    in_mm,
    new_object,
    own_code,
    sampled,
    save,
    segment,
    whole_tile,
)
from wsi_gradcam.export.dicom_source import TILE, MapLevel, Source, long_string, uid
from wsi_gradcam.export.shapes import HotRegions, filled, hot_regions
from wsi_gradcam.geometry import Region, tiles
from wsi_gradcam.results.heatmap import EXPLAINED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.export.job import Job
    from wsi_gradcam.results.display import ChannelInfo

LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"
ANNOTATIONS = "1.2.840.10008.5.1.4.1.1.91.1"
REPORT = "1.2.840.10008.5.1.4.1.1.88.34"  # Comprehensive 3D SR
MAX_REPORTED = 500  # number of a channel's regions in a report, largest first
# Attributes of images: reports name their specimen and their frame of reference in their tree.
NOT_OF_REPORTS = (
    "ReferencedSeriesSequence",
    "ContentCreatorName",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "ContainerIdentifier",
    "IssuerOfTheContainerIdentifierSequence",
    "ContainerTypeCodeSequence",
    "ContainerComponentSequence",
    "SpecimenDescriptionSequence",
)
MAX_MEASURED_PX = 1 << 20  # pixels of the box around a region, on the level from which its values are taken


def write_labelmap(job: Job) -> list[Path]:
    """Write a folder of label maps: 0 nothing, 1 explained, then the channels' hot parts.

    Where several are hot, the one that is highest above its threshold, relative to its window, takes the pixel.
    """
    hot = Hot(job)

    def read(level: MapLevel, tile: Region) -> NDArray[np.uint8]:
        found = hot.explained(level, tile).astype(np.uint8)
        best = np.zeros(found.shape)
        for number, channel in enumerate(job.drawn_channels, 2):
            low, high = job.window(channel)
            above = (hot.values(channel, level, tile) - job.threshold(channel)) / (high - low)
            taken = hot.mask(channel, level, tile) & ((found == 1) | (above > best))
            found[taken], best[taken] = number, above[taken]
        return found

    return [write_labels(job, "hot regions", job.path("dicom-labelmap"), hot_segments(job), read)]


def write_labels(
    job: Job, name: str, path: Path, segments: list[Dataset], read: Callable[[MapLevel, Region], NDArray[np.uint8]]
) -> Path:
    """Write a label map (PS3.3 A.51, SegmentationType LABELMAP): an instance for each level, uint8.

    Args:
        name: what the labels are.
        segments: those of all labels but 0.
        read: returns the labels of a tile of a level, uint8 [h, w].
    """
    source = Source(job)
    with job.atomic_path(path) as partial:
        partial.mkdir()
        for number, level in enumerate(source.levels(1)):
            found = new_object(source, LABELMAP, "SEG", f"labels of {name}", number + 1)
            add_segments(found, job, source, level, [_background(), *segments])
            found.SegmentationType, found.SegmentsOverlap, found.PixelPaddingValue = "LABELMAP", "NO", 0
            found.BitsAllocated = found.BitsStored = 8
            found.HighBit, found.PixelRepresentation = 7, 0
            found.ContentLabel = re.sub(r"[^A-Z0-9]+", "_", name.upper())[:16]
            found.ContentDescription = long_string(f"{name} of {job.slide.id}")
            every = tiles(*level.size, TILE)
            written = [tile for tile in every if read(level, tile).any()] or every[:1]
            add_frames(found, [(tile, 1) for tile in written])
            frames = (whole_tile(read(level, tile)).tobytes() for tile in written)
            save(partial / f"level-{number}.dcm", found, PIXELS, frames, len(written) * TILE**2)
    return path


def _background() -> Dataset:
    """Return the segment of label 0, which label maps have."""
    found = segment(0, "Background", "neither explained nor of a segment", "000000")
    found.SegmentedPropertyCategoryCodeSequence = [code("125040", "DCM", "Background")]
    found.SegmentedPropertyTypeCodeSequence = [code("125040", "DCM", "Background")]
    return found


def write_clusters(job: Job) -> list[Path]:
    """Write label maps of the kinds of evidence: 0 not examined, then the kinds in order, and last those of no kind."""
    clusters = open_clusters(job.slide)
    if clusters is None:
        raise ResultError(f"{job.slide.id}: has no label image of clusters; run evidence without --skip-labels")

    def read(level: MapLevel, tile: Region) -> NDArray[np.uint8]:
        return np.take(numbers, sampled(job, level, clusters.read, tile))

    rest = len(clusters.kinds) + 1
    numbers = np.zeros(256, np.uint8)
    numbers[[*(kind.number for kind in clusters.kinds), NOTHING]] = range(1, rest + 1)
    segments = [
        segment(
            int(numbers[kind.number]), f"evidence {kind.title}", f"{kind.title}, {kind.side} the target", kind.colour
        )
        for kind in clusters.kinds
    ]
    segments.append(segment(rest, "of no cluster", "looked at, but of no kind of evidence", "A0A0A0"))
    return [write_labels(job, "clusters of evidence", job.path("dicom-clusters"), segments, read)]


def write_annotations(job: Job) -> list[Path]:
    """Write one file with the outlines of the chosen channels' hot regions, in millimetres on the slide.

    If no region is hot, there is no file, because annotations in DICOM are never empty.
    """
    source, path = Source(job), job.path("annotations.dcm")
    finest = _finest(job, source)
    groups = [group for channel in job.drawn_channels for group in _groups(job, channel, finest)]
    for number, group in enumerate(groups, 1):
        group.AnnotationGroupNumber, group.AnnotationGroupUID = number, uid("group", source.digest, number)
    if not groups:
        return []
    found = new_object(source, ANNOTATIONS, "ANN", "outlines", 1)
    found.ContentLabel, found.ContentDescription = "OUTLINES", long_string(f"outlines on {job.slide.id}")
    found.AnnotationCoordinateType = "3D"
    found.AnnotationGroupSequence = groups
    if references := source.references():
        found.ReferencedImageSequence = references[:1]
    with job.atomic_path(path) as partial:
        save(partial, found)
    return [path]


def _finest(job: Job, source: Source) -> Dataset:
    """Return a header that gives the position of the pixels of the slide's finest level."""
    found = Dataset()
    add_tiled_image(found, source, job, MapLevel(job.slide.size_px, (1.0, 1.0), next(iter(source.heads), None)))
    return found


def _groups(job: Job, channel: ChannelInfo, finest: Dataset) -> Iterator[Dataset]:
    """Yield the group of a channel's outlines, and that of their holes: polygons in DICOM have none."""
    regions = hot_regions(job, channel)
    about = long_string(f"{channel.label} from {regions.threshold:g} on")
    if regions.polygons:
        outer = [polygon.exterior for polygon in regions.polygons]
        group = annotation_group(f"hot {channel.label}", about, outer, finest)
        um2 = job.slide.mpp[0] * job.slide.mpp[1]
        group.MeasurementsSequence = [_areas(np.array([polygon.area for polygon in regions.polygons]) * um2)]
        yield group
    if holes := [ring for polygon in regions.polygons for ring in polygon.interiors]:
        yield annotation_group(f"holes in {channel.label}", about, holes, finest)


def annotation_group(label: str, about: str, rings: Sequence[shapely.LinearRing], finest: Dataset) -> Dataset:
    """Return a group of polygons (PS3.3 C.37.1.2), given by rings in pixels of the slide's finest level."""
    found = Dataset()
    found.AnnotationGroupLabel, found.AnnotationGroupDescription = long_string(label), about
    found.AnnotationGroupGenerationType = "AUTOMATIC"
    found.AnnotationGroupAlgorithmIdentificationSequence = [algorithm()]
    found.AnnotationPropertyCategoryCodeSequence = [code("309825002", "SCT", "Spatial and relational concept")]
    found.AnnotationPropertyTypeCodeSequence = [own_code(label.split()[0])]
    found.AnnotationAppliesToAllOpticalPaths, found.GraphicType = "YES", "POLYGON"
    found.AnnotationAppliesToAllZPlanes, found.CommonZCoordinateValue = "NO", 0.0
    found.NumberOfAnnotations = len(rings)
    corners = [in_mm(finest, shapely.get_coordinates(ring)[:-1]) for ring in rings]  # the first is not repeated
    found.PointCoordinatesData = np.concatenate(corners).astype("<f4").tobytes()
    starts = np.cumsum([0, *(2 * len(each) for each in corners[:-1])]) + 1  # indices of numbers, two per point
    found.LongPrimitivePointIndexList = starts.astype("<u4").tobytes()
    return found


def _areas(um2: NDArray[np.float64]) -> Dataset:
    found, values = Dataset(), Dataset()
    values.FloatingPointValues = um2.astype("<f4").tobytes()
    found.ConceptNameCodeSequence = [code("42798000", "SCT", "Area")]
    found.MeasurementUnitsCodeSequence = [code("um2", "UCUM", "square micrometer")]
    found.MeasurementValuesSequence = [values]
    return found


def write_report(job: Job) -> list[Path]:
    """Write one report: for each chosen channel, the largest hot regions with area, mean and highest value."""
    source, path = Source(job), job.path("sr.dcm")
    found = new_object(source, REPORT, "SR", "measurements", 1)
    for name in NOT_OF_REPORTS:
        found.pop(name, None)
    found.CompletionFlag, found.VerificationFlag = "COMPLETE", "UNVERIFIED"
    found.ReferencedPerformedProcedureStepSequence, found.PerformedProcedureCodeSequence = [], []
    if references := source.references():
        found.CurrentRequestedProcedureEvidenceSequence = [_evidence(source, references)]
    found.ValueType, found.ContinuityOfContent = "CONTAINER", "SEPARATE"
    found.ConceptNameCodeSequence = [code("126000", "DCM", "Imaging Measurement Report")]
    found.ContentTemplateSequence = [_template("1500")]
    groups = [group for channel in job.drawn_channels for group in _measurements(job, channel, source)]
    found.ContentSequence = [*_context(source), *_library(references), _container("126010", "Imaging Measurements")]
    found.ContentSequence[-1].ContentSequence = groups
    with job.atomic_path(path) as partial:
        save(partial, found)
    return [path]


def _evidence(source: Source, references: list[Dataset]) -> Dataset:
    """Return which files of the slide's study the report names."""
    found, series = Dataset(), Dataset()
    found.StudyInstanceUID, series.SeriesInstanceUID = source.about.StudyInstanceUID, source.heads[0].SeriesInstanceUID
    series.ReferencedSOPSequence = references
    found.ReferencedSeriesSequence = [series]
    return found


def _template(number: str) -> Dataset:
    found = Dataset()
    found.MappingResource, found.TemplateIdentifier = "DCMR", number
    return found


def _item(relation: str, kind: str, concept: Dataset | None, **values: Any) -> Dataset:
    """Return an item of a report's tree (PS3.3 C.17.3), with the attributes of its value type."""
    found = Dataset()
    found.RelationshipType, found.ValueType = relation, kind
    if concept is not None:
        found.ConceptNameCodeSequence = [concept]
    for name, value in values.items():
        setattr(found, name, value)
    return found


def _container(value: str, meaning: str) -> Dataset:
    return _item("CONTAINS", "CONTAINER", code(value, "DCM", meaning), ContinuityOfContent="SEPARATE")


def _coded(relation: str, concept: tuple[str, str], value: Dataset) -> Dataset:
    return _item(relation, "CODE", code(concept[0], "DCM", concept[1]), ConceptCodeSequence=[value])


def _context(source: Source) -> list[Dataset]:
    """Return language, observer, specimen and procedure (TID 1204, 1001, 1009; PS3.16)."""
    context, (specimen, *_) = "HAS OBS CONTEXT", source.about.SpecimenDescriptionSequence

    def known(kind: str, value: str, meaning: str, **of: Any) -> Dataset:
        return _item(context, kind, code(value, "DCM", meaning), **of)

    language = code("en-US", "RFC5646", "English (United States)")
    procedure = code("112703", "DCM", "Whole Slide Imaging")
    return [
        _coded("HAS CONCEPT MOD", ("121049", "Language of Content Item and Descendants"), language),
        _coded(context, ("121005", "Observer Type"), code("121007", "DCM", "Device")),
        known("UIDREF", "121012", "Device Observer UID", UID=uid("device", OURS, __version__)),
        known("TEXT", "121013", "Device Observer Name", TextValue=OURS),
        known("TEXT", "121014", "Device Observer Manufacturer", TextValue=OURS),
        known("TEXT", "121015", "Device Observer Model Name", TextValue=f"{OURS} {__version__}"),
        _coded(context, ("121024", "Subject Class"), code("121027", "DCM", "Specimen")),
        known("UIDREF", "121039", "Specimen UID", UID=specimen.SpecimenUID),
        known("TEXT", "121041", "Specimen Identifier", TextValue=specimen.SpecimenIdentifier),
        _coded("HAS CONCEPT MOD", ("121058", "Procedure reported"), procedure),
    ]


def _library(references: list[Dataset]) -> list[Dataset]:
    """Return the slide's own levels (TID 1600); nothing if it is not DICOM."""
    if not references:
        return []
    found, group = _container("111028", "Image Library"), _container("126200", "Image Library Group")
    group.ContentSequence = [_item("CONTAINS", "IMAGE", None, ReferencedSOPSequence=[each]) for each in references]
    found.ContentSequence = [group]
    return [found]


def _measurements(job: Job, channel: ChannelInfo, source: Source) -> Iterator[Dataset]:
    """Yield the measurements of all hot regions of a channel together, then those of each of the largest."""
    regions, um2 = hot_regions(job, channel), job.slide.mpp[0] * job.slide.mpp[1]
    largest = sorted(regions.polygons, key=lambda polygon: -polygon.area)[:MAX_REPORTED]
    name = f"{channel.label} from {regions.threshold:g} on"
    whole = _group("1501", source, f"{name}, {len(regions.polygons)} regions, {len(largest)} listed", "hot")
    whole.ContentSequence += [
        _number(own_code("number of regions"), len(regions.polygons), "{regions}", "regions"),
        _area(sum(polygon.area for polygon in regions.polygons) * um2),
    ]
    yield whole
    finest = _finest(job, source)
    for number, polygon in enumerate(largest):
        group = _group("1410", source, f"{name}, region {number}", "hot", _outline(polygon.exterior, finest, source))
        group.ContentSequence += [_area(polygon.area * um2), *_values(job, channel, regions, polygon)]
        yield group
        for inner, ring in enumerate(polygon.interiors):
            title = f"{name}, region {number}, hole {inner}"
            group = _group("1410", source, title, "hole", _outline(ring, finest, source))
            group.ContentSequence += [_area(shapely.Polygon(ring).area * um2)]
            yield group


def _group(template: str, source: Source, title: str, kind: str, *more: Dataset) -> Dataset:
    """Return a measurement group, with its tracking identifiers and its findings."""
    found = _container("125007", "Measurement Group")
    found.ContentTemplateSequence = [_template(template)]
    tracked = uid("tracked", source.digest, title)
    found.ContentSequence = [
        _item("HAS OBS CONTEXT", "TEXT", code("112039", "DCM", "Tracking Identifier"), TextValue=title),
        _item("HAS OBS CONTEXT", "UIDREF", code("112040", "DCM", "Tracking Unique Identifier"), UID=tracked),
        _coded("CONTAINS", ("121071", "Finding"), own_code(kind)),
        *more,
    ]
    return found


def _outline(ring: shapely.LinearRing, finest: Dataset, source: Source) -> Dataset:
    """Return a closed polygon in the slide's frame of reference."""
    corners = np.pad(in_mm(finest, shapely.get_coordinates(ring)), ((0, 0), (0, 1)))
    return _item(
        "CONTAINS",
        "SCOORD3D",
        code("111030", "DCM", "Image Region"),
        GraphicType="POLYGON",
        GraphicData=corners.astype(np.float32).ravel().tolist(),
        ReferencedFrameOfReferenceUID=source.about.FrameOfReferenceUID,
    )


def _number(concept: Dataset, value: float, unit: str, meaning: str, derivation: Dataset | None = None) -> Dataset:
    found, measured = _item("CONTAINS", "NUM", concept), Dataset()
    measured.NumericValue = f"{value:.9g}"
    measured.MeasurementUnitsCodeSequence = [code(unit, "UCUM", meaning)]
    found.MeasuredValueSequence = [measured]
    if derivation is not None:
        found.ContentSequence = [_coded("HAS CONCEPT MOD", ("121401", "Derivation"), derivation)]
    return found


def _area(um2: float) -> Dataset:
    return _number(code("42798000", "SCT", "Area"), um2, "um2", "square micrometer")


def _values(job: Job, channel: ChannelInfo, regions: HotRegions, polygon: shapely.Polygon) -> list[Dataset]:
    """Return the mean and maximum of the explained pixels whose centres lie in a region.

    They are those of the heatmap level that was traced or, for regions with a very large box, of a coarser one.
    """
    left, top, right, bottom = polygon.bounds
    for level in range(regions.level, len(job.slide.levels)):
        step = job.slide.stride_px * 2**level
        height, width = job.slide.levels[level]
        y, x = int(top // step), int(left // step)
        box = Region(y, x, min(height, int(-(-bottom // step))) - y, min(width, int(-(-right // step))) - x)
        if box.height * box.width <= MAX_MEASURED_PX:
            break
    within = filled(polygon, box, step)
    values = job.slide.read(channel, level, box)[within & (job.slide.read_coverage(level, box) & EXPLAINED > 0)]
    if not values.size:
        return []
    concept = own_code(channel.method)
    kinds = (
        (code("373098007", "SCT", "Mean"), values.mean(dtype=np.float64)),
        (code("56851009", "SCT", "Maximum"), values.max()),
    )
    return [_number(concept, float(value), "1", "no units", kind) for kind, value in kinds]
