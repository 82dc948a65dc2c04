"""`marks.jsonl` in OUT: what people say about patches and regions, one line each, only ever appended to.

A line is a mark, or the end of one: `{"id": ..., "deleted": true, ...}`. The last line of an id is the valid one.
Several processes may append at once: each holds the file's lock, writes a whole line, and flushes it to the disk before
the mark counts as kept. A line that a killed process has left half-written is terminated by the next one, and skipped
by readers.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import MarkError, StoreError
from wsi_gradcam.io.local import LocalPath, append_line, wrap_write_errors
from wsi_gradcam.results.run_files import MARKS

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan

KINDS = ("artefact", "expected", "unexpected", "note")
MAX_BYTES = 256 << 20  # of the file
MAX_LINE = 1 << 17
MAX_TEXT, MAX_NAME, MAX_POINTS = 2000, 100, 2000
MAX_PX = 1e8
ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Mark:
    """What somebody said about a place.

    Attributes:
        id: 32 hex digits.
        slide: id of the slide.
        kind: one of `KINDS`.
        outline: of the region, or of the patch, (y, x) in level-0 px; the last point is joined to the first.
        patch: number of the patch, if one is marked; None for a region.
        text: free text.
        by: who made it, by the name they gave.
        made: when, in UTC, in ISO 8601.
    """

    id: str
    slide: str
    kind: str
    outline: tuple[tuple[float, float], ...]
    patch: int | None = None
    text: str = ""
    by: str = ""
    made: str = ""


def make_mark(slide: str, plan: SlidePlan, given: Any) -> Mark:
    """Return a new mark on a slide from plain values: `kind`, `outline`, `patch` if it is on one, `text`, `by`.

    Raises:
        MarkError: they are not a valid mark on this slide.
    """
    if not isinstance(given, dict) or given.get("kind") not in KINDS:
        raise MarkError(f"a mark has a kind; expected one of {', '.join(KINDS)}")
    text, by = given.get("text", ""), given.get("by", "")
    if not (isinstance(text, str) and isinstance(by, str)) or len(text) > MAX_TEXT or len(by) > MAX_NAME:
        raise MarkError(f"text has up to {MAX_TEXT} characters, and a name up to {MAX_NAME}")
    if given["kind"] == "note" and not text.strip():
        raise MarkError("a note needs a text; write one")
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    number = given.get("patch")
    if number is not None and (type(number) is not int or not 0 <= number < plan.patches):
        raise MarkError(f"no patch {number!r:.40}; there are {plan.patches}, counted from 0")
    outline = _checked_outline(given.get("outline"))
    return Mark(uuid.uuid4().hex, slide, given["kind"], outline, number, text.strip(), by.strip(), now)


def _checked_outline(given: Any) -> tuple[tuple[float, float], ...]:
    """Return an outline of at least three points.

    Raises:
        MarkError: it is not an outline.
    """
    try:
        points = tuple((round(float(y), 1), round(float(x), 1)) for y, x in given)
    except (TypeError, ValueError, OverflowError) as error:
        raise MarkError("a region has an outline: a list of [y, x] in level-0 px") from error
    if not 3 <= len(points) <= MAX_POINTS:
        raise MarkError(f"an outline has 3 to {MAX_POINTS} points, and this one {len(points)}")
    if not all(math.isfinite(value) and abs(value) <= MAX_PX for point in points for value in point):
        raise MarkError("an outline has coordinates that are not level-0 pixels")
    if len(set(points)) < 3:
        raise MarkError("an outline encloses nothing; draw a larger one")
    return points


class Marks:
    """The marks of a run. Safe to share between threads and processes."""

    def __init__(self, out: StoragePath) -> None:
        self._place = out / MARKS
        self._file = self._place.path if isinstance(self._place, LocalPath) else None

    @property
    def can_write(self) -> bool:
        """Whether marks can be kept: only in folders, because object stores cannot append."""
        return self._file is not None and os.access(self._file.parent, os.W_OK)

    def add(self, mark: Mark) -> None:
        """Keep a mark, which is on the disk when this returns.

        Raises:
            StoreError: it cannot be written.
        """
        self._append(asdict(mark))

    def delete(self, mark_id: str, by: str = "") -> None:
        """Delete a mark; its lines stay in the file. Errors as for `add`."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append({"id": mark_id, "deleted": True, "by": by, "made": now})

    def all(self) -> list[Mark]:
        """Return all valid marks, oldest first.

        Raises:
            StoreError: the file is larger than people would make one.
        """
        found: dict[str, Mark | None] = {}
        for line in self._lines():
            with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):  # cut short, or damaged
                values = json.loads(line)
                found[values["id"]] = None if values.get("deleted") else _read(values)
        return [mark for mark in found.values() if mark is not None]

    def of(self, slide_id: str) -> list[Mark]:
        """Return the marks on a slide, oldest first. Errors as for `all`."""
        return [mark for mark in self.all() if mark.slide == slide_id]

    def _lines(self) -> Iterable[bytes]:
        try:
            return self._place.read(MAX_BYTES).split(b"\n")
        except FileNotFoundError:
            return ()

    def _append(self, values: dict[str, Any]) -> None:
        if self._file is None:
            raise StoreError(
                f"{self._place}: marks cannot be appended in an object store; copy OUT to a local folder to add marks"
            )
        line = json.dumps(values, ensure_ascii=True).encode() + b"\n"
        with wrap_write_errors(self._file):
            append_line(self._file, line)


def _read(values: dict[str, Any]) -> Mark:
    """Return the mark in a line.

    Raises:
        ValueError, TypeError, KeyError: the line is not a mark.
    """
    number = values.get("patch")
    texts = {name: str(values.get(name) or "")[:MAX_TEXT] for name in ("text", "by", "made")}
    if values["kind"] not in KINDS or not ID.fullmatch(values["id"]) or not (number is None or isinstance(number, int)):
        raise ValueError("no mark")
    try:
        outline = _checked_outline(values["outline"])
    except MarkError as error:
        raise ValueError("no outline") from error
    return Mark(values["id"], str(values["slide"]), values["kind"], outline, number, **texts)
