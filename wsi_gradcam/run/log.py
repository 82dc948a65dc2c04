"""The log of a run: a line of JSON for each thing that happens, in OUT/log/RUN-NUMBER.jsonl.

An object cannot be appended to, so the log comes in parts that are written whole: the last one again and again until
it is long enough.

What is the same all through a run, for its log, its status and its report.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.io.urls import SCHEME, redact_url

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.run.plan import RunPlan


LOG = "log"
PART_BYTES = 128 << 10
LONGEST = 2000  # characters of a text: errors may quote whatever a slide holds


class RunLog:
    """Takes lines, and writes them when told to."""

    def __init__(self, out: StoragePath, run_id: str) -> None:
        self._folder, self._run_id = out / LOG, run_id
        self._lines: list[bytes] = []
        self._number, self._written = 0, 0
        self._lock = threading.Lock()

    def remove_leftovers(self) -> None:
        """Delete what killed runs left half-written."""
        self._folder.remove_partial_files()

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

    def _place(self) -> StoragePath:
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


def command_line(argv: Sequence[str]) -> str:
    """The command as it was given, URLs without secrets; of programs other than ours the name alone.

    >>> command_line(["/usr/bin/wsi-gradcam", "explain", "https://me:pw@host/a b.svs?key=1", "--out=s3://x/y"])
    "wsi-gradcam explain 'https://host/a b.svs' --out=s3://x/y"
    >>> command_line(["study.py", "--token", "secret"])
    'python study.py'
    """
    program = Path(argv[0]) if argv and argv[0] else Path("-c")
    if program.stem != "wsi-gradcam" and program.parts[-2:] != ("cli", "main.py"):
        return f"python {program.name}"
    return shlex.join(["wsi-gradcam", *map(_without_secrets, argv[1:])])


def _without_secrets(argument: str) -> str:
    found = re.search(SCHEME, argument)
    return argument if found is None else argument[: found.start()] + redact_url(argument[found.start() :])


def facts_of(run: RunPlan, run_id: str, dashboard: str) -> dict[str, Any]:
    """What is the same all through a run, as plain values."""
    facts = run.facts
    return {
        "run": run_id,
        "begun": now(),
        "command": command_line(sys.argv),
        "out": str(run.out),
        "model": facts.name,
        "model_digest": facts.digest,
        "layer": facts.layer,
        "engine": f"{facts.choice.engine} {facts.choice.precision}",
        "targets": [target.label for target in run.targets],
        "settings": run.settings.model_dump(mode="json"),
        "dashboard": dashboard,
    }


def now() -> str:
    """The time, UTC."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
