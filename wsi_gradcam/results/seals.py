"""Seals: the sha256 of itself that a text file contains, and those that a listing has of a folder's files.

A seal is taken over all bytes of the file, with zeros in place of its own digits. It reveals damage and accidents;
whoever wants to forge a result can forge its seals too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.io.local import PARTIAL, LocalPath, read_file

if TYPE_CHECKING:
    from pathlib import Path

    from wsi_gradcam.io.paths import StoragePath

KEY = "sha256_of_the_rest"
BLANK = "0" * 64
COMMENT = f"<!-- {KEY}: {BLANK} -->\n"  # of HTML
READ_BYTES = 16 << 20
LISTING = "files.json"
THREADS = 8
NAMED = 5  # unexpected files
# As JSON, YAML and HTML write it; names given by users can only occur within quotes, or after it.
_SEAL = re.compile(rf"""(?:"{KEY}": "|\A{KEY}: '|\A<!-- {KEY}: )([0-9a-f]{{64}})(?:["']| -->)""".encode())
_HALVES = (b"sha256_of", b"_the_rest")  # a flipped byte leaves one of them


ACCOUNT = ("status.json", "run.html", "claim.json")  # in which a run describes itself, beside its log


def is_account(name: str) -> bool:
    """Return whether a file describes the run, and is not a result.

    >>> is_account("log/1.jsonl"), is_account("a.tif/run.html")
    (True, False)
    """
    return name in ACCOUNT or name.startswith("log/")


class Seal(StrEnum):
    """The state of a file's seal; older versions wrote files without one."""

    HOLDS = "holds"
    BROKEN = "broken"
    MISSING = "missing"


def sealed(data: bytes) -> bytes:
    """Return a text, which has `KEY` with the value `BLANK`, with its seal in place of that value."""
    found = _SEAL.search(data)
    assert found is not None, "no place for a seal"
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
    """Return the sha256 of files below a folder, by name; "" for one that does not exist."""
    ordered = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(ordered, pool.map(lambda name: _digest(place / name), ordered), strict=True))


def _digest(place: StoragePath) -> str:
    try:
        return sha256_of(place)
    except FileNotFoundError:
        return ""


def file_problems(place: StoragePath, digests: Mapping[str, str], present: Iterable[str]) -> Iterator[str]:
    """Yield what differs between digests and the files below a folder; those `present` should all be known.

    Args:
        digests: sha256 by name.
        present: names of files that exist.
    """
    outside = [name for name in digests if leads_out(name)]
    yield from (f"{name!r} is not the name of a file of these results" for name in outside[:NAMED])
    for name, found in digests_of(place, digests.keys() - set(outside)).items():
        if found != digests[name]:
            yield f"{name} differs from what was made" if found else f"{name} is missing"
    unknown = sorted(set(present) - digests.keys())
    for name in unknown[:NAMED]:
        yield f"{name} is not a file of these results; remove it"
    if len(unknown) > NAMED:
        yield f"{len(unknown) - NAMED} more files do not belong to these results"


def leads_out(name: str) -> bool:
    """Return whether a name cannot be that of a file below a folder: it has parts that are empty or lead upwards.

    >>> leads_out("a/b.json"), leads_out("../b.json"), leads_out("/etc/b.json")
    (False, True, True)
    """
    return not {"", ".", ".."}.isdisjoint(name.split("/")) or (os.name == "nt" and "\\" in name)


def listing_problems(place: StoragePath, data: bytes, left_out: Callable[[str], bool]) -> Iterator[str]:
    """Yield what differs between the listing in `data` and the files below a folder, except those left out."""
    if seal_of(data) is not Seal.HOLDS:
        yield f"{LISTING} differs from what was made"
    digests = read_json(data)["files"]
    present = (name for name in place.all_files() if name != LISTING and not left_out(name))
    yield from file_problems(place, digests, present)


def write_listing(place: StoragePath, coming: Mapping[str, bytes], left_out: Callable[[str], bool]) -> None:
    """Write the sha256 of all files below a folder, and of those that come next, except those left out."""
    names = {name for name in place.all_files() if name != LISTING and name not in coming and not left_out(name)}
    digests = digests_of(place, names) | {name: hashlib.sha256(data).hexdigest() for name, data in coming.items()}
    (place / LISTING).write(sealed_json({"files": dict(sorted(digests.items()))}, indent=1))


# A folder of exports has a listing, with the sha256 of each file and folder that exports made there. While an export is
# working, it keeps a journal beside it: a line of JSON for each path that is begun and for each job that is done.
EXPORTS = "exports.json"
JOURNAL = re.compile(rf"\.export\.([0-9a-f]{{32}}){re.escape(PARTIAL)}")
MAX_JOURNAL_BYTES = 1 << 28
# The folders that exports make, by their endings: the files in them.
CONTENTS = {
    ".ome.zarr": re.compile(
        r"(.*/)?\.z(array|attrs|group|metadata)|(labels/[^/]+/)?[0-9]+(/[0-9]+)+|OME/METADATA\.ome\.xml"
    ),
    "_files": re.compile(r"[0-9]+/[0-9]+_[0-9]+\.png"),
    ".dicom-parametric-map": re.compile(r"level-[0-9]+\.dcm"),
    ".dicom-segmentation": re.compile(r"level-[0-9]+\.dcm"),
    ".dicom-clusters": re.compile(r"level-[0-9]+\.dcm"),
    ".dicom-labelmap": re.compile(r"level-[0-9]+\.dcm"),
    ".qupath": re.compile(r"overlay-[0-9]+\.png|([a-z-]+/)?(patches|regions)\.geojson|show_in_qupath\.groovy"),
}


def contents_of(name: str) -> re.Pattern[str] | None:
    """Return which files an export puts into a folder of this name; None for the name of a file."""
    return next((contents for ending, contents in CONTENTS.items() if name.endswith(ending)), None)


def export_digest(place: StoragePath, name: str) -> str:
    """Return the sha256 of an exported file, or of the lines that `sha256sum` prints for a folder's files.

    It is "" if nothing is there. Files that no export makes do not count.
    """
    if (contents := contents_of(name)) is None:
        return _digest(place / name)
    found = digests_of(place / name, [file for file in (place / name).all_files() if contents.fullmatch(file)])
    lines = "".join(f"{digest}  {file}\n" for file, digest in found.items())
    return hashlib.sha256(lines.encode()).hexdigest() if found else ""


def read_exports(place: StoragePath) -> dict[str, str]:
    """Return the digests in a listing of exports, by the paths of files and folders; none if there is no listing.

    Raises:
        ValueError: it is damaged, or not ours.
        StoreError: it cannot be read.
    """
    try:
        data = place.read(SMALL_BYTES)
    except FileNotFoundError:
        return {}
    values = read_json(data)
    found = values.get("files") if isinstance(values, dict) and seal_of(data) is Seal.HOLDS else None
    if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
        raise ValueError(f"{EXPORTS} differs from what was made")
    return found


def export_problems(place: StoragePath, notes: list[str], where: str = "", is_theirs: bool = True) -> Iterator[str]:
    """Yield what differs between a folder of exports and its listing.

    Args:
        notes: what could not be checked is added to them.
        where: the folder, in messages.
        is_theirs: whether there is nothing else in the folder.
    """
    try:
        digests = read_exports(place / EXPORTS)
    except ValueError:
        yield f"{where}{EXPORTS} differs from what was made; delete it and export with --overwrite"
        return
    begun = _begun_exports(place)
    if begun is not None:
        notes.append(f"{where or place}: an export is unfinished; run the same export command again")
    for name in sorted(digests):
        if leads_out(name):
            yield f"{where}{EXPORTS} lists {name!r}, which is not the path of an export"
        elif name not in (begun or ()) and (found := export_digest(place, name)) != digests[name]:
            yield f"{where}{name} " + ("differs from what was made" if found else "is missing") + "; export it again"
    folders = tuple(f"{name}/" for name in digests if contents_of(name))
    present = {name for name in place.all_files() if not name.startswith(folders)} if is_theirs else set()
    if others := present - {EXPORTS, *digests}:
        notes.append(f"{where or place}: {len(others)} files are not in {EXPORTS}, so they were not checked")


def _begun_exports(place: StoragePath) -> set[str] | None:
    """Return the paths begun by exports that have not ended; None if there is no such export."""
    if not isinstance(place, LocalPath) or not place.path.is_dir():
        return None
    journals = [file for file in place.path.iterdir() if JOURNAL.fullmatch(file.name) and file.is_file()]
    lines = [line for journal in journals for line in journal_lines(journal)]
    return {line["begun"] for line in lines if isinstance(line.get("begun"), str)} if journals else None


def journal_lines(place: Path) -> list[dict[str, Any]]:
    """Return the lines of an export's journal, without one that was cut short."""
    found = []
    for text in read_file(place, MAX_JOURNAL_BYTES).decode("ascii", "replace").splitlines():
        with suppress(ValueError):
            line = read_json(text)
            found += [line] if isinstance(line, dict) else []
    return found
