"""The log of a run: a line of JSON for each thing that happens, in OUT/log/RUN-NUMBER.jsonl.

An object cannot be appended to, so the log comes in parts that are written whole: the last one again and again until
it is long enough.
"""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_gradcam.stores.places import Place

LOG = "log"
PART_BYTES = 128 << 10
LONGEST = 2000  # characters of a text: errors may quote whatever a slide holds


class RunLog:
    """Takes lines, and writes them when told to."""

    def __init__(self, out: Place, run_id: str) -> None:
        self._folder, self._run_id = out / LOG, run_id
        self._lines: list[bytes] = []
        self._number, self._written = 0, 0
        self._lock = threading.Lock()

    def remove_leftovers(self) -> None:
        """Delete what killed runs left half-written."""
        self._folder.remove_partials()

    def add(self, event: str, level: str = "info", **facts: Any) -> None:
        """Take a line: the time, the level (info, warning, error), what happened, and facts, which are plain values."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        values = {"time": now, "level": level, "event": event, "run": self._run_id, **facts}
        line = json.dumps({key: _short(value) for key, value in values.items()}).encode() + b"\n"
        with self._lock:
            self._lines.append(line)

    def flush(self) -> None:
        """Write what has come since the last time.

        Raises:
            StoreError: OUT cannot be written; nothing is lost, the next time may succeed.
        """
        with self._lock:
            while self._written < len(self._lines):
                count = self._part_length()
                self._place().write(b"".join(self._lines[:count]))
                self._written = count
                if count < len(self._lines) or sum(map(len, self._lines)) >= PART_BYTES:
                    self._lines, self._written, self._number = self._lines[count:], 0, self._number + 1

    def _place(self) -> Place:
        return self._folder / f"{self._run_id}-{self._number:05d}.jsonl"

    def _part_length(self) -> int:
        """How many of the lines belong to this part."""
        size = 0
        for count, line in enumerate(self._lines, 1):
            size += len(line)
            if size >= PART_BYTES:
                return count
        return len(self._lines)


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > LONGEST:
        return value[:LONGEST] + "..."
    return value
