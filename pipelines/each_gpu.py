"""Start a worker for each GPU of a job, bound to it: `python each_gpu.py COUNT ARGUMENTS`, Python's for one worker.

The queue says in CUDA_VISIBLE_DEVICES which GPUs the job has; if it does not, there are COUNT. Each worker sees only
its own, and its name is that of --name followed by .0, .1, ... The job ends when all of them have ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType


def main(arguments: Sequence[str]) -> int:
    """Start the workers, and return the first exit status that is not 0."""
    count, *command = arguments
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [device for device in given.split(",") if device] or [str(number) for number in range(int(count))]
    if len(devices) != int(count):
        print(f"expected {count} GPUs, and CUDA_VISIBLE_DEVICES is {given!r}", file=sys.stderr)
        return 1
    workers = [start(command, number, device) for number, device in enumerate(devices)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    return next((status for status in [worker.wait() for worker in workers] if status), 0)


def start(command: Sequence[str], number: int, device: str) -> subprocess.Popen[bytes]:
    """Start one worker, which sees one GPU."""
    named = list(command)
    place = named.index("--name") + 1
    named[place] = f"{named[place]}.{number}"
    print(f"worker {named[place]} has GPU {device}", flush=True)
    return subprocess.Popen([sys.executable, *named], env={**os.environ, "CUDA_VISIBLE_DEVICES": device})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
