"""HTTP responses: JSON, images that browsers may cache, files by byte range, and errors as statuses."""

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
from wsi_gradcam.viewer.archive import valid_text

if TYPE_CHECKING:
    from starlette.requests import Request

    from wsi_gradcam.io.paths import StoragePath

IMMUTABLE = "private, max-age=31536000, immutable"  # for addresses that contain a version
REVALIDATE = "private, no-cache"
NO_STORE = "no-store"
# Larger files are requested in several parts, which bounds the memory of a response.
MAX_BYTES = 32 << 20
BYTE_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))", re.ASCII)


class BusyError(Exception):
    """Too many requests are waiting already."""


class DisconnectedError(Exception):
    """The client has closed its connection."""


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
    (DisconnectedError, 499),
)

Handler = Callable[["Request"], Awaitable[Response]]


def json_response(value: Any) -> Response:
    """Return a value as JSON, which is never cached."""
    return JSONResponse(value, headers={"Cache-Control": NO_STORE})


def image_response(data: bytes, media_type: str, immutable: bool) -> Response:
    """Return an encoded image; an immutable one has an address whose version covers all that it depends on."""
    return Response(data, media_type=media_type, headers={"Cache-Control": IMMUTABLE if immutable else NO_STORE})


def etag_response(request: Request, data: bytes, media_type: str, headers: dict[str, str] | None = None) -> Response:
    """Return a file, or 304 where the browser's copy is still valid; browsers revalidate their copy each time."""
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    known = {"ETag": tag, "Cache-Control": REVALIDATE, **(headers or {})}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=known)
    return Response(data, media_type=media_type, headers=known)


def range_response(request: Request, path: StoragePath, media_type: str) -> Response:
    """Return a file, or the byte range of it that the request names.

    Raises:
        FileNotFoundError: there is no such file.
        RangeError: the range is not supported, or the file is too large to be sent whole.
    """
    size, header = path.size(), request.headers.get("range")
    headers = {"Accept-Ranges": "bytes", "Cache-Control": REVALIDATE}
    if header is None and size > MAX_BYTES and request.method != "HEAD":
        raise RangeError(f"{size} bytes are not sent at once; ask for ranges of up to {MAX_BYTES}")
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(size)}, media_type=media_type)
    if header is None:
        return Response(path.read(), media_type=media_type, headers=headers)
    start, stop = byte_range(header, size)
    stop = min(stop, start + MAX_BYTES)
    data = path.read_range(start, stop - start)
    headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{size}"
    return Response(data, 206, headers, media_type)


def byte_range(header: str, size: int) -> tuple[int, int]:
    """Return (start, stop) of a Range header (RFC 9110, section 14) for a file of `size` bytes.

    Several ranges in one request are refused: readers of Zarr need one, and thousands of small ones would cost far
    more than they carry.

    Raises:
        RangeError: it is not a single range of bytes, or the file has none of them.

    >>> byte_range("bytes=2-3", 10), byte_range("bytes=8-", 10), byte_range("bytes=-4", 10)
    ((2, 4), (8, 10), (6, 10))
    """
    found = BYTE_RANGE.fullmatch(header.strip()) if len(header) <= 64 else None
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


def handling_errors(handler: Handler) -> Handler:
    """Return a handler that answers errors with a status and a line of text."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except (WsiGradcamError, OSError, BusyError, DisconnectedError) as error:
            status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
            headers = {"Cache-Control": NO_STORE}
            if status == 503:
                headers["Retry-After"] = "1"
            return JSONResponse({"error": valid_text(one_line(error))}, status, headers)

    return handle
