"""Answers: JSON, pictures that browsers may keep, files by range; and errors as statuses with a line of text.

The Range header of HTTP (RFC 9110, section 14), as far as readers of Zarr need it: one range a request.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from wsi_gradcam.errors import (
    NotShownError,
    OutsideError,
    RangeError,
    ResultError,
    SlideError,
    SlideReadError,
    TileError,
    WsiGradcamError,
    one_line,
)
from wsi_gradcam.viewer.archive import shown_name
from wsi_gradcam.viewer.work import BusyError, GoneError

if TYPE_CHECKING:
    from starlette.requests import Request

    from wsi_gradcam.io.paths import StoragePath


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


FOR_EVER = "private, max-age=31536000, immutable"  # addresses with a version in them
ASK_FIRST = "private, no-cache"
NEVER = "no-store"
# Larger pieces are asked for in several requests: the memory of an answer is bounded.
MOST_BYTES = 32 << 20
STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (TileError, 404),
    (NotShownError, 404),
    (ResultError, 404),
    (FileNotFoundError, 404),
    (OutsideError, 403),
    (RangeError, 416),
    (SlideReadError, 502),
    (SlideError, 404),
    (BusyError, 503),
    (GoneError, 499),
)
CLIENT_HAS_GONE = 499

Handler = Callable[["Request"], Awaitable[Response]]


def json_answer(value: Any) -> Response:
    """A value as JSON, never kept."""
    return JSONResponse(value, headers={"Cache-Control": NEVER})


def picture_answer(made: tuple[bytes, bool], kind: str) -> Response:
    """A picture, and whether it may be kept: where its address has a version that says all that it depends on."""
    data, kept = made
    return Response(data, media_type=kind, headers={"Cache-Control": FOR_EVER if kept else NEVER})


def unchanged_or(request: Request, data: bytes, kind: str, headers: dict[str, str] | None = None) -> Response:
    """A file that browsers may keep if they ask each time whether it has changed."""
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    known = {"ETag": tag, "Cache-Control": ASK_FIRST, **(headers or {})}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=known)
    return Response(data, media_type=kind, headers=known)


def ranged(request: Request, place: StoragePath, kind: str) -> Response:
    """A file, or the range of it that is asked for.

    Raises:
        FileNotFoundError: there is none.
        RangeError: a range that is not answered, or a file too large to be sent whole.
    """
    size, header = place.size(), request.headers.get("range")
    headers = {"Accept-Ranges": "bytes", "Cache-Control": ASK_FIRST}
    if header is None and size > MOST_BYTES and request.method != "HEAD":
        raise RangeError(f"{size} bytes are not sent at once; ask for ranges of up to {MOST_BYTES}")
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(size)}, media_type=kind)
    if header is None:
        return Response(place.read(), media_type=kind, headers=headers)
    start, stop = byte_range(header, size)
    stop = min(stop, start + MOST_BYTES)
    data = place.read_range(start, stop - start)
    headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{size}"
    return Response(data, 206, headers, kind)


def answered(handler: Handler) -> Handler:
    """The handler, with errors turned into statuses."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except (WsiGradcamError, OSError, BusyError, GoneError) as error:
            status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
            headers = {"Cache-Control": NEVER}
            if status == 503:
                headers["Retry-After"] = "1"
            return JSONResponse({"error": shown_name(one_line(error))}, status, headers)

    return answer
