"""The slides of a run as the server knows them: by short keys, and reread while the run goes on."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_gradcam.errors import NotShownError, SlideNotFoundError, WsiGradcamError, as_path
from wsi_gradcam.io.cache import ResourcePool
from wsi_gradcam.io.paths import alike
from wsi_gradcam.results.run import open_result
from wsi_gradcam.slides import open_slide
from wsi_gradcam.viewer.security import check_tree

if TYPE_CHECKING:
    from os import PathLike

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.run import Result
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.slides import Slide

REFRESH_S = 5.0
MAX_OPEN = 8


@dataclass(frozen=True)
class ServedSlide:
    """A slide of the run.

    Attributes:
        key: replaces its id in addresses: no path of a request is ever part of a path on the disk.
        version: changes when the slide is explained again; part of the addresses of immutable images.
    """

    key: str
    version: str
    result: SlideResult

    @property
    def is_final(self) -> bool:
        """Return whether the slide's results will not change any more, so that they may be cached."""
        return self.result.is_finished


class Archive:
    """All slides of a run, a few of them open. Safe to share between threads."""

    def __init__(
        self, out: str | PathLike[str], slides_folder: Path | None = None, remote_slides: bool = False
    ) -> None:
        """Open the results in `out`; a slide that is in `slides_folder` under its id is taken from there.

        Slides that the results name by URLs are asked for with `remote_slides` only.

        Raises:
            ResultError: there are no results.
        """
        self._given, self._slides_folder, self._remote_slides = out, slides_folder, remote_slides
        self._lock = threading.Lock()
        self._open: ResourcePool[str, Slide] = ResourcePool(MAX_OPEN, lambda opened: opened.close())
        self._checked: set[tuple[str, str]] = set()
        self._refreshed_at, self._known_size = 0.0, -1
        self._read()

    @property
    def result(self) -> Result:
        """Return the results of the run."""
        return self._result

    @property
    def out(self) -> StoragePath:
        """Return the run's folder."""
        return self._result.folder.place

    def slides(self) -> list[ServedSlide]:
        """Return all slides, in the run's order."""
        self._refresh()
        return list(self._slides.values())

    def find(self, key: str) -> ServedSlide:
        """Return the slide with a key, after a check that no link in its folder leads out of OUT.

        Raises:
            NotShownError: there is no such slide.
            OutsideError: a link leads out of OUT.
        """
        slide = self._slides.get(key)
        if slide is None:
            self._refresh()
            slide = self._slides.get(key)
        if slide is None:
            raise NotShownError("no such slide in this run")
        if (key, slide.version) not in self._checked:
            check_tree(self.out, slide.result.folder.place)
            self._checked.add((key, slide.version))
        return slide

    def find_by_id(self, slide_id: str) -> ServedSlide:
        """Return the slide with an id, or one whose id is not valid text and is displayed so; else as `find`."""
        if (key := slide_key(slide_id)) in self._slides:
            return self.find(key)
        similar = (s.key for s in self.slides() if slide_id in (valid_text(s.result.id), _as_in_address(s.result.id)))
        return self.find(next(similar, key))

    def borrow_slide(self, slide: ServedSlide) -> AbstractContextManager[Slide]:
        """Open the slide's image, also of one that failed before it had a plan; it stays open in the context.

        Raises:
            SlideError: on entering; the file is gone, or another file is in its place.
        """
        return self._open.borrow(f"{slide.key} {slide.version}", lambda: _open_slide(slide.result))

    def close_slides(self) -> None:
        """Close the slides that nobody uses."""
        self._open.close()

    def _refresh(self) -> None:
        """Reread the list of slides if it has changed, at most every few seconds."""
        now = time.monotonic()
        with self._lock:
            if now - self._refreshed_at < REFRESH_S:
                return
            self._refreshed_at = now
            if self._size() != self._known_size:
                self._read()

    def _read(self) -> None:
        self._refreshed_at, result = time.monotonic(), open_result(self._given, remote_slides=self._remote_slides)
        self._result = result
        self._known_size = self._size()
        self._slides = {slide.key: slide for slide in map(self._served, result)}

    def _served(self, result: SlideResult) -> ServedSlide:
        if self._slides_folder is not None and (moved := alike(self._slides_folder, as_path(result.id))):
            result.path = str(moved[0])
        known = json.dumps([result.row, result.path], sort_keys=True)
        return ServedSlide(slide_key(result.id), _digest(known)[:12], result)

    def _size(self) -> int:
        try:
            return self._result.folder.slides.size()
        except FileNotFoundError:
            return -1


def _open_slide(result: SlideResult) -> Slide:
    try:
        _ = result.plan
    except WsiGradcamError:
        if not result.path:
            raise SlideNotFoundError(f"{result.id}: its path is not known yet") from None
        result.check_path()
        return open_slide(result.path)
    return result.open_slide()


def slide_key(slide_id: str) -> str:
    """Return the key that replaces a slide's id in addresses."""
    return _digest(slide_id)[:16]


def valid_text(text: str) -> str:
    """Return text that JSON can hold: file names that are not UTF-8 contain surrogates, which become "?"."""
    return text.encode("utf-8", "replace").decode()


def _as_in_address(text: str) -> str:
    """Return a file name as it is decoded from an address."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
