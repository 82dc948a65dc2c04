"""`wsi-gradcam view`, and the web application: its routes, and handlers that answer in a bounded number of threads.

/                                              the page; /page/... its modules
/api/run, /api/slides, /api/slide?id=, /api/slides/KEY, /api/top   JSON
/api/evidence, /api/evidence/CLUSTER?site=     clusters of the evidence, and the patches of one
/api/slides/KEY/values, .../patches/...        the values at a point, a patch, the highest patches
/api/slides/KEY/marks, POST /api/marks         what people say about places, kept in OUT/marks.jsonl
POST /api/names                                a name of a cluster, kept in OUT/evidence/names.yaml
/api/slides/KEY/annotations, .../agreement?class=     outlines, and how well channels agree with a class
/tiles/KEY/VERSION/slide/LEVEL/ROW_COLUMN.jpg  heat/CHANNEL/LEVEL/ROW_COLUMN.png, cells/..., patch/NUMBER.jpg, thumb.jpg
               heat/spread-DIGEST/CHANNEL/LEVEL/ROW_COLUMN.png, cells/spread-...: of an audit
               cells/classes-0/..., cells/clusters-STATE/...: the most probable classes, and clusters of the evidence
               heat/other-VERSION/..., heat/difference-VERSION/...: of a second run
/files/..., /zarr/ID/heatmap.ome.zarr/...      files of the results as they are in OUT, the second by byte ranges
"""

from __future__ import annotations

import contextlib
import os
import secrets
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.routing import Route

from wsi_gradcam.errors import ConfigError, MarkError
from wsi_gradcam.results.marks import KINDS, Marks, make_mark
from wsi_gradcam.system.confinement import Limits, can_confine, isolating, limits_here
from wsi_gradcam.viewer.across import ArchiveTop, EvidenceIndex
from wsi_gradcam.viewer.annotations import Agreements, AnnotationFiles
from wsi_gradcam.viewer.archive import Archive, Scorer, list_slides
from wsi_gradcam.viewer.images import Images
from wsi_gradcam.viewer.layers import CLASSES, CLUSTERS, ClusterLayers, Comparison, Predicted, Spreads
from wsi_gradcam.viewer.queries import Queries, mark_facts, run_facts
from wsi_gradcam.viewer.responses import (
    BusyError,
    DisconnectedError,
    Files,
    coordinate,
    etag_response,
    handling_errors,
    image_response,
    json_response,
    page_routes,
    sent_json,
    whole_number,
)
from wsi_gradcam.viewer.serve import (
    WRITING,
    Access,
    AccessMiddleware,
    is_loopback,
    listen,
    make_server,
    redirecting_page,
    url_host,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from wsi_gradcam.viewer.archive import ServedSlide
    from wsi_gradcam.viewer.images import Layer

T = TypeVar("T")
SLIDE, TILES = "/api/slides/{key:str}", "/tiles/{key:str}/{version:str}"
IN_CHANNEL = "{channel:str}/{level:str}/{row:str}_{column:str}.png"
JPEG, PNG = "image/jpeg", "image/png"


NOT_ENCRYPTED = (
    "warning: not encrypted: anyone listening on this network can read slides, results and the token, and use it; "
    "--tls CERT KEY encrypts"
)
NOT_ISOLATED = "warning: slides are read in this process: restricted processes exist only on Linux"


def view(
    out: str,
    second: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    slides: Path | None = None,
    token: bool = False,
    allow_host: Sequence[str] = (),
    remote_slides: bool = False,
    isolate: bool | None = None,
    tls: tuple[str, str] | None = None,
    annotations: Path | None = None,
    mask_frame: str = "auto",
    read_only: bool = False,
    browse: bool = False,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve the results in `out` until interrupted; port 0 selects any free port.

    Args:
        second: results of another run over the same slides, to be shown beside and as differences.
        host: address to listen on; except on the loopback addresses, clients need a token.
        slides: a folder in which slides are found by their ids, if they have moved.
        token: require a token on 127.0.0.1 too, for machines with several users.
        allow_host: names by which proxies call the server.
        remote_slides: contact other machines for slides whose URLs are in the results.
        isolate: read slides in separate processes with few permissions; None: do so unless this system does not support
            it, which is announced, or slides are already read that way.
        tls: files of a certificate and its key, in PEM; the page's address is then https://.
        annotations: a file of annotations, or a folder with a file for each slide, to be shown over slides and maps.
        mask_frame: what they were drawn on, see `in_frame`.
        read_only: store no marks or names.
        browse: open the page in a browser; the token does not appear in its command line.
        announce: called with a line that has the page's address.

    Raises:
        ResultError: there are no results.
        ConfigError: the port is in use, or the page is not installed.
    """
    if slides is not None and not slides.is_dir():
        raise ConfigError(f"--slides {slides}: expected a folder; check the path")
    secret = secrets.token_urlsafe(24) if token or not is_loopback(host) else ""
    access = Access.for_host(host, secret, allow_host)
    limits = Limits() if isolate or (isolate is None and can_confine() and limits_here() is None) else None
    with ExitStack() as opened:
        opened.enter_context(isolating(limits))
        archive = Archive(out, slides, remote_slides)
        other = None if second is None else Archive(second, slides, remote_slides)
        drawn = AnnotationFiles(archive, annotations, mask_frame)
        app = make_app(archive, access, drawn, read_only, other)
        bound = opened.enter_context(listen(host, port))
        address = f"http{'s' if tls else ''}://{url_host(host)}:{bound.getsockname()[1]}/"
        server = make_server(app, tls)
        announce(f"{address}{f'?token={secret}' if secret else ''}  (end with Ctrl-C)")
        if not tls and not is_loopback(host):
            announce(NOT_ENCRYPTED)
        if isolate is None and not can_confine():
            announce(NOT_ISOLATED)
        if browse:
            webbrowser.open(opened.enter_context(_private_address(address, access)) if secret else address)
        server.run(sockets=[bound])


@contextmanager
def _private_address(address: str, access: Access) -> Iterator[str]:
    """Return, as a context, an address for a browser's command line, which all users of the machine can read.

    It is the address of a file that nobody else can read. The file leads to the page with a code that admits one
    browser, so the token itself never enters a history. (A code in the command line could be used by another user
    first.)
    """
    code = secrets.token_urlsafe(24)
    access.codes.add(code)
    with TemporaryDirectory(prefix="wsi-gradcam-") as folder:  # mode 0700
        file = Path(folder) / "open.html"
        file.touch(0o600)
        file.write_text(redirecting_page(f"{address}?token={code}"), encoding="utf-8")
        yield file.as_uri()


def make_app(
    archive: Archive,
    access: Access,
    annotations: AnnotationFiles | None = None,
    read_only: bool = False,
    second: Archive | None = None,
) -> Starlette:
    """Return the web application of a run, with the annotations of its slides and a second run to compare it with.

    It stores marks and names unless `read_only`.
    """
    viewer = Viewer(archive, annotations or AnnotationFiles(archive, None), read_only, second)
    return Starlette(
        routes=[*page_routes(), *viewer.routes()],
        middleware=[Middleware(AccessMiddleware, access=access)],
        lifespan=viewer.lifespan,
    )


class _AnyLetters(PathConvertor):
    """Any path: Starlette's own ends at a line break, which names may contain."""

    regex = r"[\s\S]*"


register_url_convertor("letters", _AnyLetters())


class BoundedThreads:
    """Runs functions in a bounded number of threads; up to `max_waiting` callers wait their turn."""

    def __init__(self, threads: int, max_waiting: int = 256) -> None:
        self._threads, self._max_waiting = threads, max_waiting
        self._limiter: CapacityLimiter | None = None
        self._waiting = 0

    async def run(self, is_disconnected: Callable[[], Awaitable[bool]], function: Callable[[], T]) -> T:
        """Return the function's result; it is not called if the client has disconnected by the time a thread is free.

        Raises:
            BusyError: too many callers are waiting.
            DisconnectedError: the client has disconnected.
        """
        if self._limiter is None:  # made here, since it belongs to the event loop
            self._limiter = CapacityLimiter(self._threads)
        if self._waiting >= self._max_waiting:
            raise BusyError
        self._waiting += 1
        try:
            async with self._limiter:
                if await is_disconnected():
                    raise DisconnectedError
                return await to_thread.run_sync(function, limiter=CapacityLimiter(1))
        finally:
            self._waiting -= 1


class Viewer:
    """The request handlers, and the caches and threads that they share."""

    def __init__(
        self, archive: Archive, annotations: AnnotationFiles, read_only: bool = False, second: Archive | None = None
    ) -> None:
        self._comparison = Comparison(archive, second)
        self._archive, self._annotations, self._read_only = archive, annotations, read_only
        self._marks = Marks(archive.out)
        self._agreements = Agreements(annotations)
        self._images = Images(archive)
        self._evidence = EvidenceIndex(archive, read_only)
        self._top = ArchiveTop(archive, self._evidence)
        compare = None if second is None else self._comparison.scores
        self._scorer = Scorer(archive, compare, self._top.collect, self._evidence.collect)
        self._spreads = Spreads(archive)
        self._clusters = ClusterLayers(archive, lambda: self._evidence.read().state)
        self._queries = Queries(
            archive, self._spreads, self._scorer.windows, self._comparison, self._evidence, self._clusters
        )
        self._files = Files(archive)
        threads = max(2, min(8, os.cpu_count() or 2))
        # A slide in an object store may be slow: heatmaps do not wait for it.
        self._slide_threads, self._threads = BoundedThreads(threads), BoundedThreads(threads)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Score slides while the server runs, and close them afterwards."""
        self._scorer.start()
        yield
        self._scorer.stop()
        self._archive.close_slides()

    def routes(self) -> list[Route]:
        """Return all routes except the page's."""
        handlers = {
            "/api/run": self.run,
            "/api/slides": self.slides,
            "/api/slide": self.slide_by_id,
            "/api/top": self.archive_top,
            "/api/evidence": self.evidence,
            "/api/evidence/{cluster:str}": self.cluster,
            SLIDE: self.slide,
            f"{SLIDE}/annotations": self.annotations,
            f"{SLIDE}/agreement": self.agreement,
            f"{SLIDE}/marks": self.marks,
            f"{SLIDE}/values": self.values,
            f"{SLIDE}/patches/at": self.patch_at,
            f"{SLIDE}/patches/top": self.top_patches,
            f"{SLIDE}/patches/{{patch:str}}": self.patch,
            f"{TILES}/slide/{{level:str}}/{{row:str}}_{{column:str}}.jpg": self.slide_tile,
            f"{TILES}/heat/{IN_CHANNEL}": self.heatmap_tile,
            f"{TILES}/cells/{IN_CHANNEL}": self.heatmap_tile,
            f"{TILES}/heat/spread-{{spread:str}}/{IN_CHANNEL}": self.heatmap_tile,
            f"{TILES}/cells/spread-{{spread:str}}/{IN_CHANNEL}": self.heatmap_tile,
            f"{TILES}/heat/{{second:str}}-{{of:str}}/{IN_CHANNEL}": self.heatmap_tile,
            f"{TILES}/cells/{{second:str}}-{{of:str}}/{IN_CHANNEL}": self.heatmap_tile,
            f"{TILES}/patch/{{patch:str}}.jpg": self.patch_image,
            f"{TILES}/thumb.jpg": self.thumbnail,
            "/files/{path:letters}": self.file,
            "/zarr/{path:letters}": self.zarr,
        }
        routes = [Route(path, handling_errors(handler), methods=["GET"]) for path, handler in handlers.items()]
        writing = zip(WRITING, (self.mark, self.name), strict=True)
        return [*routes, *(Route(path, handling_errors(handler), methods=["POST"]) for path, handler in writing)]

    async def run(self, request: Request) -> Response:
        """Describe the run."""
        return await self._json(request, lambda: run_facts(self._archive, self._comparison.name))

    async def slides(self, request: Request) -> Response:
        """List the slides on one page of the gallery."""
        query = request.query_params

        def find() -> Any:
            return list_slides(
                self._archive.slides(),
                self._scorer.of,
                difference=self._scorer.difference,
                search=query.get("search", ""),
                status=query.get("status", ""),
                sort=query.get("sort", "name"),
                descending=query.get("order") == "down",
                offset=whole_number(query.get("offset", "0")),
                limit=whole_number(query.get("limit", "24")),
            )

        return await self._json(request, find)

    async def archive_top(self, request: Request) -> Response:
        """Return the highest patches of all slides."""
        query = request.query_params
        label, site, flag = (query.get(name, "") for name in ("class", "site", "flag"))
        count, cluster = whole_number(query.get("count", "60")), whole_number(query.get("cluster") or "0")
        return await self._json(request, lambda: self._top.top(label, site, flag, count, cluster))

    async def evidence(self, request: Request) -> Response:
        """Describe the evidence of the run: its findings and clusters."""
        return await self._json(request, self._evidence.facts)

    async def cluster(self, request: Request) -> Response:
        """Return the patches of a cluster of the evidence."""
        number, query = whole_number(request.path_params["cluster"]), request.query_params
        site, count = query.get("site", ""), whole_number(query.get("count", "60"))
        return await self._json(request, lambda: self._evidence.patches(number, site, count))

    async def slide(self, request: Request) -> Response:
        """Describe a slide."""
        key = request.path_params["key"]
        return await self._json(request, lambda: self._queries.slide(key), self._slide_threads)

    async def slide_by_id(self, request: Request) -> Response:
        """Describe the slide with an id."""
        slide_id = request.query_params.get("id", "")
        return await self._json(
            request, lambda: self._queries.slide(self._archive.find_by_id(slide_id).key), self._slide_threads
        )

    async def annotations(self, request: Request) -> Response:
        """Return the outlines of a slide's annotations, by class."""
        key = request.path_params["key"]
        data = await self._in_thread(request, lambda: self._annotations.encoded(self._archive.find(key)))
        return etag_response(request, data, "application/json")

    async def agreement(self, request: Request) -> Response:
        """Return how well each channel agrees with a class of the annotations on the whole slide."""
        key, name = request.path_params["key"], request.query_params.get("class", "")
        return await self._json(
            request, lambda: self._agreements.of(self._archive.find(key), name), self._slide_threads
        )

    async def marks(self, request: Request) -> Response:
        """Return the marks of a slide, and whether more can be made."""
        key = request.path_params["key"]

        def find() -> dict[str, Any]:
            marks = self._marks.of(self._archive.find(key).result.id)
            can_write = not self._read_only and self._marks.can_write
            return {"can_write": can_write, "kinds": KINDS, "marks": [mark_facts(mark) for mark in marks]}

        return await self._json(request, find)

    async def mark(self, request: Request) -> Response:
        """Store or remove a mark; the answer is sent once that is on disk."""
        given = await self._sent(request)

        def keep() -> dict[str, Any]:
            if isinstance(given.get("delete"), str):
                self._marks.delete(given["delete"][:64], str(given.get("by", ""))[:100])
                return {"deleted": given["delete"][:64]}
            slide = self._archive.find(str(given.get("slide")))
            mark = make_mark(slide.result.id, slide.result.plan, given)
            self._marks.add(mark)
            return mark_facts(mark)

        return await self._json(request, keep)

    async def name(self, request: Request) -> Response:
        """Give a cluster of the evidence a name; the answer is sent once that is written."""
        given = await self._sent(request)
        return await self._json(request, lambda: self._evidence.rename(given))

    async def _sent(self, request: Request) -> dict[str, Any]:
        if self._read_only:
            raise MarkError("this viewer was started with --read-only; start it without that to mark and name")
        return await sent_json(request)

    async def values(self, request: Request) -> Response:
        """Return all channels' values at a point."""
        key, (y, x) = request.path_params["key"], _point(request)
        return await self._json(request, lambda: self._queries.values(key, y, x))

    async def patch_at(self, request: Request) -> Response:
        """Return the patch at a point."""
        key, (y, x) = request.path_params["key"], _point(request)
        return await self._json(request, lambda: self._queries.patch_at(key, y, x))

    async def patch(self, request: Request) -> Response:
        """Return a patch by its number."""
        key, patch = request.path_params["key"], whole_number(request.path_params["patch"])
        return await self._json(request, lambda: self._queries.patch(key, patch))

    async def top_patches(self, request: Request) -> Response:
        """Return the patches with the highest, or lowest, values of a column."""
        key, query = request.path_params["key"], request.query_params
        column, count, lowest = query.get("by", ""), whole_number(query.get("count", "24")), query.get("order") == "up"
        return await self._json(request, lambda: self._queries.top(key, column, count, lowest))

    async def slide_tile(self, request: Request) -> Response:
        """Return a tile of the slide."""
        tile = _tile(request)
        return await self._image(request, JPEG, lambda slide: self._images.slide_tile(slide, *tile))

    async def heatmap_tile(self, request: Request) -> Response:
        """Return a tile of a channel, with its pixels enlarged smoothly (heat) or unchanged (cells)."""
        channel, tile = whole_number(request.path_params["channel"]), _tile(request)
        smooth, spread = "/heat/" in request.url.path, request.path_params.get("spread")
        second = request.path_params.get("second")

        def encode(slide: ServedSlide) -> bytes:
            layer: Layer = slide if spread is None else self._spreads.with_digest(slide, spread)
            if second == CLASSES:
                layer = Predicted.of(slide)
            elif second == CLUSTERS:
                layer = self._clusters.with_state(slide, request.path_params["of"])
            elif second is not None:
                layer = self._comparison.layer(slide, second, request.path_params["of"])
            return self._images.heatmap_tile(layer, channel, *tile, smooth)

        return await self._image(request, PNG, encode)

    async def patch_image(self, request: Request) -> Response:
        """Return a patch as the model saw it."""
        patch = whole_number(request.path_params["patch"])
        return await self._image(request, JPEG, lambda slide: self._images.patch(slide, patch))

    async def thumbnail(self, request: Request) -> Response:
        """Return the whole slide, small."""
        return await self._image(request, JPEG, self._images.thumbnail)

    async def file(self, request: Request) -> Response:
        """Return a file of the results that is intended for people."""
        return await self._in_thread(request, lambda: self._files.file(request, request.path_params["path"]))

    async def zarr(self, request: Request) -> Response:
        """Return a file of a heatmap, for other viewers on this machine."""
        return await self._in_thread(request, lambda: self._files.zarr(request, request.path_params["path"]))

    async def _json(self, request: Request, find: Callable[[], Any], threads: BoundedThreads | None = None) -> Response:
        return json_response(await self._in_thread(request, find, threads))

    async def _image(self, request: Request, media_type: str, encode: Callable[[ServedSlide], bytes]) -> Response:
        """Return an image of a slide (JPEG) or of its heatmap (PNG), immutable unless results may still change."""
        key, version = request.path_params["key"], request.path_params["version"]

        def find() -> tuple[bytes, bool]:
            slide = self._archive.find(key)
            return encode(slide), version == slide.version and (media_type == JPEG or slide.is_final)

        threads = self._slide_threads if media_type == JPEG else self._threads
        data, immutable = await self._in_thread(request, find, threads)
        return image_response(data, media_type, immutable)

    async def _in_thread(self, request: Request, function: Callable[[], T], threads: BoundedThreads | None = None) -> T:
        return await (threads or self._threads).run(request.is_disconnected, function)


def _tile(request: Request) -> tuple[int, int, int]:
    level, row, column = (whole_number(request.path_params[name]) for name in ("level", "row", "column"))
    return level, row, column


def _point(request: Request) -> tuple[float, float]:
    return coordinate(request.query_params.get("y", "")), coordinate(request.query_params.get("x", ""))
