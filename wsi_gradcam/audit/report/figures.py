"""Figures of the audit's report, as SVG with text that is drawn, so that they look the same everywhere."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from wsi_gradcam.audit.report.words import named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from wsi_gradcam.audit.schema import CurveRow, EstimateRow

# Okabe and Ito: apart for colour-blind eyes, too; controls are gray, and told apart by their dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL = "#5f6873"
DASHES: Mapping[str, tuple[float, ...]] = {
    "random": (1, 1.5),
    "edges": (4, 1.5),
    "constant": (6, 1.5, 1, 1.5),
    "centre": (2, 1, 2, 3),
    "probability": (8, 2),
}
PANEL, SMALL_PANEL = (4.2, 3.0), (2.6, 2.2)  # (width, height) of a panel, in inches of 72 points


@dataclass(frozen=True)
class Svg:
    """A drawing for the middle of a page.

    Attributes:
        view_box: what the attribute `viewBox` holds.
        content: markup inside the `svg` element; its ids are the drawing's own.
        description: for those who do not see it.
    """

    view_box: str
    content: str
    description: str


def curves_figure(
    panels: Sequence[tuple[str, Sequence[CurveRow]]],
    description: str,
    size: tuple[float, float] = PANEL,
    reference: float | None = None,
    named_reference: str = "chance (control)",
) -> Svg:
    """Return curves side by side, a panel each with its title; methods in colour, controls gray.

    `reference` is a value to compare them with, such as chance.
    """

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (title, rows) in zip(axes, panels, strict=True):
            _draw_curves(axis, rows)
            if reference is not None:
                axis.axhline(reference, color=CONTROL, linewidth=1, linestyle=(0, (3, 2)), label=named_reference)
            axis.set_title(title, fontsize=9)
            if rows:
                axis.set_xlabel(rows[0].x_name, fontsize=8)
                axis.set_ylabel(rows[0].y_name, fontsize=8)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)

    width = size[0] * max(len(panels), 2)
    return _drawn(len(panels), draw, description, (width, size[1]))


def intervals_figure(
    rows: Sequence[tuple[str, EstimateRow]],
    reference: float | None,
    axis_name: str,
    description: str,
    left: float | None = None,
) -> Svg:
    """Return estimates with their intervals, a line each; controls are gray.

    `reference` is a value to compare them with, `left` is where x begins.
    """

    def draw(axes: Sequence[Axes]) -> None:
        axis = axes[0]
        for i, (_, row) in enumerate(rows):
            if row.value is None or row.low is None or row.high is None:
                continue
            colour = COLOURS[0] if row.control is None else CONTROL
            axis.plot([row.low, row.high], [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
            axis.plot([row.value], [i], "o", color=colour, markersize=5)
        axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
        axis.invert_yaxis()
        axis.margins(y=0.15)
        axis.set_xlabel(axis_name, fontsize=8)
        if reference is not None:
            axis.axvline(reference, color="#1b1f24", linewidth=1, linestyle=(0, (3, 2)))
        if left is not None:
            axis.set_xlim(left=left)

    return _drawn(1, draw, description, (8.4, 0.9 + 0.3 * len(rows)))


def _draw_curves(axis: Axes, rows: Sequence[CurveRow]) -> None:
    colours = cycle(COLOURS)
    several = len({row.what for row in rows}) > 1
    for row in rows:
        if row.control is not None:
            axis.plot(
                row.x, _numbers(row.y), color=CONTROL, linewidth=1.2, dashes=DASHES[row.control], label=named(row.of)
            )
            continue
        colour = next(colours)
        label = f"{named(row.of)}: {row.what}" if several else named(row.of)
        axis.plot(row.x, _numbers(row.y), color=colour, linewidth=2, label=label)
        if row.low is not None and row.high is not None:
            axis.fill_between(row.x, _numbers(row.low), _numbers(row.high), color=colour, alpha=0.15, linewidth=0)


def _numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _drawn(panels: int, draw: Callable[[Sequence[Axes]], None], description: str, size: tuple[float, float]) -> Svg:
    """Return panels side by side; `size` in inches of all of them together."""
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
    """Return an SVG file without its header and metadata, and with ids that no other figure of the page has."""
    parts = re.search(r'<svg[^>]*? viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, flags=re.DOTALL)
    assert parts is not None
    view_box, content = parts.groups()
    content = re.sub(r"<(metadata|style)\b.*?</\1>", "", content, flags=re.DOTALL)
    own = hashlib.sha256(description.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return Svg(view_box, re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", content), description)
