"""Figures of the audit's report, as SVG with text that is drawn, so that they look the same everywhere."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from wsi_gradcam.audit.report.words import named
from wsi_gradcam.pages.parts import Html

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from wsi_gradcam.audit.schema import CurveRow, EstimateRow

# Okabe and Ito: apart for colour-blind eyes, too; controls are gray, and told apart by their dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL = "#5f6873"
RANDOMLY = "at random (control)"  # how a slide's patches are taken away beside the map's order
DASHES: Mapping[str, tuple[float, ...]] = {
    "random": (1, 1.5),
    "edges": (4, 1.5),
    "constant": (6, 1.5, 1, 1.5),
    "centre": (2, 1, 2, 3),
    "probability": (8, 2),
    RANDOMLY: (1, 1.5),
}


PANEL, SMALL_PANEL = (4.2, 3.0), (2.6, 2.2)  # (width, height) of a panel, in inches of 72 points


def curves_figure(
    panels: Sequence[tuple[str, Sequence[CurveRow]]],
    said: str,
    size: tuple[float, float] = PANEL,
    reference: float | None = None,
    named_reference: str = "chance (control)",
) -> Html:
    """Curves side by side, a panel each with its title; methods in colour, controls gray; `said` describes it.

    `reference` is a height that they are held against, such as chance.
    """

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (title, rows) in zip(axes, panels, strict=True):
            for row in rows:
                _line(axis, row, rows)
            if reference is not None:
                axis.axhline(reference, color=CONTROL, linewidth=1, linestyle=(0, (3, 2)), label=named_reference)
            axis.set_title(title, fontsize=9)
            if rows:
                axis.set_xlabel(rows[0].x_name, fontsize=8)
                axis.set_ylabel(rows[0].y_name, fontsize=8)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)

    width = size[0] * max(len(panels), 2)
    return _drawn(len(panels), draw, said, (width, size[1]))


def intervals_figure(
    rows: Sequence[tuple[str, EstimateRow]],
    reference: float | None,
    axis_name: str,
    said: str,
    left: float | None = None,
) -> Html:
    """Estimates with their intervals, a line each; `reference` is what they are held against, `left` where x begins.

    Controls, whose names say so, are gray.
    """

    def draw(axes: Sequence[Axes]) -> None:
        axis = axes[0]
        for i, (name, row) in enumerate(rows):
            if row.value is None or row.low is None or row.high is None:
                continue
            colour = CONTROL if name.endswith("(control)") else COLOURS[0]
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

    return _drawn(1, draw, said, (8.4, 0.9 + 0.3 * len(rows)))


def _line(axis: Axes, row: CurveRow, rows: Sequence[CurveRow]) -> None:
    y = np.array([np.nan if value is None else value for value in row.y], np.float64)
    if row.of in DASHES:
        axis.plot(row.x, y, color=CONTROL, linewidth=1.2, dashes=DASHES[row.of], label=named(row.of))
        return
    own = [other.of + other.what for other in rows if other.of not in DASHES]
    colour = COLOURS[own.index(row.of + row.what) % len(COLOURS)]
    label = named(row.of) if len({other.what for other in rows}) == 1 else f"{named(row.of)}: {row.what}"
    axis.plot(row.x, y, color=colour, linewidth=2, label=label)
    if row.low is not None and row.high is not None:
        low, high = ([np.nan if v is None else v for v in ends] for ends in (row.low, row.high))
        axis.fill_between(row.x, low, high, color=colour, alpha=0.15, linewidth=0)


def _drawn(panels: int, draw: Callable[[Sequence[Axes]], None], said: str, size: tuple[float, float]) -> Html:
    with mpl.rc_context(
        {"svg.hashsalt": said, "svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False}
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
    return _inline(buffer.getvalue(), said)


def _inline(svg: str, said: str) -> Html:
    """An SVG for the middle of a page: no header, no metadata, no ids that another figure has too."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    own = hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", body)
    body = body.replace("<svg ", f'<svg role="img" aria-label="{escape(said)}" ', 1)
    return Html(f"<figure>{body}</figure>")
