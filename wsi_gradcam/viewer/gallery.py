"""The list of slides: searched, sorted, a page at a time, with scores that are found in the background."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import WsiGradcamError
from wsi_gradcam.results.slide import UNFINISHED
from wsi_gradcam.viewer.archive import shown_name

if TYPE_CHECKING:
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.viewer.archive import Archive, Shown

MOST_LISTED = 200
TOP = 10  # patches whose mean probability is a slide's score
Scores = dict[str, dict[str, float]]


class Scorer:
    """Finds each finished slide's scores in a thread of its own: reading the tables of an archive takes minutes."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._known: dict[tuple[str, str], Scores] = {}
        self._stop = threading.Event()
        self._found = threading.Event()
        self._windows: dict[str, tuple[float, float]] = {}
        self._thread = threading.Thread(target=self._find_all, name="scores", daemon=True)

    def windows(self, wait_s: float = 2.0) -> dict[str, tuple[float, float]]:
        """The display windows that are the same for all slides, by channel; empty while they are not found yet."""
        self._found.wait(wait_s)
        return self._windows

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is known stays."""
        self._stop.set()

    def of(self, shown: Shown) -> Scores | None:
        """By class: `share` of the patches that are given to it, and `top`, the mean probability of the ten highest."""
        return self._known.get((shown.key, shown.version))

    def _find_all(self) -> None:
        while True:
            with suppress(WsiGradcamError, OSError, ValueError):
                self._windows = self._archive.result.windows()
            self._found.set()
            for shown in self._archive.slides():
                if self._stop.is_set():
                    return
                self._find(shown)
            if self._stop.wait(10):  # a run that goes on
                return

    def _find(self, shown: Shown) -> None:
        if (shown.key, shown.version) in self._known or status_of(shown) != "ok":
            return
        try:
            self._archive.find(shown.key)  # checks its links
            self._known[shown.key, shown.version] = scores_of(shown.result, self._archive.result.classes)
        except (WsiGradcamError, OSError, ValueError):  # the slide itself says what is wrong, when it is opened
            self._known[shown.key, shown.version] = {}


def scores_of(result: SlideResult, classes: list[str]) -> Scores:
    """Scores of a slide from its table, by class."""
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


def listing(
    slides: list[Shown],
    scores: Callable[[Shown], Scores | None],
    *,
    search: str = "",
    status: str = "",
    sort: str = "name",
    descending: bool = False,
    offset: int = 0,
    limit: int = 24,
) -> dict[str, Any]:
    """A page of the slides whose ids have all words of `search`, and how many there are.

    `sort` is `name`, `status`, `patches`, `share:CLASS` or `top:CLASS`; slides without the number come last.
    """
    words = search.lower().split()
    counts = Counter(status_of(shown) for shown in slides)
    found = [
        shown
        for shown in slides
        if all(word in shown.result.id.lower() for word in words) and status in ("", status_of(shown))
    ]
    key = _sort_key(sort, scores)
    ranked = sorted((s for s in found if key(s) is not None), key=key, reverse=descending)
    ranked += [shown for shown in found if key(shown) is None]
    page = ranked[max(0, offset) : max(0, offset) + min(max(1, limit), MOST_LISTED)]
    return {
        "total": len(slides),
        "found": len(found),
        "scored": sum(scores(shown) is not None for shown in slides),
        "counts": dict(counts),
        "slides": [_row(shown, scores(shown)) for shown in page],
    }


def _sort_key(sort: str, scores: Callable[[Shown], Scores | None]) -> Callable[[Shown], Any]:
    kind, _, label = sort.partition(":")
    if kind in ("share", "top"):
        return lambda shown: (scores(shown) or {}).get(label, {}).get(kind)
    if kind == "patches":
        return lambda shown: int(shown.result.row.get("patches") or 0)
    if kind == "status":
        return lambda shown: (status_of(shown), shown.result.id)
    return lambda shown: shown.result.id


def _row(shown: Shown, scores: Scores | None) -> dict[str, Any]:
    result = shown.result
    return {
        "key": shown.key,
        "version": shown.version,
        "id": shown_name(result.id),
        "status": status_of(shown),
        "error": shown_name(result.error),
        "patches": int(result.row.get("patches") or 0),
        "unreadable": int(result.row.get("unreadable") or 0),
        "scores": scores,
    }


def status_of(shown: Shown) -> str:
    """As slides.csv says; looking into the folder of each slide of an archive would take minutes."""
    return shown.result.row.get("status") or UNFINISHED
