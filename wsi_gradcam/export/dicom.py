"""DICOM: heatmaps as Parametric Maps (PS3.3 A.75), hot regions as Segmentations (A.51).

Maps and segmentations have an instance for each level, with the tiles that are not empty.

Headers are written in full, and pixels follow tile by tile: memory does not grow with the slide. Identifiers are made
from digests (PS3.5 B.2), and dates say when the heatmap was finished, so that the same export has the same bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from pydicom import dcmwrite
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from wsi_gradcam import __version__
from wsi_gradcam.export.dicom_source import TILE, MapLevel, Source, long_string, spacing_mm, uid
from wsi_gradcam.export.job import MADE_BY, slug
from wsi_gradcam.export.shapes import regions_by_area
from wsi_gradcam.geometry import Region, tiles
from wsi_gradcam.results.heatmap import EXPLAINED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.export.job import Job
    from wsi_gradcam.results.display import ChannelInfo

OURS = MADE_BY["Software"]
PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
FLOAT_PIXELS, PIXELS = (0x7FE00008, "OF"), (0x7FE00010, "OB")


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """Return a coded concept."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, long_string(meaning)
    return item


def own_code(text: str) -> Dataset:
    """Return a concept of ours, such as a method of explanation."""
    return code(long_string(re.sub(r"\W+", "_", text), 16), "99WSIGRADCAM", text)


def new_object(source: Source, sop_class: str, modality: str, name: str, instance: int) -> Dataset:
    """Return a header with everything that our objects share: patient, study, series, equipment, the slide's files.

    Args:
        name: name of the series, different from all others of the slide.
        instance: number within the series, from 1.
    """
    found = Dataset()
    found.update(source.about)
    found.SOPClassUID, found.Modality = sop_class, modality
    found.SOPInstanceUID = uid("instance", source.digest, name, instance)
    found.SeriesInstanceUID = uid("series", source.digest, name)
    found.SeriesNumber = 1 + int(uid("number", name)[5:]) % 9999
    found.InstanceNumber = instance
    found.SeriesDescription = long_string(name)
    found.Manufacturer, found.ManufacturerModelName, found.SoftwareVersions = OURS, OURS, __version__
    found.DeviceSerialNumber = "none"
    found.ContentDate, found.ContentTime = source.finished.strftime("%Y%m%d"), source.finished.strftime("%H%M%S")
    found.TimezoneOffsetFromUTC = "+0000"
    found.ContentCreatorName = ""
    if references := source.references():
        series = Dataset()
        series.SeriesInstanceUID = source.heads[0].SeriesInstanceUID
        series.ReferencedInstanceSequence = references
        found.ReferencedSeriesSequence = [series]
    return found


def add_tiled_image(found: Dataset, source: Source, job: Job, level: MapLevel) -> None:
    """Add the attributes of a tiled image of a level: its size, its position on the slide, and its pixel size."""
    found.Rows = found.Columns = TILE
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.TotalPixelMatrixRows, found.TotalPixelMatrixColumns = level.size
    found.TotalPixelMatrixFocalPlanes = 1
    head = level.head or (source.heads[0] if source.heads else Dataset())
    found.ImageOrientationSlide = head.get("ImageOrientationSlide") or ["1", "0", "0", "0", "1", "0"]
    # Positions are those of the first pixel's centre; for other slides, (0, 0) is that of their own first pixel.
    y_mm, x_mm = ((factor - 1) / 2 * mpp / 1000 for factor, mpp in zip(level.factor, job.slide.mpp, strict=True))
    found.TotalPixelMatrixOriginSequence = head.get("TotalPixelMatrixOriginSequence") or [_place(x_mm, y_mm)]
    found.LossyImageCompression = head.get("LossyImageCompression") or "00"
    for name in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if name in head:
            setattr(found, name, head[name].value)
    found.BurnedInAnnotation = "NO"
    measures, shared = Dataset(), Dataset()
    own = [mpp * factor / 1000 for mpp, factor in zip(job.slide.mpp, level.factor, strict=True)]
    measures.PixelSpacing = [f"{mm:.10g}" for mm in (level.head and spacing_mm(level.head)) or own]
    measures.SliceThickness = "0.001"
    shared.PixelMeasuresSequence = [measures]
    found.SharedFunctionalGroupsSequence = [shared]


def add_frames(found: Dataset, places: Sequence[tuple[Region, int]], with_segments: bool = False) -> None:
    """Add the position of each frame (PS3.3 C.8.12.6.1); those of empty tiles are left out.

    Args:
        places: region of each frame in pixels of the level, and the number of its segment.
        with_segments: whether segments are a dimension too.
    """
    organization = Dataset()
    organization.DimensionOrganizationUID = uid("dimensions", found.SOPInstanceUID)
    found.DimensionOrganizationType = "TILED_SPARSE"
    found.DimensionOrganizationSequence = [organization]
    pointers = [("RowPositionInTotalImagePixelMatrix", "PlanePositionSlideSequence")]
    pointers += [("ColumnPositionInTotalImagePixelMatrix", "PlanePositionSlideSequence")]
    if with_segments:
        pointers.insert(0, ("ReferencedSegmentNumber", "SegmentIdentificationSequence"))
    found.DimensionIndexSequence = [_dimension(organization.DimensionOrganizationUID, *pair) for pair in pointers]
    found.PyramidUID = uid("pyramid", found.SeriesInstanceUID)
    found.NumberOfFrames = len(places)
    found.PerFrameFunctionalGroupsSequence = [_frame(found, *place, with_segments) for place in places]


def _dimension(organization: str, pointer: str, group: str) -> Dataset:
    item = Dataset()
    item.DimensionOrganizationUID = organization
    item.DimensionIndexPointer, item.FunctionalGroupPointer = tag_for_keyword(pointer), tag_for_keyword(group)
    return item


def _frame(found: Dataset, region: Region, segment: int, with_segments: bool) -> Dataset:
    """Return the functional groups of a frame: its position and its segment."""
    item, content = Dataset(), Dataset()
    ((x, y),) = in_mm(found, np.array([[region.x + 0.5, region.y + 0.5]]))
    place = _place(x, y)
    place.ColumnPositionInTotalImagePixelMatrix, place.RowPositionInTotalImagePixelMatrix = region.x + 1, region.y + 1
    index = [region.y // TILE + 1, region.x // TILE + 1]
    content.DimensionIndexValues = [segment, *index] if with_segments else index
    item.FrameContentSequence, item.PlanePositionSlideSequence = [content], [place]
    if with_segments:
        identified = Dataset()
        identified.ReferencedSegmentNumber = segment
        item.SegmentIdentificationSequence = [identified]
    return item


def in_mm(head: Dataset, xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the positions of an image's points on the slide, [n, 2] of x, y in mm (PS3.3 C.7.6.2.1.1).

    Args:
        head: gives the position of its first pixel's centre, its orientation and its pixel size.
        xy: in its pixels, [n, 2]; the first pixel extends from 0 to 1.
    """
    origin = head.TotalPixelMatrixOriginSequence[0]
    corner = np.array([float(origin.XOffsetInSlideCoordinateSystem), float(origin.YOffsetInSlideCoordinateSystem)])
    axes = np.reshape([float(each) for each in head.ImageOrientationSlide], (2, 3))[:, :2]
    y_mm, x_mm = spacing_mm(head) or (0.0, 0.0)
    return np.asarray(corner + (xy - 0.5) * (x_mm, y_mm) @ axes)


def _place(x_mm: float, y_mm: float) -> Dataset:
    item = Dataset()
    item.XOffsetInSlideCoordinateSystem, item.YOffsetInSlideCoordinateSystem = f"{x_mm:.10g}", f"{y_mm:.10g}"
    item.ZOffsetInSlideCoordinateSystem = "0"
    return item


def save(
    path: Path, found: Dataset, element: tuple[int, str] | None = None, frames: Iterable[bytes] = (), size: int = 0
) -> None:
    """Write an object; after the header comes an element of `size` bytes, with its tag and type, frame by frame."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = found.SOPClassUID, found.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(uid("implementation", OURS))
    meta.ImplementationVersionName = OURS
    found.file_meta = meta
    dcmwrite(path, found, enforce_file_format=True)
    if element is None:
        return
    tag, kind = element
    with path.open("ab") as file:
        file.write(struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, kind.encode(), 0, size))
        for frame in frames:
            file.write(frame)


Read = Callable[[int, Region], "NDArray[Any]"]  # values of a level of the heatmap in a region


def sampled(job: Job, level: MapLevel, read: Read, region: Region) -> NDArray[Any]:
    """Return the values of a region of a level.

    A pixel takes the value of the heatmap's pixel that contains its centre, on the heatmap's coarsest level that is not
    coarser; if factors are equal, that is the very same pixel.
    """
    stride, shapes = job.slide.stride_px, job.slide.levels
    chosen = max((i for i in range(len(shapes)) if stride * 2**i <= min(level.factor) * 1.01), default=0)
    step, shape = stride * 2**chosen, shapes[chosen]
    y, x = (
        np.minimum(((np.arange(first, first + count) + 0.5) * factor / step).astype(int), most - 1)
        for first, count, factor, most in (
            (region.y, region.height, level.factor[0], shape[0]),
            (region.x, region.width, level.factor[1], shape[1]),
        )
    )
    wanted = Region(int(y[0]), int(x[0]), int(y[-1] - y[0]) + 1, int(x[-1] - x[0]) + 1)
    return read(chosen, wanted)[np.ix_(y - y[0], x - x[0])]


def explained_tiles(job: Job, level: MapLevel) -> list[Region]:
    """Return the tiles of a level in which anything was explained; the first, if nothing was."""
    every = tiles(*level.size, TILE)
    found = [t for t in every if (sampled(job, level, job.slide.read_coverage, t) & EXPLAINED).any()]
    return found or [every[0]]


def whole_tile(values: NDArray[Any]) -> NDArray[Any]:
    """Return a tile padded to its full size with zeros."""
    height, width = values.shape
    return np.pad(values, ((0, TILE - height), (0, TILE - width)))


def write(job: Job) -> list[Path]:
    """Write a folder for each chosen channel, with an instance for each level."""
    source = Source(job)
    return [_write(job, source, channel) for channel in job.drawn_channels]


def _write(job: Job, source: Source, channel: ChannelInfo) -> Path:
    path = job.path(f"{slug(channel)}.dicom-parametric-map")

    def read(level: int, region: Region) -> NDArray[np.float32]:
        return job.slide.read(channel, level, region)

    with job.atomic_path(path) as partial:
        partial.mkdir()
        for number, level in enumerate(source.levels(4)):
            found, written = parametric_map(job, source, channel, level, number + 1), explained_tiles(job, level)
            add_frames(found, [(tile, 1) for tile in written])
            frames = (whole_tile(sampled(job, level, read, tile)).astype("<f4").tobytes() for tile in written)
            save(partial / f"level-{number}.dcm", found, FLOAT_PIXELS, frames, len(written) * TILE**2 * 4)
    return path


def parametric_map(job: Job, source: Source, channel: ChannelInfo, level: MapLevel, instance: int) -> Dataset:
    """Return the header of a level of a channel's map (PS3.3 A.75.3)."""
    found = new_object(source, PARAMETRIC_MAP, "OT", channel.label, instance)
    add_tiled_image(found, source, job, level)
    found.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "QUANTITY"]
    found.BitsAllocated = 32
    found.ContentLabel = re.sub(r"[^A-Z0-9]+", "_", channel.method.upper())[:16]
    found.ContentDescription = long_string(f"{channel.label} of {job.slide.id}")
    found.ContentQualification, found.PixelPresentation = "RESEARCH", "MONOCHROME"
    found.AcquisitionContextSequence = []
    found.PresentationLUTShape, found.RecognizableVisualFeatures = "IDENTITY", "NO"
    if references := source.references():
        found.SourceImageSequence = references
    (shared,) = found.SharedFunctionalGroupsSequence
    kind, identity, shown = Dataset(), Dataset(), Dataset()
    kind.FrameType = found.ImageType
    identity.RescaleIntercept, identity.RescaleSlope, identity.RescaleType = "0", "1", "US"
    low, high = job.window(channel)
    shown.WindowCenter, shown.WindowWidth = f"{(low + high) / 2:.8g}", f"{high - low:.8g}"
    shared.ParametricMapFrameTypeSequence = [kind]
    shared.PixelValueTransformationSequence = [identity]
    shared.FrameVOILUTSequence = [shown]
    shared.RealWorldValueMappingSequence = [_mapping(channel)]
    return found


def _mapping(channel: ChannelInfo) -> Dataset:
    """Return the meaning of values: themselves, without a UCUM unit, from the least to the largest of the slide."""
    found, quantity = Dataset(), Dataset()
    found.LUTLabel, found.LUTExplanation = (
        long_string(channel.label, 16),
        long_string(f"{channel.label}, {channel.unit}"),
    )
    found.DoubleFloatRealWorldValueFirstValueMapped = float(channel.minimum)
    found.DoubleFloatRealWorldValueLastValueMapped = float(channel.maximum)
    found.RealWorldValueIntercept, found.RealWorldValueSlope = 0.0, 1.0
    found.MeasurementUnitsCodeSequence = [code("1", "UCUM", "no units")]
    quantity.ValueType = "CODE"
    quantity.ConceptNameCodeSequence = [code("246205007", "SCT", "Quantity")]
    quantity.ConceptCodeSequence = [own_code(channel.method)]
    found.QuantityDefinitionSequence = [quantity]
    return found


class Hot:
    """The hot pixels, tile by tile, without regions below the requested least area."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._traced: dict[str, float] = {}  # level-0 px of a pixel, by channel
        self._trees: dict[str, tuple[shapely.STRtree, shapely.STRtree]] = {}  # of kept regions, and of others
        for channel in job.drawn_channels if job.options.min_area else ():
            parts = regions_by_area(job, channel)
            self._traced[channel.label] = job.slide.stride_px * 2.0 ** parts[0].level
            kept, small = (shapely.STRtree(part.polygons) for part in parts)
            self._trees[channel.label] = kept, small

    def explained(self, level: MapLevel, tile: Region) -> NDArray[np.bool_]:
        """Return where a tile of a level was explained, bool [h, w]."""
        return np.asarray(sampled(self._job, level, self._job.slide.read_coverage, tile) & EXPLAINED > 0)

    def values(self, channel: ChannelInfo, level: MapLevel, tile: Region) -> NDArray[np.float32]:
        """Return a channel's values in a tile of a level, float32 [h, w]."""
        return sampled(self._job, level, lambda i, region: self._job.slide.read(channel, i, region), tile)

    def mask(self, channel: ChannelInfo, level: MapLevel, tile: Region) -> NDArray[np.bool_]:
        """Return where a tile of a level is hot, bool [h, w]."""
        found = self.explained(level, tile) & (self.values(channel, level, tile) >= self._job.threshold(channel))
        if channel.label in self._trees:
            self._leave_out(found, channel, level, tile)
        return found

    def _leave_out(self, found: NDArray[np.bool_], channel: ChannelInfo, level: MapLevel, tile: Region) -> None:
        """Clear the pixels of small regions; on levels coarser than the traced one, isolated ones."""
        (kept, small), (step_y, step_x) = self._trees[channel.label], level.factor
        y, x = np.nonzero(found)
        left, top = (x + tile.x) * step_x, (y + tile.y) * step_y
        is_exact = max(level.factor) <= self._traced[channel.label] * 1.01  # then each pixel lies in one region
        if is_exact:
            pixels = np.asarray(shapely.points(left + step_x / 2, top + step_y / 2))
        else:
            pixels = np.asarray(shapely.box(left, top, left + step_x, top + step_y))
        hit = np.unique(small.query(pixels, predicate="intersects")[0])
        if not is_exact:
            hit = np.delete(hit, np.unique(kept.query(pixels[hit], predicate="intersects")[0]))
        found[y[hit], x[hit]] = False


def write_segmentation(job: Job) -> list[Path]:
    """Write a folder with an instance per level: segment 1 is what was explained, then the channels' hot parts."""
    source, path, hot = Source(job), job.path("dicom-segmentation"), Hot(job)

    def mask(level: MapLevel, segment: int, tile: Region) -> NDArray[np.bool_]:
        is_first = segment == 1
        return hot.explained(level, tile) if is_first else hot.mask(job.drawn_channels[segment - 2], level, tile)

    with job.atomic_path(path) as partial:
        partial.mkdir()
        for number, level in enumerate(source.levels(1 / 8 * (1 + len(job.drawn_channels)))):
            found = segmentation(job, source, level, number + 1)
            frames = [
                (tile, segment)
                for segment in range(1, 2 + len(job.drawn_channels))
                for tile in tiles(*level.size, TILE)
                if mask(level, segment, tile).any()
            ] or [(tiles(*level.size, TILE)[0], 1)]
            add_frames(found, frames, with_segments=True)
            bits = (
                np.packbits(whole_tile(mask(level, segment, tile)), bitorder="little").tobytes()
                for tile, segment in frames
            )
            save(partial / f"level-{number}.dcm", found, PIXELS, bits, len(frames) * TILE**2 // 8)
    return [path]


def segmentation(job: Job, source: Source, level: MapLevel, instance: int) -> Dataset:
    """Return the header of a level of the segmentation (PS3.3 A.51.3)."""
    found = new_object(source, SEGMENTATION, "SEG", "hot regions", instance)
    add_segments(found, job, source, level, hot_segments(job))
    found.SegmentationType, found.SegmentsOverlap = "BINARY", "YES"
    found.BitsAllocated = found.BitsStored = 1
    found.HighBit = found.PixelRepresentation = 0
    found.ContentLabel, found.ContentDescription = "HOT_REGIONS", long_string(f"hot regions of {job.slide.id}")
    return found


def hot_segments(job: Job) -> list[Dataset]:
    """Return the segments: what was explained, then what is hot in each channel."""
    found = [segment(1, "explained", "where there are values", "808080")]
    for number, channel in enumerate(job.drawn_channels, 2):
        about = f"{channel.label} from {job.threshold(channel):g} on"
        found.append(segment(number, f"hot {channel.label}", about, channel.colour))
    return found


def add_segments(found: Dataset, job: Job, source: Source, level: MapLevel, segments: list[Dataset]) -> None:
    """Add what all kinds of segmentations have: the level's size and position, and their segments."""
    add_tiled_image(found, source, job, level)
    found.ImageType = ["DERIVED", "PRIMARY"]
    found.SegmentSequence = segments
    found.PatientOrientation = ""  # for a patient's frame of reference, which does not apply to a slide
    found.SharedFunctionalGroupsSequence[0].DerivationImageSequence = [_derivation(source)]


def _derivation(source: Source) -> Dataset:
    """Return the images from which a segmentation was made: the slide's levels; none if it is not DICOM."""
    found, images = Dataset(), source.references()
    for image in images:
        image.PurposeOfReferenceCodeSequence = [code("121322", "DCM", "Source image for image processing operation")]
    found.DerivationCodeSequence = [code("113076", "DCM", "Segmentation")]
    found.SourceImageSequence = images
    return found


def segment(number: int, label: str, about: str, colour: str) -> Dataset:
    """Return the description of a segment (PS3.3 C.8.20.4); a hot region is a place, not a finding."""
    found = Dataset()
    found.SegmentNumber, found.SegmentLabel, found.SegmentDescription = number, long_string(label), about[:1024]
    found.SegmentAlgorithmType, found.SegmentAlgorithmName = "AUTOMATIC", OURS
    found.SegmentationAlgorithmIdentificationSequence = [algorithm()]
    found.SegmentedPropertyCategoryCodeSequence = [code("309825002", "SCT", "Spatial and relational concept")]
    found.SegmentedPropertyTypeCodeSequence = [own_code(label.split()[0])]
    found.RecommendedDisplayCIELabValue = cielab(colour)
    return found


def algorithm() -> Dataset:
    """Return what made an object: this program (PS3.3 10.16)."""
    found = Dataset()
    found.AlgorithmFamilyCodeSequence = [code("123109", "DCM", "Artificial Intelligence")]
    found.AlgorithmName, found.AlgorithmVersion = OURS, __version__
    return found


def cielab(colour: str) -> list[int]:
    """Return a colour of 6 hex digits in DICOM's form: L* and a*, b* in 16 bits (PS3.3 C.10.7.1.1).

    >>> cielab("FFFFFF"), cielab("000000")
    ([65535, 32895, 32897], [0, 32896, 32896])
    """
    from skimage.color import rgb2lab

    lightness, a, b = rgb2lab(np.frombuffer(bytes.fromhex(colour), np.uint8)[None, None] / 255)[0, 0]
    scaled = (lightness * 65535 / 100, (a + 128) * 65535 / 255, (b + 128) * 65535 / 255)
    return [int(np.clip(round(float(each)), 0, 65535)) for each in scaled]
