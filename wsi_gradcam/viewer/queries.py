"""Answers to the page's queries about the run, its slides, points and patches, as JSON values.

`PatchTable` finds the patch at a point, its neighbours, and the patches with the highest values of a slide.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import numpy as np

from wsi_gradcam import __version__
from wsi_gradcam.audit.plan import AUDIT, REPORT, AuditFolder
from wsi_gradcam.errors import NotShownError, SlideError, WsiGradcamError, one_line
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.results.run_files import folder_name
from wsi_gradcam.viewer.archive import answer_of, status_of, valid_text
from wsi_gradcam.viewer.images import (
    HeatmapReader,
    PointValues,
    channel_scale,
    finer_levels,
    heatmap_pyramid,
    slide_pyramid,
)
from wsi_gradcam.viewer.layers import CLASSES, CLUSTERS, DIFFERENCE, NO_CLUSTER, OTHER, Predicted
from wsi_gradcam.viewer.responses import RUN_REPORT

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa
    from numpy.typing import NDArray

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.display import ChannelInfo
    from wsi_gradcam.results.marks import Mark
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.viewer.archive import Archive, ServedSlide
    from wsi_gradcam.viewer.layers import Clustered, ClusterLayers, Compared, Comparison, Difference, Spread, Spreads

    Windows = dict[str, tuple[float, float]]


CHUNK_BYTES = 16 << 20
TABLE_BYTES = 512 << 20  # four slides of a million patches
MAX_TOP = 100


class KnownEvidence(Protocol):
    """What queries about slides need from the evidence of the run."""

    def names(self) -> dict[int, str]:
        """Return the names of clusters, by number."""

    def of_patch(self, slide: ServedSlide, number: int) -> list[dict[str, Any]] | None:
        """Return what clusters contribute in a patch, the largest first; None if it is not in the sample."""


class Queries:
    """Answers queries about slides; the tables of the most recently used slides are kept."""

    def __init__(
        self,
        archive: Archive,
        spreads: Spreads,
        windows: Callable[[], Windows],
        comparison: Comparison,
        evidence: KnownEvidence,
        clusters: ClusterLayers,
    ) -> None:
        self._archive, self._spreads, self._windows, self._comparison = archive, spreads, windows, comparison
        self._evidence, self._clusters = evidence, clusters
        self._heatmaps = HeatmapReader(CHUNK_BYTES)
        self._tables: Cache[tuple[str, str], PatchTable] = Cache(TABLE_BYTES, lambda table: table.nbytes)

    def slide(self, key: str) -> dict[str, Any]:
        """Describe a slide; if it cannot be opened, the reason is part of the description."""
        slide = self._archive.find(key)
        spread, windows, compared = self._spread(slide), self._windows(), self._compared(slide)
        audit = {"audit": audit_address(self._archive, slide)}
        try:
            with self._archive.borrow_slide(slide) as opened:
                facts = slide_facts(slide, opened, spread, windows) | audit
        except SlideError as error:
            facts = slide_facts(slide, error, spread, windows) | audit
        _add_classes(facts, slide)
        _add_clusters(facts, self._clusters.of(slide), self._evidence.names)
        _add_second_run(facts, compared, self._comparison.name)
        return facts

    def values(self, key: str, y: float, x: float) -> dict[str, Any]:
        """Return all channels' values over level-0 (y, x), those of the spread last, and the evidence's cluster."""
        slide = self._archive.find(key)
        found = self._heatmaps.at(slide, y, x)
        if found is None or found.values is None:
            return asdict(PointValues(None, tissue=False, explained=False, unreadable=False)) | {"cluster": None}
        beside = [*self._spread_values(slide, y, x), *self._second_values(slide, y, x)]
        return asdict(found) | {"values": [*found.values, *beside], "cluster": self._cluster(slide, y, x)}

    def _cluster(self, slide: ServedSlide, y: float, x: float) -> int | None:
        """Return the number of the cluster at a place, or their count if it has none; None if it was not looked at."""
        layer = self._clusters.of(slide)
        try:
            found = None if layer is None else self._heatmaps.at(layer, y, x)
        except WsiGradcamError:  # its tiles report the problem
            return None
        return None if found is None or not found.values or found.values[0] is None else int(found.values[0]) + 1

    def patch_at(self, key: str, y: float, x: float) -> dict[str, Any]:
        """Return the patch that covers level-0 (y, x); `{"number": None}` if none does."""
        slide = self._archive.find(key)
        table = self._table(slide)
        number = table.at(y, x)
        return {"number": None} if number is None else self._patch(slide, table, number)

    def patch(self, key: str, number: int) -> dict[str, Any]:
        """Return a patch: its row, its own maps, its neighbours."""
        slide = self._archive.find(key)
        return self._patch(slide, self._table(slide), number)

    def _patch(self, slide: ServedSlide, table: PatchTable, number: int) -> dict[str, Any]:
        row = table.row(number)
        neighbours = [{"number": other, "direction": name} for other, name in table.neighbours(number)]
        more = {"clusters": self._evidence.of_patch(slide, number), "neighbours": neighbours}
        return {**row, "maps": _patch_maps(slide.result, number), **more}

    def top(self, key: str, column: str, count: int, lowest: bool) -> dict[str, Any]:
        """Return the patches with the highest, or lowest, values of a column; with column "" only the columns."""
        table = self._table(self._archive.find(key))
        numbers = table.top(column, min(count, MAX_TOP), lowest) if column else []
        patches = [
            {"number": n, "y": int(table.y[n]), "x": int(table.x[n]), "value": table.value(column, n)} for n in numbers
        ]
        return {"columns": list(table.values), "patches": patches}

    def _spread(self, slide: ServedSlide) -> Spread | WsiGradcamError | None:
        """Return a slide's spread, or the problem with it, which is never a reason not to show the slide."""
        try:
            return self._spreads.of(slide)
        except WsiGradcamError as error:
            return error

    def _spread_values(self, slide: ServedSlide, y: float, x: float) -> list[float | None]:
        spread = self._spread(slide)
        if spread is None or isinstance(spread, WsiGradcamError):
            return []
        try:
            found = self._heatmaps.at(spread, y, x)
        except WsiGradcamError:  # its tiles report the problem
            found = None
        return found.values if found and found.values else [None] * len(spread.result.channels)

    def _compared(self, slide: ServedSlide) -> Compared | WsiGradcamError | None:
        """Return a slide in both runs, or why they cannot be compared."""
        try:
            return self._comparison.of(slide)
        except (WsiGradcamError, OSError, KeyError) as error:
            return error if isinstance(error, WsiGradcamError) else NotShownError(one_line(error))

    def _second_values(self, slide: ServedSlide, y: float, x: float) -> list[float | None]:
        compared = self._compared(slide)
        if compared is None or isinstance(compared, WsiGradcamError):
            return []
        values: list[float | None] = []
        for layer in (compared.slide, compared):
            found = self._heatmaps.at(layer, y, x)
            values += found.values if found and found.values else [None] * len(layer.result.channels)
        return values

    def _table(self, slide: ServedSlide) -> PatchTable:
        def read() -> PatchTable:
            return PatchTable(slide.result.table(), slide.result.plan.footprint)

        return self._tables.get((slide.key, slide.version), read)


COORDINATES = ("y", "x")
TEXTS = ("status", "cause")
DIRECTIONS = ("E", "NE", "N", "NW", "W", "SW", "S", "SE")
MAX_CANDIDATES = 50_000  # of a top-k from which neighbours are left out


class PatchTable:
    """The rows of patches.parquet as arrays; `footprint` is a patch's (height, width) in level-0 px."""

    def __init__(self, table: pa.Table, footprint: tuple[float, float]) -> None:
        names = [name for name in table.column_names if name not in (*COORDINATES, *TEXTS)]
        self.values = {name: _floats(table, name) for name in names}
        self.y, self.x = (table.column(name).to_numpy().astype(np.int64) for name in COORDINATES)
        self._texts = {name: table.column(name) for name in TEXTS}
        self.footprint = footprint
        self.nbytes = int(table.nbytes) + sum(array.nbytes for array in (*self.values.values(), self.y, self.x))

    def __len__(self) -> int:
        return len(self.y)

    def at(self, y: float, x: float) -> int | None:
        """Return the patch that covers level-0 (y, x); if there are several, the one whose centre is nearest."""
        height, width = self.footprint
        inside = (self.y <= y) & (y < self.y + height) & (self.x <= x) & (x < self.x + width)
        (found,) = np.nonzero(inside)
        if not len(found):
            return None
        return int(found[np.argmin(self._distances(found, y - height / 2, x - width / 2))])

    def neighbours(self, number: int) -> list[tuple[int, str]]:
        """Return the numbers and directions of up to 8 patches around one, the nearest in each direction."""
        y, x, reach = float(self.y[number]), float(self.x[number]), 1.5 * max(self.footprint)
        near = (np.abs(self.y - y) <= reach) & (np.abs(self.x - x) <= reach)
        near[number] = False
        (found,) = np.nonzero(near)
        order = found[np.argsort(self._distances(found, y, x), kind="stable")]
        nearest: dict[str, int] = {}
        for other in order.tolist():
            nearest.setdefault(_direction(self.y[other] - y, self.x[other] - x), other)
        return [(nearest[name], name) for name in DIRECTIONS if name in nearest]

    def top(self, column: str, count: int, lowest: bool = False) -> list[int]:
        """Return the patches with the highest values of a column; of overlapping ones only the highest.

        Raises:
            NotShownError: there is no such column.
        """
        values = self._column(column)
        ranked = np.argsort(values if lowest else -values, kind="stable")  # NaN comes last
        chosen: list[int] = []
        for number in ranked[:MAX_CANDIDATES].tolist():
            if len(chosen) == count or math.isnan(values[number]):
                break
            if not self._overlaps(number, chosen):
                chosen.append(number)
        return chosen

    def row(self, number: int) -> dict[str, Any]:
        """Return all columns of a patch; None for unknown values.

        Raises:
            NotShownError: there is no such patch.
        """
        if not 0 <= number < len(self):
            raise NotShownError(f"no patch {number}; there are {len(self)}, counted from 0")
        row: dict[str, Any] = {"number": number, "y": int(self.y[number]), "x": int(self.x[number])}
        row |= {name: column[number].as_py() for name, column in self._texts.items()}
        return row | {name: _known(array[number]) for name, array in self.values.items()}

    def value(self, column: str, number: int) -> float | None:
        """Return one value of a patch; None if it is unknown."""
        return _known(self._column(column)[number])

    def _column(self, name: str) -> NDArray[np.float64]:
        if name not in self.values:
            raise NotShownError(f"no column {name[:100]!r}; expected one of {', '.join(self.values)}")
        return self.values[name]

    def _distances(self, numbers: NDArray[np.intp], y: float, x: float) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.hypot(self.y[numbers] - y, self.x[numbers] - x)
        return found

    def _overlaps(self, number: int, chosen: list[int]) -> bool:
        """Return whether a patch shares more than half its length with one of others, along both axes."""
        height, width = self.footprint
        return any(
            abs(self.y[number] - self.y[o]) < height / 2 and abs(self.x[number] - self.x[o]) < width / 2 for o in chosen
        )


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column as float64, so that JSON shows the stored numbers; null becomes NaN."""
    return np.asarray(table.column(name).to_numpy(), np.float64)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _direction(dy: float, dx: float) -> str:
    """Return a compass direction, as on a map; y runs down."""
    return DIRECTIONS[round(math.atan2(-dy, dx) / (math.pi / 4)) % 8]


def run_facts(archive: Archive, second: str = "") -> dict[str, Any]:
    """Describe a run: its name, model and classes, and the addresses of its reports; `second` names another run."""
    result = archive.result
    model = result.record.model
    return {
        "version": __version__,
        "name": valid_text(archive.out.name),
        "second": valid_text(second) or None,
        "model": valid_text(str(model.name)),
        "untrained": model.weights == "random",
        "slide_level": result.record.is_slide_level,
        "layer": model.layer,
        "classes": [valid_text(label) for label in result.classes],
        "methods": list(result.record.settings.get("method", [])),
        "patch_px": list(model.patch_px),
        "patch_mpp": model.mpp,
        "report": f"/files/{RUN_REPORT}" if _exists(archive.out / RUN_REPORT) else None,
        "audit": f"/files/{AUDIT}/{REPORT}" if _exists(AuditFolder(archive.out / AUDIT).report) else None,
    }


def mark_facts(mark: Mark) -> dict[str, Any]:
    """Return a mark as JSON values; its outline is a flat list y, x, y, x, ... in level-0 px."""
    flat = [value for point in mark.outline for value in point]
    texts = {name: valid_text(text) for name, text in (("text", mark.text), ("by", mark.by), ("made", mark.made))}
    return {"id": valid_text(mark.id), "kind": mark.kind, "patch": mark.patch, "outline": flat, **texts}


def audit_address(archive: Archive, slide: ServedSlide) -> str | None:
    """Return the address of a slide's audit report; None if it was not audited."""
    slide_id = slide.result.id
    if not _exists(AuditFolder(archive.out / AUDIT).slide_report(slide_id)):
        return None
    return f"/files/{AUDIT}/{quote(folder_name(slide_id).encode('utf-8', 'surrogateescape'))}/{REPORT}"


def slide_facts(
    slide: ServedSlide, opened: Slide | SlideError, spread: Spread | WsiGradcamError | None, windows: Windows
) -> dict[str, Any]:
    """Describe a slide: its image, its heatmap with its spread, its patches, and the reasons why parts are missing.

    `windows` are those of the whole run, as far as they are known yet.
    """
    result = slide.result
    facts: dict[str, Any] = {
        "key": slide.key,
        "version": slide.version,
        "id": valid_text(result.id),
        "status": status_of(slide),
        "error": valid_text(result.error),
        "answer": answer_of(result),
        "slide": _slide_image(opened),
        "heat": None,
        "channels": [],
        "patch": None,
    }
    try:
        _add_heatmap_facts(facts, result, spread, windows)
    except (WsiGradcamError, OSError, KeyError) as error:
        facts["heat_problem"] = valid_text(facts["error"] or one_line(error))
        if not isinstance(opened, SlideError):
            facts["size_px"], facts["mpp"] = [opened.info.height, opened.info.width], list(opened.info.mpp_yx)
    return facts


def _add_heatmap_facts(
    facts: dict[str, Any], result: SlideResult, spread: Spread | WsiGradcamError | None, windows: Windows
) -> None:
    """Add the facts of the heatmap one by one: those before an error are shown."""
    plan = result.plan
    facts["size_px"], facts["mpp"] = list(plan.slide_px), list(plan.slide_mpp)
    facts["patch"] = {"count": plan.patches, "footprint_px": list(plan.footprint), "view_px": list(plan.view)}
    facts["heat"] = _heat(result)
    channels = [_channel(channel, windows, str(channel.number)) for channel in result.channels]
    if spread is not None and not isinstance(spread, WsiGradcamError):
        channels += [_channel(c, {}, f"spread-{spread.digest}/{c.number}") for c in spread.result.channels]
    facts["channels"] = channels
    facts["spread_problem"] = valid_text(one_line(spread)) if isinstance(spread, WsiGradcamError) else None
    facts["table"] = result.is_finished and plan.patches > 0


def _add_classes(facts: dict[str, Any], slide: ServedSlide) -> None:
    """Add the channel of the most probable classes, with their names, as `predicted` to the facts of a slide."""
    facts["predicted"] = None
    with suppress(WsiGradcamError, OSError, KeyError):
        about = _channel(Predicted.of(slide).result.channels[0], {}, f"{CLASSES}-0/0")
        facts["predicted"] = about | {"classes": [valid_text(label) for label in slide.result.classes]}


def _add_clusters(facts: dict[str, Any], layer: Clustered | None, names: Callable[[], dict[int, str]]) -> None:
    """Add the channel of the clusters of the evidence, with their current names and colours, as `clustered`."""
    facts["clustered"] = None
    if layer is not None:
        named = names()
        kinds = [replace(kind, name=named.get(kind.number, "")) for kind in layer.result.kinds]
        about = _channel(layer.result.channels[0], {}, f"{CLUSTERS}-{layer.state}/0")
        shown, colours = [valid_text(kind.title) for kind in kinds], [f"#{kind.colour}" for kind in kinds]
        facts["clustered"] = about | {"classes": [*shown, NO_CLUSTER], "colours": [*colours, "#A0A0A0"]}


def _add_second_run(facts: dict[str, Any], compared: Compared | WsiGradcamError | None, name: str) -> None:
    """Add the channels of a second run, and the differences, each with its own grid, to the facts of a slide."""
    facts["second_problem"] = valid_text(one_line(compared)) if isinstance(compared, WsiGradcamError) else None
    if compared is None or isinstance(compared, WsiGradcamError) or not facts["heat"]:
        return
    other, difference = compared.slide.result, compared.result
    for kind, result in ((OTHER, other), (DIFFERENCE, difference)):
        heat = _heat(result)
        for channel in result.channels:
            about = _channel(channel, {}, f"{kind}-{compared.version}/{channel.number}") | {"heat": heat}
            if kind == OTHER:
                about |= {"label": valid_text(f"{channel.label} ({name})"), "second": valid_text(channel.label)}
            facts["channels"].append(about)


def _heat(result: SlideResult | Difference) -> dict[str, Any]:
    """Describe the grid of a heatmap."""
    pyramid = heatmap_pyramid(result)
    return {
        "size_px": [pyramid.height, pyramid.width],
        "levels": pyramid.levels,
        "tile_px": pyramid.tile_px,
        "finer": finer_levels(result),
        "stride_px": result.stride_px,
    }


def _slide_image(opened: Slide | SlideError) -> dict[str, Any]:
    if isinstance(opened, SlideError):
        return {"problem": valid_text(one_line(opened))}
    pyramid = slide_pyramid(opened.info)
    return {
        "problem": None,
        "levels": pyramid.levels,
        "tile_px": pyramid.tile_px,
        "objective": opened.info.objective,
        "background": list(opened.info.background),
    }


def _channel(channel: ChannelInfo, windows: Windows, address: str) -> dict[str, Any]:
    """Describe a channel; `address` is its part of its tiles' addresses."""
    scale, run = channel_scale(channel), windows.get(channel.label)
    return {
        "address": address,
        "label": valid_text(channel.label),
        "method": channel.method,
        "target": valid_text(channel.target),
        "unit": channel.unit,
        "range": [channel.minimum, channel.maximum],
        "window": list(channel.window),
        "run_window": list(run) if run else None,
        "scale": [scale.low, scale.high],
    }


def _patch_maps(result: SlideResult, number: int) -> list[dict[str, Any]]:
    """Return a patch's own maps, one for each channel that has them: values [h][w] with label and unit."""
    return [
        {
            "channel": channel.number,
            "label": valid_text(channel.label),
            "unit": channel.unit,
            "values": [[round(float(value), 5) for value in row] for row in cam],
        }
        for channel, cam in zip(result.channels, result.cams(number), strict=False)
    ]


def _exists(path: StoragePath) -> bool:
    try:
        return path.size() >= 0
    except (FileNotFoundError, WsiGradcamError):
        return False
