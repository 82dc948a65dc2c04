"""The viewer: a web server for a run's results and slides, and the page (in `page/`) that shows them in a browser.

`app.view` starts it. Requests pass its checks, reach the handlers in `app`, and are answered by `queries` (JSON),
`images` (tiles) or `files`. This room reads results, slides and audits, and writes only marks and names of clusters;
it knows nothing about how runs are made.

The reader for napari (npe2) is here: a slide's folder in a result opens as slide, channels and coverage, aligned. In
napari a pixel is centred on its coordinate: the centre of a heatmap pixel, which is s times as large as a slide pixel,
is therefore offset by (s - 1) / 2 slide pixels. Levels that are one pixel short of an exact factor are padded, since
napari uses the ratio of the shapes as the factor.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from wsi_gradcam.errors import ResultError, SlideError
from wsi_gradcam.results.display import STEPS, Colouring
from wsi_gradcam.results.heatmap import EXPLAINED
from wsi_gradcam.results.run import Result, find_result
from wsi_gradcam.results.slide import SlideResult

LayerData = tuple[Any, dict[str, Any], str]
OPACITY = 0.6
COLORMAP = "inferno"
MAX_MULTIPLE = 1024  # px; slides whose downsamples have a larger common multiple are not padded.


def get_reader(path: str | Sequence[str]) -> Callable[[Any], list[LayerData]] | None:
    """Return the function that reads `path`; None if `path` is not a result. Called by napari."""
    if not isinstance(path, str):
        return None
    try:
        find_result(path)
    except ResultError:
        return None
    return read


def read(path: str) -> list[LayerData]:
    """Return the layers of the slide in `path`: the folder of a slide, a path in it, or OUT of a run over one slide.

    Raises:
        ResultError: there are several slides to choose from, or no results of this slide.
    """
    result, slide = find_result(path)
    if slide is None:
        finished = [each for each in result if each.is_finished]
        if len(finished) != 1:
            ways = f"open the folder of one, such as {finished[0].folder.place}" if finished else "run explain again"
            raise ResultError(f"{result.out}: {len(finished)} slides are finished; {ways}")
        slide = finished[0]
    return _layers_of(result, slide)


def _layers_of(result: Result, slide: SlideResult) -> list[LayerData]:
    """Return the slide if it can be read, a layer for each channel with only the first visible, and the coverage."""
    from wsi_gradcam.results.lazy import lazy_flags, lazy_levels, padded  # not at the top: dask and xarray

    step = slide.stride_px
    place = {
        "scale": tuple(mpp * step for mpp in slide.mpp),
        "translate": tuple(mpp * (step - 1) / 2 for mpp in slide.mpp),
        "units": ("µm", "µm"),
        "axis_labels": ("y", "x"),
    }
    windows, factors = result.windows(), [2**level for level in range(len(slide.levels))]
    found = _slide_layer(slide)
    for channel in slide.channels:
        levels = padded(lazy_levels(slide.store, len(factors), channel.number), factors)
        about = {
            "name": f"{slide.id} {channel.label}",
            "multiscale": True,
            "contrast_limits": windows.get(channel.label, channel.window),
            "colormap": _colormap(),
            "blending": "translucent",
            "visible": channel.number == 0,
            "metadata": {"unit": channel.unit, "window_of_slide": channel.window, "slide": slide.path},
        }
        found.append((levels, {**about, **place}, "image"))
    flags = padded(lazy_flags(slide.store, len(factors)), factors)
    about = {"name": f"{slide.id} coverage", "multiscale": True, "opacity": 0.4, "visible": False}
    return [*found, (flags, {**about, **place}, "labels")]


def _slide_layer(slide: SlideResult) -> list[LayerData]:
    """Return the slide itself; nothing if it is gone: the heatmap is worth showing on its own."""
    from wsi_gradcam.results.lazy import lazy_slide, padded

    try:
        opened = slide.open_slide()
    except SlideError:
        return []
    downsamples = [level.downsample_y for level in opened.info.levels if not level.problem]
    levels = lazy_slide(opened)
    if all(down.is_integer() for down in downsamples):
        factors = [int(down) for down in downsamples]
        if math.lcm(*factors) <= MAX_MULTIPLE:
            levels = padded(levels, factors)
    about = {
        "name": slide.id,
        "rgb": True,
        "multiscale": len(levels) > 1,
        "scale": slide.mpp,
        "units": ("µm", "µm"),
        "axis_labels": ("y", "x"),
        "metadata": {"slide": slide.path},
    }
    return [(levels if len(levels) > 1 else levels[0], about, "image")]


def _colormap() -> Any:
    """Return the colour map, RGBA [256, 4]; low values are transparent, as in exports."""
    values = np.linspace(0, 1, STEPS, dtype=np.float32)[None]
    flags = np.full(values.shape, EXPLAINED, np.uint8)
    return Colouring(COLORMAP, 0.0, 1.0, alpha=OPACITY).rgba(values, flags)[0] / 255
