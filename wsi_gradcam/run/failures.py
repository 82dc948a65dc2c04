"""Slides that failed before: which of them a run tries again.

The same command does only what is missing. A slide that failed for a reason of its own, after minutes perhaps, would
fail again: it stays as it is until something that it depends on changes, or it is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.io.urls import is_url
from wsi_gradcam.results.manifest import Manifest, SlideStatus
from wsi_gradcam.results.run_files import versions
from wsi_gradcam.run.jobs import SlideRecord
from wsi_gradcam.system.isolation import WATCH

if TYPE_CHECKING:
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.run_files import RunFolder
    from wsi_gradcam.run.plan import RunPlan

# Settings that no failure of a slide depends on.
ONLY_SPEED = {"reader_threads", "torch_threads"}
DIGITS = 16


def attempt_digest(entry: SlideEntry, run: RunPlan) -> str:
    """What an attempt at a slide depends on: its file, what is told of it, all settings, model and versions."""
    told = {
        "run": run.digest(),
        "settings": run.settings.model_dump(mode="json", exclude=ONLY_SPEED),
        "versions": versions(),
        "address": entry.address,
        "mpp": entry.mpp,
        "file": _file_state(entry.path),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:DIGITS]


def split_failed(
    entries: Sequence[SlideEntry], rows: Mapping[str, Mapping[str, str]], run: RunPlan, anew: bool
) -> tuple[list[SlideEntry], list[SlideRecord]]:
    """The slides to work on, and records of those that failed before and would fail again.

    Args:
        entries: all slides of the run.
        rows: slides.csv as it was before.
        run: the run's plan.
        anew: whether slides that failed are asked for; not those that this very command has tried already, in a
            process that died.
    """
    wanted, known = [], []
    for entry in entries:
        row = rows.get(entry.id)
        asked = anew and entry.path not in WATCH.finished_before
        if row is None or asked or not _would_fail_again(row, entry, run):
            wanted.append(entry)
        else:
            known.append(_record(entry, row))
    return wanted, known


def forget_unreadable(entries: Sequence[SlideEntry], rows: Mapping[str, Mapping[str, str]], folder: RunFolder) -> None:
    """Have slides planned anew that are finished but for too many unreadable patches, so that these are read again.

    Raises:
        StoreError: a manifest cannot be removed.
    """
    for entry in entries:
        row = rows.get(entry.id)
        if (
            row
            and row["status"] == SlideStatus.FAILED
            and row["patches"] != "0"
            and entry.path not in WATCH.finished_before
        ):
            Manifest(folder.slide(entry.id).manifest).clear()


def _would_fail_again(row: Mapping[str, str], entry: SlideEntry, run: RunPlan) -> bool:
    return row["status"] == SlideStatus.FAILED and bool(row["tried"]) and row["tried"] == attempt_digest(entry, run)


def _record(entry: SlideEntry, row: Mapping[str, str]) -> SlideRecord:
    return SlideRecord(
        entry,
        SlideStatus.FAILED,
        row["error"],
        int(row["patches"]),
        int(row["unreadable"]),
        float(row["seconds"]),
        skipped=True,
        lasting=True,
    )


def _file_state(path: str) -> list[Any] | None:
    """What changes where a local file is replaced, mended, or may be read now."""
    if is_url(path):
        return None
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
