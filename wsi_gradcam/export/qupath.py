"""QuPath: a folder with a script that puts overlay, patches and hot regions on the open slide.

The overlay is the finest level of the heatmap that fits into memory as one image, divided into PNGs that a
BufferedImageOverlay places in level-0 px; patches and regions are GeoJSON.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from wsi_gradcam.export.geojson import patch_features, region_features, write_features
from wsi_gradcam.export.job import BOUNDS, SLIDE, Job, blocks, save_png, slug
from wsi_gradcam.geometry import Region

if TYPE_CHECKING:
    from pathlib import Path

    from wsi_gradcam.results.display import ChannelInfo

MAX_PX = 1 << 25  # 128 MB in QuPath
SIDE = 2048
WHOLE = "whole-slide"  # features in the frame of the whole slide, where only a part was scanned
SCRIPT = "show_in_qupath.groovy"


def write(job: Job) -> list[Path]:
    """Write a folder for each chosen channel."""
    return [_write(job, channel) for channel in job.drawn_channels]


def _write(job: Job, channel: ChannelInfo) -> Path:
    path = job.path(f"{slug(channel)}.qupath")
    with job.atomic_path(path) as partial:
        partial.mkdir()
        tiles = _write_overlay(job, channel, partial)
        for name, frame in _frames(job):
            (partial / name).mkdir(exist_ok=True)
            framed = replace(job, options=replace(job.options, frame=frame))
            write_features(partial / name / "patches.geojson", patch_features(framed))
            write_features(partial / name / "regions.geojson", region_features(framed, channel))
        (partial / SCRIPT).write_text(script(job, channel, path, tiles), encoding="utf-8")
    return path


def _frames(job: Job) -> list[tuple[str, str]]:
    """Return the folder of features and the frame of each image that QuPath may show: the scanned part, or all."""
    return [("", BOUNDS), (WHOLE, SLIDE)] if job.slide.scanned else [("", SLIDE)]


def _write_overlay(job: Job, channel: ChannelInfo, folder: Path) -> list[tuple[str, int, int, int, int]]:
    """Write the overlay, and return name, x, y, width, height in level-0 px of each part that is not empty."""
    levels, colouring = job.slide.levels, job.colouring(channel)
    level = next((i for i, (h, w) in enumerate(levels) if h * w <= MAX_PX), len(levels) - 1)
    step = job.slide.stride_px * 2**level
    parts: list[tuple[str, int, int, int, int]] = []
    for region, values, flags in blocks(job.slide, channel, level, SIDE):
        rgba = colouring.rgba(values, flags)
        if rgba.any():
            name = f"overlay-{len(parts)}.png"
            save_png(rgba, folder / name)
            parts.append((name, region.x * step, region.y * step, region.width * step, region.height * step))
    return parts


def script(job: Job, channel: ChannelInfo, folder: Path, tiles: list[tuple[str, int, int, int, int]]) -> str:
    """Return the script, with paths and names quoted."""
    height, width = job.slide.size_px
    scanned = job.slide.scanned
    shown = [_image(Region(0, 0, height, width), WHOLE if scanned else ".")]
    if scanned:
        shown.insert(0, _image(scanned, "."))
    listed = ",\n".join(f"    [{_quoted(name)}, {x}, {y}, {w}, {h}]" for name, x, y, w, h in tiles)
    return TEMPLATE.format(
        title=" ".join(f"{channel.label} of {job.slide.id}".encode("ascii", "replace").decode().split()),
        folder=_quoted(str(folder.absolute())),
        width=width,
        height=height,
        tiles=listed,
        images="\n".join(shown),
        script=_quoted(SCRIPT),
    )


def _image(part: Region, features: str) -> str:
    """Return the lines that recognise an image of a part of the slide by its size."""
    return (
        f"if (server.getWidth() == {part.width} && server.getHeight() == {part.height})\n"
        f"    image = [{part.x}, {part.y}, {_quoted(features)}]"
    )


def _quoted(text: str) -> str:
    """Return a single-quoted string of Groovy, in which $ has no meaning."""
    return "'" + json.dumps(text)[1:-1].replace("'", "\\'").replace('\\"', '"') + "'"


TEMPLATE = """\
// wsi_gradcam: {title}
// In QuPath: open the slide, then drag this file onto the window, or Automate > Script editor > Open, and Run.
import javafx.application.Platform
import javax.imageio.ImageIO
import qupath.lib.gui.viewer.overlays.BufferedImageOverlay
import qupath.lib.io.PathIO
import qupath.lib.regions.ImageRegion

def folder = new File({folder})
def tiles = [  // file, and x, y, width, height in pixels of the slide
{tiles}
]

if (!new File(folder, 'regions.geojson').exists())  // the folder was moved
    folder = promptForFile('groovy')?.getParentFile()
if (folder == null)
    throw new IOException('Choose ' + {script} + ' in the folder that wsi-gradcam export made')

def server = getCurrentServer()
if (server == null)
    throw new IllegalStateException('Open the slide first')
def image = null  // x and y of its corner on the slide, and the folder of the features in its pixels
{images}
if (image == null)
    throw new IllegalStateException('This result is of a slide of {width} x {height} px, ' +
        'the open image has ' + server.getWidth() + ' x ' + server.getHeight())
def features = new File(folder, image[2])

// Patches and regions; what an earlier run of this script has added is replaced.
def objects = ['patches.geojson', 'regions.geojson'].collectMany {{ PathIO.readObjects(new File(features, it)) }}
def ids = objects.collect {{ it.getID() }} as Set
removeObjects(getAllObjects(false).findAll {{ ids.contains(it.getID()) }}, true)
addObjects(objects)

// The overlay.
def images = [:]
tiles.each {{ name, x, y, w, h ->
    images[ImageRegion.createInstance(x - image[0], y - image[1], w, h, 0, 0)] = ImageIO.read(new File(folder, name))
}}
def viewer = getCurrentViewer()
if (viewer != null)
    Platform.runLater {{
        viewer.setCustomPixelLayerOverlay(new BufferedImageOverlay(viewer, images))
        viewer.getOverlayOptions().setShowPixelClassification(true)
        viewer.repaint()
    }}
println 'Laid ' + objects.size() + ' objects and ' + images.size() + ' pictures on the slide'
"""
