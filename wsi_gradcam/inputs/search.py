"""Search of folders for slides, in a reproducible order and without silent omissions.

Patterns of paths have the wildcards `*`, `?` and `[...]` inside a part, and `**` for any folders.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePath

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.slides import SUFFIXES, is_zarr

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


# Folders that are slides, and one that is not: the heatmap of a result.
IMAGE_SUFFIX, HEATMAP = ".ome.zarr", "heatmap.ome.zarr"
ZARR = ".zarr"
HIDDEN = "._"  # prefix of files that macOS puts beside others


def find_in_folder(
    folder: str | os.PathLike[str], endings: frozenset[str] = SUFFIXES, pattern: Sequence[str] = ("**",)
) -> Iterator[tuple[str, str]]:
    """Yield path and name relative to `folder` of the slides in it, sorted by name within each folder.

    Only folders that may contain a match of the pattern are searched. All folders in the paths are resolved. A folder
    that links lead to as well is searched once; it has its name without a link, where there is one. Broken links to
    files are slides too: they fail as such, with this cause.

    Raises:
        ConfigError: a folder that cannot be read.
    """
    seen: set[str] = set()
    direct, linked = [(os.path.realpath(folder), "")], deque[tuple[str, str]]()
    while direct or linked:
        place, below = direct.pop() if direct else linked.popleft()
        if place in seen:  # links may form circles
            continue
        seen.add(place)
        slides, folders, links = _list_folder(place, endings)
        yield from ((_joined(place, name), below + name) for name in slides)
        inner = below.split("/")[:-1]
        entered = [name for name in folders if may_contain([*inner, name], pattern)]
        direct += [(_joined(place, name), f"{below}{name}/") for name in reversed(entered) if name not in links]
        linked += [(os.path.realpath(_joined(place, name)), f"{below}{name}/") for name in entered if name in links]


def _joined(place: str, name: str) -> str:
    # Strings, not paths, which take three times as long: there may be 100,000 of them.
    return os.path.join(place, name)  # noqa: PTH118


def _list_folder(place: str, endings: frozenset[str]) -> tuple[list[str], list[str], set[str]]:
    """Return the names of the slides and of the folders in a folder, and those folders that are links."""
    slides, folders, links = [], [], set()
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                is_folder = _is_folder(entry)
                if is_folder and not entry.name.endswith(ZARR):
                    folders.append(entry.name)
                    links.update([entry.name] if entry.is_symlink() else [])
                elif not entry.name.startswith(HIDDEN) and _is_slide(entry, is_folder, endings):
                    slides.append(entry.name)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or place}: cannot be read: {error.strerror}, and its slides would be left out; let it be "
            "read, or give the other folders, or a pattern that leaves it out"
        ) from error
    return sorted(slides), sorted(folders), links


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _is_slide(entry: os.DirEntry[str], is_folder: bool, endings: frozenset[str]) -> bool:
    if is_folder:
        return entry.name.endswith(IMAGE_SUFFIX) and entry.name != HEATMAP and is_zarr(Path(entry.path))
    has_ending = os.path.splitext(entry.name)[1].lower() in endings  # noqa: PTH122 - a text too
    return has_ending and (entry.is_file(follow_symlinks=False) or entry.is_symlink())
