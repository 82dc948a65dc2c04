"""The context of a process: the model, slides and stores that it keeps between tasks."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from wsi_gradcam.cam.facts import SCALED
from wsi_gradcam.errors import ResumeError, SlideFormatError, StoreError, device_errors
from wsi_gradcam.io.cache import Cache, ResourcePool
from wsi_gradcam.io.urls import allowing_for_run
from wsi_gradcam.mil.feature_arrays import FeatureFolder
from wsi_gradcam.mil.features import FeatureBag
from wsi_gradcam.results.feature_store import FeatureStore
from wsi_gradcam.results.heatmap import HeatmapStore
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.patch_store import PatchStore
from wsi_gradcam.results.run_files import RunFolder, SlideFolder
from wsi_gradcam.results.slide_tables import read_slide_records
from wsi_gradcam.run.examining import Blind
from wsi_gradcam.run.plan import open_given
from wsi_gradcam.run.types import Performed, Task, Workload
from wsi_gradcam.slides import thumbnail
from wsi_gradcam.slides.patch_reader import PatchReader, open_entry, reading_threads
from wsi_gradcam.system.processes import limit_arenas, make_sums_deterministic, release_freed_memory
from wsi_gradcam.tissue.masks import glass_colour
from wsi_gradcam.tissue.quality import measure_blur
from wsi_gradcam.tissue.stain import apply

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from numpy.typing import NDArray

    from wsi_gradcam.cam.explainer import Explainer
    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.mil.aggregators import LoadedAggregator
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.tissue.stain import StainFit

T = TypeVar("T")
W = TypeVar("W", bound=Workload, covariant=True)

GLANCE_PX = 512  # longest side of the thumbnail in which the colour of a slide's glass is found
KEPT_OPEN = 2  # the current slide and the next one
KEPT_OPEN_FOR_GPU = 6  # those of the tasks that share it, and the next ones
KEPT_STORES = 8  # of each kind: their metadata need not be read again


class Exclusive(Generic[T]):
    """An object created on first use in each process, which one thread at a time may use. It is not pickled.

    Attributes:
        free_since: when the last user left (`time.perf_counter`); minus infinity before the first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value: T | None = None
        self.free_since = -float("inf")

    def __reduce__(self) -> tuple[type[Exclusive[T]], tuple[()]]:
        return type(self), ()

    @contextmanager
    def used(self, make: Callable[[], T]) -> Iterator[T]:
        """Wait until no other thread uses the object, and return it, created by `make` if necessary."""
        with self._lock:
            if self._value is None:
                self._value = make()
            try:
                yield self._value
            finally:
                self.free_since = time.perf_counter()


class Context(Generic[W]):
    """The state of a process between the tasks of a workload: the model, and the open slides and stores.

    Attributes:
        workload: the workload whose tasks are performed.
        run: the workload's run.
        worker: name of the process, as `host:process id`.
    """

    def __init__(self, workload: W, model: Explainer | Blind | None = None) -> None:
        limit_arenas()
        self.workload, self.run = workload, workload.run
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self._lock, self._model_lock = threading.Lock(), threading.Lock()
        self._model = model
        self._readers: ThreadPoolExecutor | None = None  # end when nothing refers to them any more
        on_cpu = self.run.settings.device == "cpu"
        self._slides: ResourcePool[SlideEntry, _Opened] = ResourcePool(
            KEPT_OPEN if on_cpu else KEPT_OPEN_FOR_GPU, _Opened.close
        )
        self._patches: Cache[str, PatchStore] = Cache(KEPT_STORES)
        self._heatmaps: Cache[str, HeatmapStore] = Cache(KEPT_STORES)
        self._features: Cache[str, FeatureStore] = Cache(KEPT_STORES)
        self._given: ResourcePool[SlideEntry, FeatureBag] = ResourcePool(KEPT_OPEN, FeatureBag.close)
        self._feature_folder: Exclusive[FeatureFolder] = Exclusive()
        self._aggregator: LoadedAggregator | None = None
        self._glass: dict[str, tuple[int, int, int]] = {}
        self._found_run = RunFolder(self.run.out).run.is_file()

    def check_out(self) -> None:
        """Check whether OUT, or part of it, has been deleted since this process began, through no slide's fault.

        Raises:
            StoreError: it has been deleted.
        """
        if self._found_run and not RunFolder(self.run.out).run.is_file():
            raise StoreError(
                f"{self.run.out}: was deleted, in whole or in part, during the run; run the same command again"
            )

    def model(self) -> Explainer:
        """Return the run's model, loaded on first use unless it was given; slides can be processed in the meantime."""
        with self._model_lock:
            if self._model is None:
                make_sums_deterministic()
                from wsi_gradcam.cam.explainer import Explainer

                with allowing_for_run(self.run.settings.allow_hosts):
                    self._model = Explainer.load(self.run.encoder, self.run.facts, self.run.settings.device)
            assert not isinstance(self._model, Blind)  # no task of such a run needs it
            return self._model

    def glass(self, entry: SlideEntry) -> tuple[int, int, int]:
        """Return the RGB colour of the slide's bare glass, uint8; white if there is none."""
        if entry.id not in self._glass:
            with self.slide(entry) as slide:
                self._glass[entry.id] = glass_colour(thumbnail(slide, 0.0, GLANCE_PX).rgb)
        return self._glass[entry.id]

    @contextmanager
    def slide(self, entry: SlideEntry) -> Iterator[Slide]:
        """Open the slide, unless it is open. The last few stay open for the next tasks.

        Threads of one process may work on different slides: none is closed while a thread reads it.
        """
        with self._opened(entry) as opened:
            yield opened.slide

    @contextmanager
    def patches(self, entry: SlideEntry) -> Iterator[PatchReader]:
        """Return the reader of the slide's patches, which stays as long as the slide is open."""
        run = self.run
        with self._opened(entry) as opened:
            with self._lock:
                if opened.reader is None:
                    refuse_other(opened.slide, self.plan(entry))
                    plan, size, threads = self.plan(entry), run.facts.batch_size, run.settings.readers
                    treat, mpp = partial(_treat, plan.stain, self._resized), plan.patch_mpp(run.patch_px, run.mpp)
                    if self._readers is None:
                        self._readers = reading_threads(threads)
                    opened.reader = PatchReader(
                        opened.slide, run.patch_px, mpp, size, threads, treat, self._readers, self._empty
                    )
            yield opened.reader

    def _resized(self, patch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self.model().resized(patch)  # threads wait for it: slides are opened while it is loaded

    def _empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return self.model().empty(shape)

    def check_slide(self, entry: SlideEntry) -> None:
        """Check that the slide's file is still the one that was planned, so that patches of two files are never mixed.

        Raises:
            SlideFormatError: it is another file.
        """
        plan = self.plan(entry)
        with self._opened(entry) as opened:
            refuse_other(opened.slide, plan)
            if opened.state is not None and opened.state == file_state(entry.path):
                return
        fresh = open_entry(entry, self.run.settings)
        try:
            refuse_other(fresh, plan)
        finally:
            fresh.close()

    def close(self) -> None:
        """Close the slides and feature files that no task uses."""
        self._slides.close()
        self._given.close()

    @contextmanager
    def given(self, entry: SlideEntry) -> Iterator[FeatureBag | None]:
        """Open the slide's given features, unless they are open; None if none are given.

        Raises:
            FeatureError: there are none for this slide, or the positions of their patches are unknown.
        """
        place = self.run.settings.features
        if place is None:
            yield None
            return
        with self._given.borrow(entry, lambda: self._open_features(entry, place)) as found:
            yield found

    def _open_features(self, entry: SlideEntry, place: Path) -> FeatureBag:
        """Open features; which files there are is looked up once in each process."""
        ids = partial(read_slide_records, RunFolder(self.run.out).record)
        with self.slide(entry) as slide, self._feature_folder.used(lambda: FeatureFolder(place, ids())) as folder:
            return open_given(folder, entry.id, slide.info, self.run)

    def _opened(self, entry: SlideEntry) -> AbstractContextManager[_Opened]:
        def opened() -> _Opened:
            state = file_state(entry.path)  # before: what changes meanwhile is seen
            return _Opened(open_entry(entry, self.run.settings, self.run.facts.choice.decode == SCALED), state)

        return self._slides.borrow(entry, opened)

    def folder(self, entry: SlideEntry) -> SlideFolder:
        """Return the folder of the slide's results."""
        return RunFolder(self.run.out).slide(entry.id)

    def patch_store(self, entry: SlideEntry) -> PatchStore:
        """Return the slide's patch store; the last few are kept."""
        return self._patches.get(entry.id, lambda: PatchStore(self.folder(entry).cams))

    def heatmap(self, entry: SlideEntry) -> HeatmapStore:
        """Return the slide's heatmap; the last few are kept."""
        return self._heatmaps.get(entry.id, lambda: HeatmapStore(self.folder(entry).heatmap))

    def features(self, entry: SlideEntry) -> FeatureStore:
        """Return the store of the slide's features for a slide-level model; the last few are kept."""
        return self._features.get(entry.id, lambda: FeatureStore(self.folder(entry).features))

    def aggregator(self) -> LoadedAggregator:
        """Return the aggregator of the run's slide-level model, in double precision on the CPU; it is loaded once."""
        with self._model_lock:
            if self._aggregator is None:
                make_sums_deterministic()
                from wsi_gradcam.mil.aggregators import load_aggregator

                self._aggregator = load_aggregator(self.run.slide_model)
                self._aggregator.network.double()
            return self._aggregator

    def forget_stores(self, entry: SlideEntry) -> None:
        """Forget the slide's stores, which are about to be recreated."""
        self._patches.discard(entry.id)
        self._heatmaps.discard(entry.id)
        self._features.discard(entry.id)

    def plan(self, entry: SlideEntry) -> SlidePlan:
        """Return the slide's plan, as `plan_slide` stored it.

        Raises:
            StoreError: this process cannot see it.
            ResumeError: another run has replaced it in the meantime.
        """
        folder = self.folder(entry)
        plan = Manifest(folder.manifest).plan()
        if plan is None:
            raise StoreError(
                f"{folder.manifest}: no plan can be seen there; --out must be a folder that all workers share, or in "
                "an object store"
            )
        if plan.run_digest != self.run.digest():
            raise ResumeError(
                f"{folder.place}: another run has started there in the meantime; only one run may use an --out"
            )
        return plan


def refuse_other(slide: Slide, plan: SlidePlan) -> None:
    """Raise a SlideFormatError for a slide that is not the file that was planned."""
    if slide.info.digest != plan.slide_digest:
        raise SlideFormatError(
            f"{slide.info.path}: was replaced by another file during the run, so its results would mix both; do not "
            "change slides during a run, and run the same command again with --overwrite"
        )


def file_state(path: str) -> tuple[int, ...] | None:
    """Return values that change when a file on a disk is written or replaced; None for a folder or a URL."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _treat(
    stain: StainFit | None, resized: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], patch: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], float]:
    """Return a patch with its stain normalised, resized for the model, and its blur as it was read.

    Blur is measured before normalisation, which would change it.
    """
    (blur,) = measure_blur(patch[None])
    return resized(patch if stain is None else apply(stain, patch)), float(blur)


@dataclass
class _Opened:
    """An open slide, the state of its file before it was opened, and the reader of its patches."""

    slide: Slide
    state: tuple[int, ...] | None
    reader: PatchReader | None = None

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
        self.slide.close()


def perform(context: Context[Any], task: Task, upcoming: Task | None = None) -> Performed:
    """Perform a task; what the `upcoming` one needs may be read in the meantime.

    Raises:
        DeviceError: the process can use its device no more, and must end.
    """
    started = time.perf_counter()
    ahead = {}
    if upcoming is not None and task.stage.reads_ahead and upcoming.stage == task.stage:
        ahead["upcoming"] = upcoming.index[0]
    try:
        with device_errors():
            result = task.stage.function(context, task.slide, *task.index, **ahead)
    except Exception:
        context.check_out()
        raise
    finally:
        release_freed_memory()
    return Performed(result, time.perf_counter() - started, context.worker)
