"""A histogram of any float32 values that takes no parameters, so that those of all slides can be added."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 1 << 16
SIGN = np.uint32(1 << 31)


@dataclass
class Sketch:
    """Counts of values by the upper 16 bits of their float32, in the order of the values.

    A bin is at most 1/128 of its value wide, whatever the scale; sums of sketches do not depend on the order. Values
    that are not finite are left out.
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
        """How many values were counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """The value below which `share` of all lie, by linear interpolation in its bin; NaN of none.

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
        """The sketch as plain values."""
        (filled,) = np.nonzero(self.counts)
        return {
            "minimum": self.minimum if len(filled) else None,
            "maximum": self.maximum if len(filled) else None,
            "bins": filled.tolist(),
            "counts": self.counts[filled].tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Sketch:
        """The sketch that `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError, IndexError: it is damaged.
        """
        sketch = cls()
        sketch.counts[values["bins"]] = values["counts"]
        if values["bins"]:
            sketch.minimum, sketch.maximum = float(values["minimum"]), float(values["maximum"])
        return sketch


def bins_of(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The bin of each value: the bits of a float32, turned so that they grow with it, and cut."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(bits & SIGN, ~bits, bits | SIGN) >> np.uint32(16)


def edges_of(number: int) -> tuple[float, float]:
    """The lowest and the highest value of a bin.

    >>> edges_of(int(bins_of(np.array([1.0], np.float32))[0]))
    (1.0, 1.0078123807907104)
    """
    low, high = _value(number << 16), _value((number << 16) | 0xFFFF)
    return low, high


def _value(ordered: int) -> float:
    bits = ordered & ~int(SIGN) if ordered & int(SIGN) else ~ordered & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))
