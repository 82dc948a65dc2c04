"""Results as `explain` leaves them, made of given values without a model: any size, in a moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.results.heatmap import EXPLAINED, Channel, HeatmapStore, coarsen, coarsen_flags
from wsi_gradcam.results.manifest import Manifest, SlideDone, SlideOutcome, SlidePlan, SlideStatus
from wsi_gradcam.results.slide_tables import SlideTable

Values = npt.NDArray[np.float32]
Flags = npt.NDArray[np.uint8]
CLASSES = ("other", "tumour")
CHANNELS = (
    Channel("gradcam: tumour", -4.0, 8.0, 0.0, 2.0),
    Channel("eigencam: tumour", 0.0, 1.0, 0.0, 1.0, active=False),
    Channel("probability: tumour", active=False),
)
PATCH_PX = 64  # level-0 px a side


@dataclass(frozen=True)
class Made:
    """A slide of a made result.

    Attributes:
        size: (height, width) of the slide in level-0 px.
        draw: values [3, h, w] and coverage [h, w] of a region of the heatmap.
        path, digest: of the slide, where there is one.
    """

    size: tuple[int, int]
    draw: Callable[[Region], tuple[Values, Flags]]
    mpp: tuple[float, float] = (0.25, 0.3)
    stride: int = 16
    path: str = "/nowhere/slide.svs"
    digest: str = "d" * 32
    status: str = "ok"
    patches: int = field(default=40)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the heatmap."""
        return ceil_div(self.size[0], self.stride), ceil_div(self.size[1], self.stride)


def steps(shape: tuple[int, int], seed: int = 0) -> Callable[[Region], tuple[Values, Flags]]:
    """Smooth hills of values that are multiples of 1/128, exact in any arithmetic, on three quarters of the slide."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    rng = np.random.default_rng(seed)
    hills = sum(np.sin(y / a + p) * np.sin(x / b + q) for a, b, p, q in rng.uniform(5, 20, (6, 4)))
    first = np.round(np.asarray(hills) * 128) / 128
    flags = np.where(x < shape[1] * 0.75, 3, 0).astype(np.uint8)
    flags[:3] = 1
    values = np.stack([first, np.clip(first / 4 + 0.5, 0, 1), np.clip(first / 8 + 0.5, 0, 1)]).astype(np.float32)
    values *= (flags & EXPLAINED) > 0
    return lambda region: (values[(slice(None), *region.slices)], flags[region.slices])


def make(out: Path, slides: Mapping[str, Made]) -> Path:
    """Write a result."""
    out.mkdir(parents=True)
    model = {"name": "made", "layer": "features", "classes": list(CLASSES), "patch_px": [32, 32], "mpp": 0.5}
    run = {"run_digest": "r" * 64, "identity": {}, "model": model, "settings": {"reader": "auto"}}
    (out / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    table = SlideTable(out / "slides.csv")
    for name, slide in slides.items():
        table.add(_row(name, slide))
    table.flush()
    for name, slide in slides.items():
        if slide.status != "failed":
            _make_slide(out / name, slide)
    return out


def _row(name: str, slide: Made) -> dict[str, Any]:
    return {
        "id": name,
        "path": slide.path,
        "status": slide.status,
        "error": "",
        "patches": slide.patches,
        "unreadable": 0,
        "seconds": 1,
        "mpp_y": slide.mpp[0],
        "mpp_x": slide.mpp[1],
        "slide_digest": slide.digest,
        "model_digest": "m",
    }


def _make_slide(folder: Path, slide: Made) -> None:
    side = float(PATCH_PX)
    plan = SlidePlan(
        slide.digest,
        "r" * 64,
        slide.size,
        slide.mpp,
        (side, side),
        (0.0, 0.0, side, side),
        slide.patches,
        256,
        slide.stride,
    )
    scale = (slide.mpp[0] * slide.stride, slide.mpp[1] * slide.stride)
    store = HeatmapStore.create(folder / "heatmap.ome.zarr", folder.name, slide.shape, scale, CHANNELS, {"made": True})
    for block in store.blocks(0):
        values, flags = slide.draw(block)
        store.write_flags(0, block, flags)
        for channel, image in enumerate(values):
            store.write(0, channel, block, image)
    for level in range(1, len(store.shapes)):
        for block in store.blocks(level):
            source = Region(block.y * 2, block.x * 2, block.height * 2, block.width * 2)
            source = source.intersect(Region(0, 0, *store.shapes[level - 1]))
            flags = store.read_flags(level - 1, source)
            store.write_flags(level, block, coarsen_flags(flags))
            for channel in range(len(CHANNELS)):
                values = store.read(level - 1, channel, source)
                store.write(level, channel, block, coarsen(values, (flags & EXPLAINED) > 0))
    _write_table(folder / "patches.parquet", slide)
    manifest = Manifest(folder / "manifest")
    manifest.write_plan(plan)
    outcome = SlideOutcome(SlideStatus(slide.status), slide.patches, 0, "")
    manifest.write_done(SlideDone(outcome, {}, {}, {}))


def _write_table(path: Path, slide: Made) -> None:
    rng, count = np.random.default_rng(1), slide.patches
    columns = max(1, slide.size[1] // PATCH_PX)
    logits = rng.normal(size=(2, count)).astype(np.float32)
    status = np.where(np.arange(count) == 3, "unreadable", "ok")
    missing = status != "ok"
    table: dict[str, Any] = {
        "y": np.arange(count) // columns * PATCH_PX,
        "x": np.arange(count) % columns * PATCH_PX,
        "tissue": np.ones(count, np.float32),
        "status": status,
        "cause": [("torn" if bad else None) for bad in missing],
    }
    for name, values in zip(CLASSES, logits, strict=True):
        table[f"logit_{name}"] = pa.array(values, pa.float32(), mask=missing)
    table["cam_mean_tumour"] = pa.array(logits[1] * 2, pa.float32(), mask=missing)
    pq.write_table(pa.table(table), path)


def leaves(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each plain value, and to each dictionary or list in which none is."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from leaves(part, (*way, key))
    if way and not inner:
        yield way


def other(value: Any) -> Any:
    """A value of the same kind that is another."""
    if isinstance(value, bool) or value is None:
        return 1 if value is None else not value
    if isinstance(value, int | float):
        return value + 1 if np.isfinite(value) else 0
    return f"{value}x" if isinstance(value, str) else [value]


def changed(value: Any, way: tuple[Any, ...], kind: str) -> Any:
    """A copy with one value changed, or not a number, or gone."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in way[:-1]:
        inner = inner[key]
    if kind == "gone":
        del inner[way[-1]]
    else:
        inner[way[-1]] = float("nan") if kind == "nan" else other(inner[way[-1]])
    return copy
