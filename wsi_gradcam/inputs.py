"""From what a user names to slides with ids that never collide."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_gradcam.errors import ConfigError, SlideNotFoundError
from wsi_gradcam.slides import SUFFIXES


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
    found: dict[Path, str] = {}
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
            found.setdefault(file.absolute(), file.relative_to(root).as_posix())
    ids = list(found.values())
    if len(set(ids)) < len(ids):
        common = Path(os.path.commonpath([file.parent for file in found]))
        found = {file: file.relative_to(common).as_posix() for file in found}
    return sorted((SlideEntry(name, str(file)) for file, name in found.items()), key=lambda s: s.id)


def _slides_in(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    series: set[Path] = set()
    kept = []
    for file in files:
        if file.suffix.lower() == ".dcm":  # the files of one DICOM slide lie in one folder; any of them opens it
            if file.parent in series:
                continue
            series.add(file.parent)
        kept.append(file)
    return kept
