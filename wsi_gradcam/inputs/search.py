"""The slides below a folder: all, in an order that is always the same, or an error that names what hides some.

Patterns with wildcards on paths: `*`, `?` and `[...]` inside a part, `**` for any folders.
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
    """Whether a text may be a pattern.

    >>> has_wildcard("archive/**/*.svs"), has_wildcard("archive/a.svs")
    (True, False)
    """
    return not WILD.isdisjoint(text)


def parts_of_pattern(text: str) -> tuple[str, ...]:
    """The parts of a pattern, for `matches` and `may_hold`."""
    return PurePath(text).parts


def split_pattern(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder before the first wildcard, and the parts of the pattern from there on; none: it is no pattern.

    What exists as it is written is no wildcard.
    """
    root = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts):
        if has_wildcard(part) and not (root / part).exists():
            return root, parts[number:]
        root /= part
    return root, ()


def matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the pattern's parts match a path's, or a folder that it lies in; case as the file system has it.

    >>> [matches(["x", "a.svs"], pattern) for pattern in (["**", "*.svs"], ["*.svs"], ["x"])]
    [True, False, True]
    """
    if not pattern:
        return True
    if pattern[0] == ANY_FOLDERS:
        return any(matches(name[skipped:], pattern[1:]) for skipped in range(len(name) + 1))
    return bool(name) and fnmatch(name[0], pattern[0]) and matches(name[1:], pattern[1:])


def may_hold(folder: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether something below a folder can match the pattern, both from the same root: others need no search.

    >>> may_hold(["x"], ["x*", "*.svs"]), may_hold(["y"], ["x*", "*.svs"]), may_hold(["y"], ["**", "*.svs"])
    (True, False, True)
    """
    for part, wanted in zip(folder, pattern, strict=False):
        if wanted == ANY_FOLDERS:
            return True
        if not fnmatch(part, wanted):
            return False
    return True


# Folders that are slides, and one that is none: the heatmap of a result.
IMAGE_SUFFIX, OURS = ".ome.zarr", "heatmap.ome.zarr"
ZARR = ".zarr"
HIDDEN = "._"  # how names begin that macOS gives to files beside each slide


def slides_in(
    folder: str | os.PathLike[str], endings: frozenset[str] = SUFFIXES, pattern: Sequence[str] = ("**",)
) -> Iterator[tuple[str, str]]:
    """Path and name, from `folder` on, of what ends so below it, in the order of the names within each folder.

    Searched is what may hold what matches the pattern. Of the paths all folders are resolved. A folder that links lead
    to as well is searched once; it has the name without a link, where there is one. Of links to files, those that lead
    nowhere are slides too: they fail as such, with this cause.

    Raises:
        ConfigError: a folder that cannot be read.
    """
    seen: set[str] = set()
    direct, linked = [(os.path.realpath(folder), "")], deque[tuple[str, str]]()
    while direct or linked:
        place, below = direct.pop() if direct else linked.popleft()
        if place in seen:  # links may lead round in circles
            continue
        seen.add(place)
        slides, folders, links = _sorted_out(place, endings)
        yield from ((_joined(place, name), below + name) for name in slides)
        inner = below.split("/")[:-1]
        entered = [name for name in folders if may_hold([*inner, name], pattern)]
        direct += [(_joined(place, name), f"{below}{name}/") for name in reversed(entered) if name not in links]
        linked += [(os.path.realpath(_joined(place, name)), f"{below}{name}/") for name in entered if name in links]


def _joined(place: str, name: str) -> str:
    # Texts, not paths, which take three times as long: there may be 100,000 of them.
    return os.path.join(place, name)  # noqa: PTH118


def _sorted_out(place: str, endings: frozenset[str]) -> tuple[list[str], list[str], set[str]]:
    """Names of the slides and of the folders in a folder, and which of them all are links."""
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
        return entry.name.endswith(IMAGE_SUFFIX) and entry.name != OURS and is_zarr(Path(entry.path))
    ends_so = os.path.splitext(entry.name)[1].lower() in endings  # noqa: PTH122 - a text too
    return ends_so and (entry.is_file(follow_symlinks=False) or entry.is_symlink())
