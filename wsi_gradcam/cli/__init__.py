"""The command line: parses arguments, calls the package's public functions and prints what they return.

It may use every other room, and none uses it. `wsi-gradcam --help` and mistakes in arguments must be answered at once,
so that `main` and `flags` import whatever is heavy only when a command needs it.
"""

from __future__ import annotations

import logging
import sys

from wsi_gradcam.errors import printable


def say(*lines: object, error: bool = False) -> None:
    """Print lines, as all commands do: nothing that a file or folder says reaches the terminal but as visible text."""
    text = "\n".join(printable(str(line)) for line in lines)
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


class PrintableFormatter(logging.Formatter):
    """Formats what is logged as `say` prints it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record on one line."""
        return printable(super().format(record))
