"""Finding and reading files of annotations, by their ending."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from wsi_gradcam.errors import AnnotationError
from wsi_gradcam.tissue.annotations.areas import MOST_BYTES, Annotations
from wsi_gradcam.tissue.annotations.geojson import read_geojson
from wsi_gradcam.tissue.annotations.xml import read_xml

READERS: dict[str, Callable[[Path, bytes], Annotations]] = {
    ".geojson": read_geojson,
    ".json": read_geojson,
    ".xml": read_xml,
}
PICTURE = ".png"
ENDINGS = (PICTURE, *READERS)


def read_annotations(path: Path) -> Annotations:
    """The areas that were drawn on a slide: GeoJSON of QuPath, XML of ASAP or Aperio ImageScope.

    Raises:
        AnnotationError: no such file, another format, damaged, or without an area.
    """
    return parse(path, read_bytes(path))


def parse(path: Path, data: bytes) -> Annotations:
    """The areas in the file's bytes; errors as for `read_annotations`."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise AnnotationError(f"{path}: not a file of annotations; expected {' '.join(READERS)}")
    return reader(path, data)


def read_bytes(path: Path) -> bytes:
    """The file's content.

    Raises:
        AnnotationError: it cannot be read, or is larger than any that a person drew.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    if len(data) > MOST_BYTES:
        raise AnnotationError(
            f"{path}: larger than {MOST_BYTES >> 20} MiB, more than anybody draws; export annotations without the "
            "detected cells"
        )
    return data


def file_for(folder: Path, slide_id: str) -> Path:
    """The slide's file in a folder of masks: named as the slide, with or without its ending.

    Slides in folders have their masks in folders of the same name, or all in one.

    Raises:
        AnnotationError: there is none, or more than one.
    """
    slide = Path(slide_id)
    names = (slide, slide.with_suffix(""), Path(slide.name), Path(slide.stem))
    for name in names:
        found = [file for ending in ENDINGS if (file := folder / f"{name}{ending}").is_file()]
        if len(found) > 1:
            listed = ", ".join(file.name for file in found)
            raise AnnotationError(f"{folder}: {listed} are all masks of slide {slide_id}; expected one of them")
        if found:
            return found[0]
    raise AnnotationError(
        f"{folder}: no mask of slide {slide_id}; expected {slide.stem} with one of the endings {' '.join(ENDINGS)}"
    )
