"""One slide's results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.errors import (
    ResultError,
    SlideAccessError,
    SlideError,
    SlideFormatError,
    StoreError,
    UnknownNameError,
    as_path,
    from_extra,
)
from wsi_gradcam.io.urls import as_listed, host_of_url, is_url, redact_url, split_url
from wsi_gradcam.io.zarr_stores import telling_damage
from wsi_gradcam.pages import render
from wsi_gradcam.results.display import PROBABILITY, ChannelInfo, find_channel
from wsi_gradcam.results.feature_store import FeatureStore
from wsi_gradcam.results.heatmap import HeatmapStore
from wsi_gradcam.results.manifest import Manifest, SlideStatus
from wsi_gradcam.results.marks import Mark, Marks
from wsi_gradcam.results.patch_store import PatchStore, StoredTable
from wsi_gradcam.results.slide_tables import ANSWERS, answer_in_words
from wsi_gradcam.slides import open_slide, read_region, thumbnail

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import xarray as xr
    from numpy.typing import NDArray

    from wsi_gradcam.geometry import Region
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.run_files import RunRecord, SlideFolder
    from wsi_gradcam.slides import Slide


LOGIT, SHARE = ANSWERS
TOP = 10  # patches whose mean probability is a score of the slide
Scores = dict[str, dict[str, float]]

# System folders whose entries are not regular files: reading some of them means waiting for ever.
SYSTEM_FOLDERS = ("/proc", "/sys", "/dev")


class NotAskedError(SlideAccessError):
    """A slide on another machine, which is not contacted without permission."""


def check_named(path: str, out: str, remote: bool) -> None:
    """Check the path of a slide in results before it is opened, because the results may come from a stranger.

    A URL would make this machine contact a server, perhaps one that only it can reach, and sign the request with the
    user's key. URLs and network paths are therefore accepted only with `remote`, or if the results `out` lie in the
    same bucket.

    Raises:
        SlideAccessError: it must not be opened; `NotAskedError` if `remote` would allow it.
    """
    if os.path.realpath(path).startswith(tuple(f"{folder}/" for folder in SYSTEM_FOLDERS)):
        raise SlideAccessError(f"{path}: a system file, not a slide; the results are wrong")
    on_network = is_url(path) or path.startswith(("//", "\\\\"))
    same_bucket = is_url(path) and is_url(out) and split_url(path)[:2] == split_url(out)[:2]
    if on_network and not (remote or same_bucket):
        shown = redact_url(path) if is_url(path) else path
        raise NotAskedError(
            f"{shown}: the results refer to a slide on another machine, which is contacted only with --remote-slides "
            "(in Python: remote_slides=True)"
        )


def slide_address(path: str, out: str) -> str:
    """Return the path of a slide; for a URL in a bucket other than the results', one that is not signed."""
    return as_listed(path, {host_of_url(out)} if is_url(out) else ())


class SlideResult:
    """The results of one slide, as of when they were opened. They can be shared between threads.

    Attributes:
        id: name of the slide in the run.
        path: the slide's path in slides.csv; "" if it is not listed there yet.
        row: its row of slides.csv; empty if it is not listed there yet.
        folder: names of its files.
    """

    def __init__(
        self, slide_id: str, folder: SlideFolder, row: dict[str, str], run: RunRecord, remote_slides: bool = False
    ) -> None:
        self.id, self.folder, self.row, self._run = slide_id, folder, row, run
        self._remote_slides = remote_slides
        self.path = as_path(row.get("path", ""))

    def __repr__(self) -> str:
        return f"<SlideResult {self.id}: {self.status}>"

    @cached_property
    def status(self) -> str:
        """The status: `ok`, `no_tissue`, `failed` or `unfinished`; nothing is read for slides in slides.csv."""
        if self.row:
            return self.row["status"]
        done = Manifest(self.folder.manifest).done()
        return done.outcome.status if done else SlideStatus.UNFINISHED

    @property
    def error(self) -> str:
        """Why the slide failed, or what could not be read of it; "" if there was no problem."""
        return self.row.get("error", "")

    @cached_property
    def is_finished(self) -> bool:
        """True if the slide is complete; other slides may have part of a heatmap."""
        return Manifest(self.folder.manifest).is_finished

    @cached_property
    def plan(self) -> SlidePlan:
        """The stored plan: sizes, mpp, strides.

        Raises:
            ResultError: the slide has no results at all.
        """
        stored = Manifest(self.folder.manifest).plan()
        if stored is None:
            why = f" ({self.error})" if self.error else ""
            raise ResultError(f"{self.id}: has no results{why}; run explain again")
        return stored

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the slide's level 0."""
        return self.plan.slide_px

    @property
    def mpp(self) -> tuple[float, float]:
        """(y, x) micrometres per level-0 pixel of the slide."""
        return self.plan.slide_mpp

    @property
    def patch_px(self) -> tuple[int, int]:
        """(height, width) of a patch in the model's pixels."""
        return self._run.model.patch_px

    @property
    def patch_mpp(self) -> float:
        """Micrometres per pixel at which patches of this slide are read for the model."""
        return self.plan.patch_mpp(self._run.model.patch_px, self._run.model.mpp)

    @property
    def model_name(self) -> str:
        """The model's name."""
        return self._run.model.name

    @property
    def stride_px(self) -> int:
        """Level-0 pixels of the slide per pixel of the heatmap's level 0; twice as many on each further level."""
        return self.plan.stride

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(height, width) of the heatmap's levels, finest first; they cover the slide from its corner (0, 0)."""
        return self.plan.level_shapes

    @property
    def classes(self) -> list[str]:
        """The model's classes."""
        return list(self._run.model.classes)

    @cached_property
    def store(self) -> HeatmapStore:
        """The heatmap store, opened for reading."""
        planned = self.plan.level_shapes  # says what is wrong if there is none
        return HeatmapStore(self.folder.heatmap, read_only=True, planned=planned)

    @cached_property
    def channels(self) -> tuple[ChannelInfo, ...]:
        """The heatmap's channels, explanations first."""
        with telling_damage(self.folder.heatmap):  # a label may name no method
            return tuple(ChannelInfo.of(i, channel) for i, channel in enumerate(self.store.channels))

    def channel(self, name: str | int | ChannelInfo) -> ChannelInfo:
        """Return the channel labelled `name`, such as "gradcam: tumour", or the first that explains class `name`.

        `name` may also be the number of a channel, or a channel object, even of another slide of the run.

        Raises:
            UnknownNameError: there is none.
        """
        return find_channel(self.channels, name, self.id)

    def read(self, channel: str | int | ChannelInfo, level: int, region: Region) -> NDArray[np.float32]:
        """Read values of a channel in `region` (pixels of the heatmap's `level`), float32 [height, width]."""
        found = channel if isinstance(channel, ChannelInfo) else self.channel(channel)
        return self.store.read(self._level(level), found.number, region)

    def read_coverage(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Read the bits of each pixel in `region`: 1 tissue, 2 explained (otherwise it has no value), 4 unreadable."""
        return self.store.read_flags(self._level(level), region)

    def heatmap(self, channel: str | int | ChannelInfo, level: int = 0, *, masked: bool = False) -> xr.DataArray:
        """Return a channel as a lazy array, float32 [y, x], in the unit of its attribute `units`.

        The coordinates are the pixels' centres: `y` and `x` in level-0 px of the slide as in `patches`, `y_um` and
        `x_um` in micrometres, for example `heatmap("tumour").sel(y=slice(0, 4096))`. Values are 0 where nothing was
        explained, or NaN with `masked`.
        """
        with from_extra("xarray", "heatmap"):
            from wsi_gradcam.results.lazy import lazy_channel  # not imported above: dask and xarray

        return lazy_channel(self.store, self.plan, self._level(level), self.channel(channel), masked=masked)

    def coverage(self, level: int = 0) -> xr.DataArray:
        """Return the coverage label as a lazy array, uint8 [y, x], with coordinates as in `heatmap`."""
        with from_extra("xarray", "coverage"):
            from wsi_gradcam.results.lazy import lazy_coverage

        return lazy_coverage(self.store, self.plan, self._level(level))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read rows of patches.parquet as an Arrow table.

        Raises:
            ResultError: the slide is not finished.
        """
        return self._stored_table.read(columns)

    def table_batches(self, rows: int) -> Iterator[pa.Table]:
        """Yield the rows of patches.parquet in batches of this size; errors as for `table`."""
        return self._stored_table.batches(rows)

    @property
    def _stored_table(self) -> StoredTable:
        if not self.is_finished:
            raise ResultError(f"{self.id}: is {self.status}, it has no table yet; run explain again to finish")
        return StoredTable(self.folder.table, self.plan.patches)

    @property
    def patches(self) -> pd.DataFrame:
        """A table with a row per patch, indexed by the patch's number; `write_table` describes the columns."""
        with from_extra("xarray", "patches"):
            frame: pd.DataFrame = self.table().to_pandas(use_threads=False)
        return frame.rename_axis("patch")

    @property
    def slide_logits(self) -> dict[str, float]:
        """The answer of a slide-level model for the whole slide, as logits by class; empty if there is none."""
        return self._answers(LOGIT)

    @property
    def slide_probabilities(self) -> dict[str, float]:
        """The answer for the whole slide as probabilities by class; for survival models, of surviving each interval."""
        return self._answers(SHARE)

    @property
    def answer(self) -> str:
        """The answer for the whole slide in words, such as "tumour 0.931, normal 0.069"; "" if there is none."""
        return answer_in_words(self.slide_logits, self.slide_probabilities)

    def _answers(self, prefix: str) -> dict[str, float]:
        found = {name: self.row.get(f"{prefix}{name}") for name in self.classes}
        return {name: float(value) for name, value in found.items() if value}

    @property
    def features(self) -> xr.DataArray:
        """The encoder's feature vectors of the patches, lazy, float32 or float16 [patch, feature].

        The coordinates are the patches' numbers, as in `patches`, and `y`, `x` of their top left corners in level-0 px
        of the slide. Unreadable patches, which are not in the bag, are NaN.

        Raises:
            ResultError: the run's model is not a slide-level model, or the slide is not finished.
        """
        return self._bag("features", "")

    @property
    def relevance(self) -> xr.DataArray:
        """Each patch's contribution to the slide's answer, in logits, lazy, float32 [patch, bag_method, target].

        `relevance.sel(bag_method="lrp", target="tumour")`; coordinates, NaN and errors as for `features`.
        """
        return self._bag("relevance", "logit")

    @property
    def attention(self) -> xr.DataArray:
        """The attention weights of a slide-level model, lazy, float32 [patch, head]; each head sums to 1.

        Coordinates, NaN and errors as for `features`; not available for aggregators that are programs.
        """
        return self._bag("attention", "1")

    @property
    def coefficients(self) -> xr.DataArray:
        """The coefficient of each feature by the first bag method, lazy, float32 [patch, target, feature].

        Their dot product with a patch's features is the patch's relevance. Coordinates, NaN and errors as for
        `features`.
        """
        return self._bag("coefficients", "logit")

    def _bag(self, name: str, units: str) -> xr.DataArray:
        with from_extra("xarray", name):
            from wsi_gradcam.results.lazy import lazy_bag

        if not self.is_finished:
            raise ResultError(f"{self.id}: is {self.status}, it has no bag yet; run explain again to finish")
        try:
            store = FeatureStore(self.folder.features, read_only=True)
        except FileNotFoundError:
            raise ResultError(
                f"{self.id}: has no {name}, because the model of this run sees single patches; only slide-level models "
                "have them"
            ) from None
        if not store.has(name):
            raise ResultError(f"{self.id}: has no {name}: the aggregator is a program, so it is not known")
        return lazy_bag(store, self._patch_store.yx(0, self.plan.patches), name, units)

    @cached_property
    def _patch_store(self) -> PatchStore:
        patches = self.plan.patches
        found = PatchStore(self.folder.cams, read_only=True)
        if found.patches != patches:
            raise StoreError(
                f"{self.folder.cams}: has {found.patches} patches, expected {patches}; recompute with --overwrite"
            )
        return found

    def cams(self, patch: int) -> NDArray[np.float32]:
        """Read all explanations of a patch at the layer's resolution, float32 [channels, h, w], signed, in their units.

        They are in the order of `channels`, without the probabilities at its end; zeros for a patch that is unreadable
        or not done yet.

        Raises:
            UnknownNameError: there is no such patch.
        """
        if not 0 <= patch < self.plan.patches:
            raise UnknownNameError(f"{self.id}: no patch {patch}; it has {self.plan.patches}, counted from 0")
        store = self._patch_store
        raw: NDArray[np.float32] = store.read_span(patch, patch + 1).cams[0]
        factors = np.atleast_1d(
            np.array(store.attributes["heatmap_factor"], np.float32)
        )  # the first format has one for all
        return raw * factors[:, None, None]

    def cam(self, patch: int, channel: str | int | ChannelInfo) -> NDArray[np.float32]:
        """Read one explanation of a patch, float32 [h, w]; see `cams`."""
        found = self.channel(channel)
        if found.method == PROBABILITY:
            raise UnknownNameError(
                f"{self.id}: {found.label} is one number per patch (see `patches`); expected a channel of a method"
            )
        cam: NDArray[np.float32] = self.cams(patch)[found.number]
        return cam

    def open_slide(self) -> Slide:
        """Open the slide file itself; the caller closes it.

        Raises:
            SlideError: it no longer exists, was replaced by another file, or is at a URL (see `check_named`).
        """
        self.check_path()
        slide = open_slide(self.address, self.mpp, self._run.reader, channels=self._run.channels)
        if slide.info.digest != self.plan.slide_digest:
            slide.close()
            raise SlideFormatError(
                f"{self.path}: not the file that was explained; restore the original there, or explain again"
            )
        return slide

    @cached_property
    def scanned(self) -> Region | None:
        """The scanned part of level 0, which is all that QuPath shows; None for the whole slide.

        Results of older versions do not state it; it is then read from the slide, if that still exists.
        """
        if self.plan.bounds is not None:
            return self.plan.scanned
        try:
            slide = self.open_slide()
        except SlideError:
            return None
        slide.close()
        return slide.info.bounds

    def marks(self) -> list[Mark]:
        """Return the marks that people made on the slide in the viewer, oldest first.

        Raises:
            StoreError: `marks.jsonl` cannot be read.
        """
        return Marks(self.out).of(self.id)

    @property
    def out(self) -> StoragePath:
        """The run's folder."""
        out = self.folder.place
        for _ in self.id.split("/"):
            out = out.parent
        return out

    @property
    def address(self) -> str:
        """The slide's path, or the form of its URL that may be stored in results, see `as_listed`."""
        return slide_address(self.path, str(self.folder.place))

    def check_path(self) -> None:
        """Raise a SlideAccessError if the slide must not be opened, see `check_named`."""
        check_named(self.path, str(self.folder.place), self._remote_slides)

    def patch_yx(self, patch: int) -> tuple[float, float]:
        """Return (y, x) of a patch's top left corner, in level-0 px."""
        y, x = self._patch_store.yx(patch, patch + 1)[0]
        return float(y), float(x)

    def patch_image(self, patch: int) -> NDArray[np.uint8]:
        """Read a patch as the model saw it, before its own transform: RGB uint8 [height, width, 3]."""
        y, x = self._patch_store.yx(patch, patch + 1)[0]
        slide = self.open_slide()
        try:
            return read_region(slide, float(y), float(x), *self.patch_px, self.patch_mpp)
        finally:
            slide.close()

    def thumbnail(self, max_px: int = 1024) -> NDArray[np.uint8]:
        """Read the whole slide, RGB uint8 [h, w, 3], no side longer than `max_px`, from the slide file."""
        slide = self.open_slide()
        try:
            return thumbnail(slide, 0.0, max_px).rgb
        finally:
            slide.close()

    def _repr_png_(self) -> bytes | None:
        """Return overview.png: slide, overlays and colour bars."""
        return self.folder.overview.read() if self.is_finished else None

    def _repr_html_(self) -> str:
        """Return a description with the overview, for notebooks."""
        facts = [("slide", self.path or self.id), ("status", self.status)]
        if self.error:
            facts.append(("error", self.error))
        if self.is_finished:
            (height, width), (mpp_y, mpp_x) = self.size_px, self.mpp
            facts += [
                ("size", f"{width:,} x {height:,} px of {mpp_x:g} x {mpp_y:g} µm"),
                ("patches", f"{self.plan.patches:,}"),
                *([("answer for the slide", self.answer)] if self.answer else []),
                ("channels", ", ".join(channel.label for channel in self.channels)),
            ]
        return render("results/slide.html", facts=facts, overview=self._repr_png_())

    def _level(self, level: int) -> int:
        if not 0 <= level < len(self.levels):
            raise UnknownNameError(f"{self.id}: no level {level}; the heatmap has {len(self.levels)}, counted from 0")
        return level


def slide_scores(result: SlideResult, classes: Sequence[str]) -> Scores:
    """Return a slide's scores by class, from its table of patches.

    `share` is the share of the patches whose most probable class this is, `top` the mean probability of the ten highest
    patches.
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
