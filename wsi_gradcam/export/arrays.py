"""Arrays for other programs: heatmaps as OME-Zarr 0.4, and features as the HDF5 files of TRIDENT and CLAM.

OME-Zarr 0.4 (Zarr 2) is for programs that do not read 0.5 yet: QuPath, OMERO, Fiji. It has the levels, values and label
of `heatmap.ome.zarr`. Chunks are compressed as the other writers of 0.4 do it, with Blosc, as some readers know no
other codec (ngff-zarr refuses zlib); arrays name their axes as xarray asks for it; `OME/METADATA.ome.xml` has pixel
size, channels and colours for programs that use Bio-Formats.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numcodecs import Blosc

from wsi_gradcam.errors import ConfigError, ResultError
from wsi_gradcam.export.job import Job, ome_colour
from wsi_gradcam.geometry import tiles
from wsi_gradcam.mil.feature_files import write_clam, write_trident
from wsi_gradcam.mil.features import SlideFrame, steps
from wsi_gradcam.results.feature_store import BOXES, Bag, FeatureStore, encoding_problems
from wsi_gradcam.results.heatmap import CHUNK, LABEL, SHARD
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.results.patch_store import PatchStore

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from wsi_gradcam.results.slide import SlideResult

VERSION = "0.4"
NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
DIMENSIONS = "_ARRAY_DIMENSIONS"  # where xarray looks for the names of an array's axes in Zarr 2
XSI = "http://www.w3.org/2001/XMLSchema-instance"


def write(job: Job) -> list[Path]:
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
    """Return whether all features of a slide are there, explained or not."""
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
        raise ConfigError(f"{slide.id}: patches of {height} x {width} px; TRIDENT's are squares, export the other way")
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
    """Write DEST/SLIDE.h5 as CLAM does, features and places in one file."""
    bag, boxes, frame = _bag(job)
    path = job.named(job.base, ".h5")
    with job.atomic_path(path) as partial:
        write_clam(partial, bag, boxes, frame)
    return [path]


def _bag(job: Job) -> tuple[Bag, NDArray[np.float64], SlideFrame]:
    """Return the features of a slide's readable patches, their boxes as of `FeatureBag`, and the slide.

    Raises:
        ResultError: it has none.
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
