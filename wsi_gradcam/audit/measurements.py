"""Measurements of patches: typed records, the arrays by name that hold them on disk, and all of an audit together.

A record is a dataclass with keyword-only fields, whose arrays have an axis of patches first. `stored` says of a field
under which name its arrays lie; a mapping has a pair of braces in it for each level of its keys:

    worth: Mapping[str, Floats] = stored("locality/{}/worth")
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from wsi_gradcam.audit.estimates import Comparison, Estimate, compare, estimate
from wsi_gradcam.audit.folder import Arrays, read_arrays

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from wsi_gradcam.audit.folder import AuditFolder
    from wsi_gradcam.audit.plan import SlideSample

    Floats = NDArray[np.float64]

Record = TypeVar("Record")
SLIDE, SHOWN = "slide/", "shown/"  # names of what is of a whole slide, and of what is only to be looked at


@dataclass(frozen=True)
class _Stored:
    path: str
    record: type | None
    keys: tuple[tuple[str, ...] | None, ...]

    @property
    def names(self) -> re.Pattern[str]:
        """Return a pattern for the names of the arrays, with a group for each key and one for the rest."""
        groups = ["(.+)" if known is None else f"({'|'.join(map(re.escape, known))})" for known in self.keys]
        path = re.escape(self.path).replace(r"\{\}", "{}")
        rest = "" if self.record is None else f"/({'|'.join(f.name for f in fields(self.record))})"
        return re.compile(path.format(*groups) + rest)


def stored(path: str, record: type | None = None, keys: tuple[tuple[str, ...] | None, ...] = ()) -> Any:
    """Return a field of a record.

    Args:
        path: name of its array; with braces for the keys of a mapping.
        record: the dataclass of arrays at the bottom of a mapping; their names follow those of the mapping.
        keys: those that may be, for each pair of braces; None for any.
    """
    levels = path.count("{}")
    what = _Stored(path, record, keys or (None,) * levels)
    return field(metadata={"stored": what}, default_factory=dict) if levels else field(metadata={"stored": what})


def optional(path: str) -> Any:
    """Return a field of a record that may be None: its array lies at `path`."""
    return field(metadata={"stored": _Stored(path, None, ())}, default=None)


def arrays_of(record: object, dtype: DTypeLike | None = None) -> Arrays:
    """Return the arrays of a record by name, as another `dtype` if one is given."""
    return {name: np.asarray(values, dtype or values.dtype) for name, values in _arrays(record, "")}


def _arrays(record: Any, start: str) -> Iterator[tuple[str, NDArray[Any]]]:
    for part in fields(record):
        what = part.metadata.get("stored")
        yield from _leaves(getattr(record, part.name), start + (part.name if what is None else what.path), ())


def _leaves(value: Any, path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, path, (*keys, key))
    elif isinstance(value, np.ndarray):
        yield path.format(*keys), value
    elif value is not None:
        yield from _arrays(value, f"{path.format(*keys)}/")


def record_from(kind: type[Record], arrays: Arrays) -> Record | None:
    """Return the record of a kind that is in arrays by name; None where an array is missing that it must have."""
    values: dict[str, Any] = {}
    for part in fields(kind):  # type: ignore[arg-type]
        what: _Stored = part.metadata.get("stored") or _Stored(part.name, None, ())
        found = _nested(what, arrays) if what.keys else arrays.get(what.path)
        if found is not None:
            values[part.name] = found
        elif part.default is not None:
            return None
    return kind(**values) if any(len(value) for value in values.values()) else None


def _nested(what: _Stored, arrays: Arrays) -> dict[str, Any]:
    """Return a mapping, in the order of its keys."""
    pattern, leaves = what.names, {}
    for name, values in arrays.items():
        if match := pattern.fullmatch(name):
            leaves[match.groups()] = values
    root: dict[str, Any] = {}
    for keys in sorted(leaves):
        place = root
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = leaves[keys]
    return root if what.record is None else _with_records(root, what.record, len(what.keys))


def _with_records(values: dict[str, Any], record: type, levels: int) -> Any:
    if levels:
        return {key: _with_records(value, record, levels - 1) for key, value in values.items()}
    return record(**values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Patches:
    """Facts of every patch: its place in the sample, the model's answer, and its maps.

    Attributes:
        number: in the slide's table.
        weight: how many patches it stands for.
        readable: 1 or 0.
        in_depth: 1 or 0, whether it was measured in depth.
        logits: [N, K] of the model.
        logit: that is explained.
        explained_class, probability: where a class is explained.
        difference: of a method's maps from those of the run, relative to these.
        maps: [N, h, w] by method.
        shown: uint8 [N, h, w, 3], of a slide's first batch: small pictures for the report.
    """

    number: NDArray[np.int64] = stored("base/number")
    weight: Floats = stored("base/weight")
    readable: NDArray[np.uint8] = stored("base/readable")
    in_depth: NDArray[np.uint8] = stored("base/deep")
    logits: NDArray[np.float32] = stored("base/logits")
    logit: Floats = stored("base/logit")
    explained_class: NDArray[np.int64] | None = optional("base/class")
    probability: Floats | None = optional("base/probability")
    difference: Mapping[str, Floats] = stored("base/{}/differs")
    maps: Mapping[str, NDArray[np.float32]] = stored("map/{}")
    shown: NDArray[np.uint8] | None = optional("shown/rgb")


@dataclass(frozen=True, eq=False)
class Measurements:
    """The measurements of an audit; NaN where one was not made of a patch.

    Attributes:
        arrays: by name, an axis of patches first; see `of` for records of them.
        slides: the id of each patch's slide.
        slide_arrays: what is of whole slides, by slide id and name.
        seed: of bootstraps and tests.
    """

    arrays: Arrays
    slides: NDArray[np.str_]
    slide_arrays: Mapping[str, Arrays]
    seed: int

    @cached_property
    def patches(self) -> Patches:
        """Facts of every patch: its place in the sample, the model's answer, and its maps."""
        found = self.of(Patches)
        assert found is not None
        return found

    def __len__(self) -> int:
        return len(self.slides)

    def of(self, kind: type[Record]) -> Record | None:
        """Return the record of a kind; None where it was not measured."""
        return record_from(kind, self.arrays)

    def of_slides(self, kind: type[Record]) -> dict[str, Record]:
        """Return the records of a kind that are of whole slides, by slide id."""
        found = {slide: record_from(kind, arrays) for slide, arrays in self.slide_arrays.items()}
        return {slide: one for slide, one in found.items() if one is not None}

    def only(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Measurements:
        """Return those of some of the patches."""
        arrays = {name: values[rows] for name, values in self.arrays.items()}
        return replace(self, arrays=arrays, slides=self.slides[rows])

    def of_slide(self, slide_id: str) -> Measurements:
        """Return those of the patches of a slide."""
        own = {slide_id: self.slide_arrays[slide_id]} if slide_id in self.slide_arrays else {}
        return replace(self.only(self.slides == slide_id), slide_arrays=own)

    @property
    def weights(self) -> Floats:
        """The number of patches that each stands for."""
        return np.asarray(self.arrays["base/weight"], np.float64)

    def estimate(self, values: NDArray[Any]) -> Estimate:
        """Estimate the weighted mean of a number of the patches; a NaN does not count."""
        return estimate(values, self.slides, self.weights, self.seed)

    def compare(self, first: NDArray[Any], second: NDArray[Any]) -> Comparison:
        """Compare two numbers of the patches."""
        return compare(first, second, self.slides, self.weights, self.seed)

    def mean(self, values: NDArray[Any]) -> Floats:
        """Return the weighted mean [Q] of values [N, Q], patches with a NaN left out."""
        known = ~np.isnan(values).reshape(len(values), -1).any(axis=1)
        if not known.any():
            return np.full(values.shape[1:], np.nan)
        mean: Floats = np.average(values[known], axis=0, weights=self.weights[known])
        return mean


def read_measurements(
    folder: AuditFolder, digest: str, samples: Mapping[str, SlideSample], seed: int, slides: Iterable[str]
) -> Measurements:
    """Read the measurements of some slides, in the order of the sample; without pictures.

    Raises:
        StoreError: a file is damaged.
        FileNotFoundError: one is not there.
    """
    places = ((slide, number) for slide in slides for number in range(samples[slide].batches))
    return joined(((slide, read_arrays(folder.batch(slide, digest, number))) for slide, number in places), seed)


def joined(batches: Iterable[tuple[str, Arrays]], seed: int) -> Measurements:
    """Return the measurements of batches, each with its slide's id."""
    kept: list[tuple[str, Arrays]] = []
    of_slides: dict[str, Arrays] = {}
    for slide, arrays in batches:
        for name in (name for name in arrays if name.startswith(SLIDE)):
            of_slides.setdefault(slide, {})[name] = arrays[name][0]
        kept.append((slide, {name: v for name, v in arrays.items() if not name.startswith((SLIDE, SHOWN))}))
    names = sorted({name for _, arrays in kept for name in arrays})
    counts = [len(arrays["base/number"]) for _, arrays in kept]
    whole = {name: _joined(name, [arrays for _, arrays in kept], counts) for name in names}
    ids = np.repeat(np.array([slide for slide, _ in kept], object), counts).astype(np.str_)
    return Measurements(whole, ids, of_slides, seed)


def _joined(name: str, batches: list[Arrays], counts: list[int]) -> NDArray[Any]:
    """Return an array of all batches; NaN for one that does not have it."""
    shape = next(arrays[name].shape[1:] for arrays in batches if name in arrays)
    parts = [
        arrays[name] if name in arrays else np.full((count, *shape), np.nan)
        for arrays, count in zip(batches, counts, strict=True)
    ]
    return np.concatenate(parts)
