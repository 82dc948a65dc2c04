"""`heatmap.ome.zarr`: the only writer of OME-Zarr (OME-NGFF 0.5, Zarr 3, sharded).

The image covers the whole slide from (0, 0), so that level 0 needs only a scale; each level is ceil(n / 2) of the
one before with twice its scale; the coverage label has the same levels. Viewers differ in what else they read, and
this much they agree on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from wsi_gradcam.errors import StoreError, quoted
from wsi_gradcam.geometry import Region, pyramid_shapes, tiles
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.io.zarr_stores import MADE_BY_US, ZarrGroup, telling_damage, write_group

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from zarr.abc.store import Store

    from wsi_gradcam.io.paths import StoragePath

CHUNK, SHARD = 512, 2048
LABEL = "coverage"
TISSUE, EXPLAINED, UNREADABLE = 1, 2, 4  # bits of the coverage label

# Distinct on pink tissue and for colour-blind eyes (Okabe and Ito).
COLOURS = ("D55E00", "0072B2", "009E73", "CC79A7", "E69F00", "56B4E9", "F0E442")


@dataclass(frozen=True)
class Channel:
    """A channel and how to show it: label, value range, and the window between which colour runs."""

    label: str
    minimum: float = 0.0
    maximum: float = 1.0
    start: float = 0.0
    end: float = 1.0
    active: bool = True


class HeatmapStore:
    """Reads and writes a heatmap, level by level and block by block.

    A block is a region that is exactly one shard: no two tasks ever write the same file. Where the shapes of the levels
    are known, as `planned`, others are refused.
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
        """The channels and how they are shown, as the metadata say."""
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
        """Return all channels of a level, float32 [channels, h, w], not read yet.

        Raises:
            StoreError: its size is not as planned, or its chunks are not ours.
        """
        return self._checked(level, str(level), "float32", (1,))

    def labels(self, level: int) -> zarr.Array[Any]:
        """Return the coverage label of a level, uint8 [h, w], not read yet. Raises as `array`."""
        return self._checked(level, f"labels/{LABEL}/{level}", "uint8", ())

    def _checked(self, level: int, name: str, dtype: str, leading: tuple[int, ...]) -> zarr.Array[Any]:
        """Return an array of the size that it shall have, in chunks as large as ours: no region of it needs more."""
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
        TypeError: it is none.
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
    """Validate a copy of what yaozarrs reads, as it knows no object stores of ours; raises whatever it raises."""
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
