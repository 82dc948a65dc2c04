"""Regions of slides to be explained: files of annotations and PNG masks, found, read and turned into masks."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wsi_gradcam.errors import AnnotationError, ConfigError
from wsi_gradcam.tissue.annotations.areas import MAX_BYTES, Annotations, rasterise
from wsi_gradcam.tissue.annotations.formats import read_geojson, read_xml

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.run.settings import Settings

READERS: dict[str, Callable[[Path, bytes], Annotations]] = {
    ".geojson": read_geojson,
    ".json": read_geojson,
    ".xml": read_xml,
}
PICTURE = ".png"
ENDINGS = (PICTURE, *READERS)
SIGNATURE = b"\x89PNG\r\n\x1a\n"
# 8,000 x 8,000: a slide of 128,000 px at a sixteenth. Pillow itself warns of bombs from 89 million on.
MAX_MASK_PX = 64_000_000


def read_annotations(path: Path) -> Annotations:
    """Return the areas that were drawn on a slide: GeoJSON of QuPath, XML of ASAP or Aperio ImageScope.

    Raises:
        AnnotationError: no such file, another format, damaged, or without an area.
    """
    return parse(path, read_bytes(path))


def parse(path: Path, data: bytes) -> Annotations:
    """Return the areas in the file's bytes; errors as for `read_annotations`."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise AnnotationError(f"{path}: not a file of annotations; expected {' '.join(READERS)}")
    return reader(path, data)


def read_bytes(path: Path) -> bytes:
    """Return the file's content.

    Raises:
        AnnotationError: it cannot be read, or is larger than any that a person drew.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    if len(data) > MAX_BYTES:
        raise AnnotationError(
            f"{path}: larger than {MAX_BYTES >> 20} MiB, more than anybody draws; export annotations without the "
            "detected cells"
        )
    return data


def mask_file(folder: Path, slide_id: str) -> Path:
    """Return the slide's file in a folder of masks: named as the slide, with or without its ending.

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


def read_png_mask(path: Path, data: bytes) -> NDArray[np.bool_]:
    """Return the mask in a PNG, bool [h, w]: pixels of any colour but black (of a palette, any number but 0).

    Wholly transparent pixels are out.

    Raises:
        AnnotationError: not a PNG, damaged, or too large.
    """
    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 24:
        raise AnnotationError(f"{path}: not a PNG; expected a mask as PNG that covers the whole slide")
    width, height = struct.unpack(">II", data[16:24])
    if width * height > MAX_MASK_PX:
        raise AnnotationError(
            f"{path}: {height} x {width} px, expected at most {MAX_MASK_PX:,} px; a mask of a sixteenth of the slide "
            "is as fine as it is used"
        )
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return _not_black(image)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise AnnotationError(f"{path}: damaged: {' '.join(str(error).split())}; write the mask again") from error


def _not_black(image: Image.Image) -> NDArray[np.bool_]:
    """Return the pixels that are not black, by strips: all channels at once would be four times the mask."""
    image.load()
    found = np.zeros((image.height, image.width), np.bool_)
    for top in range(0, image.height, 256):
        strip = np.asarray(image.crop((0, top, image.width, min(top + 256, image.height))))
        if image.mode in ("LA", "RGBA"):
            strip = strip[..., :-1] * (strip[..., -1:] > 0)
        found[top : top + 256] = strip.any(axis=2) if strip.ndim == 3 else strip > 0
    return found


def resize_mask(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask at another size: a pixel is in where at least half of its area is."""
    gray = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
    return np.asarray(gray.resize((shape[1], shape[0]), Image.Resampling.BOX)) > 127


@dataclass(frozen=True)
class Regions:
    """A slide's mask file, read but not yet parsed.

    Attributes:
        path: of the file.
        data: its content.
        include: names of the classes that are in; none: all that are not excluded.
        exclude: names of the classes that are out.
        shared: True for a file of a folder, where not every class is on every slide.
    """

    path: Path
    data: bytes
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    shared: bool = False

    @property
    def digest(self) -> str:
        """sha256 of the content."""
        return hashlib.sha256(self.data).hexdigest()

    def mask(self, slide_px: tuple[int, int], shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return what is to be explained, bool [h, w] over the whole slide of `slide_px` (height, width).

        Included classes without what excluded ones cover. Where only classes to exclude were drawn, it is the rest
        of the slide.

        Raises:
            AnnotationError: the file cannot be understood, or a class is not in it.
        """
        if self.path.suffix.lower() == PICTURE:
            if self.include or self.exclude:
                raise AnnotationError(f"{self.path}: a picture has no classes; leave --include and --exclude out")
            return resize_mask(read_png_mask(self.path, self.data), shape)
        found = parse(self.path, self.data)
        self._check(found)
        wanted = set(self.include or found.names) - set(self.exclude)
        unwanted = [area for area in found.areas if area.name in self.exclude]
        areas = [area for area in found.areas if area.name in wanted]
        whole = not areas and not self.include
        mask = np.ones(shape, np.bool_) if whole else rasterise(areas, slide_px, shape, str(self.path))
        return mask & ~rasterise(unwanted, slide_px, shape, str(self.path)) if unwanted else mask

    def _check(self, found: Annotations) -> None:
        """Refuse unknown classes: a misspelt one would be left out, or explained, without a warning."""
        missing = sorted({*self.include, *self.exclude} - set(found.names))
        if self.shared:
            missing = [] if not self.include or set(self.include) & set(found.names) else sorted(self.include)
        if missing:
            listed = ", ".join(repr(name) for name in found.names)
            raise AnnotationError(f"{self.path}: no annotation is called {missing[0]!r}; there are {listed}")


def read_regions(
    mask: Path | None, slide_id: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> Regions | None:
    """Return the regions of a slide to be explained; None without a mask: all of it.

    Args:
        mask: a file, or a folder with a file for each slide.
        slide_id: of the slide, its path relative to the archive.

    Raises:
        AnnotationError: there is no such file, or it cannot be read.
    """
    if mask is None:
        return None
    shared = mask.is_dir()
    path = mask_file(mask, slide_id) if shared else mask
    return Regions(path, read_bytes(path), include, exclude, shared)


def entry_regions(entry: SlideEntry, settings: Settings) -> Regions | None:
    """Return the regions of a slide of a run: by its own mask, which a list names, else by the settings'.

    Raises:
        AnnotationError: there is no such file, or it cannot be read.
    """
    if not entry.mask:
        return read_regions(settings.mask, entry.id, settings.include, settings.exclude)
    path = Path(entry.mask)
    return Regions(path, read_bytes(path), settings.include, settings.exclude, shared=True)


def check_masks(entries: Sequence[SlideEntry], settings: Settings) -> None:
    """Refuse, before any work, masks that fit no slide; errors as of `check_mask`."""
    without = sum(not entry.mask for entry in entries)
    if settings.mask is not None or without == len(entries):
        check_mask(settings.mask, settings.include, settings.exclude, without)


def check_mask(mask: Path | None, include: Sequence[str], exclude: Sequence[str], slides: int) -> None:
    """Refuse, before any work, a mask that fits no slide.

    Raises:
        ConfigError: classes without a mask, a mask that does not exist, or one file for several slides.
    """
    if mask is None:
        if include or exclude:
            raise ConfigError("include and exclude name classes of a mask; give the file with --mask")
        return
    if not mask.exists():
        raise ConfigError(f"{mask}: does not exist, expected a file or a folder for --mask; check the path")
    if slides > 1 and not mask.is_dir():
        raise ConfigError(
            f"{mask}: one mask for {slides} slides; give a folder that holds a file for each, named as the slide"
        )
