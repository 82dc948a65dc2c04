"""HTTP responses: JSON, images that browsers may cache, files by byte range, and errors as statuses.

Reports, overviews, heatmaps and the page's own modules are served unchanged.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from wsi_gradcam.audit.plan import AUDIT, REPORT, AuditFolder
from wsi_gradcam.errors import (
    ConfigError,
    DocumentError,
    MarkError,
    NotShownError,
    OutsideError,
    RangeError,
    ResultError,
    SlideError,
    SlideReadError,
    StoreError,
    TileError,
    WsiGradcamError,
    one_line,
)
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.results.marks import MAX_LINE
from wsi_gradcam.results.run_files import slide_id_of
from wsi_gradcam.run.claims import EVIDENCE
from wsi_gradcam.viewer.archive import check_inside, path_below, valid_text
from wsi_gradcam.viewer.serve import REPORT_POLICY

if TYPE_CHECKING:
    from starlette.requests import Request

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.viewer.archive import Archive


IMMUTABLE = "private, max-age=31536000, immutable"  # for addresses that contain a version
REVALIDATE = "private, no-cache"
NO_STORE = "no-store"
BODY_S = 15.0  # for everything that a page sends
# Larger files are requested in parts, which bounds the memory of a response.
MAX_BYTES = 32 << 20
WHOLE_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
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
    (MarkError, 400),
    (ConfigError, 400),  # a file that somebody has put beside the results
    (SlideReadError, 502),
    (SlideError, 404),
    (BusyError, 503),
    (DisconnectedError, 499),
    (StoreError, 404),  # damaged metadata
)

# Raised when metadata have unexpected types or values, and by JSON for values that are not finite.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

Handler = Callable[["Request"], Awaitable[Response]]


def json_response(value: Any) -> Response:
    """Return a value as JSON that is never cached."""
    return JSONResponse(value, headers={"Cache-Control": NO_STORE})


def image_response(data: bytes, media_type: str, immutable: bool) -> Response:
    """Return an encoded image; an immutable one has an address whose version covers everything it depends on."""
    return Response(data, media_type=media_type, headers={"Cache-Control": IMMUTABLE if immutable else NO_STORE})


async def sent_json(request: Request) -> dict[str, Any]:
    """Return the mapping sent by a request as JSON, once all of it has arrived.

    Raises:
        MarkError: it is larger than marks and names can be, arrives too slowly, or is not a JSON mapping.
    """
    data = b""
    with anyio.move_on_after(BODY_S) as scope:
        async for part in request.stream():
            data += part
            if len(data) > MAX_LINE:
                raise MarkError(f"a request may be at most {MAX_LINE >> 10} KiB long")
    if scope.cancelled_caught:
        raise MarkError(f"marks and names are sent within {BODY_S:g} s")
    try:
        found = read_json(data)
    except (DocumentError, ValueError) as error:
        raise MarkError("marks and names are sent as JSON") from error
    if not isinstance(found, dict):
        raise MarkError("marks and names are mappings")
    return found


def whole_number(text: str) -> int:
    """Return a whole number from an address.

    Raises:
        TileError: the text is not one, or has more than nine digits.
    """
    if WHOLE_NUMBER.fullmatch(text) is None:
        raise TileError(f"{text[:40]!r} is not a whole number up to 999999999")
    return int(text)


def coordinate(text: str) -> float:
    """Return a coordinate from an address, in level-0 px.

    Raises:
        NotShownError: the text is not a finite number.
    """
    try:
        value = float(text[:40])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise NotShownError(f"{text[:40]!r} is not a coordinate; expected y and x in level-0 px")
    return value


def etag_response(request: Request, data: bytes, media_type: str, headers: dict[str, str] | None = None) -> Response:
    """Return a file, or 304 if the browser's copy is still valid; browsers revalidate their copy each time."""
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    known = {"ETag": tag, "Cache-Control": REVALIDATE, **(headers or {})}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=known)
    return Response(data, media_type=media_type, headers=known)


def range_response(request: Request, path: StoragePath, media_type: str) -> Response:
    """Return a file, or the byte range requested.

    Raises:
        FileNotFoundError: there is no such file.
        RangeError: the range is not supported, or the file is too large to be sent whole.
    """
    size, header = path.size(), request.headers.get("range")
    headers = {"Accept-Ranges": "bytes", "Cache-Control": REVALIDATE}
    if header is None and size > MAX_BYTES and request.method != "HEAD":
        raise RangeError(f"{size} bytes are too many for one request; request ranges of up to {MAX_BYTES}")
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

    Requests with several ranges are refused: readers of Zarr need one, and thousands of small ones would cost far more
    than the data are worth.

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
        except MALFORMED as error:
            text = f"the results contain impossible values ({one_line(error)}); `wsi-gradcam validate` says where"
            return JSONResponse({"error": valid_text(text)}, 422, {"Cache-Control": NO_STORE})

    return handle


HEATMAP = "heatmap.ome.zarr"
RUN_REPORT, OVERVIEW = "run.html", "overview.png"
RUN_FILES = (
    RUN_REPORT,
    *(f"{AUDIT}/{name}" for name in (REPORT, "metrics.json")),
    *(f"{EVIDENCE}/{name}" for name in (REPORT, "evidence.json")),
)
PAGE = Path(__file__).parent / "page"
OPENSEADRAGON = "vendor/openseadragon.min.js"
BYTES = "application/octet-stream"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


class Files:
    """Finds the files of a run that are requested."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def file(self, request: Request, name: str) -> Response:
        """Return a report of the run, of its audit or of a slide's audit, or a slide's overview.

        Paths are those below OUT, so that links between pages lead to the same files as on disk.

        Raises:
            NotShownError: there is no such file.
            OutsideError: the file is not below OUT.
        """
        path = self._find(name)
        check_inside(self._archive.out, path)
        try:
            data = path.read(MAX_BYTES)
        except (FileNotFoundError, StoreError) as error:
            raise _not_found(error) from error
        media_type = MEDIA_TYPES[Path(path.name).suffix]
        return etag_response(request, data, media_type, {"Content-Security-Policy": REPORT_POLICY})

    def zarr(self, request: Request, name: str) -> Response:
        """Return a file of a slide's heatmap, whose path begins with the slide's id.

        Raises:
            NotShownError: there is no such file.
            OutsideError: the file is not below OUT.
        """
        slide_id, found, inner = name.partition(f"/{HEATMAP}/")
        if not found:
            raise NotShownError(f"no such file; expected SLIDE/{HEATMAP}/...")
        slide = self._archive.find_by_id(slide_id)
        path = path_below(slide.result.folder.heatmap, inner)
        check_inside(self._archive.out, path)
        try:
            return range_response(request, path, MEDIA_TYPES[".json"] if inner.endswith(".json") else BYTES)
        except (FileNotFoundError, StoreError) as error:
            raise _not_found(error) from error

    def _find(self, path: str) -> StoragePath:
        """Return the file of a request's path: one of a few of the run, or one of a few in a slide's folder."""
        out, (folder, _, name) = self._archive.out, path.rpartition("/")
        if path in RUN_FILES:
            return out / path
        if name == OVERVIEW:
            return self._archive.find_by_id(slide_id_of(folder)).result.folder.overview
        if name == REPORT and folder.startswith(f"{AUDIT}/"):
            slide = self._archive.find_by_id(slide_id_of(folder.removeprefix(f"{AUDIT}/"))).result
            return AuditFolder(out / AUDIT).slide_report(slide.id)
        raise NotShownError("no such file")


def _not_found(error: OSError) -> WsiGradcamError:
    """Return an error for a missing file, or for a path of a folder; other errors of the store are unchanged."""
    is_missing = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, IsADirectoryError)
    if not is_missing and isinstance(error, StoreError):
        return error
    return NotShownError("no such file")


def page_routes(folder: Path = PAGE) -> list[Route]:
    """Return the routes of `/` and `/page/...`, whose files are read now: no request names a path on disk.

    Raises:
        ConfigError: the package was built without OpenSeadragon.
    """
    if not (folder / OPENSEADRAGON).is_file():
        raise ConfigError(
            "this installation has no OpenSeadragon, which the page shows slides with: it was built where npm was "
            "missing; install Node.js and then wsi-gradcam again, or run `python hatch_build.py` in its source folder"
        )
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in MEDIA_TYPES
    }

    def send(request: Request, name: str) -> Response:
        if name not in files:
            return Response("no such file\n", 404, {"Cache-Control": NO_STORE}, "text/plain")
        return etag_response(request, files[name], MEDIA_TYPES[Path(name).suffix])

    async def index(request: Request) -> Response:
        return send(request, "index.html")

    async def file(request: Request) -> Response:
        return send(request, request.path_params["name"])

    async def icon(request: Request) -> Response:
        return send(request, "icon.svg")

    return [Route("/", index), Route("/favicon.ico", icon), Route("/page/{name:path}", file)]
