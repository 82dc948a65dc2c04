"""Pictures for any program: `overview.png`, the slide beside its heatmaps, and `tissue.png`, the mask."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import StoreError, WsiGradcamError, one_line
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.models.spec import RANDOM
from wsi_gradcam.results.display import OUTLINE_COLOURS, unit_of
from wsi_gradcam.results.heatmap import EXPLAINED, Channel, HeatmapStore
from wsi_gradcam.slides import thumbnail
from wsi_gradcam.tissue.annotations import class_outlines

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan
    from wsi_gradcam.run.plan import Map, RunPlan
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.tissue.annotations import Drawn


MAX_PX = 600  # pixels of the thumbnail: a panel has about 450
FLAT = 0.5  # slides lower than this share of their width have their panels one below the other, twice as wide
PICTURE_IN, TITLE_IN, HEAD_IN, MARGIN_IN = 3.4, 0.3, 0.4, 0.08  # inches: a picture's width; above it; above all; around
BAR_GAP_IN, BAR_IN, BAR_ROOM_IN = 0.07, 0.13, 0.85  # inches: to the colour bar, of its width, and with its labels
MAX_MAPS = 3
UNREADABLE_GRAY = 128
COLOURS = colormaps["inferno"]  # perceptually uniform, dark to bright, distinct from the pinks of H&E
OPACITY = 0.7
UNITS = {"logit": "logits", "drop": "logits lost where covered", "arbitrary": "arbitrary unit"}
TISSUE_GRAY = 170  # under the colour bar, which shows the colours as displayed


def draw_overview(
    place: StoragePathLike,
    run: RunPlan,
    plan: SlidePlan,
    slide: Slide,
    heatmap: HeatmapStore,
    channels: Sequence[Channel],
    outlines: Drawn | None = None,
    answer: str = "",
) -> None:
    """Draw the thumbnail and overlays (the first explanations and their probabilities) with their colour bars.

    The outlines of annotations are drawn over each of them; above them is the `answer` of a slide-level model for the
    slide, in words. If no pixel is explained, the patches' contributions are shown instead of explanations.
    """
    rgb = _thumbnail(slide)
    um_per_px = plan.slide_px[1] * plan.slide_mpp[1] / rgb.shape[1]
    maps = run.maps[:MAX_MAPS]
    whose = " of the slide" if run.facts.bag else ""
    panels = [(number, UNITS[shown.info.unit] + whose) for number, shown in enumerate(maps)] or _of_patches(run)
    shown = len(panels)
    panels += [(number, "probability") for number in _probabilities(run, maps)]
    figure, places = _panels(shown, len(panels) - shown, rgb.shape[0] / rgb.shape[1])
    _show_slide(places[0].picture, rgb, um_per_px, plan)
    covered, images = _scaled(heatmap, plan, [number for number, _ in panels], (rgb.shape[0], rgb.shape[1]))
    for panel, (number, unit), image in zip(places[1:], panels, images, strict=True):
        _show_overlay(figure, panel, rgb, image, covered, channels[number], unit)
    if outlines is not None:
        _show_outlines([panel.picture for panel in places], class_outlines(outlines, plan.slide_px), plan, rgb.shape[1])
    name = slide.info.path.rsplit("/", 1)[-1]
    title = f"{name}{answer and f': {answer}'}\n{_about(run, plan)}"
    top = 1 - MARGIN_IN / figure.get_figheight()
    figure.suptitle(_shown(title), y=top, va="top", fontsize=9, parse_math=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        FigureCanvasAgg(figure).print_png(buffer, pil_kwargs={"compress_level": 1})  # a third of the time, a bit larger
    storage_path(place).write(buffer.getvalue())


def _of_patches(run: RunPlan) -> list[tuple[int, str]]:
    """Return a slide-level model's first channels with one number per patch, and their units; attention is last."""
    labels = run.bag_channels[: len(run.targets)][: MAX_MAPS - 1] + run.bag_channels[len(run.targets) :][:1]
    before = len(run.maps) + len(run.probabilities)
    return [(before + run.bag_channels.index(label), UNITS[unit_of(label)]) for label in labels]


def _probabilities(run: RunPlan, maps: Sequence[Map]) -> list[int]:
    """Return the channels with the probabilities of the maps' targets, each once; a contrast has none."""
    targets = dict.fromkeys(shown.target for shown in maps if shown.target in run.probabilities)
    return [len(run.maps) + run.probabilities.index(target) for target in targets]


def _about(run: RunPlan, plan: SlidePlan) -> str:
    """Return the text that one needs to read the picture."""
    stride = run.settings.stride(run.patch_px)
    methods = ", ".join(METHOD_INFO[method].title for method in run.settings.methods)
    methods += f" of {run.settings.bag_method[0].replace('_', ' ')}" if methods and run.facts.bag else ""
    how = f"{methods} at layer {run.facts.layer}" if methods else f"patches by {run.settings.bag_method[0]}"
    parts = [run.facts.name + (" (UNTRAINED, random weights)" if run.spec.weights == RANDOM else ""), how]
    if plan.features:
        parts.append(f"{plan.patches:,} patches of {plan.footprint[0] * plan.slide_mpp[0]:.4g} µm, as in the features")
    else:
        parts += [
            f"{plan.patches:,} patches of {run.patch_px[0]} px at {run.mpp:g} µm/px",
            "no overlap: patch borders show" if stride == run.patch_px else f"a patch every {stride[0]} px",
        ]
    if len(run.maps) > MAX_MAPS:
        parts.append(f"the first {MAX_MAPS} of {len(run.maps)} maps")
    return ", ".join(parts)


def _thumbnail(slide: Slide) -> NDArray[np.uint8]:
    """Return the slide's thumbnail, grey where it cannot be decoded."""
    flat = slide.info.height < FLAT * slide.info.width
    thumb = thumbnail(slide, 0.0, MAX_PX * (2 if flat else 1))
    thumb.rgb[thumb.unreadable] = UNREADABLE_GRAY
    return thumb.rgb


@dataclass(frozen=True)
class Panel:
    """The place of a picture and of its colour bar; the slide has no colour bar."""

    picture: Axes
    bar: Axes


def _panels(maps: int, probabilities: int, aspect: float) -> tuple[Figure, list[Panel]]:
    """Lay out panels for the slide and `maps` explanations, with probabilities below; a single map makes one row.

    Panels of a slide that is much wider than high (`aspect` is its height over its width) are placed one below the
    other. All positions are computed here: matplotlib's own layouts draw everything twice to find them.
    """
    if aspect < FLAT:
        places = [(row, 0) for row in range(1 + maps + probabilities)]
    elif maps == 1:
        places = [(0, column) for column in range(2 + probabilities)]
    else:
        places = [(0, column) for column in range(1 + maps)] + [(1, 1 + column) for column in range(probabilities)]
    rows, columns = (1 + max(numbers) for numbers in zip(*places, strict=True))
    width = PICTURE_IN * (2 if aspect < FLAT else 1)
    height = width * aspect
    size = columns * (width + BAR_ROOM_IN), rows * (height + TITLE_IN) + HEAD_IN + MARGIN_IN
    figure = Figure(figsize=size, dpi=120)
    panels = []
    for row, column in places:
        left, bottom = MARGIN_IN + column * (width + BAR_ROOM_IN), size[1] - HEAD_IN - (row + 1) * (height + TITLE_IN)
        boxes = (left, bottom, width, height), (left + width + BAR_GAP_IN, bottom, BAR_IN, height)
        axes = [figure.add_axes((x / size[0], y / size[1], w / size[0], h / size[1])) for x, y, w, h in boxes]
        panels.append(Panel(*axes))
    panels[0].bar.remove()
    return figure, panels


def _show_slide(axis: Axes, rgb: NDArray[np.uint8], um_per_px: float, plan: SlidePlan) -> None:
    axis.imshow(rgb)
    axis.set_title("slide" if plan.patches else "slide: no tissue found", fontsize=9)
    length_um = round_length(rgb.shape[1] * um_per_px / 4)
    length_px, margin = length_um / um_per_px, rgb.shape[1] * 0.03
    y = rgb.shape[0] - rgb.shape[0] * 0.03
    axis.plot([margin, margin + length_px], [y, y], color="black", linewidth=3, solid_capstyle="butt")
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
    axis.text(margin, y - rgb.shape[0] * 0.02, text, fontsize=8, va="bottom", bbox=box)
    axis.set_axis_off()


def _show_overlay(
    figure: Figure,
    place: Panel,
    rgb: NDArray[np.uint8],
    image: NDArray[np.float32],
    covered: NDArray[np.bool_],
    channel: Channel,
    unit: str,
) -> None:
    norm = Normalize(channel.start, channel.end, clip=True)
    # All in grey, so that no stain is taken for a value; what was not explained is paler. Bytes throughout: five panels
    # of float64 colours would be 150 MB.
    gray = rgb.mean(axis=2, dtype=np.float32)
    shown = np.repeat((128 + gray / 2).astype(np.uint8)[..., None], 3, axis=2)
    shown[covered] = _blended(np.asarray(norm(image[covered]), np.float32), gray[covered])
    place.picture.imshow(shown)
    place.picture.set_title(_shown(channel.label), fontsize=9, parse_math=False)
    place.picture.set_axis_off()
    steps = np.linspace(0, 1, 256, dtype=np.float32)
    seen = ListedColormap(_blended(steps, np.full(256, TISSUE_GRAY, np.float32)) / 255)
    bar = figure.colorbar(ScalarMappable(norm, seen), cax=place.bar, extend=_extend(channel))
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _show_outlines(
    axes: Sequence[Axes], outlines: Mapping[str, Sequence[NDArray[np.float64]]], plan: SlidePlan, width: int
) -> None:
    """Draw outlines of classes with black edges and, if there are several, their names in the first picture."""
    scale = width / plan.slide_px[1]
    lines = []
    for number, (name, rings) in enumerate(outlines.items()):
        colour = f"#{OUTLINE_COLOURS[number % len(OUTLINE_COLOURS)]}"
        closed = [np.concatenate([ring, ring[:1]])[:, ::-1] * scale - 0.5 for ring in rings]
        for axis in axes:
            for edge, thick in (("black", 2.2), (colour, 1.0)):
                axis.add_collection(LineCollection(closed, colors=edge, linewidths=thick), autolim=False)
        lines.append(Line2D([], [], color=colour, linewidth=2, label=_shown(name) or "region"))
    if len(lines) > 1:
        axes[0].legend(handles=lines, loc="upper right", fontsize=6, facecolor="#444444", labelcolor="white")


def _shown(name: str) -> str:
    """Return a name that can be drawn: file names that are not UTF-8 contain surrogates."""
    return name.encode("utf-8", "replace").decode()


def _blended(value: NDArray[np.float32], gray: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blend the colours [n, 3] of values 0 to 1 over grey tissue.

    Tissue without evidence stays readable in grey; colour gets stronger over the first quarter of the scale.
    """
    colour = COLOURS(value, bytes=True)[:, :3].astype(np.float32)
    opacity = OPACITY * np.minimum(1, value * 4)[:, None]
    return (gray[:, None] * (1 - opacity) + colour * opacity + 0.5).astype(np.uint8)


def _extend(channel: Channel) -> str:
    below, above = channel.minimum < channel.start, channel.maximum > channel.end
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")


def _scaled(
    heatmap: HeatmapStore, plan: SlidePlan, channels: Sequence[int], shape: tuple[int, int]
) -> tuple[NDArray[np.bool_], list[NDArray[np.float32]]]:
    """Return coverage and channels at the thumbnail's size, from the coarsest level that is at least as fine."""
    level = max((i for i, (h, _) in enumerate(heatmap.shapes) if h >= shape[0]), default=0)
    h, w = heatmap.shapes[level]
    # The heatmap's last row and column reach beyond the slide, the thumbnail's do not.
    step = plan.stride * 2**level
    rows = np.minimum(((np.arange(shape[0]) + 0.5) * plan.slide_px[0] / shape[0] / step).astype(int), h - 1)
    columns = np.minimum(((np.arange(shape[1]) + 0.5) * plan.slide_px[1] / shape[1] / step).astype(int), w - 1)
    whole = Region(0, 0, h, w)
    covered = ((heatmap.read_flags(level, whole) & EXPLAINED) > 0)[rows[:, None], columns]
    return covered, [heatmap.read(level, channel, whole)[rows[:, None], columns] for channel in channels]


def round_length(length_um: float) -> float:
    """Return the largest length of 1, 2 or 5 times a power of ten that is not longer than the given one.

    >>> round_length(730.0)
    500.0
    """
    power = 10.0 ** np.floor(np.log10(length_um))
    return float(max(step * power for step in (1, 2, 5) if step * power <= length_um * (1 + 1e-9)))


def write_mask(place: StoragePathLike, mask: NDArray[np.bool_]) -> None:
    """Write a bool mask [h, w] as a black and white PNG, with white for True."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(buffer, format="PNG")
    storage_path(place).write(buffer.getvalue())


def read_mask(place: StoragePathLike) -> NDArray[np.bool_]:
    """Read the bool mask [h, w] that `write_mask` wrote.

    Raises:
        StoreError: it is damaged.
    """
    with opened_picture(storage_path(place)) as image:
        return np.asarray(image.convert("L")) > 127


MAX_PICTURE_PX, MAX_PICTURE_BYTES = 1 << 25, 1 << 28  # an overview has 5 million pixels


@contextmanager
def opened_picture(place: StoragePath) -> Iterator[Image.Image]:
    """Open a PNG of ours after checking the size that it claims; it is decoded on first use.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is damaged, or larger than any of ours.
    """
    data = place.read(MAX_PICTURE_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a tighter bound is checked here
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.width * image.height > MAX_PICTURE_PX:
                    raise StoreError(
                        f"{place}: an image of {image.width} x {image.height} px, expected at most {MAX_PICTURE_PX:,} "
                        "px"
                    )
                yield image
    except WsiGradcamError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise StoreError(f"{place}: damaged ({one_line(error)}); recompute with --overwrite") from error
