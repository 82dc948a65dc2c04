"""Answers: JSON, pictures that browsers may keep, files by range; and errors as statuses with a line of text."""

from __future__ import annotations

import hashlib
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
from wsi_gradcam.viewer.ranges import byte_range
from wsi_gradcam.viewer.work import BusyError, GoneError

if TYPE_CHECKING:
    from starlette.requests import Request

    from wsi_gradcam.stores.places import Place

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


def ranged(request: Request, place: Place, kind: str) -> Response:
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
