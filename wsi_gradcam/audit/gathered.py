"""The numbers of all pieces together, a row a patch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.audit.estimates import Comparison, Estimate, compare, estimate
from wsi_gradcam.audit.folder import Numbers, read_numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.folder import AuditFolder
    from wsi_gradcam.audit.plan import SlideSample

    Floats = NDArray[np.float64]

SLIDE, PICTURES = "slide/", "shown/"


@dataclass(frozen=True, eq=False)
class Gathered:
    """Numbers by name, the first axis that of the patches; NaN where a piece did not measure one.

    Attributes:
        numbers: of patches.
        slides: their slides' ids.
        of_slides: numbers of whole slides, by name and slide id.
        seed: of bootstraps and tests.
    """

    numbers: Numbers
    slides: NDArray[np.str_]
    of_slides: Mapping[str, Mapping[str, NDArray[Any]]]
    seed: int

    def __contains__(self, name: str) -> bool:
        return name in self.numbers

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.numbers[name]

    def names(self, start: str, end: str = "") -> list[str]:
        """What stands between `start` and `end` in the names that have both, in alphabetical order."""
        found = (name for name in self.numbers if name.startswith(start) and name.endswith(end))
        return sorted(name[len(start) : len(name) - len(end)] for name in found)

    @cached_property
    def weights(self) -> Floats:
        """How many patches each stands for."""
        return np.asarray(self.numbers["base/weight"], np.float64)

    def only(self, rows: NDArray[np.bool_]) -> Gathered:
        """Some of the patches."""
        numbers = {name: values[rows] for name, values in self.numbers.items()}
        return replace(self, numbers=numbers, slides=self.slides[rows])

    def of_slide(self, slide_id: str) -> Gathered:
        """The patches of a slide."""
        mine = {name: {slide_id: by[slide_id]} for name, by in self.of_slides.items() if slide_id in by}
        return replace(self.only(self.slides == slide_id), of_slides=mine)

    def estimate(self, values: NDArray[Any]) -> Estimate:
        """The weighted mean of a number of the patches; patches on which it was not to be measured do not count."""
        return estimate(values, self.slides, self.weights, self.seed)

    def compare(self, first: NDArray[Any], second: NDArray[Any]) -> Comparison:
        """Two numbers of the patches."""
        return compare(first, second, self.slides, self.weights, self.seed)

    def mean(self, values: NDArray[Any]) -> Floats:
        """The weighted mean [Q] of values [N, Q], patches with a NaN left out."""
        known = ~np.isnan(values).reshape(len(values), -1).any(axis=1)
        if not known.any():
            return np.full(values.shape[1:], np.nan)
        mean: Floats = np.average(values[known], axis=0, weights=self.weights[known])
        return mean


def gather(
    folder: AuditFolder, digest: str, samples: Mapping[str, SlideSample], seed: int, slides: Iterable[str]
) -> Gathered:
    """The numbers of all pieces of some slides, in the order of the sample; only numbers are kept, no pictures.

    Raises:
        StoreError: a piece is damaged.
        FileNotFoundError: a piece is not there.
    """
    places = ((slide, number) for slide in slides for number in range(samples[slide].pieces))
    return gathered_of(((slide, read_numbers(folder.piece(slide, digest, number))) for slide, number in places), seed)


def gathered_of(measured: Iterable[tuple[str, Numbers]], seed: int) -> Gathered:
    """The numbers of pieces, each with its slide's id."""
    pieces: list[tuple[str, Numbers]] = []
    of_slides: dict[str, dict[str, NDArray[Any]]] = {}
    for slide, numbers in measured:
        for name in (name for name in numbers if name.startswith(SLIDE)):
            of_slides.setdefault(name, {})[slide] = numbers[name][0]
        kept = {name: values for name, values in numbers.items() if not name.startswith((SLIDE, PICTURES))}
        pieces.append((slide, kept))
    names = sorted({name for _, numbers in pieces for name in numbers})
    counts = [len(numbers["base/number"]) for _, numbers in pieces]
    joined = {name: _joined(name, [numbers for _, numbers in pieces], counts) for name in names}
    ids = np.repeat(np.array([slide for slide, _ in pieces], object), counts).astype(np.str_)
    return Gathered(joined, ids, of_slides, seed)


def _joined(name: str, pieces: list[Numbers], counts: list[int]) -> NDArray[Any]:
    """An array of all pieces; NaN for a piece that does not have it."""
    shape = next(numbers[name].shape[1:] for numbers in pieces if name in numbers)
    parts = [
        numbers[name] if name in numbers else np.full((count, *shape), np.nan)
        for numbers, count in zip(pieces, counts, strict=True)
    ]
    return np.concatenate(parts)
