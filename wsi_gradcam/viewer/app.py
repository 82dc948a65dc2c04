"""The server's addresses. Each handler finds its slide, has a thread make the answer, and says how long it holds.

/                                              the page; /page/... its modules
/api/run, /api/slides, /api/slide?id=, /api/slides/KEY   JSON
/api/slides/KEY/values, .../patches/...        what lies at a point, a patch, the highest patches
/tiles/KEY/VERSION/slide/LEVEL/ROW_COLUMN.jpg  heat/CHANNEL/LEVEL/ROW_COLUMN.png, cells/..., patch/NUMBER.jpg, thumb.jpg
               heat/spread-DIGEST/CHANNEL/LEVEL/ROW_COLUMN.png, cells/spread-...: of an audit
/files/..., /zarr/ID/heatmap.ome.zarr/...      files of the results as they lie in OUT, the second by ranges
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from wsi_gradcam.viewer.answers import answered, json_answer, picture_answer
from wsi_gradcam.viewer.describe import run_facts
from wsi_gradcam.viewer.files import Files, page_routes
from wsi_gradcam.viewer.gallery import Scorer, listing
from wsi_gradcam.viewer.inquiries import Inquiries, number, real
from wsi_gradcam.viewer.pictures import Pictures
from wsi_gradcam.viewer.security import Access, Guard
from wsi_gradcam.viewer.slides_open import OpenSlides
from wsi_gradcam.viewer.spread import Spreads
from wsi_gradcam.viewer.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from wsi_gradcam.viewer.archive import Archive, Shown

KEY, VERSION = "{key:str}", "{version:str}"
JPEG, PNG = "image/jpeg", "image/png"


def make_app(archive: Archive, access: Access) -> Starlette:
    """The server of a run."""
    viewer = Viewer(archive)
    return Starlette(
        routes=[*page_routes(), *viewer.routes()],
        middleware=[Middleware(Guard, access=access)],
        lifespan=viewer.lifespan,
    )


class Viewer:
    """Handlers and what they share."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        slides = OpenSlides()
        self._slides = slides
        self._pictures = Pictures(archive, slides)
        self._scorer = Scorer(archive)
        self._spreads = Spreads(archive)
        self._inquiries = Inquiries(archive, slides, self._spreads, self._scorer.windows)
        self._files = Files(archive)
        threads = max(2, min(8, os.cpu_count() or 2))
        # A slide in an object store may be slow: heatmaps do not wait behind it.
        self._slide_work, self._work = Work(threads), Work(threads)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Score slides while the server runs, and close them afterwards."""
        self._scorer.start()
        yield
        self._scorer.stop()
        self._slides.close()

    def routes(self) -> list[Route]:
        """All addresses but the page's."""
        slide, tiles = f"/api/slides/{KEY}", f"/tiles/{KEY}/{VERSION}"
        in_channel = "{channel:str}/{level:str}/{row:str}_{column:str}.png"
        found = {
            "/api/run": self.run,
            "/api/slides": self.slides,
            "/api/slide": self.slide_named,
            slide: self.slide,
            f"{slide}/values": self.values,
            f"{slide}/patches/at": self.patch_at,
            f"{slide}/patches/top": self.top,
            f"{slide}/patches/{{patch:str}}": self.patch,
            f"{tiles}/slide/{{level:str}}/{{row:str}}_{{column:str}}.jpg": self.slide_tile,
            f"{tiles}/heat/{in_channel}": self.heat_tile,
            f"{tiles}/cells/{in_channel}": self.heat_tile,
            f"{tiles}/heat/spread-{{spread:str}}/{in_channel}": self.heat_tile,
            f"{tiles}/cells/spread-{{spread:str}}/{in_channel}": self.heat_tile,
            f"{tiles}/patch/{{patch:str}}.jpg": self.patch_picture,
            f"{tiles}/thumb.jpg": self.thumb,
            "/files/{path:path}": self.file,
            "/zarr/{path:path}": self.zarr,
        }
        return [Route(path, answered(handler), methods=["GET"]) for path, handler in found.items()]

    async def run(self, request: Request) -> Response:
        """Facts of the run."""
        return json_answer(await self._made(request, lambda: run_facts(self._archive)))

    async def slides(self, request: Request) -> Response:
        """A page of the gallery."""
        query = request.query_params

        def make() -> Any:
            return listing(
                self._archive.slides(),
                self._scorer.of,
                search=query.get("search", ""),
                status=query.get("status", ""),
                sort=query.get("sort", "name"),
                descending=query.get("order") == "down",
                offset=number(query.get("offset", "0")),
                limit=number(query.get("limit", "24")),
            )

        return json_answer(await self._made(request, make))

    async def slide(self, request: Request) -> Response:
        """Facts of a slide."""
        key = request.path_params["key"]
        return json_answer(await self._made(request, lambda: self._inquiries.slide(key), self._slide_work))

    async def slide_named(self, request: Request) -> Response:
        """Facts of the slide with an id."""
        name = request.query_params.get("id", "")
        facts = await self._made(
            request, lambda: self._inquiries.slide(self._archive.named(name).key), self._slide_work
        )
        return json_answer(facts)

    async def values(self, request: Request) -> Response:
        """All channels' values at a point."""
        key, (y, x) = request.path_params["key"], _point(request)
        return json_answer(await self._made(request, lambda: self._inquiries.values(key, y, x)))

    async def patch_at(self, request: Request) -> Response:
        """The patch at a point."""
        key, (y, x) = request.path_params["key"], _point(request)
        return json_answer(await self._made(request, lambda: self._inquiries.patch_at(key, y, x)))

    async def patch(self, request: Request) -> Response:
        """A patch by its number."""
        key, patch = request.path_params["key"], number(request.path_params["patch"])
        return json_answer(await self._made(request, lambda: self._inquiries.patch(key, patch)))

    async def top(self, request: Request) -> Response:
        """The patches with the highest, or lowest, values of a column."""
        key, query = request.path_params["key"], request.query_params
        column, count, lowest = query.get("by", ""), number(query.get("count", "24")), query.get("order") == "up"
        return json_answer(await self._made(request, lambda: self._inquiries.top(key, column, count, lowest)))

    async def slide_tile(self, request: Request) -> Response:
        """A tile of the slide."""
        tile = _tile(request)
        return await self._picture(request, JPEG, lambda shown: self._pictures.slide_tile(shown, *tile))

    async def heat_tile(self, request: Request) -> Response:
        """A tile of a channel, with its pixels enlarged smoothly (heat) or as they are (cells)."""
        channel, tile, smooth = number(request.path_params["channel"]), _tile(request), "/heat/" in request.url.path
        spread = request.path_params.get("spread")

        def make(shown: Shown) -> bytes:
            layered = shown if spread is None else self._spreads.with_digest(shown, spread)
            return self._pictures.heat_tile(layered, channel, *tile, smooth)

        return await self._picture(request, PNG, make)

    async def patch_picture(self, request: Request) -> Response:
        """What the model saw of a patch."""
        patch = number(request.path_params["patch"])
        return await self._picture(request, JPEG, lambda shown: self._pictures.patch(shown, patch))

    async def thumb(self, request: Request) -> Response:
        """The whole slide, small."""
        return await self._picture(request, JPEG, self._pictures.thumb)

    async def file(self, request: Request) -> Response:
        """A file of the results that people look at."""
        found: Response = await self._made(request, lambda: self._files.file(request, request.path_params["path"]))
        return found

    async def zarr(self, request: Request) -> Response:
        """A file of a heatmap, for other viewers on this machine."""
        found: Response = await self._made(request, lambda: self._files.zarr(request, request.path_params["path"]))
        return found

    async def _picture(self, request: Request, kind: str, make: Callable[[Shown], bytes]) -> Response:
        """A picture of a slide (JPEG) or of its heatmap (PNG), kept by browsers unless it may change."""
        key, version = request.path_params["key"], request.path_params["version"]

        def made() -> tuple[bytes, bool]:
            shown = self._archive.find(key)
            return make(shown), version == shown.version and (kind == JPEG or shown.is_kept)

        return picture_answer(await self._made(request, made, self._slide_work if kind == JPEG else None), kind)

    async def _made(self, request: Request, make: Callable[[], Any], work: Work | None = None) -> Any:
        return await (work or self._work).run(request.is_disconnected, make)


def _tile(request: Request) -> tuple[int, int, int]:
    level, row, column = (number(request.path_params[name]) for name in ("level", "row", "column"))
    return level, row, column


def _point(request: Request) -> tuple[float, float]:
    return real(request.query_params.get("y", "")), real(request.query_params.get("x", ""))
