"""What is the same all through a run, for its log, its status and its report."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.urls import SCHEME, shown_url

if TYPE_CHECKING:
    from wsi_gradcam.plan import RunPlan


def command_line(argv: Sequence[str]) -> str:
    """The command as it was given, URLs without secrets; of programs other than ours the name alone.

    >>> command_line(["/usr/bin/wsi-gradcam", "explain", "https://me:pw@host/a b.svs?key=1", "--out=s3://x/y"])
    "wsi-gradcam explain 'https://host/a b.svs' --out=s3://x/y"
    >>> command_line(["study.py", "--token", "secret"])
    'python study.py'
    """
    program = Path(argv[0]) if argv and argv[0] else Path("-c")
    if program.stem != "wsi-gradcam" and program.parts[-2:] != ("wsi_gradcam", "cli.py"):
        return f"python {program.name}"
    return shlex.join(["wsi-gradcam", *map(_without_secrets, argv[1:])])


def _without_secrets(argument: str) -> str:
    found = re.search(SCHEME, argument)
    return argument if found is None else argument[: found.start()] + shown_url(argument[found.start() :])


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
