"""The channels of a heatmap by name, one display window for all slides of a run, and colours.

One window for all slides makes their colours comparable. `display.json` beside run.yaml has, for each channel, a sketch
of the values of all explained pixels of all slides and the window that follows from it. It is created on first use and
updated when there are new slides: only these are read. Nothing else depends on it, and it may be deleted. A sketch is a
histogram of float32 values without parameters, so that those of all slides can be added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex

import numpy as np

from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import ConfigError, StoreError, UnknownNameError, one_line, picked
from wsi_gradcam.geometry import tiles
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.results.heatmap import COLOURS, EXPLAINED, SHARD, Channel
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.results.seals import Seal, seal_of, sealed_json

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from wsi_gradcam.geometry import Region
    from wsi_gradcam.io.paths import StoragePath


PROBABILITY = "probability"
RELEVANCE, ATTENTION = "relevance", "attention"  # of slide-level models
UNITS = {PROBABILITY: PROBABILITY, RELEVANCE: "logit", ATTENTION: "arbitrary"}


@dataclass(frozen=True)
class ChannelInfo:
    """A channel of a heatmap and how to show it.

    Attributes:
        number: its index in the image.
        label: "METHOD: TARGET" or "probability: TARGET"; for slide-level models also "relevance: TARGET" and
            "attention".
        method: its origin: a method's name, "probability", "relevance" or "attention".
        target: the class, or another target, by name.
        unit: "logit", "drop" (logits lost where covered), "arbitrary", or "probability".
        minimum, maximum: range of its values in this slide.
        window: (low, high), the values between which the colours run on this slide.
        colour: 6 hex digits, for viewers that show channels in one colour each.
    """

    number: int
    label: str
    method: str
    target: str
    unit: str
    minimum: float
    maximum: float
    window: tuple[float, float]
    colour: str

    @classmethod
    def of(cls, number: int, channel: Channel) -> ChannelInfo:
        """Describe the `number`-th channel of a heatmap."""
        method, _, target = channel.label.partition(": ")
        return cls(
            number,
            channel.label,
            method,
            target,
            unit_of(channel.label),
            channel.minimum,
            channel.maximum,
            (channel.start, channel.end),
            COLOURS[number % len(COLOURS)],
        )


def unit_of(label: str) -> str:
    """Return the unit of a channel's values from its label."""
    method = label.partition(": ")[0]
    return UNITS[method] if method in UNITS else METHOD_INFO[method].unit


def find_channel(channels: Sequence[ChannelInfo], name: str | int | ChannelInfo, where: str) -> ChannelInfo:
    """Return the channel labelled `name`, or else the first that explains the target `name`; or a channel by number.

    Raises:
        UnknownNameError: there is none; the message suggests similar names.
    """
    if isinstance(name, ChannelInfo):
        name = name.label
    if not isinstance(name, str):
        return channels[at_index(name, len(channels), f"{where}: no channel", "its label, its class or its number")]
    for key in ("label", "target"):
        wanted = picked(name, [getattr(found, key) for found in channels])
        for found in channels:
            if wanted is not None and getattr(found, key) == wanted:
                return found
    labels = [channel.label for channel in channels]
    raise UnknownNameError(
        f"{where}: no channel {name!r}; {suggest_names(name, [*labels, *(c.target for c in channels)])}"
    )


def at_index(given: object, count: int, where: str, wanted: str) -> int:
    """Return the position of one of `count` things given by its number, counted from 0 or from the end.

    Raises:
        UnknownNameError: there is none, or it is not a number; `wanted` says what is expected.
    """
    if isinstance(given, SupportsIndex) and not isinstance(given, bool):
        number = given.__index__()
        if -count <= number < count:
            return number % count
        raise UnknownNameError(f"{where} {number}; there are {count}, counted from 0")
    raise UnknownNameError(f"{where} {given!r:.100}; expected {wanted}")


def suggest_names(name: str, names: Sequence[str], most: int = 12) -> str:
    """Return a hint with the names that an unknown one may stand for.

    >>> suggest_names("tumour", ["other", "tumor"])
    'did you mean tumor?'
    >>> suggest_names("x", ["b", "a", "b"])
    'expected one of b, a'
    """
    known = list(dict.fromkeys(names))
    by_lower = {text.lower(): text for text in reversed(known)}
    near = [by_lower[text] for text in get_close_matches(name.lower(), by_lower, 3)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    if not known:
        return "there are none"
    rest = f", and {len(known) - most} more" if len(known) > most else ""
    return f"expected one of {', '.join(known[:most])}{rest}"


QUANTILE = 0.995
MIN_WINDOW = 1.0  # logits


def window_end(top: float, unit: str, floor: float = MIN_WINDOW) -> float:
    """Return the upper end of the window of an explanation whose `QUANTILE` is `top`; the window begins at 0.

    Values below 0 are evidence against the class and stay dark: this is Grad-CAM's ReLU, as a view. The window is never
    narrower than one logit, so that a slide without evidence looks cold and its noise is not stretched to hot; methods
    whose means are not logits have no such floor: covering one window may cost a hundredth of a logit. Nor do
    slide-level models, whose logit is shared by all patches, have the floor of a patch model; see `window_floor`.

    >>> window_end(0.2, "logit"), window_end(0.2, "drop"), window_end(0.2, "arbitrary"), window_end(-3.0, "arbitrary")
    (1.0, 0.2, 0.2, 1.0)
    """
    return max(top, floor) if unit == "logit" or top <= 0 else top


def window_floor(is_slide_level: bool, patches: float) -> float:
    """Return the least upper end of a window in logits: one logit, divided among the patches for slide-level models.

    >>> window_floor(False, 500), window_floor(True, 500)
    (1.0, 0.002)
    """
    return MIN_WINDOW / max(1.0, patches) if is_slide_level else MIN_WINDOW


BINS = 1 << 16
SIGN = np.uint32(1 << 31)
STEPS = 256
GRAY = "gray"
# Colours of annotations: light, so that with a dark edge they are visible on glass, tissue and the colours of maps.
OUTLINE_COLOURS = ("ffffff", "56b4e9", "f0e442", "4de2a0", "ff9ad5", "ffb000")
FADE = 0.25  # the share of the window over which colours reach their full opacity


@dataclass
class Sketch:
    """Counts of values by the upper 16 bits of their float32, in the order of the values.

    A bin is at most 1/128 of its value wide, whatever the scale; sums of sketches do not depend on the order. Values
    that are not finite are ignored.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    minimum: float = float("inf")
    maximum: float = float("-inf")

    def add(self, values: NDArray[np.float32], weight: int = 1) -> None:
        """Count values, each `weight` times."""
        finite = values[np.isfinite(values)]
        if not len(finite):
            return
        self.counts += np.bincount(bins_of(finite), minlength=BINS) * weight
        self.minimum, self.maximum = min(self.minimum, float(finite.min())), max(self.maximum, float(finite.max()))

    @property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Return the value below which `share` of all values lie, interpolated linearly in its bin; NaN if none.

        It is off by less than a bin, 1/128 of the value.
        """
        if not self.total:
            return float("nan")
        sums = np.cumsum(self.counts)
        wanted = max(1.0, share * self.total)  # 0 would be found in a bin that is empty
        found = int(np.searchsorted(sums, wanted))
        before = int(sums[found - 1]) if found else 0
        low, high = edges_of(found)
        value = low + (high - low) * (wanted - before) / int(self.counts[found])
        return min(max(value, self.minimum), self.maximum)

    def to_json(self) -> dict[str, Any]:
        """Return the sketch as plain values."""
        (filled,) = np.nonzero(self.counts)
        return {
            "minimum": self.minimum if len(filled) else None,
            "maximum": self.maximum if len(filled) else None,
            "bins": filled.tolist(),
            "counts": self.counts[filled].tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Sketch:
        """Return the sketch that `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError, IndexError: it is damaged.
        """
        sketch = cls()
        sketch.counts[values["bins"]] = values["counts"]
        if values["bins"]:
            sketch.minimum, sketch.maximum = float(values["minimum"]), float(values["maximum"])
        return sketch


def bins_of(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return the bin of each value: the upper bits of its float32, reordered to grow with the value."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(bits & SIGN, ~bits, bits | SIGN) >> np.uint32(16)


def edges_of(number: int) -> tuple[float, float]:
    """Return the lowest and the highest value of a bin.

    >>> edges_of(int(bins_of(np.array([1.0], np.float32))[0]))
    (1.0, 1.0078123807907104)
    """
    low, high = _value(number << 16), _value((number << 16) | 0xFFFF)
    return low, high


def _value(ordered: int) -> float:
    bits = ordered & ~int(SIGN) if ordered & int(SIGN) else ~ordered & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


VERSION = 1
# Of each slide, the finest level with at most this many pixels is read: a 100-gigapixel slide costs no more than a
# small one, and a level's pixels are weighted by how many they represent.
STATISTICS_PX = 1 << 22

Progress = Callable[[int, int], None]


class Explained(Protocol):
    """A slide whose values are counted, such as a `SlideResult`."""

    @property
    def id(self) -> str:
        """Its name in the run."""

    @property
    def row(self) -> dict[str, str]:
        """Its row of slides.csv; empty if it is not listed there yet."""

    @property
    def is_finished(self) -> bool:
        """Whether the slide is complete."""

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(height, width) of the heatmap's levels, finest first."""

    @property
    def channels(self) -> tuple[ChannelInfo, ...]:
        """The channels of the heatmap."""

    def read(self, channel: ChannelInfo, level: int, region: Region) -> NDArray[np.float32]:
        """Return values of a channel in a region of a level."""

    def read_coverage(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the coverage in a region of a level."""


def run_windows(
    slides: Iterable[Explained], place: StoragePath, run_digest: str, progress: Progress | None = None
) -> dict[str, tuple[float, float]]:
    """Return the window (low, high) of each channel by label, over all finished slides; windows are stored at `place`.

    Probabilities run from 0 to 1; explanations, as on a single slide, from 0 to the 99.5% quantile (see `window_end`)
    of all explained pixels of the run. Slides that cannot be read are left out and listed in the file. If the file
    cannot be written, the windows are computed each time.

    Args:
        progress: called with the number of slides read and their total.
    """
    finished = {slide.id: slide for slide in slides if slide.row and slide.row["status"] != SlideStatus.FAILED}
    keys = {name: _key(slide) for name, slide in finished.items()}
    stored = _stored(place, run_digest)
    known: dict[str, str] = stored["slides"] if stored else {}
    if any(keys.get(name) != key for name, key in known.items()):  # a slide was explained again, or is gone
        stored, known = None, {}
    sketches = (
        {label: (unit_of(label), Sketch.from_json(c)) for label, c in stored["channels"].items()} if stored else {}
    )
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
    floor = window_floor(any(label.startswith(f"{RELEVANCE}: ") for label in sketches), _patches(finished, keys))
    windows = {label: _window(unit, sketch, floor) for label, (unit, sketch) in sketches.items()}
    if new:
        channels = {
            label: {"unit": unit, "window": list(windows[label]), **sketch.to_json()}
            for label, (unit, sketch) in sketches.items()
        }
        values = {"version": VERSION, "run_digest": run_digest, "quantile": QUANTILE, "channels": channels}
        values |= {} if floor == MIN_WINDOW else {"floor": floor}
        _store(place, {**values, "slides": keys, "left_out": left_out})
    return windows


def _window(unit: str, sketch: Sketch, floor: float) -> tuple[float, float]:
    if unit == PROBABILITY or not sketch.total:
        return 0.0, 1.0
    return 0.0, window_end(sketch.quantile(QUANTILE), unit, floor)


def _patches(slides: Mapping[str, Explained], counted: Iterable[str]) -> float:
    """Return the mean number of patches of the slides that are counted."""
    return float(np.mean([int(slides[name].row.get("patches") or 0) for name in counted] or [0]))


def _add(sketches: dict[str, tuple[str, Sketch]], slide: Explained) -> None:
    """Count a slide's explained pixels into all sketches, or into none if it cannot be read."""
    if not slide.is_finished:
        raise StoreError(f"{slide.id}: is not finished")
    level = next((i for i, (h, w) in enumerate(slide.levels) if h * w <= STATISTICS_PX), len(slide.levels) - 1)
    found = [(channel, _sketch(slide, channel, level)) for channel in slide.channels]
    for channel, sketch in found:
        _, whole = sketches.setdefault(channel.label, (channel.unit, Sketch()))
        whole.counts += sketch.counts
        whole.minimum, whole.maximum = min(whole.minimum, sketch.minimum), max(whole.maximum, sketch.maximum)


def _sketch(slide: Explained, channel: ChannelInfo, level: int) -> Sketch:
    sketch = Sketch()
    if channel.unit == PROBABILITY:
        return sketch
    for block in tiles(*slide.levels[level], SHARD):
        explained = (slide.read_coverage(level, block) & EXPLAINED) > 0
        sketch.add(slide.read(channel, level, block)[explained], 4**level)
    return sketch


def _key(slide: Explained) -> str:
    """Return a key that changes when the slide is explained again: its row holds digests and seconds."""
    row = {name: value for name, value in slide.row.items() if name != "row_digest"}
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _stored(place: StoragePath, run_digest: str) -> dict[str, Any] | None:
    """Return the stored windows, if they are this run's and of this version."""
    try:
        data = place.read(SMALL_BYTES)
        values = read_json(data)
        for channel in values["channels"].values():
            Sketch.from_json(channel)
        same = (values["version"], values["run_digest"], values["quantile"]) == (VERSION, run_digest, QUANTILE)
        return values if same and seal_of(data) is not Seal.BROKEN and isinstance(values["slides"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None  # made again


def display_problems(data: bytes) -> Iterator[str]:
    """Yield the problems with a display.json's bytes; older versions wrote it without a seal."""
    mend = "delete it; it is created again when needed"
    if seal_of(data) is Seal.BROKEN:
        yield f"display.json differs from what was written; {mend}"
    values = read_json(data)
    floor = values.get("floor", MIN_WINDOW)
    for label, channel in values["channels"].items() if values["version"] == VERSION else ():
        if tuple(channel["window"]) != _window(channel["unit"], Sketch.from_json(channel), floor):
            yield f"display.json: the window of {label} does not match its values; {mend}"


def _store(place: StoragePath, values: dict[str, Any]) -> None:
    try:
        place.write(sealed_json(values, sort_keys=True))
    except StoreError:  # OUT may be read only
        return


@dataclass(frozen=True)
class Colouring:
    """A mapping of values to colours.

    Attributes:
        colormap: the name of a matplotlib colour map.
        low, high: the window; values below and above get the first and the last colour.
        threshold: lower values are not shown; None shows all.
        alpha: opacity of shown values, 0 to 1; without a threshold, of values in the window's upper three quarters.
    """

    colormap: str
    low: float
    high: float
    threshold: float | None = None
    alpha: float = 1.0

    @property
    def table(self) -> NDArray[np.uint8]:
        """Return the colour map, RGB uint8 [256, 3]."""
        return np.asarray(check_colormap(self.colormap)(np.arange(STEPS), bytes=True)[:, :3], np.uint8)

    def steps(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the index of each value in the colour map: the window is divided into 256 equal steps."""
        with np.errstate(over="ignore"):  # values far outside the window
            scaled = (values - np.float32(self.low)) * np.float32(STEPS / (self.high - self.low))
        return np.asarray(np.clip(scaled, 0, STEPS - 1), np.uint8)

    def shown(self, values: NDArray[np.float32], flags: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return where pixels were explained and their values reach the threshold."""
        explained = (flags & EXPLAINED) > 0
        return explained if self.threshold is None else explained & (values >= np.float32(self.threshold))

    def rgb(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the colours [h, w, 3] of all values, shown or not."""
        return np.asarray(self.table[self.steps(values)], np.uint8)

    def rgba(self, values: NDArray[np.float32], flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return colours and opacity [h, w, 4]; all zeros where nothing is shown."""
        out = np.zeros((*values.shape, 4), np.uint8)
        shown = self.shown(values, flags)
        out[shown, :3] = self.rgb(values[shown])
        out[shown, 3] = self._opacity(values[shown])
        return out

    def _opacity(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return opacities; without a threshold, they rise over the lowest part of the window: tissue stays visible."""
        if self.threshold is not None:
            return np.full(values.shape, round(255 * self.alpha), np.uint8)
        share = np.clip((values - np.float32(self.low)) / np.float32((self.high - self.low) * FADE), 0, 1)
        return np.asarray(np.rint(share * np.float32(255 * self.alpha)), np.uint8)

    def gray(self, values: NDArray[np.float32], flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return grey levels [h, w]: 1 to 255 over the window, 0 where nothing is shown."""
        return np.where(self.shown(values, flags), np.maximum(self.steps(values), 1), 0).astype(np.uint8)


def check_colormap(name: str) -> Colormap:
    """Return the matplotlib colour map of this name.

    Raises:
        ConfigError: there is no such colour map.
    """
    from matplotlib import colormaps  # takes time to import

    if name not in colormaps:
        near = get_close_matches(name.lower(), list(colormaps), 3)
        mend = f"did you mean {' or '.join(near)}?" if near else "expected one of matplotlib's, such as inferno, gray"
        raise ConfigError(f"colormap {name!r} is not known; {mend}")
    return colormaps[name]
