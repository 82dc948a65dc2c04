"""Preloaded by the workers of `tests.chaos`: writes down when a span's work begins and when its record is there."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.run import stages

JOURNAL = "CHAOS_JOURNAL"  # environment: the file
BEGUN, DONE = "begun", "done"


def dask_setup(worker: Any) -> None:
    """Called by a worker that starts."""
    current = threading.local()
    explain_span, work, complete = stages.explain_span, stages.__dict__["_explain"], Manifest.complete

    def told(event: str) -> None:
        line = json.dumps([event, *current.span, time.time(), os.getpid()])
        descriptor = os.open(os.environ[JOURNAL], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)

    def spanned(context: Any, entry: Any, span: int, *arguments: Any, **options: Any) -> Any:
        current.span = entry.id, span
        return explain_span(context, entry, span, *arguments, **options)

    def explained(*arguments: Any, **options: Any) -> Any:
        told(BEGUN)
        return work(*arguments, **options)

    def completed(manifest: Manifest, kind: str, name: str, record: dict[str, Any]) -> None:
        complete(manifest, kind, name, record)
        if kind == "spans":
            told(DONE)

    stages.explain_span = spanned  # tasks find it by its name
    stages.__dict__["_explain"] = explained
    Manifest.complete = completed  # type: ignore[method-assign, assignment]
