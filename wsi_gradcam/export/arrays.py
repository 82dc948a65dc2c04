"""Heatmaps as arrays for other programs: OME-Zarr 0.4, OME-TIFF, and 8-bit TIFF; features as HDF5.

OME-Zarr 0.4 (Zarr 2) is for programs that do not read 0.5 yet: QuPath, OMERO, Fiji. It has the levels, values and label
of `heatmap.ome.zarr`. Chunks are compressed with Blosc, as by other writers of 0.4, because some readers know no other
codec (ngff-zarr refuses zlib); arrays name their axes as xarray requires; `OME/METADATA.ome.xml` has the pixel size,
channels and colours for programs that use Bio-Formats.

TIFFs are for viewers that open slides with OpenSlide, and in the forms that ASAP and TissUUmaps need. A pyramid is a
BigTIFF whose levels are top-level pages, all but the first marked as reduced; the resolution tags have the micrometres
per pixel of the heatmap. Features are written as TRIDENT and CLAM do.
"""

from __future__ import annotations

import json
import os
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import tifffile
import zarr
from numcodecs import Blosc

from wsi_gradcam.errors import ConfigError, ResultError
from wsi_gradcam.export.job import Job, blocks, ome_colour, padded, slug
from wsi_gradcam.geometry import Region, ceil_div, tiles
from wsi_gradcam.io.urls import is_url
from wsi_gradcam.mil.feature_files import write_clam, write_trident
from wsi_gradcam.mil.features import SlideFrame, steps
from wsi_gradcam.results.display import GRAY, Colouring
from wsi_gradcam.results.feature_store import BOXES, Bag, FeatureStore, encoding_problems
from wsi_gradcam.results.heatmap import CHUNK, LABEL, SHARD
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.patch_store import PatchStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.results.display import ChannelInfo
    from wsi_gradcam.results.slide import SlideResult

    Tiles = Iterator[NDArray[np.generic]]

VERSION = "0.4"
NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
DIMENSIONS = "_ARRAY_DIMENSIONS"  # where xarray looks for the axis names of an array in Zarr 2
XSI = "http://www.w3.org/2001/XMLSchema-instance"
TILE = 512
WHITE = 255
UM_PER_CM = 1e4
ASAP_ENDING = "_likelihood_map.tif"
COVERAGE_COLOUR = "FFFFFF"


def write_ome_zarr(job: Job) -> list[Path]:
    """Write one folder with the chosen channels."""
    path = job.path("ome.zarr")
    with job.atomic_path(path) as partial:
        group = zarr.open_group(partial, mode="w-", zarr_format=2)
        labels = group.create_group("labels")
        label = labels.create_group(LABEL)
        for level in range(len(job.slide.levels)):
            _write_level(job, group, label, level)
        labels.attrs["labels"] = [LABEL]
        label.attrs.put(_label_metadata(job))
        group.attrs.put(_image_metadata(job))
        group.create_group("OME")
        (partial / "OME" / "METADATA.ome.xml").write_bytes(ome_xml(job))
    return [path]


def _write_level(job: Job, group: zarr.Group, label: zarr.Group, level: int) -> None:
    shape, slide = job.slide.levels[level], job.slide
    common: dict[str, Any] = {
        "fill_value": 0,
        "compressors": Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE),
        "chunk_key_encoding": {"name": "v2", "separator": "/"},
    }
    values = group.create_array(
        str(level), shape=(len(job.channels), *shape), chunks=(1, CHUNK, CHUNK), dtype="float32", **common
    )
    flags = label.create_array(str(level), shape=shape, chunks=(CHUNK, CHUNK), dtype="uint8", **common)
    for array, axes in ((values, "cyx"), (flags, "yx")):
        array.attrs[DIMENSIONS] = list(axes)
    for block in tiles(*shape, SHARD):
        flags[block.slices] = slide.read_coverage(level, block)
        for number, channel in enumerate(job.channels):
            values[(number, *block.slices)] = slide.read(channel, level, block)


def _image_metadata(job: Job) -> dict[str, Any]:
    """Return the metadata of the result, with the chosen channels and windows."""
    stored = job.slide.store.attributes
    ome = stored["ome"]
    channels = []
    for channel in job.channels:
        shown = ome["omero"]["channels"][channel.number]
        low, high = job.window(channel)
        window = {"min": min(channel.minimum, low), "max": max(channel.maximum, high), "start": low, "end": high}
        channels.append({**shown, "window": window})
    if not any(shown["active"] for shown in channels):
        channels[0]["active"] = True
    return {
        "multiscales": [{**multiscale, "version": VERSION} for multiscale in ome["multiscales"]],
        "omero": {**ome["omero"], "version": VERSION, "channels": channels},
        "wsi_gradcam": stored["wsi_gradcam"],
    }


def _label_metadata(job: Job) -> dict[str, Any]:
    ome = job.slide.store.label_attributes["ome"]
    return {
        "multiscales": [{**multiscale, "version": VERSION} for multiscale in ome["multiscales"]],
        "image-label": {**ome["image-label"], "version": VERSION},
    }


def ome_xml(job: Job) -> bytes:
    """Return the OME-XML of the image, without its pixels."""
    (height, width), (um_y, um_x) = job.slide.levels[0], job.um_per_px(0)
    name = job.slide.id.encode("utf-8", "replace").decode()
    schema = {"xmlns:xsi": XSI, "xsi:schemaLocation": f"{NAMESPACE} {NAMESPACE}/ome.xsd"}
    root = ET.Element("OME", {"xmlns": NAMESPACE, **schema})
    image = ET.SubElement(root, "Image", {"ID": "Image:0", "Name": name})
    numbers = {"SizeX": width, "SizeY": height, "SizeZ": 1, "SizeC": len(job.channels), "SizeT": 1}
    pixels = ET.SubElement(
        image,
        "Pixels",
        {
            "ID": "Pixels:0",
            "DimensionOrder": "XYZCT",
            "Type": "float",
            **{k: str(v) for k, v in numbers.items()},
            "PhysicalSizeX": repr(um_x),
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": repr(um_y),
            "PhysicalSizeYUnit": "µm",
        },
    )
    for number, channel in enumerate(job.channels):
        about = {"ID": f"Channel:0:{number}", "Name": channel.label, "SamplesPerPixel": "1"}
        ET.SubElement(pixels, "Channel", {**about, "Color": str(ome_colour(channel.colour))})
    ET.SubElement(pixels, "MetadataOnly")
    return bytes(ET.tostring(root, encoding="UTF-8", xml_declaration=True))


# Features


def has_features(slide: SlideResult) -> bool:
    """Return whether all features of a slide exist, explained or not."""
    manifest = Manifest(slide.folder.manifest)
    try:
        store = FeatureStore(slide.folder.features, read_only=True)
    except FileNotFoundError:
        return False
    return manifest.is_finished or not list(encoding_problems(store, manifest, slide.plan))


def write_trident_features(job: Job) -> list[Path]:
    """Write DEST/SLIDE.h5 as TRIDENT does."""
    bag, boxes, frame = _bag(job)
    slide = job.slide
    height, width = slide.patch_px
    if height != width:
        raise ConfigError(f"{slide.id}: patches of {width} x {height} px; TRIDENT's are squares, export the other way")
    step = next((step for step in steps(boxes[:, 1::-1]) if step), None)
    stride = width if step is None else min(width, round(width * step / slide.plan.footprint[1]))
    path = job.named(job.base, ".h5")
    with job.atomic_path(path) as partial:
        write_trident(
            partial,
            bag,
            boxes,
            frame,
            patch_px=width,
            stride_px=stride,
            mpp=slide.patch_mpp,
            encoder=slide.model_name,
        )
    return [path]


def write_clam_features(job: Job) -> list[Path]:
    """Write DEST/SLIDE.h5 as CLAM does, with features and positions in one file."""
    bag, boxes, frame = _bag(job)
    path = job.named(job.base, ".h5")
    with job.atomic_path(path) as partial:
        write_clam(partial, bag, boxes, frame)
    return [path]


def _bag(job: Job) -> tuple[Bag, NDArray[np.float64], SlideFrame]:
    """Return the features of a slide's readable patches, their boxes as in `FeatureBag`, and the slide.

    Raises:
        ResultError: it has no features.
    """
    slide, plan = job.slide, job.slide.plan
    try:
        store = FeatureStore(slide.folder.features, read_only=True)
    except FileNotFoundError as error:
        raise ResultError(
            f"{slide.id}: has no features; slide-level models have them, and what 'wsi-gradcam encode' makes"
        ) from error
    bag = Bag(store)
    if store.has(BOXES):
        boxes = store.read(BOXES)
    else:
        yx = PatchStore(slide.folder.cams, read_only=True).yx()
        boxes = np.concatenate([yx, np.broadcast_to(plan.footprint, yx.shape)], axis=1).astype(np.float64)
    return bag, boxes[bag.rows], SlideFrame(slide.id, plan.slide_px, plan.slide_mpp)


def write_tiff(job: Job) -> list[Path]:
    """Write a file for each chosen channel: RGB, white where nothing is shown; for "gray", one sample, 0 there."""
    return [_write_tiff(job, channel) for channel in job.drawn_channels]


def _write_tiff(job: Job, channel: ChannelInfo) -> Path:
    path, colouring = job.path(f"{slug(channel)}.tiff"), job.colouring(channel)
    samples = () if colouring.colormap == GRAY else (3,)
    sizes = [(*shape, *samples) for shape in job.slide.levels]
    with job.atomic_path(path) as partial:
        _write_pyramid(
            partial, job, channel, sizes, job.slide.stride_px, lambda level: _tiles(job, channel, colouring, level)
        )
    return path


def _write_pyramid(
    path: Path,
    job: Job,
    channel: ChannelInfo,
    sizes: list[tuple[int, ...]],
    step_px: int,
    tiles_of: Callable[[int], Tiles],
) -> None:
    """Write levels of `sizes`, the first with a pixel for each `step_px` level-0 px of the slide."""
    colouring = job.colouring(channel)
    about = f"{channel.label} of {job.slide.id}, {colouring.low:g} to {colouring.high:g}"
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level, size in enumerate(sizes):
            um_y, um_x = (mpp * step_px * 2**level for mpp in job.slide.mpp)
            writer.write(
                tiles_of(level),
                shape=size,
                dtype="uint8",
                tile=(TILE, TILE),
                photometric="rgb" if len(size) == 3 else "minisblack",
                compression="deflate",
                subfiletype=int(level > 0),
                resolution=(UM_PER_CM / um_x, UM_PER_CM / um_y),
                resolutionunit="CENTIMETER",
                metadata=None,
                description=about.encode("utf-8", "replace"),  # text must be ASCII
                software="wsi_gradcam",
            )


def _tiles(job: Job, channel: ChannelInfo, colouring: Colouring, level: int) -> Iterator[NDArray[np.generic]]:
    for _, values, flags in blocks(job.slide, channel, level, TILE):
        if colouring.colormap == GRAY:
            yield padded(colouring.gray(values, flags), TILE)
        else:
            rgb = colouring.rgb(values)
            rgb[~colouring.shown(values, flags)] = WHITE
            yield padded(rgb, TILE, WHITE)


def write_asap(job: Job) -> list[Path]:
    """Write BASE_likelihood_map.tif, which ASAP shows over the slide BASE.* in the same folder: grey, 0 = not shown.

    ASAP derives the factor from the sizes, as an integer, and refuses an image if it differs between the axes: see
    `asap_step`. It finds one file per slide; those of further channels have the channel's name before the ending.
    """
    return [_write_asap(job, channel, number) for number, channel in enumerate(job.drawn_channels)]


def _write_asap(job: Job, channel: ChannelInfo, number: int) -> Path:
    base = job.base + (f".{slug(channel)}" if number else "")
    path, (height, width) = job.named(base, ASAP_ENDING), job.slide.size_px
    step = asap_step((height, width), job.slide.stride_px)
    finer = (job.slide.stride_px // step).bit_length() - 1  # levels that the heatmap does not have
    levels = range(finer + len(job.slide.levels))
    sizes: list[tuple[int, ...]] = [(ceil_div(height // step, 2**i), ceil_div(width // step, 2**i)) for i in levels]
    with job.atomic_path(path) as partial:
        _write_pyramid(
            partial, job, channel, sizes, step, lambda level: _gray_tiles(job, channel, sizes[level], level - finer)
        )
    return path


def asap_step(size: tuple[int, int], stride: int) -> int:
    """Return the level-0 px per pixel of an image that ASAP is to lay over a slide of `size` (height, width).

    It is the heatmap's stride, a power of two, or the largest part of it that divides both sides: if pixels that reach
    beyond the slide are left out, `size // (size // step)` is `step` along both axes, so that ASAP's factor is right.

    >>> asap_step((15000, 19004), 16), asap_step((40, 19004), 16)
    (16, 8)
    """
    step = stride
    while any(side < step or side // (side // step) != step for side in size):
        step //= 2
    return step


def _gray_tiles(job: Job, channel: ChannelInfo, size: tuple[int, ...], level: int) -> Iterator[NDArray[np.generic]]:
    """Yield the tiles of an image of `size` at a level of the heatmap; for one below 0, pixels are repeated."""
    colouring, times = job.colouring(channel), 2 ** max(0, -level)
    for tile in tiles(size[0], size[1], TILE):
        y, x = tile.y // times, tile.x // times
        source = Region(y, x, ceil_div(tile.bottom, times) - y, ceil_div(tile.right, times) - x)
        values = job.slide.read(channel, max(0, level), source)
        gray = colouring.gray(values, job.slide.read_coverage(max(0, level), source))
        top, left = tile.y - y * times, tile.x - x * times
        whole = gray.repeat(times, 0).repeat(times, 1)
        yield padded(whole[top : top + tile.height, left : left + tile.width], TILE)


def write_tissuumaps(job: Job) -> list[Path]:
    """Write the TIFF of each chosen channel, and SLIDE.tmap, a project of TissUUmaps that lays them over the slide.

    TissUUmaps assumes that layers have the same scale unless the project says otherwise.

    Raises:
        ResultError: the slide is not a file.
    """
    if is_url(job.slide.path):
        raise ResultError(f"{job.slide.path}: TissUUmaps opens no URLs; download the slide, or use --to tiff")
    path = job.path("tmap")
    with job.atomic_path(path) as partial:
        pictures = write_tiff(job)
        partial.write_text(json.dumps(_project(job, path.parent, pictures), indent=1), encoding="ascii")
    return [path, *pictures]


def _project(job: Job, folder: Path, pictures: list[Path]) -> dict[str, Any]:
    """Return the project: the slide and one picture are visible, others can be ticked; paths start at its folder."""
    slide = {"name": _ascii(job.slide.id), "tileSource": _source(job.slide.path, folder), "scale": 1}
    shown = [
        {"name": _ascii(channel.label), "tileSource": _source(path, folder), "scale": job.slide.stride_px}
        for channel, path in zip(job.drawn_channels, pictures, strict=True)
    ]
    layers = [{**layer, "x": 0, "y": 0} for layer in (slide, *shown)]
    opacities = {str(i): job.options.alpha if i else 1 for i in range(len(layers))}
    return {
        "filename": _ascii(job.slide.id),
        "layers": layers,
        "layerOpacities": opacities,
        "layerVisibilities": {name: name in "01" for name in opacities},
        "layerFilters": {name: [] for name in opacities},
        "filters": [],
        "compositeMode": "source-over",
        "mpp": job.slide.mpp[1],
        "markerFiles": [],
        "regions": {},
    }


def _source(path: str | Path, folder: Path) -> str:
    """Return the address, relative to the project's folder, under which TissUUmaps serves an image."""
    relative = os.path.relpath(os.path.abspath(path), folder.absolute())  # noqa: PTH100 - Path cannot go upwards
    return quote(os.fsencode(Path(relative).as_posix())) + ".dzi"


def _ascii(name: str) -> str:
    """Return a name without the bytes that are not text."""
    return name.encode("utf-8", "replace").decode()


def write_ome_tiff(job: Job) -> list[Path]:
    """Write one OME-TIFF with the values of all chosen channels, for QuPath, OMERO, Fiji and napari.

    It has float32 values, a plane for each channel and a last one with the coverage bits; coarser levels are SubIFDs;
    pixel sizes are in the OME-XML. No predictor is used, because Bio-Formats does not support it for floats.
    """
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
                _ome_tiles(job, level),
                shape=(planes, *shape),
                resolution=(UM_PER_CM / um_x, UM_PER_CM / um_y),
                **common,
                **({"subfiletype": 1} if level else {"subifds": len(levels) - 1, "metadata": _ome_metadata(job)}),
            )
    return [path]


def _ome_tiles(job: Job, level: int) -> Iterator[NDArray[np.generic]]:
    regions = tiles(*job.slide.levels[level], TILE)
    for channel in job.channels:
        for region in regions:
            yield padded(job.slide.read(channel, level, region), TILE)
    for region in regions:
        yield padded(job.slide.read_coverage(level, region).astype(np.float32), TILE)


def _ome_metadata(job: Job) -> dict[str, Any]:
    """Return the metadata that tifffile turns into OME-XML."""
    um_y, um_x = job.um_per_px(0)
    windows = "; ".join("{}: {:g} to {:g}".format(c.label, *job.window(c)) for c in job.channels)
    return {
        "UUID": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, job.digest)}",  # otherwise it would differ in each export
        "axes": "CYX",
        "Name": job.slide.id.encode("utf-8", "replace").decode(),
        "Description": f"Values of wsi_gradcam. Windows: {windows}. {LABEL}: bits 1 tissue, 2 explained, 4 unreadable.",
        "PhysicalSizeX": um_x,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": um_y,
        "PhysicalSizeYUnit": "µm",
        "Channel": {
            "Name": [*(channel.label for channel in job.channels), LABEL],
            "Color": [ome_colour(text) for text in (*(channel.colour for channel in job.channels), COVERAGE_COLOUR)],
        },
    }
