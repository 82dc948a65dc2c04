"""Heatmaps as lazy labelled arrays: dask inside, xarray around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr

from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.results.heatmap import EXPLAINED, SHARD, HeatmapStore
from wsi_gradcam.results.patch_store import OK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.results.display import ChannelInfo
    from wsi_gradcam.results.feature_store import FeatureStore
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.slides import Slide


SLIDE_CHUNK = 1024


def lazy_channel(
    store: HeatmapStore, plan: SlidePlan, level: int, channel: ChannelInfo, *, masked: bool
) -> xr.DataArray:
    """Return a channel of a level, float32 [y, x]; with `masked`, NaN where nothing was explained."""
    values = da.from_array(store.array(level), chunks=(1, SHARD, SHARD), name=False)[channel.number]
    if masked:
        values = da.where(_flags(store, level) & EXPLAINED, values, np.float32(np.nan))
    about = {"units": channel.unit, "long_name": channel.label, "window": list(channel.window)}
    return _labelled(values, plan, level, channel.label, about)


def lazy_coverage(store: HeatmapStore, plan: SlidePlan, level: int) -> xr.DataArray:
    """Return the coverage label of a level, uint8 [y, x]: bits 1 tissue, 2 explained, 4 unreadable."""
    return _labelled(_flags(store, level), plan, level, "coverage", {"long_name": "coverage"})


def _flags(store: HeatmapStore, level: int) -> Any:
    return da.from_array(store.labels(level), chunks=(SHARD, SHARD), name=False)


def lazy_levels(store: HeatmapStore, count: int, channel: int) -> list[Any]:
    """Return a channel's first `count` levels as dask arrays, float32 [h, w]."""
    arrays = (da.from_array(store.array(level), chunks=(1, SHARD, SHARD), name=False) for level in range(count))
    return [array[channel] for array in arrays]


def lazy_flags(store: HeatmapStore, count: int) -> list[Any]:
    """Return the coverage label's first `count` levels as dask arrays, uint8 [h, w]."""
    return [_flags(store, level) for level in range(count)]


def lazy_slide(slide: Slide) -> list[Any]:
    """Return an open slide's levels as dask arrays, RGB uint8 [h, w, 3]; it must stay open while they are read."""
    levels = [number for number, level in enumerate(slide.info.levels) if not level.problem]
    return [
        da.from_array(_LevelPixels(slide, level), chunks=(SLIDE_CHUNK, SLIDE_CHUNK, 3), name=False) for level in levels
    ]


# The arrays of features.zarr: their axes after the patches, and the attributes that name the positions along them.
BAG_AXES = {
    "features": {"feature": ""},
    "relevance": {"bag_method": "bag_methods", "target": "targets"},
    "attention": {"head": "attention"},
    "coefficients": {"target": "targets", "feature": ""},
}


def lazy_bag(store: FeatureStore, yx: NDArray[np.int64], name: str, units: str) -> xr.DataArray:
    """Return an array of a slide's bag, [patch, ...]; NaN for unreadable patches, which are not part of the bag.

    Coordinates are the patches' numbers, and `y` and `x` of their top left corners in level-0 px of the slide.
    """
    array, status = (da.from_array(found, chunks=found.chunks, name=False) for found in store.arrays(name, "status"))
    missing = (status != OK).reshape(-1, *[1] * (array.ndim - 1))
    coordinates: dict[str, Any] = {
        "patch": np.arange(len(yx)),
        "y": ("patch", yx[:, 0], {"units": "px", "long_name": "level-0 px of the slide"}),
        "x": ("patch", yx[:, 1], {"units": "px", "long_name": "level-0 px of the slide"}),
    }
    axes = BAG_AXES[name]
    coordinates |= {axis: list(store.attributes[key]) for axis, key in axes.items() if key}
    values = da.where(missing, array.dtype.type(np.nan), array)
    return xr.DataArray(values, coordinates, ("patch", *axes), name, {"units": units})


class _LevelPixels:
    """A level of a slide in the form in which dask takes an array: with a shape, and read by slices."""

    ndim, dtype = 3, np.dtype(np.uint8)

    def __init__(self, slide: Slide, level: int) -> None:
        size = slide.info.levels[level]
        self.shape = (size.height, size.width, 3)
        self._slide, self._level = slide, level

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[np.uint8]:
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip(key[:2], self.shape, strict=False)
        )
        return self._slide.read_level(self._level, Region(top, left, bottom - top, right - left))[:, :, key[2]]


def padded(levels: Sequence[Any], factors: Sequence[int]) -> list[Any]:
    """Pad levels with zeros at their lower and right edges, so that the ratios of their shapes are the factors."""
    whole = math.lcm(*factors)
    sizes = [
        max(ceil_div(level.shape[axis] * f, whole) for level, f in zip(levels, factors, strict=True)) for axis in (0, 1)
    ]
    out = []
    for level, factor in zip(levels, factors, strict=True):
        missing = [(0, size * whole // factor - have) for size, have in zip(sizes, level.shape[:2], strict=True)]
        out.append(da.pad(level, [*missing, *[(0, 0)] * (level.ndim - 2)]))
    return out


def _labelled(values: Any, plan: SlidePlan, level: int, name: str, about: dict[str, Any]) -> xr.DataArray:
    """Label the pixels' centres: `y`, `x` in level-0 px of the slide, `y_um`, `x_um` in micrometres."""
    step_px = plan.stride * 2**level
    y, x = ((np.arange(size) + 0.5) * step_px for size in values.shape)
    coordinates = {
        "y": ("y", y, {"units": "px", "long_name": "level-0 px of the slide"}),
        "x": ("x", x, {"units": "px", "long_name": "level-0 px of the slide"}),
        "y_um": ("y", y * plan.slide_mpp[0], {"units": "µm"}),
        "x_um": ("x", x * plan.slide_mpp[1], {"units": "µm"}),
    }
    about |= {"level": level, "step_px": step_px, "slide_mpp": list(plan.slide_mpp)}
    return xr.DataArray(values, coordinates, ("y", "x"), name, about)
