"""From what a user names to slides with ids that never collide."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_gradcam.errors import ConfigError, SlideNotFoundError
from wsi_gradcam.slides import SUFFIXES

# Tag (0020,000E), little endian, with its type (DICOM PS3.5 section 7.1.2); it stands before any pixels.
SERIES_INSTANCE_UID = b"\x20\x00\x0e\x00UI"
HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class SlideEntry:
    """A slide of a run: its id is its path relative to the folder that was given, with forward slashes."""

    id: str
    path: str


def find_slides(paths: Sequence[str | os.PathLike[str]]) -> list[SlideEntry]:
    """The slides in `paths` (files, and folders searched through), sorted by id, each once.

    A file's id is its name and a folder's slides are named from the folder; where that would give two slides one
    id, all are named from the folder that holds everything given.

    Raises:
        SlideNotFoundError: a path that does not exist.
        ConfigError: nothing given, or a folder without slides.
    """
    if not paths:
        raise ConfigError("no slide given; expected slide files or folders")
    found: dict[Path, tuple[Path, str]] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise SlideNotFoundError(f"{path}: does not exist, expected a slide file or a folder; check the path")
        root = path if path.is_dir() else path.parent
        files = _slides_in(path) if path.is_dir() else [path]
        if not files:
            raise ConfigError(
                f"{path}: no slides in this folder; expected files ending in {' '.join(sorted(SUFFIXES))}"
            )
        for file in files:
            # The folder resolved and the name as given: a link is a slide of its own, `a/../a` is not.
            place = file.parent.resolve() / file.name
            found.setdefault(_slide_of(place), (place, file.relative_to(root).as_posix()))
    named = list(found.values())
    if len({name for _, name in named}) < len(named):
        common = Path(os.path.commonpath([place.parent for place, _ in named]))
        named = [(place, place.relative_to(common).as_posix()) for place, _ in named]
    ids = {name for _, name in named}
    for name in ids:
        if inner := next((parent.as_posix() for parent in Path(name).parents if parent.as_posix() in ids), None):
            raise ConfigError(f"slides {inner} and {name} would share a folder below --out; explain them apart")
    return sorted((SlideEntry(name, str(place)) for place, name in named), key=lambda s: s.id)


def _slides_in(folder: Path) -> list[Path]:
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # links may lead round in circles
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
    # macOS leaves a file that begins with ._ beside each slide.
    return sorted(f for f in found if f.is_file() and not f.name.startswith("._"))


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
