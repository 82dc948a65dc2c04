"""What the page is told of a run and of a slide, as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from wsi_gradcam import __version__
from wsi_gradcam.audit.folder import AUDIT, REPORT, AuditFolder
from wsi_gradcam.errors import SlideError, WsiGradcamError, one_line
from wsi_gradcam.viewer.archive import shown_name
from wsi_gradcam.viewer.files import RUN_REPORT
from wsi_gradcam.viewer.gallery import status_of
from wsi_gradcam.viewer.heat import finer_levels, heat_grid, scale_of
from wsi_gradcam.viewer.tiles import slide_grid

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.channels import ChannelInfo
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.viewer.archive import Archive, Shown
    from wsi_gradcam.viewer.spread import Spread

Windows = dict[str, tuple[float, float]]


def run_facts(archive: Archive) -> dict[str, Any]:
    """Of the run: name, model, classes, whether it was audited."""
    result = archive.result
    model = result.run["model"]
    settings = result.run.get("settings", {})
    return {
        "version": __version__,
        "name": shown_name(archive.out.name),
        "model": shown_name(str(model["name"])),
        "untrained": model.get("weights") == "random",
        "layer": str(model.get("layer", "")),
        "classes": [shown_name(label) for label in result.classes],
        "methods": list(settings.get("method", [])),
        "patch_px": list(model["patch_px"]),
        "patch_mpp": model["mpp"],
        "report": f"/files/{RUN_REPORT}" if _has(archive.out / RUN_REPORT) else None,
        "audit": f"/files/{AUDIT}/{REPORT}" if _has(AuditFolder(archive.out / AUDIT).report) else None,
    }


def audit_address(archive: Archive, shown: Shown) -> str | None:
    """Where the page of a slide's audit is handed out; None where there is none."""
    slide_id = shown.result.id
    if not _has(AuditFolder(archive.out / AUDIT).slide_report(slide_id)):
        return None
    return f"/files/{AUDIT}/{quote(slide_id.encode('utf-8', 'surrogateescape'))}/{REPORT}"


def slide_facts(
    shown: Shown, slide: Slide | SlideError, spread: Spread | WsiGradcamError | None, windows: Windows
) -> dict[str, Any]:
    """Of a slide: its own picture, its heatmap with its spread, patches. What is missing of them, with the reason.

    `windows` are those of the whole run, as far as they are known.
    """
    result = shown.result
    facts: dict[str, Any] = {
        "key": shown.key,
        "version": shown.version,
        "id": shown_name(result.id),
        "status": status_of(shown),
        "error": shown_name(result.error),
        "slide": _picture(slide),
        "heat": None,
        "channels": [],
        "patch": None,
    }
    try:
        plan = result.plan
        facts["size_px"], facts["mpp"] = list(plan.slide_px), list(plan.slide_mpp)
        facts["patch"] = {"count": plan.patches, "footprint_px": list(plan.footprint), "view_px": list(plan.view)}
        grid = heat_grid(result)
        facts["heat"] = {
            "size_px": [grid.height, grid.width],
            "levels": grid.levels,
            "tile_px": grid.tile_px,
            "finer": finer_levels(result),
            "stride_px": result.stride_px,
        }
        channels = [_channel(channel, windows, str(channel.number)) for channel in result.channels]
        facts["channels"] = channels if isinstance(spread, WsiGradcamError) else channels + _spread_channels(spread)
        facts["spread_problem"] = shown_name(one_line(spread)) if isinstance(spread, WsiGradcamError) else None
        facts["table"] = result.is_finished and plan.patches > 0
    except (WsiGradcamError, OSError, KeyError) as error:
        facts["heat_problem"] = shown_name(facts["error"] or one_line(error))
        if not isinstance(slide, SlideError):
            facts["size_px"], facts["mpp"] = [slide.info.height, slide.info.width], list(slide.info.mpp_yx)
    return facts


def patch_columns(result: SlideResult, number: int) -> list[dict[str, Any]]:
    """A patch's own maps, one a channel that has them: float values [h][w], and what they are."""
    maps = result.cams(number)
    return [
        {
            "channel": channel.number,
            "label": shown_name(channel.label),
            "unit": channel.unit,
            "values": [[round(float(value), 5) for value in row] for row in cam],
        }
        for channel, cam in zip(result.channels, maps, strict=False)
    ]


def _picture(slide: Slide | SlideError) -> dict[str, Any]:
    if isinstance(slide, SlideError):
        return {"problem": shown_name(one_line(slide))}
    grid = slide_grid(slide.info)
    return {
        "problem": None,
        "levels": grid.levels,
        "tile_px": grid.tile_px,
        "objective": slide.info.objective,
        "background": list(slide.info.background),
    }


def _spread_channels(spread: Spread | None) -> list[dict[str, Any]]:
    if spread is None:
        return []
    return [_channel(channel, {}, f"spread-{spread.digest}/{channel.number}") for channel in spread.result.channels]


def _channel(channel: ChannelInfo, windows: Windows, address: str) -> dict[str, Any]:
    """`address` is the channel's part of its tiles' addresses."""
    scale, run = scale_of(channel), windows.get(channel.label)
    return {
        "address": address,
        "label": shown_name(channel.label),
        "method": channel.method,
        "target": shown_name(channel.target),
        "unit": channel.unit,
        "range": [channel.minimum, channel.maximum],
        "window": list(channel.window),
        "run_window": list(run) if run else None,
        "scale": [scale.low, scale.high],
    }


def _has(place: StoragePath) -> bool:
    try:
        return place.size() >= 0
    except (FileNotFoundError, WsiGradcamError):
        return False
