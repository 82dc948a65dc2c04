"""PNG: the slide with a heatmap over it, a colour bar and a scale bar, for reports and papers; and Deep Zoom.

Deep Zoom is a .dzi file and a folder of PNG tiles, for OpenSeadragon and every web page that shows one. Tiles are
transparent where nothing is shown, to be laid over the slide's own Deep Zoom image. Levels follow the format's rule:
from one pixel up, each twice as large, sizes rounded up; tiles do not overlap.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from wsi_gradcam.errors import SlideError
from wsi_gradcam.export.job import MADE_BY, Job, blocks, save_png, slug
from wsi_gradcam.geometry import Region, tiles
from wsi_gradcam.results.heatmap import EXPLAINED, coarsen, coarsen_flags
from wsi_gradcam.results.overview import UNITS as METHOD_UNITS
from wsi_gradcam.results.overview import round_length

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from wsi_gradcam.results.display import ChannelInfo, Colouring

    Rgb = NDArray[np.uint8]
    Pixels = tuple[NDArray[np.float32], NDArray[np.uint8]]

INCH_PX = 800  # pixels of the longest side per additional inch: text and bars grow with the image
MIN_DPI = 100
MARGIN, BAR, TITLE, FOOT = 0.2, 1.3, 0.44, 0.24  # inches
PAPER, TISSUE_GRAY = 255, 190
MIN_WIDTH = 4.2  # inches; text does not fit into less
UNITS = {**METHOD_UNITS, "probability": "probability"}


@dataclass(frozen=True)
class Picture:
    """The slide with its heatmap, to be drawn.

    Attributes:
        rgb: slide and heatmap, uint8 [h, w, 3].
        um_per_px: micrometres per pixel of `rgb`.
        note: a remark on missing parts; "" for none.
    """

    rgb: Rgb
    um_per_px: float
    note: str


def write(job: Job) -> list[Path]:
    """Write a file for each chosen channel; `size` is the longest side of the slide in it."""
    background, note = _slide(job)
    return [_write(job, channel, background, note) for channel in job.drawn_channels]


def _write(job: Job, channel: ChannelInfo, background: Rgb, note: str) -> Path:
    path, colouring = job.path(f"{slug(channel)}.png"), job.colouring(channel)
    rgb = overlay(job, channel, colouring, background)
    picture = Picture(rgb, job.slide.size_px[1] * job.slide.mpp[1] / rgb.shape[1], note)
    with job.atomic_path(path) as partial, partial.open("wb") as file:
        _draw(job, channel, colouring, picture).print_png(file, metadata=MADE_BY)
    return path


def _slide(job: Job) -> tuple[Rgb, str]:
    """Return the slide at the size of the export; white with a note if it cannot be read."""
    try:
        return job.slide.thumbnail(job.options.size), ""
    except SlideError:
        height, width = (px * mpp for px, mpp in zip(job.slide.size_px, job.slide.mpp, strict=True))
        scale = job.options.size / max(height, width)
        shape = max(1, round(height * scale)), max(1, round(width * scale))
        return np.full((*shape, 3), PAPER, np.uint8), "the slide could not be read: the heatmap alone"


def overlay(job: Job, channel: ChannelInfo, colouring: Colouring, background: Rgb) -> Rgb:
    """Return the colours of a channel blended over an image of the whole slide, read row by row."""
    out, (height, width) = background.copy(), background.shape[:2]
    shapes = job.slide.levels
    level = max((i for i, (h, w) in enumerate(shapes) if h >= height and w >= width), default=0)
    step = job.slide.stride_px * 2**level
    rows = _nearest(height, job.slide.size_px[0], step, shapes[level][0])
    columns = _nearest(width, job.slide.size_px[1], step, shapes[level][1])
    for begin in range(0, height, 256):
        part = rows[begin : begin + 256]
        band = Region(int(part[0]), 0, int(part[-1] - part[0]) + 1, shapes[level][1])
        chosen = (part - part[0])[:, None], columns
        values = job.slide.read(channel, level, band)[chosen]
        rgba = colouring.rgba(values, job.slide.read_coverage(level, band)[chosen])
        out[begin : begin + 256] = _blend(out[begin : begin + 256], rgba)
    return out


def _nearest(size: int, slide_px: int, step: int, most: int) -> NDArray[np.int64]:
    """Return the heatmap's pixel at the centre of each of `size` pixels of an image of the whole slide."""
    return np.minimum((np.arange(size) + 0.5) * slide_px / size / step, most - 1).astype(np.int64)


def _blend(below: Rgb, rgba: Rgb) -> Rgb:
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (below * (1 - alpha) + rgba[..., :3] * alpha + 0.5).astype(np.uint8)


def _draw(job: Job, channel: ChannelInfo, colouring: Colouring, picture: Picture) -> FigureCanvasAgg:
    """Draw the figure: pixels of the image are pixels of the file, beside a colour bar."""
    height_px, width_px = picture.rgb.shape[:2]
    dpi = max(MIN_DPI, MIN_DPI * max(height_px, width_px) // INCH_PX)
    height, width = height_px / dpi, width_px / dpi
    wide, tall = max(width + 2 * MARGIN + BAR, MIN_WIDTH), max(height + TITLE + FOOT, MIN_WIDTH / 2)
    figure = Figure(figsize=(wide, tall), dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left_px, bottom_px = round(MARGIN * dpi), round((tall - TITLE - height) * dpi)
    figure.figimage(picture.rgb, left_px, bottom_px, origin="upper", zorder=-1)
    bottom = bottom_px / dpi
    axis = figure.add_axes((left_px / dpi / wide, bottom / tall, width / wide, height / tall))
    _scale_bar(axis, picture, dpi)
    bar = figure.add_axes(((MARGIN * 1.8 + width) / wide, bottom / tall, 0.18 / wide, height / tall))
    _colour_bar(figure, bar, colouring, channel)
    title = f"{job.slide.id}: {channel.label}".encode("utf-8", "replace").decode()
    figure.text(MARGIN / wide, 1 - 0.14 / tall, title, fontsize=10, va="center", parse_math=False)
    figure.text(MARGIN / wide, 1 - 0.32 / tall, picture.note, fontsize=8, va="center", color="#a00000")
    with warnings.catch_warnings():  # characters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        canvas.draw()
    return canvas


def _scale_bar(axis: Axes, picture: Picture, dpi: int) -> None:
    height, width = picture.rgb.shape[:2]
    axis.set_axis_off()
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    length_um = round_length(width * picture.um_per_px / 4)
    length_px, margin = length_um / picture.um_per_px, min(height, width) * 0.03
    y = height - margin
    axis.plot([margin, margin + length_px], [y, y], color="black", linewidth=3, solid_capstyle="butt")
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
    axis.text(margin, y - 0.05 * dpi, text, fontsize=8, va="bottom", bbox=box)


def _colour_bar(figure: Figure, axis: Axes, colouring: Colouring, channel: ChannelInfo) -> None:
    """Draw the colours as they look over grey tissue, with none below the threshold."""
    values = np.linspace(colouring.low, colouring.high, 256, dtype=np.float32)[:, None]
    flags = np.full(values.shape, 2, np.uint8)
    gray = np.full((*values.shape, 3), TISSUE_GRAY, np.uint8)
    seen = ListedColormap(_blend(gray, colouring.rgba(values, flags))[:, 0] / 255)
    below, above = channel.minimum < colouring.low, channel.maximum > colouring.high
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")
    norm = Normalize(colouring.low, colouring.high)
    bar = figure.colorbar(ScalarMappable(norm, seen), cax=axis, extend=extend, extendfrac=0.03)
    bar.set_label(UNITS[channel.unit], fontsize=8)
    bar.ax.tick_params(labelsize=7)


TILE = 512


def write_deepzoom(job: Job) -> list[Path]:
    """Write NAME_files, NAME.dzi, and NAME.json with its position on the slide, for each chosen channel."""
    return [path for channel in job.drawn_channels for path in _write_deepzoom(job, channel)]


def _write_deepzoom(job: Job, channel: ChannelInfo) -> list[Path]:
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
    """Yield the levels that a heatmap does not have, down to one pixel, computed like its own."""
    level = len(job.slide.levels) - 1
    whole = Region(0, 0, *job.slide.levels[level])
    values, flags = job.slide.read(channel, level, whole), job.slide.read_coverage(level, whole)
    while max(values.shape) > 1:
        values, flags, level = coarsen(values, (flags & EXPLAINED) > 0), coarsen_flags(flags), level + 1
        yield level, (values, flags)


def _save(folder: Path, region: Region, rgba: NDArray[np.uint8]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_png(rgba, folder / f"{region.x // TILE}_{region.y // TILE}.png")
