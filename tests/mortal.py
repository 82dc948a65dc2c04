"""`wsi-gradcam` where opening a slide, or loading the model, ends the process: `python -m tests.mortal ARGUMENTS`.

A file of which the name begins with "deadly" does it; what kills is the signal named in `MORTAL_SIGNAL`. Where
`MORTAL_MODEL` is set, the model does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

SIGNAL, MODEL = "MORTAL_SIGNAL", "MORTAL_MODEL"


def die() -> None:
    """As a decoder in C would."""
    os.kill(os.getpid(), signal.Signals[os.environ.get(SIGNAL, "SIGSEGV")])


def _prepare() -> None:
    """In the process that works: the one that waits shall import nothing."""
    from wsi_gradcam.slides import opening

    known = opening.OPENERS["auto"]

    def opened(path: Any, *arguments: Any) -> Any:
        if Path(getattr(path, "name", path)).name.startswith("deadly"):
            die()
        return known(path, *arguments)

    opening.OPENERS["auto"] = opened
    if MODEL in os.environ:
        import_module("wsi_gradcam.api").__dict__["read_spec"] = lambda _: die()


if __name__ == "__main__":
    cli = import_module("wsi_gradcam.cli.main")

    def supervised(supervise: Callable[[], None] = cli.supervise) -> None:
        supervise()
        _prepare()

    cli.__dict__["supervise"] = supervised
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what runs in the background ignore it
    sys.exit(cli.main())
