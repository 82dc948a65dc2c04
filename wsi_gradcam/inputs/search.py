"""Search of folders for slides, in a reproducible order and without silent omissions.

Results of wsi_gradcam are not slides. They are recognised by their content, since exports lie wherever users want them.

Patterns of paths have the wildcards `*`, `?` and `[...]` inside a part, and `**` for any folders.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePath

from wsi_gradcam.errors import ConfigError, DocumentError
from wsi_gradcam.io.documents import MAX_BYTES, read_json
from wsi_gradcam.slides import SUFFIXES, UNREAD
from wsi_gradcam.slides.base import OURS

WILD = frozenset("*?[")
ANY_FOLDERS = "**"


def has_wildcard(text: str) -> bool:
    """Return True for a text with wildcards.

    >>> has_wildcard("archive/**/*.svs"), has_wildcard("archive/a.svs")
    (True, False)
    """
    return not WILD.isdisjoint(text)


def parts_of_pattern(text: str) -> tuple[str, ...]:
    """Return the parts of a pattern, for `matches` and `may_contain`."""
    return PurePath(text).parts


def split_pattern(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder before the first wildcard, and the parts of the pattern from there on; none: not a pattern.

    A part that exists as it is written is not a wildcard.
    """
    root = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts):
        if has_wildcard(part) and not (root / part).exists():
            return root, parts[number:]
        root /= part
    return root, ()


def matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return True if the pattern's parts match a path's, or those of a folder that contains it.

    Case matters as on the file system.

    >>> [matches(["x", "a.svs"], pattern) for pattern in (["**", "*.svs"], ["*.svs"], ["x"])]
    [True, False, True]
    """
    if not pattern:
        return True
    if pattern[0] == ANY_FOLDERS:
        return any(matches(name[skipped:], pattern[1:]) for skipped in range(len(name) + 1))
    return bool(name) and fnmatch(name[0], pattern[0]) and matches(name[1:], pattern[1:])


def may_contain(folder: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return True if something in a folder can match the pattern, both from the same root.

    >>> may_contain(["x"], ["x*", "*.svs"]), may_contain(["y"], ["x*", "*.svs"]), may_contain(["y"], ["**", "*.svs"])
    (True, False, True)
    """
    for part, wanted in zip(folder, pattern, strict=False):
        if wanted == ANY_FOLDERS:
            return True
        if not fnmatch(part, wanted):
            return False
    return True


# Folders that are slides by their endings, and one that never is: the heatmap of a result.
IMAGE_SUFFIX, HEATMAP = ".ome.zarr", "heatmap.ome.zarr"
ZARR = ".zarr"
APPLE_DOUBLE = "._"  # prefix of files that macOS puts beside others
# Folders in which systems keep what was deleted, older states, and small pictures of files.
SYSTEM_FOLDERS = frozenset(
    {
        *("$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "found.000"),
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot", "__macosx"),
    }
)
NAMED = 3  # of what is left out


@dataclass
class Remarks:
    """What a search left out: results of wsi_gradcam, slides in unsupported formats, and folders by their names."""

    results: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def add(self, more: Remarks) -> None:
        """Add those of another search, each once."""
        for mine, others in ((self.results, more.results), (self.unread, more.unread), (self.folders, more.folders)):
            mine += [name for name in dict.fromkeys(others) if name not in set(mine)]

    def lines(self) -> list[str]:
        """Return a line for each kind."""
        found = []
        if self.results:
            found.append(f"left out, because they are results of wsi_gradcam and not slides: {_some(self.results)}")
        if self.unread:
            endings = Counter(map(ending_of, sorted(self.unread)))
            kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
            mends = " or ".join(dict.fromkeys(UNREAD[ending] for ending in sorted(endings)))
            found.append(
                f"left out, because their formats are not supported ({kinds}): {_some(self.unread)}; convert to "
                f"OME-TIFF or OME-Zarr with {mends}"
            )
        if self.folders:
            names = Counter(name.rpartition("/")[2] for name in self.folders)
            found.append(
                f"not searched, because they are hidden or system folders: {_some(sorted(names), len(self.folders))}"
            )
        return found


def _some(names: Sequence[str], number: int = 0) -> str:
    """Return the number of names, and the first of them."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{number or len(names):,} ({', '.join(names[:NAMED])}{more})"


def ending_of(name: str) -> str:
    """Return a name's ending in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - texts: there may be 100,000 of them


def find_in_folder(
    folder: str | os.PathLike[str],
    endings: frozenset[str] = SUFFIXES,
    pattern: Sequence[str] = (ANY_FOLDERS,),
    remarks: Remarks | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield path and name relative to `folder` of the slides in it, sorted by name within each folder.

    Only files that match the pattern, and folders that may contain a match, are examined. All folders in the paths are
    resolved. A folder to which links lead as well is searched once, by its name without a link if there is one. Broken
    links to files count as slides: they fail as such, with this cause.

    Results of wsi_gradcam are never slides, wherever they lie. Hidden and system folders are searched only if the
    pattern names them. `remarks` collects what is left out.

    Raises:
        ConfigError: a folder that cannot be read.
    """
    search = _Search(endings, pattern, Remarks() if remarks is None else remarks)
    seen: set[str] = set()
    direct, linked = [(os.path.realpath(folder), "")], deque[tuple[str, str]]()
    while direct or linked:
        place, below = direct.pop() if direct else linked.popleft()
        if place in seen:  # links may form circles
            continue
        seen.add(place)
        slides, folders, links = search.list_folder(place, below)
        yield from ((_joined(place, name), below + name) for name in slides)
        direct += [(_joined(place, name), f"{below}{name}/") for name in reversed(folders) if name not in links]
        linked += [(os.path.realpath(_joined(place, name)), f"{below}{name}/") for name in folders if name in links]


def _joined(place: str, name: str) -> str:
    # Strings, not paths, which take three times as long: there may be 100,000 of them.
    return os.path.join(place, name)  # noqa: PTH118


@dataclass
class _Search:
    """A search of folders.

    Attributes:
        runs: names of the folders in which runs keep pictures, which say nothing of who made them.
    """

    endings: frozenset[str]
    pattern: Sequence[str]
    remarks: Remarks
    runs: list[str] = field(default_factory=list)

    def list_folder(self, place: str, below: str) -> tuple[list[str], list[str], set[str]]:
        """Return the names of the slides and of the folders in a folder, and those folders that are links."""
        try:
            with os.scandir(place) as opened:
                entries = {entry.name: entry for entry in sorted(opened, key=lambda entry: entry.name)}
            if is_slide_result(entries.keys()) and os.path.isfile(_joined(place, PLAN)):  # noqa: PTH113
                self.remarks.results.append(below.rstrip("/") or place)
                return [], [], set()
            if is_run(entries.keys()):
                self.runs += [f"{below}{name}/" for name in KEPT_IN_RUNS]
                entries.pop(TABLE, None)
            folders = [name for name, entry in entries.items() if self._is_entered(entry, below, entries.keys())]
            slides = [name for name, entry in entries.items() if self._is_slide(entry, below)]
        except OSError as error:
            raise ConfigError(
                f"{error.filename or place}: cannot be read: {error.strerror}, so its slides would be missing; grant "
                "read permission, or give the other folders or a pattern that excludes it"
            ) from error
        return slides, folders, {name for name in folders if entries[name].is_symlink()}

    def _is_entered(self, entry: os.DirEntry[str], below: str, beside: Set[str]) -> bool:
        name, inner = entry.name, below.split("/")[:-1]
        if name.endswith(ZARR) or not _is_folder(entry) or not may_contain([*inner, name], self.pattern):
            return False
        if is_passed_over(name, inner, self.pattern):
            self.remarks.folders.append(below + name)
            return False
        if is_deep_zoom(name, beside):
            self.remarks.results.append(below + name)
            return False
        return True

    def _is_slide(self, entry: os.DirEntry[str], below: str) -> bool:
        name, ending = entry.name, ending_of(entry.name)
        if name.startswith(APPLE_DOUBLE) or not matches([*below.split("/")[:-1], name], self.pattern):
            return False
        if ending == ZARR and _is_folder(entry):
            return self._is_image(name, below, zarr_kind(partial(_read_within, entry.path)))
        if not (entry.is_file(follow_symlinks=False) or entry.is_symlink()) or _is_folder(entry):
            return False
        if ending in self.endings:
            of_run = ending == PNG and below.startswith(tuple(self.runs))
            ours = of_run or is_result(entry.path)
            self.remarks.results += [below + name] * ours
            return not ours
        self.remarks.unread += [below + name] * (ending in UNREAD)
        return False

    def _is_image(self, name: str, below: str, kind: str) -> bool:
        ours = kind == RESULT or (name == HEATMAP and kind != NO_ZARR)
        self.remarks.results += [below + name] * ours
        return not ours and is_image(name, kind)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def is_passed_over(name: str, inner: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return True for a hidden or system folder, unless the pattern names it.

    >>> [is_passed_over(name, [], pattern) for name, pattern in ((".x", ["*"]), (".x", [".*"]), ("@eaDir", ["**"]))]
    [True, False, True]
    """
    if not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS:
        return False
    named = pattern[: len(inner) + 1]
    return len(named) <= len(inner) or ANY_FOLDERS in named or named[-1][0] != name[0]


# What is known of results by the names in a folder: a slide's folder; a run's, with its table and folders of pictures
# (no slide's folder is called so); the tiles of a Deep Zoom picture.
PLAN, TABLE = "manifest/plan.json", "slides.csv"
KEPT_IN_RUNS = ("audit", "exports")
PNG, DICOM, TIFFS = ".png", ".dcm", (".tif", ".tiff")
TILES = "_files"


def is_slide_result(names: Set[str]) -> bool:
    """Return True for the names in a folder of one slide's results."""
    return "manifest" in names and not names.isdisjoint(("cams.zarr", HEATMAP, "tissue.png"))


def is_run(names: Set[str]) -> bool:
    """Return True for the names in the folder of a run."""
    return "run.yaml" in names and not names.isdisjoint((TABLE, "slides.jsonl"))


def is_deep_zoom(folder: str, beside: Set[str]) -> bool:
    """Return True for a folder of Deep Zoom tiles that an export has made, by the files beside it."""
    name = folder.removesuffix(TILES)
    return name != folder and f"{name}.dzi" in beside and f"{name}.json" in beside


RESULT, IMAGE, OTHER, NO_ZARR = "result", "image", "other", "no Zarr"
DICOM_MARK = b"\x02\x00\x13\x00SH\x0c\x00" + OURS.encode()  # the implementation, of an even length
PNG_MARK = b"tEXtSoftware\0" + OURS.encode()
LAYOUT = "bioformats2raw.layout"


def zarr_kind(read: Callable[[str], bytes | None]) -> str:
    """Return RESULT for the Zarr of a result, IMAGE for OME-Zarr images, OTHER, or NO_ZARR.

    Args:
        read: returns the content of a file in the folder, None where there is none.
    """
    data, old = read("zarr.json"), None
    if data is None and (old := read(".zgroup")) is None:
        return NO_ZARR
    try:
        document = read_json(data or read(".zattrs") or b"{}")
        attributes = document if old is not None else document.get("attributes", {})
        if OURS in attributes:
            return RESULT
        ome = attributes.get("ome", attributes)
        return IMAGE if "multiscales" in ome or LAYOUT in ome else OTHER
    except (DocumentError, AttributeError, TypeError):  # it may be anything
        return OTHER


def is_image(name: str, kind: str) -> bool:
    """Return True for a Zarr folder that is a slide: by its ending, so that it fails if it is none, or its content."""
    return kind == IMAGE or (kind != NO_ZARR and name.endswith(IMAGE_SUFFIX))


def _read_within(folder: str, name: str) -> bytes | None:
    path = Path(folder, name)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES)
    except OSError:  # it will fail as a slide, with this cause
        return b""


def is_result(path: str) -> bool:
    """Return True for a file or a Zarr folder that declares itself a result of wsi_gradcam: an export, a heatmap."""
    if os.path.isdir(path):  # noqa: PTH112
        return zarr_kind(partial(_read_within, path)) == RESULT
    ending = ending_of(path)
    if ending not in (PNG, DICOM, *TIFFS) or not os.path.isfile(path):  # noqa: PTH113 - nor what a link leads to
        return False
    from wsi_gradcam.slides.tiff_metadata import (
        first_texts,
        is_export,
    )  # not above: what parses TIFF takes time to load

    try:
        with Path(path).open("rb") as file:
            if ending in (PNG, DICOM):
                return (PNG_MARK if ending == PNG else DICOM_MARK) in file.read(HEAD_BYTES)
            return is_export(first_texts(file, os.fstat(file.fileno()).st_size))
    except OSError:  # it will fail as a slide, with this cause
        return False


HEAD_BYTES = 1 << 12


def check_no_result(place: str, where: str = "") -> None:
    """Raise a ConfigError for a result of wsi_gradcam that was given as a slide, by a list at `where`."""
    folder = os.path.dirname(place)  # noqa: PTH120
    if is_result(place) or (os.path.isfile(_joined(folder, PLAN)) and is_slide_result(set(os.listdir(folder)))):  # noqa: PTH113, PTH208
        raise result_error(f"{where}{place}", "a heatmap" if place.endswith(ZARR) else "an export or a picture")


def result_error(place: str, what: str) -> ConfigError:
    """Return the error for a result of wsi_gradcam that was given as a slide."""
    return ConfigError(f"{place}: {what} made by wsi_gradcam, not a slide; give the slide it was made from")
