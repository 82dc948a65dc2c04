"""The run as the server shows it: its slides by short keys, read anew when the run has gone on."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_gradcam.errors import NotShownError, SlideNotFoundError, WsiGradcamError
from wsi_gradcam.results.run import open_result
from wsi_gradcam.slides import open_slide
from wsi_gradcam.viewer.inside import check_tree

if TYPE_CHECKING:
    from os import PathLike

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.run import Result
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.slides import Slide

LOOK_AGAIN_S = 5.0


@dataclass(frozen=True)
class Shown:
    """A slide of the run.

    Attributes:
        key: stands for its id in addresses: no path of a request is ever part of a path on the disk.
        version: changes when the slide is explained anew; part of addresses of what browsers may keep for ever.
    """

    key: str
    version: str
    result: SlideResult

    @property
    def is_kept(self) -> bool:
        """Whether what is read of it stays as it is."""
        return self.result.is_finished


class Archive:
    """All slides of a run. Safe to share between threads."""

    def __init__(self, out: str | PathLike[str], slides_folder: Path | None = None) -> None:
        """Open the results in `out`; a slide that is in `slides_folder` under its id is taken from there.

        Raises:
            ResultError: there are none.
        """
        self._given, self._slides_folder = out, slides_folder
        self._lock = threading.Lock()
        self._checked: set[tuple[str, str]] = set()
        self._looked_at, self._known_size = 0.0, -1
        self._read()

    @property
    def result(self) -> Result:
        """The run."""
        return self._result

    @property
    def out(self) -> StoragePath:
        """The run's folder."""
        return self._result.folder.place

    def slides(self) -> list[Shown]:
        """All slides, in the run's order."""
        self._refresh()
        return list(self._shown.values())

    def find(self, key: str) -> Shown:
        """The slide of a key, after a check that no link in its folder leads out of OUT.

        Raises:
            NotShownError: there is none.
            OutsideError: a link does.
        """
        shown = self._shown.get(key)
        if shown is None:
            self._refresh()
            shown = self._shown.get(key)
        if shown is None:
            raise NotShownError("no such slide in this run")
        if (key, shown.version) not in self._checked:
            check_tree(self.out, shown.result.folder.place)
            self._checked.add((key, shown.version))
        return shown

    def named(self, slide_id: str) -> Shown:
        """The slide with an id, or with one that looks so where it is no text; otherwise as `find`."""
        if (key := key_of(slide_id)) in self._shown:
            return self.find(key)
        similar = (s.key for s in self.slides() if slide_id in (shown_name(s.result.id), _addressed(s.result.id)))
        return self.find(next(similar, key))

    def open_slide(self, shown: Shown) -> Slide:
        """The slide itself; also of one that failed before it had a plan.

        Raises:
            SlideError: it is not there any more, or another file is.
        """
        try:
            _ = shown.result.plan
        except WsiGradcamError:
            if not shown.result.path:
                raise SlideNotFoundError(f"{shown.result.id}: its path is not known yet") from None
            return open_slide(shown.result.path)
        return shown.result.open_slide()

    def _refresh(self) -> None:
        """Read the list of slides anew if it has changed, and not all the time."""
        now = time.monotonic()
        with self._lock:
            if now - self._looked_at < LOOK_AGAIN_S:
                return
            self._looked_at = now
            if self._size() != self._known_size:
                self._read()

    def _read(self) -> None:
        self._looked_at, result = time.monotonic(), open_result(self._given)
        self._result = result
        self._known_size = self._size()
        self._shown = {shown.key: shown for shown in map(self._as_shown, result)}

    def _as_shown(self, result: SlideResult) -> Shown:
        if self._slides_folder is not None:
            moved = self._slides_folder / result.id
            if moved.exists():
                result.path = str(moved)
        known = json.dumps([result.row, result.path], sort_keys=True)
        return Shown(key_of(result.id), _digest(known)[:12], result)

    def _size(self) -> int:
        try:
            return self._result.folder.slides.size()
        except FileNotFoundError:
            return -1


def key_of(slide_id: str) -> str:
    """What stands for a slide's id in addresses."""
    return _digest(slide_id)[:16]


def shown_name(text: str) -> str:
    """Text for JSON: file names that are not UTF-8 have surrogates in them."""
    return text.encode("utf-8", "replace").decode()


def _addressed(text: str) -> str:
    """What a file name has become after it was part of an address."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
