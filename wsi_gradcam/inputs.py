"""From what a user names to slides with ids that never collide."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wsi_gradcam.errors import ConfigError, SlideNotFoundError
from wsi_gradcam.slide_list import read_list
from wsi_gradcam.slides import SUFFIXES, is_zarr
from wsi_gradcam.urls import is_url, name_of, parts_of, shown_url

# Tag (0020,000E), little endian, with its type (DICOM PS3.5 section 7.1.2); it stands before any pixels.
SERIES_INSTANCE_UID = b"\x20\x00\x0e\x00UI"
HEAD_BYTES = 1 << 16
# Folders that are slides, and one that is none: the heatmap of a result.
IMAGE_SUFFIX, OURS = ".ome.zarr", "heatmap.ome.zarr"
ZARR = ".zarr"

Mpp = tuple[float, float] | None


@dataclass(frozen=True)
class SlideEntry:
    """A slide of a run.

    Attributes:
        id: its path relative to the folder that was given, with forward slashes.
        path: where it is; of a URL, without what may be secret.
        mpp: (y, x) micrometres per level-0 pixel by a list, which replaces what the file says.
        url: the URL as it was given, where it has more than `path` shows. Not to be printed.
    """

    id: str
    path: str
    mpp: Mpp = None
    url: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        """What to open."""
        return self.url or self.path


@dataclass(frozen=True)
class _Found:
    """A slide before it has its id: where it is, and the parts of that; what it is called; `SlideEntry`'s others."""

    path: str
    parts: tuple[str, ...]
    name: str
    mpp: Mpp
    url: str = ""


def find_slides(paths: Sequence[str | os.PathLike[str]]) -> list[SlideEntry]:
    """The slides in `paths` (files, folders searched through, URLs, lists), sorted by id, each once.

    A list is a CSV file with a column `slide`, paths from the list's own folder, and if need be a column `mpp`, or
    `mpp_y` and `mpp_x`, which replaces what a slide's file says. A URL that ends in a slash is a folder, unless it is
    a Zarr image.

    A file's id is its name and a folder's slides are named from the folder; where that would give two slides one
    id, all are named from the folder that holds everything given.

    Raises:
        SlideNotFoundError: a path that does not exist.
        SlideAccessError: a URL of a folder that cannot be listed.
        ConfigError: nothing given, a folder without slides, or a list that is none.
    """
    if not paths:
        raise ConfigError("no slide given; expected slide files, folders, URLs, or lists (.csv)")
    found: dict[object, _Found] = {}
    for text in [os.fspath(path) for path in paths]:
        for key, slide in _remote(text) if is_url(text) else _local(Path(text)):
            known = found.setdefault(key, slide)
            if known.path == slide.path:  # what is said last of a slide holds
                found[key] = replace(known, mpp=slide.mpp)
    slides = list(found.values())
    names = [slide.name for slide in slides]
    if len(set(names)) < len(names):
        shared = len(_beginning([slide.parts[:-1] for slide in slides]))
        names = ["/".join(slide.parts[shared:]) for slide in slides]
    ids = set(names)
    if len(ids) < len(names):
        raise ConfigError("URLs that differ in dots and slashes alone; give each slide one way")
    for name in ids:
        if inner := next((parent.as_posix() for parent in Path(name).parents if parent.as_posix() in ids), None):
            raise ConfigError(f"slides {inner} and {name} would share a folder below --out; explain them apart")
    entries = [SlideEntry(name, s.path, s.mpp, s.url) for name, s in zip(names, slides, strict=True)]
    return sorted(entries, key=lambda entry: entry.id)


def _beginning(places: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that all places share, from the first on."""
    first, last = min(places), max(places)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _local(path: Path) -> Iterator[tuple[object, _Found]]:
    if not path.exists():
        raise SlideNotFoundError(f"{path}: does not exist, expected a slide file or a folder; check the path")
    for file, name, mpp in _named(path):
        if isinstance(file, str):
            yield _slide_at(file, name, mpp)
            continue
        # The folder resolved and the name as given: a link is a slide of its own, `a/../a` is not.
        place = file.parent.resolve() / file.name
        yield _slide_of(place), _Found(str(place), place.relative_to(place.anchor).parts, name, mpp)


def _remote(url: str) -> Iterator[tuple[object, _Found]]:
    """The slides that a URL stands for: one, or those below a folder."""
    if not url.endswith("/") or url.rstrip("/").endswith(ZARR):
        yield _slide_at(url, name_of(url), None)
        return
    from wsi_gradcam.slides.remote import is_zarr_at

    if is_zarr_at(url):
        yield _slide_at(url, name_of(url), None)
        return
    urls = _slides_below(url)
    if not urls:
        endings = " ".join(sorted(SUFFIXES))
        raise ConfigError(f"{shown_url(url)}: no slides in this folder; expected names ending in {endings}")
    root = len(parts_of(url))
    yield from (_slide_at(each, "/".join(parts_of(each)[root:]), None) for each in urls)


def _slide_at(url: str, name: str, mpp: Mpp) -> tuple[object, _Found]:
    shown = shown_url(url)
    return shown, _Found(shown, parts_of(url), name, mpp, "" if shown == url else url)


def _slides_below(url: str) -> list[str]:
    """URLs of the slides in a remote folder, as `_slides_in` finds them in a local one."""
    from wsi_gradcam.slides.remote import is_zarr_at, listed

    folders, files = listed(url)
    found = [file for file in files if Path(name_of(file)).suffix.lower() in SUFFIXES]
    for folder in folders:
        name = name_of(folder)
        if name.endswith(IMAGE_SUFFIX) and name != OURS and is_zarr_at(folder):
            found.append(folder.rstrip("/"))
        elif not name.endswith(ZARR):
            found += _slides_below(folder)
    return sorted(slide for slide in found if not name_of(slide).startswith("._"))


def _named(path: Path) -> Iterator[tuple[Path | str, str, Mpp]]:
    """File or URL, name and mpp of the slides that a path stands for."""
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
        folders[:] = [name for name in folders if not name.endswith(ZARR)]
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
