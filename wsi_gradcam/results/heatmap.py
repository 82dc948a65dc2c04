"""`heatmap.ome.zarr`: the only writer of OME-Zarr (OME-NGFF 0.5, Zarr 3, sharded).

The image covers the whole slide from (0, 0), so that level 0 needs only a scale; each level is ceil(n / 2) of the one
before, with twice its scale; the coverage label has the same levels. All viewers agree on this much; they differ in
what else they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import zarr

from wsi_gradcam.errors import ConfigError, StoreError, quoted
from wsi_gradcam.geometry import Region, pyramid_shapes, tiles
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.io.zarr_stores import MADE_BY_US, ZarrGroup, telling_damage, write_group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from zarr.abc.store import Store

    from wsi_gradcam.geometry import Region
    from wsi_gradcam.io.paths import StoragePath


CHUNK, SHARD = 512, 2048
LABEL = "coverage"
TISSUE, EXPLAINED, UNREADABLE = 1, 2, 4  # bits of the coverage label

# Distinct on pink tissue and for colour-blind people (Okabe and Ito).
COLOURS = ("D55E00", "0072B2", "009E73", "CC79A7", "E69F00", "56B4E9", "F0E442")


@dataclass(frozen=True)
class Channel:
    """A channel and how to show it: label, value range, and the window over which colours run."""

    label: str
    minimum: float = 0.0
    maximum: float = 1.0
    start: float = 0.0
    end: float = 1.0
    active: bool = True


class HeatmapStore:
    """Reads and writes a heatmap, level by level and block by block.

    A block is a region that is exactly one shard: no two tasks ever write the same file. If the shapes of the levels
    are known (`planned`), others are refused.
    """

    def __init__(
        self, place: StoragePathLike, *, read_only: bool = False, planned: Sequence[tuple[int, int]] | None = None
    ) -> None:
        self._place, self._planned = storage_path(place), planned
        self._group = ZarrGroup(self._place, read_only=read_only)

    @classmethod
    def create(
        cls,
        place: StoragePathLike,
        name: str,
        shape: tuple[int, int],
        scale_um: tuple[float, float],
        channels: Sequence[Channel],
        attributes: dict[str, Any],
    ) -> HeatmapStore:
        """Create a template of zeros for a heatmap of `shape` [h, w], `scale_um` (y, x) micrometres per pixel."""
        shapes = pyramid_shapes(*shape)

        def build(store: Store) -> None:
            group = zarr.create_group(store)
            labels = group.create_group("labels")
            label = labels.create_group(LABEL)
            for level, (height, width) in enumerate(shapes):
                group.create_array(
                    str(level),
                    shape=(len(channels), height, width),
                    chunks=(1, CHUNK, CHUNK),
                    shards=(1, SHARD, SHARD),
                    dtype="float32",
                    fill_value=0,
                    dimension_names=("c", "y", "x"),
                )
                label.create_array(
                    str(level),
                    shape=(height, width),
                    chunks=(CHUNK, CHUNK),
                    shards=(SHARD, SHARD),
                    dtype="uint8",
                    fill_value=0,
                    dimension_names=("y", "x"),
                )
            labels.attrs["ome"] = {"version": "0.5", "labels": [LABEL]}
            label.attrs["ome"] = _label_metadata(shapes, scale_um)
            group.attrs.put({"ome": _image_metadata(name, shapes, scale_um, channels), "wsi_gradcam": attributes})

        write_group(storage_path(place), build)
        return cls(place)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """[h, w] of each level."""
        height, width = self.array(0).shape[1:]
        return pyramid_shapes(height, width)

    @property
    def attributes(self) -> dict[str, Any]:
        """All metadata of the image."""
        return dict(self._group.group.attrs.asdict())

    @property
    def label_attributes(self) -> dict[str, Any]:
        """All metadata of the coverage label."""
        return dict(self._group.group[f"labels/{LABEL}"].attrs.asdict())

    @property
    def channels(self) -> list[Channel]:
        """The channels and how they are shown, according to the metadata."""
        with telling_damage(self._place):
            return [
                Channel(_text(shown["label"]), low, high, start, end, bool(shown["active"]))
                for shown in self.attributes["ome"]["omero"]["channels"]
                for low, high, start, end in [map(float, itemgetter("min", "max", "start", "end")(shown["window"]))]
            ]

    def blocks(self, level: int) -> list[Region]:
        """Return the blocks of a level."""
        return tiles(*self.shapes[level], SHARD)

    def write(self, level: int, channel: int, block: Region, values: NDArray[np.float32]) -> None:
        """Write one channel of one block, float32 [height, width] of the block."""
        with self._place.wrap_write_errors():
            self.array(level)[(channel, *block.slices)] = values

    def write_flags(self, level: int, block: Region, flags: NDArray[np.uint8]) -> None:
        """Write the coverage label of one block: bits TISSUE, EXPLAINED, UNREADABLE."""
        with self._place.wrap_write_errors():
            self.labels(level)[block.slices] = flags

    def read(self, level: int, channel: int, region: Region) -> NDArray[np.float32]:
        """Read one channel of a region of a level, float32 [height, width]."""
        with telling_damage(self._place):
            return np.asarray(self.array(level)[(channel, *region.slices)], np.float32)

    def read_flags(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Read the coverage label of a region of a level, uint8 [height, width]."""
        with telling_damage(self._place):
            return np.asarray(self.labels(level)[region.slices], np.uint8)

    def set_channels(self, channels: Sequence[Channel]) -> None:
        """Replace how channels are shown; values are never touched."""
        with self._place.wrap_write_errors():
            ome = dict(self.attributes["ome"])
            ome["omero"] = _omero(channels)
            self._group.group.attrs["ome"] = ome

    def array(self, level: int) -> zarr.Array[Any]:
        """Return all channels of a level, float32 [channels, h, w], without reading them yet.

        Raises:
            StoreError: its size is not as planned, or its chunks are not ours.
        """
        return self._checked(level, str(level), "float32", (1,))

    def labels(self, level: int) -> zarr.Array[Any]:
        """Return the coverage label of a level, uint8 [h, w], without reading it yet. Errors as for `array`."""
        return self._checked(level, f"labels/{LABEL}/{level}", "uint8", ())

    def _checked(self, level: int, name: str, dtype: str, leading: tuple[int, ...]) -> zarr.Array[Any]:
        """Return an array that has the expected size and chunks as large as ours, so no region needs more memory."""
        array = self._group.array(name)
        chunk, shard = (*leading, CHUNK, CHUNK), (*leading, SHARD, SHARD)
        if array.dtype != dtype or (array.chunks, array.shards) != (chunk, shard):
            raise StoreError(
                f"{self._place}/{name}: {array.dtype} in chunks of {array.chunks}, expected {dtype} in {chunk}; "
                f"{MADE_BY_US}"
            )
        if self._planned is not None and array.shape[-2:] != self._planned[level]:
            raise StoreError(
                f"{self._place}/{name}: {array.shape[-2:]} px, expected {self._planned[level]}; {MADE_BY_US}"
            )
        return array


def _image_metadata(
    name: str, shapes: Sequence[tuple[int, int]], scale_um: tuple[float, float], channels: Sequence[Channel]
) -> dict[str, Any]:
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}, *_space_axes()]
    multiscale = {
        "name": name,
        "axes": axes,
        "datasets": _datasets(len(shapes), [1.0], scale_um),
        "type": "mean",
    }
    return {"version": "0.5", "multiscales": [multiscale], "omero": _omero(channels)}


def _label_metadata(shapes: Sequence[tuple[int, int]], scale_um: tuple[float, float]) -> dict[str, Any]:
    meanings = {
        TISSUE: ("tissue, not explained", (200, 200, 200, 255)),
        EXPLAINED: ("explained, not tissue", (120, 180, 220, 255)),
        TISSUE | EXPLAINED: ("explained tissue", (0, 158, 115, 255)),
        UNREADABLE: ("unreadable", (213, 94, 0, 255)),
        TISSUE | UNREADABLE: ("unreadable tissue", (213, 94, 0, 255)),
        EXPLAINED | UNREADABLE: ("partly unreadable", (230, 159, 0, 255)),
        TISSUE | EXPLAINED | UNREADABLE: ("partly unreadable tissue", (230, 159, 0, 255)),
    }
    return {
        "version": "0.5",
        "multiscales": [{"name": LABEL, "axes": _space_axes(), "datasets": _datasets(len(shapes), [], scale_um)}],
        "image-label": {
            "colors": [{"label-value": v, "rgba": list(rgba)} for v, (_, rgba) in meanings.items()],
            "properties": [{"label-value": v, "meaning": text} for v, (text, _) in meanings.items()],
            "source": {"image": "../../"},
        },
    }


def _space_axes() -> list[dict[str, str]]:
    return [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]


def _datasets(levels: int, leading: list[float], scale_um: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [*leading, scale_um[0] * 2**level, scale_um[1] * 2**level]}
            ],
        }
        for level in range(levels)
    ]


def _text(value: object) -> str:
    """Return a text of metadata.

    Raises:
        TypeError: it is not text.
    """
    if not isinstance(value, str):
        raise TypeError(f"{quoted(value)} is not the name of a channel")
    return value


def _omero(channels: Sequence[Channel]) -> dict[str, Any]:
    return {
        "channels": [
            {
                "label": channel.label,
                "color": COLOURS[i % len(COLOURS)],
                "active": channel.active,
                "window": {
                    "min": channel.minimum,
                    "max": channel.maximum,
                    "start": channel.start,
                    "end": channel.end,
                },
            }
            for i, channel in enumerate(channels)
        ],
        "rdefs": {"model": "color"},
    }


def check_specification(heatmap: StoragePath) -> None:
    """Validate a copy of what yaozarrs reads, which does not know our object stores; raises its errors."""
    import yaozarrs  # takes time to import, and only validation needs it

    with TemporaryDirectory() as folder:
        copy = Path(folder) / "heatmap.ome.zarr"
        _copy_metadata(heatmap, copy)
        yaozarrs.validate_zarr_store(copy)


def _copy_metadata(place: StoragePath, folder: Path) -> None:
    folder.mkdir()
    for name in place.file_names():
        (folder / name).write_bytes((place / name).read())
    for name in place.folder_names():
        if name != "c":
            _copy_metadata(place / name, folder / name)


Window = Literal["hann", "uniform"]
# Where only a single patch reaches, its edge value counts in full after division; the floor keeps that division
# well-behaved in float32.
FLOOR = 1e-3
T = TypeVar("T", bound=np.generic)
GROUP = 64  # patches enlarged at once


@dataclass(frozen=True)
class Enlarger:
    """Enlarges CAMs of one size onto heatmap pixels.

    A CAM cell j of `cells` along an axis represents the j-th equal part of the patch's footprint, and its value belongs
    to the centre of that part. A heatmap pixel takes the value at its own centre: linear between cell centres, constant
    beyond the outer ones; if cells are finer than heatmap pixels, they are averaged under a triangle as wide as a
    pixel. A heatmap pixel belongs to the patches whose half-open footprint contains its centre.

    Attributes:
        footprint: (height, width) of a patch in level-0 px.
        cells: (h, w) of a CAM.
        stride: level-0 px per heatmap pixel.
        window: how overlapping patches are weighted: "hann" is sin^2 from edge to edge, "uniform" is 1.
    """

    footprint: tuple[float, float]
    cells: tuple[int, int]
    stride: int
    window: Window = "hann"

    def __post_init__(self) -> None:
        if min(self.footprint) < self.stride:
            raise ConfigError(
                f"a patch covers {min(self.footprint):g} level-0 px, less than one heatmap pixel of {self.stride}; "
                "choose a smaller --heatmap-stride"
            )

    def first(self, start: NDArray[Any]) -> NDArray[np.int64]:
        """Return the index of the first heatmap pixel whose centre is at or after `start` level-0 px."""
        return np.ceil(start / self.stride - 0.5).astype(np.int64)

    def axis(self, axis: int, start: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return interpolation [n, pixels, cells] and blending weights [n, pixels] from `first(start)` on."""
        size, cells = self.footprint[axis], self.cells[axis]
        pixels = int(np.ceil(size / self.stride)) + 1
        index = self.first(start)[:, None] + np.arange(pixels)
        place = ((index + 0.5) * self.stride - start[:, None]) / size  # 0 to 1 inside the patch
        reach = max(1.0, self.stride * cells / size)
        distance = np.abs((place * cells - 0.5)[..., None] - np.arange(cells))
        enlarge = np.maximum(0.0, 1.0 - distance / reach)
        enlarge /= np.maximum(enlarge.sum(axis=2, keepdims=True), 1e-9)
        inside = (place >= 0) & (place < 1)
        weight = np.maximum(np.sin(np.pi * place) ** 2, FLOOR) if self.window == "hann" else np.ones_like(place)
        return enlarge.astype(np.float32), np.where(inside, weight, 0).astype(np.float32)


class Blender:
    """The running weighted mean of the patches' values in one block of the heatmap.

    Patches must be added in the same order every time: float sums depend on the order, and results must not.
    """

    def __init__(self, enlarger: Enlarger, block: Region) -> None:
        self._enlarger = enlarger
        self._block = block
        self._sum = np.zeros((block.height, block.width), np.float32)
        self._weight = np.zeros_like(self._sum)

    def add(self, yx: NDArray[Any], cams: NDArray[np.float32]) -> None:
        """Add patches at `yx` int64 [n, 2] (level-0 px) with `cams` float32 [n, h, w]."""
        for start in range(0, len(yx), GROUP):
            self._add(yx[start : start + GROUP], cams[start : start + GROUP])

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return (values float32, covered bool), both [height, width] of the block; 0 where nothing covers."""
        covered = self._weight > 0
        return np.divide(self._sum, self._weight, out=np.zeros_like(self._sum), where=covered), covered

    def joined(self, other: Blender) -> Blender:
        """Add what another blender has accumulated for the same block; return this one."""
        self._sum += other._sum
        self._weight += other._weight
        return self

    def _add(self, yx: NDArray[Any], cams: NDArray[np.float32]) -> None:
        for place, value, weight in self.placements(yx, cams, weighted=True):
            self._sum[place] += value
            self._weight[place] += weight

    def placements(
        self, yx: NDArray[Any], cams: NDArray[np.float32], weighted: bool = False
    ) -> Iterator[tuple[tuple[slice, slice], NDArray[np.float32], NDArray[np.float32]]]:
        """Yield (slices of the block, enlarged CAM there, its weight there) for each patch that meets it, in order.

        With `weighted`, the CAM times its weight.
        """
        rows, row_weight = self._enlarger.axis(0, yx[:, 0])
        columns, column_weight = self._enlarger.axis(1, yx[:, 1])
        values = rows @ cams @ columns.transpose(0, 2, 1)
        weights = row_weight[:, :, None] * column_weight[:, None, :]
        if weighted:
            values *= weights
        tops = self._enlarger.first(yx[:, 0]) - self._block.y
        lefts = self._enlarger.first(yx[:, 1]) - self._block.x
        height, width = values.shape[1:]
        for value, weight, top, left in zip(values, weights, tops.tolist(), lefts.tolist(), strict=True):
            y, x = max(0, top), max(0, left)
            bottom = min(self._block.height, top + height)
            right = min(self._block.width, left + width)
            if y < bottom and x < right:
                here = slice(y - top, bottom - top), slice(x - left, right - left)
                yield (slice(y, bottom), slice(x, right)), value[here], weight[here]


def blend_boxes(
    boxes: NDArray[np.float64], values: NDArray[np.float32], stride: int, block: Region, window: Window = "uniform"
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return (values float32, covered bool), both [height, width], of one value for each patch, blended in a block.

    Patches may be anywhere and have any size; where they overlap, each heatmap pixel is their weighted mean.

    Args:
        boxes: float64 [n, 4], y, x, height, width in level-0 px.
        values: float32 [n].
        stride: level-0 px per heatmap pixel.
        block: in heatmap pixels.
        window: as for `Enlarger`.

    Raises:
        ConfigError: a patch is smaller than a heatmap pixel.
    """
    total: Blender | None = None
    near = touching(boxes[:, :2], boxes[:, 2:], stride, block)
    boxes, values = boxes[near], values[near]
    for height, width in np.unique(boxes[:, 2:], axis=0).tolist():
        alike = (boxes[:, 2:] == (height, width)).all(axis=1)
        blender = Blender(Enlarger((height, width), (1, 1), stride, window), block)
        blender.add(boxes[alike, :2], values[alike, None, None])
        total = blender if total is None else total.joined(blender)
    if total is None:
        return np.zeros((block.height, block.width), np.float32), np.zeros((block.height, block.width), np.bool_)
    return total.result()


def touching(
    yx: NDArray[Any], footprint: tuple[float, float] | NDArray[np.float64], stride: int, block: Region
) -> NDArray[np.int64]:
    """Return the indices, ascending, of the patches whose footprint meets `block` (in heatmap px of `stride`).

    The footprint is (height, width), one for all patches or [n, 2].
    """
    y, x = yx[:, 0], yx[:, 1]
    height, width = np.asarray(footprint).T
    rows = (y < block.bottom * stride) & (y + height > block.y * stride)
    columns = (x < block.right * stride) & (x + width > block.x * stride)
    return np.flatnonzero(rows & columns)


def coarsen(values: NDArray[np.float32], covered: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the half-size mean over the covered pixels of each 2 x 2, float32 [..., ceil(h / 2), ceil(w / 2)].

    Pixels that no patch covers do not pull their neighbours towards 0, so the map does not fade at tissue edges.
    `values` is [h, w], 0 where not `covered`.
    """
    total = _sum2x2(np.where(covered, values, np.float32(0)))
    count = _sum2x2(covered.astype(np.float32))
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def coarsen_flags(flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the half-size bitwise or of each 2 x 2, uint8 [ceil(h / 2), ceil(w / 2)], so that no flag is lost."""
    padded = _even(flags)
    return padded[::2, ::2] | padded[1::2, ::2] | padded[::2, 1::2] | padded[1::2, 1::2]


def _sum2x2(image: NDArray[np.float32]) -> NDArray[np.float32]:
    padded = _even(image)
    return padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]


def _even(image: NDArray[T]) -> NDArray[T]:
    height, width = image.shape
    return np.pad(image, ((0, height % 2), (0, width % 2)))
