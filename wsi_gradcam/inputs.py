"""From what a user names to slides with ids that never collide."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_gradcam.errors import ConfigError, SlideNotFoundError
from wsi_gradcam.slide_list import read_list
from wsi_gradcam.slides import SUFFIXES, is_zarr

# Tag (0020,000E), little endian, with its type (DICOM PS3.5 section 7.1.2); it stands before any pixels.
SERIES_INSTANCE_UID = b"\x20\x00\x0e\x00UI"
HEAD_BYTES = 1 << 16
# Folders that are slides, and one that is none: the heatmap of a result.
IMAGE_SUFFIX, OURS = ".ome.zarr", "heatmap.ome.zarr"


@dataclass(frozen=True)
class SlideEntry:
    """A slide of a run.

    Attributes:
        id: its path relative to the folder that was given, with forward slashes.
        path: where it is.
        mpp: (y, x) micrometres per level-0 pixel by a list, which replaces what the file says.
    """

    id: str
    path: str
    mpp: tuple[float, float] | None = None


def find_slides(paths: Sequence[str | os.PathLike[str]]) -> list[SlideEntry]:
    """The slides in `paths` (files, folders searched through, lists), sorted by id, each once.

    A list is a CSV file with a column `slide`, paths from the list's own folder, and if need be a column `mpp`, or
    `mpp_y` and `mpp_x`, which replaces what a slide's file says.

    A file's id is its name and a folder's slides are named from the folder; where that would give two slides one
    id, all are named from the folder that holds everything given.

    Raises:
        SlideNotFoundError: a path that does not exist.
        ConfigError: nothing given, a folder without slides, or a list that is none.
    """
    if not paths:
        raise ConfigError("no slide given; expected slide files, folders, or lists (.csv)")
    found: dict[Path, tuple[Path, str]] = {}
    mpps: dict[Path, tuple[float, float] | None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise SlideNotFoundError(f"{path}: does not exist, expected a slide file or a folder; check the path")
        for file, name, mpp in _named(path):
            # The folder resolved and the name as given: a link is a slide of its own, `a/../a` is not.
            place = file.parent.resolve() / file.name
            found.setdefault(_slide_of(place), (place, name))
            mpps[place] = mpp
    named = list(found.values())
    if len({name for _, name in named}) < len(named):
        common = Path(os.path.commonpath([place.parent for place, _ in named]))
        named = [(place, place.relative_to(common).as_posix()) for place, _ in named]
    ids = {name for _, name in named}
    for name in ids:
        if inner := next((parent.as_posix() for parent in Path(name).parents if parent.as_posix() in ids), None):
            raise ConfigError(f"slides {inner} and {name} would share a folder below --out; explain them apart")
    return sorted((SlideEntry(name, str(place), mpps[place]) for place, name in named), key=lambda s: s.id)


def _named(path: Path) -> Iterator[tuple[Path, str, tuple[float, float] | None]]:
    """File, name and mpp of the slides that a path stands for."""
    if path.is_file() and path.suffix.lower() == ".csv":
        yield from read_list(path)
        return
    many = path.is_dir() and not is_zarr(path)
    root = path if many else path.parent
    files = _slides_in(path) if many else [path]
    if not files:
        raise ConfigError(f"{path}: no slides in this folder; expected files ending in {' '.join(sorted(SUFFIXES))}")
    yield from ((file, file.relative_to(root).as_posix(), None) for file in files)


def _slides_in(folder: Path) -> list[Path]:
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # links may lead round in circles
            folders.clear()
            continue
        seen.add(real)
        images = [name for name in folders if name.endswith(IMAGE_SUFFIX) and name != OURS]
        found += [Path(place, name) for name in images if is_zarr(Path(place, name))]
        folders[:] = [name for name in folders if not name.endswith(".zarr")]
        found += [Path(place, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
    # macOS leaves a file that begins with ._ beside each slide.
    return sorted(f for f in found if (f.is_file() or f.is_dir()) and not f.name.startswith("._"))


def _slide_of(file: Path) -> Path:
    """What is equal for the files of one slide: of DICOM, the folder and the series in it; else the file itself."""
    if file.suffix.lower() != ".dcm":
        return file
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:  # it will fail as a slide of its own, with this cause
        return file
    start = head.find(SERIES_INSTANCE_UID) + len(SERIES_INSTANCE_UID)
    if start < len(SERIES_INSTANCE_UID):
        return file.parent
    length = int.from_bytes(head[start : start + 2], "little")
    return file.parent / head[start + 2 : start + 2 + length].hex()
