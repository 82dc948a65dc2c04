"""The slides of a run: `slides.jsonl` has their ids, written before work begins; `slides.csv` how each ended.

A slide that the run knows by its path keeps its id. A new slide gets the id that it would have in a new run, or one
with more of its path if another given slide has that id, or one's results would lie inside the other's.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import ConfigError, StoreError, as_path, as_text, one_line
from wsi_gradcam.inputs.find import SlideEntry, folders_of, path_parts
from wsi_gradcam.io.documents import plain_cell, read_json, safe_cell
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.io.urls import is_url
from wsi_gradcam.models.spec import probabilities
from wsi_gradcam.results.seals import KEY, Seal, seal_of, sealed_json

if TYPE_CHECKING:
    from wsi_gradcam.mil.spec import SlideActivation

Record = dict[str, dict[str, Any]]
OPTIONAL_KEYS = ("mpp", "mask", "label", "site", "scanner", "patient")


def read_slide_records(place: StoragePathLike) -> Record:
    """Read the line that `record_slides` wrote for each slide, by id; empty if there is none.

    Raises:
        StoreError: it cannot be read, or is damaged.
    """
    try:
        return parse_slide_records(place, storage_path(place).read())
    except FileNotFoundError:
        return {}


def parse_slide_records(place: StoragePathLike, data: bytes) -> Record:
    """Return the rows, by id, in the bytes of a slides.jsonl; anything else raises a StoreError."""
    try:
        _check_lines(data)
        rows = [read_json(line) for line in data.splitlines()]
        if not all(isinstance(row["id"], str) and isinstance(row["path"], str) for row in rows):
            raise TypeError("an id or a path is not text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{place}: damaged; delete it and run the same command again; slides then get the ids of a new run"
        ) from error
    return {row["id"]: row for row in rows}


MAX_LINE_BYTES = 1_000_000  # a slide's line has a few hundred
MAX_SLIDES = 250_000  # slides of a run, as many as a list may name


def _check_lines(data: bytes) -> None:
    if (count := data.count(b"\n")) > MAX_SLIDES + 1:
        raise ValueError(f"{count:,} lines, expected at most {MAX_SLIDES:,}")
    start = 0
    while len(data) - start > MAX_LINE_BYTES:
        if (end := data.find(b"\n", start, start + MAX_LINE_BYTES + 1)) < 0:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES:,} bytes")
        start = end + 1


def record_slides(place: StoragePathLike, entries: Sequence[SlideEntry]) -> list[SlideEntry]:
    """Return the slides with the ids that the run keeps for them, after recording the ids.

    Raises:
        ConfigError: there are more slides than a run may have.
        StoreError: it cannot be read or written, or is damaged.
    """
    settled: list[SlideEntry] = []

    def changed(data: bytes | None) -> bytes | None:  # another run on this folder may have added slides meanwhile
        record = {} if data is None else parse_slide_records(place, data)
        settled[:] = assign_ids(entries, record)
        kept = {name: _sealed(row) for name, row in record.items()}
        before = dict(kept)
        for entry in settled:
            if not _held_by_another(record.get(entry.id), entry.path):
                kept[entry.id] = _row(entry)
        if len(kept) > MAX_SLIDES:
            raise ConfigError(
                f"{len(kept):,} slides in one run, expected at most {MAX_SLIDES:,}; split them into several runs"
            )
        return None if kept == before else encode_slide_records(kept)

    storage_path(place).update(changed)
    return settled


def assign_ids(entries: Sequence[SlideEntry], record: Mapping[str, Mapping[str, Any]]) -> list[SlideEntry]:
    """Return the slides sorted by id, each with the id recorded for its path; new ones with ids that fit in.

    An id whose recorded path is not among the slides goes to the new slide that would have it in a new run, as when an
    archive has moved. Results of a different file are refused later, by their digest.
    """
    known = {as_path(row["path"]): name for name, row in record.items()}
    given = {entry.path for entry in entries}
    ids = _Ids(record)
    names: dict[str, str] = {}
    for entry in entries:
        if entry.path in known:
            names[entry.path] = known[entry.path]
        elif (row := record.get(entry.id)) is not None and as_path(row["path"]) not in given:
            names[entry.path] = entry.id
        elif ids.fits(entry.id):
            names[entry.path] = entry.id
            ids.add(entry.id)
    for entry in entries:
        if entry.path not in names:
            names[entry.path] = next(name for name in _longer(entry.path) if ids.fits(name))
            ids.add(names[entry.path])
    settled = (e if e.id == names[e.path] else replace(e, id=names[e.path]) for e in entries)
    return sorted(settled, key=lambda entry: entry.id)


class _Ids:
    """Ids that are taken; none names a folder that contains another's."""

    def __init__(self, ids: Mapping[str, Any]) -> None:
        self._ids: set[str] = set()
        self._folders: set[str] = set()
        for name in ids:
            self.add(name)

    def add(self, name: str) -> None:
        """Take an id."""
        self._ids.add(name)
        self._folders.update(folders_of(name))

    def fits(self, name: str) -> bool:
        """Return whether an id is still available."""
        return not (name in self._ids or name in self._folders or any(up in self._ids for up in folders_of(name)))


def _longer(path: str) -> Iterator[str]:
    """Yield ids for a slide, with more and more of its path, and finally numbered ones, endlessly."""
    parts = path_parts(path)
    for count in range(1, len(parts) + 1):
        yield as_text("/".join(parts[-count:]))
    number = 2
    while True:
        yield as_text("/".join((str(number), *parts)))
        number += 1


def _held_by_another(row: Mapping[str, Any] | None, path: str) -> bool:
    """Return whether the id belongs to another file that still exists: this one is a copy, or will be refused."""
    return row is not None and (there := as_path(row["path"])) != path and is_there(there)


def is_there(path: str) -> bool:
    """Return whether a slide may be read: a file that exists, or any URL."""
    return is_url(path) or os.path.exists(path)  # noqa: PTH110 - called for every slide of a moved archive


def _row(entry: SlideEntry) -> dict[str, Any]:
    optional = {key: value for key in OPTIONAL_KEYS if (value := getattr(entry, key))}
    if entry.mpp:
        optional["mpp"] = list(entry.mpp)
    return _sealed({"id": entry.id, "path": as_text(entry.path), **optional})


def _sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its seal; an existing seal is kept."""
    sealed: dict[str, Any] = dict(row) if KEY in row else json.loads(sealed_json(row))
    return sealed


def encode_slide_records(rows: Record) -> bytes:
    """Return the file's content from rows by id."""
    return b"".join(json.dumps(rows[name]).encode() + b"\n" for name in sorted(rows))


def record_problems(data: bytes, rows: Record) -> Iterator[str]:
    """Yield what is wrong with the bytes of a slides.jsonl with these rows; older versions had no seals."""
    seals = [seal_of(line) for line in data.splitlines()]
    expected = Seal.MISSING if set(seals) == {Seal.MISSING} else Seal.HOLDS
    for number, seal in enumerate(seals, 1):
        if seal is not expected:
            yield f"slides.jsonl: line {number} differs from what was written"
    if data != encode_slide_records(rows):
        yield "slides.jsonl: its lines are not as they were written"


COLUMNS = (
    "id",
    "path",
    "status",
    "error",
    "patches",
    "unreadable",
    "seconds",
    "mpp_y",
    "mpp_x",
    "slide_digest",
    "model_digest",
    "label",
    "site",
    "scanner",
    "tried",
    "row_digest",
)


# After them, for slide-level models, two columns per class.
ANSWERS = ("slide_logit_", "slide_probability_")

MOST_NAMED = 4  # classes in an answer in words


def answer_shares(logits: Mapping[str, float], activation: SlideActivation) -> dict[str, float]:
    """Return the probabilities of a slide's logits by class, in float32 like all results."""
    values = np.array([list(logits.values())], np.float32)
    return dict(zip(logits, probabilities(values, activation)[0].tolist(), strict=True)) if logits else {}


def answer_in_words(logits: Mapping[str, float], shares: Mapping[str, float]) -> str:
    """Return what a slide-level model answered, by class, the highest first; a regression has no probabilities.

    >>> answer_in_words({"normal": -1.0, "tumour": 1.2}, {"normal": 0.1, "tumour": 0.9})
    'tumour 0.900, normal 0.100'
    >>> answer_in_words({"age": 53.2}, {"age": 53.2})
    'age 53.2'
    """
    ranked = sorted(shares, key=lambda name: -shares[name])
    named = [f"{n} {shares[n]:.4g}" if shares[n] == logits.get(n) else f"{n} {shares[n]:.3f}" for n in ranked]
    return ", ".join(named[:MOST_NAMED]) + (", ..." if len(named) > MOST_NAMED else "")


MOST_ALIKE = 4096  # cells that are reused in later rows: many slides share their status, model, mpp and site
DIGITS = 16
OLDEST = 11  # columns that every version had, the first ones


NAMES = "surrogateescape"  # file names on Linux are bytes: one that is not UTF-8 must not stop an archive


def read_slides(place: StoragePathLike) -> dict[str, dict[str, str]]:
    """Read the rows of slides.csv by slide id; empty if there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return parse_rows(place, storage_path(place).read())
    except FileNotFoundError:
        return {}


def parse_rows(place: StoragePathLike, data: bytes) -> dict[str, dict[str, str]]:
    """Return the rows, by slide id, in the bytes of a slides.csv; anything else raises a StoreError."""
    try:
        _check_lines(data)
        reader = csv.reader(io.StringIO(data.decode("utf-8", NAMES), newline=""))
        names = tuple(next(reader, ()))
        fixed, more = names[: len(COLUMNS)], names[len(COLUMNS) :]
        ours = (
            len(fixed) >= OLDEST and fixed == COLUMNS[: len(fixed)] and all(name.startswith(ANSWERS) for name in more)
        )
        if data and not ours:
            raise StoreError(_damaged(place))
        return dict(_rows(place, names, reader))
    except (csv.Error, ValueError) as error:
        raise StoreError(f"{place}: damaged ({one_line(error)}); choose another --out") from error


def _rows(
    place: StoragePathLike, names: Sequence[str], rows: Iterator[list[str]]
) -> Iterator[tuple[str, dict[str, str]]]:
    once: dict[str, str] = {}
    missing = dict.fromkeys(COLUMNS[len(names) :], "")
    for cells in filter(None, rows):
        if len(cells) != len(names):
            raise StoreError(_damaged(place))
        for cell in cells if len(once) < MOST_ALIKE else ():
            once.setdefault(cell, cell)
        row = {name: plain_cell(once.get(cell, cell)) for name, cell in zip(names, cells, strict=True)}
        yield row["id"], row | missing if missing else row


def _damaged(place: StoragePathLike) -> str:
    return f"{place}: damaged; delete it and run the same command again; finished slides stay finished"


def row_digest(row: Mapping[str, Any]) -> str:
    """Return a digest of a row's other cells."""
    cells = ["" if row.get(name) is None else str(row[name]) for name in COLUMNS[:-1]]
    cells += [f"{name} {row[name]}" for name in sorted(row) if name.startswith(ANSWERS) and row[name] != ""]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:DIGITS]


def encode_rows(rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the file's content from rows by id; each keeps the digest that it has."""
    buffer = io.StringIO(newline="")
    answers = dict.fromkeys(name for key in sorted(rows) for name in rows[key] if name.startswith(ANSWERS))
    plain, quoted = (
        csv.DictWriter(buffer, (*COLUMNS, *answers), lineterminator="\n", extrasaction="ignore", quoting=quoting)
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    plain.writeheader()
    for key in sorted(rows):
        row = {**rows[key], "row_digest": rows[key].get("row_digest") or row_digest(rows[key])}
        # Python's csv does not quote a lone carriage return, and reads it as the end of a row.
        (quoted if any("\r" in str(cell) for cell in row.values()) else plain).writerow(
            {name: safe_cell(value) for name, value in row.items()}
        )
    return buffer.getvalue().encode("utf-8", NAMES)


def row_problems(data: bytes, rows: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the bytes of a slides.csv with these rows, with the slide's id or ""."""
    if not any(row["row_digest"] for row in rows.values()):
        return  # an older version wrote it
    if data != encode_rows(rows):
        yield "", "slides.csv: rows are not as they were written"
    for name, row in rows.items():
        if row["row_digest"] != row_digest(row):
            yield name, "its row in slides.csv differs from what was written"


class SlideTable:
    """Adds rows to slides.csv; other processes may add theirs to the same file.

    The whole file is written each time, so for a large archive this does not happen after every slide: rows wait until
    writing costs less than a twentieth of the time. Rows lost with a killed process are restored from the manifests.
    """

    def __init__(self, place: StoragePathLike) -> None:
        self._place = storage_path(place)
        self._waiting: dict[str, dict[str, Any]] = {}
        self._next = 0.0

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write all waiting ones if it is time."""
        self._waiting[row["id"]] = row
        started = time.monotonic()
        if started >= self._next:
            self.flush()
            now = time.monotonic()
            self._next = now + 20 * (now - started)

    def flush(self) -> None:
        """Write the waiting rows.

        Raises:
            StoreError: the folder cannot be written.
        """
        if self._waiting:
            self._place.update(self._with_waiting)
            self._waiting = {}

    def _with_waiting(self, data: bytes | None) -> bytes:
        return encode_rows({**({} if data is None else parse_rows(self._place, data)), **self._waiting})
