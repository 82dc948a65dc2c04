"""Figures of the audit's report: charts as SVG, and pictures of patches, maps and slides.

Text of the charts is drawn, so that it looks the same everywhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import binary_erosion

from wsi_gradcam.audit.measurements import Patches, record_from
from wsi_gradcam.audit.questions.faithfulness import Faithfulness
from wsi_gradcam.audit.questions.gradients import Saturation
from wsi_gradcam.audit.schema import EDGES, RANDOM, CurvesFigure
from wsi_gradcam.results.display import OUTLINE_COLOURS
from wsi_gradcam.results.overview import opened_picture
from wsi_gradcam.tissue.annotations import REGION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from wsi_gradcam.audit.plan import Arrays
    from wsi_gradcam.audit.schema import CurveRow, IntervalsFigure
    from wsi_gradcam.audit.schema import Figure as FigureRows
    from wsi_gradcam.io.paths import StoragePath


# Okabe and Ito: distinct for colour-blind readers too; controls are grey, and distinguished by their dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL = "#5f6873"
DASHES: Mapping[str, tuple[float, ...]] = {
    "random": (1, 1.5),
    "edges": (4, 1.5),
    "constant": (6, 1.5, 1, 1.5),
    "centre": (2, 1, 2, 3),
    "probability": (8, 2),
    "random_order": (1, 1.5),
}
PANEL, SMALL_PANEL = (4.2, 3.0), (2.6, 2.2)  # (width, height) of a panel, in inches of 72 points


@dataclass(frozen=True)
class Svg:
    """A drawing for the middle of a page.

    Attributes:
        view_box: the value of the attribute `viewBox`.
        content: markup inside the `svg` element; its ids occur in no other drawing.
        description: for readers who cannot see it.
    """

    view_box: str
    content: str
    description: str


def drawn(figure: FigureRows) -> Svg:
    """Return a figure of a question."""
    return curves_figure(figure) if isinstance(figure, CurvesFigure) else intervals_figure(figure)


def curves_figure(figure: CurvesFigure, size: tuple[float, float] = PANEL) -> Svg:
    """Return curves side by side, each in a panel with its title; methods in colour, controls in grey."""

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (title, curves) in zip(axes, figure.panels, strict=True):
            _draw_curves(axis, curves)
            if figure.reference is not None:
                name, dashes = figure.reference_name, (0, (3, 2))
                axis.axhline(figure.reference, color=CONTROL, linewidth=1, linestyle=dashes, label=name)
            axis.set_title(title, fontsize=9)
            if curves:
                axis.set_xlabel(curves[0][1].x_name, fontsize=8)
                axis.set_ylabel(curves[0][1].y_name, fontsize=8)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)

    width = size[0] * max(len(figure.panels), 2)
    return _drawn(len(figure.panels), draw, figure.description, (width, size[1]))


def intervals_figure(figure: IntervalsFigure) -> Svg:
    """Return estimates with their intervals, a line each; controls are gray."""

    def draw(axes: Sequence[Axes]) -> None:
        axis = axes[0]
        for i, (_, row) in enumerate(figure.rows):
            if row.value is None or row.low is None or row.high is None:
                continue
            colour = COLOURS[0] if row.control is None else CONTROL
            axis.plot([row.low, row.high], [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
            axis.plot([row.value], [i], "o", color=colour, markersize=5)
        axis.set_yticks(range(len(figure.rows)), [name for name, _ in figure.rows], fontsize=8)
        axis.invert_yaxis()
        axis.margins(y=0.15)
        axis.set_xlabel(figure.axis, fontsize=8)
        if figure.reference is not None:
            axis.axvline(figure.reference, color="#1b1f24", linewidth=1, linestyle=(0, (3, 2)))
        if figure.left is not None:
            axis.set_xlim(left=figure.left)

    return _drawn(1, draw, figure.description, (8.4, 0.9 + 0.3 * len(figure.rows)))


def _draw_curves(axis: Axes, curves: Sequence[tuple[str, CurveRow]]) -> None:
    colours = cycle(COLOURS)
    for name, row in curves:
        y = _numbers(row.y)
        if row.control is not None:
            axis.plot(row.x, y, color=CONTROL, linewidth=1.2, dashes=DASHES[row.control], label=name)
            continue
        colour = next(colours)
        axis.plot(row.x, y, color=colour, linewidth=2, label=name)
        if row.low is not None and row.high is not None:
            axis.fill_between(row.x, _numbers(row.low), _numbers(row.high), color=colour, alpha=0.15, linewidth=0)


def _numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _drawn(panels: int, draw: Callable[[Sequence[Axes]], None], description: str, size: tuple[float, float]) -> Svg:
    """Return panels side by side; `size` in inches is for all of them together."""
    with mpl.rc_context(
        {"svg.hashsalt": description, "svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=size, layout="constrained")
        axes = list(np.atleast_1d(figure.subplots(1, panels)))
        for axis in axes:
            axis.tick_params(labelsize=7.5, colors="#3a424c")
        draw(axes)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    return _parsed(buffer.getvalue(), description)


def _parsed(svg: str, description: str) -> Svg:
    """Return an SVG file without its header and metadata, with ids that no other figure of the page has."""
    parts = re.search(r'<svg[^>]*? viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, flags=re.DOTALL)
    assert parts is not None
    view_box, content = parts.groups()
    content = re.sub(r"<(metadata|style)\b.*?</\1>", "", content, flags=re.DOTALL)
    own = hashlib.sha256(description.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return Svg(view_box, re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", content), description)


FOR_AND_AGAINST = colormaps["RdBu_r"]  # red counts for the class, blue against it; distinct for colour-blind readers
OPACITY = 0.65
QUANTILE = 0.99
SHOWN = 4  # example patches of a slide
COMPARED = (RANDOM, EDGES)  # controls whose curves stand beside the map's


@dataclass(frozen=True)
class Picture:
    """A PNG file, its size in pixels, and a description for readers who cannot see it."""

    png: bytes
    width: int
    height: int
    description: str


@dataclass(frozen=True, eq=False)
class Example:
    """An example patch.

    Attributes:
        title: which patch it is.
        rgb: uint8 [h, w, 3].
        map: float32 [h, w] of the first method, as shown in heatmaps.
        leaky: the same with gradients that leak through inactive ReLUs; None if unknown.
        curves: of deletion and insertion, by the map's name: (deletion [Q], insertion [Q]).
        drawn: what is drawn on it, [side, side], see `audit.archive.drawn_labels`; None if nothing is.
        names: of the classes and regions represented by its bits.
    """

    title: str
    rgb: NDArray[np.uint8]
    map: NDArray[np.float32]
    leaky: NDArray[np.float32] | None
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    drawn: NDArray[np.unsignedinteger] | None = None
    names: Sequence[str] = ()

    @property
    def outlined(self) -> list[str]:
        """The classes and regions of which it shows a part."""
        return shown_names(self.drawn, self.names)

    def pictures(self, scale: float, colours: Mapping[str, str]) -> list[Picture]:
        """Return the patch, its map, and the map with leaky gradients if there is one; `scale` as for `coloured`.

        What is drawn on the patch is outlined in all of them, in `colours` by name.
        """
        lines = f" with outlines of {', '.join(self.outlined)}" if self.outlined else ""
        parts = [(self.rgb, f"the patch{lines}"), (coloured(self.rgb, self.map, scale), f"its map{lines}")]
        if self.leaky is not None:
            parts.append((coloured(self.rgb, self.leaky, scale), f"its map with leaky gradients{lines}"))
        lines_of = [colours[name] for name in self.names]
        return [picture(outlined(rgb, self.drawn, lines_of), f"{self.title}: {what}") for rgb, what in parts]


@dataclass(frozen=True, eq=False)
class DrawnSlide:
    """A small picture of a slide with what is drawn on it: bits [h, w] and their names, as in `Example`."""

    slide: str
    rgb: NDArray[np.uint8]
    drawn: NDArray[np.unsignedinteger]
    names: Sequence[str]

    @classmethod
    def of(cls, arrays: Arrays, slide: str) -> DrawnSlide | None:
        """Return it from a slide's first batch; None if nothing is drawn."""
        bits = arrays.get("shown/slide_drawn")
        if bits is None or not bits.any():
            return None
        return cls(slide, arrays["shown/slide"][0], bits[0], drawn_names(arrays["shown/slide_names"]))

    @property
    def outlined(self) -> list[str]:
        """The classes and regions that are on the slide."""
        return shown_names(self.drawn, self.names)

    def picture(self, colours: Mapping[str, str]) -> Picture:
        """Return the slide with outlines in `colours` by name."""
        lines = outlined(self.rgb, self.drawn, [colours[name] for name in self.names])
        return picture(lines, f"{self.slide}: outlines of {', '.join(self.outlined)}")


def examples_of(
    arrays: Arrays, slide: str, method: str, factor: int, classes: Sequence[str], wanted: int = SHOWN
) -> list[Example]:
    """Return example patches of a slide's first batch: those with the highest and lowest scores, and some in between.

    `factor` converts raw maps to what heatmaps show.
    """
    patches = record_from(Patches, arrays)
    assert patches is not None
    known = np.flatnonzero(patches.readable).tolist()
    order = sorted(known, key=lambda i: (-float(np.nan_to_num(patches.logit[i])), i))
    chosen = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(wanted, len(order)))]
    curves, gradients = record_from(Faithfulness, arrays), record_from(Saturation, arrays)
    of_maps = {} if curves is None else {name: curves.main[name] for name in (method, *COMPARED)}
    leaky = None if gradients is None else gradients.leaky.get(method)
    assert patches.shown is not None
    return [
        Example(
            _title(patches, slide, classes, i),
            patches.shown[i],
            patches.maps[method][i] * np.float32(factor),
            None if leaky is None else leaky[i] * np.float32(factor),
            {name: (one.deletion[i], one.insertion[i]) for name, one in of_maps.items()},
            None if patches.drawn is None else patches.drawn[i],
            () if patches.drawn is None else drawn_names(arrays.get("shown/drawn_names")),
        )
        for i in dict.fromkeys(chosen)
    ]


def _title(patches: Patches, slide: str, classes: Sequence[str], i: int) -> str:
    title = f"{slide}, patch {int(patches.number[i])}"
    if patches.probability is None or patches.explained_class is None:
        return title
    label = classes[int(patches.explained_class[i])]
    return f"{title}, probability of {label} {float(patches.probability[i]):.2f}"


def scale_of(maps: NDArray[np.float32]) -> float:
    """Return the value shown in full colour, one for all patches: otherwise healthy tissue would look hot."""
    finite = np.abs(maps[np.isfinite(maps)])
    top = float(np.quantile(finite, QUANTILE)) if len(finite) else 0.0
    return top if top > 0 else 1.0


def overlay(rgb: NDArray[np.uint8], map_: NDArray[np.float32], scale: float, description: str) -> Picture:
    """Return a map over the grey patch as a PNG; see `coloured`."""
    return picture(coloured(rgb, map_, scale), description)


def coloured(rgb: NDArray[np.uint8], map_: NDArray[np.float32], scale: float) -> NDArray[np.uint8]:
    """Return a map [h, w] in colour over the grey patch; values near 0 stay grey, `scale` has full colour."""
    height, width = rgb.shape[:2]
    large = np.asarray(
        Image.fromarray(np.nan_to_num(map_).astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    )
    value = np.clip(large / scale, -1, 1)
    colour = FOR_AND_AGAINST((value + 1) / 2, bytes=True)[..., :3].astype(np.float32)
    gray = np.repeat(rgb.mean(axis=2, dtype=np.float32)[..., None], 3, axis=2)
    opacity = OPACITY * np.minimum(1, np.abs(value) * 3)[..., None]
    return np.asarray((gray * (1 - opacity) + colour * opacity).round(), np.uint8)


OLD_NAMES = ("annotated", f"{REGION}given")  # in results of older versions, which did not distinguish classes


def drawn_names(stored: NDArray[np.str_] | None) -> tuple[str, ...]:
    """Return the names of the bits of what is drawn; see `audit.archive.drawn_labels`."""
    return OLD_NAMES if stored is None else tuple(json.loads(str(stored[0])))


def shown_names(bits: NDArray[np.unsignedinteger] | None, names: Sequence[str]) -> list[str]:
    """Return the names of which a picture shows a part."""
    return [] if bits is None else [name for bit, name in enumerate(names) if ((bits >> bit) & 1).any()]


def outline_colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour, such as "#ffffff", for each name, in the order of the viewer's colours."""
    known = dict.fromkeys(names)
    return {name: f"#{OUTLINE_COLOURS[number % len(OUTLINE_COLOURS)]}" for number, name in enumerate(known)}


def outlined(
    rgb: NDArray[np.uint8], bits: NDArray[np.unsignedinteger] | None, colours: Sequence[str]
) -> NDArray[np.uint8]:
    """Return a picture with lines around the areas of each bit: one in its colour outside, and a dark one inside it."""
    if bits is None:
        return rgb
    found, rows, columns = (
        rgb.copy(),
        *(np.arange(n) * side // n for n, side in zip(rgb.shape, bits.shape, strict=False)),
    )
    large = bits[rows[:, None], columns[None]]
    for bit, colour in enumerate(colours):
        inside = ((large >> bit) & 1).astype(np.bool_)
        for line in (tuple(bytes.fromhex(colour[1:])), (0, 0, 0)):
            inner = binary_erosion(inside, border_value=1)
            found[inside & ~inner] = line
            inside = inner
    return found


def colour_scale(scale: float, unit: str) -> Picture:
    """Return the colours of overlays from -`scale` to `scale`, left to right."""
    ramp = FOR_AND_AGAINST(np.linspace(0, 1, 256), bytes=True)[None, :, :3].repeat(10, axis=0)
    description = f"colours from {-scale:.3g} (blue) over 0 (gray) to {scale:.3g} (red), {unit}"
    return picture(np.ascontiguousarray(ramp), description)


def smaller(place: StoragePath, description: str, most_px: int) -> Picture:
    """Return the picture in a file of results, at most `most_px` wide; errors as in `opened_picture`."""
    with opened_picture(place) as image:
        image.thumbnail((most_px, image.height), Image.Resampling.LANCZOS)
        return picture(np.asarray(image.convert("RGB")), description)


def picture(rgb: NDArray[np.uint8], description: str) -> Picture:
    """Return an image uint8 [h, w, 3] as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", optimize=True)
    height, width = rgb.shape[:2]
    return Picture(buffer.getvalue(), width, height, description)
