"""What a piece of work is, and what a process keeps from one to the next."""

from __future__ import annotations

import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from wsi_gradcam.errors import ResumeError, StoreError
from wsi_gradcam.models.environment import steady_sums
from wsi_gradcam.results.heatmap import HeatmapStore
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.patch_store import PatchStore
from wsi_gradcam.results.run_files import RunFolder, SlideFolder
from wsi_gradcam.slides import thumbnail
from wsi_gradcam.slides.patch_reader import PatchReader, open_entry
from wsi_gradcam.system.isolation import WATCH
from wsi_gradcam.system.memory import share_arenas
from wsi_gradcam.tissue.masks import glass_colour

if TYPE_CHECKING:
    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.run.plan import RunPlan
    from wsi_gradcam.slides import Slide

T = TypeVar("T")

RUN_MODEL = frozenset({"explain", "audit"})  # the stages that want the run's device
GLANCE_PX = 512  # of a slide, to find the colour of its glass
KEPT_OPEN = 2  # the slide in work and the next one
KEPT_STORES = 4  # of each kind: what opens one is known from then on


@dataclass(frozen=True)
class Task:
    """A piece of work: the name of a stage, a slide, and the piece's numbers."""

    stage: str
    slide: SlideEntry
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class Explained:
    """What explaining a span took.

    Attributes:
        patches: how many there were.
        waited_s: seconds that the model waited for pixels.
        model_s: seconds of the model, and of preparing its input.
        read_s: seconds that threads spent reading patches, summed over the threads.
    """

    patches: int
    waited_s: float = 0.0
    model_s: float = 0.0
    read_s: float = 0.0


@dataclass(frozen=True)
class Audited:
    """A piece of an audit: how many patches it has, and how many of them could not be read."""

    patches: int
    unreadable: int = 0


@dataclass(frozen=True)
class Performed:
    """An attempt at a task: what came of it, how long it took, and which process did it.

    Attributes:
        result: the stage's small result; None after an error.
        seconds: wall time.
        worker: the process, as `host:process id`.
        error: why it failed, on one line; "" where it did not.
        again: whether the task is tried once more after the error.
    """

    result: Any
    seconds: float = 0.0
    worker: str = ""
    error: str = ""
    again: bool = False


class Context:
    """What a process keeps between tasks: the model and the slides it has open."""

    def __init__(self, run: RunPlan, overwrite: bool = False, model: Explainer | None = None) -> None:
        share_arenas()
        self.run = run
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self._overwrite = overwrite
        self._lock = threading.Lock()
        self._model = model
        self._slides: dict[SlideEntry, _Opened] = {}
        self._patches: OrderedDict[str, PatchStore] = OrderedDict()
        self._heatmaps: OrderedDict[str, HeatmapStore] = OrderedDict()
        self._one_at_a_time = threading.Lock()
        self._subject: Any = None
        self._glass: dict[str, tuple[int, int, int]] = {}

    def model(self) -> Explainer:
        """The run's model, loaded on first use unless it was given."""
        with self._lock:
            if self._model is None:
                steady_sums()
                from wsi_gradcam.cam.explainer import Explainer

                self._model = Explainer.load(self.run.spec, self.run.facts, self.run.settings.device)
            return self._model

    @contextmanager
    def alone(self, make: Callable[[], T]) -> Iterator[T]:
        """What `make` made on first use, such as a model under audit; one thread at a time has it."""
        with self._one_at_a_time:
            if self._subject is None:
                self._subject = make()
            yield self._subject

    def glass(self, entry: SlideEntry) -> tuple[int, int, int]:
        """The colour of the slide's bare glass, RGB; of a slide without glass white."""
        if entry.id not in self._glass:
            with self.slide(entry) as slide:
                self._glass[entry.id] = glass_colour(thumbnail(slide, 0.0, GLANCE_PX).rgb)
        return self._glass[entry.id]

    def overwrites(self, entry: SlideEntry) -> bool:
        """Whether results of the slide are made anew, if it has any: not those that this very run has finished."""
        return self._overwrite and entry.path not in WATCH.finished_before

    @contextmanager
    def slide(self, entry: SlideEntry) -> Iterator[Slide]:
        """The slide, opened on first use. The last few stay open for the next tasks.

        Threads of one process may work on different slides: what one of them reads is never closed.
        """
        with self._lock:
            opened = self._slides.pop(entry, None)
            if opened is None:
                self._close_unused(KEPT_OPEN - 1)
                opened = _Opened(open_entry(entry, self.run.settings))
            self._slides[entry] = opened  # the last one
            opened.users += 1
        try:
            yield opened.slide
        finally:
            with self._lock:
                opened.users -= 1

    @contextmanager
    def patches(self, entry: SlideEntry) -> Iterator[PatchReader]:
        """What reads the slide's patches; it stays as long as the slide is open."""
        run = self.run
        with self.slide(entry) as slide:
            with self._lock:
                opened = self._slides[entry]
                if opened.reader is None:
                    size, threads = run.facts.batch_size, run.settings.reader_threads
                    opened.reader = PatchReader(slide, run.patch_px, run.mpp, size, threads)
            yield opened.reader

    def close(self) -> None:
        """Release the slides that nobody uses."""
        with self._lock:
            self._close_unused(0)

    def folder(self, entry: SlideEntry) -> SlideFolder:
        """Where the slide's results are."""
        return RunFolder(self.run.out).slide(entry.id)

    def patch_store(self, entry: SlideEntry) -> PatchStore:
        """The slide's patch store; the last few stay known."""
        return self._known(self._patches, entry, lambda folder: PatchStore(folder.cams))

    def heatmap(self, entry: SlideEntry) -> HeatmapStore:
        """The slide's heatmap; the last few stay known."""
        return self._known(self._heatmaps, entry, lambda folder: HeatmapStore(folder.heatmap))

    def forget_stores(self, entry: SlideEntry) -> None:
        """To be called where the slide's stores are made anew."""
        with self._lock:
            self._patches.pop(entry.id, None)
            self._heatmaps.pop(entry.id, None)

    def plan(self, entry: SlideEntry) -> SlidePlan:
        """The slide's plan, as `plan_slide` stored it.

        Raises:
            StoreError: this process does not see it.
            ResumeError: another run has replaced it meanwhile.
        """
        folder = self.folder(entry)
        plan = Manifest(folder.manifest).plan()
        if plan is None:
            raise StoreError(
                f"{folder.manifest}: no plan to be seen there; --out must be a folder that all workers share, or in an "
                "object store"
            )
        if plan.run_digest != self.run.digest():
            raise ResumeError(
                f"{folder.place}: another run has begun there meanwhile; let one run at a time use an --out"
            )
        return plan

    def _known(self, kept: OrderedDict[str, T], entry: SlideEntry, opened: Callable[[SlideFolder], T]) -> T:
        with self._lock:
            if entry.id in kept:
                kept.move_to_end(entry.id)
                return kept[entry.id]
        store = opened(self.folder(entry))
        with self._lock:
            kept[entry.id] = store
            while len(kept) > KEPT_STORES:
                kept.popitem(last=False)
        return store

    def _close_unused(self, keep: int) -> None:
        """Close the slides that were used longest ago, down to `keep`; more stay where more are in use."""
        unused = [entry for entry, opened in self._slides.items() if not opened.users]
        for entry in unused[: max(0, len(self._slides) - keep)]:
            opened = self._slides.pop(entry)
            if opened.reader is not None:
                opened.reader.close()
            opened.slide.close()


@dataclass
class _Opened:
    """An open slide, how many tasks read it, and what reads its patches."""

    slide: Slide
    users: int = 0
    reader: PatchReader | None = None
