"""OME-TIFF with the values themselves, for QuPath, OMERO, Fiji and napari.

float32, a plane for each channel and a last one with the coverage bits; coarser levels are SubIFDs; pixel sizes are in
the OME-XML. Without a predictor, which Bio-Formats does not support for floats.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from wsi_gradcam.export.job import Job, ome_colour, padded
from wsi_gradcam.geometry import tiles
from wsi_gradcam.results.heatmap import LABEL

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TILE = 512
UM_PER_CM = 1e4
WHITE = "FFFFFF"


def write(job: Job) -> list[Path]:
    """Write one file with all chosen channels."""
    path, levels = job.path("ome.tiff"), job.slide.levels
    planes = len(job.channels) + 1
    common: dict[str, Any] = {
        "dtype": "float32",
        "tile": (TILE, TILE),
        "photometric": "minisblack",
        "compression": "deflate",
        "resolutionunit": "CENTIMETER",
        "software": "wsi_gradcam",
    }
    with (
        job.atomic_path(path) as partial,
        tifffile.TiffWriter(partial, bigtiff=True, ome=True) as writer,
    ):
        for level, shape in enumerate(levels):
            um_y, um_x = job.um_per_px(level)
            writer.write(
                _tiles(job, level),
                shape=(planes, *shape),
                resolution=(UM_PER_CM / um_x, UM_PER_CM / um_y),
                **common,
                **({"subfiletype": 1} if level else {"subifds": len(levels) - 1, "metadata": _metadata(job)}),
            )
    return [path]


def _tiles(job: Job, level: int) -> Iterator[NDArray[np.generic]]:
    regions = tiles(*job.slide.levels[level], TILE)
    for channel in job.channels:
        for region in regions:
            yield padded(job.slide.read(channel, level, region), TILE)
    for region in regions:
        yield padded(job.slide.read_coverage(level, region).astype(np.float32), TILE)


def _metadata(job: Job) -> dict[str, Any]:
    """Return the metadata that tifffile turns into OME-XML."""
    um_y, um_x = job.um_per_px(0)
    windows = "; ".join("{}: {:g} to {:g}".format(c.label, *job.window(c)) for c in job.channels)
    return {
        "UUID": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, job.digest)}",  # else another in each export
        "axes": "CYX",
        "Name": job.slide.id.encode("utf-8", "replace").decode(),
        "Description": f"Values of wsi_gradcam. Windows: {windows}. {LABEL}: bits 1 tissue, 2 explained, 4 unreadable.",
        "PhysicalSizeX": um_x,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": um_y,
        "PhysicalSizeYUnit": "µm",
        "Channel": {
            "Name": [*(channel.label for channel in job.channels), LABEL],
            "Color": [ome_colour(text) for text in (*(channel.colour for channel in job.channels), WHITE)],
        },
    }
