"""One picture as a slide of every format that has a reader, without loss and with the same levels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tifffile
import zarr
from PIL import Image

from wsi_gradcam.demo.slide import shrink, write_slide

Rgb = npt.NDArray[np.uint8]
TILE_PX = 256


class Written(NamedTuple):
    """A file, and the reader that it is to be opened with."""

    path: Path
    reader: str


def write_formats(folder: Path, level0: Rgb, mpp: tuple[float, float], factors: Sequence[int]) -> dict[str, Written]:
    """The slide in each format by name; `factors` of the levels above level 0, each pixel the mean of those under it.

    A picture has no further levels, and its mpp (y, x) must be given on opening.
    """
    levels = pyramid(level0, factors)
    tiff = write_slide(
        folder / "a.tif", level0, mpp=mpp, tile_px=TILE_PX, downsample=tuple(factors), compression="deflate"
    )
    Image.fromarray(level0).save(folder / "a.png", compress_level=1)
    return {
        "openslide": Written(tiff, "openslide"),
        "tiff": Written(tiff, "tiff"),
        "ome-tiff": Written(write_ome_tiff(folder / "a.ome.tif", levels, mpp), "tiff"),
        "ome-zarr 0.4": Written(write_ome_zarr(folder / "a4.ome.zarr", levels, mpp, factors, "0.4"), "ome-zarr"),
        "ome-zarr 0.5": Written(write_ome_zarr(folder / "a5.ome.zarr", levels, mpp, factors, "0.5"), "ome-zarr"),
        "picture": Written(folder / "a.png", "picture"),
    }


def pyramid(level0: Rgb, factors: Sequence[int]) -> list[Rgb]:
    """Level 0 and those above it, each the mean of the one before; each factor divides the next."""
    levels = [level0]
    for before, factor in pairwise((1, *factors)):
        levels.append(shrink(levels[-1], factor // before))
    return levels


def write_ome_tiff(path: Path, levels: Sequence[Rgb], mpp: tuple[float, float]) -> Path:
    """An OME-TIFF whose coarser levels are SubIFDs."""
    options: dict[str, Any] = {"photometric": "rgb", "tile": (TILE_PX, TILE_PX), "compression": "deflate"}
    about = {"axes": "YXS", "PhysicalSizeY": mpp[0], "PhysicalSizeX": mpp[1]}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(levels[0], subifds=len(levels) - 1, metadata=about, **options)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **options)
    return path


def write_ome_zarr(
    path: Path, levels: Sequence[Rgb], mpp: tuple[float, float], factors: Sequence[int], version: str
) -> Path:
    """An OME-Zarr image of axes c, y, x, of OME-NGFF 0.4 (Zarr 2) or 0.5 (Zarr 3)."""
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for number, (level, factor) in enumerate(zip(levels, (1, *factors), strict=True)):
        data = np.ascontiguousarray(np.moveaxis(level, -1, 0))
        group.create_array(str(number), data=data, chunks=(3, TILE_PX, TILE_PX))
        steps = [{"type": "scale", "scale": [1.0, mpp[0] * factor, mpp[1] * factor]}]
        datasets.append({"path": str(number), "coordinateTransformations": steps})
    axes = [
        {"name": "c", "type": "channel"},
        *({"name": name, "type": "space", "unit": "micrometer"} for name in "yx"),
    ]
    scales: Any = {"multiscales": [{"axes": axes, "datasets": datasets, "version": version}]}
    group.attrs.update({"ome": {"version": version, **scales}} if version == "0.5" else scales)
    return path
