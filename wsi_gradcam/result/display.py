"""One display window for all slides of a run, so that colours of different slides can be compared.

`display.json` beside run.yaml holds, for each channel, a sketch of the values of all explained pixels of all slides
and the window that follows from it. It is made when it is first asked for, and brought up to date when slides have
come since: only new slides are read. Nothing else depends on it, and it may be deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import StoreError, one_line
from wsi_gradcam.geometry import tiles
from wsi_gradcam.result.channels import PROBABILITY, ChannelInfo
from wsi_gradcam.result.sketch import Sketch
from wsi_gradcam.result.slide import SlideResult
from wsi_gradcam.stores.heatmap import EXPLAINED, SHARD
from wsi_gradcam.windows import QUANTILE, window_end
from wsi_gradcam.workflow import FAILED

if TYPE_CHECKING:
    from wsi_gradcam.stores.places import Place

VERSION = 1
# Of each slide the finest level of at most this many pixels is read: a 100-gigapixel slide costs no more than a small
# one, and a level's pixels count for as many as they stand for.
STATISTICS_PX = 1 << 22

Progress = Callable[[int, int], None]


def run_windows(
    slides: Iterable[SlideResult], place: Place, run_digest: str, progress: Progress | None = None
) -> dict[str, tuple[float, float]]:
    """The window (low, high) of each channel, by its label, over all finished slides; kept at `place`.

    Probabilities run from 0 to 1; explanations as on a single slide from 0 to the 99.5 % quantile, see `window_end`,
    each explained pixel of the run counting once. Slides that cannot be read are left out and named in the file.
    Where the file cannot be written, the windows are made anew each time.

    Args:
        progress: told how many slides are read, and of how many.
    """
    finished = {slide.id: slide for slide in slides if slide.row and slide.row["status"] != FAILED}
    keys = {name: _key(slide) for name, slide in finished.items()}
    stored = _stored(place, run_digest)
    known: dict[str, str] = stored["slides"] if stored else {}
    if any(keys.get(name) != key for name, key in known.items()):  # one was made anew, or is gone
        stored, known = None, {}
    sketches = {label: (c["unit"], Sketch.from_json(c)) for label, c in stored["channels"].items()} if stored else {}
    new = [name for name in keys if name not in known]
    left_out = {}
    for count, name in enumerate(new):
        try:
            _add(sketches, finished[name])
        except Exception as error:  # one bad slide never hides the others
            left_out[name] = one_line(error)
            del keys[name]
        if progress is not None:
            progress(count + 1, len(new))
    windows = {label: _window(unit, sketch) for label, (unit, sketch) in sketches.items()}
    if new:
        channels = {
            label: {"unit": unit, "window": list(windows[label]), **sketch.to_json()}
            for label, (unit, sketch) in sketches.items()
        }
        values = {"version": VERSION, "run_digest": run_digest, "quantile": QUANTILE, "channels": channels}
        _store(place, {**values, "slides": keys, "left_out": left_out})
    return windows


def _window(unit: str, sketch: Sketch) -> tuple[float, float]:
    if unit == PROBABILITY or not sketch.total:
        return 0.0, 1.0
    return 0.0, window_end(sketch.quantile(QUANTILE), unit)


def _add(sketches: dict[str, tuple[str, Sketch]], slide: SlideResult) -> None:
    """Count a slide's explained pixels: into all sketches, or, where it cannot be read, into none."""
    if not slide.is_finished:
        raise StoreError(f"{slide.id}: is not finished")
    level = next((i for i, (h, w) in enumerate(slide.levels) if h * w <= STATISTICS_PX), len(slide.levels) - 1)
    found = [(channel, _sketch(slide, channel, level)) for channel in slide.channels]
    for channel, sketch in found:
        _, whole = sketches.setdefault(channel.label, (channel.unit, Sketch()))
        whole.counts += sketch.counts
        whole.minimum, whole.maximum = min(whole.minimum, sketch.minimum), max(whole.maximum, sketch.maximum)


def _sketch(slide: SlideResult, channel: ChannelInfo, level: int) -> Sketch:
    sketch = Sketch()
    if channel.unit == PROBABILITY:
        return sketch
    for block in tiles(*slide.levels[level], SHARD):
        explained = (slide.read_coverage(level, block) & EXPLAINED) > 0
        sketch.add(slide.read(channel, level, block)[explained], 4**level)
    return sketch


def _key(slide: SlideResult) -> str:
    """Changes when the slide is explained anew: its row holds digests and seconds."""
    return hashlib.sha256(json.dumps(slide.row, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _stored(place: Place, run_digest: str) -> dict[str, Any] | None:
    """What was kept, if it is this run's and of this version."""
    try:
        values = json.loads(place.read())
        for channel in values["channels"].values():
            Sketch.from_json(channel)
        same = (values["version"], values["run_digest"], values["quantile"]) == (VERSION, run_digest, QUANTILE)
        return values if same and isinstance(values["slides"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None  # made anew


def _store(place: Place, values: dict[str, Any]) -> None:
    try:
        place.write(json.dumps(values, sort_keys=True).encode())
    except StoreError:  # OUT may be read only
        return
