"""The label image of a slide: which kind of evidence lies where, on the grid of the slide's heatmap, as OME-NGFF 0.5.

Where patches overlap, a pixel belongs to the one in whose middle it lies most. Also here: the names of kinds, and a
reader of a slide's tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wsi_gradcam.errors import ConfigError, DocumentError, MarkError, StoreError, one_line
from wsi_gradcam.evidence import COLOURS, NOTHING, EvidenceFolder
from wsi_gradcam.evidence.clusters import SIDES
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.documents import MAX_BYTES, read_yaml
from wsi_gradcam.io.zarr_stores import MADE_BY_US, ZarrGroup, telling_damage, write_labels_group
from wsi_gradcam.results.heatmap import CHUNK, SHARD, touching
from wsi_gradcam.results.run_files import folder_name
from wsi_gradcam.run.claims import EVIDENCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.plan import Arrays
    from wsi_gradcam.evidence import EvidencePlan
    from wsi_gradcam.evidence.clusters import Side
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.results.slide import SlideResult

    Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Label:
    """A kind as described by a label image."""

    number: int
    name: str
    side: Side
    colour: str

    @property
    def title(self) -> str:
        """The name of its class: the one that was given, or its number.

        >>> Label(3, "", "for", "009E73").title, Label(3, "mitoses", "for", "009E73").title
        ('cluster 3', 'mitoses')
        """
        return self.name or f"cluster {self.number}"


def is_whole(place: StoragePath, plan: EvidencePlan) -> bool:
    """Return whether the label image of these kinds exists."""
    return bool(_attributes(place).get("wsi_gradcam", {}).get("evidence") == plan.cells_digest)


def name_labels(place: StoragePath, plan: EvidencePlan, slide: str, slide_plan: SlidePlan) -> None:
    """Write the names of kinds into a label image, if they have changed."""
    metadata = _metadata(slide, slide_plan, labels_of(plan))
    if _attributes(place).get("ome") != metadata:
        with place.wrap_write_errors():
            ZarrGroup(place).group.attrs["ome"] = metadata


def write_labels(
    place: StoragePath, plan: EvidencePlan, slide: str, slide_plan: SlidePlan, pieces: Sequence[Arrays]
) -> None:
    """Write the label image of a slide from its patches with sorted cells."""
    about = {"run": plan.run_digest, "slide": slide_plan.slide_digest, "target": plan.target.label}
    attributes = {"ome": _metadata(slide, slide_plan, labels_of(plan)), "wsi_gradcam": about}
    write_labels_group(place, slide_plan.level_shapes, CHUNK, SHARD, attributes)
    _paint(place, plan, slide_plan, pieces)
    with place.wrap_write_errors():
        ZarrGroup(place).group.attrs["wsi_gradcam"] = {"evidence": plan.cells_digest, **about}  # the last: complete


def labels_of(plan: EvidencePlan) -> list[Label]:
    """Return the labels of a plan's kinds."""
    assert plan.kinds is not None
    return [
        Label(i + 1, plan.names.get(i + 1, ""), side, COLOURS[i % len(COLOURS)])
        for i, side in enumerate(plan.kinds.sides)
    ]


def _attributes(place: StoragePath) -> dict[str, Any]:
    with suppress(FileNotFoundError, StoreError):
        return dict(ZarrGroup(place, read_only=True).group.attrs.asdict())
    return {}


def _metadata(slide: str, plan: SlidePlan, labels: Sequence[Label]) -> dict[str, Any]:
    scale = (plan.slide_mpp[0] * plan.stride, plan.slide_mpp[1] * plan.stride)
    depth = len(folder_name(slide).split("/")) + 2  # from OUT/evidence/SLIDE/clusters.ome.zarr up to OUT
    colours = [{"label-value": one.number, "rgba": [*bytes.fromhex(one.colour), 255]} for one in labels]
    properties = [
        {"label-value": one.number, "cluster": one.number, "name": one.name, "side": one.side} for one in labels
    ]
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": "clusters",
                "axes": [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"],
                "datasets": [
                    {
                        "path": str(level),
                        "coordinateTransformations": [{"type": "scale", "scale": [s * 2**level for s in scale]}],
                    }
                    for level in range(len(plan.level_shapes))
                ],
            }
        ],
        "image-label": {
            "colors": [*colours, {"label-value": NOTHING, "rgba": [160, 160, 160, 255]}],
            "properties": [*properties, {"label-value": NOTHING, "cluster": 0, "name": "of no cluster", "side": ""}],
            "source": {"image": "../" * depth + f"{folder_name(slide)}/heatmap.ome.zarr"},
        },
    }


def _paint(place: StoragePath, plan: EvidencePlan, slide_plan: SlidePlan, pieces: Sequence[Arrays]) -> None:
    """Write all levels, block by block; blocks without patches are left empty."""
    group = ZarrGroup(place)
    cells = np.concatenate([one["cells/kinds"] for one in pieces])
    yx, sizes = (np.concatenate(values) for values in zip(*(_seen(one, slide_plan) for one in pieces), strict=True))
    with place.wrap_write_errors():
        for block in slide_plan.blocks(0):
            inside = touching(yx, sizes, slide_plan.stride, block)
            if len(inside):
                labels = painted(slide_plan.stride, block, yx[inside], sizes[inside], cells[inside])
                group.array("0")[block.slices] = labels
        for level in range(1, len(slide_plan.level_shapes)):
            finer = slide_plan.level_shapes[level - 1]
            for block in slide_plan.blocks(level):
                source = Region(block.y * 2, block.x * 2, block.height * 2, block.width * 2)
                labels = coarsened(
                    np.asarray(group.array(str(level - 1))[source.intersect(Region(0, 0, *finer)).slices])
                )
                if labels.any():
                    group.array(str(level))[block.slices] = labels


def _seen(piece: Arrays, plan: SlidePlan) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the corner (y, x) and the size (height, width) of the area seen of each patch, level-0 px [n, 2] each."""
    if "patch/box" in piece:
        return piece["patch/box"][:, :2], piece["patch/box"][:, 2:]
    yx = piece["patch/yx"] + np.array(plan.view[:2])
    return yx, np.broadcast_to(plan.view[2:], yx.shape)


def painted(stride: int, block: Region, yx: NDArray[Any], sizes: NDArray[Any], cells: Labels) -> Labels:
    """Return the label [height, width] of each pixel of a block, from the patch in whose middle it lies most.

    A pixel gets the cell that contains its centre; a cell of no kind is `NOTHING`, and 0 is where there is no patch.

    Args:
        stride: level-0 px per pixel.
        yx, sizes: [n, 2] in level-0 px of what the network sees of each patch.
        cells: [n, h, w] labels.
    """
    best = np.zeros((block.height, block.width), np.float32)
    found = np.zeros((block.height, block.width), np.uint8)
    shape, offset, length = cells.shape[1:], (block.y, block.x), (block.height, block.width)
    for start, size, own in zip(yx.tolist(), sizes.tolist(), cells, strict=True):
        axes = [_pixels(stride, start[i], size[i], shape[i], offset[i], length[i]) for i in (0, 1)]
        (rows, row_cells, row_weights), (columns, column_cells, column_weights) = axes
        weights = row_weights[:, None] * column_weights[None]
        before = best[rows, columns]
        nearer = weights > before
        before[nearer] = weights[nearer]
        found[rows, columns][nearer] = own[row_cells[:, None], column_cells[None]][nearer]
    return found


def _pixels(
    stride: int, start: float, size: float, cells: int, offset: int, length: int
) -> tuple[slice, NDArray[np.int64], NDArray[np.float32]]:
    """Return the pixels of a block that a patch covers along an axis, the cell of each, and how deep inside it is."""
    first = max(int(np.ceil(start / stride - 0.5)), offset)
    last = min(int(np.ceil((start + size) / stride - 0.5)), offset + length)
    place = ((np.arange(first, max(first, last)) + 0.5) * stride - start) / size
    inside = slice(first - offset, max(first, last) - offset)
    weights = np.maximum(np.sin(np.pi * place) ** 2, 1e-6).astype(np.float32)
    return inside, np.minimum((place * cells).astype(np.int64), cells - 1), weights


def coarsened(labels: Labels) -> Labels:
    """Return the image at half size: the first label of a kind in each 2 x 2, so that none is lost from view."""
    padded = np.pad(labels, [(0, side % 2) for side in labels.shape])
    found = np.zeros_like(padded[::2, ::2])
    for wanted in (NOTHING, 0):
        for y, x in ((1, 1), (1, 0), (0, 1), (0, 0)):
            own = padded[y::2, x::2]
            found = np.where((own == NOTHING) if wanted else (own > 0) & (own < NOTHING), own, found)
    return found


@dataclass(frozen=True, eq=False)
class Clusters:
    """The label image of a slide, opened for reading.

    Attributes:
        kinds: those that it describes.
        shapes: [h, w] of each level, those of the slide's heatmap.
    """

    kinds: tuple[Label, ...]
    shapes: list[tuple[int, int]]
    _group: ZarrGroup
    _place: StoragePath

    def read(self, level: int, region: Region) -> Labels:
        """Return labels uint8 [height, width] of a region of a level: 0 not looked at, 255 of no kind.

        Raises:
            StoreError: it is damaged.
        """
        array = self._group.array(str(level))
        if array.dtype != "uint8" or (array.chunks, array.shards) != ((CHUNK, CHUNK), (SHARD, SHARD)):
            raise StoreError(f"{self._place}/{level}: not a label image of ours; {MADE_BY_US}")
        if array.shape != self.shapes[level]:
            raise StoreError(f"{self._place}/{level}: {array.shape} px, expected {self.shapes[level]}; {MADE_BY_US}")
        with telling_damage(self._place):
            return np.asarray(array[region.slices], np.uint8)

    def at(self, yx: NDArray[Any]) -> Labels:
        """Return the labels uint8 [n] of pixels (y, x) [n, 2] of the finest level; 0 outside it."""
        found, pixels = np.zeros(len(yx), np.uint8), np.asarray(yx, np.int64)
        known = np.all((pixels >= 0) & (pixels < self.shapes[0]), axis=1)
        tiles, member = np.unique(pixels[known] // CHUNK, axis=0, return_inverse=True)
        rows = np.flatnonzero(known)
        for number, (y, x) in enumerate((tiles * CHUNK).tolist()):
            tile = self.read(0, Region(y, x, CHUNK, CHUNK).intersect(Region(0, 0, *self.shapes[0])))
            own = rows[member.ravel() == number]
            found[own] = tile[pixels[own, 0] - y, pixels[own, 1] - x]
        return found


def open_clusters(slide: SlideResult) -> Clusters | None:
    """Return the label image of a slide's kinds of evidence; None if there is none, or it belongs to other results.

    Raises:
        StoreError: it is damaged.
    """
    return read_clusters(EvidenceFolder(slide.out / EVIDENCE).labels(slide.id), slide.plan)


def read_clusters(place: StoragePath, plan: SlidePlan) -> Clusters | None:
    """Return the label image at a path, for a slide with this plan; otherwise like `open_clusters`."""
    try:
        group = ZarrGroup(place, read_only=True)
    except FileNotFoundError:
        return None
    attributes: Any = group.group.attrs.asdict()
    with telling_damage(place):
        about = dict(attributes["wsi_gradcam"])
        if "evidence" not in about or about["run"] != plan.run_digest:
            return None
        found = dict(attributes["ome"])["image-label"]
        colours = {one["label-value"]: bytes(one["rgba"][:3]).hex().upper() for one in found["colors"]}
        kinds = tuple(
            Label(int(one["label-value"]), str(one["name"]), one["side"], colours[one["label-value"]])
            for one in found["properties"]
            if 0 < one["label-value"] < NOTHING and one["side"] in SIDES
        )
    return Clusters(kinds, list(plan.level_shapes), group, place)


PLACES = ("patch", "cluster", "contribution")  # columns of a table of places
MAX_ROWS, VALUE_BYTES = 1 << 22, 16  # of a slide's table, and of each of its values
AGAIN = "run `wsi-gradcam evidence` again"


def read_rows(place: StoragePath, names: Sequence[str], patches: int) -> NDArray[np.float64]:
    """Return columns of a table of a slide's evidence, float64 [n, columns]; the first is the number of a patch.

    Raises:
        StoreError: it is damaged, or has more patches than the slide.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(place.read(MAX_ROWS * VALUE_BYTES * 8)))
        about = file.metadata
        size = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
        if about.num_rows > MAX_ROWS or size > (about.num_rows + 1000) * VALUE_BYTES * (len(names) + 8):
            raise StoreError(f"{place}: {about.num_rows:,} rows of {size:,} bytes; {AGAIN}")
        table = file.read(list(names), use_threads=False)
        found = np.stack([np.asarray(table.column(name).to_numpy(), np.float64) for name in names], axis=1)
    except StoreError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise StoreError(f"{place}: damaged ({one_line(error)}); {AGAIN}") from error
    if not np.isfinite(found).all() or (len(found) and not 0 <= found[:, 0].min() <= found[:, 0].max() < patches):
        raise StoreError(f"{place}: patches that the slide does not have; {AGAIN}")
    return found


def by_patch(places: NDArray[np.float64], clusters: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the patches [n] of places (patch, cluster or 0, contribution), and the sums of each cluster [n, k]."""
    numbers, rows = np.unique(places[:, 0].astype(np.int64), return_inverse=True)
    sums, own = np.zeros((len(numbers), clusters)), places[:, 1].astype(np.int64)
    inside = (own > 0) & (own <= clusters)
    np.add.at(sums, (rows[inside], own[inside] - 1), places[inside, 2])
    return numbers, sums


MAX_NAME = 100  # characters


def read_names(place: StoragePath) -> dict[int, str]:
    """Return the names of kinds given by the user, by number; none if there is no such file.

    Raises:
        ConfigError: the file is not a mapping of numbers to names.
    """
    try:
        return _names_in(place, place.read(MAX_BYTES))
    except FileNotFoundError:
        return {}


def _names_in(place: StoragePath, data: bytes) -> dict[int, str]:
    try:
        values = read_yaml(data)
    except DocumentError as error:
        raise ConfigError(f"{place}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, int) and isinstance(v, str) for k, v in values.items()):
        raise ConfigError(f"{place}: expected a line NUMBER: NAME for each named cluster, such as '3: mitoses'")
    return dict(values)


def give_name(place: StoragePath, number: int, name: str, was: str) -> str:
    """Give a kind a name in names.yaml, "" for none, and return its name afterwards.

    That is a different name if somebody else has named it since it was called `was`: theirs stays, as does everything
    else in the file.

    Raises:
        ConfigError: the file is not a mapping of numbers to names.
        MarkError: the name is not text on a single line.
        StoreError: the file cannot be written.
    """
    now = [name]
    if len(name) > MAX_NAME or not name.isprintable():
        raise MarkError(f"a name is one line of up to {MAX_NAME} characters")

    def change(data: bytes | None) -> bytes | None:
        names = _names_in(place, data or b"")
        if names.get(number, "") != was:
            now[0] = names.get(number, "")
            return None
        wanted = {**names, number: name} if name else {key: text for key, text in names.items() if key != number}
        changed = _with_line(data or b"", number, name)
        with suppress(ConfigError):
            if _names_in(place, changed) == wanted:
                return changed
        return "".join(_line(*one) for one in sorted(wanted.items())).encode()  # it did not have one line per name

    place.update(change)
    return now[0]


def _with_line(data: bytes, number: int, name: str) -> bytes:
    """Return names.yaml with another line for a kind, in place of the one it had."""
    lines = data.decode("utf-8", "replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    own = [i for i, line in enumerate(lines) if re.match(rf"{number}\s*:", line)]
    new = [_line(number, name)] if name else []
    at = own[0] if own else len(lines)
    return "".join([*lines[:at], *new, *lines[at + len(own[:1]) :]]).encode()


def _line(number: int, name: str) -> str:
    return f"{number}: {json.dumps(name, ensure_ascii=False)}\n"
