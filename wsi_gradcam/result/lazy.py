"""Heatmaps as lazy labelled arrays: dask inside, xarray around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr

from wsi_gradcam.stores.heatmap import EXPLAINED, SHARD, HeatmapStore

if TYPE_CHECKING:
    from wsi_gradcam.plan import SlidePlan
    from wsi_gradcam.result.channels import ChannelInfo


def lazy_channel(
    store: HeatmapStore, plan: SlidePlan, level: int, channel: ChannelInfo, *, masked: bool
) -> xr.DataArray:
    """A channel of a level, float32 [y, x]; with `masked`, NaN where nothing was explained."""
    values = da.from_array(store.array(level), chunks=(1, SHARD, SHARD), name=False)[channel.number]
    if masked:
        values = da.where(_flags(store, level) & EXPLAINED, values, np.float32(np.nan))
    about = {"units": channel.unit, "long_name": channel.label, "window": list(channel.window)}
    return _labelled(values, plan, level, channel.label, about)


def lazy_coverage(store: HeatmapStore, plan: SlidePlan, level: int) -> xr.DataArray:
    """The coverage label of a level, uint8 [y, x]: bits 1 tissue, 2 explained, 4 unreadable."""
    return _labelled(_flags(store, level), plan, level, "coverage", {"long_name": "coverage"})


def _flags(store: HeatmapStore, level: int) -> Any:
    return da.from_array(store.labels(level), chunks=(SHARD, SHARD), name=False)


def _labelled(values: Any, plan: SlidePlan, level: int, name: str, about: dict[str, Any]) -> xr.DataArray:
    """The array with its pixels' centres: `y`, `x` in level-0 px of the slide, `y_um`, `x_um` in micrometres."""
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
