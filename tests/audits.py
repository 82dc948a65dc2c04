"""Audits of small runs, for tests: an archive with all that can happen to slides, and what an audit leaves of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.runs import SMALL, toy_spec
from tests.synthetic import truncate, write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.models.spec import ModelSpec

QUICK: dict[str, Any] = {"patches": 16, "seed": 3}


def write_archive(folder: Path) -> Path:
    """Two slides with tissue, one of them in a folder, one of glass, one cut short; a list tells their sites."""
    (folder / "more").mkdir()
    write_marker_slide(folder / "a.tif", 300, 330, mpp=0.25, markers=[(100, 100), (230, 230)], marker_px=24)
    write_marker_slide(folder / "more" / "b.tif", 200, 330, mpp=0.25, markers=[], marker_px=16, seed=1)
    write_marker_slide(folder / "glass.tif", 400, 400, mpp=0.25, markers=[], marker_px=16, glass_px=200)
    truncate(folder / "a.tif", folder / "cut.tif", 0.5)
    rows = ["slide,site,label", "a.tif,north,tumour", "more/b.tif,south,other", "glass.tif,north,", "cut.tif,north,"]
    (folder / "list.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def explained(archive: Path, out: Path, model: str | ModelSpec = "pooled_linear", **settings: Any) -> Path:
    """The archive, explained with a toy model."""
    spec = toy_spec(model) if isinstance(model, str) else model
    explain(archive / "list.csv", spec, out, **{**SMALL, **settings})
    return out


def metrics_in(out: Path) -> dict[str, Any]:
    """metrics.json, without where it lies."""
    values: dict[str, Any] = json.loads((out / "audit" / "metrics.json").read_text(encoding="utf-8"))
    del values["run"]["out"]
    return values


def pieces_in(out: Path) -> dict[str, bytes]:
    """The files of numbers by name."""
    folder = out / "audit"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.npz")}


def reports_in(out: Path) -> dict[str, str]:
    """The pages by name."""
    folder = out / "audit"
    pages = [path for path in folder.rglob("*.html") if path != folder / "run.html"]  # that one tells times
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in pages}
