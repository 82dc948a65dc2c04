"""The slides of a run as the server knows them, and the gallery that lists them.

They have short keys and are reread while the run continues; files outside OUT are never served, not even through links.
The gallery searches, sorts and lists them page by page, with scores computed in the background.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import NotShownError, OutsideError, SlideNotFoundError, WsiGradcamError, as_path
from wsi_gradcam.io.cache import ResourcePool
from wsi_gradcam.io.local import LocalPath, alike
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.run import open_result
from wsi_gradcam.results.slide import slide_scores
from wsi_gradcam.slides import open_slide

if TYPE_CHECKING:
    from os import PathLike

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.run import Result
    from wsi_gradcam.results.slide import Scores, SlideResult
    from wsi_gradcam.slides import Slide


REFRESH_S = 5.0
MAX_OPEN = 8
MAX_LISTED = 200
RESCAN_S = 10.0
STOPPED_S = 2.0  # the windows of an archive take longer


@dataclass(frozen=True)
class ServedSlide:
    """A slide of the run.

    Attributes:
        key: replaces its id in addresses, so that no path of a request is ever part of a path on disk.
        version: changes when the slide is explained again; part of the addresses of immutable images.
    """

    key: str
    version: str
    result: SlideResult

    @property
    def is_final(self) -> bool:
        """Return whether the slide's results can no longer change, so that they may be cached."""
        return self.result.is_finished


class Archive:
    """All slides of a run, a few of them open. Safe to share between threads."""

    def __init__(
        self, out: str | PathLike[str], slides_folder: Path | None = None, remote_slides: bool = False
    ) -> None:
        """Open the results in `out`; a slide found in `slides_folder` under its id is read from there.

        Slides whose URLs are in the results are requested only with `remote_slides`.

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
        """Return the slide with a key, after checking that no link in its folder leads out of OUT.

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
        """Return the slide with an id, or one whose id is not valid text and is displayed so; otherwise as `find`."""
        if (key := slide_key(slide_id)) in self._slides:
            return self.find(key)
        similar = (s.key for s in self.slides() if slide_id in (valid_text(s.result.id), _as_in_address(s.result.id)))
        return self.find(next(similar, key))

    def borrow_slide(self, slide: ServedSlide) -> AbstractContextManager[Slide]:
        """Open the slide's image, even if it failed before it had a plan; it stays open within the context.

        Raises:
            SlideError: on entering, if the file is gone or has been replaced by another.
        """
        return self._open.borrow(f"{slide.key} {slide.version}", lambda: _open_slide(slide.result))

    def close_slides(self) -> None:
        """Close the slides that nobody is using."""
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
        return open_slide(result.address)
    return result.open_slide()


def slide_key(slide_id: str) -> str:
    """Return the key that replaces a slide's id in addresses."""
    return _digest(slide_id)[:16]


def valid_text(text: str) -> str:
    """Return text that JSON can represent: file names that are not UTF-8 contain surrogates, which become "?"."""
    return text.encode("utf-8", "replace").decode()


def _as_in_address(text: str) -> str:
    """Return a file name as it is decoded from an address."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# A part of a path below OUT that a request may name. Nothing hidden, relative or odd is ever served.
PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", re.ASCII)
MAX_PATH_PARTS = 12


def path_below(folder: StoragePath, name: str) -> StoragePath:
    """Return the path below a folder that a request names.

    Raises:
        NotShownError: the path has parts that none of our files have.
    """
    parts = name.split("/")
    if len(parts) > MAX_PATH_PARTS or not all(PATH_PART.fullmatch(part) for part in parts):
        raise NotShownError("no such file")
    return folder / name


def check_inside(out: StoragePath, path: StoragePath) -> None:
    """Check that a file or folder is below OUT after following all links; object stores have no links.

    Raises:
        OutsideError: it is not below OUT.
    """
    if isinstance(out, LocalPath) and isinstance(path, LocalPath):
        _check_link(out.path.resolve(), path.path)


def check_tree(out: StoragePath, folder: StoragePath) -> None:
    """Check everything below a folder, for readers that open files in it on their own.

    Raises:
        OutsideError: a link leads out of OUT.
    """
    if not (isinstance(out, LocalPath) and isinstance(folder, LocalPath)):
        return
    root = out.path.resolve()
    _check_link(root, folder.path)
    waiting = [folder.path]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            if entry.is_symlink():
                _check_link(root, Path(entry.path))
            elif entry.is_dir():
                waiting.append(Path(entry.path))


def _check_link(root: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(root):
        raise OutsideError(f"{path.name}: a link that leads out of the results; copy the file there instead")


class Scorer:
    """Computes each finished slide's scores in a separate thread: reading the tables of an archive takes minutes."""

    def __init__(
        self,
        archive: Archive,
        compare: Callable[[ServedSlide], dict[str, float]] | None = None,
        collect: Callable[[ServedSlide], None] = lambda _: None,
        look: Callable[[ServedSlide], None] = lambda _: None,
    ) -> None:
        """Score the slides of an archive.

        Args:
            compare: returns how much a second run differs on a slide.
            collect: called with each slide that has been scored.
            look: called with each slide again and again, as what it looks for may appear or change while the viewer
                runs.
        """
        self._archive, self._compare, self._collect, self._look = archive, compare, collect, look
        self._scores: dict[tuple[str, str], Scores] = {}
        self._differences: dict[tuple[str, str], dict[str, float]] = {}
        self._stop = threading.Event()
        self._windows_ready = threading.Event()
        self._windows: dict[str, tuple[float, float]] = {}
        self._thread = threading.Thread(target=self._score_all, name="scores", daemon=True)

    def windows(self, wait_s: float = 2.0) -> dict[str, tuple[float, float]]:
        """Return the display windows shared by all slides, by channel; empty while they are being computed."""
        self._windows_ready.wait(wait_s)
        return self._windows

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, which ends after the current slide; known scores are kept."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOPPED_S)

    def of(self, slide: ServedSlide) -> Scores | None:
        """Return `share` and `top` by class, as `slide_scores` does; None while they are unknown."""
        return self._scores.get((slide.key, slide.version))

    def difference(self, slide: ServedSlide) -> dict[str, float]:
        """Return how much a second run differs on a slide; empty if, or while, that is unknown."""
        return self._differences.get((slide.key, slide.version), {})

    def _score_all(self) -> None:
        while True:
            with suppress(WsiGradcamError, OSError, ValueError, LookupError):
                self._windows = self._archive.result.windows()
            self._windows_ready.set()
            for slide in self._archive.slides():
                if self._stop.is_set():
                    return
                self._score(slide)
                with suppress(WsiGradcamError, OSError, ValueError, LookupError):
                    self._look(slide)
                self._score_difference(slide)
            if self._stop.wait(RESCAN_S):  # the run may continue
                return

    def _score(self, slide: ServedSlide) -> None:
        if (slide.key, slide.version) in self._scores or status_of(slide) != SlideStatus.OK:
            return
        try:
            self._archive.find(slide.key)  # checks its links
            self._scores[slide.key, slide.version] = slide_scores(slide.result, self._archive.result.classes)
            self._collect(slide)
        except (WsiGradcamError, OSError, ValueError, LookupError):  # opening the slide reports the problem
            self._scores[slide.key, slide.version] = {}

    def _score_difference(self, slide: ServedSlide) -> None:
        if self._compare is None or (slide.key, slide.version) in self._differences or not slide.is_final:
            return
        found: dict[str, float] = {}
        with suppress(WsiGradcamError, OSError, ValueError, LookupError):  # opening the slide reports the problem
            found = self._compare(self._archive.find(slide.key))
        self._differences[slide.key, slide.version] = found


def list_slides(
    slides: list[ServedSlide],
    scores: Callable[[ServedSlide], Scores | None],
    *,
    difference: Callable[[ServedSlide], dict[str, float]],
    search: str = "",
    status: str = "",
    sort: str = "name",
    descending: bool = False,
    offset: int = 0,
    limit: int = 24,
) -> dict[str, Any]:
    """Return some of the slides whose ids contain all words of `search`, and the number of all of them, as JSON.

    `sort` is `name`, `status`, `patches`, `share:CLASS`, `top:CLASS`, for slide-level models also `answer:CLASS`, and
    with a second run `difference:maps` or `difference:probabilities`; slides without the number come last.
    """
    words = search.lower().split()
    found = [
        slide
        for slide in slides
        if all(word in slide.result.id.lower() for word in words) and status in ("", status_of(slide))
    ]
    key = _sort_key(sort, scores, difference)
    ranked = sorted((slide for slide in found if key(slide) is not None), key=key, reverse=descending)
    ranked += [slide for slide in found if key(slide) is None]
    page = ranked[max(0, offset) : max(0, offset) + min(max(1, limit), MAX_LISTED)]
    return {
        "total": len(slides),
        "found": len(found),
        "scored": sum(scores(slide) is not None for slide in slides),
        "counts": dict(Counter(map(status_of, slides))),
        "slides": [_row(slide, scores(slide)) | {"difference": difference(slide)} for slide in page],
    }


def _sort_key(
    sort: str, scores: Callable[[ServedSlide], Scores | None], difference: Callable[[ServedSlide], dict[str, float]]
) -> Callable[[ServedSlide], Any]:
    kind, _, label = sort.partition(":")
    if kind in ("share", "top"):
        return lambda slide: (scores(slide) or {}).get(label, {}).get(kind)
    if kind == "answer":
        return lambda slide: slide.result.slide_logits.get(label)
    if kind == "difference":
        return lambda slide: difference(slide).get(label)
    if kind == "patches":
        return lambda slide: int(slide.result.row.get("patches") or 0)
    if kind == "status":
        return lambda slide: (status_of(slide), slide.result.id)
    return lambda slide: slide.result.id


def _row(slide: ServedSlide, scores: Scores | None) -> dict[str, Any]:
    result = slide.result
    return {
        "key": slide.key,
        "version": slide.version,
        "id": valid_text(result.id),
        "status": status_of(slide),
        "error": valid_text(result.error),
        "patches": int(result.row.get("patches") or 0),
        "unreadable": int(result.row.get("unreadable") or 0),
        "answer": answer_of(result),
        "scores": scores,
    }


def answer_of(result: SlideResult) -> list[dict[str, Any]]:
    """Return a slide-level model's answer for the slide, by class, as JSON values; empty if there is none."""
    logits, shares = result.slide_logits, result.slide_probabilities
    return [{"label": valid_text(n), "logit": logits.get(n), "probability": shares[n]} for n in shares]


def status_of(slide: ServedSlide) -> str:
    """Return the status in slides.csv; looking into the folder of each slide of an archive would take minutes."""
    return slide.result.row.get("status") or SlideStatus.UNFINISHED
