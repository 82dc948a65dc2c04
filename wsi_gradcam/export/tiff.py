"""Pyramidal TIFF in 8 bits, for viewers that open slides with OpenSlide, such as ASAP and TissUUmaps.

It is a BigTIFF whose levels are top-level pages, all but the first marked as reduced; the resolution tags have the
micrometres per pixel of the heatmap.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import tifffile

from wsi_gradcam.export.colours import GRAY, Colouring
from wsi_gradcam.export.job import Job, atomic_path, blocks, padded, slug

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from wsi_gradcam.results.channels import ChannelInfo

TILE = 512
WHITE = 255
UM_PER_CM = 1e4


def write(job: Job) -> list[Path]:
    """Write a file for each chosen channel: RGB, white where nothing is shown; for "gray" one sample, 0 there."""
    return [_write(job, channel) for channel in job.drawn_channels]


def _write(job: Job, channel: ChannelInfo) -> Path:
    path, colouring = job.path(f"{slug(channel)}.tiff"), job.colouring(channel)
    samples = () if colouring.colormap == GRAY else (3,)
    with atomic_path(path, job.options.overwrite) as partial, tifffile.TiffWriter(partial, bigtiff=True) as writer:
        for level, shape in enumerate(job.slide.levels):
            um_y, um_x = job.um_per_px(level)
            writer.write(
                _tiles(job, channel, colouring, level),
                shape=(*shape, *samples),
                dtype="uint8",
                tile=(TILE, TILE),
                photometric="rgb" if samples else "minisblack",
                compression="deflate",
                subfiletype=int(level > 0),
                resolution=(UM_PER_CM / um_x, UM_PER_CM / um_y),
                resolutionunit="CENTIMETER",
                metadata=None,
                description=f"{channel.label} of {job.slide.id}, {colouring.low:g} to {colouring.high:g}",
                software="wsi_gradcam",
            )
    return path


def _tiles(job: Job, channel: ChannelInfo, colouring: Colouring, level: int) -> Iterator[NDArray[np.generic]]:
    for _, values, flags in blocks(job.slide, channel, level, TILE):
        if colouring.colormap == GRAY:
            yield padded(colouring.gray(values, flags), TILE)
        else:
            rgb = colouring.rgb(values)
            rgb[~colouring.shown(values, flags)] = WHITE
            yield padded(rgb, TILE, WHITE)
