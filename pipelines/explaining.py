"""The part that recipes for clusters share: `wsi-gradcam explain` in a process of its own, beside the scheduler."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType


def explain(arguments: Sequence[str], scheduler: str, wait_s: int | None = None) -> int:
    """Run it on the scheduler at this address; returns its exit status, after Ctrl-C or SIGTERM too.

    For workers that are missing it waits `wait_s`, unless the arguments say otherwise.

    A terminal sends Ctrl-C to both processes; SIGTERM is passed on. In either case `explain` ends in its own time, so
    that the scheduler, which ends with this process, is there until then.
    """
    waiting = [] if wait_s is None else ["--wait-for-workers", str(wait_s)]
    command = [sys.executable, "-m", "wsi_gradcam.cli", "explain", *waiting, *arguments, "--scheduler", scheduler]
    with subprocess.Popen(command) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        signal.signal(signal.SIGTERM, pass_on)
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
