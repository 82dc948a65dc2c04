"""Times and amounts of memory, as given in the arguments of recipes and as accepted by queues."""

from __future__ import annotations

import argparse
import re

import dask


def positive(text: str) -> int:
    """Return a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, not {text!r}")
    return int(text)


def duration(text: str) -> int:
    """Return seconds from MINUTES, MINUTES:SECONDS, H:M:S, DAYS-H, DAYS-H:M or DAYS-H:M:S, as SLURM reads them."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 0:30:00, 2-12 or 90 (minutes), not {text!r}")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) == 2 else 0
    whole = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if whole < 60:
        raise argparse.ArgumentTypeError(f"expected a time of a minute or more, not {text!r}")
    return whole


def memory(text: str) -> str:
    """Return an amount of memory that Dask understands, such as 8GiB or 8G."""
    try:
        amount = dask.utils.parse_bytes(text)
    except ValueError:
        amount = 0
    if amount < 2**20:
        raise argparse.ArgumentTypeError(f"expected an amount of memory such as 8GiB, not {text!r}")
    return text


def megabytes(text: str) -> int:
    """Return an amount of memory in MiB, rounded up."""
    return -(-int(dask.utils.parse_bytes(text)) // 2**20)


def directive(text: str) -> str:
    """Return a directive, which must be one line."""
    if not text.strip() or "\n" in text:
        raise argparse.ArgumentTypeError("expected one line")
    return text


def clock(seconds: int) -> str:
    """Return a time as HH:MM:SS; there may be more than 24 hours."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
