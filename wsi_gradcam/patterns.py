"""Patterns with wildcards on paths: `*`, `?` and `[...]` inside a part, `**` for any folders."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePath

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
