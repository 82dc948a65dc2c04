"""Files of the results that are handed out as they are: reports, overviews, audits, and heatmaps by ranges.

The page's own files, read once: no request ever names a path.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

from wsi_gradcam.audit.folder import AUDIT, REPORT, AuditFolder
from wsi_gradcam.errors import ConfigError, NotShownError, StoreError, WsiGradcamError
from wsi_gradcam.viewer.answers import NEVER, ranged, unchanged_or
from wsi_gradcam.viewer.inside import below, check_inside

if TYPE_CHECKING:
    from starlette.requests import Request

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.viewer.archive import Archive


HEATMAP = "heatmap.ome.zarr"
RUN_REPORT, OVERVIEW = "run.html", "overview.png"
OF_RUN = (RUN_REPORT, f"{AUDIT}/{REPORT}", f"{AUDIT}/metrics.json")
KINDS = {
    "html": "text/html; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
}
BYTES = "application/octet-stream"
# A report is a file that someone made: it may look as it likes, but runs nothing and asks nobody.
REPORT_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; font-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Files:
    """Finds files by request."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def file(self, request: Request, path: str) -> Response:
        """A report of the run, of its audit or of a slide's audit, or a slide's overview.

        Paths are those below OUT, so that links from one page to another lead to the same files as on the disk.

        Raises:
            NotShownError: there is none.
            OutsideError: it is not below OUT.
        """
        place = self._place(path)
        check_inside(self._archive.out, place)
        kind = KINDS[place.name.rpartition(".")[2]]
        return unchanged_or(request, self._read(place), kind, {"Content-Security-Policy": REPORT_POLICY})

    def _place(self, path: str) -> StoragePath:
        """The file of a request's path: one of a few names, or one of these in the folder of a slide of the run."""
        out, (folder, _, name) = self._archive.out, path.rpartition("/")
        if path in OF_RUN:
            return out / path
        if name == OVERVIEW:
            return self._archive.named(folder).result.folder.overview
        if name == REPORT and folder.startswith(f"{AUDIT}/"):
            slide = self._archive.named(folder.removeprefix(f"{AUDIT}/")).result
            return AuditFolder(out / AUDIT).slide_report(slide.id)
        raise NotShownError("no such file")

    def zarr(self, request: Request, path: str) -> Response:
        """A file of a slide's heatmap, whose path begins with the slide's id.

        Raises:
            NotShownError: there is none.
            OutsideError: it is not below OUT.
        """
        slide_id, found, inner = path.partition(f"/{HEATMAP}/")
        if not found:
            raise NotShownError(f"no such file; expected SLIDE/{HEATMAP}/...")
        shown = self._archive.named(slide_id)
        place = below(shown.result.folder.heatmap, inner)
        check_inside(self._archive.out, place)
        try:
            return ranged(request, place, KINDS["json"] if inner.endswith(".json") else BYTES)
        except (FileNotFoundError, StoreError) as error:
            raise _missing(error) from error

    def _read(self, place: StoragePath) -> bytes:
        try:
            return place.read()
        except (FileNotFoundError, StoreError) as error:
            raise _missing(error) from error


def _missing(error: OSError) -> WsiGradcamError:
    """That there is no such file, where a folder is asked for too; else what the store says."""
    is_missing = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, IsADirectoryError)
    if not is_missing and isinstance(error, StoreError):
        return error
    return NotShownError("no such file")


PAGE = Path(__file__).parent / "page"
VENDOR = "vendor/openseadragon.min.js"
PAGE_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


def page_routes(folder: Path = PAGE) -> list[Route]:
    """`/` and `/page/...`.

    Raises:
        ConfigError: the package was built without OpenSeadragon.
    """
    if not (folder / VENDOR).is_file():
        raise ConfigError(
            "this installation has no OpenSeadragon, which the page shows slides with: it was built where npm was "
            "missing; install Node.js and then wsi-gradcam again, or run `python hatch_build.py` in its source folder"
        )
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in PAGE_KINDS
    }

    def send(request: Request, name: str) -> Response:
        if name not in files:
            return Response("no such file\n", 404, {"Cache-Control": NEVER}, "text/plain")
        return unchanged_or(request, files[name], PAGE_KINDS[Path(name).suffix])

    async def index(request: Request) -> Response:
        return send(request, "index.html")

    async def file(request: Request) -> Response:
        return send(request, request.path_params["name"])

    async def icon(request: Request) -> Response:
        return send(request, "icon.svg")

    return [Route("/", index), Route("/favicon.ico", icon), Route("/page/{name:path}", file)]
