"""Deep Zoom: a .dzi file and a folder of PNG tiles, for OpenSeadragon and every web page that shows one.

Tiles are transparent where nothing is shown, to be laid over the slide's own Deep Zoom image. Levels follow the
format's rule: from one pixel up, each twice as large, sizes rounded up; tiles do not overlap.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.export.job import Job, blocks, save_png, slug
from wsi_gradcam.geometry import Region, tiles
from wsi_gradcam.results.heatmap import EXPLAINED
from wsi_gradcam.results.stitch import coarsen, coarsen_flags

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from wsi_gradcam.results.channels import ChannelInfo

    Pixels = tuple[NDArray[np.float32], NDArray[np.uint8]]

TILE = 512


def write(job: Job) -> list[Path]:
    """Write NAME_files, NAME.dzi, and NAME.json with its position on the slide, for each chosen channel."""
    return [path for channel in job.drawn_channels for path in _write(job, channel)]


def _write(job: Job, channel: ChannelInfo) -> list[Path]:
    name = slug(channel)
    dzi, place, folder = job.path(f"{name}.dzi"), job.path(f"{name}.json"), job.path(f"{name}_files")
    with job.atomic_path(dzi) as partial, job.atomic_path(place) as beside:
        with job.atomic_path(folder) as tile_folder:
            _write_tiles(job, channel, tile_folder)
        height, width = job.slide.levels[0]
        partial.write_text(
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f'<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="png" Overlap="0" TileSize="{TILE}">'
            f'<Size Height="{height}" Width="{width}"/></Image>\n',
            encoding="utf-8",
        )
        beside.write_text(json.dumps(placement(job, channel), indent=1), encoding="utf-8")
    return [dzi, place, folder]


def placement(job: Job, channel: ChannelInfo) -> dict[str, object]:
    """Return the position over the slide, in widths of the slide as in OpenSeadragon, and the channel's description."""
    low, high = job.window(channel)
    width_px = job.slide.levels[0][1] * job.slide.stride_px
    return {
        "x": 0,
        "y": 0,
        "width": width_px / job.slide.size_px[1],
        "slide_px_per_px": job.slide.stride_px,
        "channel": channel.label,
        "unit": channel.unit,
        "window": [low, high],
        "colormap": job.options.colormap,
    }


def _write_tiles(job: Job, channel: ChannelInfo, folder: Path) -> None:
    colouring = job.colouring(channel)
    shapes = job.slide.levels
    finest = (max(shapes[0]) - 1).bit_length()  # the logarithm to base 2, rounded up
    for level in range(len(shapes)):
        for region, values, flags in blocks(job.slide, channel, level, TILE):
            _save(folder / str(finest - level), region, colouring.rgba(values, flags))
    for level, (values, flags) in _coarser_levels(job, channel):
        for region in tiles(values.shape[0], values.shape[1], TILE):
            part = colouring.rgba(values[region.slices], flags[region.slices])
            _save(folder / str(finest - level), region, part)


def _coarser_levels(job: Job, channel: ChannelInfo) -> Iterator[tuple[int, Pixels]]:
    """Yield the levels that a heatmap does not have, down to one pixel, computed as its own are."""
    level = len(job.slide.levels) - 1
    whole = Region(0, 0, *job.slide.levels[level])
    values, flags = job.slide.read(channel, level, whole), job.slide.read_coverage(level, whole)
    while max(values.shape) > 1:
        values, flags, level = coarsen(values, (flags & EXPLAINED) > 0), coarsen_flags(flags), level + 1
        yield level, (values, flags)


def _save(folder: Path, region: Region, rgba: NDArray[np.uint8]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_png(rgba, folder / f"{region.x // TILE}_{region.y // TILE}.png")
