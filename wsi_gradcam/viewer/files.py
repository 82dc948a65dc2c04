"""Files that are served as they are: reports, overviews, heatmaps by byte ranges, and the page's own modules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

from wsi_gradcam.audit.folder import AUDIT, REPORT, AuditFolder
from wsi_gradcam.errors import ConfigError, NotShownError, StoreError, WsiGradcamError
from wsi_gradcam.viewer.responses import NO_STORE, etag_response, range_response
from wsi_gradcam.viewer.security import REPORT_POLICY, check_inside, path_below

if TYPE_CHECKING:
    from starlette.requests import Request

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.viewer.archive import Archive

HEATMAP = "heatmap.ome.zarr"
RUN_REPORT, OVERVIEW = "run.html", "overview.png"
RUN_FILES = (RUN_REPORT, f"{AUDIT}/{REPORT}", f"{AUDIT}/metrics.json")
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
    """Finds the files of a run that requests name."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def file(self, request: Request, name: str) -> Response:
        """Return a report of the run, of its audit or of a slide's audit, or a slide's overview.

        Paths are those below OUT, so that links from one page to another lead to the same files as on the disk.

        Raises:
            NotShownError: there is no such file.
            OutsideError: the file is not below OUT.
        """
        path = self._find(name)
        check_inside(self._archive.out, path)
        try:
            data = path.read()
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
        """Return the file of a request's path: one of a few of the run, or of a few in the folder of a slide."""
        out, (folder, _, name) = self._archive.out, path.rpartition("/")
        if path in RUN_FILES:
            return out / path
        if name == OVERVIEW:
            return self._archive.find_by_id(folder).result.folder.overview
        if name == REPORT and folder.startswith(f"{AUDIT}/"):
            slide = self._archive.find_by_id(folder.removeprefix(f"{AUDIT}/")).result
            return AuditFolder(out / AUDIT).slide_report(slide.id)
        raise NotShownError("no such file")


def _not_found(error: OSError) -> WsiGradcamError:
    """Return an error for a missing file, also where the path is a folder's; other errors of the store as they are."""
    is_missing = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, IsADirectoryError)
    if not is_missing and isinstance(error, StoreError):
        return error
    return NotShownError("no such file")


def page_routes(folder: Path = PAGE) -> list[Route]:
    """Return the routes of `/` and `/page/...`, whose files are read now: no request names a path on the disk.

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
