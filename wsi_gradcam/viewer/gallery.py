"""The gallery: slides searched, sorted and listed by pages, with scores that are computed in the background."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import WsiGradcamError
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.viewer.archive import valid_text

if TYPE_CHECKING:
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.viewer.archive import Archive, ServedSlide

MAX_LISTED = 200
TOP = 10  # patches whose mean probability is a score of the slide
RESCAN_S = 10.0
STOPPED_S = 2.0  # the windows of an archive take longer
Scores = dict[str, dict[str, float]]


class Scorer:
    """Computes each finished slide's scores in a thread of its own: reading the tables of an archive takes minutes."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._scores: dict[tuple[str, str], Scores] = {}
        self._stop = threading.Event()
        self._windows_ready = threading.Event()
        self._windows: dict[str, tuple[float, float]] = {}
        self._thread = threading.Thread(target=self._score_all, name="scores", daemon=True)

    def windows(self, wait_s: float = 2.0) -> dict[str, tuple[float, float]]:
        """Return the display windows that all slides share, by channel; empty while they are being computed."""
        self._windows_ready.wait(wait_s)
        return self._windows

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, which ends with the slide in work; known scores are kept."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOPPED_S)

    def of(self, slide: ServedSlide) -> Scores | None:
        """Return `share` and `top` by class, as `slide_scores` does; None while they are not known."""
        return self._scores.get((slide.key, slide.version))

    def _score_all(self) -> None:
        while True:
            with suppress(WsiGradcamError, OSError, ValueError, LookupError):
                self._windows = self._archive.result.windows()
            self._windows_ready.set()
            for slide in self._archive.slides():
                if self._stop.is_set():
                    return
                self._score(slide)
            if self._stop.wait(RESCAN_S):  # the run may go on
                return

    def _score(self, slide: ServedSlide) -> None:
        if (slide.key, slide.version) in self._scores or status_of(slide) != SlideStatus.OK:
            return
        try:
            self._archive.find(slide.key)  # checks its links
            self._scores[slide.key, slide.version] = slide_scores(slide.result, self._archive.result.classes)
        except (WsiGradcamError, OSError, ValueError, LookupError):  # opening the slide reports the problem
            self._scores[slide.key, slide.version] = {}


def slide_scores(result: SlideResult, classes: list[str]) -> Scores:
    """Return a slide's scores by class, from its table of patches.

    `share` is the share of the patches whose most probable class it is, `top` the mean probability of the ten highest.
    """
    names = [f"probability_{label}" for label in classes]
    table = result.table(names)
    values = np.stack([np.asarray(table.column(name).to_numpy(), np.float64) for name in names])
    values = values[:, ~np.isnan(values).any(axis=0)]
    if not values.shape[1]:
        return {}
    winners = np.bincount(values.argmax(axis=0), minlength=len(names)) / values.shape[1]
    tops = np.sort(values, axis=1)[:, -TOP:].mean(axis=1)
    return {
        label: {"share": float(share), "top": float(top)}
        for label, share, top in zip(classes, winners, tops, strict=True)
    }


def list_slides(
    slides: list[ServedSlide],
    scores: Callable[[ServedSlide], Scores | None],
    *,
    search: str = "",
    status: str = "",
    sort: str = "name",
    descending: bool = False,
    offset: int = 0,
    limit: int = 24,
) -> dict[str, Any]:
    """Return some of the slides whose ids contain all words of `search`, and the number of all of them, as JSON.

    `sort` is `name`, `status`, `patches`, `share:CLASS` or `top:CLASS`; slides without the number come last.
    """
    words = search.lower().split()
    found = [
        slide
        for slide in slides
        if all(word in slide.result.id.lower() for word in words) and status in ("", status_of(slide))
    ]
    key = _sort_key(sort, scores)
    ranked = sorted((slide for slide in found if key(slide) is not None), key=key, reverse=descending)
    ranked += [slide for slide in found if key(slide) is None]
    page = ranked[max(0, offset) : max(0, offset) + min(max(1, limit), MAX_LISTED)]
    return {
        "total": len(slides),
        "found": len(found),
        "scored": sum(scores(slide) is not None for slide in slides),
        "counts": dict(Counter(map(status_of, slides))),
        "slides": [_row(slide, scores(slide)) for slide in page],
    }


def _sort_key(sort: str, scores: Callable[[ServedSlide], Scores | None]) -> Callable[[ServedSlide], Any]:
    kind, _, label = sort.partition(":")
    if kind in ("share", "top"):
        return lambda slide: (scores(slide) or {}).get(label, {}).get(kind)
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
        "scores": scores,
    }


def status_of(slide: ServedSlide) -> str:
    """Return the status in slides.csv; looking into the folder of each slide of an archive would take minutes."""
    return slide.result.row.get("status") or SlideStatus.UNFINISHED
