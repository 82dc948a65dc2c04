"""The Range header of HTTP (RFC 9110, section 14), as far as readers of Zarr need it: one range a request."""

from __future__ import annotations

import re

from wsi_gradcam.errors import RangeError

ONE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))", re.ASCII)


def byte_range(header: str, size: int) -> tuple[int, int]:
    """(start, stop) of what is asked for of a file of `size` bytes.

    Several ranges in one request are refused: thousands of small ones would cost far more than they carry.

    Raises:
        RangeError: not one range of bytes, or none of its bytes are there.

    >>> byte_range("bytes=2-3", 10), byte_range("bytes=8-", 10), byte_range("bytes=-4", 10)
    ((2, 4), (8, 10), (6, 10))
    """
    found = ONE.fullmatch(header.strip()) if len(header) <= 64 else None
    if found is None:
        raise RangeError("expected one range of bytes, such as bytes=0-99")
    first, last, suffix = found.groups()
    if suffix is not None:
        start, stop = max(0, size - int(suffix)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    if start >= stop:
        raise RangeError(f"no such bytes; the file has {size}")
    return start, stop
