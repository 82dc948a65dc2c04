"""The page's own files, read once: no request ever names a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.viewer.answers import NEVER, unchanged_or

if TYPE_CHECKING:
    from starlette.requests import Request

PAGE = Path(__file__).parent / "page"
VENDOR = "vendor/openseadragon.min.js"
KINDS = {
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
        if path.suffix in KINDS
    }

    def send(request: Request, name: str) -> Response:
        if name not in files:
            return Response("no such file\n", 404, {"Cache-Control": NEVER}, "text/plain")
        return unchanged_or(request, files[name], KINDS[Path(name).suffix])

    async def index(request: Request) -> Response:
        return send(request, "index.html")

    async def file(request: Request) -> Response:
        return send(request, request.path_params["name"])

    async def icon(request: Request) -> Response:
        return send(request, "icon.svg")

    return [Route("/", index), Route("/favicon.ico", icon), Route("/page/{name:path}", file)]
