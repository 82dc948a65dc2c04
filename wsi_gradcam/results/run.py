"""`open_result`: a finished, or partly finished, run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ResultError, UnknownNameError, as_text, counted, from_extra, picked
from wsi_gradcam.io.paths import StoragePath, StoragePathLike, storage_path
from wsi_gradcam.pages import render
from wsi_gradcam.results.display import ChannelInfo, Progress, at_index, run_windows, suggest_names
from wsi_gradcam.results.manifest import PLAN
from wsi_gradcam.results.run_files import RunFolder, RunRecord, SlideFolder, is_name, read_run, slide_id_of
from wsi_gradcam.results.slide import SlideResult
from wsi_gradcam.results.slide_tables import read_slides

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

MAX_LISTED = 20  # slides in a notebook
MAX_MEANT = 3  # results in a folder that is none
RESULT_FOLDERS = frozenset({"cams.zarr", "heatmap.ome.zarr", "manifest"})  # in a slide's folder; not slides


class Result:
    """The results of a run: iterate over its slides, or get one with `result["a.svs"]`.

    Attributes:
        out: the folder, as text.
        folder: names of its files.
        run: the mapping in run.yaml: settings, model, targets, versions.
        record: the same as typed values, as far as readers of results need them.
    """

    def __init__(self, folder: RunFolder, run: dict[str, Any], remote_slides: bool = False) -> None:
        self._remote_slides = remote_slides
        self.out, self.folder, self.run = str(folder.place), folder, run
        self.record = RunRecord.from_json(run)
        rows = read_slides(folder.slides)
        for name in rows:
            if not is_name(name):
                raise ResultError(
                    f"{folder.slides}: {name!r} is not the name of a slide below OUT; the file is damaged"
                )
        names = list(rows) or list(planned_slides(folder))
        self._slides = {name: self._slide(name, rows.get(name, {})) for name in names}

    def __repr__(self) -> str:
        return f"<Result {self.out}: {counted(len(self), 'slide')} of {self.record.model.name}>"

    def __len__(self) -> int:
        return len(self._slides)

    def __iter__(self) -> Iterator[SlideResult]:
        return iter(self._slides.values())

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self._slides

    def __getitem__(self, slide_id: str | int) -> SlideResult:
        """Return a slide's results by its id or its position in `ids`, even if it is not in slides.csv yet.

        Raises:
            UnknownNameError: the run has no such slide.
        """
        if not isinstance(slide_id, str):
            slide_id = self.ids[at_index(slide_id, len(self), f"{self.out}: no slide", "its id or its number")]
        if (known := picked(slide_id, self._slides)) is not None:
            return self._slides[known]
        slide_id = as_text(slide_id)
        if (found := self._slides.get(slide_id)) is not None:
            return found
        if is_name(slide_id) and (self.folder.slide(slide_id).manifest / PLAN).is_file():
            return self._slides.setdefault(slide_id, self._slide(slide_id, {}))
        raise UnknownNameError(f"{self.out}: no slide {slide_id!r}; {suggest_names(slide_id, self.ids)}")

    def _slide(self, name: str, row: dict[str, str]) -> SlideResult:
        return SlideResult(name, self.folder.slide(name), row, self.record, self._remote_slides)

    @property
    def ids(self) -> list[str]:
        """The names of the slides in slides.csv, or if that does not exist yet, of those that were planned."""
        return list(self._slides)

    @property
    def classes(self) -> list[str]:
        """The model's classes."""
        return list(self.record.model.classes)

    def heatmap(
        self, channel: str | int | ChannelInfo, slide: str | int | None = None, level: int = 0, *, masked: bool = False
    ) -> xr.DataArray:
        """Return a channel of a slide as a lazy array, see `SlideResult.heatmap`; an only slide need not be given."""
        return self._one(slide).heatmap(channel, level, masked=masked)

    @property
    def patches(self) -> pd.DataFrame:
        """A table with a row per patch of all finished slides; the first column, `slide`, names the slide.

        It is held in memory: a million patches with ten classes take about 200 MB.
        """
        with from_extra("xarray", "patches"):
            import pandas as pd

        frames = {slide.id: slide.patches for slide in self if slide.is_finished}
        if not frames:
            raise ResultError(f"{self.out}: no slide is finished; run explain again")
        whole = pd.concat(frames, names=["slide", "patch"]).reset_index()
        return whole.astype({"slide": "category"})

    def windows(self, progress: Progress | None = None) -> dict[str, tuple[float, float]]:
        """Return the display window (low, high) of each channel over all slides, by the channel's label.

        It is kept in display.json; the first call, and any call after new slides are finished, reads these slides.
        """
        return run_windows(self, self.folder.display, self.record.run_digest, progress)

    def _one(self, slide_id: str | int | None) -> SlideResult:
        if slide_id is not None:
            return self[slide_id]
        if len(self) != 1:
            raise UnknownNameError(f"{self.out}: has {len(self)} slides; choose one, {suggest_names('', self.ids)}")
        return next(iter(self))

    def _repr_png_(self) -> bytes | None:
        """Return the overview if the run has a single slide."""
        return self._one(None)._repr_png_() if len(self) == 1 else None

    def _repr_html_(self) -> str:
        """Return a description for notebooks."""
        model, slides = self.record.model, list(self)
        counts = Counter(slide.status for slide in slides)
        states = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items()))
        title = f"{self.out}: {model.name}, layer {model.layer}; {counted(len(self), 'slide')}: {states}"
        rows = [(slide.id, slide.status, slide.row.get("patches", ""), slide.error) for slide in slides[:MAX_LISTED]]
        return render("results/run.html", title=title, rows=rows, left_out=len(slides) - len(rows))


def open_result(out: StoragePathLike, *, remote_slides: bool = False) -> Result:
    """Open the results in `out`, the folder or s3:// URL that was given to `explain`; the run may still be in progress.

    Slides are read from the paths stored in the results, but from URLs only with `remote_slides`, because results from
    a stranger could make this machine contact any server.

    Raises:
        ResultError: there are none; if `out` is a slide's folder, the message says which folder to open.
        StoreError: they are damaged, or cannot be read.
    """
    folder = RunFolder(storage_path(out))
    run = read_run(folder.run)
    if run is not None:
        return Result(folder, run, remote_slides)
    raise ResultError(no_result(folder.place))


def no_result(place: StoragePath) -> str:
    """Return what is said of a place that has no results: what may be meant, or how they are made."""
    if not place.exists():
        return (
            f"{place}: does not exist or is empty, expected results of explain; check the path, or create them: "
            f"wsi-gradcam explain SLIDES --model MODEL --out {place}"
        )
    above = next((each for each, inside in _upwards(place) if inside and RunFolder(each).run.is_file()), None)
    if above is not None:
        mend = f"open {above} and choose the slide there"
    elif below := [place / name for name in place.folder_names() if RunFolder(place / name).run.is_file()]:
        mend = f"did you mean {' or '.join(map(str, below[:MAX_MEANT]))}?"
    else:
        mend = "give the --out of an explain command"
    return f"{place}: has no run.yaml, so it is not a result; {mend}"


def find_result(path: StoragePathLike) -> tuple[Result, SlideResult | None]:
    """Find the result at or around `path`, and the slide whose folder or file it is, if any.

    Raises:
        ResultError: there is none.
    """
    for place, inside in _upwards(storage_path(path)):
        if RunFolder(place).run.is_file():
            result = open_result(place)
            names = ["/".join(inside[:count]) for count in range(len(inside), 0, -1)]
            slides = ((result.folder.place / name, slide_id_of(name)) for name in names)
            found = (result[name] for folder, name in slides if name in result and result[name].folder.place == folder)
            return result, next(found, None)
    return open_result(path), None


def _upwards(place: StoragePath) -> Iterator[tuple[StoragePath, tuple[str, ...]]]:
    """Yield a path and its parents, each with the names that lead from it to the path."""
    here, inside = place.absolute(), tuple[str, ...]()
    yield here, inside
    while (above := here.parent) != here:
        here, inside = above, (here.name, *inside)
        yield here, inside


def planned_slides(folder: RunFolder, inside: str = "") -> Iterator[str]:
    """Yield the ids of the slides that have a plan."""
    for name in (folder.place / inside if inside else folder.place).folder_names():
        if inside and name in RESULT_FOLDERS:
            continue
        path = f"{inside}/{name}" if inside else name
        slide = SlideFolder(folder.place / path)
        if (slide.manifest / PLAN).is_file():
            yield path if slide_id_of(path) == path else slide.slide_id or slide_id_of(path)
        elif not name.endswith((".zarr", "_files")):  # images that were exported
            yield from planned_slides(folder, path)
