"""The facts about a slide in DICOM's terms: whose it is, where its pixels are, and which levels it has.

If the slide itself is DICOM, patient, study, specimen and frame of reference are copied from it, and its levels are
matched: viewers lay a map only over a level of the same size (ImagingDataCommons/slim#321). Otherwise the user gives
them; what is not given is empty, as in DICOM for the unknown (type 2).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from wsi_gradcam.errors import ConfigError, DocumentError, ResultError
from wsi_gradcam.geometry import ceil_div
from wsi_gradcam.io.documents import read_yaml
from wsi_gradcam.io.local import read_file
from wsi_gradcam.io.urls import is_url
from wsi_gradcam.results.manifest import DONE
from wsi_gradcam.slides.openslide_tiles import MAX_FRAMES_BYTES, Bounded

if TYPE_CHECKING:
    from wsi_gradcam.export.job import Job
    from wsi_gradcam.results.slide import SlideResult

TILE = 512
MAX_ELEMENT_BYTES = (1 << 32) - 2  # header bytes of one element (PS3.5 7.1.2)
MAX_REPEATED_PX = 1 << 26  # pixels of a level of the slide that is finer than the heatmap
SLIDE_ENDINGS = (".dcm", ".dicom")

# Attributes that a patient, a study and a specimen have in all of their objects (PS3.3 C.7.1.1, C.7.2.1, C.7.6.22).
# Those of type 2 are always present, empty if they are not known.
UNKNOWN = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)
TEXTS = (
    *UNKNOWN,
    "StudyInstanceUID",
    "StudyDescription",
    "IssuerOfPatientID",
    "PatientAge",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "ContainerIdentifier",
    "FrameOfReferenceUID",
)
SEQUENCES = (
    "IssuerOfPatientIDQualifiersSequence",
    "OtherPatientIDsSequence",
    "DeidentificationMethodCodeSequence",
    "IssuerOfAccessionNumberSequence",
    "IssuerOfTheContainerIdentifierSequence",
    "ContainerTypeCodeSequence",
    "ContainerComponentSequence",
    "SpecimenDescriptionSequence",
)
GIVEN = (*TEXTS, "SpecimenIdentifier", "SpecimenUID")  # what `--dicom-attributes` may contain
GEOMETRY = (
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "ImageType",
    "PositionReferenceIndicator",
    "ImageOrientationSlide",
    "TotalPixelMatrixOriginSequence",
    "TotalPixelMatrixRows",
    "TotalPixelMatrixColumns",
    "SharedFunctionalGroupsSequence",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)

Given = Mapping[str, Any]


def read_attributes(path: Path) -> dict[str, Any]:
    """Return the content of an attributes file: YAML or JSON of DICOM keywords, and of `slides` with their own.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        found = read_yaml(read_file(path))
    except (OSError, DocumentError) as error:
        raise ConfigError(f"{path}: cannot be read as attributes of DICOM: {error}") from error
    return check_attributes(found, str(path))


def check_attributes(given: Any, where: str) -> dict[str, Any]:
    """Return DICOM attributes by keyword, those of individual slides under `slides`, by their ids.

    Raises:
        ConfigError: an unknown keyword, or a value that DICOM does not allow.
    """
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: expected keywords of DICOM with their values, such as PatientID: A1")
    slides = given.get("slides", {})
    if not isinstance(slides, dict):
        raise ConfigError(f"{where}: slides: expected ids of slides, each with keywords of DICOM")
    shared = {name: value for name, value in given.items() if name != "slides"}
    of_slides = {name: _checked(values, f"{where}: {name}") for name, values in slides.items()}
    return _checked(shared, where) | ({"slides": of_slides} if slides else {})


def _checked(values: Any, where: str) -> dict[str, str]:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected keywords of DICOM with their values, such as PatientID: A1")
    for name, value in values.items():
        if name not in GIVEN:
            raise ConfigError(f"{where}: {name!r} is not taken; expected {', '.join(GIVEN)}")
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {name} is {value!r}; expected text, in quotation marks")
        try:
            DataElement(name, dictionary_VR(name), value, validation_mode=pydicom.config.RAISE)
        except ValueError as error:
            raise ConfigError(f"{where}: {name} is {value!r}, which DICOM does not take: {error}") from error
    return dict(values)


def uid(*parts: object) -> str:
    """Return the identifier that belongs to these parts, always the same (2.25., PS3.5 B.2).

    >>> uid("a") == uid("a") != uid("b"), len(uid("a")) <= 64
    (True, True)
    """
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, ' '.join(map(str, parts))).int}"


@dataclass(frozen=True)
class MapLevel:
    """A level for which an instance is made.

    Attributes:
        size: (height, width) in its pixels.
        factor: (y, x) level-0 px of the slide per pixel.
        head: header of the slide's own level that it matches, as far as it is copied; None for other slides.
    """

    size: tuple[int, int]
    factor: tuple[float, float]
    head: Dataset | None = None


class Source:
    """The facts about a slide in DICOM's terms: from the slide itself, else from what was given.

    Attributes:
        heads: headers of the slide's levels, finest first; none if it is not DICOM.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.heads = _heads(job.slide)
        given = job.options.dicom_attributes
        mine = {**given, **given.get("slides", {}).get(job.slide.id, {})}
        self._given: dict[str, str] = {name: value for name, value in mine.items() if name != "slides"}

    @cached_property
    def about(self) -> Dataset:
        """Patient, study, specimen and frame of reference.

        Raises:
            ConfigError: the slide contradicts what was given.
        """
        slide, found = self._job.slide, Dataset()
        if self.heads:
            for name in (*TEXTS, *SEQUENCES):
                if name in self.heads[0]:
                    found.add(self.heads[0][name])  # as it is, valid or not
        for name, value in self._given.items():
            if name in TEXTS:
                _give(found, name, value, slide.id)
        for name in UNKNOWN:
            if name not in found:
                setattr(found, name, "")
        digest = slide.plan.slide_digest
        found.StudyInstanceUID = found.get("StudyInstanceUID") or uid("study", digest)
        found.FrameOfReferenceUID = found.get("FrameOfReferenceUID") or uid("frame of reference", digest)
        found.PositionReferenceIndicator = "SLIDE_CORNER"
        self._add_specimen(found)
        found.SpecificCharacterSet = "ISO_IR 192"
        return found

    def _add_specimen(self, found: Dataset) -> None:
        """Complete the specimen module, whose identifiers are required: by default, the slide's name."""
        name = long_string(self._job.slide.id)
        found.ContainerIdentifier = found.get("ContainerIdentifier") or name
        for empty in ("IssuerOfTheContainerIdentifierSequence", "ContainerTypeCodeSequence"):
            if empty not in found:
                setattr(found, empty, [])
        if not found.get("SpecimenDescriptionSequence"):
            specimen = Dataset()
            specimen.SpecimenIdentifier = self._given.get("SpecimenIdentifier", found.ContainerIdentifier)
            specimen.SpecimenUID = self._given.get("SpecimenUID") or uid("specimen", self._job.slide.plan.slide_digest)
            found.SpecimenDescriptionSequence = [specimen]
        for specimen in found.SpecimenDescriptionSequence:
            for empty in ("IssuerOfTheSpecimenIdentifierSequence", "SpecimenPreparationSequence"):
                if empty not in specimen:
                    setattr(specimen, empty, [])

    @cached_property
    def digest(self) -> str:
        """The digest from which the identifiers of all objects are made, together with their own names."""
        return f"{self._job.digest} {self.about.to_json()}"

    @cached_property
    def finished(self) -> datetime:
        """The time at which the slide's heatmap was finished."""
        place = self._job.slide.folder.manifest / DONE
        return datetime.fromtimestamp(int(place.modified()), UTC)

    def levels(self, bytes_per_px: float) -> list[MapLevel]:
        """Return the levels for which instances are made, finest first; see `matched_levels`."""
        slide = self._job.slide
        own = [MapLevel(size, (slide.stride_px * 2.0**i,) * 2) for i, size in enumerate(slide.levels)]
        found = matched_levels(self.heads, slide.stride_px, own)
        fitting = [level for level in found if _bytes(level, bytes_per_px) <= MAX_ELEMENT_BYTES]
        if not fitting:
            raise ResultError(f"{slide.id}: no level of the heatmap fits into an object of DICOM (4 GiB)")
        return fitting

    def references(self) -> list[Dataset]:
        """Return references to the slide's files (PS3.3, 10.3); none if it is not DICOM."""
        return [_reference(head) for head in self.heads]


def _give(found: Dataset, name: str, value: str, slide_id: str) -> None:
    """Set an attribute that was given, unless the slide has another value."""
    known = str(found.get(name) or "")
    if known and known != value:
        raise ConfigError(
            f"{slide_id}: its {name} is {known!r}, but {value!r} is given; leave it out of --dicom-attributes, or "
            "correct it there"
        )
    setattr(found, name, value)


def _reference(head: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = head.SOPClassUID, head.SOPInstanceUID
    return item


def _bytes(level: MapLevel, bytes_per_px: float) -> float:
    return ceil_div(level.size[0], TILE) * ceil_div(level.size[1], TILE) * TILE**2 * bytes_per_px


def matched_levels(heads: list[Dataset], stride_px: int, own: list[MapLevel]) -> list[MapLevel]:
    """Return levels with the sizes and factors of the slide's levels that are at least as coarse as the heatmap.

    If the slide has none with the heatmap's own factor, its next finer level is used too, with values repeated, so that
    none is lost; if that would be too large, the heatmap's own size is used. Other slides have the heatmap's levels.
    """
    found = [_matched(heads[0], head) for head in heads]
    if not found:
        return own
    finer = [level for level in found if max(level.factor) <= stride_px * 1.01]
    coarser = found[len(finer) :]
    first = finer[-1] if finer else own[0]
    is_exact = max(first.factor) > stride_px / 1.01
    if not is_exact and first.size[0] * first.size[1] > MAX_REPEATED_PX:
        first = own[0]
    return [first, *coarser]


def _matched(first: Dataset, head: Dataset) -> MapLevel:
    y, x = (
        float(mm) / float(finest) if mm and finest else 0.0
        for mm, finest in zip(spacing_mm(head) or (0, 0), spacing_mm(first) or (0, 0), strict=True)
    )
    size = int(head.TotalPixelMatrixRows), int(head.TotalPixelMatrixColumns)
    by_size = first.TotalPixelMatrixRows / size[0], first.TotalPixelMatrixColumns / size[1]
    return MapLevel(size, (y or by_size[0], x or by_size[1]), head)


def spacing_mm(head: Dataset) -> tuple[float, float] | None:
    """Return (y, x) millimetres per pixel from the header of a slide's level."""
    with suppress(AttributeError, IndexError, TypeError, ValueError):
        y, x = head.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
        return float(y), float(x)
    return None


def _heads(slide: SlideResult) -> list[Dataset]:
    """Return the headers of a DICOM slide's levels, finest first, without what they have frame by frame.

    Raises:
        SlideError: it is DICOM, but not the file that was explained.
        ResultError: it has a DICOM name, but no longer exists.
    """
    path = Path(slide.path)
    if not slide.path or is_url(slide.path):
        return []
    if not path.is_file():
        if path.suffix.lower() in SLIDE_ENDINGS:
            raise ResultError(
                f"{slide.id}: {path} is gone, which says whose slide it is; put it back, so that patient, study and "
                "frame of reference can be copied"
            )
        return []
    slide.check_path()
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return []
    slide.open_slide().close()  # checks that it is the slide, and that it is not nested too deeply
    found: dict[tuple[int, int], Any] = {}
    series = _head(path).SeriesInstanceUID
    for other in sorted(path.parent.iterdir()):
        with suppress(Exception):  # other files of the folder may be anything
            head = _head(other)
            if head.SeriesInstanceUID == series and "VOLUME" in head.ImageType[2:3]:
                found.setdefault((head.TotalPixelMatrixRows, head.TotalPixelMatrixColumns), head)
    return [found[size] for size in sorted(found, reverse=True)]


def _head(path: Path) -> Any:
    with Bounded(path, MAX_FRAMES_BYTES) as stream:
        names = [*TEXTS, *SEQUENCES, *GEOMETRY]
        head = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(names))
    head.decode()
    return head


def long_string(text: str, most: int = 64) -> str:
    r"""Return text in the form of DICOM's short values: no control characters or backslashes, limited in length.

    >>> long_string("a\\b\n" + "c" * 100, 8)
    'a_b_cccc'
    """
    return re.sub(r"[\x00-\x1f\x7f\\]", "_", text.encode("utf-8", "replace").decode()).strip()[:most]
