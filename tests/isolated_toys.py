"""Readers that do what a decoder must not, for confined processes: `serve` puts them in the place of all others.

A slide is a text file that says what is done when it is opened and when it is read: `{"open": "spin", "read": "eat"}`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_gradcam.errors import SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import isolated_process, opening
from wsi_gradcam.slides.base import SlideInfo, make_levels
from wsi_gradcam.system.confinement import Link


def connect() -> None:
    """Reach another server."""
    socket.create_connection(("127.0.0.1", 9), 1)


def resolve() -> None:
    """Send a packet."""
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))


def talk() -> None:
    """Reach a server of this machine."""
    socket.socket(socket.AF_UNIX).connect("/run/nobody")


def write() -> None:
    """Make a file."""
    (Path(os.environ.get("TMPDIR", "/tmp")) / f"made-{os.getpid()}").write_text("x")


def change() -> None:
    """Empty a file that is there."""
    Path(os.environ["WSI_GRADCAM_TEST_VICTIM"]).write_text("")


def delete() -> None:
    """Delete a file."""
    Path(os.environ["WSI_GRADCAM_TEST_VICTIM"]).unlink()


def fork() -> None:
    """Make a process."""
    if not os.fork():
        os._exit(0)


def run() -> None:
    """Run a program."""
    subprocess.run(["/bin/true"], check=True)


def strike() -> None:
    """End the process that asked."""
    os.kill(int(os.environ["WSI_GRADCAM_TEST_PARENT"]), signal.SIGKILL)


def open_many() -> None:
    """Open more files than are allowed."""
    for _ in range(1000):
        os.open("/dev/null", os.O_RDONLY)


FORBIDDEN: tuple[Callable[[], None], ...] = (
    connect, resolve, talk, write, change, delete, fork, run, strike, open_many
)  # fmt: off


def spin() -> None:
    """Never end."""
    while True:
        pass


def eat() -> None:
    """Take four gigabytes."""
    np.ones(4 << 30, np.uint8)


def crash() -> None:
    """Crash as a decoder does."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)


def be_killed() -> None:
    """Be killed, as for want of memory."""
    signal.pthread_kill(threading.get_ident(), signal.SIGKILL)


def try_all() -> None:
    """Tell what of all that is forbidden was done."""
    done = []
    for each in FORBIDDEN:
        try:
            each()
        except OSError:
            continue
        done.append(each.__name__)
    threading.Thread(target=int).start()  # decoders may have threads
    raise SlideReadError(f"done: {', '.join(done)}")


ACTS: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (spin, eat, crash, be_killed, try_all, connect)
} | {"": lambda: None}


class ToySlide:
    """A slide of one colour that does what its file says."""

    def __init__(self, path: Path, *given: Any, **options: Any) -> None:
        self._acts = json.loads(path.read_text())
        ACTS[self._acts.get("open", "")]()
        digest = str(self._acts.get("digest", ""))
        self.info = SlideInfo(str(path), make_levels([(64, 64)]), (0.5, 0.5), "", "toy", (255, 255, 255), None, digest)

    def read_level(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Act, and return pixels."""
        if region.y == self._acts.get("at", region.y):
            ACTS[self._acts.get("read", "")]()
        return np.full((region.height, region.width, 3), region.y % 256, np.uint8)

    def close(self) -> None:
        """Close nothing."""


def serve(link: Link, lacking: list[str]) -> None:
    """Serve such a slide."""
    opening.OPENERS["auto"] = ToySlide
    isolated_process.serve_slide(link, lacking)
