"""The channels of a heatmap by name, and the windows of values between which their colours run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import SupportsIndex

from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import UnknownNameError, picked
from wsi_gradcam.results.heatmap import COLOURS, Channel

PROBABILITY = "probability"
RELEVANCE, ATTENTION = "relevance", "attention"  # of slide-level models
UNITS = {PROBABILITY: PROBABILITY, RELEVANCE: "logit", ATTENTION: "arbitrary"}


@dataclass(frozen=True)
class ChannelInfo:
    """A channel of a heatmap and how to show it.

    Attributes:
        number: its index in the image.
        label: "METHOD: TARGET", or "probability: TARGET"; of slide-level models also "relevance: TARGET", "attention".
        method: what made it: a method's name, "probability", "relevance" or "attention".
        target: the class, or another target, by name.
        unit: "logit", "drop" (logits lost where covered), "arbitrary", or "probability".
        minimum, maximum: range of its values in this slide.
        window: (low, high), the values between which colour runs, of this slide.
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
    """Return the unit of a channel's values, by its label."""
    method = label.partition(": ")[0]
    return UNITS[method] if method in UNITS else METHOD_INFO[method].unit


def find_channel(channels: Sequence[ChannelInfo], name: str | int | ChannelInfo, where: str) -> ChannelInfo:
    """Return the channel with the label `name`, else the first that explains the target `name`; or one by its number.

    Raises:
        UnknownNameError: there is none; the message has names that are near.
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
    """Return the place of one of `count` things that is given by number, from 0 or from the end.

    Raises:
        UnknownNameError: there is none, or it is no number; `wanted` says what is.
    """
    if isinstance(given, SupportsIndex) and not isinstance(given, bool):
        number = given.__index__()
        if -count <= number < count:
            return number % count
        raise UnknownNameError(f"{where} {number}; there are {count}, counted from 0")
    raise UnknownNameError(f"{where} {given!r:.100}; expected {wanted}")


def suggest_names(name: str, names: Sequence[str], most: int = 12) -> str:
    """Return a hint at the names that may have been meant by an unknown one.

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
    """Return the end of the window of an explanation whose `QUANTILE` is `top`; it begins at 0.

    What lies below 0 speaks against the class and stays dark: that is Grad-CAM's ReLU, as a view. The window is
    never narrower than one logit, so that a slide without evidence looks cold and its noise is not stretched to hot;
    methods whose means are not logits have no such floor: what one covered window costs may be a hundredth of a logit.
    Nor has a slide-level model, whose logit is shared by all patches, that of one patch; see `window_floor`.

    >>> window_end(0.2, "logit"), window_end(0.2, "drop"), window_end(0.2, "arbitrary"), window_end(-3.0, "arbitrary")
    (1.0, 0.2, 0.2, 1.0)
    """
    return max(top, floor) if unit == "logit" or top <= 0 else top


def window_floor(is_slide_level: bool, patches: float) -> float:
    """Return the least end of a window in logits: one, which a slide-level model's patches have together.

    >>> window_floor(False, 500), window_floor(True, 500)
    (1.0, 0.002)
    """
    return MIN_WINDOW / max(1.0, patches) if is_slide_level else MIN_WINDOW
