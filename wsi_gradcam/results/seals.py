"""Seals: the sha256 that a file of text carries of itself, and that a listing has of the files in a folder.

A seal is taken over all bytes of the file, with zeros where its own digits stand. It tells damage and slips of the
hand; whoever means to forge a result can forge its seals too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from wsi_gradcam.io.documents import read_json

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath

KEY = "sha256_of_the_rest"
BLANK = "0" * 64
COMMENT = f"<!-- {KEY}: {BLANK} -->\n"  # of HTML
READ_BYTES = 16 << 20
LISTING = "files.json"
THREADS = 8
NAMED = 5  # files that are too many
# As JSON, YAML and HTML write it; what users name can only stand within quotes, or behind it.
_SEAL = re.compile(rf"""(?:"{KEY}": "|\A{KEY}: '|\A<!-- {KEY}: )([0-9a-f]{{64}})(?:["']| -->)""".encode())
_HALVES = (b"sha256_of", b"_the_rest")  # a flipped byte leaves one of them


ACCOUNT = ("status.json", "run.html", "claim.json")  # in which a run tells of itself, beside its log


def is_account(name: str) -> bool:
    """Return whether a file tells of the run, and is no result.

    >>> is_account("log/1.jsonl"), is_account("a.tif/run.html")
    (True, False)
    """
    return name in ACCOUNT or name.startswith("log/")


class Seal(StrEnum):
    """The state of a file's seal; older versions made files without one."""

    HOLDS = "holds"
    BROKEN = "broken"
    MISSING = "missing"


def sealed(data: bytes) -> bytes:
    """Return a text that has `KEY` with the value `BLANK`, with its seal in place of that."""
    found = _SEAL.search(data)
    assert found is not None, "nowhere to put a seal"
    return data[: found.start(1)] + hashlib.sha256(data).hexdigest().encode() + data[found.end(1) :]


def sealed_json(values: Mapping[str, Any], indent: int | None = None, sort_keys: bool = False) -> bytes:
    """Return values as JSON with a seal."""
    return sealed(json.dumps({KEY: BLANK, **values}, indent=indent, sort_keys=sort_keys).encode())


def seal_of(data: bytes) -> Seal:
    """Return the state of a text's seal."""
    found = _SEAL.search(data)
    if found is None:
        return Seal.BROKEN if any(half in data for half in _HALVES) else Seal.MISSING
    blank = data[: found.start(1)] + BLANK.encode() + data[found.end(1) :]
    return Seal.HOLDS if hashlib.sha256(blank).hexdigest().encode() == found[1] else Seal.BROKEN


def sha256_of(place: StoragePath) -> str:
    """Return the sha256 of a file, in hex."""
    digest, start = hashlib.sha256(), 0
    while data := place.read_range(start, READ_BYTES):
        digest.update(data)
        start += len(data)
        if len(data) < READ_BYTES:
            break
    return digest.hexdigest()


def digests_of(place: StoragePath, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of files below a folder, by name; "" of one that is not there."""
    ordered = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(ordered, pool.map(lambda name: _digest(place / name), ordered), strict=True))


def _digest(place: StoragePath) -> str:
    try:
        return sha256_of(place)
    except FileNotFoundError:
        return ""


def file_problems(place: StoragePath, digests: Mapping[str, str], present: Iterable[str]) -> Iterator[str]:
    """Yield what differs between digests and the files below a folder, of which `present` should be known or be none.

    Args:
        digests: sha256 by name.
        present: names of files that are there.
    """
    for name, found in digests_of(place, digests).items():
        if found != digests[name]:
            yield f"{name} differs from what was made" if found else f"{name} is missing"
    unknown = sorted(set(present) - digests.keys())
    for name in unknown[:NAMED]:
        yield f"{name} is no file of these results; remove it"
    if len(unknown) > NAMED:
        yield f"{len(unknown) - NAMED} more files are none of these results"


def listing_problems(place: StoragePath, data: bytes, left_out: Callable[[str], bool]) -> Iterator[str]:
    """Yield what differs between the listing that `data` are and the files below a folder, but for those left out."""
    if seal_of(data) is not Seal.HOLDS:
        yield f"{LISTING} differs from what was made"
    digests = read_json(data)["files"]
    present = (name for name in place.all_files() if name != LISTING and not left_out(name))
    yield from file_problems(place, digests, present)


def write_listing(place: StoragePath, coming: Mapping[str, bytes], left_out: Callable[[str], bool]) -> None:
    """Write the sha256 of all files below a folder, and of those that come next, but for those left out."""
    names = {name for name in place.all_files() if name != LISTING and name not in coming and not left_out(name)}
    digests = digests_of(place, names) | {name: hashlib.sha256(data).hexdigest() for name, data in coming.items()}
    (place / LISTING).write(sealed_json({"files": dict(sorted(digests.items()))}, indent=1))
