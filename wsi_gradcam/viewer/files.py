"""Files of the results that are handed out as they are: overviews, audit reports, and heatmaps by ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi_gradcam.errors import NotShownError, StoreError, WsiGradcamError
from wsi_gradcam.viewer.answers import ranged, unchanged_or
from wsi_gradcam.viewer.inside import below, check_inside

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from wsi_gradcam.stores.places import Place
    from wsi_gradcam.viewer.archive import Archive

HEATMAP = "heatmap.ome.zarr"
KINDS = {
    "html": "text/html; charset=utf-8",
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "png": "image/png",
    "jpg": "image/jpeg",
    "svg": "image/svg+xml",
    "css": "text/css; charset=utf-8",
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

    def file(self, request: Request, key: str, path: str) -> Response:
        """A file of the audit of a slide, or with the key `run` of the whole run; `overview.png`; the run's `run.html`.

        Raises:
            NotShownError: there is none.
            OutsideError: it is not below OUT.
        """
        folder = self._archive.out if key == "run" else self._archive.find(key).result.folder.place
        kind = KINDS.get(path.rpartition(".")[2].lower())
        if kind is None:
            raise NotShownError("no such file")
        is_beside = path == ("run.html" if key == "run" else "overview.png")
        place = below(folder if is_beside else folder / "audit", path)
        check_inside(self._archive.out, place)
        return unchanged_or(request, self._read(place), kind, {"Content-Security-Policy": REPORT_POLICY})

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

    def _read(self, place: Place) -> bytes:
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
