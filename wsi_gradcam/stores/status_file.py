"""`status.json`: how far the last run on OUT is, for whoever looks from outside; beside it lies the run's report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_gradcam.stores.places import Place

STATUS, REPORT = "status.json", "run.html"
RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"


def write_status(out: Place, status: dict[str, Any]) -> None:
    """Write it, whole.

    Raises:
        StoreError: OUT cannot be written.
    """
    (out / STATUS).write(json.dumps(status, indent=1).encode())


def read_status(out: Place) -> dict[str, Any] | None:
    """What the last run wrote; None where there is nothing, or nothing of ours."""
    try:
        status = json.loads((out / STATUS).read())
    except (FileNotFoundError, ValueError):
        return None
    return status if isinstance(status, dict) and {"run", "state", "slides", "patches"} <= status.keys() else None
